"""Reads the title, text and headings of an HTML page.

In: a page. Out: its title, the text that a browser shows, one line per
paragraph, and where its headings are. Parsing follows the HTML standard, as in
browsers, https://html.spec.whatwg.org/multipage/parsing.html. The only file
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
# Separated from the text around them, even without a space between the tags.
_APART = frozenset({
  "button", "embed", "img", "input", "meter", "object", "progress", "svg",
  "text", "textarea",
})  # fmt: skip
# Separated from a neighbouring element, but not from a neighbouring letter.
# <b> and similar elements are separated from neither.
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
# The kinds of the second and third child of an element of MathML.
_SCRIPTS = {"msup": ("sup",), "msub": ("sub",), "msubsup": ("sub", "sup")}

_XHTML = re.compile(
  r"(?i)\A\s*<\?xml|<!doctype[^>]*xhtml|<html[^>]*\sxmlns\s*=[^>]*xhtml"
)
# Text in XML, but a comment in HTML. It never spans the end of a script.
_CDATA = re.compile(
  r"(?is)<!\[CDATA\[((?:(?!</script|</style|<!\[CDATA\[).)*?)\]\]>"
)
# For these, <x/> is a complete element in XML, but only a start tag in HTML.
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
# Elements without an end tag, or whose end tag may be left out.
_NOT_NESTED = frozenset({
  "area", "base", "br", "col", "colgroup", "dd", "dt", "embed", "hr", "img",
  "input", "li", "link", "meta", "optgroup", "option", "p", "param", "rp", "rt",
  "source", "tbody", "td", "tfoot", "th", "thead", "tr", "track", "wbr",
})  # fmt: skip
_MAX_DEPTH = 256  # of nested elements; browsers stop at 512


@dataclasses.dataclass(frozen=True, slots=True)
class Page:
  """The text of a page.

  Attributes:
    title: from <title>, else the first heading; may be empty.
    text: one line per paragraph, heading, list item and row of a table.
    headings: the headings, with their places in the text.
  """

  title: str
  text: str
  headings: tuple[Heading, ...]


def read_html(page: str) -> Page:
  """Returns the text that a browser shows of a page.

  Scripts, styles, comments and hidden elements are left out. White space is as
  on the screen: one space between words; one line per paragraph, heading, list
  item and row of a table, with tabs between cells; <pre> keeps its lines.
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

  Comments, scripts and attributes with the same text do not count.
  """
  # Latin-1 keeps ASCII, and has a character for every byte.
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
  """Returns the page with elements closed that would swallow the rest."""
  page = _CDATA.sub(lambda match: html.escape(match[1]), page)
  if _XHTML.search(page, 0, 4096):
    page = _SELF_CLOSED.sub(r"<\1\2></\1>", page)
  for name in _RAW:
    begins = re.compile(rf"(?i)<{name}(?=[\s/>])[^<>]*+>")
    closes = re.compile(rf"(?i)</{name}[\s/>]")
    for last in deque(begins.finditer(page), maxlen=1):
      after = _STRUCTURE.search(page, last.end())
      if after and not closes.search(page, last.end()):
        # If the start tag is in a comment, parsers ignore this end tag.
        place = after.start()
        page = f"{page[:place]}</{name}>{page[place:]}"
  return _shallow(page)


def _shallow(page: str) -> str:
  """Returns the page without elements that are nested too deeply.

  The time that parsing takes is quadratic in the depth.
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
  """Returns whether `node` is inside an element with one of the names."""
  outer = node.parent
  while outer is not None and (outer.tag or "") not in names:
    outer = outer.parent
  return outer is not None


class _Lines:
  """A text that is built piece by piece.

  Attributes:
    done: the complete lines.
    headings: the headings, with their places in the joined lines.
  """

  def __init__(self):
    self.done: list[str] = []
    self.headings: list[Heading] = []
    self._line: list[str] = []  # pieces, without white space at the start
    self._length = 0  # of `done`, with line ends
    self._space = ""  # to be added before the next word
    self._opened: set[str] = set()  # inline elements since the last word
    self._closed: set[str] = set()

  @property
  def last(self) -> str:
    """The last character of the line, or the space to be added, or ""."""
    return self._space or (self._line[-1][-1] if self._line else "")

  def space(self, kind: str = " ") -> None:
    """Separates the next piece from the last one."""
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
    """Adds text directly after the last piece."""
    self._opened.clear()
    self._closed.clear()
    if text:
      self.words(text)

  def keep(self, text: str) -> None:
    """Adds text with its white space and line ends unchanged."""
    first, *others = text.translate(_INVISIBLE).expandtabs(8).split("\n")
    if first:
      self._line.append(first)
    for line in others:
      self._add("".join(self._line).rstrip(), blank=True)
      self._line = [line] if line else []
    self._space = ""

  def end_line(self) -> str:
    """Ends the line, unless it is blank, and returns it."""
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

  def end_heading(self, first: int, level: int) -> None:
    """Ends a heading; of a long one, only the first line counts.

    A long heading was probably never closed and holds the text after it. When
    it began, `first` lines were complete.
    """
    self.end_line()
    new = self.done[first:]
    start = self._length - sum(len(line) + 1 for line in new)
    while new and not new[0].strip():
      start += len(new.pop(0)) + 1
    if len(new) > 3 or sum(map(len, new)) > 200:
      new = new[:1]
    if not new:
      return
    end = start + len("\n".join(new))
    inner = [h for h in self.headings if h.start >= end]
    while self.headings and self.headings[-1].start >= start:
      self.headings.pop()
    title = " ".join(" ".join(new).split())
    self.headings += [Heading(start, end, level, title), *inner]

  def end_pre(self, first: int) -> None:
    """Ends preformatted text that began after `first` complete lines.

    Drops the blank lines at its end.
    """
    self.end_line()
    while len(self.done) > first and not self.done[-1]:
      self.done.pop()
      self._length -= 1


def _script(kind: str, inner: str, before: str) -> str:
  """Returns superscript ("sup") or subscript ("sub") as plain characters."""
  inner = " ".join(inner.translate(_INVISIBLE).split())
  table = _RAISED if kind == "sup" else _LOWERED
  if inner.upper() in ("TM", "SM") and kind == "sup":
    return "™" if inner.upper() == "TM" else "℠"
  # Letters after a digit are no exponent: 1st, 2n.
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
  """Returns "sup" or "sub" for superscripts and subscripts of MathML, or ""."""
  parent = node.parent
  kinds = _SCRIPTS.get(parent.tag or "", ()) if parent is not None else ()
  if not kinds:
    return ""
  place, other = 0, node.prev
  while other is not None and place <= len(kinds):  # of thousands
    place += other.is_element_node
    other = other.prev
  return kinds[place - 1] if 1 <= place <= len(kinds) else ""


def _walk(root: LexborNode, lines: _Lines) -> None:
  """Adds the visible text below `root` to `lines`.

  Not recursive, since pages can be nested deeper than Python's calls.
  """
  # How many elements of each kind the current one is inside of.
  kept = 0  # that keep white space
  code = 0  # whose inner elements are not separated
  svg = math = 0
  ends: list[tuple[LexborNode | None, str, int]] = [(root, "", 0)]
  while ends:
    node, name, note = ends.pop()
    if node is None:  # the end of element `name`
      if name in _KEEPS_SPACE:
        kept -= 1
        lines.end_pre(note)
      elif _HEADING.fullmatch(name):
        lines.end_heading(note, int(name[1]))
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
    if name == "p" and _fills_cell(node):
      if node.first_child is not None:
        ends.append((node.first_child, "", 0))
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
      note = len(lines.done)
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


def _fills_cell(node: LexborNode) -> bool:
  """Returns whether an element is the only one in a cell of a table."""
  parent = node.parent
  if parent is None or parent.tag not in ("td", "th"):
    return False
  return not any(
    child.is_element_node and child.mem_id != node.mem_id
    for child in parent.iter(include_text=False)
  )


def _in_heading(node: LexborNode) -> bool:
  return _inside(node, ("h1", "h2", "h3", "h4", "h5", "h6"))
