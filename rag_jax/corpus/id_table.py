"""Finds the row of a passage by its id, without holding the ids in memory.

In: the ids, one after the other. Out: two files that are mapped into memory,
the sorted 64-bit hashes of the ids and their rows. Two ids may have the same
hash, so the caller must read the passage and compare its id.
"""

from collections.abc import Iterator
import hashlib

from etils import epath
from jaxtyping import Int, UInt64
import numpy as np

from rag_jax.artifacts import temp_path
from rag_jax.corpus.npy_files import ArrayRows
from rag_jax.corpus.npy_files import read_array

HASHES = "id_hashes.npy"
ROWS = "id_rows.npy"

_BLOCK_ROWS = 1 << 16  # hashes written or read at a time
_PART_ROWS = 1 << 21  # hashes sorted at a time, with 50 bytes of memory each


def hash_id(id: str) -> int:
  """Returns a 64-bit hash of an id, the same in every process."""
  data = id.encode("utf-8", "surrogatepass")
  digest = hashlib.blake2b(data, digest_size=8).digest()
  return int.from_bytes(digest, "little")


class IdTableWriter:
  """Collects the ids in the order of the rows, then sorts them on the disk."""

  def __init__(self, directory: epath.Path):
    self._directory = directory
    self._temp = temp_path(directory / HASHES)
    self._file = open(self._temp, "xb")  # noqa: SIM115, closed by `sort`
    self._block: list[int] = []
    self._num_rows = 0

  def add(self, id: str) -> None:
    """Adds the id of the next row."""
    self._block.append(hash_id(id))
    self._num_rows += 1
    if len(self._block) == _BLOCK_ROWS:
      self._write()

  def _write(self) -> None:
    self._file.write(np.array(self._block, np.uint64).tobytes())
    self._block.clear()

  def close(self) -> None:
    """Removes the temporary file."""
    try:
      self._file.close()
    finally:
      self._temp.unlink(missing_ok=True)

  def sort(self) -> Iterator[list[int]]:
    """Writes the table; yields the rows of each hash that several ids share.

    The hashes are sorted in parts that fit into memory. Each part has the
    hashes of one of equally wide ranges, which hold about equally many.
    """
    self._write()
    self._file.close()
    hashes = np.memmap(self._temp, np.uint64, "r", shape=(self._num_rows,))
    hash_file = ArrayRows(self._directory / HASHES, hashes.shape, np.uint64)
    row_file = ArrayRows(self._directory / ROWS, hashes.shape, np.int64)
    try:
      num_parts = -(-self._num_rows // _PART_ROWS)
      for part in range(num_parts):
        some, rows = _select(hashes, part, num_parts)
        order = np.argsort(some, kind="stable")
        some, rows = some[order], rows[order]
        hash_file.append(some)
        row_file.append(rows)
        yield from _shared(some, rows)
    finally:
      hash_file.close()
      row_file.close()


def _select(
  hashes: UInt64[np.ndarray, "P"], part: int, num_parts: int
) -> tuple[UInt64[np.ndarray, "N"], Int[np.ndarray, "N"]]:
  """Returns the hashes of a part, and their rows, in the order of the rows."""
  found, rows = [], []
  half = np.uint64(32)
  for start in range(0, len(hashes), _BLOCK_ROWS):
    block = np.array(hashes[start : start + _BLOCK_ROWS])
    # The upper half of a hash tells which of the ranges it is in.
    mine = ((block >> half) * np.uint64(num_parts)) >> half == part
    found.append(block[mine])
    rows.append(start + np.flatnonzero(mine))
  return np.concatenate(found), np.concatenate(rows)


def _shared(
  hashes: UInt64[np.ndarray, "N"], rows: Int[np.ndarray, "N"]
) -> Iterator[list[int]]:
  """Yields the rows, ascending, of each hash that occurs more than once."""
  begins = np.flatnonzero(np.r_[True, hashes[1:] != hashes[:-1]])
  ends = np.r_[begins[1:], len(hashes)]
  for i in np.flatnonzero(ends - begins > 1):
    yield rows[begins[i] : ends[i]].tolist()


class IdTable:
  """The finished table, mapped into memory."""

  def __init__(self, directory: epath.Path, remedy: str):
    """Opens the table; `remedy` is the last sentence of error messages."""
    self._hashes = read_array(directory / HASHES, remedy)
    self._rows = read_array(directory / ROWS, remedy)
    self._remedy = remedy

  def check(self, num_rows: int) -> None:
    """Raises `ValueError` unless the table fits `num_rows` passages."""
    rows, hashes = self._rows, self._hashes
    if (
      not rows.shape == hashes.shape == (num_rows,)
      or (hashes.dtype, rows.dtype) != (np.uint64, np.int64)
      or int(rows.min()) < 0
      or int(rows.max()) >= num_rows
    ):
      raise ValueError(
        f"The table of ids has {hashes.dtype} of shape {hashes.shape} and"
        f" {rows.dtype} of shape {rows.shape}; expected {num_rows} hashes"
        f" (uint64) and {num_rows} rows (int64, below {num_rows})."
        f" {self._remedy}"
      )

  def candidates(self, id: str) -> list[int]:
    """Returns the rows whose id may be `id`; almost always one or none."""
    # uint64, since a Python int would turn the whole table into floats.
    wanted = np.uint64(hash_id(id))
    start = int(np.searchsorted(self._hashes, wanted, "left"))
    stop = int(np.searchsorted(self._hashes, wanted, "right"))
    return self._rows[start:stop].tolist()
