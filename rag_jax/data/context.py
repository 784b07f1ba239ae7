"""Questions and documents to the tokens that retriever and generator read.

In: token ids of questions and answers, rows of the passages. Out: padded
arrays with masks. The question comes first and is never cut for a passage;
what is cut is counted.

    context   <s> question </s> title </s> text </s>
    question  <s> question </s>
    passage   <s> title </s> text </s>
    target    answer </s>
"""

from collections.abc import Sequence

from jaxtyping import Int
import numpy as np

from rag_jax.config import DataConfig
from rag_jax.corpus.tokenized import TokenizedPassages
from rag_jax.corpus.tokenizer import Tokenizer
from rag_jax.data.substitution import Change
from rag_jax.data.substitution import substitute

Tokens = np.ndarray  # int32
Mask = np.ndarray  # bool


class ContextBuilder:
  """Builds padded token arrays of the lengths in the config.

  Attributes:
    counts: how many questions, contexts and targets were cut so far.
  """

  def __init__(
    self,
    tokenizer: Tokenizer,
    passages: TokenizedPassages,
    config: DataConfig,
  ):
    self._tokenizer = tokenizer
    self._passages = passages
    self._config = config
    self.counts = {"questions_cut": 0, "contexts_cut": 0, "targets_cut": 0}

  def _pad(
    self, rows: Sequence[Sequence[int]], length: int, counter: str
  ) -> tuple[Tokens, Mask]:
    """Returns rows [N, length] and their mask; cut rows keep the end token."""
    tokens = np.full((len(rows), length), self._tokenizer.pad_id, np.int32)
    mask = np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
      if len(row) > length:
        self.counts[counter] += 1
        row = [*row[: length - 1], self._tokenizer.eos_id]
      tokens[i, : len(row)] = row
      mask[i, : len(row)] = True
    return tokens, mask

  def questions(self, question_ids: Sequence[list[int]]) -> tuple[Tokens, Mask]:
    """Returns what the question tower reads, [B, Q]."""
    start, end = [self._tokenizer.bos_id], [self._tokenizer.eos_id]
    rows = [start + ids + end for ids in question_ids]
    return self._pad(rows, self._config.question_length, "questions_cut")

  def passages(self, rows: np.ndarray) -> tuple[Tokens, Mask]:
    """Returns what the passage tower reads, for passage numbers, [..., L]."""
    body = self._passages.tokens[rows]
    start = np.full((*body.shape[:-1], 1), self._tokenizer.bos_id, np.int32)
    tokens = np.concatenate([start, body], axis=-1)
    # With the start token, a row is one longer than its passage.
    lengths = self._passages.lengths[rows][..., None] + 1
    return tokens, np.arange(tokens.shape[-1]) < lengths

  def targets(self, answer_ids: Sequence[list[int]]) -> tuple[Tokens, Mask]:
    """Returns what the generator must write, [B, T]."""
    rows = [[*ids, self._tokenizer.eos_id] for ids in answer_ids]
    return self._pad(rows, self._config.target_length, "targets_cut")

  def contexts(
    self,
    question_ids: Sequence[list[int]],
    rows: Int[np.ndarray, "B K"],
    changes: Sequence[Change] | None = None,
  ) -> tuple[Tokens, Mask]:
    """Returns what the generator reads: [B, K, C].

    Args:
      question_ids: tokens of B questions.
      rows: passage numbers; K = 0 gives one context a question that holds the
        question alone.
      changes: what is put in the place of each question's answer.
    """
    length = self._config.context_length
    tokenizer = self._tokenizer
    n_docs = max(rows.shape[1], 1)
    tokens = np.full(
      (len(question_ids), n_docs, length), tokenizer.pad_id, np.int32
    )
    mask = np.zeros(tokens.shape, bool)
    for b, ids in enumerate(question_ids):
      if len(ids) > length - 2:
        self.counts["contexts_cut"] += 1
      head = [tokenizer.bos_id, *ids[: length - 2], tokenizer.eos_id]
      tokens[b, :, : len(head)] = head
      mask[b, :, : len(head)] = True
      room = length - len(head)
      for k, row in enumerate(rows[b].tolist()):
        body = substitute(self._passages, row, changes[b] if changes else None)
        if len(body) > room:
          self.counts["contexts_cut"] += 1
          body = body[:room]
        tokens[b, k, len(head) : len(head) + len(body)] = body
        mask[b, k, len(head) : len(head) + len(body)] = True
    return tokens, mask
