"""What is left of a store and what came, against a list of passages."""

import numpy as np
import pytest

from rag_jax.corpus.passages import Passage
from rag_jax.corpus.passages import PassageList
from rag_jax.corpus.store import write_store
from rag_jax.search.updated_passages import Gaps
from rag_jax.search.updated_passages import UpdatedPassages


def passages(start, stop):
  return [
    Passage(f"p{i}", f"title {i}", f"text {i}") for i in range(start, stop)
  ]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
  return write_store(tmp_path_factory.mktemp("base"), passages(0, 9))


@pytest.fixture(scope="module")
def added(tmp_path_factory):
  return write_store(tmp_path_factory.mktemp("added"), passages(9, 13))


@pytest.mark.parametrize("gone", [[], [0], [8], [0, 1, 2], [2, 5, 6], range(9)])
@pytest.mark.parametrize("more", [True, False])
def test_it_reads_like_passages_that_were_written_so(base, added, gone, more):
  expected = [p for i, p in enumerate(base) if i not in gone]
  expected += passages(9, 13) if more else []
  updated = UpdatedPassages(base, np.array(gone, int), added if more else None)
  assert len(updated) == len(expected)
  assert list(updated) == expected
  assert updated[1:-1] == tuple(expected[1:-1])
  order = np.random.default_rng(0).permutation(len(expected))
  assert updated.get(order) == tuple(expected[i] for i in order)
  for i in range(len(expected)):
    assert updated[i] == expected[i]
    assert updated[i - len(expected)] == expected[i]
  rows = {p.id: i for i, p in enumerate(expected)}
  for id_ in [p.id for p in passages(0, 14)]:
    assert updated.row_of(id_) == rows.get(id_)
  assert updated.fingerprint == PassageList(expected, "").fingerprint


def test_a_row_that_is_not_there_is_an_error(base, added):
  updated = UpdatedPassages(base, np.array([3]), added)
  for row in (12, -13):
    with pytest.raises(IndexError, match=f"no passage {row} .* 0 to 11"):
      updated[row]


def test_numbers_and_rows_belong_to_each_other():
  rng = np.random.default_rng(1)
  for _ in range(20):
    left = rng.random(30) < 0.6
    gaps = Gaps(np.flatnonzero(~left))
    rows = np.flatnonzero(left)
    np.testing.assert_array_equal(gaps.rows(np.arange(len(rows))), rows)
    np.testing.assert_array_equal(gaps.numbers(rows), np.arange(len(rows)))
    assert [gaps.is_gone(i) for i in range(30)] == (~left).tolist()
