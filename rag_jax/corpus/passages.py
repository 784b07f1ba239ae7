"""The `Passage`, and `Passages`: a sequence of them.

In: passages. Out: `Passages`, whose rows have the same numbers as those of the
index. They are in memory (`PassageList`), in files (store.py), or in a search
directory that was updated.
"""

import abc
from collections.abc import Iterable, Iterator, Sequence
import dataclasses
import functools
import json
import operator
import os
from typing import SupportsIndex, overload

from jaxtyping import Int
import numpy as np

from rag_jax.artifacts import fingerprint_lines

_ITER_ROWS = 1024  # read at a time by a loop over all passages


@dataclasses.dataclass(frozen=True, slots=True)
class Passage:
  """The unit of the corpus and of the index."""

  id: str
  title: str  # may be empty
  text: str
  metadata: tuple[tuple[str, str], ...] = ()  # (name, value), to filter by


def without_gz(name: str) -> str:
  """Returns a file's name without the .gz at its end."""
  return name[:-3] if name.lower().endswith(".gz") else name


def own_title(passage: Passage) -> str:
  """Returns the title, or "" if it is only the name of the passage's file.

  So two files with the same text count as duplicates.
  """
  id, _, part = passage.id.rpartition("#")
  name = (id if id and part.isdecimal() else passage.id).rpartition("/")[2]
  stem, end = os.path.splitext(without_gz(name))
  return "" if end and stem == passage.title else passage.title


def fingerprint_parts(passage: Passage) -> tuple[str, str, str]:
  """Returns the three lines that a passage adds to a fingerprint.

  They are id, title and text, as before passages had metadata. Metadata is
  appended to the id after a NUL, which no id can contain, so that different
  passages always give different lines.
  """
  first = passage.id
  if passage.metadata:
    first += "\0" + json.dumps(passage.metadata)
  return first, passage.title, passage.text


def fingerprint_passages(passages: Iterable[Passage]) -> str:
  """Returns hex digits that depend on every passage and on their order."""
  return fingerprint_lines(
    line for p in passages for line in fingerprint_parts(p)
  )


class Passages(Sequence[Passage]):
  """Passages in the order of the index, wherever they are kept.

  Attributes:
    origin: where they were read from, for messages.
  """

  origin: str

  @abc.abstractmethod
  def _read(self, rows: Sequence[int]) -> Iterable[Passage]:
    """Returns the passages of `rows`, each from 0 to len(self) - 1."""

  @abc.abstractmethod
  def row_of(self, id: str) -> int | None:
    """Returns the row of the passage with this id; None if there is none."""

  @functools.cached_property
  def fingerprint(self) -> str:
    """Hex digits that depend on every passage and on their order."""
    return fingerprint_passages(self)

  @overload
  def __getitem__(self, index: SupportsIndex) -> Passage: ...

  @overload
  def __getitem__(self, index: slice) -> tuple[Passage, ...]: ...

  def __getitem__(
    self, index: SupportsIndex | slice
  ) -> Passage | tuple[Passage, ...]:
    if isinstance(index, slice):
      return tuple(self._read(range(len(self))[index]))
    (passage,) = self.get([index])
    return passage

  def get(
    self, rows: Sequence[SupportsIndex] | Int[np.ndarray, "N"]
  ) -> tuple[Passage, ...]:
    """Returns the passages of `rows`, in the order of `rows`."""
    return tuple(self._read([self._row(row) for row in rows]))

  def _row(self, index: SupportsIndex) -> int:
    """Returns the row of an index, which may be negative."""
    row = operator.index(index)
    if not -len(self) <= row < len(self):
      raise IndexError(
        f"There is no passage {row} in {self.origin}. Expected a row from 0 to"
        f" {len(self) - 1}. Was the index built from other passages?"
      )
    return row % len(self)

  def __iter__(self) -> Iterator[Passage]:
    for start in range(0, len(self), _ITER_ROWS):
      yield from self[start : start + _ITER_ROWS]

  def __repr__(self) -> str:
    return f"{type(self).__name__}({len(self)} from {self.origin})"

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


class PassageList(Passages):
  """Passages in memory."""

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
        f" {second.id!r}. Expected one passage per id; rename or remove one."
      )

  def __len__(self) -> int:
    return len(self._passages)

  def __iter__(self) -> Iterator[Passage]:
    return iter(self._passages)

  def _read(self, rows: Sequence[int]) -> Iterable[Passage]:
    return [self._passages[row] for row in rows]

  def row_of(self, id: str) -> int | None:
    """Returns the row of the passage with this id; None if there is none."""
    return self._rows.get(id)
