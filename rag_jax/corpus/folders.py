"""Documents of a folder of text files, one a file.

In: a folder, or one file, of .txt, .md or .html, perhaps with .gz behind it;
also .rst, .ipynb, .pdf and .docx.
Out: a document a file, in the order of the names. One file is in memory at a
time, and the names in the folders above it.
"""

from collections.abc import Callable, Iterator
import functools
import os

from etils import epath

from rag_jax.artifacts import is_local
from rag_jax.corpus import markdown_text
from rag_jax.corpus import office_text
from rag_jax.corpus.document import Document
from rag_jax.corpus.encodings import decode_page
from rag_jax.corpus.encodings import likely_encoding
from rag_jax.corpus.html_text import Page
from rag_jax.corpus.html_text import declared_encodings
from rag_jax.corpus.html_text import read_html
from rag_jax.corpus.records import bad_character
from rag_jax.corpus.records import conversion
from rag_jax.corpus.records import decode_text
from rag_jax.corpus.records import read_bytes
from rag_jax.corpus.records import shorten
from rag_jax.corpus.records import special_file
from rag_jax.corpus.report import BadRecords
from rag_jax.corpus.report import CorpusReport

# In the first 64 KiB of a page it says in which encoding it is.
_LABEL_BYTES = 1 << 16


def _text(raw: bytes, path: epath.Path) -> str:
  """Returns the text of a file that is no page."""
  text = decode_text(raw, path)
  if bad := bad_character(text):
    place = text.find("\0")
    remedy = "Is it another kind of file? Rename it or remove the character."
    if likely_encoding(raw).startswith("UTF-16"):
      remedy = conversion(raw)
    raise ValueError(
      f"{path}:{text.count(chr(10), 0, max(place, 0)) + 1}: the text holds"
      f" {bad}, near {shorten(text[max(place - 20, 0) :])}. Expected plain"
      f" text. {remedy}"
    )
  return text


def _plain(raw: bytes, path: epath.Path, report: CorpusReport) -> Page:
  del report
  return Page("", _text(raw, path), ())


def _markdown(raw: bytes, path: epath.Path, report: CorpusReport) -> Page:
  text, num_chars = markdown_text.without_data(_text(raw, path))
  if num_chars:
    report.leave_out(num_chars, f"{path}:1")
  return markdown_text.read_markdown(text)


def _html(raw: bytes, path: epath.Path, report: CorpusReport) -> Page:
  """Returns a page; it may say in which encoding it is."""
  label = ""
  if not raw.isascii() or b"\x1b" in raw:
    label = next(declared_encodings(raw[:_LABEL_BYTES]), "")
  decoded = decode_page(raw, label)
  if decoded is None:
    return read_html(decode_text(raw, path))  # raises
  if decoded.label:
    says = "no encoding" if decoded.label == "none" else decoded.label
    report.mislabelled += 1
    report.note(
      "mislabelled", f"{path}:1: says {says}, was read as {decoded.encoding}"
    )
  return read_html(decoded.text)


def _office(
  end: str, raw: bytes, path: epath.Path, report: CorpusReport
) -> Page:
  """Returns a file that a library of the extra `documents` reads."""
  given = _text(raw, path) if end in office_text.OF_TEXT else raw
  try:
    page, num_chars = office_text.READERS[end](given)
  except ValueError as error:
    raise ValueError(
      f"{path}:1: {error}, or have it skipped: rag-jax build-index"
      " --on_bad_record=skip."
    ) from error
  if num_chars:
    report.leave_out(num_chars, f"{path}:1")
  return page


_Reader = Callable[[bytes, epath.Path, CorpusReport], Page]

_READERS: dict[str, _Reader] = {
  ".txt": _plain,
  ".md": _markdown,
  ".markdown": _markdown,
  ".html": _html,
  ".htm": _html,
  ".xhtml": _html,
  **{end: functools.partial(_office, end) for end in office_text.READERS},
}
TEXT_ENDS = tuple(_READERS)


def _end(name: str) -> str:
  """Returns which of `TEXT_ENDS` a file's name has before any .gz, or ""."""
  end = os.path.splitext(name.lower().removesuffix(".gz"))[1]
  return end if end in _READERS else ""


def read_text_file(
  path: epath.Path, id: str, bad_records: BadRecords
) -> Iterator[Document]:
  """Yields the one document of a text file, or nothing if it is skipped.

  Args:
    path: a file whose name ends in one of `TEXT_ENDS`, perhaps with .gz.
    id: of the document.
    bad_records: what to do if it is not UTF-8, or the gzip data is damaged.
  """
  try:
    raw = read_bytes(path)
    page = _READERS[_end(path.name)](raw, path, bad_records.report)
    if bad := bad_character(id) or bad_character(path.name):
      raise ValueError(
        f"{shorten(os.fspath(path), 200)}:1: the file's name holds {bad}."
        " Expected a name in UTF-8, which the document's id is made of. Rename"
        " the file."
      )
  except (FileNotFoundError, PermissionError) as error:
    problem = ValueError(
      f"{path}:1: the file cannot be opened ({error.strerror}). Expected a file"
      " that this user may read. Is it a link to nothing, or are permissions"
      " missing? Mend or remove it."
    )
    problem.__cause__ = error
    bad_records.refuse("undecodable", problem)
    return
  except ValueError as error:
    bad_records.refuse("undecodable", error)
    return
  title = page.title or os.path.splitext(_without_gz(path.name))[0]
  yield Document(id, title, page.text, (), f"{path}:1", page.headings)


def _without_gz(name: str) -> str:
  return name[:-3] if name.lower().endswith(".gz") else name


def _files_below(
  folder: epath.Path, bad_records: BadRecords
) -> Iterator[tuple[str, epath.Path]]:
  """Yields (relative name, path) of the text files, in order of the names."""
  # Not one call inside another: folders can be nested deeper than calls.
  levels = [_entries(folder, "")]
  while levels:
    name, path = next(levels[-1], ("", folder))
    if not name:
      levels.pop()
      continue
    hidden, special = path.name.startswith("."), special_file(path)
    if path.is_dir():
      # A link may lead back up, and then there would be no end.
      linked = is_local(path) and os.path.islink(path)
      if not hidden and not linked:
        levels.append(_entries(path, name + "/"))
        continue
    elif not hidden and not special and _end(path.name):
      yield name, path
      continue
    bad_records.report.other_files += 1
    place = f"{path}: {special}" if special else str(path)
    bad_records.report.note("other_files", place)


def _entries(
  folder: epath.Path, prefix: str
) -> Iterator[tuple[str, epath.Path]]:
  paths = sorted(folder.iterdir(), key=lambda p: p.name)
  return ((prefix + path.name, path) for path in paths)


def read_folder(
  folder: epath.Path, bad_records: BadRecords
) -> Iterator[Document]:
  """Yields a document for each text file in a folder and the folders below.

  The id is the path in the folder, with slashes. The title is that of the page
  (<title>, else a heading), the first heading of a Markdown file, or the
  file's name. Other files, hidden ones and links to folders are left alone
  and counted.

  Raises:
    ValueError: a file is not UTF-8, or there is no text file at all.
  """
  found = False
  for name, path in _files_below(folder, bad_records):
    found = True
    yield from read_text_file(path, name, bad_records)
  if not found:
    other = bad_records.report.places.get("other_files", [])
    raise ValueError(
      f"The folder {folder} holds no text: no file in it or below ends in one"
      f" of {list(TEXT_ENDS)} (or with .gz behind), nor is there a"
      f" corpus.jsonl, as BEIR has. It holds {shorten(other, 200)}. Give the"
      " path of one of these files, or another folder."
    )
