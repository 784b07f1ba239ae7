"""Confidence intervals of means over questions.

In: one number from 0 to 1 per question. Out: the 95% interval of their mean.
"""

from jaxtyping import Bool, Float
import numpy as np
from scipy import special

_RESAMPLES = 1000
_SEED = 0  # for resampling: the same numbers give the same interval
_ROUNDING = 1e-9  # how far rounding may take a quotient such as nDCG beyond 1
_OUTSIDE = 0.025  # probability outside the 95% interval, at either end


def mean_interval(
  values: Float[np.ndarray, "B"] | Bool[np.ndarray, "B"],
) -> tuple[float, float]:
  """Returns the 95% interval of the mean of `values`.

  For a share, where each value is 0 or 1, it is the interval of Clopper and
  Pearson (1934, https://doi.org/10.1093/biomet/26.4.404), which contains the
  truth in at least 95 of 100 cases, however few questions there are: for 0 of 8
  it is 0.000 to 0.369. For other numbers it is the bootstrap interval: the
  percentiles of the means of resamples, drawn with replacement, of the same
  size (Efron and Tibshirani 1993, chapter 13). If all numbers are equal, all
  resamples are, which would claim certainty. Then it is the interval of the
  share of questions with this number; the others are assumed to be as far from
  it as possible.

  Raises:
    ValueError: there are no values, or one is not from 0 to 1.
  """
  values = np.asarray(values, np.float64)
  bad = np.flatnonzero(~((values > -_ROUNDING) & (values < 1 + _ROUNDING)))
  if not len(values) or len(bad):
    raise ValueError(
      f"The interval of a mean was asked for {len(values)} questions, of which"
      f" {len(bad)} have no number from 0 to 1 (the first at"
      f" {bad[:5].tolist()}). Expected at least one question, all from 0 to 1."
      " Leave out what was not measured."
    )
  values = values.clip(0, 1)
  total = len(values)
  if np.all((values == 0) | (values == 1)):
    return share_interval(int(values.sum()), total)
  if np.all(values == values[0]):
    low, _ = share_interval(total, total)
    mean = float(values[0])
    return mean * low, 1 - (1 - mean) * low
  # Draws how often each distinct value occurs, in place of questions: this is
  # fast for a metric with few values.
  distinct, counts = np.unique(values, return_counts=True)
  rng = np.random.default_rng(_SEED)
  means = [
    rng.multinomial(total, counts / total) @ distinct / total
    for _ in range(_RESAMPLES)  # all at once would take much memory
  ]
  low, high = np.quantile(means, (_OUTSIDE, 1 - _OUTSIDE))
  return float(low), float(high)


def share_interval(right: int, total: int) -> tuple[float, float]:
  """Returns the 95% interval of Clopper and Pearson for `right` of `total`."""
  low, high = 0.0, 1.0
  if right > 0:
    low = float(special.betaincinv(right, total - right + 1, _OUTSIDE))
  if right < total:
    high = float(special.betaincinv(right + 1, total - right, 1 - _OUTSIDE))
  return low, high
