"""The title and text of an HTML page.

In: the bytes of a page. Out: its title, and what a person reads of it, a line
a paragraph. The one file that imports Beautiful Soup.
"""

from collections.abc import Iterator
import re
import warnings

import bs4
from bs4 import dammit
from bs4 import element as bs4_element

# Elements that begin and end a line on the screen.
_BLOCKS = frozenset({
  "address", "article", "aside", "blockquote", "body", "br", "caption", "dd",
  "details", "div", "dl", "dt", "fieldset", "figcaption", "figure", "footer",
  "form", "h1", "h2", "h3", "h4", "h5", "h6", "header", "hr", "html", "legend",
  "li", "main", "nav", "ol", "option", "p", "pre", "section", "select",
  "summary", "table", "tbody", "td", "tfoot", "th", "thead", "tr", "ul",
})  # fmt: skip
_UNSEEN = frozenset(
  {"head", "script", "style", "noscript", "template", "title"}
)


def declared_encoding(raw: bytes) -> str:
  """Returns the encoding that a page names in its first bytes, or ""."""
  find = dammit.EncodingDetector.find_declared_encoding
  return find(raw, is_html=True) or ""


def _line(text: str) -> str:
  return " ".join(text.split())


def html_text(page: str) -> tuple[str, str]:
  """Returns the title (from <title>, else the first heading) and the text.

  Scripts, styles and comments are left out; white space is as on the screen:
  one space between words, a line for each paragraph, heading, list item and
  cell.
  """
  with warnings.catch_warnings():
    # XHTML is read well enough, and a page that looks like a file name is text.
    warnings.simplefilter("ignore", bs4.XMLParsedAsHTMLWarning)
    warnings.simplefilter("ignore", bs4.MarkupResemblesLocatorWarning)
    soup = bs4.BeautifulSoup(page, "html.parser")
  title = soup.find("title")
  if title is None or not _line(title.get_text()):
    title = soup.find(re.compile(r"^h[1-6]$"))
  heading = "" if title is None else _line(title.get_text())
  lines = map(_line, "".join(_seen(soup)).split("\n"))
  return heading, "\n".join(line for line in lines if line)


def _seen(soup: bs4.BeautifulSoup) -> Iterator[str]:
  """Yields the text that is seen, and line ends around blocks.

  Beautiful Soup's own ways to change a tree take a time that is quadratic in
  the number of elements side by side.
  """
  left: list[bs4_element.PageElement | str] = [soup]
  while left:
    node = left.pop()
    if isinstance(node, bs4.Tag):
      if node.name in _UNSEEN:
        continue
      if node.name in _BLOCKS:
        yield "\n"
        left.append("\n")
      left.extend(reversed(node.contents))
    elif type(node) is bs4_element.NavigableString:  # comments are a kind of it
      yield re.sub(r"\s+", " ", node)
    elif type(node) is str:
      yield node
