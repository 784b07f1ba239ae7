"""A page's title and text are what a person sees of it."""

import random
import re
import time

import pytest

from rag_jax.corpus.html_text import declared_encodings
from rag_jax.corpus.html_text import read_html


def html_text(page):
  found = read_html(page)
  return found.title, found.text


PAGE = """<!DOCTYPE html>
<html><head><meta charset="utf-8"><title> A
  title </title><style>p { color: red }</style><script>var x = "no";</script>
</head><body><nav>Menu</nav>
<h1>The <i>head</i>ing</h1>
<p>One <b>bold</b> wo<em>rd</em>,
  wrapped.<br>Next&nbsp;line &amp; &eacute;<!-- no comment --></p>
<ul><li>first<li>second</ul><noscript>no script</noscript>
<table><tr><td>1</td><td>2</td></tr></table><template>no</template>
<pre>as   it
is</pre></body></html>"""


def test_a_page_gives_its_title_and_a_line_for_each_block():
  assert html_text(PAGE) == (
    "A title",
    "Menu\nThe heading\nOne bold word, wrapped.\nNext line & é\nfirst\nsecond\n"
    "1\t2\nas   it\nis",
  )


def test_without_a_title_the_first_heading_is_the_title():
  page = "<p>Text.</p><h2> Second <b>level</b></h2><h1>First</h1>"
  assert html_text(page)[0] == "Second level"
  assert html_text("<title> </title>" + page)[0] == "Second level"
  assert html_text("<p>Text.</p>")[0] == ""


@pytest.mark.parametrize(
  ("page", "text"),
  [
    ("", ""),
    ("no tags", "no tags"),
    ("https://example.org/x.html", "https://example.org/x.html"),
    ("<?xml version='1.0'?><html><body><p>x</p></body></html>", "x"),
    ("<p>not <b>closed", "not closed"),
    ("a < b <p>x</div></p> c", "a < b\nx\nc"),
  ],
)
def test_pages_that_are_not_quite_html_are_read_without_a_warning(page, text):
  assert html_text(page) == ("", text)


@pytest.mark.parametrize(
  ("element", "between"),
  [("<div>x", "\n"), ("<p>x</p>", "\n"), ("<br>x", "\n"), ("<i>x</i>", "")],
)
def test_large_pages_are_read_whole_also_where_elements_are_nested_deeply(
  element, between
):
  assert html_text(element * 10_000) == ("", between.join("x" * 10_000))


@pytest.mark.parametrize(
  ("page", "expected"),
  [
    # Tags that may be left out.
    ("<head><title>T</title><p>a<p>b", ("T", "a\nb")),
    ("<title>T</title>a<div>b", ("T", "a\nb")),
    ("<html><head><meta name=x><title>T</title>a", ("T", "a")),
    (
      "</head>a <table>b<tr><td>c<td>d<tr><td>e</table>f",
      ("", "a b\nc\td\ne\nf"),
    ),
    # Elements that are never closed.
    ("<title>T<p>a", ("T", "a")),
    ("a<script>var x;<p>b", ("", "a\nb")),
    ("<style>p {}<body>b", ("", "b")),
    ("<body><noscript>a<p>b", ("", "b")),
    ("<p>a<template>b<div>c", ("", "a\nc")),
    # XHTML.
    ("<p>a<![CDATA[ <b> & ]]>c", ("", "a <b> & c")),
    ("<script>//<![CDATA[\nx < 1\n//]]></script><p>b", ("", "b")),
    (
      '<?xml version="1.0"?><html xmlns="http://www.w3.org/1999/xhtml"><head>'
      '<title/><script src="x.js"/></head><body><p>a</p></body></html>',
      ("", "a"),
    ),
    # Drawings have titles of their own.
    (
      "<svg><title>no</title><text>S</text></svg><title>T</title><p>a",
      ("T", "S\na"),
    ),
    ("<svg><title>no</title><desc>no</desc></svg><h1>H</h1>a", ("H", "H\na")),
    # What is hidden.
    ("<p hidden>no</p><p style='color: red; Display:none'>no</p>a", ("", "a")),
    ("<p style='visibility: hidden'>no</p><dialog>no</dialog>a", ("", "a")),
    ("<input type=hidden value=no><iframe><p>no</p></iframe>a", ("", "a")),
    (
      "a<!-- no <p>no --><!--[if IE]><p>no<![endif]-->b<!>c<!-->d",
      ("", "abcd"),
    ),
    ("<![if !IE]>a<![endif]>b", ("", "ab")),
    ("<![CD[x]]><p>a<![CD[x]]>b<![>c", ("", "abc")),
    # What is raised or lowered.
    (
      "x<sup>2</sup> + 10<sup>\u22123</sup>, H<sub>2</sub>O",
      ("", "x² + 10⁻³, H₂O"),
    ),
    (
      "the 1<sup>st</sup>, x<sup>n</sup>, x<sub>max</sub>",
      ("", "the 1st, xⁿ, x_max"),
    ),
    (
      "e<sup>ax+b</sup>, word<sup>[1]</sup>, A<sup>TM</sup>",
      ("", "e^(ax+b), word[1], A™"),
    ),
    ("<math><msup><mi>x</mi><mn>2</mn></msup></math>", ("", "x²")),
    ("<math><mfrac><mn>1</mn><mn>2</mn></mfrac></math>", ("", "1/2")),
    # Neighbours on a line.
    ("<a>Home</a><a>About</a>", ("", "Home About")),
    ("<b>Name:</b><span>Bob</span><span>42</span>", ("", "Name: Bob 42")),
    (
      "wo<em>rd</em>, <span>wo</span>rd, <b>wo</b><i>rd</i>",
      ("", "word, word, word"),
    ),
    ("a<button>b</button>c<img src=x>d<input>e", ("", "a b c d e")),
    ("<code><span>x</span><span>=</span><span>1</span></code>", ("", "x=1")),
    ("so\u00adft<wbr>ly", ("", "softly")),
    # Code keeps its lines.
    (
      "<p>a<pre>\ndef f():\n  <b>return</b> 1\n\n\ny</pre>b",
      ("", "a\ndef f():\n  return 1\n\ny\nb"),
    ),
  ],
)
def test_a_page_is_read_as_a_browser_shows_it(page, expected):
  assert html_text(page) == expected


def test_headings_are_found_where_they_stand():
  page = read_html(
    "<h1>Top<a href=#t>¶</a></h1>a<h3>Be<b>low</b></h3>b<h2> </h2><h2>C</h2>"
  )
  assert [(h.level, h.title) for h in page.headings] == [
    *((1, "Top"), (3, "Below"), (2, "C")),
  ]
  assert all(page.text[h.start : h.end] == h.title for h in page.headings)


@pytest.mark.parametrize(
  ("page", "expected"),
  [
    ("<h1>A<br>B</h1>c", [(1, "A\nB", "A B")]),
    ("<h1>A<p>b<p>c<p>d<p>e", [(1, "A", "A")]),  # never closed
    ("<h1>A<div><h2>B</h2></div></h1>c", [(1, "A\nB", "A B")]),
    ("<h1>A<p>b<p>c<div><h2>D</h2>e</div>", [(1, "A", "A"), (2, "D", "D")]),
  ],
)
def test_headings_of_several_lines_are_where_they_say(page, expected):
  read = read_html(page)
  assert [
    (h.level, read.text[h.start : h.end], h.title) for h in read.headings
  ] == expected


@pytest.mark.parametrize("seed", range(40))
def test_of_a_broken_page_the_words_outside_of_tags_are_read(seed):
  # Whatever is opened, closed or cut off, a word is only ever lost if it is in
  # something that is not shown.
  rng = random.Random(seed)
  names = ["p", "b", "table", "td", "tr", "ul", "li", "h2", "select", "option"]
  names += [
    "form",
    "a",
    "font",
    "nobr",
    "center",
    "span",
    "body",
    "html",
    "head",
  ]
  words = [f"w{i}w" for i in range(60)]
  page = "".join(
    word
    + " "
    + rng.choice(["", "", f"<{rng.choice(names)}>", f"</{rng.choice(names)}>"])
    + rng.choice(["", "<!-- c -->", "<![x[y]]>", "<?php x ?>", "</>"])
    for word in words
  )
  found = re.findall(r"w\d+w", html_text(page)[1])
  assert sorted(found) == sorted(words)


@pytest.mark.parametrize(
  ("head", "expected"),
  [
    ('<meta charset="iso-8859-1">', ["iso-8859-1"]),
    (
      '<META content="text/html; charset=x-sjis" http-equiv=Content-Type>',
      ["x-sjis"],
    ),
    ("<!-- <meta charset=a> -->", []),
    ("<script>'<meta charset=a>'</script><meta charset=b>", ["b"]),
    ("<style><meta charset=a></style><p title='<meta charset=b>'>", []),
    ("<p>none</p>", []),
  ],
)
def test_the_encoding_that_a_page_names_is_that_of_an_element(head, expected):
  assert list(declared_encodings(head.encode())) == expected


def test_many_children_of_an_exponent_take_no_longer_each():
  def secs(count):
    start = time.process_time()
    text = read_html(f"<math><msup>{'<mi>x</mi>' * count}</msup></math>").text
    assert text.count("x") + text.count("ˣ") == count
    return time.process_time() - start

  secs(10)
  assert secs(20_000) < 5  # if all before were counted, 20
