"""The recall of an index against exact search, with its interval.

In: ids of passages that an index found and that exact search found, best first.
Out: one number from 0 to 1 per question, and their mean with an interval.
"""

import dataclasses

from jaxtyping import Float, Int
import numpy as np

from rag_jax.retrieval.intervals import mean_interval

_BLOCK_QUESTIONS = 64  # compared at a time: k * k booleans each


@dataclasses.dataclass(slots=True, frozen=True, kw_only=True)
class Recall:
  """Mean index_recall_at_k over questions, with its 95% interval."""

  k: int
  mean: float
  low: float
  high: float

  def __str__(self) -> str:
    """Returns the mean and the interval, for a table."""
    return f"{self.mean:.4f} ({self.low:.4f} to {self.high:.4f})"


def index_recall_at_k(
  ids: Int[np.ndarray, "B K"],
  exact_ids: Int[np.ndarray, "B M"],
  k: int,
) -> Float[np.ndarray, "B"]:
  """Returns the share of the exact top `k` in the top `k` of an index.

  Args:
    ids: passages that the index found, best first; -1 where it found none.
    exact_ids: passages that exact search found, best first.
    k: how many of each are compared; their order does not matter.

  Raises:
    ValueError: `k` is below 1 or above K or M, or `exact_ids` has a gap.
  """
  if k < 1:
    raise ValueError(f"k={k} passages; expected at least 1. Raise k.")
  if k > min(ids.shape[1], exact_ids.shape[1]):
    raise ValueError(
      f"k={k} is more than was retrieved: ids has {ids.shape[1]} per question,"
      f" exact_ids {exact_ids.shape[1]}. Retrieve k of both, or lower k."
    )
  if np.any(exact_ids[:, :k] < 0):
    raise ValueError(
      f"exact_ids has ids below 0 among the first k={k}: exact search found"
      " fewer passages, so there are fewer in the corpus. Lower k."
    )
  recalls = np.zeros(len(ids))
  for start in range(0, len(ids), _BLOCK_QUESTIONS):
    rows = slice(start, start + _BLOCK_QUESTIONS)
    hits = exact_ids[rows, :k, None] == ids[rows, None, :k]  # b k k
    recalls[rows] = np.mean(np.any(hits, axis=2), axis=1)
  return recalls


def mean_recall(recalls: Float[np.ndarray, "B"], k: int) -> Recall:
  """Returns the mean over questions and its 95% interval.

  Args:
    recalls: one number from 0 to 1 per question, for at least one question.
    k: the k of index_recall_at_k.
  """
  low, high = mean_interval(recalls)
  return Recall(k=k, mean=float(np.mean(recalls)), low=low, high=high)
