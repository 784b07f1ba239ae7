"""How sure a mean over questions is.

In: one number a question. Out: the bootstrap 95% interval of their mean.
"""

from jaxtyping import Bool, Float
import numpy as np

_RESAMPLES = 1000
_SEED = 0  # of the resamples: the same numbers give the same interval


def bootstrap_interval(
  values: Float[np.ndarray, "B"] | Bool[np.ndarray, "B"],
) -> tuple[float, float]:
  """Returns the bootstrap 95% interval of the mean of `values`.

  Percentiles of the means of resamples: as many draws with replacement as
  there are questions (Efron and Tibshirani 1993, chapter 13). How often each
  of the different values is among them is one multinomial draw, so that a
  metric with few values, such as a recall of 0 or 1, costs little.

  Raises:
    ValueError: there are none, or one is not finite.
  """
  values = np.asarray(values, np.float64)
  if not len(values) or not np.all(np.isfinite(values)):
    bad = np.flatnonzero(~np.isfinite(values))
    raise ValueError(
      f"The interval of a mean was asked for {len(values)} questions, of which"
      f" {len(bad)} have no finite number (the first at {bad[:5].tolist()})."
      " Expected at least one question, all finite. Leave out what was not"
      " measured."
    )
  distinct, counts = np.unique(values, return_counts=True)
  distinct, counts = distinct[::-1], counts[::-1]
  shares = counts / len(values)
  rng = np.random.default_rng(_SEED)
  means = [
    rng.multinomial(len(values), shares) @ distinct / len(values)
    for _ in range(_RESAMPLES)  # not at once: 1,000 rows of all questions
  ]
  low, high = np.quantile(means, (0.025, 0.975))
  return float(low), float(high)
