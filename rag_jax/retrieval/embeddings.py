"""Passage embeddings as `Rows`, which need not fit in memory.

In: embeddings, block by block, in any order, or arrays. Out: files of float32,
bfloat16, or int8 with a scale per row; and what reads only the rows asked for,
in float32: of files, of several arrays, or of some rows of others.

bfloat16 keeps 8 bits of each number, int8 one of 255 steps between minus and
plus the largest number of its row. What they cost in recall is measured with
the index, not assumed.
"""

from collections.abc import Callable, Sequence
import errno
import json
import os
from typing import Any

from etils import epath
from jaxtyping import Float, Int
import ml_dtypes
import numpy as np

from rag_jax import artifacts
from rag_jax import disk
from rag_jax.corpus.npy_files import read_array
from rag_jax.disk import UnwritableError

STORAGE = ("float32", "bfloat16", "int8")  # of numbers in the file
EMBEDDINGS = "embeddings.npy"
SCALES = "scales.npy"  # of int8 alone, [P] float32
# In place of both, in a shard of an index: which rows of the files two folders
# above, where those of all shards lie once.
PART = "part.json"

# NumPy's files know no bfloat16: its bits are stored as whole numbers.
_DTYPES = {"float32": np.float32, "bfloat16": np.uint16, "int8": np.int8}


def check_storage(storage: str) -> str:
  """Returns `storage`, or raises `ValueError` if there is no such choice."""
  if storage not in STORAGE:
    raise ValueError(
      f"Embeddings cannot be stored as {storage!r}; expected one of"
      f" {', '.join(STORAGE)}. Choose one of these."
    )
  return storage


def bytes_of(storage: str, num_passages: int, embedding_dim: int) -> int:
  """Returns how many bytes the files take, without their headers."""
  itemsize = np.dtype(_DTYPES[check_storage(storage)]).itemsize
  scales = 4 * num_passages if storage == "int8" else 0
  return num_passages * embedding_dim * itemsize + scales


def pack(
  embeddings: Float[np.ndarray, "N R"], storage: str
) -> tuple[np.ndarray, Float[np.ndarray, "N"] | None]:
  """Returns the numbers as they are stored, and the scales of int8."""
  if storage == "int8":
    scales = np.abs(embeddings).max(axis=1, initial=0.0) / 127
    safe = np.where(scales > 0, scales, 1)[:, None]
    steps = np.rint(embeddings / safe).astype(np.int8)
    return steps, scales.astype(np.float32)
  if storage == "bfloat16":
    return embeddings.astype(ml_dtypes.bfloat16).view(np.uint16), None
  return np.asarray(embeddings, np.float32), None


def unpack(
  stored: np.ndarray, scales: np.ndarray | None
) -> Float[np.ndarray, "*N R"]:
  """Returns the numbers that `pack` stored, in float32."""
  if stored.dtype == np.uint16:
    return stored.view(ml_dtypes.bfloat16).astype(np.float32)
  if scales is not None:
    return stored.astype(np.float32) * scales[..., None]
  return stored


class Rows:
  """Embeddings [P, R] that are read when they are asked for.

  Indexed like an array: by a slice, or by whole numbers of any shape. Reading
  all of them, by `np.asarray`, needs memory for all.

  Attributes:
    shape: [P, R].
    nbytes: that they take where they are kept.
    dtype: of what is read.
  """

  ndim = 2

  def __init__(
    self, shape: tuple[int, ...], nbytes: int, dtype: Any = np.float32
  ):
    self.shape, self.nbytes, self.dtype = shape, nbytes, np.dtype(dtype)

  def __len__(self) -> int:
    return self.shape[0]

  def __array__(
    self, dtype: Any = None, copy: bool | None = None
  ) -> np.ndarray:
    return np.array(self[:], dtype, copy=copy)

  def __getitem__(self, rows: Any) -> np.ndarray:
    if isinstance(rows, slice):
      start, stop, step = rows.indices(len(self))
      if step == 1:
        return self._slice(start, max(start, stop))
      return self._take(np.arange(start, stop, step))
    return self._take(_row_numbers(rows, len(self)))

  def _slice(self, start: int, stop: int) -> np.ndarray:
    """Returns rows that follow each other; a view where that is possible."""
    return self._take(np.arange(start, stop))

  def _take(self, numbers: Int[np.ndarray, "*N"]) -> np.ndarray:
    """Returns the rows of these numbers, each from 0 to P - 1."""
    raise NotImplementedError


class JoinedRows(Rows):
  """Arrays [n_i, R] of one type, one below the other."""

  def __init__(self, blocks: Sequence[Any]):
    self._blocks = list(blocks)
    # Number of the first row of each block, and of all rows.
    self._starts = np.cumsum([0, *(len(b) for b in self._blocks)])
    super().__init__(
      (int(self._starts[-1]), self._blocks[0].shape[1]),
      sum(block.nbytes for block in self._blocks),
      self._blocks[0].dtype,
    )

  def _slice(self, start: int, stop: int) -> np.ndarray:
    found = [
      block[max(start - first, 0) : max(stop - first, 0)]
      for first, block in zip(self._starts, self._blocks, strict=False)
      if first < stop and start < first + len(block)
    ]
    if len(found) == 1:
      return found[0]
    return np.concatenate([self._blocks[0][:0], *found])

  def _take(self, numbers: Int[np.ndarray, "*N"]) -> np.ndarray:
    flat = numbers.reshape(-1)
    found = np.empty((len(flat), self.shape[1]), self.dtype)
    owner = np.searchsorted(self._starts, flat, side="right") - 1
    for i in np.unique(owner):
      mine = owner == i
      found[mine] = self._blocks[i][flat[mine] - self._starts[i]]
    return found.reshape(*numbers.shape, self.shape[1])


class SelectedRows(Rows):
  """Some rows of an array, or of other `Rows`, renumbered from 0 on."""

  def __init__(
    self,
    rows: Any,
    num_rows: int,
    select: Callable[[np.ndarray], np.ndarray],
  ):
    """Takes the rows, how many are selected, and numbers -> their rows."""
    self._rows, self._select = rows, select
    super().__init__((num_rows, rows.shape[1]), rows.nbytes, rows.dtype)

  def _take(self, numbers: Int[np.ndarray, "*N"]) -> np.ndarray:
    return self._rows[self._select(numbers)]


class StoredEmbeddings(Rows):
  """Embeddings in files, which are read as float32.

  The rows of float32 files are not copied for a slice.
  """

  def __init__(
    self,
    stored: np.ndarray,
    scales: np.ndarray | None = None,
    directory: epath.PathLike = "",
    part: tuple[int, int] | None = None,
  ):
    """Keeps what was stored.

    Args:
      stored: the numbers, as `pack` returns them.
      scales: of int8.
      directory: whose files they are, or in whose files; "": in none.
      part: first and last + 1 of the rows of these files; None: all.
    """
    self._stored, self._scales = stored, scales
    self.directory = directory
    self.rows = part
    size = sum(array.nbytes for array in self.arrays.values())
    super().__init__(stored.shape, size)

  def part(self, start: int, stop: int) -> "StoredEmbeddings":
    """Returns rows of these embeddings, in the same files."""
    first = self.rows[0] if self.rows else 0
    return StoredEmbeddings(
      self._stored[start:stop],
      None if self._scales is None else self._scales[start:stop],
      self.directory,
      (first + start, first + stop),
    )

  def _slice(self, start: int, stop: int) -> np.ndarray:
    return self._read(slice(start, stop))

  def _take(self, numbers: Int[np.ndarray, "*N"]) -> np.ndarray:
    return self._read(numbers)

  def _read(self, rows: Any) -> np.ndarray:
    scales = self._scales
    return unpack(
      self._stored[rows], None if scales is None else np.asarray(scales[rows])
    )

  @property
  def arrays(self) -> dict[str, np.ndarray]:
    """What the files hold, by their names."""
    arrays = {EMBEDDINGS: self._stored}
    return arrays if self._scales is None else arrays | {SCALES: self._scales}


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


def open_embeddings(directory: epath.PathLike) -> StoredEmbeddings:
  """Returns the embeddings in a directory; they stay on its disk until used.

  Those of a bucket are read into memory.

  Raises:
    ValueError: the files are not those of embeddings.
  """
  directory = epath.Path(directory)
  if (directory / PART).exists():
    return _open_part(directory)

  def load(name: str) -> np.ndarray:
    return read_array(directory / name, "Build it again, or copy it again.")

  stored = load(EMBEDDINGS)
  scales = load(SCALES) if stored.dtype == np.int8 else None
  fits = stored.ndim == 2 and stored.dtype in list(_DTYPES.values())
  if fits and scales is not None:
    fits = scales.shape == stored.shape[:1] and scales.dtype == np.float32
  if not fits:
    raise ValueError(
      f"{directory / EMBEDDINGS} has shape {stored.shape} and dtype"
      f" {stored.dtype}; expected (passages, embedding size) of"
      f" {', '.join(np.dtype(d).name for d in _DTYPES.values())}, with a scale"
      " a passage for int8. Build it again."
    )
  return StoredEmbeddings(stored, scales, directory)


def _open_part(directory: epath.Path) -> StoredEmbeddings:
  """Returns the rows that a shard names of the files two folders above."""
  text = (directory / PART).read_text()
  above = open_embeddings(directory.parent.parent)
  try:
    start, stop = json.loads(text)["rows"]
    fits = 0 <= start < stop <= len(above)
  except (KeyError, TypeError, ValueError):
    start, stop, fits = 0, 0, False
  if not fits:
    raise ValueError(
      f"{directory / PART} says {text!r}; expected the first and last + 1 of"
      f" the {len(above)} rows in {directory.parent.parent}. Build it again."
    )
  return above.part(start, stop)


def save_embeddings(
  directory: epath.Path, embeddings: Float[Any, "P R"]
) -> None:
  """Writes embeddings to a directory: of files as they are stored, or float32.

  Who reads the files that were there before goes on reading them. Embeddings
  that are in these files already stay as they are, and of a part of the files
  two folders above only its rows are named.
  """
  arrays: dict[str, Any] = {EMBEDDINGS: embeddings}
  if isinstance(embeddings, StoredEmbeddings):
    if embeddings.rows:
      if is_in(embeddings, directory.parent.parent):
        text = json.dumps({"rows": embeddings.rows})
        artifacts.write_atomically(directory / PART, text)
        return
    elif is_in(embeddings, directory):
      return
    arrays = embeddings.arrays
  for name, array in arrays.items():
    file = directory / name
    local = artifacts.is_local(file)
    temp = artifacts.temp_path(file) if local else file
    with temp.open("wb") as f:
      np.save(f, array, allow_pickle=False)
    if local:
      os.replace(temp, file)
  (directory / PART).unlink(missing_ok=True)


def is_in(embeddings: Any, directory: epath.PathLike) -> bool:
  """Returns whether embeddings lie in files of a directory on a disk."""
  if not isinstance(embeddings, StoredEmbeddings):
    return False
  own = embeddings.directory
  if not os.fspath(own) or not artifacts.is_local(own):
    return False
  return os.path.realpath(own) == os.path.realpath(directory)


class EmbeddingFile:
  """Files of a fixed number of embeddings, written block by block.

  The disk is asked for all of it at once: a full one is noticed before hours
  of work, and not as a killed process.
  """

  def __init__(
    self,
    directory: epath.PathLike,
    num_passages: int,
    embedding_dim: int,
    storage: str,
  ):
    """Makes the files, or opens what was made of this shape and storage.

    Raises:
      OSError: the disk has no room.
    """
    directory = epath.Path(directory)
    dtype = _DTYPES[check_storage(storage)]
    self.storage = storage
    self._stored = _make(
      directory / EMBEDDINGS, (num_passages, embedding_dim), dtype
    )
    self._scales = None
    if storage == "int8":
      self._scales = _make(directory / SCALES, (num_passages,), np.float32)

  def write(self, start: int, embeddings: Float[np.ndarray, "N R"]) -> None:
    """Writes rows from `start` on; they are on the disk on return."""
    stored, scales = pack(embeddings, self.storage)
    self._stored[start : start + len(stored)] = stored
    self._stored.flush()
    if self._scales is not None:
      self._scales[start : start + len(stored)] = scales
      self._scales.flush()

  def digest(self, start: int, stop: int) -> str:
    """Returns hex digits that change with any byte of these rows."""
    arrays = {EMBEDDINGS: np.asarray(self._stored[start:stop])}
    if self._scales is not None:
      arrays[SCALES] = np.asarray(self._scales[start:stop])
    return artifacts.fingerprint_arrays(arrays)


def _make(
  file: epath.Path, shape: tuple[int, ...], dtype: type
) -> np.memmap[Any, Any]:
  """Returns the file's array, to be written."""
  if file.exists():
    found = np.lib.format.open_memmap(file, mode="r+")
    if found.shape == shape and found.dtype == dtype:
      return found
    del found
  temp = artifacts.temp_path(file)
  try:
    made = np.lib.format.open_memmap(temp, "w+", dtype=dtype, shape=shape)
    size = temp.stat().length
    del made
    with open(temp, "r+b") as f:
      os.posix_fallocate(f.fileno(), 0, size)
      os.fsync(f.fileno())
    disk.rename(temp, file)
  except OSError as error:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
      need = int(np.prod(shape)) * np.dtype(dtype).itemsize
      raise UnwritableError(
        error.errno,
        f"The disk of {file.parent} has no room for the embeddings: expected"
        f" {need:,} bytes for {shape[0]:,} passages. Free some, choose another"
        " output, or store them smaller (bfloat16 or int8)",
      ) from error
    raise
  finally:
    temp.unlink(missing_ok=True)
  return np.lib.format.open_memmap(file, mode="r+")
