"""Reads a corpus as passages.

In: the path or name of a corpus. Out: its passages. `load_passages` returns all
of them, one per document. `read_passages` splits documents, drops duplicates
and yields one passage after the other, so that memory does not grow with their
number.
"""

from collections.abc import Callable, Iterator
import contextlib
import difflib

from etils import epath

from rag_jax.corpus.document import DEFAULT_FIELDS
from rag_jax.corpus.document import Document
from rag_jax.corpus.document import FieldNames
from rag_jax.corpus.documents import BUNDLED
from rag_jax.corpus.documents import read_documents
from rag_jax.corpus.duplicates import Seen
from rag_jax.corpus.passages import Passage
from rag_jax.corpus.passages import PassageList
from rag_jax.corpus.passages import Passages
from rag_jax.corpus.passages import own_title
from rag_jax.corpus.report import BadRecords
from rag_jax.corpus.report import raise_empty
from rag_jax.corpus.splitting import Encoder
from rag_jax.corpus.splitting import SplitConfig
from rag_jax.corpus.splitting import Splitter
from rag_jax.corpus.store import PassageStore
from rag_jax.corpus.store import is_store
from rag_jax.corpus.text_files import find_file
from rag_jax.disk import instead_of

_ENDS = (".jsonl", ".json", ".tsv", ".csv")
_EXPECTED = (
  f"one of the bundled corpora {sorted(BUNDLED)}, or a file whose name ends in"
  f" one of {list(_ENDS)}, perhaps followed by .gz, or the directory of a"
  " passage store"
)


def read_passages(
  path: epath.PathLike,
  settings: SplitConfig,
  *,
  fields: FieldNames = DEFAULT_FIELDS,
  bad_records: BadRecords,
  tokenizer: Encoder | None = None,
  drop_duplicate_texts: bool = True,
  on_twin: Callable[[Passage, int], None] | None = None,
) -> Iterator[Passage]:
  """Yields the passages of a corpus; no two have the same id.

  `bad_records.report` counts what was read, split, cut and dropped. It is
  complete after the last passage.

  Args:
    path: what `read_documents` reads.
    settings: how documents are split.
    fields: names of the fields of JSON and TFDS records.
    bad_records: what to do with a record that cannot be used, or that has the
      id of an earlier one.
    tokenizer: counts tokens, if `settings.unit` is "tokens".
    drop_duplicate_texts: leave out passages with the title and text of an
      earlier one. They are counted, and never an error. A title that is only a
      file's name is not compared. Set it to False where relevance judgements
      name passages by id, as BEIR's do.
    on_twin: called with each passage that is left out as a duplicate, and the
      number of the yielded passage that has its title and text.

  Raises:
    FileNotFoundError: there is no such file; names similar ones.
    ImportError: TFDS needs a package that is not installed.
    OSError: there is no room for temporary files.
    ValueError: a record cannot be used and `bad_records` says "fail" (names
      the file and line); the settings are not possible; or the corpus has no
      passage (known at the end).
  """
  report = bad_records.report
  found = 0
  with contextlib.closing(Seen()) as texts:
    for document, passage in read_document_passages(
      path,
      settings,
      fields=fields,
      bad_records=bad_records,
      tokenizer=tokenizer,
    ):
      if drop_duplicate_texts:
        key = own_title(passage), passage.text
        first = texts.add(document.where, *key, number=found)
        if first:
          if on_twin:
            on_twin(passage, texts.number_of(*key))
          what = f"passage {passage.id!r} has the text of {first}"
          report.drop("duplicate_text", f"{document.where}: {what}")
          continue
      found += 1
      report.passages += 1
      yield passage
  if not found:
    raise_empty(str(path), report)


def read_document_passages(
  path: epath.PathLike,
  settings: SplitConfig,
  *,
  fields: FieldNames = DEFAULT_FIELDS,
  bad_records: BadRecords,
  tokenizer: Encoder | None = None,
) -> Iterator[tuple[Document, Passage]]:
  """Yields the passages of a corpus, each with its document.

  No two have the same id; duplicate texts are kept. Arguments and errors are
  those of `read_passages`, but an empty corpus yields nothing.
  """
  report = bad_records.report
  splitter = Splitter(settings, tokenizer=tokenizer, report=report)
  with contextlib.closing(Seen()) as ids:

    def is_new(id: str, where: str) -> bool:
      first = ids.add(where, id)
      if first:
        bad_records.refuse("duplicate_id", _same_id(id, where, first))
      return not first

    for document in read_documents(
      path, fields=fields, bad_records=bad_records
    ):
      if not is_new(document.id, document.where):
        continue
      for passage in splitter.split(document):
        # "a#1" may be a passage of "a", or a document with that id.
        if passage.id == document.id or is_new(passage.id, document.where):
          yield document, passage


def _same_id(id: str, where: str, first: str) -> ValueError:
  return ValueError(
    f"{where}: the id {id!r} is that of {first} too. Expected one passage per"
    " id. Rename or remove one of the two."
  )


def _find(name_or_path: str) -> epath.Path:
  """Returns the file to read.

  Raises:
    FileNotFoundError: there is no such file; names similar ones.
    ValueError: a bundled corpus was meant, but none has that name; or the file
      has another format.
  """
  if name_or_path in BUNDLED:
    return BUNDLED[name_or_path] / "passages.jsonl"
  # Neither a path nor a file name: a bundled corpus was meant.
  is_name = "/" not in name_or_path and "." not in name_or_path
  if is_name and not (name_or_path and epath.Path(name_or_path).exists()):
    close = difflib.get_close_matches(name_or_path, BUNDLED, n=1)
    if close:
      hint = f"Did you mean {close[0]!r}?"
    else:
      there = f"{instead_of(name_or_path)} " if name_or_path else ""
      hint = f"{there}Correct the name."
    raise ValueError(
      f"There are no passages {name_or_path!r}. Expected {_EXPECTED}. {hint}"
    )
  path = find_file(name_or_path, _EXPECTED)
  if not path.name.lower().removesuffix(".gz").endswith(_ENDS):
    raise ValueError(
      f"The passages {name_or_path} cannot be read by the end of their name,"
      f" {path.suffix!r}. Expected {_EXPECTED}. Convert or rename the file."
    )
  return path


def is_passages(name_or_path: str) -> bool:
  """Returns whether `load_passages` should read this, not `read_documents`.

  True for a missing path, so that its message suggests similar names.
  """
  if name_or_path.startswith("tfds:"):
    return False
  path = epath.Path(name_or_path).expanduser()
  if name_or_path in BUNDLED or not (name_or_path and path.exists()):
    return True
  if path.is_dir():
    return is_store(path)
  return path.name.lower().removesuffix(".gz").endswith(_ENDS)


def load_passages(name_or_path: str) -> Passages:
  """Returns the passages of a bundled corpus, of a file or of a store.

  Each document of a file becomes one passage in memory, without its metadata,
  which is only used to filter searches.

  Args:
    name_or_path: "world_facts"; or a .jsonl, .json, .tsv or .csv file, perhaps
      followed by .gz, which `read_documents` reads; or the directory of a
      `PassageStore`, which is opened.

  Raises:
    FileNotFoundError: there is no such file; names similar ones.
    ValueError: there is no such corpus; a record cannot be used (names its
      line); two have the same id (names both lines); or there are none.
  """
  folder = epath.Path(name_or_path).expanduser()
  is_folder = bool(name_or_path) and folder.is_dir()
  if name_or_path not in BUNDLED and is_folder and is_store(folder):
    return PassageStore(folder)
  path, bad_records = _find(name_or_path), BadRecords()
  passages: list[Passage] = []
  places: dict[str, str] = {}  # faster than `Seen`
  for document in read_documents(path, bad_records=bad_records):
    first = places.setdefault(document.id, document.where)
    if first != document.where:
      raise _same_id(document.id, document.where, first)
    passages.append(Passage(document.id, document.title, document.text))
  if not passages:
    raise_empty(str(path), bad_records.report)
  return PassageList(passages, origin=name_or_path)
