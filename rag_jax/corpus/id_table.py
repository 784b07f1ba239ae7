"""From the id of a passage to its row, without the ids in memory.

In: the ids, one after the other. Out: two files, the sorted 64-bit hashes of
the ids and their rows, which are mapped into memory. Two ids may have the same
hash: whoever asks for a row reads the passage and compares its id.
"""

from collections.abc import Iterator
import hashlib

from etils import epath
from jaxtyping import Int, UInt64
import numpy as np

from rag_jax.artifacts import temp_path
from rag_jax.corpus.array_rows import ArrayRows
from rag_jax.corpus.array_rows import read_array
from rag_jax.corpus.shards import REMEDY

HASHES = "id_hashes.npy"
ROWS = "id_rows.npy"

_BLOCK_ROWS = 1 << 16  # hashes that are written or read at once
_PART_ROWS = 1 << 21  # hashes that are sorted at once, at 50 bytes each


def hash_id(id: str) -> int:
  """Returns 64 bits that depend on the whole id alone."""
  data = id.encode("utf-8", "surrogatepass")
  digest = hashlib.blake2b(data, digest_size=8).digest()
  return int.from_bytes(digest, "little")


class IdTableWriter:
  """Takes ids in the order of their rows, then sorts them on the disk."""

  def __init__(self, directory: epath.Path):
    self._directory = directory
    self._temp = temp_path(directory / HASHES)
    self._file = open(self._temp, "xb")  # noqa: SIM115, closed by `sort`
    self._block: list[int] = []
    self._num_rows = 0

  def add(self, id: str) -> None:
    """Keeps the id of the next row."""
    self._block.append(hash_id(id))
    self._num_rows += 1
    if len(self._block) == _BLOCK_ROWS:
      self._write()

  def _write(self) -> None:
    self._file.write(np.array(self._block, np.uint64).tobytes())
    self._block.clear()

  def close(self) -> None:
    """Removes what is no part of the table."""
    try:
      self._file.close()
    finally:
      self._temp.unlink(missing_ok=True)

  def sort(self) -> Iterator[list[int]]:
    """Writes the table; yields the rows, ascending, that share a hash.

    The hashes are sorted in parts that fit into memory: one part takes those
    between two bounds, which are spread evenly as hashes are.
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
    # Which of equally wide parts of [0, 1) the hash / 2**64 is in.
    mine = ((block >> half) * np.uint64(num_parts)) >> half == part
    found.append(block[mine])
    rows.append(start + np.flatnonzero(mine))
  return np.concatenate(found), np.concatenate(rows)


def _shared(
  hashes: UInt64[np.ndarray, "N"], rows: Int[np.ndarray, "N"]
) -> Iterator[list[int]]:
  """Yields the rows of each hash that there is more than once."""
  begins = np.flatnonzero(np.r_[True, hashes[1:] != hashes[:-1]])
  ends = np.r_[begins[1:], len(hashes)]
  for i in np.flatnonzero(ends - begins > 1):
    yield rows[begins[i] : ends[i]].tolist()


class IdTable:
  """The finished table, mapped into memory."""

  def __init__(self, directory: epath.Path):
    self._hashes = read_array(directory / HASHES, REMEDY)
    self._rows = read_array(directory / ROWS, REMEDY)

  def check(self, num_rows: int) -> None:
    """Raises `ValueError` unless the table is one of `num_rows` passages."""
    rows, hashes = self._rows, self._hashes
    fits = rows.shape == hashes.shape == (num_rows,)
    if (
      not fits
      or (hashes.dtype, rows.dtype) != (np.uint64, np.int64)
      or int(rows.min()) < 0
      or int(rows.max()) >= num_rows
    ):
      raise ValueError(
        f"The table of ids has {hashes.dtype} of shape {hashes.shape} and"
        f" {rows.dtype} of shape {rows.shape}; expected {num_rows} uint64 and"
        f" as many rows below that. {REMEDY}"
      )

  def candidates(self, id: str) -> list[int]:
    """Returns the rows whose id may be `id`, almost always one or none."""
    # As uint64: of a Python int, the whole table would become floats.
    wanted = np.uint64(hash_id(id))
    start = int(np.searchsorted(self._hashes, wanted, "left"))
    stop = int(np.searchsorted(self._hashes, wanted, "right"))
    return self._rows[start:stop].tolist()
