"""The passages that are searched, read from a file into memory.

In: the name of a bundled corpus, a file that documents.py reads, or a passage
store. Out: `Passages`, whose row numbers are those of the index.
"""

from collections.abc import Iterable, Iterator, Sequence
import dataclasses
import difflib
import functools
import json
import os
from typing import SupportsIndex, overload

from etils import epath

from rag_jax.artifacts import fingerprint_lines
from rag_jax.corpus.records import find_file
from rag_jax.corpus.report import BadRecords
from rag_jax.disk import instead_of

# Corpora that come with the library: passages.jsonl and the questions about
# them, train.jsonl, validation.jsonl and test.jsonl.
BUNDLED = {"world_facts": epath.Path(__file__).parent / "world_facts"}

_ENDS = (".jsonl", ".json", ".tsv", ".csv")
_EXPECTED = (
  f"one of the bundled corpora {sorted(BUNDLED)}, or a file whose name ends in"
  f" one of {list(_ENDS)}, perhaps with .gz behind, or the directory of a"
  " passage store"
)


@dataclasses.dataclass(frozen=True, slots=True)
class Passage:
  """The unit of the corpus and of the index."""

  id: str
  title: str  # may be empty
  text: str
  metadata: tuple[tuple[str, str], ...] = ()  # (name, value), to filter by


def own_title(passage: Passage) -> str:
  """Returns the title, or "" if it is but the name of the passage's file.

  Two files of the same text are the same text under two names.
  """
  id, _, part = passage.id.rpartition("#")
  name = (id if id and part.isdecimal() else passage.id).rpartition("/")[2]
  stem = name[:-3] if name.lower().endswith(".gz") else name
  stem, end = os.path.splitext(stem)
  return "" if end and stem == passage.title else passage.title


def fingerprint_parts(passage: Passage) -> tuple[str, str, str]:
  """Returns the three lines that a passage gives to a fingerprint.

  They are id, title and text where there is no metadata, as they were before
  there was any. It goes behind the id and a NUL, which no id that was read
  can hold: `fingerprint_lines` of all passages' parts stays unambiguous.
  """
  first = passage.id
  if passage.metadata:
    first += "\0" + json.dumps(passage.metadata)
  return first, passage.title, passage.text


def fingerprint_passages(passages: Iterable[Passage]) -> str:
  """Returns hex digits that change with any passage, and their order."""
  return fingerprint_lines(
    line for p in passages for line in fingerprint_parts(p)
  )


class Passages(Sequence[Passage]):
  """Passages in memory, in the order of the index.

  Attributes:
    origin: where they were read, for messages.
  """

  def __init__(self, passages: Iterable[Passage], origin: str):
    """Keeps `passages`.

    Raises:
      ValueError: two have the same id.
    """
    self._passages = tuple(passages)
    self.origin = origin
    self._rows = {p.id: row for row, p in enumerate(self._passages)}
    if len(self._rows) < len(self._passages):
      second = next(
        p for row, p in enumerate(self._passages) if self._rows[p.id] != row
      )
      raise ValueError(
        f"Two of the {len(self._passages)} passages of {origin} have the id"
        f" {second.id!r}. Expected one passage an id; rename or remove one."
      )

  def __len__(self) -> int:
    return len(self._passages)

  @overload
  def __getitem__(self, index: SupportsIndex) -> Passage: ...

  @overload
  def __getitem__(self, index: slice) -> tuple[Passage, ...]: ...

  def __getitem__(
    self, index: SupportsIndex | slice
  ) -> Passage | tuple[Passage, ...]:
    return self._passages[index]

  def __iter__(self) -> Iterator[Passage]:
    return iter(self._passages)

  def __repr__(self) -> str:
    return f"{type(self).__name__}({len(self)} from {self.origin})"

  @functools.cached_property
  def fingerprint(self) -> str:
    """Hex digits that change with any part of any passage, and their order."""
    return fingerprint_passages(self)

  def by_id(self, id: str) -> Passage:
    """Returns the passage with this id.

    Raises:
      ValueError: there is none.
    """
    row = self.row_of(id)
    if row is None:
      some = [p.id for p in self[:3]]
      raise ValueError(
        f"No passage of {self.origin} has the id {id!r}. Expected one of its"
        f" {len(self)} ids, which look like {some}. Was the id taken from"
        " another corpus?"
      )
    return self[row]

  def row_of(self, id: str) -> int | None:
    """Returns the row of the passage with this id; None if there is none."""
    return self._rows.get(id)


def _find(name_or_path: str) -> epath.Path:
  """Returns the file to read.

  Raises:
    ValueError: a bundled corpus was meant, and there is none of that name.
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
  """Returns whether `load_passages` is meant, and not a reader of documents.

  What does not exist is, so that its message names what is near.
  """
  from rag_jax.corpus import store

  if name_or_path.startswith("tfds:"):
    return False
  path = epath.Path(name_or_path).expanduser()
  if name_or_path in BUNDLED or not (name_or_path and path.exists()):
    return True
  if path.is_dir():
    return store.is_store(path)
  return path.name.lower().removesuffix(".gz").endswith(_ENDS)


def load_passages(name_or_path: str) -> Passages:
  """Returns the passages of a bundled corpus, of a file or of a store.

  Each document of a file is one passage. Its metadata is left out: whoever
  reads into memory does not filter.

  Args:
    name_or_path: "world_facts"; or a .jsonl, .json, .tsv or .csv file, perhaps
      with .gz behind, as `documents.read_documents` reads it, into memory; or
      the directory of a `PassageStore`, opened.

  Raises:
    FileNotFoundError: there is no such file; names the nearest ones.
    ValueError: there is no such corpus, or a record cannot be used (with its
      line), or two have the same id (with both lines), or there are none.
  """
  # Imported here: both are made of the passages above.
  from rag_jax.corpus import documents
  from rag_jax.corpus import store

  folder = epath.Path(name_or_path).expanduser()
  is_folder = bool(name_or_path) and folder.is_dir()
  if name_or_path not in BUNDLED and is_folder and store.is_store(folder):
    return store.open_store(folder)
  path = _find(name_or_path)
  passages: list[Passage] = []
  places: dict[str, str] = {}
  for document in documents.read_documents(path, bad_records=BadRecords()):
    first = places.setdefault(document.id, document.where)
    if first != document.where:
      raise ValueError(
        f"{document.where}: the id {document.id!r} is that of {first} too."
        " Expected one passage an id. Rename or remove one of the two."
      )
    passages.append(Passage(document.id, document.title, document.text))
  if not passages:
    raise ValueError(
      f"{path} holds no passages. Expected at least one. Is it the right file,"
      " and was it copied completely?"
    )
  return Passages(passages, origin=name_or_path)
