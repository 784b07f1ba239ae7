"""Writes .npy files row by row, and maps them into memory for reading.

In: blocks of rows of an array whose shape is known. Out: the file; its array.
"""

import io
import os
import tokenize
from typing import Any
import zipfile

from etils import epath
import numpy as np

from rag_jax.artifacts import is_local

# NumPy parses the header of a file as Python, and lets these errors through.
_NOT_NPY = (
  ValueError, TypeError, KeyError, AttributeError, OverflowError, MemoryError,
  EOFError, SyntaxError, RecursionError, tokenize.TokenError,
  zipfile.BadZipFile,
)  # fmt: skip


def read_array(path: epath.PathLike, remedy: str) -> np.ndarray:
  """Returns the array of a .npy file; a local file is mapped into memory.

  Args:
    path: an existing file.
    remedy: the last sentence of the message: what to do next.

  Raises:
    ValueError: the file is not an array, or can only be read by running code.
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
      f"{path} is no array that NumPy can read ({error}). Expected a file that"
      f" rag_jax wrote. {remedy}"
    ) from error
  return array


class ArrayRows:
  """Appends rows to a .npy file.

  It writes to the file instead of mapping it into memory: on a full disk, a
  write raises `OSError`, but a mapped page kills the process.
  """

  def __init__(
    self,
    path: epath.PathLike,
    shape: tuple[int, ...],
    dtype: np.dtype[Any] | type[np.generic],
    *,
    num_done: int = 0,
  ):
    """Opens the file after row `num_done`, and drops all later rows.

    Raises:
      ValueError: the file does not hold `num_done` such rows.
    """
    self._row_shape, self._dtype = shape[1:], np.dtype(dtype)
    buffer = io.BytesIO()
    descr = np.lib.format.dtype_to_descr(self._dtype)
    np.lib.format.write_array_header_1_0(
      buffer, {"descr": descr, "fortran_order": False, "shape": shape}
    )
    header = buffer.getvalue()
    if not num_done:
      self._file = open(path, "wb")  # noqa: SIM115, closed by `close`
      self._file.write(header)
      return
    row_bytes = self._dtype.itemsize * int(np.prod(self._row_shape))
    done = len(header) + num_done * row_bytes
    with open(path, "rb") as file:
      start = file.read(len(header))
    if start != header or os.path.getsize(path) < done:
      raise ValueError(
        f"{path} does not hold {num_done} rows of {self._dtype} and shape"
        f" {self._row_shape}, although they were noted as written. Expected the"
        " file as it was left. Remove it and start again."
      )
    self._file = open(path, "r+b")  # noqa: SIM115, closed by `close`
    self._file.truncate(done)
    self._file.seek(done)

  def append(self, rows: np.ndarray) -> None:
    """Writes rows after the last one."""
    assert rows.shape[1:] == self._row_shape, rows.shape
    data = np.ascontiguousarray(rows, self._dtype)
    self._file.write(data.reshape(-1).view(np.uint8).data)

  def flush(self) -> None:
    """Waits until the rows are on the disk."""
    self._file.flush()
    os.fsync(self._file.fileno())

  def close(self) -> None:
    """Closes the file."""
    self._file.close()
