"""Answers questions and measures the answers: validation and test.

In: parameters, an index, questions with accepted answers. Out: metrics.
"""

from collections.abc import Callable, Sequence
import time

from absl import logging
from jaxtyping import PyTree
import numpy as np

from rag_jax.data.experiment import Experiment
from rag_jax.data.questions import Question
from rag_jax.decoding.answerer import Answerer
from rag_jax.evaluation.regex_answers import REGEX
from rag_jax.evaluation.regex_answers import check_patterns
from rag_jax.evaluation.report import RECALL_K
from rag_jax.evaluation.report import AnswerRecord
from rag_jax.evaluation.report import summarise
from rag_jax.evaluation.retrieval import answer_recall_at_k
from rag_jax.processes import share
from rag_jax.retrieval.certificate import Certificate
from rag_jax.retrieval.certify import certify
from rag_jax.retrieval.index import Index
from rag_jax.retrieval.recall import index_recall_at_k
from rag_jax.retrieval.sharded import exact_search

_REACHED = 0.995  # share of questions whose best passage reaches least_score
_LEAST_QUESTIONS = 50  # fewer are too few to estimate least_score

_SPEED_SECS = 0.2  # that searches are timed, per batch size


class Evaluator:
  """Answers the questions of a split and measures the answers."""

  def __init__(self, experiment: Experiment, answerer: Answerer):
    self._experiment = experiment
    self._answerer = answerer

  def least_score(
    self, params: PyTree, index: Index | None, questions: Sequence[Question]
  ) -> float | None:
    """Returns the score that the best passage reaches for 99.5 % of them.

    If no passage answers a question, its best passage usually scores less.
    Returns None for a closed-book model, or with fewer than 50 questions.
    """
    if index is None or len(questions) < _LEAST_QUESTIONS:
      return None
    scores = self._answerer.best_scores(
      params,
      index,
      [q.asked for q in questions],
      self._experiment.config.eval.batch_size,
    )
    return float(np.quantile(scores, 1 - _REACHED))

  def records(
    self, params: PyTree, index: Index | None, questions: Sequence[Question]
  ) -> list[AnswerRecord]:
    """Returns one record per question, in their order."""
    config = self._experiment.config
    if config.eval.answers == REGEX:
      for question in questions:  # fails before the expensive part
        check_patterns(question.answers, f"The question {question.question!r}")
    passages = self._experiment.passages
    answers = self._answerer.answer(
      params,
      index,
      [q.asked for q in questions],
      n_docs=config.data.n_docs,
      # Recall is measured at 5, even if fewer documents are read.
      num_retrieved=min(max(RECALL_K, config.data.n_docs), len(passages)),
      batch_size=config.eval.batch_size,
    )
    texts = [
      [f"{passages[i].title} {passages[i].text}" for i in a.retrieved]
      for a in answers
    ]
    in_top, in_first = (
      answer_recall_at_k(
        texts, [q.answers for q in questions], k, config.eval.answers
      )
      for k in (RECALL_K, 1)
    )
    return [
      AnswerRecord(
        question=question.question,
        answers=question.answers,
        relation=question.relation,
        prediction=answer.text,
        log_prob=answer.log_prob,
        retrieved_ids=answer.retrieved,
        answer_in_top=bool(found),
        answer_in_first=bool(first),
      )
      for question, answer, found, first in zip(
        questions, answers, in_top, in_first, strict=True
      )
    ]

  def evaluate(
    self,
    params: PyTree,
    index: Index | None,
    questions: Sequence[Question],
    prefix: str,
  ) -> dict[str, float]:
    """Returns the metrics of `report.summarise`, and the index's recall.

    Raises:
      ValueError: the index finds less than index.min_recall.
    """
    start = time.perf_counter()
    settings = self._experiment.config.eval
    metrics = summarise(
      self.records(params, index, questions),
      prefix,
      variant=settings.answers,
      language=settings.language,
    )
    secs = time.perf_counter() - start
    metrics[f"{prefix}/questions_per_second"] = len(questions) / secs
    if index is not None:
      name = f"{prefix}/index_recall_at_{RECALL_K}"
      metrics[name] = self.index_recall(params, index, questions)
      self._check_recall(name, metrics[name])
    return metrics

  def index_recall(
    self, params: PyTree, index: Index, questions: Sequence[Question]
  ) -> float:
    """Returns how much of the exact top 5 the index finds, from 0 to 1.

    Both search by embeddings only, even with index.hybrid. Several processes
    share the questions.
    """
    k = min(RECALL_K, index.num_passages)
    texts = [q.asked for q in questions]
    embeddings = self._answerer.embed(params, texts)

    def recalls(rows: Sequence[int]) -> list[float]:
      some = embeddings[np.asarray(rows)]
      found, _ = index.search(some, k)
      expected, _ = exact_search(index, some, k)
      return index_recall_at_k(found, expected, k).tolist()

    rows = range(len(texts))
    found = recalls(rows) if index.collective else share(rows, recalls)
    return float(np.mean(found))

  def certify(
    self, params: PyTree, index: Index, questions: Sequence[Question]
  ) -> Certificate:
    """Returns the certificate of `index`, measured with `questions`."""
    texts = [q.asked for q in questions]
    embeddings = self._answerer.embed(params, texts)
    return certify(index, embeddings, speed_secs=_SPEED_SECS)

  def _check_recall(self, name: str, recall: float) -> None:
    floor = self._experiment.config.index.min_recall
    if recall < floor:
      raise ValueError(
        f"{name}={recall:.4f} is below index.min_recall={floor}: the"
        " answers would be blamed for what the index did not find. Use"
        " index.kind='exact', or raise index.scann_leaves_to_search or"
        " index.scann_reorder."
      )

  def validator(
    self, questions: Sequence[Question]
  ) -> Callable[[PyTree, Index | None], dict[str, float]]:
    """Returns a function (params, index) -> metrics of `questions`."""
    return lambda params, index: self.evaluate(
      params, index, questions, "validation"
    )


def choose(
  questions: Sequence[Question], number: int, seed: int
) -> Sequence[Question]:
  """Returns `number` random questions, the same for a seed; 0: all of them."""
  if not number or number >= len(questions):
    return questions
  rows = np.random.default_rng(seed).choice(
    len(questions), number, replace=False
  )
  logging.info("Measuring on %d of %d questions.", number, len(questions))
  return [questions[i] for i in sorted(rows)]
