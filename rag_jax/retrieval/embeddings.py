"""Passage embeddings in files: float32, bfloat16, or int8 with a scale a row.

In: embeddings, block by block, in any order. Out: an array of them that stays
on the disk and reads as float32.

bfloat16 keeps 8 bits of each number, int8 one of 255 steps between minus and
plus the largest number of its row. What they cost in recall is measured with
the index, not assumed.
"""

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


class StoredEmbeddings:
  """Embeddings [P, R] in files; what is asked for is read, as float32.

  Indexed like an array by a slice or by whole numbers of any shape; the rows
  of float32 files are not copied for a slice.
  """

  dtype = np.dtype(np.float32)
  ndim = 2

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
    self._stored = stored
    self.directory = directory
    self.rows = part
    self._scales = scales
    self.shape = stored.shape
    names = {np.dtype(v): k for k, v in _DTYPES.items()}
    self.storage = names[stored.dtype]

  def __len__(self) -> int:
    return self.shape[0]

  def part(self, start: int, stop: int) -> "StoredEmbeddings":
    """Returns rows of these embeddings, in the same files."""
    first = self.rows[0] if self.rows else 0
    return StoredEmbeddings(
      self._stored[start:stop],
      None if self._scales is None else self._scales[start:stop],
      self.directory,
      (first + start, first + stop),
    )

  def __getitem__(
    self, rows: slice | int | Int[np.ndarray, "*N"]
  ) -> Float[np.ndarray, "*N R"]:
    scales = self._scales
    if scales is not None:
      scales = np.asarray(scales[rows])
    return unpack(self._stored[rows], scales)

  def __array__(self, dtype: Any = None, copy: bool | None = None):
    """Returns all of them, in memory."""
    return np.array(self[:], dtype or np.float32, copy=copy)

  @property
  def arrays(self) -> dict[str, np.ndarray]:
    """What the files hold, by their names."""
    arrays = {EMBEDDINGS: self._stored}
    return arrays if self._scales is None else arrays | {SCALES: self._scales}

  @property
  def nbytes(self) -> int:
    """Bytes of the numbers in the files."""
    return sum(array.nbytes for array in self.arrays.values())


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
    file = directory / name
    try:
      if artifacts.is_local(file):
        return np.load(file, mmap_mode="r", allow_pickle=False)
      with file.open("rb") as f:
        return np.load(f, allow_pickle=False)
    except ValueError as error:
      raise ValueError(
        f"{file} is no array that NumPy can read ({error}). Expected what"
        " rag_jax wrote. Build it again, or copy it again."
      ) from error

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
