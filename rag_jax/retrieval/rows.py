"""Rows of several arrays as if they were one, which would not fit in memory.

In: arrays, for instance memory maps of files. Out: what `embeddings[ids]` and
`embeddings[start:stop]` need, and a copy of only the rows asked for.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


class JoinedRows:
  """Arrays [n_i, R] of one type, one below the other: [P, R]."""

  def __init__(self, blocks: Sequence[Any]):
    self._blocks = list(blocks)
    # Number of the first row of each block, and of all rows.
    self._starts = np.cumsum([0, *(len(b) for b in self._blocks)])
    self.dtype = self._blocks[0].dtype
    self.shape = (int(self._starts[-1]), self._blocks[0].shape[1])
    self.ndim = 2

  @property
  def nbytes(self) -> int:
    """Of all blocks."""
    return sum(block.nbytes for block in self._blocks)

  def __len__(self) -> int:
    return self.shape[0]

  def __array__(
    self, dtype: Any = None, copy: bool | None = None
  ) -> np.ndarray:
    """Returns all rows; they have to fit in memory."""
    return np.asarray(self[:], dtype)

  def __getitem__(self, rows: Any) -> np.ndarray:
    """Returns the rows that a number, a slice or an array of numbers names."""
    if isinstance(rows, slice):
      start, stop, step = rows.indices(len(self))
      if step == 1:
        return self._slice(start, stop)
      rows = np.arange(start, stop, step)
    rows = _row_numbers(rows, len(self))
    flat = rows.reshape(-1)
    found = np.empty((len(flat), self.shape[1]), self.dtype)
    owner = np.searchsorted(self._starts, flat, side="right") - 1
    for i in np.unique(owner):
      mine = owner == i
      found[mine] = self._blocks[i][flat[mine] - self._starts[i]]
    return found.reshape(*rows.shape, self.shape[1])

  def _slice(self, start: int, stop: int) -> np.ndarray:
    """Returns rows start to stop; a view if one block holds them."""
    parts = [
      block[max(start - first, 0) : max(stop - first, 0)]
      for first, block in zip(self._starts, self._blocks, strict=False)
      if first < stop and start < first + len(block)
    ]
    if len(parts) == 1:
      return parts[0]
    return np.concatenate([self._blocks[0][:0], *parts])


class SelectedRows:
  """Some rows of an array, or of `JoinedRows`, renumbered from 0 on."""

  ndim = 2

  def __init__(
    self,
    rows: Any,
    num_rows: int,
    select: Callable[[np.ndarray], np.ndarray],
  ):
    """Takes the rows, how many are selected, and numbers -> their rows."""
    self._rows, self._select = rows, select
    self.dtype = rows.dtype
    self.shape = (num_rows, rows.shape[1])

  @property
  def nbytes(self) -> int:
    """Of the rows below, also of those that are not selected."""
    return self._rows.nbytes

  def __len__(self) -> int:
    return self.shape[0]

  def __array__(
    self, dtype: Any = None, copy: bool | None = None
  ) -> np.ndarray:
    """Returns all rows; they have to fit in memory."""
    return np.asarray(self[:], dtype)

  def __getitem__(self, rows: Any) -> np.ndarray:
    """Returns the rows that a number, a slice or an array of numbers names."""
    if isinstance(rows, slice):
      return self._rows[self._select(np.arange(*rows.indices(len(self))))]
    return self._rows[self._select(_row_numbers(rows, len(self)))]


def _row_numbers(rows: Any, num_rows: int) -> np.ndarray:
  """Returns numbers of rows, which may count from the end, as from the start.

  Raises:
    IndexError: there is no such row, or they are no whole numbers.
  """
  rows = np.asarray(rows)
  if rows.dtype == bool or not np.issubdtype(rows.dtype, np.integer):
    raise IndexError(
      f"Rows were asked for by {rows.dtype}; expected whole numbers or a slice."
      " Use np.flatnonzero for a mask."
    )
  if rows.size and not -num_rows <= rows.min() <= rows.max() < num_rows:
    raise IndexError(
      f"Row {rows.max() if rows.max() >= num_rows else rows.min()} was asked"
      f" for; expected less than the {num_rows} rows that there are. Do the ids"
      " belong to this index?"
    )
  return np.where(rows < 0, rows + num_rows, rows)
