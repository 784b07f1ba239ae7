"""A page's title and text are what a person sees of it."""

import pytest

from rag_jax.corpus.html_text import declared_encodings
from rag_jax.corpus.html_text import html_text

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
    "1\n2\nas it is",
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


def test_the_encoding_that_a_page_names_is_found():
  assert declared_encoding(b'<meta charset="iso-8859-1">') == "iso-8859-1"
  assert declared_encoding(b"<p>none</p>") == ""
