"""Reads the title, text and headings of .rst, .ipynb, .pdf and .docx files.

In: the content of a file. Out: the text that a person sees. The libraries are
in the extra `documents` and imported when the first such file is read. This is
the only file that imports docutils, nbformat, pypdf and docx.
"""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import html
import importlib
import io
import logging
import re
from typing import Any
import zipfile

from rag_jax.corpus.html_text import Page
from rag_jax.corpus.html_text import read_html
from rag_jax.corpus.markdown_text import markdown_html
from rag_jax.corpus.markdown_text import without_data

INSTALL = "pip install 'rag_jax[documents]'"  # or -e '.[documents]', in a clone

_DIRECTIVE = re.compile(r"(?m)^[ \t]*(?:\.\.|.*\|)[ \t]+([\w:+.-]*\w)::")
_ROLE = re.compile(r":([\w:.+-]*\w):`")
_ROLE_TARGET = re.compile(r"(?s)\s*<[^<>]*>\Z")
_HYPHEN = re.compile(r"(\w)[-\u2010]\n(?=[a-zß-öø-ÿ])")
# A .docx is a zip. One beyond this size and ratio is made to fill the memory.
_MOST_UNPACKED, _MOST_RATIO = 2 << 20, 100
_MOST_TEXT = 1 << 27  # bytes of its XML, of which a tree is made
_MAX_CELL_TEXT = 20_000  # characters of the output of one notebook cell


def _library(name: str, end: str) -> Any:
  """Returns a module of the extra, or raises `ImportError` with the command."""
  try:
    return importlib.import_module(name)
  except ModuleNotFoundError as error:
    raise ImportError(
      f"{end} files are read by {name.partition('.')[0]}, which is not"
      f" installed. Expected the extra `documents`. Run: {INSTALL}"
    ) from error


@contextlib.contextmanager
def _reading(what: str, *silent: str) -> Iterator[None]:
  """Raises `ValueError` for any error, since a damaged file raises any kind.

  Args:
    what: the kind of file, for the message.
    *silent: loggers of libraries that complain about damaged files.
  """
  loggers = [logging.getLogger(name) for name in silent]
  levels = [logger.level for logger in loggers]
  for logger in loggers:
    logger.setLevel(logging.CRITICAL)
  try:
    yield
  except Exception as error:
    raise ValueError(
      f"it is no {what} that can be read ({type(error).__name__}:"
      f" {str(error)[:200]}). Expected a complete file. Copy or save it again"
    ) from error
  finally:
    for logger, level in zip(loggers, levels, strict=True):
      logger.setLevel(level)


def read_rst(text: str) -> tuple[Page, int]:
  """Returns the page of reStructuredText; no directive includes a file.

  The directives and roles of Sphinx are read as text.
  """
  core = _library("docutils.core", ".rst")
  _know_sphinx(text)
  settings = {
    "file_insertion_enabled": False,
    "raw_enabled": False,
    "report_level": 5,
    "halt_level": 6,
    "_disable_config": True,
    "embed_stylesheet": False,
    "stylesheet_path": "",
    "math_output": "LaTeX",
    "doctitle_xform": False,
    "syntax_highlight": "none",
    "smart_quotes": False,
  }
  with _reading("reStructuredText"):
    made = core.publish_string(
      text, writer="html5", settings_overrides=settings
    ).decode()
  page = read_html(made)
  title = page.headings[0].title if page.headings else ""
  # The <title> that docutils writes is "<string>".
  return dataclasses.replace(page, title=title), 0


def _know_sphinx(text: str) -> None:
  """Registers the directives and roles of a text that docutils lacks."""
  rst = _library("docutils.parsers.rst", ".rst")
  directives = _library("docutils.parsers.rst.directives", ".rst")
  roles = _library("docutils.parsers.rst.roles", ".rst")
  nodes = _library("docutils.nodes", ".rst")

  class Generic(rst.Directive):
    """A directive whose arguments and content are text."""

    optional_arguments = 1_000
    final_argument_whitespace = False
    has_content = True

    def run(self) -> list[Any]:
      """Returns the arguments and the parsed content."""
      found = nodes.container()
      if self.arguments:
        words = nodes.paragraph()
        words += nodes.Text(" ".join(self.arguments))
        found += words
      self.state.nested_parse(self.content, self.content_offset, found)
      return [found]

  class Left(rst.Directive):
    """A directive that holds no text, such as a list of files."""

    optional_arguments = 1_000
    has_content = True

    def run(self) -> list[Any]:
      """Returns nothing."""
      return []

  def role(
    name: str, rawtext: str, text: str, *_: Any, **__: Any
  ) -> tuple[list[Any], list[Any]]:
    shown = _ROLE_TARGET.sub("", text).lstrip("~!") or text
    return [nodes.literal(rawtext, shown)], []

  class Code(Generic):
    """A directive whose lines are code."""

    def run(self) -> list[Any]:
      """Returns the content as a literal block."""
      return [nodes.literal_block("", "\n".join(self.content))]

  known = {"toctree": Left, "index": Left, "currentmodule": Left}
  known |= {"highlight": Left, "sourcecode": Code, "prompt": Code}
  known |= {"doctest": Code, "testcode": Code, "ipython": Code, "tab": Generic}
  registered = directives._directives
  language = _library("docutils.parsers.rst.languages.en", ".rst")
  for name in {match.lower() for match in _DIRECTIVE.findall(text)}:
    if name not in registered and name not in language.directives:
      directives.register_directive(name, known.get(name, Generic))
  for name in {match.lower() for match in _ROLE.findall(text)}:
    if name not in language.roles and name not in roles._roles:
      roles.register_local_role(name, role)


def read_notebook(text: str) -> tuple[Page, int]:
  """Returns the page of a Jupyter notebook, and how many characters it lacks.

  Text cells are Markdown, and code keeps its lines. The text of outputs is
  read; their pictures are left out and counted.
  """
  nbformat = _library("nbformat", ".ipynb")
  with _reading("notebook", "traitlets", "nbformat"):
    notebook = nbformat.reads(text, as_version=4)
    parts = [*_cells(notebook)]
  page = read_html("\n".join(part for part, _ in parts))
  title = str(notebook.metadata.get("title", "") or "")
  num_chars = sum(num for _, num in parts)
  return dataclasses.replace(page, title=title or page.title), num_chars


def _cells(notebook: Any) -> Iterator[tuple[str, int]]:
  """Yields cells and outputs as HTML, and how many characters they lack."""
  for cell in notebook.cells:
    source = "".join(cell.source)
    if cell.cell_type == "markdown":
      kept, num = without_data(source)
      yield markdown_html(kept), num
      for attached in cell.get("attachments", {}).values():
        yield "", sum(len("".join(data)) for data in attached.values())
      continue
    yield f"<pre>\n{html.escape(source)}</pre>", 0
    for output in cell.get("outputs", ()):
      data = output.get("data", {})
      printed = output.get("text", data.get("text/plain", ""))
      pictures = sum(
        len("".join(value))
        for kind, value in data.items()
        if kind.startswith(("image/", "application/"))
        and isinstance(value, str | list)
      )
      text = "".join(printed)
      shown = text[:_MAX_CELL_TEXT]
      num_chars = pictures + len(text) - len(shown)
      yield f"<pre>\n{html.escape(shown)}</pre>", num_chars


def read_pdf(raw: bytes) -> tuple[Page, int]:
  """Returns the text of a PDF; words hyphenated at line ends are joined.

  Raises:
    ValueError: it is damaged or needs a password, or its pages are pictures.
  """
  pypdf = _library("pypdf", ".pdf")
  with _reading("PDF", "pypdf"):
    reader = pypdf.PdfReader(io.BytesIO(raw))
    if reader.is_encrypted and not reader.decrypt(""):
      raise ValueError("it needs a password")
    pages = [page.extract_text() or "" for page in reader.pages]
    title = str((reader.metadata and reader.metadata.title) or "").strip()
  text = "\n\n".join(page.strip() for page in pages if page.strip())
  if pages and not text:
    raise ValueError(
      f"none of its {len(pages)} pages holds text: they are pictures. Expected"
      " text. Recognise it first, for instance with ocrmypdf"
    )
  text = _HYPHEN.sub(r"\1", text.replace("\0", ""))
  text = text.encode(errors="replace").decode()
  return Page(" ".join(title.split()), text, ()), 0


def read_docx(raw: bytes) -> tuple[Page, int]:
  """Returns the text of a Word document, with its headings and tables."""
  docx = _library("docx", ".docx")
  with _reading("Word document"), zipfile.ZipFile(io.BytesIO(raw)) as parts:
    # Each part by itself: a picture, which does not shrink, hides no other.
    unpacked = sum(
      part.file_size
      for part in parts.infolist()
      if part.file_size > _MOST_RATIO * part.compress_size
    )
    texts = sum(
      part.file_size
      for part in parts.infolist()
      if part.filename.lower().endswith((".xml", ".rels"))
    )
  if unpacked > _MOST_UNPACKED:
    raise ValueError(
      f"its {len(raw):,} bytes unpack to {unpacked:,}, more than {_MOST_RATIO}"
      " times as many. Expected text, which a .docx makes about 10 times"
      " smaller: this file was made to fill the memory. Do not use it; if it is"
      " yours, save it as .txt"
    )
  if texts > _MOST_TEXT:
    raise ValueError(
      f"its parts in XML have {texts:,} bytes, which take many times as much"
      f" memory. Expected {_MOST_TEXT:,} at most. Split it, or save it as .txt"
    )
  with _reading("Word document"):
    document = docx.Document(io.BytesIO(raw))
    body = "\n".join(_blocks(document, _tags(document)))
    title = str(document.core_properties.title or "").strip()
  page = read_html(body)
  return dataclasses.replace(page, title=title or page.title), 0


def _tags(document: Any) -> dict[str | None, str]:
  """Returns the HTML tag of each style that is not "p", by the style's id.

  One pass over all styles: python-docx would search them for each paragraph.
  """
  tags: dict[str | None, str] = {}
  for style in document.styles.element.style_lst:
    name = style.name_val or ""
    level = re.fullmatch(r"(?i)heading ([1-6])", name)
    if level or name == "Title":
      tags[style.styleId] = f"h{level[1]}" if level else "h1"
  return tags


def _blocks(container: Any, tags: dict[str | None, str]) -> Iterator[str]:
  """Yields paragraphs and tables of a Word document as HTML, in order."""
  for block in container.iter_inner_content():
    if hasattr(block, "rows"):
      yield "<table>"
      for row in block.rows:
        yield f"<tr>{''.join(_row_cells(row, block, tags))}</tr>"
      yield "</table>"
      continue
    tag = tags.get(block._p.style, "p")
    text = html.escape(block.text).replace("\n", "<br>")
    yield f"<{tag}>{text}</{tag}>" if text.strip() else ""


def _row_cells(
  row: Any, table: Any, tags: dict[str | None, str]
) -> Iterator[str]:
  """Yields the cells of a row; the text of merged cells in the first alone.

  `row.cells` repeats a cell for each column and row it spans. A file may say
  that there are billions, or repeat a long text in each of many rows.
  """
  table_module = _library("docx.table", ".docx")
  for element in row._tr.tc_lst:
    inner = ""
    if element.vMerge != "continue":
      inner = "\n".join(_blocks(table_module._Cell(element, table), tags))
    yield f"<td>{inner}</td>"


READERS: dict[str, Callable[[Any], tuple[Page, int]]] = {
  ".rst": read_rst,
  ".ipynb": read_notebook,
  ".pdf": read_pdf,
  ".docx": read_docx,
}
OF_TEXT = (".rst", ".ipynb")  # their readers take a string, the others bytes
