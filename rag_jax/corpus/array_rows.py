"""A .npy file that is written row by row, and mapped into memory to be read.

In: blocks of rows of an array whose length is known. Out: the file.
"""

import io
import os
from typing import Any

from etils import epath
import numpy as np


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
