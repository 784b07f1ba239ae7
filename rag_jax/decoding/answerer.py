"""Questions as text to answers as text, each with its documents.

In: questions, parameters, an index. Out: an `Answer` a question: the text, its
log-probability, and the documents with prior and posterior.
"""

from collections.abc import Sequence
import dataclasses

import jax
from jax.experimental import multihost_utils
from jaxtyping import Float, Int, PyTree
import numpy as np

from rag_jax.data.experiment import Experiment
from rag_jax.decoding.greedy import make_greedy
from rag_jax.retrieval.index import Index


@dataclasses.dataclass(frozen=True, slots=True)
class AnswerDoc:
  """A passage that was read for an answer."""

  id: str
  title: str
  text: str
  score: float  # inner product of question and passage
  prior: float  # p(z|x), over the documents read
  posterior: float  # p(z|x,y), one document for the whole answer
  token_posteriors: tuple[float, ...]  # the same, for each token alone


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
  """What the model says to a question, and from where."""

  question: str
  text: str
  log_prob: float  # log p(y|x), nats, with the end token
  tokens: tuple[str, ...]  # of the answer; the last is the end token
  token_log_probs: tuple[float, ...]  # nats
  docs: tuple[AnswerDoc, ...]  # best prior first; empty for closed book
  question_cut: bool  # longer than the encoder or generator takes
  retrieved: tuple[int, ...]  # passage numbers, also those not read


class Answerer:
  """Retrieves, reads and writes, in batches of one shape."""

  def __init__(self, experiment: Experiment):
    data = experiment.config.data
    self._tokenizer = experiment.tokenizer
    self._passages = experiment.passages
    self._context = experiment.context
    self._embedder = experiment.embedder
    self._longest_question = min(data.question_length, data.context_length) - 2
    self._decode = make_greedy(
      experiment.model,
      max_tokens=data.target_length,
      start_id=self._tokenizer.eos_id,
      end_id=self._tokenizer.eos_id,
      pad_id=self._tokenizer.pad_id,
    )

  def search(
    self,
    params: PyTree,
    index: Index,
    questions: Sequence[str],
    n_docs: int,
  ) -> tuple[Int[np.ndarray, "B K"], Float[np.ndarray, "B R"]]:
    """Returns the passage numbers of each question, and its embedding."""
    question_ids = self._tokenizer.encode(questions)
    tokens, mask = self._context.questions(question_ids)
    retriever = {k: v for k, v in params.items() if k != "generator"}
    embeddings = self._embedder.questions(retriever, tokens, mask)
    return index.search(embeddings, n_docs)[0], embeddings

  def answer(
    self,
    params: PyTree,
    index: Index | None,
    questions: Sequence[str],
    *,
    n_docs: int,
    num_retrieved: int = 0,
    batch_size: int = 1,
  ) -> list[Answer]:
    """Returns the answer to each question, in their order.

    Args:
      params: of the whole model.
      index: what is searched; None is closed book.
      questions: any number.
      n_docs: documents read for each.
      num_retrieved: passages searched for each, if more than `n_docs`: to
        measure recall deeper than what is read.
      batch_size: questions decoded together. Each value compiles once.
    """
    answers = []
    for start in range(0, len(questions), batch_size):
      part = list(questions[start : start + batch_size])
      answers += self._answer_batch(
        params, index, part, n_docs, max(num_retrieved, n_docs), batch_size
      )
    return answers

  def _answer_batch(
    self,
    params: PyTree,
    index: Index | None,
    questions: list[str],
    n_docs: int,
    num_retrieved: int,
    batch_size: int,
  ) -> list[Answer]:
    # Filled up with the last question, so that every batch has one shape.
    filled = questions + questions[-1:] * (batch_size - len(questions))
    question_ids = self._tokenizer.encode(filled)
    if index is None:
      retrieved = np.zeros((batch_size, 0), np.int32)
      doc_scores = np.zeros((batch_size, 1), np.float32)
    else:
      retrieved, embeddings = self.search(params, index, filled, num_retrieved)
      # Scored again from the float32 embeddings: an index may be lossy.
      doc_scores = np.einsum(
        "BR,BKR->BK", embeddings, index.embeddings[retrieved[:, :n_docs]]
      )
    doc_ids = retrieved[:, :n_docs]
    contexts, mask = self._context.contexts(question_ids, doc_ids)
    out = self._decode(params, doc_scores, contexts, mask)
    if jax.process_count() > 1:
      out = multihost_utils.process_allgather(out, tiled=True)
    out = {
      f.name: np.asarray(getattr(out, f.name)) for f in dataclasses.fields(out)
    }
    answers = []
    for b, question in enumerate(questions):
      size = int(out["mask"][b].sum())
      ids = out["tokens"][b, :size]
      prior = np.exp(out["doc_log_probs"][b])
      docs = [
        AnswerDoc(
          id=self._passages[int(row)].id,
          title=self._passages[int(row)].title,
          text=self._passages[int(row)].text,
          score=float(doc_scores[b, k]),
          prior=float(prior[k]),
          posterior=float(out["posterior"][b, k]),
          token_posteriors=tuple(out["token_posterior"][b, k, :size].tolist()),
        )
        for k, row in enumerate(doc_ids[b])
      ]
      log_probs = out["token_log_probs"][b, :size]
      answers.append(
        Answer(
          question=question,
          text=self._tokenizer.decode(ids),
          log_prob=float(log_probs.sum()),
          tokens=tuple(self._tokenizer.tokens(ids)),
          token_log_probs=tuple(log_probs.tolist()),
          docs=tuple(sorted(docs, key=lambda doc: -doc.prior)),
          question_cut=len(question_ids[b]) > self._longest_question,
          retrieved=tuple(retrieved[b].tolist()),
        )
      )
    return answers
