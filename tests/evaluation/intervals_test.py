"""Bootstrap intervals, against resamples that are drawn one by one."""

import numpy as np
import pytest

from rag_jax.evaluation.intervals import bootstrap_interval


def naive(values, resamples=4000):
  rng = np.random.default_rng(1)
  means = [
    np.mean([values[i] for i in rng.integers(len(values), size=len(values))])
    for _ in range(resamples)
  ]
  return np.quantile(means, (0.025, 0.975))


@pytest.mark.parametrize("kind", ["hits", "ranks", "all different"])
def test_an_interval_is_that_of_resamples_one_by_one(kind):
  rng = np.random.default_rng(0)
  values = {
    "hits": rng.random(60) < 0.7,
    "ranks": 1 / rng.integers(1, 6, size=60),
    "all different": rng.random(60),
  }[kind]
  low, high = bootstrap_interval(values)
  expected = naive(values)
  spread = expected[1] - expected[0]
  np.testing.assert_allclose([low, high], expected, atol=0.08 * spread)
  assert low < np.mean(values) < high


def test_of_hits_the_draws_are_one_binomial_number():
  hits = np.arange(50) < 31
  means = np.random.default_rng(0).binomial(50, hits.mean(), size=1000) / 50
  assert bootstrap_interval(hits) == tuple(np.quantile(means, (0.025, 0.975)))


def test_the_order_of_the_questions_does_not_matter():
  values = np.random.default_rng(0).random(40)
  assert bootstrap_interval(values) == bootstrap_interval(values[::-1])


@pytest.mark.parametrize("value", [0.0, 0.25, 1.0])
def test_where_all_are_equal_there_is_nothing_to_draw(value):
  assert bootstrap_interval(np.full(7, value)) == (value, value)


def test_a_mean_of_nothing_is_refused():
  with pytest.raises(ValueError, match=r"for 0 questions.*at least one quest"):
    bootstrap_interval(np.zeros(0))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_was_not_measured_is_refused_by_place(value):
  with pytest.raises(ValueError, match=r"3 questions, of which 1 .*at \[1\]\)"):
    bootstrap_interval(np.array([0.0, value, 1.0]))
