"""Whether two systems differ: intervals and p values of paired numbers.

In: one difference per question, or the counts of BLEU of both systems. Out: the
95 % interval of the mean difference, from a bootstrap over questions, and the
two-sided p value of no difference.
"""

from collections.abc import Callable, Iterator

from jaxtyping import Float, Int
import numpy as np
from scipy import stats

from rag_jax.retrieval.intervals import mean_interval
from rag_jax.retrieval.intervals import share_interval

_RESAMPLES = 10_000
_CORPUS_RESAMPLES = 1000  # of a metric that is no mean, as in sacrebleu
_BATCH = 100  # resamples at a time
_SEED = 0
_OUTSIDE = (0.025, 0.975)

Counts = Int[np.ndarray, "B 10"]
CorpusMetric = Callable[[Int[np.ndarray, "10"]], float]  # of the sum of counts


def difference_interval(
  difference: Float[np.ndarray, "B"], largest: float = 1.0
) -> tuple[float, float]:
  """Returns the 95 % interval of the mean of paired differences.

  Args:
    difference: one per question.
    largest: possible difference, for the case that all are equal: then all
      resamples are, which would claim certainty; see `mean_interval`.
  """
  if np.all(difference == difference[0]):
    low, high = mean_interval((difference / largest + 1) / 2)
    return largest * (2 * low - 1), largest * (2 * high - 1)
  found = stats.bootstrap(
    (difference,), np.mean, n_resamples=_RESAMPLES, method="percentile",
    rng=np.random.default_rng(_SEED), batch=_BATCH,
  )  # fmt: skip
  interval = found.confidence_interval
  return float(interval.low), float(interval.high)


def mcnemar(difference: Float[np.ndarray, "B"]) -> float:
  """Returns the p value of McNemar's exact test for differences -1, 0 and 1."""
  better, worse = np.sum(difference > 0), np.sum(difference < 0)
  if not better + worse:
    return 1.0
  return float(stats.binomtest(int(better), int(better + worse)).pvalue)


def random_signs(difference: Float[np.ndarray, "B"]) -> float:
  """Returns the p value of the mean among means with random signs."""
  if not np.any(difference):
    return 1.0
  found = stats.permutation_test(
    (difference,), np.mean, permutation_type="samples", vectorized=True,
    n_resamples=_RESAMPLES, rng=np.random.default_rng(_SEED), batch=_BATCH,
  )  # fmt: skip
  return float(found.pvalue)


def corpus_interval(
  counts: Counts, metric: CorpusMetric, top: float
) -> tuple[float, float]:
  """Returns the 95 % interval of a metric of sums, by resampling questions.

  Args:
    counts: a row for each question.
    metric: of the sum of rows; from 0 to `top`.
    top: its largest value. If all resamples are equal, the interval is that of
      `mean_interval` for equal numbers.
  """
  values = [metric(row @ counts) for row in _draws(len(counts))]
  low, high = np.quantile(values, _OUTSIDE)
  if low == high:
    least, _ = share_interval(len(counts), len(counts))
    return float(low * least), float(top - (top - high) * least)
  return float(low), float(high)


def corpus_difference(
  ours: Counts, theirs: Counts, metric: CorpusMetric, top: float
) -> dict[str, float]:
  """Returns the difference of a metric of sums, its interval and p value.

  The bootstrap draws the same questions for both systems. The p value is that
  of approximate randomisation (Riezler and Maxwell 2005,
  https://aclanthology.org/W05-0908): how often the difference is as large when
  the systems swap their answers to random questions. Arguments as in
  `corpus_interval`.
  """
  found = metric(ours.sum(axis=0)) - metric(theirs.sum(axis=0))
  drawn = [
    metric(row @ ours) - metric(row @ theirs) for row in _draws(len(ours))
  ]
  low, high = (float(x) for x in np.quantile(drawn, _OUTSIDE))
  if low == high:
    least, _ = share_interval(len(ours), len(ours))
    low = 2 * top * ((low / top + 1) / 2 * least) - top
    high = top - (top - high) * least
  if np.array_equal(ours, theirs):
    return {"difference": found, "low": low, "high": high, "p": 1.0}
  rng = np.random.default_rng(_SEED)
  extreme = 0
  for _ in range(_CORPUS_RESAMPLES):
    swap = rng.integers(0, 2, size=(len(ours), 1))
    moved = np.sum(swap * (theirs - ours), axis=0)
    swapped = metric(ours.sum(axis=0) + moved) - metric(
      theirs.sum(axis=0) - moved
    )
    extreme += abs(swapped) >= abs(found) - 1e-9
  p = (extreme + 1) / (_CORPUS_RESAMPLES + 1)
  return {"difference": found, "low": low, "high": high, "p": p}


def _draws(number: int) -> Iterator[Int[np.ndarray, "B"]]:
  """Yields how often each question is drawn, with replacement."""
  rng = np.random.default_rng(_SEED)
  for _ in range(_CORPUS_RESAMPLES):
    yield rng.multinomial(number, np.full(number, 1 / number))
