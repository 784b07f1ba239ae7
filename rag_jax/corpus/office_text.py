"""The title, text and headings of .rst, .ipynb, .pdf and .docx files.

In: the bytes of a file. Out: what a person reads of it. The libraries are in
the extra `documents` and imported when the first such file is read; this is the
one file that imports docutils, nbformat, pypdf and docx.
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

from rag_jax.corpus.html_text import Page
from rag_jax.corpus.html_text import read_html
from rag_jax.corpus.markdown_text import markdown_html
from rag_jax.corpus.markdown_text import without_data

INSTALL = "pip install 'rag_jax[documents]'"  # or -e '.[documents]', in a clone

_DIRECTIVE = re.compile(r"(?m)^[ \t]*(?:\.\.|.*\|)[ \t]+([\w:+.-]*\w)::")
_ROLE = re.compile(r":([\w:.+-]*\w):`")
_ROLE_TARGET = re.compile(r"(?s)\s*<[^<>]*>\Z")
_HYPHEN = re.compile(r"(\w)[-\u2010]\n(?=[a-zß-öø-ÿ])")
_MAX_CELL_TEXT = 20_000  # characters of what one cell of a notebook printed


def _library(name: str, end: str) -> Any:
  """Returns a module of the extra.

  Raises:
    ImportError: it is not installed; says how to install it.
  """
  try:
    return importlib.import_module(name)
  except ModuleNotFoundError as error:
    raise ImportError(
      f"{end} files are read by {name.partition('.')[0]}, which is not"
      f" installed. Expected the extra `documents`. Run: {INSTALL}"
    ) from error


def _damaged(what: str, error: BaseException) -> ValueError:
  return ValueError(
    f"it is no {what} that can be read ({type(error).__name__}:"
    f" {str(error)[:200]}). Expected a complete file. Copy or save it again"
  )


def read_rst(text: str) -> tuple[Page, int]:
  """Returns the page of reStructuredText; its directives are not run.

  What Sphinx adds to the language is read as text: no file is included.
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
  try:
    made = core.publish_string(
      text, writer="html5", settings_overrides=settings
    ).decode()
  except Exception as error:  # a damaged file raises any kind
    raise _damaged("reStructuredText", error) from error
  page = read_html(made)
  title = page.headings[0].title if page.headings else ""
  # The <title> that docutils writes is "<string>".
  return dataclasses.replace(page, title=title), 0


def _know_sphinx(text: str) -> None:
  """Has docutils read the directives and roles of a text that it lacks."""
  rst = _library("docutils.parsers.rst", ".rst")
  directives = _library("docutils.parsers.rst.directives", ".rst")
  roles = _library("docutils.parsers.rst.roles", ".rst")
  nodes = _library("docutils.nodes", ".rst")

  class Generic(rst.Directive):
    """Reads what a directive is given as text."""

    optional_arguments = 1_000
    final_argument_whitespace = False
    has_content = True

    def run(self) -> list[Any]:
      """Returns the argument, and the content as it is parsed."""
      found = nodes.container()
      if self.arguments:
        words = nodes.paragraph()
        words += nodes.Text(" ".join(self.arguments))
        found += words
      self.state.nested_parse(self.content, self.content_offset, found)
      return [found]

  class Left(rst.Directive):
    """Leaves out what is no text, such as a list of files."""

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
    """Keeps lines as they are."""

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
  """Returns the page of a Jupyter notebook, and characters left out of it.

  Text is Markdown, code keeps its lines, and of what cells printed the text is
  read; pictures are left out and counted.
  """
  nbformat = _library("nbformat", ".ipynb")
  try:
    with _quiet("traitlets", "nbformat"):
      notebook = nbformat.reads(text, as_version=4)
      parts = [*_cells(notebook)]
  except Exception as error:  # a damaged file raises any kind
    raise _damaged("notebook", error) from error
  page = read_html("\n".join(part for part, _ in parts))
  title = str(notebook.metadata.get("title", "") or "")
  return (
    dataclasses.replace(page, title=title or page.title),
    sum(num for _, num in parts),
  )


def _cells(notebook: Any) -> Iterator[tuple[str, int]]:
  """Yields cells and what they printed, as HTML, and characters left out."""
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
      shown = "".join(printed)
      left = max(len(shown) - _MAX_CELL_TEXT, 0)
      yield (
        f"<pre>\n{html.escape(shown[:_MAX_CELL_TEXT])}</pre>",
        pictures + left,
      )


def read_pdf(raw: bytes) -> tuple[Page, int]:
  """Returns the text of a PDF, page by page; words cut at line ends are whole.

  Raises:
    ValueError: it is damaged or needs a password, or its pages are pictures.
  """
  pypdf = _library("pypdf", ".pdf")
  try:
    with _quiet("pypdf"):
      reader = pypdf.PdfReader(io.BytesIO(raw))
      if reader.is_encrypted and not reader.decrypt(""):
        raise ValueError("it needs a password")
      pages = [page.extract_text() or "" for page in reader.pages]
      title = str((reader.metadata and reader.metadata.title) or "").strip()
  except Exception as error:  # a damaged file raises any kind
    raise _damaged("PDF", error) from error
  text = "\n\n".join(page.strip() for page in pages if page.strip())
  if pages and not text:
    raise ValueError(
      f"none of its {len(pages)} pages holds text: they are pictures. Expected"
      " text. Recognise it first, for instance with ocrmypdf"
    )
  text = _HYPHEN.sub(r"\1", text.replace("\0", ""))
  return Page(
    " ".join(title.split()), text.encode(errors="replace").decode(), ()
  ), 0


def read_docx(raw: bytes) -> tuple[Page, int]:
  """Returns the text of a Word document, with its headings and tables."""
  docx = _library("docx", ".docx")
  try:
    document = docx.Document(io.BytesIO(raw))
    body = "\n".join(_blocks(document))
    title = str(document.core_properties.title or "").strip()
  except Exception as error:  # a damaged file raises any kind
    raise _damaged("Word document", error) from error
  page = read_html(body)
  return dataclasses.replace(page, title=title or page.title), 0


def _blocks(container: Any) -> Iterator[str]:
  """Yields paragraphs and tables of a Word document as HTML, in order."""
  for block in container.iter_inner_content():
    if hasattr(block, "rows"):
      yield "<table>"
      for row in block.rows:
        cells = dict.fromkeys(cell._tc for cell in row.cells)  # merged: once
        named = {cell._tc: cell for cell in row.cells}
        inner = ("\n".join(_blocks(named[tc])) for tc in cells)
        yield "<tr>" + "".join(f"<td>{one}</td>" for one in inner) + "</tr>"
      yield "</table>"
      continue
    style = (block.style.name or "") if block.style is not None else ""
    level = re.fullmatch(r"(?i)heading ([1-6])", style)
    tag = f"h{level[1]}" if level else "h1" if style == "Title" else "p"
    text = html.escape(block.text).replace("\n", "<br>")
    yield f"<{tag}>{text}</{tag}>" if text.strip() else ""


@contextlib.contextmanager
def _quiet(*names: str) -> Iterator[None]:
  """Keeps what libraries have to say about damaged files to themselves."""
  loggers = [logging.getLogger(name) for name in names]
  before = [logger.level for logger in loggers]
  for logger in loggers:
    logger.setLevel(logging.CRITICAL)
  try:
    yield
  finally:
    for logger, level in zip(loggers, before, strict=True):
      logger.setLevel(level)


READERS: dict[str, Callable[[Any], tuple[Page, int]]] = {
  ".rst": read_rst,
  ".ipynb": read_notebook,
  ".pdf": read_pdf,
  ".docx": read_docx,
}
OF_TEXT = (".rst", ".ipynb")  # their readers take a string, the others bytes
