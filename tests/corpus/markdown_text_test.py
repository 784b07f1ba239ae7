"""Markdown is read as it is shown: no marks, and its headings are headings."""

import pytest

from rag_jax.corpus.markdown_text import read_markdown
from rag_jax.corpus.markdown_text import without_data


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    ("A *b* __c__ ~~d~~ `e` [f](http://g) <http://h>", "A b c d e f http://h"),
    ("one\nline\n\n> quoted\n\n- a\n* b\n  1. c", "one line\nquoted\na\nb\nc"),
    ("| a | b |\n|---|:-:|\n| 1 | |", "a\tb\n1"),
    ("```py\ndef f():\n    return 1\n\nx\n```", "def f():\n    return 1\n\nx"),
    ("    code\n      more", "code\n  more"),
    ("![alt *x*](p.png) [r]\n\n[r]: http://x", "alt x r"),
    ("a[^1]\n\n[^1]: note", "a[1]\nnote"),
    ("x<sup>2</sup><br>y <!-- no -->\n\n<div>\n<p>z</div>", "x²\ny\nz"),
    (
      "The <title> tag and <script> too.\n\nNext.",
      "The <title> tag and <script> too.\nNext.",
    ),
    ("<script>\nno\n</script>\n\nyes", "yes"),
    ("- [x] done\n- [ ] open", "done\nopen"),
    ("\\*a\\* &amp; a_b_c 2 * 3 * 4", "*a* & a_b_c 2 * 3 * 4"),
    (
      "\n".join("  " * i + f"- l{i}" for i in range(20)),
      "\n".join(f"l{i}" for i in range(20)),
    ),
    ("***\n\na\n\n---", "a"),
  ],
)
def test_marks_are_no_text(text, expected):
  assert read_markdown(text).text == expected


def test_headings_of_both_kinds_are_found():
  page = read_markdown("First *one*\n===\na\n\nSecond\n---\n### Third ##\nb")
  assert page.title == "First one"
  assert page.text == "First one\na\nSecond\nThird\nb"
  assert [(h.level, h.title) for h in page.headings] == [
    *((1, "First one"), (2, "Second"), (3, "Third")),
  ]


@pytest.mark.parametrize(
  ("front", "title"),
  [
    ('---\ntitle: "A: b"\ntags: [x]\n---\n', "A: b"),
    ("---\r\ntitle: 2027\r\n...\r\n", "2027"),
    ("+++\ntitle = 'T'\n[x]\ny = 1\n+++\n", "T"),
    ("---\ntitle: A: b\n---\n", "A: b"),  # no YAML
    ("\ufeff---\ntitle: T\n---\n", "T"),
    ("---\nlayout: page\n---\n", "H"),
    ("---\n---\n", "H"),
  ],
)
def test_front_matter_names_the_title_and_is_no_text(front, title):
  page = read_markdown(front + "# H\ntext")
  assert (page.title, page.text) == (title, "H\ntext")


def test_text_between_two_lines_is_no_front_matter():
  assert (
    read_markdown("---\nA paragraph.\n\n---\n\nb").text == "A paragraph.\nb"
  )


@pytest.mark.parametrize(
  "text",
  [
    "a ![p]({}) b",
    'a ![p]({} "title") b',
    "a ![p][i] b\n\n[i]: <{}>",
    "a <img src='{}' alt=p> b",
  ],
)
def test_pictures_in_addresses_are_left_out_and_counted(text):
  address = "data:image/png;base64," + "iVBORw0KGgo" * 5_000
  kept, num = without_data(text.format(address))
  assert num == len(address) - len("data:,")
  assert read_markdown(kept).text in ("a p b", "a b")


def test_a_text_that_is_not_closed_is_read_to_its_end():
  for text in ("*" * 5_000, "[" * 3_000, "> " * 100 + "x", "`" * 5_000):
    read_markdown(text)
