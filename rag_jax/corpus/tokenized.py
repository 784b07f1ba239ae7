"""Passages as token ids in one array, so that a batch is an integer gather.

In: passages and a tokenizer. Out: [P, L] ids, and how many were cut.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from rag_jax.corpus.passages import Passage
from rag_jax.corpus.tokenizer import Tokenizer


class TokenizedPassages:
  """Title, end token, text, end token of each passage, without a start token.

  Attributes:
    passages: what was tokenised.
    tokenizer: whose ids these are.
    tokens: ids, padded with the tokenizer's `pad_id`. [P, L - 1] int32; [P, L]
      if the tokenizer has no start token.
    begins_word: whether a token begins a word. Shape of `tokens`, bool
    lengths: real tokens a row. [P] int32
    num_cut: passages longer than `length`, whose last tokens were dropped.
  """

  def __init__(
    self, passages: Sequence[Passage], tokenizer: Tokenizer, length: int
  ):
    """Tokenizes `passages`; `length` (L) counts a start token as well."""
    self.passages = passages
    self.tokenizer = tokenizer
    width = length - (tokenizer.bos_id is not None)
    titles, title_words = tokenizer.encode_words([p.title for p in passages])
    texts, text_words = tokenizer.encode_words([p.text for p in passages])
    self.tokens = np.full((len(passages), width), tokenizer.pad_id, np.int32)
    self.lengths = np.zeros(len(passages), np.int32)
    self.begins_word = np.zeros(self.tokens.shape, bool)
    self._end = tokenizer.eos_id
    self.num_cut = 0
    end = [tokenizer.eos_id]
    for row, (title, text) in enumerate(zip(titles, texts, strict=True)):
      ids = (title + end if title else []) + text + end
      words = (title_words[row] + [True] if title else []) + text_words[row]
      if len(ids) > width:
        self.num_cut += 1
        ids = [*ids[: width - 1], tokenizer.eos_id]
      self.tokens[row, : len(ids)] = ids
      self.lengths[row] = len(ids)
      self.begins_word[row, : len(ids) - 1] = words[: len(ids) - 1]
      self.begins_word[row, len(ids) - 1] = True

  def titles(self) -> Iterator[list[int]]:
    """Yields the tokens of each title; passages without one are left out."""
    for row, length in zip(self.tokens, self.lengths, strict=True):
      ends = np.flatnonzero(row[:length] == self._end)
      if len(ends) > 1:
        yield row[: ends[0]].tolist()

  def __len__(self) -> int:
    return len(self.tokens)
