"""Rows that are appended make the file that np.save makes of all at once."""

import numpy as np
import pytest

from rag_jax.corpus.npy_files import ArrayRows

ROWS = np.random.default_rng(0).integers(0, 60_000, (10, 3)).astype(np.uint16)


def write(path, rows, **kwargs):
  file = ArrayRows(path, ROWS.shape, np.uint16, **kwargs)
  file.append(rows[:2])
  file.append(rows[2:].astype(np.int32))
  file.flush()
  file.close()


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.bool_, np.uint64])
@pytest.mark.parametrize("shape", [(10, 3), (10,), (0, 3), (0,)])
def test_the_file_is_that_of_np_save(tmp_path, dtype, shape):
  expected = np.resize(ROWS % 2, shape).astype(dtype)
  np.save(tmp_path / "expected.npy", expected)
  file = ArrayRows(tmp_path / "rows.npy", shape, dtype)
  for start in range(0, shape[0], 4):
    file.append(expected[start : start + 4])
  file.close()
  assert (tmp_path / "rows.npy").read_bytes() == (
    tmp_path / "expected.npy"
  ).read_bytes()


@pytest.mark.parametrize("num_done", [0, 1, 9, 10])
def test_rows_are_written_again_from_any_row_on(tmp_path, num_done):
  path = tmp_path / "rows.npy"
  write(path, ROWS[::-1].copy())
  before = np.load(path)[:num_done]
  write(path, ROWS[num_done:], num_done=num_done)
  np.testing.assert_array_equal(
    np.load(path), np.concatenate([before, ROWS[num_done:]])
  )


def test_rows_that_are_not_there_cannot_be_gone_on_from(tmp_path):
  path = tmp_path / "rows.npy"
  write(path, ROWS[:4])
  message = r"does not hold 5 rows of uint16 and shape \(3,\).*Remove it"
  with pytest.raises(ValueError, match=message):
    ArrayRows(path, ROWS.shape, np.uint16, num_done=5)
  # Nor from those of another array.
  with pytest.raises(ValueError, match="does not hold 4 rows of int32"):
    ArrayRows(path, ROWS.shape, np.int32, num_done=4)
