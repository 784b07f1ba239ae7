"""Questions as text to answers as text, each with its documents.

In: questions, parameters, an index. Out: one `Answer` per question: the text,
its log-probability, and the documents with prior and posterior.

The devices of a mesh share each batch. Of several processes each searches for
its own rows of the batch, and all of them get all answers.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any

import jax
from jaxtyping import Float, Int, PyTree
import numpy as np

from rag_jax.data.dialogue import Asked
from rag_jax.data.experiment import Experiment
from rag_jax.decoding.posteriors import explain_docs
from rag_jax.decoding.posteriors import log_softmax
from rag_jax.decoding.rag import RagDecoder
from rag_jax.decoding.ranking import Generated
from rag_jax.decoding.settings import GenerationSettings
from rag_jax.decoding.streaming import can_stream
from rag_jax.decoding.streaming import stream
from rag_jax.models.hybrid import HybridWeights
from rag_jax.models.hybrid import hybrid_scores
from rag_jax.models.hybrid import learned_weights
from rag_jax.models.partitioning import batch_shards
from rag_jax.models.partitioning import place_batch
from rag_jax.models.partitioning import process_rows
from rag_jax.processes import join_rows
from rag_jax.processes import to_host
from rag_jax.retrieval.index import Index
from rag_jax.retrieval.retriever import find_docs
from rag_jax.retrieval.retriever import padded_length
from rag_jax.search.reranker import Reranker
from rag_jax.search.reranker import open_reranker
from rag_jax.weights.generation_settings import settings_of

# Questions of up to this many tokens are padded to one length, so that one
# compiled program serves all of them.
_ONE_LENGTH = 64


@dataclasses.dataclass(frozen=True, slots=True)
class AnswerDoc:
  """A passage that was read for an answer."""

  id: str
  title: str
  text: str
  # Inner product of question and passage; with index.hybrid, the weighted sum
  # of it and the BM25 score; with rerank.prior="reranker", and in the mode
  # "single" with any reranker, its logit.
  score: float
  prior: float  # p(z|x), over the documents read
  # p(z|x,y), if one document explains the whole answer. In the modes "fid" and
  # "concatenate" all documents are read at once, and this is the prior.
  posterior: float
  token_posteriors: tuple[float, ...]  # p(z|x,y_t) of each token


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
  """The model's answer to a question, with the passages that it read."""

  question: str
  text: str
  log_prob: float  # log p(y|x), nats, with the end token
  tokens: tuple[str, ...]  # of the answer; the last is the end token
  token_log_probs: tuple[float, ...]  # nats
  docs: tuple[AnswerDoc, ...]  # best prior first; empty for closed book
  question_cut: bool  # it was longer than the encoder or generator reads
  # Passage numbers, best first, including those not read.
  retrieved: tuple[int, ...]
  # Each label and its probability among them, the most likely first; (): the
  # answer was written, not chosen.
  labels: tuple[tuple[str, float], ...] = ()


class Answerer:
  """Retrieves, reads and writes, in batches of one shape.

  Attributes:
    reranker: chooses the documents from those that are retrieved; None: they
      are the first.
  """

  def __init__(
    self,
    experiment: Experiment,
    decoder: RagDecoder | None = None,
    reranker: Reranker | None = None,
  ):
    """Prepares to answer.

    Args:
      experiment: its passages are read.
      decoder: writes the answers; None means the decoder that the config of
        the experiment describes.
      reranker: None means the one that the config names, if any.
    """
    config = experiment.config
    self.reranker = reranker or open_reranker(config.rerank)
    self._tokenizer = experiment.tokenizer
    self._passages = experiment.passages
    self._context = experiment.context
    self._embedder = experiment.embedder
    self._bm25 = experiment.bm25
    self._mesh = experiment.mesh
    self._decode = decoder or make_decoder(experiment)
    is_prompt = config.data.context_style == "prompt"
    self._stop = config.prompt.stop if is_prompt else ""

  def embed(
    self, params: PyTree, questions: Sequence[str | Asked]
  ) -> Float[np.ndarray, "B R"]:
    """Returns the embedding of each question."""
    question_ids, _ = self._context.encode_questions(questions)
    tokens, mask = self._context.questions(question_ids)
    if tokens.shape[1] > _ONE_LENGTH:
      longest = int(mask.sum(axis=1).max(initial=1))
      width = padded_length(longest, tokens.shape[1])
      tokens, mask = tokens[:, :width], mask[:, :width]
    retriever = {k: v for k, v in params.items() if k != "generator"}
    # Filled up with the last question, so that the devices get equal shares.
    num, shards = len(questions), batch_shards(self._mesh)
    filled = np.minimum(np.arange(-(-num // shards) * shards), num - 1)
    inputs = self._spread((tokens[filled], mask[filled]), len(filled))
    return self._embedder.questions(retriever, *inputs)[:num]

  def search(
    self,
    params: PyTree,
    index: Index,
    questions: Sequence[str | Asked],
    n_docs: int,
  ) -> tuple[Int[np.ndarray, "B K"], Float[np.ndarray, "B R"]]:
    """Returns the passage numbers of each question, and its embedding.

    They are those of the retriever alone, best first.
    """
    embeddings = self.embed(params, questions)
    rows = self._rows(index, len(questions))
    words = self._context.words(questions)
    found = find_docs(
      index,
      self._bm25,
      params,
      embeddings[rows],
      [words[int(row)] for row in rows],
      n_docs,
    )
    return self._join(found, rows, len(questions)), embeddings

  @property
  def _scored_by_reranker(self) -> bool:
    """Whether scores of documents are logits; "single" reads the highest."""
    single = self._decode.mode == "single"
    prior = self.reranker.config.prior if self.reranker else ""
    return prior == "reranker" or (bool(prior) and single)

  def _retrieve(
    self,
    params: PyTree,
    index: Index,
    questions: Sequence[str | Asked],
    num_retrieved: int,
  ) -> tuple[
    Int[np.ndarray, "B r"], Float[np.ndarray, "B R"], Float[np.ndarray, "B n"]
  ]:
    """Returns passage numbers, best first, question embeddings, and logits.

    Without a reranker they are those of `search`, and there are no logits.
    """
    none = np.zeros((len(questions), 0), np.float32)
    if self.reranker is None:
      return *self.search(params, index, questions, num_retrieved), none
    n = min(self.reranker.config.candidates, len(self._passages))
    num, depth = len(questions), max(n, num_retrieved)
    found, embeddings = self.search(params, index, questions, depth)
    spread = self._is_spread(num)
    rows = process_rows(self._mesh, num) if spread else np.arange(num)
    texts = self._texts_of_pairs(questions)
    asked = [texts[int(row)] for row in rows]
    ranked = self.reranker.rank(asked, found[rows, :n], self._passages)
    ids, logits = (self._join(part, rows, num) for part in ranked)
    ids = np.concatenate([ids, found[:, n:]], axis=1)
    return ids[:, :num_retrieved], embeddings, logits

  def _texts_of_pairs(self, questions: Sequence[str | Asked]) -> list[str]:
    """Returns what the reranker reads: of a dialogue, its last lines."""
    assert self.reranker is not None
    texts = self._context.words(questions)
    return [
      self.reranker.last_lines(text) if Asked.of(asked).history else text
      for asked, text in zip(questions, texts, strict=True)
    ]

  def _rows(self, index: Index, num_rows: int) -> Int[np.ndarray, "b"]:
    """Returns the rows of a batch that this process searches for."""
    if index.collective or not self._is_spread(num_rows):
      return np.arange(num_rows)
    return process_rows(self._mesh, num_rows)

  def _join(
    self, local: np.ndarray, rows: Int[np.ndarray, "b"], num_rows: int
  ) -> np.ndarray:
    """Returns all rows of a batch, of which this process has `rows`."""
    if not self._is_spread(num_rows) or len(rows) == num_rows:
      return local
    return join_rows(local, rows, num_rows)

  def _is_spread(self, num_rows: int) -> bool:
    """Returns whether the devices of the mesh share a batch of this size."""
    return self._mesh.size > 1 and num_rows % batch_shards(self._mesh) == 0

  def _spread(self, batch: PyTree, num_rows: int) -> PyTree:
    """Returns arrays on the devices that share them, or as they are."""
    if not self._is_spread(num_rows):
      return batch
    rows = process_rows(self._mesh, num_rows)
    local = jax.tree.map(lambda x: x[rows], batch)
    return place_batch(local, self._mesh, num_rows)

  def best_scores(
    self,
    params: PyTree,
    index: Index,
    questions: Sequence[str | Asked],
    batch_size: int,
  ) -> Float[np.ndarray, "N"]:
    """Returns the score of each question's best passage.

    Args:
      params: of the whole model.
      index: is searched.
      questions: N, any number.
      batch_size: questions searched together.
    """
    scores = np.zeros(len(questions), np.float32)
    for start in range(0, len(questions), batch_size):
      part = list(questions[start : start + batch_size])
      filled = part + part[-1:] * (batch_size - len(part))
      found, embeddings = self.search(params, index, filled, 1)
      best = self._score(params, index, filled, embeddings, found)[:, 0]
      scores[start : start + len(part)] = best[: len(part)]
    return scores

  def answer(
    self,
    params: PyTree,
    index: Index | None,
    questions: Sequence[str | Asked],
    *,
    n_docs: int,
    num_retrieved: int = 0,
    batch_size: int = 1,
    on_text: Callable[[str], None] | None = None,
    choose_docs: Callable[[np.ndarray], np.ndarray] | None = None,
    labels: Sequence[str] = (),
  ) -> list[Answer]:
    """Returns the answer to each question, in their order.

    Args:
      params: of the whole model.
      index: is searched; None for a closed-book model.
      questions: any number; in a dialogue, with the earlier turns.
      n_docs: documents read per question.
      num_retrieved: passages retrieved per question, if more than `n_docs`: to
        measure recall at a greater depth than the model reads.
      batch_size: questions decoded together. Each value compiles once.
      on_text: called with the answer to the first question of a batch as far
        as it is written, after each token; not at all where a token is known
        only once the answer has ended: beam search, RAG-Sequence.
      choose_docs: retrieved passages [B, R], best first -> those that are read
        [B, K]; None: the first.
      labels: the possible answers, of which the most likely is chosen, by
        p(y|x) with its end token; (): an answer is written.

    Raises:
      ValueError: labels are fewer than 2, the same, or too long; or `n_docs` is
        above the candidates of the reranker.
    """
    if self.reranker is not None and index is not None:
      self.reranker.candidates_for(n_docs)
    encoded = self.encode_labels(labels) if labels else {}
    answers = []
    for start in range(0, len(questions), batch_size):
      part = list(questions[start : start + batch_size])
      answers += self._answer_batch(
        *(params, index, part, n_docs, max(num_retrieved, n_docs), batch_size),
        on_text=on_text,
        choose_docs=choose_docs,
        labels=encoded,
      )
    return answers

  def encode_labels(self, labels: Sequence[str]) -> dict[tuple[int, ...], str]:
    """Returns the labels by their tokens, with the end token."""
    context = self._context
    ids = context.encode_answers(labels)
    with context.counting() as cut:
      tokens, mask = context.targets(ids)
    if cut["targets_cut"]:
      longest = max(zip(map(len, ids), labels, strict=True))[1]
      raise ValueError(
        f"The label {longest!r} is longer than an answer of {tokens.shape[1]}"
        " tokens with its end token, data.target_length. Expected shorter"
        " labels. Shorten it, as in training."
      )
    end, stop = self._tokenizer.eos_id, context.stop_ids
    encoded = {}
    for label, row, real in zip(labels, tokens, mask, strict=True):
      *start, _ = row[real].tolist()
      encoded[(*start, stop[0] if stop else end)] = label
    if len(encoded) < max(len(labels), 2):
      raise ValueError(
        f"The labels {', '.join(map(repr, labels))} are {len(encoded)} that the"
        " tokenizer tells apart; expected 2 or more, all different. Correct"
        " them."
      )
    return encoded

  def _write(
    self,
    inputs: tuple[PyTree, Any, Any, Any],
    num_shared: int,
    on_text: Callable[[str], None] | None,
    labels: Sequence[tuple[int, ...]] = (),
  ) -> Generated:
    """Returns what the decoder makes of `inputs`; says what it writes."""
    if labels:
      return self._decode.score(*inputs, labels, num_shared=num_shared)
    if on_text is None or not can_stream(self._decode):
      return self._decode(*inputs, num_shared=num_shared)
    steps, ids = stream(self._decode, *inputs, num_shared=num_shared), []
    while True:
      try:
        ids.append(int(next(steps)[0, 0]))
      except StopIteration as end:
        return end.value
      on_text(self._text(ids))

  def _text(self, ids: Sequence[int] | np.ndarray) -> str:
    """Returns the text of an answer, which may end in the middle of a token."""
    text = self._tokenizer.decode(ids)
    return text.partition(self._stop)[0].strip() if self._stop else text

  def _score(
    self,
    params: PyTree,
    index: Index,
    questions: Sequence[str | Asked],
    embeddings: Float[np.ndarray, "B R"],
    doc_ids: Int[np.ndarray, "B K"],
  ) -> Float[np.ndarray, "B K"]:
    """Returns doc_scores as the model computes them in training."""
    num_rows = len(questions)
    rows = self._rows(index, num_rows)
    docs = doc_ids[rows]
    # From the float32 embeddings: the scores of an index may be quantised.
    scores = np.einsum("BR,BKR->BK", embeddings[rows], index.embeddings[docs])
    weights = learned_weights(params)
    if weights is None:
      return self._join(scores, rows, num_rows)
    assert self._bm25 is not None
    words = self._context.words(questions)
    bm25_scores = self._bm25.score([words[int(row)] for row in rows], docs)
    # Numbers, because other processes compute this for other rows.
    weights = HybridWeights(*map(float, weights))
    scores = np.asarray(hybrid_scores(weights, scores, bm25_scores))
    return self._join(scores, rows, num_rows)

  def _answer_batch(
    self,
    params: PyTree,
    index: Index | None,
    questions: list[str | Asked],
    n_docs: int,
    num_retrieved: int,
    batch_size: int,
    on_text: Callable[[str], None] | None,
    choose_docs: Callable[[np.ndarray], np.ndarray] | None,
    labels: Mapping[tuple[int, ...], str],
  ) -> list[Answer]:
    # Filled up with the last question, so that every batch has one shape.
    filled = questions + questions[-1:] * (batch_size - len(questions))
    question_ids, context_ids = self._context.encode_questions(filled)
    if index is None:
      retrieved = doc_ids = np.zeros((batch_size, 0), np.int32)
      doc_scores = np.zeros((batch_size, 1), np.float32)
    else:
      retrieved, embeddings, logits = self._retrieve(
        params, index, filled, num_retrieved
      )
      doc_ids = (choose_docs or (lambda docs: docs[:, :n_docs]))(retrieved)
      if not self._scored_by_reranker:
        doc_scores = self._score(params, index, filled, embeddings, doc_ids)
      elif choose_docs is None:
        doc_scores = logits[:, :n_docs]
      else:
        assert self.reranker is not None
        asked = self._texts_of_pairs(filled)
        doc_scores = self.reranker.logits(asked, doc_ids, self._passages)
    contexts, mask = self._context.contexts(context_ids, doc_ids)
    batch: Any = doc_scores, contexts, mask
    if on_text is None:
      batch = self._spread(batch, batch_size)
    out = self._write(
      (params, batch[0], batch[1], batch[2]),
      self._context.num_shared(contexts),
      on_text,
      list(labels),
    )
    chosen: list[tuple[tuple[str, float], ...]] = [()] * batch_size
    if labels:
      chosen = _by_label(out, labels)
    tokens, lengths, log_probs, given = (
      to_host(x)[:, 0]  # the best of each question
      for x in (out.tokens, out.lengths, out.log_probs, out.token_log_probs)
    )
    explained = explain_docs(doc_scores, given, self._decode.mode)
    answers = []
    for b, question in enumerate(questions):
      size = int(lengths[b])
      ids = tokens[b, :size]
      docs = [
        AnswerDoc(
          id=self._passages[int(row)].id,
          title=self._passages[int(row)].title,
          text=self._passages[int(row)].text,
          score=float(doc_scores[b, k]),
          prior=float(explained.prior[b, k]),
          posterior=float(explained.posterior[b, k]),
          token_posteriors=tuple(
            explained.token_posterior[b, k, :size].tolist()
          ),
        )
        for k, row in enumerate(doc_ids[b])
      ]
      answers.append(
        Answer(
          question=Asked.of(question).question,
          text=chosen[b][0][0] if labels else self._text(ids),
          log_prob=float(log_probs[b]),
          tokens=tuple(self._tokenizer.tokens(ids)),
          token_log_probs=tuple(explained.token_log_probs[b, :size].tolist()),
          docs=tuple(sorted(docs, key=lambda doc: -doc.prior)),
          question_cut=self._context.is_cut(question_ids[b], context_ids[b]),
          retrieved=tuple(retrieved[b].tolist()),
          labels=chosen[b],
        )
      )
    return answers


def _by_label(
  out: Generated, labels: Mapping[tuple[int, ...], str]
) -> list[tuple[tuple[str, float], ...]]:
  """Returns the labels of each question with their probabilities."""
  tokens, lengths, log_probs = (
    to_host(x) for x in (out.tokens, out.lengths, out.log_probs)
  )
  probs = np.exp(log_softmax(log_probs, axis=1))
  return [
    tuple(
      (labels[tuple(ids[:size].tolist())], float(p))
      for ids, size, p in zip(*row, strict=True)
    )
    for row in zip(tokens, lengths, probs, strict=True)
  ]


def make_decoder(experiment: Experiment) -> RagDecoder:
  """Returns the decoder that the config of `experiment` describes."""
  config, tokenizer = experiment.config, experiment.tokenizer
  generator = experiment.model.generator
  settings = GenerationSettings.from_dict(
    {
      "eos_token_id": tokenizer.eos_id,
      "pad_token_id": tokenizer.pad_id,
    }
    | settings_of(config),
    "decoding.generation_config",
  )
  if tokenizer.eos_id not in settings.eos_token_id:
    # Training ends its targets with this token.
    ends = (*settings.eos_token_id, tokenizer.eos_id)
    settings = dataclasses.replace(settings, eos_token_id=ends)
  ends = dict.fromkeys((*settings.eos_token_id, *experiment.context.stop_ids))
  settings = dataclasses.replace(
    settings, eos_token_id=tuple(ends), num_return_sequences=1
  )
  mode = config.decoding.mode
  return RagDecoder(
    generator, settings, config.loss if mode == "auto" else mode
  )
