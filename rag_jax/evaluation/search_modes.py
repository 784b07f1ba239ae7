"""Measures the search modes of a directory, on the user's own questions.

In: a search directory, and questions whose passages or answers are known. Out:
how well a search by embeddings, by words and by both finds them; and the
weights for both, which are kept with the index as a part of its certificate.
"""

from collections.abc import Sequence
import os

from absl import logging
from etils import epath
import numpy as np

from rag_jax.evaluation.judged_questions import Known
from rag_jax.evaluation.judged_questions import gold_rows
from rag_jax.evaluation.judged_questions import read_judged_questions
from rag_jax.models.hybrid import HybridWeights
from rag_jax.retrieval.certificate import ModeMetrics
from rag_jax.retrieval.certificate import SearchModes
from rag_jax.retrieval.hybrid import Candidates
from rag_jax.retrieval.hybrid import HybridRetriever
from rag_jax.retrieval.hybrid import Rrf
from rag_jax.retrieval.hybrid import fit_weights
from rag_jax.retrieval.hybrid import fuse
from rag_jax.retrieval.hybrid import label_log_likelihoods
from rag_jax.search.directory import OpenedDirectory
from rag_jax.search.update import keep_modes

_DEPTH = 10  # passages per question that are judged
_LEAST_QUESTIONS = 20


def fit_search_modes(
  path: epath.PathLike, questions: epath.PathLike, *, wait: bool = False
) -> SearchModes:
  """Fits the weights of hybrid search, and keeps them with the index.

  The metrics are cross-validated: each half of the questions is searched with
  weights fitted to the other half. The weights that are kept are fitted to all.

  Args:
    path: the search directory; it gets a new version.
    questions: a file or folder, as `read_judged_questions` reads them.
    wait: for another process that writes to the directory.

  Raises:
    FileNotFoundError: directory or questions do not exist.
    ValueError: words are not indexed, for fewer than 20 questions a relevant
      passage is found, or another process writes to the directory.
    OSError: the disk is full.
  """
  directory = OpenedDirectory(path)
  modes = measure_modes(directory, questions)
  keep_modes(directory.path, directory.version.name, modes, wait=wait)
  return modes


def measure_modes(
  directory: OpenedDirectory, questions: epath.PathLike
) -> SearchModes:
  """Returns the metrics of each mode, and the weights of hybrid search.

  Arguments and errors as in `fit_search_modes`.
  """
  version = directory.version
  if version.bm25 is None:
    raise ValueError(
      f"{directory.path} was built without words, so there is nothing to weigh"
      " embeddings against; expected both. Build it again with --bm25."
    )
  asked = read_judged_questions(questions)
  texts = [question.question for question in asked]
  logging.info("Searching for %d questions in every mode.", len(texts))
  passages = version.passages
  graded, _ = gold_rows(asked, passages, version.twins)

  def text_of(row: int) -> str:
    return f"{passages[row].title}\n{passages[row].text}"

  known = Known([question.answers for question in asked], graded, text_of)
  embeddings = directory.embed_questions(texts)
  retriever = HybridRetriever(version.index, version.bm25, Rrf())
  found = retriever.candidates(embeddings, texts)
  of_use = np.zeros(found.ids.shape, bool)
  for row, (ids, mask) in enumerate(zip(found.ids, found.mask, strict=True)):
    of_use[row, mask] = known.relevant(row, ids[mask].tolist())
  judged = of_use.any(axis=1)
  if judged.sum() < _LEAST_QUESTIONS:
    raise ValueError(
      f"Of {len(asked)} questions in {os.fspath(questions)}, {judged.sum()}"
      " have a relevant passage among those that are found; expected at least"
      f" {_LEAST_QUESTIONS}, with 'gold' ids of passages or 'answers' in them."
      " Give more questions, or those of this corpus."
    )
  # A question whose passages are not found does not help the fit, but counts in
  # the metrics.
  judgeable = np.array(
    [
      bool(q.answers) or any(grade > 0 for grade in grades.values())
      for q, grades in zip(asked, graded, strict=True)
    ]
  )
  depth = min(_DEPTH, version.index.num_passages)
  rankings = {
    "dense": version.index.search(embeddings, depth)[0],
    "bm25": version.bm25.search(texts, depth)[0],
    "reciprocal ranks": retriever.search(embeddings, texts, depth)[0],
    "hybrid": _cross_fitted(found, of_use, depth),
  }
  metrics = {
    name: _metrics(ids, known, judgeable) for name, ids in rankings.items()
  }
  weights = _fit(found, of_use, np.ones(len(asked), bool))
  by_ranks = metrics["reciprocal ranks"].mrr > metrics["hybrid"].mrr
  if by_ranks:  # which then is what hybrid search does
    metrics["hybrid"] = metrics["reciprocal ranks"]
  return SearchModes(
    num_questions=int(judgeable.sum()),
    num_passages=len(passages),
    metrics=metrics,
    weights=None if by_ranks else (float(weights[0]), float(weights[1])),
  )


def _fit(
  found: Candidates, of_use: np.ndarray, questions: np.ndarray
) -> HybridWeights:
  return fit_weights(
    found.dense[questions],
    found.bm25[questions],
    label_log_likelihoods(of_use[questions]),
    found.mask[questions],
  )


def _cross_fitted(
  found: Candidates, of_use: np.ndarray, depth: int
) -> np.ndarray:
  """Returns ids by weights that were fitted to the other half each."""
  ids = np.full((len(found.ids), depth), -1, np.int32)
  odd = np.arange(len(found.ids)) % 2 == 1
  for half in (odd, ~odd):
    some = Candidates(*(part[half] for part in found))
    ids[half] = fuse(some, _fit(found, of_use, ~half), depth)[0]
  return ids


def _metrics(
  ids: np.ndarray, known: Known, judgeable: Sequence[bool] | np.ndarray
) -> ModeMetrics:
  """Returns how high the first passage of use is, on average."""
  ranks = []
  for number in np.flatnonzero(judgeable):
    rows = ids[number][ids[number] >= 0].tolist()
    relevant = known.relevant(int(number), rows)
    ranks.append(relevant.index(True) + 1 if any(relevant) else np.inf)
  first = np.array(ranks)
  return ModeMetrics(
    first=float(np.mean(first <= 1)),
    among_5=float(np.mean(first <= 5)),
    mrr=float(np.mean(1 / first)),
  )
