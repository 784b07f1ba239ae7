"""Documents out of whatever holds them.

In: the path of a file or folder (local or gs://), a bundled corpus, or the
name of a TFDS data set. Out: its documents, one after the other.
"""

from collections.abc import Callable, Iterable, Iterator

from etils import epath

from rag_jax.corpus.document import DEFAULT_FIELDS
from rag_jax.corpus.document import Document
from rag_jax.corpus.document import FieldNames
from rag_jax.corpus.document import record_documents
from rag_jax.corpus.folders import TEXT_ENDS
from rag_jax.corpus.folders import read_folder
from rag_jax.corpus.folders import read_text_file
from rag_jax.corpus.json_files import read_json
from rag_jax.corpus.json_files import read_jsonl_documents
from rag_jax.corpus.records import find_file
from rag_jax.corpus.report import BadRecords
from rag_jax.corpus.tables import ENDS as TABLE_ENDS
from rag_jax.corpus.tables import read_table
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

_EXPECTED = (
  f"one of the bundled corpora {sorted(BUNDLED)}, a name like"
  f" '{TFDS}beir/nfcorpus', a folder of {'/'.join(TEXT_ENDS)} files or with"
  f" BEIR's {_BEIR[0]}, or a file whose name ends in one of"
  f" {[*_READERS, *TEXT_ENDS]}, perhaps with .gz behind"
)


def _open(
  source: str, fields: FieldNames, bad_records: BadRecords
) -> Iterator[Document]:
  """Returns the documents of `source` as its reader gives them."""
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

  Whether it is there, and has a reader, is known at once. Nothing is kept:
  memory does not grow with the corpus, but for a .json file, which is read
  whole. Counts stand in `bad_records.report` at the end.

  Args:
    path: "world_facts", "tfds:NAME", or a local or gs:// path. A .jsonl file
      (also BEIR's, Pyserini's, FlashRAG's and KILT's), a .json file (a list of
      records, an object with one such list, or SQuAD's, whose paragraphs are
      taken), a .csv or .tsv file with the names of its columns in the first
      line, such as DPR's psgs_w100.tsv, or without names MS MARCO's
      collection.tsv, a .txt, .md or .html file, each perhaps with .gz behind;
      a folder with BEIR's corpus.jsonl, or with text files in it and below.
    fields: names of the fields of JSON and TFDS records.
    bad_records: what to do with a record without id or text, a line that is
      cut in half or not UTF-8, and the like.

  Raises:
    FileNotFoundError: there is no such file; names the nearest ones.
    ImportError: TFDS needs a package that is not installed.
    ValueError: there is no reader for it; or a record cannot be used, and
      `bad_records` says "fail": names the file and line.
  """
  return _usable(_open(str(path), fields, bad_records), bad_records)


def _usable(
  documents: Iterable[Document], bad_records: BadRecords
) -> Iterator[Document]:
  for document in documents:
    problem = _problem(document)
    if problem:
      bad_records.refuse(*problem)
      continue
    bad_records.report.documents += 1
    yield document


def _problem(document: Document) -> tuple[str, ValueError] | None:
  """Returns why a document cannot be searched for, and what that counts as."""
  if not document.text.strip():
    return "empty", ValueError(
      f"{document.where}: the text of document {document.id!r} is empty."
      " Expected some text. Complete or remove it, or have it skipped:"
      " rag-jax build-index --on_bad_record=skip."
    )
  if not document.id.strip():
    return "bad_record", ValueError(
      f"{document.where}: the id of the document is {document.id!r}. Expected"
      " a name or number of its own. Give it one, or have it skipped:"
      " rag-jax build-index --on_bad_record=skip."
    )
  return None
