"""Passages after some were deleted and others added behind them.

In: two stores, and the deleted rows of the first. Out: the passages that are
left as one sequence, numbered from 0 without gaps, like a store of their own.
"""

from collections.abc import Iterable, Sequence

from jaxtyping import Int
import numpy as np

from rag_jax.corpus.passages import Passage
from rag_jax.corpus.passages import Passages
from rag_jax.corpus.store import PassageStore


class Gaps:
  """Rows of which some are deleted; the others are numbered from 0 on.

  It takes 16 bytes of memory per deleted row.
  """

  def __init__(self, gone: Int[np.ndarray, "G"]):
    """Takes the deleted rows, in rising order."""
    self.gone = np.asarray(gone, np.int64)
    # How many rows that are left lie before each deleted row.
    self._left_before = self.gone - np.arange(len(self.gone))

  def rows(self, numbers: Int[np.ndarray, "*N"]) -> Int[np.ndarray, "*N"]:
    """Returns the rows that have these numbers."""
    before = np.searchsorted(self._left_before, numbers, "right")
    return np.asarray(numbers + before)  # also of a single number

  def numbers(self, rows: Int[np.ndarray, "*N"]) -> Int[np.ndarray, "*N"]:
    """Returns the numbers of rows that are not deleted."""
    return np.asarray(rows - np.searchsorted(self.gone, rows, "left"))

  def is_gone(self, row: int) -> bool:
    """Returns whether a row is deleted."""
    at = np.searchsorted(self.gone, row, "left")
    return bool(at < len(self.gone) and self.gone[at] == row)


class UpdatedPassages(Passages):
  """What is left of a store, then all of another. Threads may share it.

  Attributes:
    origin: of the first store, for messages.
    base: the first store.
    added: the second store; None: nothing was added.
    gaps: the deleted rows of the first store.
  """

  def __init__(
    self,
    base: PassageStore,
    gone: Int[np.ndarray, "G"],
    added: PassageStore | None,
    fingerprint: str = "",
  ):
    """Reads nothing yet.

    Args:
      base: the first store.
      gone: its deleted rows, in rising order.
      added: the second store.
      fingerprint: of the result; "": it is computed when it is needed, which
        reads every passage.
    """
    self.origin = base.origin
    self.base, self.added = base, added
    self.gaps = Gaps(gone)
    if fingerprint:
      self.fingerprint = fingerprint
    self._num_passages = len(base) - len(gone) + len(added or ())

  def __len__(self) -> int:
    return self._num_passages

  def _read(self, rows: Sequence[int]) -> Iterable[Passage]:
    found = self.gaps.rows(np.asarray(rows, np.int64))
    in_base = found < len(self.base)
    first = iter(self.base.get(found[in_base]))
    second = iter(())
    if self.added is not None:
      second = iter(self.added.get(found[~in_base] - len(self.base)))
    return tuple(next(first) if old else next(second) for old in in_base)

  def row_of(self, id: str) -> int | None:
    """Returns the number of the passage with this id; None if there is none."""
    row = self.base.row_of(id)
    if row is not None and not self.gaps.is_gone(row):
      return int(self.gaps.numbers(np.array([row]))[0])
    row = None if self.added is None else self.added.row_of(id)
    if row is None:
      return None
    return row + len(self.base) - len(self.gaps.gone)
