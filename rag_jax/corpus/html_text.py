"""The title, text and headings of an HTML page.

In: a page. Out: its title, what a person reads of it, a line a paragraph, and
where its headings are. It is parsed by the algorithm of the HTML standard, as
browsers do, https://html.spec.whatwg.org/multipage/parsing.html. The one file
that imports selectolax.
"""

from collections import deque
from collections.abc import Iterable, Iterator
import dataclasses
import html
import re

from selectolax.lexbor import LexborHTMLParser
from selectolax.lexbor import LexborNode

from rag_jax.corpus.document import Heading

# Elements that begin and end a line on the screen.
_BLOCKS = frozenset({
  "address", "article", "aside", "blockquote", "body", "br", "caption",
  "center", "dd", "details", "dialog", "dir", "div", "dl", "dt", "fieldset",
  "figcaption", "figure", "footer", "form", "h1", "h2", "h3", "h4", "h5", "h6",
  "header", "hgroup", "hr", "html", "legend", "li", "listing", "main", "menu",
  "nav", "ol", "optgroup", "option", "p", "plaintext", "pre", "search",
  "section", "select", "summary", "table", "tbody", "tfoot", "thead", "tr",
  "ul", "xmp",
})  # fmt: skip
_UNSEEN = frozenset({
  "annotation", "annotation-xml", "audio", "canvas", "datalist", "head",
  "iframe", "noembed", "noframes", "noscript", "rp", "script", "style",
  "template", "title", "video",
})  # fmt: skip
_UNSEEN_IN_SVG = _UNSEEN | {"defs", "desc", "metadata", "symbol"}
_KEEPS_SPACE = frozenset({"pre", "listing", "plaintext", "textarea", "xmp"})
# They stand apart from the text around them, whatever is between the tags.
_APART = frozenset({
  "button", "embed", "img", "input", "meter", "object", "progress", "svg",
  "text", "textarea",
})  # fmt: skip
# Each is a thing of its own beside another element, and part of a word beside
# a letter; <b> and its like are part of a word beside both.
_THINGS = frozenset(
  {"a", "abbr", "cite", "data", "label", "output", "span", "time"}
)
_CODE = frozenset({"code", "kbd", "samp", "tt", "var", "math"})
_HEADING = re.compile(r"h[1-6]")
_PERMALINK = frozenset({"", "#", "¶", "§", "🔗"})
_HIDDEN = re.compile(
  r"(?:^|;)\s*(?:display\s*:\s*none|visibility\s*:\s*hidden)"
)
_BLOCK_STYLE = re.compile(
  r"(?:^|;)\s*display\s*:\s*(?:block|flex|grid|table|list)"
)
_INVISIBLE = dict.fromkeys(map(ord, "\u00ad\u200b\u2060\ufeff"))

_RAISED = str.maketrans("0123456789+-\u2212=()ni", "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁻⁼⁽⁾ⁿⁱ")
_LOWERED = str.maketrans("0123456789+-\u2212=()", "₀₁₂₃₄₅₆₇₈₉₊₋₋₌₍₎")
_ORDINAL = re.compile(r"(?i)(?:st|nd|rd|th|er|re|me|lle|mme|os|as|e|o|a)\Z")
# What the second and third child of an element of MathML are.
_SCRIPTS = {"msup": ("sup",), "msub": ("sub",), "msubsup": ("sub", "sup")}

_XHTML = re.compile(
  r"(?i)\A\s*<\?xml|<!doctype[^>]*xhtml|<html[^>]*\sxmlns\s*=[^>]*xhtml"
)
# Text in XML; to HTML it is a comment. None is longer than a script.
_CDATA = re.compile(
  r"(?is)<!\[CDATA\[((?:(?!</script|</style|<!\[CDATA\[).)*?)\]\]>"
)
# Of these, <x/> is complete in XML and never ends in HTML.
_RAW = (
  "title", "textarea", "script", "style", "xmp", "iframe", "noembed",
  "noframes", "noscript", "template",
)  # fmt: skip
_SELF_CLOSED = re.compile(rf"(?i)<({'|'.join(_RAW)})((?:\s[^<>]*)?)/>")
_STRUCTURE = re.compile(
  r"(?i)<(?:/head|/?body|/?html|p|div|h[1-6]|main|section|article|table|ul|ol"
  r"|nav|header|footer|meta|link|title|script|style)(?=[\s/>])"
)
_TAG = re.compile(r"<(/?)([a-zA-Z][^\s/<>]*+)[^<>]*+>")
# They have no end, or it may be left out.
_NOT_NESTED = frozenset({
  "area", "base", "br", "col", "colgroup", "dd", "dt", "embed", "hr", "img",
  "input", "li", "link", "meta", "optgroup", "option", "p", "param", "rp", "rt",
  "source", "tbody", "td", "tfoot", "th", "thead", "tr", "track", "wbr",
})  # fmt: skip
_MAX_DEPTH = 256  # of elements in one another; browsers stop at 512


@dataclasses.dataclass(frozen=True, slots=True)
class Page:
  """What is read of a page.

  Attributes:
    title: from <title>, else the first heading; may be empty.
    text: a line for each paragraph, heading, list item and row of a table.
    headings: where they are in the text.
  """

  title: str
  text: str
  headings: tuple[Heading, ...]


def html_text(page: str) -> tuple[str, str]:
  """Returns the title (from <title>, else the first heading) and the text."""
  read = read_html(page)
  return read.title, read.text


def read_html(page: str) -> Page:
  """Returns what a person reads of a page.

  Scripts, styles, comments and what is hidden are left out. White space is as
  on the screen: one space between words, a line for each paragraph, heading,
  list item and row of a table, whose cells have tabs between them, and the
  lines of <pre> as they are.
  """
  parser = LexborHTMLParser(_prepared(page))
  lines = _Lines()
  if parser.root is not None:
    _walk(parser.root, lines)
  lines.end_line()
  title = next(_titles(parser), "")
  if not title and lines.headings:
    title = lines.headings[0].title
  return Page(title, "\n".join(lines.done), tuple(lines.headings))


def declared_encodings(raw: bytes) -> Iterator[str]:
  """Yields the encodings that the <meta> elements of a page name.

  They are those of elements: what stands in comments, scripts and attributes
  is none.
  """
  # Latin-1 keeps ASCII as it is, and every byte is a character of it.
  parser = LexborHTMLParser(_prepared(raw.decode("latin-1")))
  for node in parser.css("meta"):
    attributes = node.attributes
    if label := attributes.get("charset"):
      yield label.strip()
    elif (attributes.get("http-equiv") or "").lower() == "content-type":
      match = re.search(
        r"(?i)charset\s*=\s*[\"']?([^\s;\"']+)", attributes.get("content") or ""
      )
      if match:
        yield match[1]


def _prepared(page: str) -> str:
  """Returns the page with what would swallow all that follows put right."""
  page = _CDATA.sub(lambda match: html.escape(match[1]), page)
  if _XHTML.search(page, 0, 4096):
    page = _SELF_CLOSED.sub(r"<\1\2></\1>", page)
  for name in _RAW:
    begins = re.compile(rf"(?i)<{name}(?=[\s/>])[^<>]*+>")
    closes = re.compile(rf"(?i)</{name}[\s/>]")
    for last in deque(begins.finditer(page), maxlen=1):
      after = _STRUCTURE.search(page, last.end())
      if after and not closes.search(page, last.end()):
        # An end tag that closes nothing is ignored, should this stand in a
        # comment.
        place = after.start()
        page = f"{page[:place]}</{name}>{page[place:]}"
  return _shallow(page)


def _shallow(page: str) -> str:
  """Returns the page without elements that are nested too deeply.

  Parsing takes a time that is quadratic in the depth.
  """
  depth = deepest = 0
  for match in _TAG.finditer(page):
    if match[2].lower() not in _NOT_NESTED:
      depth = max(depth - 1, 0) if match[1] else depth + 1
      deepest = max(deepest, depth)
  if deepest <= _MAX_DEPTH:
    return page
  depth = 0

  def keep(match: re.Match[str]) -> str:
    nonlocal depth
    name = match[2].lower()
    if name in _NOT_NESTED:
      return match[0]
    depth = max(depth - 1, 0) if match[1] else depth + 1
    if depth < _MAX_DEPTH:
      return match[0]
    return "<br>" if name in _BLOCKS else ""

  return _TAG.sub(keep, page)


def _titles(parser: LexborHTMLParser) -> Iterator[str]:
  """Yields the titles of the page itself, not of drawings in it."""
  for node in parser.css("title"):
    title = " ".join(node.text().translate(_INVISIBLE).split())
    if title and not _inside(node, ("svg", "math")):
      yield title


def _inside(node: LexborNode, names: Iterable[str]) -> bool:
  """Returns whether one of the elements around `node` has one of the names."""
  outer = node.parent
  while outer is not None and (outer.tag or "") not in names:
    outer = outer.parent
  return outer is not None


class _Lines:
  """Text that grows by pieces.

  Attributes:
    done: lines that are complete.
    headings: where the headings are, in the lines put together.
  """

  def __init__(self):
    self.done: list[str] = []
    self.headings: list[Heading] = []
    self._line: list[str] = []  # without white space at its start
    self._length = 0  # of `done`, with line ends
    self._space = ""  # that is wanted before the next word
    self._opened: set[str] = set()  # inline elements, since the last word
    self._closed: set[str] = set()

  @property
  def last(self) -> str:
    """The last character of the line, a space if one is wanted, or ""."""
    return self._space or (self._line[-1][-1] if self._line else "")

  @property
  def length(self) -> int:
    """Characters up to the next line."""
    return self._length

  def space(self, kind: str = " ") -> None:
    """Keeps what follows apart from what was before."""
    if self._line and self._space != "\t":
      self._space = kind

  def inline(self, name: str, opens: bool) -> None:
    """Notes that an inline element begins or ends."""
    if opens:
      self._opened.add(name)
    else:
      self._closed.add(name)
      self._opened.clear()

  def words(self, text: str) -> None:
    """Adds text with its white space collapsed."""
    text = text.translate(_INVISIBLE)
    words = text.split()
    if not words:
      if text:
        self.space()
      return
    if self._closed and self._opened:
      around = self._closed | self._opened
      if around & _THINGS and not around & {"sup", "sub", "td", "th"}:
        self.space()
    if text[0].isspace():
      self.space()
    if self._space:
      self._line.append(self._space)
    self._line.append(" ".join(words))
    self._space = " " if text[-1].isspace() else ""
    self._opened.clear()
    self._closed.clear()

  def glue(self, text: str) -> None:
    """Adds text directly behind what is there."""
    self._opened.clear()
    self._closed.clear()
    if text:
      self.words(text)

  def keep(self, text: str) -> None:
    """Adds text with its white space and lines as they are."""
    first, *others = text.translate(_INVISIBLE).expandtabs(8).split("\n")
    if first:
      self._line.append(first)
    for line in others:
      self._add("".join(self._line).rstrip(), blank=True)
      self._line = [line] if line else []
    self._space = ""

  def end_line(self) -> str:
    """Ends the line, if there is something on it, and returns it."""
    line = "".join(self._line).rstrip()
    if line.strip():
      self._add(line)
    self._line, self._space = [], ""
    self._opened.clear()
    self._closed.clear()
    return line

  def _add(self, line: str, blank: bool = False) -> None:
    if line or (blank and self.done and self.done[-1]):
      self.done.append(line)
      self._length += len(line) + 1

  def end_pre(self, first: int) -> None:
    """Ends lines that were kept, without blank ones behind them.

    Args:
      first: how many lines were complete before.
    """
    self.end_line()
    while len(self.done) > first and not self.done[-1]:
      self.done.pop()
      self._length -= 1


def _script(kind: str, inner: str, before: str) -> str:
  """Returns how text that is raised or lowered is written on one line."""
  inner = " ".join(inner.translate(_INVISIBLE).split())
  table = _RAISED if kind == "sup" else _LOWERED
  if inner.upper() in ("TM", "SM") and kind == "sup":
    return "™" if inner.upper() == "TM" else "℠"
  # Letters alone are no exponent of a number: 1st, 2n.
  ordinal = before.isdigit() and inner.isalpha()
  if inner and not ordinal and all(ord(c) in table for c in inner):
    return inner.translate(table)
  if (
    not inner
    or not before.isalnum()
    or not (inner[0].isalnum() or inner[0] in "+-\u2212(")
  ):
    return inner
  if (
    kind == "sup"
    and inner.isalpha()
    and (before.isdigit() or (len(inner) > 1 and _ORDINAL.match(inner)))
  ):
    return inner
  return ("^" if kind == "sup" else "_") + (
    inner if inner.isalnum() else f"({inner})"
  )


def _is_hidden(node: LexborNode, attributes: dict[str, str | None]) -> bool:
  if "hidden" in attributes:
    return (attributes["hidden"] or "").lower() != "until-found"
  if node.tag == "dialog" and "open" not in attributes:
    return True
  style = attributes.get("style")
  return bool(style) and _HIDDEN.search(style.lower()) is not None


def _script_kind(node: LexborNode) -> str:
  """Returns "sup" or "sub" if an element of MathML is raised or lowered."""
  parent = node.parent
  kinds = _SCRIPTS.get(parent.tag or "", ()) if parent is not None else ()
  if not kinds:
    return ""
  place, other = 0, node.prev
  while other is not None:
    place += other.is_element_node
    other = other.prev
  return kinds[place - 1] if 1 <= place <= len(kinds) else ""


def _walk(root: LexborNode, lines: _Lines) -> None:
  """Reads what is seen below `root`.

  A stack of its own: pages are nested as deeply as their writers like.
  """
  kept = 0  # elements around that keep white space
  code = 0  # elements around whose inner elements are glued
  svg = math = 0  # such elements around
  ends: list[tuple[LexborNode | None, str, int]] = [(root, "", 0)]
  while ends:
    node, name, note = ends.pop()
    if node is None:  # the end of element `name`
      if name in _KEEPS_SPACE:
        kept -= 1
        lines.end_pre(note)
      elif _HEADING.fullmatch(name):
        line = lines.end_line()
        if line:
          lines.headings.append(
            Heading(note, note + len(line), int(name[1]), line)
          )
      elif name in _BLOCKS:
        lines.end_line()
      elif name == "q":
        lines.glue("”")
      elif name == "rt":
        lines.glue(")")
      elif name in _APART:
        lines.space()
      if name == "svg":
        svg -= 1
      elif name in _CODE:
        code -= 1
        math -= name == "math"
      if name not in _BLOCKS and not code:
        lines.inline(name, opens=False)
      continue
    if node.next is not None and node is not root:
      ends.append((node.next, "", 0))
    if node.is_text_node:
      text = node.text_content or ""
      if kept:
        lines.keep(text)
      else:
        lines.words(text)
      continue
    if not node.is_element_node:
      continue
    name = node.tag or ""
    attributes = node.attributes
    if name in (_UNSEEN_IN_SVG if svg else _UNSEEN) or _is_hidden(
      node, attributes
    ):
      continue
    kind = name if name in ("sup", "sub") else ""
    if math and not kind:
      kind = _script_kind(node)
    if kind and not kept:
      before = lines.last
      lines.glue(_script(kind, node.text(), before))
      lines.inline("sup", opens=False)
      continue
    if name == "a" and _in_heading(node) and node.text().strip() in _PERMALINK:
      continue
    note = 0
    if _BLOCK_STYLE.search((attributes.get("style") or "").lower()):
      lines.end_line()
      ends.append((None, "div", 0))
    if kept and name == "br":
      lines.keep("\n")
    elif name in _BLOCKS:
      lines.end_line()
      note = lines.length
    elif name in ("td", "th"):
      lines.space("\t")
    if name in _APART:
      lines.space()
    if name in _KEEPS_SPACE:
      lines.end_line()
      kept += 1
      note = len(lines.done)
    elif name == "q":
      lines.words("“")
    elif name == "rt":
      lines.glue("(")
    elif name == "svg":
      svg += 1
    elif name in _CODE:
      code += 1
    if name not in _BLOCKS and not code:
      lines.inline(name, opens=True)
    math += name == "math"
    parent = node.parent if math and node.prev is not None else None
    if parent is not None and parent.tag == "mfrac":
      lines.glue("/")
    ends.append((None, name, note))
    if node.first_child is not None:
      ends.append((node.first_child, "", 0))


def _in_heading(node: LexborNode) -> bool:
  return _inside(node, ("h1", "h2", "h3", "h4", "h5", "h6"))
