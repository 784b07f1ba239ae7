"""Whether retrieval works while a run trains.

In: the documents that a step read, the index before and after a refresh, the
parameters. Out: metrics, and one warning per attempt if retrieval collapses.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree
import numpy as np

from rag_jax.corpus.words import holds
from rag_jax.corpus.words import joined_units
from rag_jax.data.experiment import Experiment
from rag_jax.data.pipeline import QuestionBatches
from rag_jax.data.questions import Question
from rag_jax.losses import MARGINAL_NLL_FNS
from rag_jax.models.batch import RagBatch
from rag_jax.models.partitioning import place_batch
from rag_jax.models.partitioning import replicated
from rag_jax.retrieval.index import Index
from rag_jax.retrieval.retriever import find_docs
from rag_jax.training.collapse import CollapseWarning


class RetrievalHealth:
  """The metrics of retrieval in the main stage.

  Attributes:
    rank_shift: of the newest refresh of the index, saved with a checkpoint;
      None before the first one.
  """

  def __init__(
    self,
    experiment: Experiment,
    questions: Sequence[Question],
    batches: QuestionBatches,
  ):
    config = experiment.config
    self._experiment = experiment
    self._questions = questions
    self._batches = batches
    self._numbers = config.eval.answers == "numbers"
    self._utility = compile_utility(experiment)
    rows = len(batches.rows(0))
    self._collapse = CollapseWarning(
      # Distinct documents are counted over all processes in a step only.
      batch_size=config.train.batch_size if config.index.refresh_rows else rows,
      n_docs=config.data.n_docs,
      num_passages=len(experiment.passages),
    )
    self.rank_shift: float | None = None
    self._thread = futures.ThreadPoolExecutor(1, "rank shift")
    self._pending: futures.Future[float] | None = None
    # As many as this process embeds per step: there is a program for that.
    self._asked = [q.asked for q in questions[:rows]]

  def metrics(
    self,
    step: int,
    doc_ids: Int[np.ndarray, "B K"],
    values: Mapping[str, float],
  ) -> dict[str, float]:
    """Returns the metrics of a log line, and warns if retrieval collapsed.

    Args:
      step: that has just ended.
      doc_ids: the documents that it read, for the rows of this process.
      values: other metrics of the line, with entropy and distinct documents.
    """
    rows = self._batches.rows(step - 1)
    found = answers_in_docs(
      self._experiment.passages,
      doc_ids,
      [self._questions[row].answers for row in rows],
      numbers=self._numbers,
    )
    metrics = {"train/answer_in_docs": found}
    shift = self.newest_rank_shift()
    if shift is not None:
      metrics["train/rank_shift"] = shift
    self._collapse.look(step, {**values, **metrics})
    return metrics

  def refreshed(self, before: Index, after: Index, params: PyTree) -> None:
    """Measures in a thread how far a refresh of the index moved documents.

    Args:
      before: the index that was searched so far.
      after: the index that is searched from now on.
      params: of the retriever; they embed the questions for both.
    """
    self.newest_rank_shift()
    self._pending = self._thread.submit(self._shift, before, after, params)

  def newest_rank_shift(self) -> float | None:
    """Waits for the measurement, if one is running, and returns the newest."""
    if self._pending is not None:
      self.rank_shift, self._pending = self._pending.result(), None
    return self.rank_shift

  def _shift(self, before: Index, after: Index, params: PyTree) -> float:
    """Returns 1 - overlap of the top K before and after."""
    context, bm25 = self._experiment.context, self._experiment.bm25
    with context.counting():
      tokens, mask = context.questions(context.encode_questions(self._asked)[0])
    embeddings = self._experiment.embedder.questions(params, tokens, mask)
    n_docs = self._experiment.config.data.n_docs
    words = context.words(self._asked)
    old, new = (
      find_docs(index, bm25, params, embeddings, words, n_docs)
      for index in (before, after)
    )
    same = np.any(old[:, :, None] == new[:, None, :], axis=2)  # B K
    return float(1 - np.mean(same))

  def utility(
    self,
    params: PyTree,
    step: int,
    doc_ids: Int[np.ndarray, "B K"],
    index: Index | None,
  ) -> dict[str, float]:
    """Returns how much the documents of a step help, as a metric.

    It costs a forward pass of the batch, and one of its questions alone.
    """
    batches = self._batches.compared(step - 1, doc_ids, index)
    size = self._experiment.config.train.batch_size
    placed = (place_batch(b, self._experiment.mesh, size) for b in batches)
    return {"train/doc_utility": float(self._utility(params, *placed))}

  def compile(self, params: PyTree, index: Index | None) -> None:
    """Compiles what `utility` needs."""
    shape = len(self._batches.rows(0)), self._experiment.config.data.n_docs
    self.utility(params, 1, np.zeros(shape, np.int32), index)

  def close(self) -> None:
    """Ends the thread."""
    self._thread.shutdown(wait=True, cancel_futures=True)


def compile_utility(
  experiment: Experiment,
) -> Callable[[PyTree, RagBatch, RagBatch], Float[Array, ""]]:
  """Returns a function: (params, batch, batch without documents) -> utility.

  That is log p(y|x), summed over the documents, minus log p(y|x) of a generator
  that reads the question alone; in nats per target token, without dropout.
  Above 0, documents help.
  """
  config, mesh = experiment.config, experiment.mesh
  fid = config.loss == "fid"
  joined = fid or config.loss == "concatenate"
  nll_fn = MARGINAL_NLL_FNS["rag_token" if joined else config.loss]

  def nll(params: PyTree, batch: RagBatch) -> Float[Array, "B"]:
    out: Any = experiment.model.apply(
      {"params": params},
      batch,
      vocab_chunk=config.train.vocab_chunk,
      method="joined_log_probs" if fid else "target_log_probs",
    )
    # One context of all documents: its prior is 1.
    scores = jnp.zeros_like(out.log_probs[..., 0]) if joined else out.doc_scores
    return nll_fn(scores, out.log_probs, batch.target_mask)

  def utility(
    params: PyTree, batch: RagBatch, alone: RagBatch
  ) -> Float[Array, ""]:
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      gain = nll(params, alone) - nll(params, batch)
    return jnp.sum(gain) / jnp.sum(batch.target_mask)

  return jax.jit(utility, out_shardings=replicated(mesh))


def answers_in_docs(
  passages: Any,
  doc_ids: Int[np.ndarray, "B K"],
  answers: Sequence[Sequence[str]],
  *,
  numbers: bool = False,
) -> float:
  """Returns the share of questions with an answer in one of their documents.

  An answer is in a document if its words follow one another there, after
  folding: the rule of eval.answers="multilingual", or of "numbers".

  Args:
    passages: texts and titles, by passage number.
    doc_ids: passages of each question.
    answers: accepted answers of each question.
    numbers: whether a number is one word.
  """
  num_found = 0
  for docs, accepted in zip(doc_ids.tolist(), answers, strict=True):
    wanted = [joined_units(answer, numbers=numbers) for answer in accepted]
    num_found += any(
      holds(joined_units(f"{p.title} {p.text}", numbers=numbers), wanted)
      for p in (passages[i] for i in docs)
    )
  return num_found / len(doc_ids)
