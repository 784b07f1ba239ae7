"""Questions to training batches, one step ahead of the step that runs.

In: questions, a step, the retriever's parameters and the index at that step.
Out: the `RagBatch` of that step. It is a pure function of these, so a resumed
run sees the same batches as an uninterrupted one.
"""

from collections.abc import Callable, Sequence
from concurrent import futures
import dataclasses
import time
from typing import Any

from absl import logging
import grain
from jaxtyping import Int, PyTree
import numpy as np

from rag_jax.config import Config
from rag_jax.data.context import ContextBuilder
from rag_jax.data.dialogue import Asked
from rag_jax.data.informal import informal
from rag_jax.data.questions import Question
from rag_jax.data.substitution import Change
from rag_jax.data.substitution import Substitution
from rag_jax.models.batch import MAX_ACCEPTED
from rag_jax.models.batch import RagBatch
from rag_jax.retrieval.bm25 import Bm25Index
from rag_jax.retrieval.index import Index
from rag_jax.retrieval.retriever import Embedder
from rag_jax.retrieval.retriever import find_docs

_POLL_SECS = 0.002


@dataclasses.dataclass(frozen=True, slots=True)
class Prepared:
  """A batch, and the document ids with which a checkpoint can make it again."""

  batch: Any  # a RagBatch; a QuestionBatch, if the step searches
  doc_ids: Int[np.ndarray, "B K"]  # passage numbers; K = 0 without documents
  cut: dict[str, int] = dataclasses.field(default_factory=dict)  # see COUNTS


class QuestionBatches:
  """The batches of the main stage, by step.

  The order of questions is a function of (seed, epoch): grain shuffles each
  epoch anew and gives random access, so the data position of a checkpoint is
  the step alone, whatever the number of processes.
  """

  def __init__(
    self,
    questions: Sequence[Question],
    context: ContextBuilder,
    embedder: Embedder,
    config: Config,
    *,
    bm25: Bm25Index | None = None,  # also searches and scores documents
    share: Sequence[int] | None = None,  # rows that this process loads
  ):
    # Without a step, no number of questions is too small.
    batch_size = config.train.batch_size if config.train.num_steps else 1
    if len(questions) < batch_size:
      raise ValueError(
        f"train.batch_size={batch_size} is larger than the training split"
        f" ({len(questions)} questions); lower it or bring more questions."
      )
    self._asked = [q.asked for q in questions]
    self._question_ids, self._context_ids = context.encode_questions(
      self._asked
    )
    # Every accepted answer is right; the first is the one to learn.
    self._answer_ids = context.encode_answers([q.answers[0] for q in questions])
    self._accepted_ids = None
    if config.rewards_answers:
      self._accepted_ids = [
        context.encode_answers(q.answers[:MAX_ACCEPTED]) for q in questions
      ]
      num_more = sum(len(q.answers) > MAX_ACCEPTED for q in questions)
      if num_more:
        logging.info(
          "%d questions have more than %d accepted answers; a reward compares"
          " with the first %d.", num_more, MAX_ACCEPTED, MAX_ACCEPTED,
        )  # fmt: skip
    self._context = context
    self._informal, self._seed = config.data.informal_questions, config.seed
    self._embedder = embedder
    self._bm25 = bm25
    self._n_docs = config.data.n_docs
    # Documents are then given by their embedding in the index.
    self._frozen_passages = not config.encoder.train_passage_encoder
    # Scores that are known of a passage are those of its own words.
    self._renames = not self._frozen_passages and bm25 is None
    everything = range(batch_size)
    self._share = np.array(everything if share is None else share)
    self._substitution = Substitution(
      questions,
      self._answer_ids,
      context.tokenized,
      share=config.data.substitute_answers,
      subject_share=config.data.substitute_subjects,
      seed=config.seed,
    )
    order = grain.MapDataset.range(len(questions)).seed(config.seed).shuffle()
    self._order = order.repeat().batch(batch_size)

  def context_lengths(self, num: int) -> Int[np.ndarray, "num"]:
    """Returns the tokens of contexts of random questions and passages."""
    rng = np.random.default_rng(self._seed)
    ids = [
      self._context_ids[i] for i in rng.integers(len(self._asked), size=num)
    ]
    num_docs = self._context.num_docs(self._n_docs)
    rows = rng.integers(len(self._context.tokenized), size=(num, num_docs))
    with self._context.counting():  # these are not cut for a model
      _, mask = self._context.contexts(ids, rows)
    return mask[:, 0].sum(axis=-1)

  def rows(self, step: int) -> Int[np.ndarray, "B"]:
    """Returns which questions this process reads at `step`."""
    rows = self._order[step]
    assert rows is not None  # grain returns None for filtered-out rows
    return rows[self._share]

  def asked(
    self, step: int, rows: Int[np.ndarray, "B"]
  ) -> tuple[list[str], list[list[int]], list[list[int]]]:
    """Returns what BM25 is asked, and the retriever's and generator's ids."""
    asked = [self._asked[i] for i in rows]
    question_ids = [self._question_ids[i] for i in rows]
    context_ids = [self._context_ids[i] for i in rows]
    changed = []
    for b, row in enumerate(rows.tolist()):
      phrased = self._phrased(step, row, asked[b])
      if phrased != asked[b]:
        asked[b] = phrased
        changed.append(b)
    new_ids = self._context.encode_questions([asked[b] for b in changed])
    for b, *ids in zip(changed, *new_ids, strict=True):
      question_ids[b], context_ids[b] = ids
    return self._context.words(asked), question_ids, context_ids

  def _phrased(self, step: int, row: int, asked: str | Asked) -> str | Asked:
    """Returns a question, or an informal form of it, as drawn for `step`."""
    if not self._informal:
      return asked
    rng = np.random.default_rng((self._seed, step, row, 1))
    if rng.random() >= self._informal:
      return asked
    asked = Asked.of(asked)
    return dataclasses.replace(asked, question=informal(asked.question, rng))

  def prepare(
    self,
    step: int,
    retriever_params: PyTree,
    index: Index | None,
    doc_ids: Int[np.ndarray, "B K"] | None = None,
  ) -> Prepared:
    """Returns the batch of `step`.

    Args:
      step: of the main stage.
      retriever_params: embed the questions, and weigh words against embeddings
        in a hybrid search.
      index: is searched; None for a closed-book model.
      doc_ids: documents of an earlier search, to use instead of searching.
    """
    with self._context.counting() as cut:
      prepared = self._prepare(step, retriever_params, index, doc_ids)
    return dataclasses.replace(prepared, cut=cut)

  def _prepare(
    self,
    step: int,
    retriever_params: PyTree,
    index: Index | None,
    doc_ids: Int[np.ndarray, "B K"] | None,
  ) -> Prepared:
    rows = self.rows(step)
    texts, question_ids, context_ids = self.asked(step, rows)
    if index is None:
      doc_ids = np.zeros((len(rows), 0), np.int32)
    else:
      tokens, mask = self._context.questions(question_ids)
      if doc_ids is None:
        embeddings = self._embedder.questions(retriever_params, tokens, mask)
        doc_ids = find_docs(
          index,
          self._bm25,
          retriever_params,
          embeddings,
          texts,
          self._n_docs,
        )
    changes = self._substitution.changes(step, rows, doc_ids)
    for b, change in enumerate(changes):
      if change.question is not None:
        asked = self._phrased(step, int(rows[b]), change.question)
        [ids], [context_ids[b]] = self._context.encode_questions([asked])
        if self._renames:
          question_ids[b] = ids
    fields: dict[str, Any] = {}
    if index is not None:
      renamed = changes if self._renames else ()
      fields = self._retrieved(texts, question_ids, doc_ids, index, renamed)
    context_tokens, context_mask = self._context.contexts(
      context_ids, doc_ids, changes
    )
    return Prepared(
      RagBatch(
        context_tokens=context_tokens,
        context_mask=context_mask,
        **self.targets(rows, [change.answer_ids for change in changes]),
        **fields,
      ),
      doc_ids,
    )

  def targets(
    self,
    rows: Int[np.ndarray, "B"],
    instead: Sequence[list[int] | None] | None = None,
  ) -> dict[str, Any]:
    """Returns the fields of a batch with the answers.

    Args:
      rows: which questions.
      instead: ids of other answers; None: the question's own.
    """
    instead = instead or [None] * len(rows)
    pairs = list(zip(rows.tolist(), instead, strict=True))
    tokens, mask = self._context.targets(
      [self._answer_ids[i] if ids is None else ids for i, ids in pairs]
    )
    fields: dict[str, Any] = {"target_tokens": tokens, "target_mask": mask}
    if self._accepted_ids is not None:
      fields["accepted_tokens"] = np.stack([
        self._accepted(self._accepted_ids[i] if ids is None else [ids])
        for i, ids in pairs
      ])  # fmt: skip
    return fields

  def _accepted(self, answer_ids: list[list[int]]) -> Int[np.ndarray, "A T"]:
    """Returns answers that count as right, and rows of padding."""
    with self._context.counting():  # cut like targets, and counted with them
      tokens, _ = self._context.targets(answer_ids)
    more = MAX_ACCEPTED - len(tokens)
    pad_id = self._context.tokenizer.pad_id
    return np.pad(tokens, ((0, more), (0, 0)), constant_values=pad_id)

  def _retrieved(
    self,
    texts: Sequence[str],
    question_ids: Sequence[list[int]],
    doc_ids: Int[np.ndarray, "B K"],
    index: Index | None,
    changes: Sequence[Change] = (),
  ) -> dict[str, Any]:
    """Returns the fields of a `RagBatch` that the retriever reads."""
    tokens, mask = self._context.questions(question_ids)
    fields: dict[str, Any] = {"question_tokens": tokens, "question_mask": mask}
    if self._bm25 is not None:
      fields["bm25_scores"] = self._bm25.score(texts, doc_ids)
    if self._frozen_passages:
      assert index is not None
      fields["doc_embeddings"] = index.embeddings[doc_ids]
    else:
      fields["doc_tokens"], fields["doc_mask"] = self._context.passages(
        doc_ids, changes
      )
    return fields

  def compared(
    self, step: int, doc_ids: Int[np.ndarray, "B K"], index: Index | None
  ) -> tuple[RagBatch, RagBatch]:
    """Returns the questions of `step` with documents, and without any.

    Nothing is substituted in them, since an answer that was put into documents
    is known from nowhere else.

    Args:
      step: of the main stage.
      doc_ids: the documents of each question.
      index: has their embeddings; only used if these are not trained.
    """
    rows = self.rows(step)
    with self._context.counting():
      texts, question_ids, context_ids = self.asked(step, rows)
      targets = self._context.targets([self._answer_ids[i] for i in rows])
      nothing = np.zeros((len(rows), 0), np.int32)
      alone = RagBatch(*self._context.contexts(context_ids, nothing), *targets)
      contexts = self._context.contexts(context_ids, doc_ids)
      fields = self._retrieved(texts, question_ids, doc_ids, index)
    return RagBatch(*contexts, *targets, **fields), alone


class Ahead:
  """Prepares one batch in a thread while the step before it runs."""

  def __init__(self):
    self._thread = futures.ThreadPoolExecutor(1, "batches")
    self._pending: futures.Future[Prepared] | None = None

  def submit(self, prepare: Any, *args: Any) -> None:
    """Starts `prepare(*args)`."""
    assert self._pending is None
    self._pending = self._thread.submit(prepare, *args)

  def peek(self) -> Prepared | None:
    """Waits for the batch without taking it."""
    return None if self._pending is None else self._pending.result()

  def take(self, device_is_idle: Callable[[], bool]) -> tuple[Prepared, float]:
    """Returns the batch, and the seconds that the devices waited for it."""
    assert self._pending is not None
    waited, now = 0.0, time.perf_counter()
    while not self._pending.done():
      futures.wait([self._pending], timeout=_POLL_SECS)
      before, now = now, time.perf_counter()
      # While a step runs, the devices do not wait.
      waited += now - before if device_is_idle() else 0.0
    prepared = self._pending.result()
    self._pending = None
    return prepared, waited

  def close(self) -> None:
    """Ends the thread."""
    self._thread.shutdown(wait=True, cancel_futures=True)
