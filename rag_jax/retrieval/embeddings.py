"""Passage embeddings as `Rows`, which need not fit in memory.

In: embeddings, block by block in any order, or arrays. Out: files of float32,
bfloat16, or int8 with a scale per row; and `Rows`, which read only the rows
that are asked for, in float32: from files, from several arrays, or from a
selection of other rows.

bfloat16 keeps 8 bits of each number; int8 keeps one of 255 steps between minus
and plus the largest number of the row. Their effect on recall is measured with
each index.
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

STORAGE = ("float32", "bfloat16", "int8")  # types of the numbers in the file
EMBEDDINGS = "embeddings.npy"
SCALES = "scales.npy"  # only with int8, [P] float32
# Replaces both files in a shard of an index. It names the rows of the shard in
# the files two directories above, which hold those of all shards.
PART = "part.json"

# .npy files have no bfloat16: its bits are stored as whole numbers.
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
  """Returns the size of the files in bytes, without their headers."""
  itemsize = np.dtype(_DTYPES[check_storage(storage)]).itemsize
  scales = 4 * num_passages if storage == "int8" else 0
  return num_passages * embedding_dim * itemsize + scales


def pack(
  embeddings: Float[np.ndarray, "N R"], storage: str
) -> tuple[np.ndarray, Float[np.ndarray, "N"] | None]:
  """Returns the numbers in the form that is stored, and the scales of int8."""
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
  """Embeddings [P, R] that are only read where they are indexed.

  They are indexed like an array: by a slice, or by integers of any shape.
  `np.asarray` reads all of them into memory.

  Attributes:
    shape: [P, R].
    nbytes: the size of what is stored.
    dtype: the type of what is read.
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
    """Returns consecutive rows; a view if possible."""
    return self._take(np.arange(start, stop))

  def _take(self, numbers: Int[np.ndarray, "*N"]) -> np.ndarray:
    """Returns the rows with these numbers, each from 0 to P - 1."""
    raise NotImplementedError


class JoinedRows(Rows):
  """The concatenation of arrays [n_i, R] of one type."""

  def __init__(self, blocks: Sequence[Any]):
    self._blocks = list(blocks)
    # The number of the first row of each block, and the number of rows.
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
  """Some rows of an array, or of other `Rows`, renumbered from 0."""

  def __init__(
    self,
    rows: Any,
    num_rows: int,
    select: Callable[[np.ndarray], np.ndarray],
  ):
    """Takes the rows, the size of the selection, and numbers -> rows of it."""
    self._rows, self._select = rows, select
    super().__init__((num_rows, rows.shape[1]), rows.nbytes, rows.dtype)

  def _take(self, numbers: Int[np.ndarray, "*N"]) -> np.ndarray:
    return self._rows[self._select(numbers)]


class StoredEmbeddings(Rows):
  """Embeddings in files, read as float32.

  A slice of a float32 file is not copied.
  """

  def __init__(
    self,
    stored: np.ndarray,
    scales: np.ndarray | None = None,
    directory: epath.PathLike = "",
    part: tuple[int, int] | None = None,
  ):
    """Takes what was stored.

    Args:
      stored: the numbers that `pack` returned.
      scales: the scales of int8.
      directory: the directory of the files; "" if there are no files.
      part: (start, stop) if they are some rows of the files; None for all.
    """
    self._stored, self._scales = stored, scales
    self.directory = directory
    self.rows = part
    size = sum(array.nbytes for array in self.arrays.values())
    super().__init__(stored.shape, size)

  def part(self, start: int, stop: int) -> "StoredEmbeddings":
    """Returns the rows from `start` to `stop`, in the same files."""
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
    """The content of the files, by file name."""
    arrays = {EMBEDDINGS: self._stored}
    return arrays if self._scales is None else arrays | {SCALES: self._scales}


def _row_numbers(rows: Any, num_rows: int) -> np.ndarray:
  """Returns row numbers, with those below 0 counted from the end.

  Raises:
    IndexError: there is no such row, or they are not whole numbers.
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
      f" for; expected one of the {num_rows} rows. Check that the ids belong to"
      " this index."
    )
  return np.where(rows < 0, rows + num_rows, rows)


def open_embeddings(directory: epath.PathLike) -> StoredEmbeddings:
  """Returns the embeddings in a directory.

  They stay on the disk until used; those in a bucket are read into memory.

  Raises:
    ValueError: the files hold no embeddings.
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
      f" {', '.join(np.dtype(d).name for d in _DTYPES.values())}, with one"
      " scale per passage for int8. Build it again."
    )
  return StoredEmbeddings(stored, scales, directory)


def _open_part(directory: epath.Path) -> StoredEmbeddings:
  """Returns the rows of a shard, from the files two directories above."""
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
  """Writes embeddings to a directory, as they are stored or in float32.

  A process that has the old files open can go on reading them. Embeddings that
  are these files are not written again. For those in the files two directories
  above, only the row numbers are written.
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
    save_array(directory / name, array)
  (directory / PART).unlink(missing_ok=True)


def save_array(file: epath.Path, array: Any) -> None:
  """Writes a .npy file; a process that has the old one open can read on."""
  local = artifacts.is_local(file)
  temp = artifacts.temp_path(file) if local else file
  with temp.open("wb") as f:
    np.save(f, array, allow_pickle=False)
  if local:
    os.replace(temp, file)


def is_in(embeddings: Any, directory: epath.PathLike) -> bool:
  """Returns whether embeddings are read from files in this local directory."""
  if not isinstance(embeddings, StoredEmbeddings):
    return False
  own = embeddings.directory
  if not os.fspath(own) or not artifacts.is_local(own):
    return False
  return os.path.realpath(own) == os.path.realpath(directory)


class EmbeddingFile:
  """Files of a fixed number of embeddings, written block by block.

  All disk space is reserved at the start. So a full disk is an error before
  hours of work, and not a killed process later.
  """

  def __init__(
    self,
    directory: epath.PathLike,
    num_passages: int,
    embedding_dim: int,
    storage: str,
  ):
    """Creates the files, or opens files of this shape and storage.

    Raises:
      OSError: the disk is too small.
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
    """Writes rows from `start` on and flushes them to the disk."""
    stored, scales = pack(embeddings, self.storage)
    self._stored[start : start + len(stored)] = stored
    self._stored.flush()
    if self._scales is not None:
      self._scales[start : start + len(stored)] = scales
      self._scales.flush()

  def digest(self, start: int, stop: int) -> str:
    """Returns the digest of these rows, in hexadecimal."""
    arrays = {EMBEDDINGS: np.asarray(self._stored[start:stop])}
    if self._scales is not None:
      arrays[SCALES] = np.asarray(self._scales[start:stop])
    return artifacts.fingerprint_arrays(arrays)


def _make(
  file: epath.Path, shape: tuple[int, ...], dtype: type
) -> np.memmap[Any, Any]:
  """Returns the array of a file, for writing; creates it if needed."""
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
        f" {need:,} bytes for {shape[0]:,} passages. Free some space, choose"
        " another output, or store them smaller (bfloat16 or int8)",
      ) from error
    raise
  finally:
    temp.unlink(missing_ok=True)
  return np.lib.format.open_memmap(file, mode="r+")
