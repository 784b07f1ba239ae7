"""Reads the documents of a corpus, whatever its format.

In: the path of a file or folder (local or gs://), a bundled corpus, or the
name of a TFDS data set. Out: its documents, one after the other. A text file
is one document. Memory holds one such file at a time, and the file names of the
folders that are open.
"""

from collections.abc import Callable, Iterable, Iterator
import functools
import os

from etils import epath

from rag_jax.artifacts import is_local
from rag_jax.corpus import markdown_text
from rag_jax.corpus import office_text
from rag_jax.corpus.document import DEFAULT_FIELDS
from rag_jax.corpus.document import Document
from rag_jax.corpus.document import FieldNames
from rag_jax.corpus.document import record_documents
from rag_jax.corpus.encodings import decode_page
from rag_jax.corpus.encodings import likely_encoding
from rag_jax.corpus.folding import is_blank
from rag_jax.corpus.html_text import Page
from rag_jax.corpus.html_text import declared_encodings
from rag_jax.corpus.html_text import read_html
from rag_jax.corpus.json_files import read_json
from rag_jax.corpus.json_files import read_jsonl_documents
from rag_jax.corpus.passages import without_gz
from rag_jax.corpus.report import BadRecords
from rag_jax.corpus.report import CorpusReport
from rag_jax.corpus.tables import ENDS as TABLE_ENDS
from rag_jax.corpus.tables import read_table
from rag_jax.corpus.text_files import bad_character
from rag_jax.corpus.text_files import conversion
from rag_jax.corpus.text_files import decode_text
from rag_jax.corpus.text_files import find_file
from rag_jax.corpus.text_files import read_bytes
from rag_jax.corpus.text_files import shorten
from rag_jax.corpus.text_files import special_file
from rag_jax.corpus.tfds import TFDS
from rag_jax.corpus.tfds import read_tfds_documents

# Corpora that come with the library: passages.jsonl and the questions about
# them, train.jsonl, validation.jsonl and test.jsonl.
BUNDLED = {"world_facts": epath.Path(__file__).parent / "world_facts"}

_BEIR = ("corpus.jsonl", "corpus.jsonl.gz")


def _read_table(
  path: epath.PathLike, fields: FieldNames, bad_records: BadRecords
) -> Iterator[Document]:
  rows = read_table(path, fields, bad_records)
  yield from record_documents(rows, fields, bad_records)


_READERS: dict[
  str,
  Callable[[epath.PathLike, FieldNames, BadRecords], Iterator[Document]],
] = {
  ".jsonl": read_jsonl_documents,
  ".json": read_json,
  **dict.fromkeys(TABLE_ENDS, _read_table),
}

_LABEL_BYTES = 1 << 16  # of a page, in which it names its encoding


def _text(raw: bytes, path: epath.Path) -> str:
  """Returns the text of a UTF-8 file."""
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


def _plain(raw: bytes, path: epath.Path, _: CorpusReport) -> Page:
  return Page("", _text(raw, path), ())


def _markdown(raw: bytes, path: epath.Path, report: CorpusReport) -> Page:
  text, num_chars = markdown_text.without_data(_text(raw, path))
  if num_chars:
    report.leave_out(num_chars, f"{path}:1")
  return markdown_text.read_markdown(text)


def _html(raw: bytes, path: epath.Path, report: CorpusReport) -> Page:
  """Returns a page, in the encoding that it names or seems to be in."""
  label = ""
  if not raw.isascii() or b"\x1b" in raw:
    label = next(declared_encodings(raw[:_LABEL_BYTES]), "")
  decoded = decode_page(raw, label)
  if decoded is None:
    return read_html(_text(raw, path))  # raises
  if decoded.label:
    says = "no encoding" if decoded.label == "none" else decoded.label
    place = f"{path}:1: says {says}, was read as {decoded.encoding}"
    report.count("mislabelled", place)
  return read_html(decoded.text)


def _office(
  end: str, raw: bytes, path: epath.Path, report: CorpusReport
) -> Page:
  """Reads a file with a library of the extra `documents`."""
  given = _text(raw, path) if end in office_text.OF_TEXT else raw
  try:
    page, num_chars = office_text.READERS[end](given)
  except ValueError as error:
    raise ValueError(
      f"{path}:1: {error}, or skip such files: rag-jax build-index"
      " --on_bad_record=skip."
    ) from error
  if num_chars:
    report.leave_out(num_chars, f"{path}:1")
  return page


_TEXT_READERS: dict[str, Callable[[bytes, epath.Path, CorpusReport], Page]] = {
  ".txt": _plain,
  **dict.fromkeys([".md", ".markdown"], _markdown),
  **dict.fromkeys([".html", ".htm", ".xhtml"], _html),
  **{end: functools.partial(_office, end) for end in office_text.READERS},
}
TEXT_ENDS = tuple(_TEXT_READERS)


def _end(name: str) -> str:
  """Returns which of `TEXT_ENDS` a name ends in, before any .gz, or ""."""
  end = os.path.splitext(name.lower().removesuffix(".gz"))[1]
  return end if end in _TEXT_READERS else ""


def read_text_file(
  path: epath.Path, id: str, bad_records: BadRecords
) -> Iterator[Document]:
  """Yields the document of a text file, or nothing if it is skipped.

  Args:
    path: a file whose name ends in one of `TEXT_ENDS`, perhaps with .gz.
    id: of the document.
    bad_records: what to do if it cannot be opened or read.
  """
  with bad_records.refusing("undecodable"):
    try:
      raw = read_bytes(path)
    except (FileNotFoundError, PermissionError) as error:
      raise ValueError(
        f"{path}:1: the file cannot be opened ({error.strerror}). Expected a"
        " file that this user may read. Is it a broken link, or are permissions"
        " missing? Mend or remove it."
      ) from error
    page = _TEXT_READERS[_end(path.name)](raw, path, bad_records.report)
    if bad := bad_character(id) or bad_character(path.name):
      raise ValueError(
        f"{shorten(os.fspath(path), 200)}:1: the file's name holds {bad}."
        " Expected a name in UTF-8, since the document's id is made of it."
        " Rename the file."
      )
    title = page.title or os.path.splitext(without_gz(path.name))[0]
    yield Document(id, title, page.text, (), f"{path}:1", page.headings)


def _files_below(
  folder: epath.Path, bad_records: BadRecords
) -> Iterator[tuple[str, epath.Path]]:
  """Yields (relative name, path) of the text files, in order of the names."""
  # Not recursive: folders can be nested deeper than Python's calls.
  levels = [_entries(folder, "")]
  while levels:
    name, path = next(levels[-1], ("", folder))
    if not name:
      levels.pop()
      continue
    hidden, special = path.name.startswith("."), special_file(path)
    if path.is_dir():
      # A link may lead back up, and the search would never end.
      linked = is_local(path) and os.path.islink(path)
      if not hidden and not linked:
        levels.append(_entries(path, name + "/"))
        continue
    elif not hidden and not special and _end(path.name):
      yield name, path
      continue
    place = f"{path}: {special}" if special else str(path)
    bad_records.report.count("other_files", place)


def _entries(
  folder: epath.Path, prefix: str
) -> Iterator[tuple[str, epath.Path]]:
  paths = sorted(folder.iterdir(), key=lambda p: p.name)
  return ((prefix + path.name, path) for path in paths)


def read_folder(
  folder: epath.Path, bad_records: BadRecords
) -> Iterator[Document]:
  """Yields a document for each text file in a folder and the folders below.

  The id is the path inside the folder, with slashes. The title is that of the
  page (<title>, else a heading), the first heading of a Markdown file, or the
  file's name. Other files, hidden files and links to folders are not read, but
  counted.

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
      f" of {list(TEXT_ENDS)} (perhaps followed by .gz), nor is there a"
      f" corpus.jsonl, as BEIR has. It holds {shorten(other, 200)}. Give the"
      " path of one of these files, or another folder."
    )


_EXPECTED = (
  f"one of the bundled corpora {sorted(BUNDLED)}, a name like"
  f" '{TFDS}beir/nfcorpus', a folder of {'/'.join(TEXT_ENDS)} files or with"
  f" BEIR's {_BEIR[0]}, or a file whose name ends in one of"
  f" {[*_READERS, *TEXT_ENDS]}, perhaps followed by .gz"
)


def _open(
  source: str, fields: FieldNames, bad_records: BadRecords
) -> Iterator[Document]:
  """Returns the documents of `source`, from the reader for its format."""
  if source.startswith(TFDS):
    return read_tfds_documents(source.removeprefix(TFDS), fields, bad_records)
  path = epath.Path(source).expanduser()
  if source in BUNDLED:
    path = BUNDLED[source] / "passages.jsonl"
  elif source and path.is_dir():
    beir = [path / name for name in _BEIR if (path / name).exists()]
    if not beir:
      return read_folder(path, bad_records)
    path = beir[0]
  path = find_file(path, _EXPECTED)
  name = path.name.lower().removesuffix(".gz")
  for end, read in _READERS.items():
    if name.endswith(end):
      return read(path, fields, bad_records)
  if name.endswith(TEXT_ENDS):
    return read_text_file(path, path.name, bad_records)
  raise ValueError(
    f"The corpus {source} cannot be read by the end of its name,"
    f" {path.suffix!r}. Expected {_EXPECTED}. Convert or rename the file."
  )


def read_documents(
  path: epath.PathLike,
  *,
  fields: FieldNames = DEFAULT_FIELDS,
  bad_records: BadRecords,
) -> Iterator[Document]:
  """Returns an iterator over the documents of a corpus, in its order.

  A missing corpus, or one without a reader, raises at once. Memory does not
  grow with the corpus, except for a .json file, which is read whole. The counts
  in `bad_records.report` are complete at the end.

  Args:
    path: "world_facts", "tfds:NAME", or a local or gs:// path of

      - a .jsonl file (also BEIR's, Pyserini's, FlashRAG's and KILT's);
      - a .json file: a list of records, an object with one such list, or
        SQuAD's, whose paragraphs are read;
      - a .csv or .tsv file whose first line names its columns, such as DPR's
        psgs_w100.tsv, or MS MARCO's collection.tsv without names;
      - a .txt, .md or .html file, or one that office_text.py reads;
      - a folder with BEIR's corpus.jsonl, or with text files at any depth.

      The name of each file may end in .gz.
    fields: names of the fields of JSON and TFDS records.
    bad_records: what to do with a record that cannot be used, for instance
      without id or text, cut off, or not UTF-8.

  Raises:
    FileNotFoundError: there is no such file; names similar ones.
    ImportError: TFDS or a reader needs a package that is not installed.
    ValueError: no reader takes the file; or `bad_records` says "fail" and a
      record cannot be used (names the file and line).
  """
  return _usable(_open(str(path), fields, bad_records), bad_records)


def _usable(
  documents: Iterable[Document], bad_records: BadRecords
) -> Iterator[Document]:
  """Yields the documents that can be searched for, and counts them."""
  for document in documents:
    if is_blank(document.text):
      problem = ValueError(
        f"{document.where}: the text of document {document.id!r} is empty."
        " Expected some text. Complete or remove it, or skip such documents:"
        " rag-jax build-index --on_bad_record=skip."
      )
      bad_records.refuse("empty", problem)
    elif is_blank(document.id):
      problem = ValueError(
        f"{document.where}: the id of the document is {document.id!r}. Expected"
        " a name or number of its own. Give it one, or skip such documents:"
        " rag-jax build-index --on_bad_record=skip."
      )
      bad_records.refuse("bad_record", problem)
    else:
      bad_records.report.documents += 1
      yield document
