"""The passages that are searched, read from a file into memory.

In: the name of a bundled corpus, a .jsonl file with one object of id, title
and text a line, or a .tsv file like DPR's psgs_w100.tsv; either may be
gzip-compressed. Out: `Passages`, whose row numbers are those of the index.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
import csv
import dataclasses
import difflib
import functools
import json
import os
from typing import SupportsIndex, overload

from etils import epath

from rag_jax.artifacts import fingerprint_lines
from rag_jax.corpus.records import bad_character
from rag_jax.corpus.records import find_file
from rag_jax.corpus.records import read_lines
from rag_jax.corpus.records import read_records
from rag_jax.corpus.records import shorten
from rag_jax.corpus.report import BadRecords

# Corpora that come with the library: passages.jsonl and the questions about
# them, train.jsonl, validation.jsonl and test.jsonl.
BUNDLED = {"world_facts": epath.Path(__file__).parent / "world_facts"}

_TSV_HEADER = ["id", "text", "title"]


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


def _check(passage: Passage, where: str) -> Passage:
  """Returns a passage that can be searched for and read."""
  for name in ("id", "text"):
    if not getattr(passage, name).strip():
      raise ValueError(
        f"{where}: the {name} of passage {passage.id!r}, titled"
        f" {shorten(passage.title)}, is empty. Expected an id and some text;"
        " only the title may be empty. Complete or remove the passage."
      )
  return passage


def read_jsonl(path: epath.PathLike) -> Iterator[tuple[int, Passage]]:
  """Yields (line number, passage) of a .jsonl or .jsonl.gz file.

  Raises:
    ValueError: names the line that is not an object of id (a string or a whole
      number), title and text.
  """
  required = {"id": (str, int), "title": str, "text": str}
  for line, record in read_records(path, required=required):
    passage = Passage(str(record["id"]), record["title"], record["text"])
    yield line, _check(passage, f"{path}:{line}")


def _check_row(row: list[str], where: str, last_line: int) -> None:
  """Raises `ValueError` unless the row is one passage."""
  # Where a quote is not closed, csv reads on up to the next quote and makes
  # one passage of several. A tab and a line end in one column give it away,
  # and at the end of the file a line end in the title.
  open_quote = any("\n" in c and "\t" in c for c in row) or "\n" in row[-1]
  if open_quote:
    raise ValueError(
      f"{where}: a column starts with a double quote and goes on to line"
      f" {last_line}: {shorten(next(c for c in row if chr(10) in c))}. Expected"
      " the quote to be closed before the next tab. Close it, and double the"
      " quotes inside the text."
    )
  if len(row) != len(_TSV_HEADER):
    raise ValueError(
      f"{where}: {len(row)} columns, {shorten(row, 120)}. Expected"
      f" {len(_TSV_HEADER)}, separated by tabs: {_TSV_HEADER}. Correct the"
      " line; if it is the last one, the file may be cut off: copy it again."
    )
  for name, value in zip(_TSV_HEADER, row, strict=True):
    if bad := bad_character(value):
      raise ValueError(
        f"{where}: column {name!r} holds {bad}, in {shorten(value)}. Expected"
        " plain text. Remove the character."
      )


def read_psgs_w100(
  path: epath.PathLike, *, bad_records: BadRecords | None = None
) -> Iterator[tuple[int, Passage]]:
  r"""Yields (line number, passage) of a file like DPR's psgs_w100.tsv.

  The columns are id, text and title, named in the first line, separated by
  tabs. A column with double quotes around it has the quotes inside doubled,
  as in https://github.com/facebookresearch/DPR.

  Args:
    path: an existing file, perhaps a .gz.
    bad_records: what to do with a row that is not like that; None raises.

  Raises:
    ValueError: names the line that is not like that. A wrong first line is
      never skipped: all others would be wrong too.
  """
  bad, name = bad_records or BadRecords("fail"), str(path)
  taken: list[int] = []  # the lines of one row

  def lines() -> Iterator[str]:
    for line, text in read_lines(path, bad_records=bad):
      taken.append(line)
      yield text

  # Not strict: DPR reads the file without, so a title like `"Heroes" (song)`,
  # which csv would have written otherwise, has always been accepted.
  reader = csv.reader(lines(), delimiter="\t")
  header = None
  while True:
    taken.clear()
    try:
      row = next(reader, None)
    except csv.Error as error:
      problem = ValueError(
        f"{path}:{taken[0]}: the passage that starts here cannot be read"
        f" ({error}). Expected columns of at most {csv.field_size_limit()}"
        " characters, with every double quote closed. Correct the line, or"
        " convert longer passages to .jsonl."
      )
      problem.__cause__ = error
      bad.refuse("bad_record", problem)
      continue
    if row is None:
      return
    where = f"{name}:{taken[0]}"
    if header is None:
      header = row
      if header != _TSV_HEADER:
        raise ValueError(
          f"{where}: the first line is {shorten(row, 120)}. Expected the names"
          f" of the columns, {_TSV_HEADER}, separated by tabs, as in DPR's"
          " psgs_w100.tsv. Add or correct that line."
        )
      continue
    if not row:
      continue
    kind = "bad_record"
    try:
      _check_row(row, where, taken[-1])
      id_, text, title = row
      kind = "bad_record" if text.strip() else "empty"
      passage = _check(Passage(id_, title, text), where)
    except ValueError as error:
      bad.refuse(kind, error)
      continue
    yield taken[0], passage


_READERS: dict[
  str, Callable[[epath.PathLike], Iterator[tuple[int, Passage]]]
] = {
  ".jsonl": read_jsonl,
  ".jsonl.gz": read_jsonl,
  ".tsv": read_psgs_w100,
  ".tsv.gz": read_psgs_w100,
}

_EXPECTED = (
  f"one of the bundled corpora {sorted(BUNDLED)}, or a file whose name ends in"
  f" one of {sorted(_READERS)}, or the directory of a passage store"
)


def _find(name_or_path: str) -> tuple[epath.Path, str]:
  """Returns the file to read and the end of its name, a key of `_READERS`."""
  if name_or_path in BUNDLED:
    return BUNDLED[name_or_path] / "passages.jsonl", ".jsonl"
  # Neither a path nor a file name: a bundled corpus was meant.
  is_name = "/" not in name_or_path and "." not in name_or_path
  if is_name and not (name_or_path and epath.Path(name_or_path).exists()):
    close = difflib.get_close_matches(name_or_path, BUNDLED, n=1)
    hint = f"Did you mean {close[0]!r}?" if close else "Correct the name."
    raise ValueError(
      f"There are no passages {name_or_path!r}. Expected {_EXPECTED}. {hint}"
    )
  path = find_file(name_or_path, _EXPECTED)
  ends = [end for end in _READERS if path.name.endswith(end)]
  if not ends:
    raise ValueError(
      f"The passages {name_or_path} cannot be read by the end of their name,"
      f" {path.suffix!r}. Expected {_EXPECTED}. Convert or rename the file."
    )
  return path, ends[0]


def load_passages(name_or_path: str) -> Passages:
  """Returns the passages of a bundled corpus, of a file or of a store.

  Args:
    name_or_path: "world_facts"; or a .jsonl, .jsonl.gz, .tsv or .tsv.gz file,
      read into memory; or the directory of a `PassageStore`, opened.

  Raises:
    FileNotFoundError: there is no such file; names the nearest ones.
    ValueError: there is no such corpus, or a record cannot be used (with its
      line), or two have the same id (with both lines), or there are none.
  """
  # Imported here: a store is made of the passages above.
  from rag_jax.corpus import store

  folder = epath.Path(name_or_path).expanduser()
  is_folder = bool(name_or_path) and folder.is_dir()
  if name_or_path not in BUNDLED and is_folder and store.is_store(folder):
    return store.open_store(folder)
  path, end = _find(name_or_path)
  passages: list[Passage] = []
  lines: dict[str, int] = {}
  for line, passage in _READERS[end](path):
    first = lines.setdefault(passage.id, line)
    if first != line:
      raise ValueError(
        f"{path}:{line}: the id {passage.id!r} is that of line {first} too."
        " Expected one passage an id. Rename or remove one of the two."
      )
    passages.append(passage)
  if not passages:
    raise ValueError(
      f"{path} holds no passages. Expected at least one. Is it the right file,"
      " and was it copied completely?"
    )
  return Passages(passages, origin=name_or_path)
