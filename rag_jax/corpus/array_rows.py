"""A .npy file that is written row by row, and mapped into memory to be read.

In: blocks of rows of an array whose length is known. Out: the file, and what it
holds.
"""

import io
import os
import tokenize
from typing import Any
import zipfile

from etils import epath
import numpy as np

from rag_jax.artifacts import is_local

# NumPy reads the header of a file as Python, and lets the errors of that pass.
_NOT_NPY = (
  ValueError, TypeError, KeyError, AttributeError, OverflowError, MemoryError,
  EOFError, SyntaxError, RecursionError, tokenize.TokenError,
  zipfile.BadZipFile,
)  # fmt: skip


def read_array(path: epath.PathLike, remedy: str) -> np.ndarray:
  """Returns the array of a .npy file; a local one is mapped, not read.

  Args:
    path: an existing file.
    remedy: a sentence for the end of the message: what to do next.

  Raises:
    ValueError: it is no array that can be read without running code.
  """
  path = epath.Path(path)
  try:
    if is_local(path):
      array: Any = np.load(path, mmap_mode="r", allow_pickle=False)
    else:
      with path.open("rb") as f:
        array = np.load(f, allow_pickle=False)
    if not isinstance(array, np.ndarray):
      raise ValueError("it is an archive of several")
  except _NOT_NPY as error:
    raise ValueError(
      f"{path} is no array that NumPy can read ({error}). Expected what rag_jax"
      f" wrote. {remedy}"
    ) from error
  return array


class ArrayRows:
  """Appends rows to a .npy file.

  By writing, not by mapping the file into memory: where the disk is full, a
  write raises `OSError`, and a page of a mapped file kills the process.
  """

  def __init__(
    self,
    path: epath.PathLike,
    shape: tuple[int, ...],
    dtype: np.dtype[Any] | type[np.generic],
    *,
    num_done: int = 0,
  ):
    """Opens the file at row `num_done`, and drops what lies behind it.

    Raises:
      ValueError: `num_done` rows were not written before.
    """
    self._row_shape, self._dtype = shape[1:], np.dtype(dtype)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
      header,
      {
        "descr": np.lib.format.dtype_to_descr(self._dtype),
        "fortran_order": False,
        "shape": shape,
      },
    )
    row_bytes = self._dtype.itemsize * int(np.prod(self._row_shape))
    done = len(header.getvalue()) + num_done * row_bytes
    if not num_done:
      self._file = open(path, "wb")  # noqa: SIM115, closed by `close`
      self._file.write(header.getvalue())
      return
    with open(path, "rb") as file:
      start = file.read(len(header.getvalue()))
    if start != header.getvalue() or os.path.getsize(path) < done:
      raise ValueError(
        f"{path} does not hold {num_done} rows of {self._dtype} and shape"
        f" {self._row_shape}, though they were said to be written. Expected"
        " the file as it was left. Remove it and begin again."
      )
    self._file = open(path, "r+b")  # noqa: SIM115, closed by `close`
    self._file.truncate(done)
    self._file.seek(done)

  def append(self, rows: np.ndarray) -> None:
    """Writes rows behind the last."""
    assert rows.shape[1:] == self._row_shape, rows.shape
    data = np.ascontiguousarray(rows, self._dtype)
    self._file.write(data.reshape(-1).view(np.uint8).data)

  def flush(self) -> None:
    """Waits until the disk has the rows."""
    self._file.flush()
    os.fsync(self._file.fileno())

  def close(self) -> None:
    """Closes the file."""
    self._file.close()
