"""The recall of an index, against loops over sets, and its interval."""

import numpy as np
import pytest

from rag_jax.retrieval.recall import index_recall_at_k
from rag_jax.retrieval.recall import mean_recall


def test_index_recall_is_the_overlap_of_two_sets():
  rng = np.random.default_rng(0)
  ids = np.stack([rng.permutation(12)[:8] for _ in range(150)])
  exact = np.stack([rng.permutation(12)[:6] for _ in range(150)])
  for k in (1, 3, 6):
    expected = [
      len(set(a[:k].tolist()) & set(b[:k].tolist())) / k
      for a, b in zip(ids, exact, strict=True)
    ]
    np.testing.assert_allclose(index_recall_at_k(ids, exact, k), expected)


def test_order_does_not_matter_to_index_recall():
  ids = np.array([[3, 1, 2]])
  assert index_recall_at_k(ids, ids[:, ::-1], 3) == 1.0


def test_places_where_an_index_found_nothing_are_misses():
  ids = np.array([[4, -1, -1, -1]])
  exact = np.array([[4, 5, 6, 7]])
  assert index_recall_at_k(ids, exact, 4) == 0.25


def test_a_passage_found_twice_is_one_hit():
  recall = index_recall_at_k(np.array([[4, 4]]), np.array([[4, 5]]), 2)
  assert recall == 0.5


def test_k_below_one_is_refused():
  ids = np.zeros((1, 2), np.int32)
  with pytest.raises(ValueError, match="k=0 passages; expected at least 1"):
    index_recall_at_k(ids, ids, 0)


def test_k_above_what_was_retrieved_is_refused():
  wide, narrow = np.zeros((1, 5), np.int32), np.zeros((1, 2), np.int32)
  with pytest.raises(
    ValueError,
    match=r"k=3 is more than was retrieved: ids has 5 .* exact_ids 2",
  ):
    index_recall_at_k(wide, narrow, 3)
  with pytest.raises(ValueError, match="ids has 2 per question, exact_ids 5"):
    index_recall_at_k(narrow, wide, 3)


def test_an_exact_search_that_found_too_few_is_refused():
  ids = np.array([[0, 1]])
  with pytest.raises(ValueError, match=r"below 0 among the first k=2.*Lower k"):
    index_recall_at_k(ids, np.array([[0, -1]]), 2)
  assert index_recall_at_k(ids, np.array([[0, -1]]), 1) == 1.0


def test_the_interval_is_that_of_resampling_the_questions():
  recalls = np.random.default_rng(0).integers(7, 11, size=80) / 10
  found = mean_recall(recalls, 10)
  rng = np.random.default_rng(1)
  means = rng.choice(recalls, size=(20_000, 80)).mean(axis=1)
  low, high = np.quantile(means, (0.025, 0.975))
  assert (found.k, found.mean) == (10, pytest.approx(recalls.mean()))
  assert (found.low, found.high) == pytest.approx((low, high), abs=0.005)
  assert mean_recall(recalls, 10) == found  # seeded


def test_the_interval_holds_the_truth_about_95_times_of_100():
  rng = np.random.default_rng(0)
  held = 0
  for _ in range(300):
    found = mean_recall(rng.binomial(10, 0.9, size=100) / 10, 10)
    held += found.low <= 0.9 <= found.high
  assert 0.9 <= held / 300 <= 0.99


def test_equal_recalls_are_less_sure_of_few_questions_than_of_many():
  few, many = (mean_recall(np.ones(n), 5) for n in (20, 1000))
  assert few.mean == few.high == many.mean == many.high == 1.0
  # The share of good questions under which 20 of 20 come 25 times of 1000.
  assert few.low**20 == pytest.approx(0.025)
  assert 0.99 < many.low < 1.0
  none = mean_recall(np.zeros(20), 5)
  assert (none.mean, none.low) == (0.0, 0.0)
  assert none.high == pytest.approx(1 - few.low)
  half = mean_recall(np.full(20, 0.5), 2)
  assert 0.0 < half.low < 0.5 < half.high < 1.0
