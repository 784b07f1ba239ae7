"""Rows of several arrays against those of their concatenation."""

import numpy as np
import pytest

from rag_jax.retrieval.embeddings import JoinedRows

BLOCKS = [
  np.arange(n * 3, dtype=np.float32).reshape(n, 3) + 100 * n
  for n in (4, 0, 1, 5)
]
WHOLE = np.concatenate(BLOCKS)


@pytest.mark.parametrize(
  "rows",
  [
    0, -1, 9, np.int32(4), slice(None), slice(1, 3), slice(3, 6), slice(2, 2),
    slice(-3, None), slice(9, 1, -2), slice(8, 30), [5, 0, 5, -10],
    np.array([[9, 4], [3, 3], [0, 5]]), np.zeros((0, 2), int),
  ],
)  # fmt: skip
def test_they_are_those_of_the_whole(rows):
  found = JoinedRows(BLOCKS)[rows]
  assert found.dtype == np.float32
  np.testing.assert_array_equal(found, WHOLE[rows])


def test_they_look_like_an_array():
  joined = JoinedRows(BLOCKS)
  assert (len(joined), joined.shape, joined.ndim) == (10, (10, 3), 2)
  assert joined.dtype == np.float32
  np.testing.assert_array_equal(np.asarray(joined), WHOLE)
  np.testing.assert_array_equal(np.array(joined, np.float64), WHOLE)


def test_a_slice_of_one_block_is_not_copied():
  assert np.shares_memory(JoinedRows(BLOCKS)[5:8], BLOCKS[3])


@pytest.mark.parametrize("rows", [10, -11, [0, 10]])
def test_a_row_that_is_not_there_is_named(rows):
  with pytest.raises(IndexError, match=r"Row (10|-11) was .*the 10 rows.*ids"):
    JoinedRows(BLOCKS)[rows]


def test_a_mask_is_refused():
  with pytest.raises(IndexError, match="by bool; expected whole numbers"):
    JoinedRows(BLOCKS)[np.ones(10, bool)]
