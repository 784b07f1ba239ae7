"""Measures the recall, the speed and the memory of an index.

In: an index, and embeddings of questions that nothing was tuned on. Out: its
certificate.
"""

from collections.abc import Sequence

from absl import logging
from jaxtyping import Float, Int
import numpy as np

from rag_jax.retrieval.certificate import PASSAGES
from rag_jax.retrieval.certificate import QUESTIONS
from rag_jax.retrieval.certificate import Certificate
from rag_jax.retrieval.index_core import Index
from rag_jax.retrieval.recall import Recall
from rag_jax.retrieval.recall import index_recall_at_k
from rag_jax.retrieval.recall import mean_recall
from rag_jax.retrieval.resources import num_cpus
from rag_jax.retrieval.resources import queries_per_second
from rag_jax.retrieval.sharded import exact_search

_SEED = 0  # for the sample: the same index and questions give the same recall
_SPEED_K = 10  # passages per question, when speed is measured
_SPEED_BATCHES = (1, 256)


def certify(
  index: Index,
  questions: Float[np.ndarray, "B R"] | None = None,
  *,
  ks: Sequence[int] = (1, 10, 100),
  max_questions: int = 1000,
  speed_secs: float = 1.0,
) -> Certificate:
  """Returns the certificate of `index`, measured against exact search.

  Without questions, passages of the index are searched instead. Each of them
  finds itself, so it is removed from both results: what counts is whether its
  neighbours are found. This is easier than real questions, which lie farther
  from the passages. The certificate says which sample was used.

  The whole sample is searched in one call. ScaNN may find a passage more or
  less for a question that is searched alone.

  Assign the result to `index.certificate` before `index.save`.

  Args:
    index: of any kind.
    questions: embeddings of questions that nothing was tuned on; None for
      passages of the index.
    ks: the k of each recall, at most the number of passages.
    max_questions: a larger sample is reduced to this size at random.
    speed_secs: how long each batch size is timed; 0 to measure no speed.

  Raises:
    ValueError: there are no questions, they do not fit the index, or a number
      is out of range.
  """
  if min(ks, default=0) < 1 or max_questions < 1:
    raise ValueError(
      f"ks={tuple(ks)} and max_questions={max_questions} were given for the"
      " certificate; expected numbers of at least 1. Change them."
    )
  rng = np.random.default_rng(_SEED)
  if questions is None:
    rows = _draw(rng, index.num_passages, max_questions)
    sample, own = np.asarray(index.embeddings[rows]), rows
    # A single passage has no neighbours; it has to find itself.
    own = None if index.num_passages == 1 else own
  else:
    if not len(questions):
      raise ValueError(
        f"The questions to certify the index with have shape {questions.shape}:"
        " there are none. Expected at least one; pass None to use passages of"
        " the index."
      )
    rows = _draw(rng, len(questions), max_questions)
    sample, own = questions[rows], None
  most = index.num_passages - (own is not None)
  depths = sorted({min(k, most) for k in ks})
  return Certificate(
    kind=index.kind,
    settings=dict(index.settings),
    num_passages=index.num_passages,
    embedding_dim=index.embedding_dim,
    sample=PASSAGES if questions is None else QUESTIONS,
    num_questions=len(sample),
    recalls=_recalls(index, sample, own, depths),
    speed_k=min(_SPEED_K, index.num_passages),
    queries_per_second={
      size: queries_per_second(
        index, sample, min(_SPEED_K, index.num_passages), size, speed_secs
      )
      for size in _SPEED_BATCHES
      if speed_secs
    },
    num_cpus=num_cpus(),
    memory_bytes=index.memory_bytes,
    build_secs=index.build_cost.secs if index.build_cost else None,
    build_peak_bytes=index.build_cost.peak_bytes if index.build_cost else None,
  )


def check_min_recall(index: Index, minimum: float, k: int) -> None:
  """Raises `ValueError` if the certified recall of an index is below `minimum`.

  An index without a certificate is measured now, with its passages.

  Args:
    index: of any kind.
    minimum: from 0 to 1; 0 turns the check off.
    k: passages that are read per question. The recall at the next larger
      measured k counts.
  """
  if not minimum:
    return
  if index.certificate is None:
    logging.info(
      "Measuring an index of kind %r, which has no certificate.", index.kind
    )
    index.certificate = certify(index, speed_secs=0.0)
  certificate = index.certificate
  found = certificate.recall(k)
  if found.mean < minimum:
    raise ValueError(
      f"The index of kind {index.kind!r} finds too little: its"
      f" index_recall_at_{found.k} is {found.mean:.4f} (95% interval"
      f" {found.low:.4f} to {found.high:.4f}, on {certificate.num_questions}"
      f" {certificate.sample}), expected at least index.min_recall={minimum}."
      " Raise index.scann_leaves_to_search or index.scann_reorder, use"
      " index.kind='exact', or lower index.min_recall."
    )


def _recalls(
  index: Index,
  sample: np.ndarray,
  own: np.ndarray | None,  # the ids, if the sample is passages
  depths: Sequence[int],
) -> tuple[Recall, ...]:
  more = own is not None
  truth, _ = exact_search(index, sample, depths[-1] + more)
  if own is not None:
    truth = _without(truth, own)
  recalls = []
  # One search per k: the first 10 of 100 may differ from a search for 10.
  for k in depths:
    found, _ = index.search(sample, k + more)
    if own is not None:
      found = _without(found, own)
    recalls.append(mean_recall(index_recall_at_k(found, truth, k), k))
  return tuple(recalls)


def _without(
  ids: Int[np.ndarray, "B K"], own: Int[np.ndarray, "B"]
) -> Int[np.ndarray, "B k"]:
  """Returns each row without `own`, or without its last id if `own` is missing.

  It is missing if other passages score higher, for instance longer ones.
  """
  kept = ids != own[:, None]
  kept[kept.all(axis=1), -1] = False
  return ids[kept].reshape(len(ids), -1)


def _draw(rng: np.random.Generator, total: int, most: int) -> np.ndarray:
  """Returns `most` random numbers below `total`, or all, in ascending order."""
  if total <= most:
    return np.arange(total)
  return np.sort(rng.choice(total, most, replace=False))
