"""Intervals of shares by binomial sums, of means by resamples one by one."""

import math

import numpy as np
import pytest

from rag_jax.retrieval.intervals import mean_interval
from rag_jax.retrieval.intervals import share_interval


def naive(values, resamples=4000):
  rng = np.random.default_rng(1)
  means = [
    np.mean([values[i] for i in rng.integers(len(values), size=len(values))])
    for _ in range(resamples)
  ]
  return np.quantile(means, (0.025, 0.975))


@pytest.mark.parametrize("kind", ["ranks", "all different"])
def test_an_interval_is_that_of_resamples_one_by_one(kind):
  rng = np.random.default_rng(0)
  values = {
    "ranks": 1 / rng.integers(1, 6, size=60),
    "all different": rng.random(60),
  }[kind]
  low, high = mean_interval(values)
  expected = naive(values)
  spread = expected[1] - expected[0]
  np.testing.assert_allclose([low, high], expected, atol=0.08 * spread)
  assert low < np.mean(values) < high


def tail(p, right, total):
  """The chance of `right` or more of `total` at the share `p`."""
  return sum(
    math.comb(total, i) * p**i * (1 - p) ** (total - i)
    for i in range(right, total + 1)
  )


@pytest.mark.parametrize("total", [1, 8, 70, 300])
def test_of_a_share_both_ends_leave_out_25_of_1000(total):
  for right in {0, 1, total // 2, total - 1, total}:
    low, high = share_interval(right, total)
    assert 0 <= low <= right / total <= high <= 1
    assert low < high
    if right:
      assert tail(low, right, total) == pytest.approx(0.025)
    if right < total:
      assert 1 - tail(high, right + 1, total) == pytest.approx(0.025)
    hits = np.arange(total) < right
    assert mean_interval(hits) == (low, high)


def test_none_right_of_eight_is_no_certainty():
  low, high = mean_interval(np.zeros(8))
  assert (low, round(high, 3)) == (0.0, 0.369)
  low, high = mean_interval(np.ones(8))
  assert (round(low, 3), high) == (0.631, 1.0)


def test_the_order_of_the_questions_does_not_matter():
  values = np.random.default_rng(0).random(40)
  assert mean_interval(values) == mean_interval(values[::-1])


def test_equal_numbers_are_less_sure_of_few_questions_than_of_many():
  few, many = (mean_interval(np.full(n, 0.25)) for n in (7, 700))
  assert few[0] < many[0] < 0.25 < many[1] < few[1]


def test_a_mean_of_nothing_is_refused():
  with pytest.raises(ValueError, match=r"for 0 questions.*at least one quest"):
    mean_interval(np.zeros(0))


@pytest.mark.parametrize("value", [np.nan, np.inf, 1.5])
def test_what_was_not_measured_is_refused_by_place(value):
  with pytest.raises(ValueError, match=r"3 questions, of which 1 .*at \[1\]\)"):
    mean_interval(np.array([0.0, value, 1.0]))
