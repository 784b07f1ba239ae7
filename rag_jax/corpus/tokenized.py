"""Passages as token ids in one array, so that a batch is an integer gather.

In: passages and a tokenizer. Out: [P, L] ids, and how many were cut; in memory,
or mapped from the disk by `token_store.py`.
"""

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from absl import logging
import numpy as np

from rag_jax.corpus.passages import Passage
from rag_jax.corpus.tokenizer import Tokenizer

# What a row is made of: the ids of title and text, each tokenised alone; or
# the ids of "title</s>text</s>", tokenised as one string.
JoinedBy = Literal["ids", "text"]

_SAMPLE = 256  # passages on which the two are compared
_BLOCK_ROWS = 1024  # passages that are tokenised at once


class TokenRows(NamedTuple):
  """Rows of tokens; what they mean stands at `TokenizedPassages`."""

  tokens: np.ndarray  # [P, L - 1]
  begins_word: np.ndarray  # [P, L - 1] bool
  lengths: np.ndarray  # [P] int32
  num_cut: int
  num_by_ids: int  # rows that could not be joined as text
  # Tokens before rows were cut, and those that were cut off; None: not counted.
  num_tokens: int | None = None
  num_lost: int | None = None


def find_joining(passages: Sequence[Passage], tokenizer: Tokenizer) -> JoinedBy:
  """Returns how title and text are joined, so that ids are those of the text.

  "ids", if on a sample of the passages that gives the same as tokenising the
  joined text. SentencePiece may not: its first word of a string is another
  than the first word behind an end token. Then "text", which is logged.
  """
  count = min(len(passages), _SAMPLE)
  rows = np.linspace(0, len(passages) - 1, count).astype(int).tolist()
  sample = [passages[row] for row in rows]
  apart, _ = _by_ids(sample, tokenizer)
  joined, _ = _by_text(sample, apart, tokenizer)
  num_other = sum(
    row is not None and row != expected
    for row, expected in zip(joined, apart, strict=True)
  )
  if not num_other:
    return "ids"
  logging.warning(
    "Title and text have other ids together than apart in %d of %d passages,"
    " by their tokenizer: all passages are tokenised as one string of both,"
    " with the end token between them.",
    num_other,
    len(sample),
  )
  return "text"


def _by_ids(
  passages: Sequence[Passage], tokenizer: Tokenizer
) -> tuple[list[list[int]], list[list[bool]]]:
  """Returns ids and word begins of passages whose parts are joined by ids."""
  titles, title_words = tokenizer.encode_words([p.title for p in passages])
  texts, text_words = tokenizer.encode_words([p.text for p in passages])
  end = [tokenizer.eos_id]
  rows, words = [], []
  for i, title in enumerate(titles):
    rows.append((title + end if title else []) + texts[i] + end)
    begins = title_words[i] + [True] if title else []
    words.append(begins + text_words[i] + [True])
  return rows, words


def _by_text(
  passages: Sequence[Passage], apart: list[list[int]], tokenizer: Tokenizer
) -> tuple[list[list[int] | None], list[list[bool]]]:
  """Returns ids and word begins of passages that are tokenised as one string.

  None for one in which a special token is written, or whose end tokens are not
  read as such: it could end itself.

  Args:
    passages: of any length.
    apart: their ids, joined as `_by_ids` does: says which have a title.
    tokenizer: whose ids these are.
  """
  num_ends = [ids.count(tokenizer.eos_id) for ids in apart]
  joined, words = tokenizer.encode_joined(
    [
      [passage.title, passage.text][2 - count :]
      for passage, count in zip(passages, num_ends, strict=True)
    ]
  )
  rows = [
    ids
    if ids.count(tokenizer.eos_id) == count
    and ids[-1] == tokenizer.eos_id
    and not tokenizer.holds_special(passage.title + passage.text)
    else None
    for passage, ids, count in zip(passages, joined, num_ends, strict=True)
  ]
  return rows, words


def tokenize_rows(
  passages: Sequence[Passage],
  tokenizer: Tokenizer,
  length: int,
  joined_by: JoinedBy,
) -> TokenRows:
  """Returns the rows of `passages`, of which `find_joining` said how.

  A passage in which a special token is written, and one whose end tokens are
  not read as such, is joined by ids all the same, or it could end itself.
  """
  rows, words = _by_ids(passages, tokenizer)
  num_by_ids = 0
  if joined_by == "text":
    joined, joined_words = _by_text(passages, rows, tokenizer)
    num_by_ids = joined.count(None)
    for i, ids in enumerate(joined):
      if ids is not None:
        rows[i], words[i] = ids, joined_words[i]
  width = length - (tokenizer.bos_id is not None)
  tokens = np.full((len(passages), width), tokenizer.pad_id, np.int32)
  begins_word = np.zeros(tokens.shape, bool)
  lengths = np.zeros(len(passages), np.int32)
  num_cut = num_lost = 0
  for i, ids in enumerate(rows):
    size = len(ids)
    if size > width:
      num_cut += 1
      num_lost += size - width
      size = width
      ids = [*ids[: width - 1], tokenizer.eos_id]
    tokens[i, :size] = ids
    lengths[i] = size
    begins_word[i, : size - 1] = words[i][: size - 1]
    begins_word[i, size - 1] = True
  return TokenRows(
    tokens,
    begins_word,
    lengths,
    num_cut,
    num_by_ids,
    num_tokens=sum(map(len, rows)),
    num_lost=num_lost,
  )


class TokenizedPassages:
  """Title, end token, text, end token of each passage, without a start token.

  Attributes:
    passages: what was tokenised.
    tokenizer: whose ids these are.
    tokens: ids, padded with the tokenizer's `pad_id`. [P, L - 1] int32, or on
      the disk uint16 where the ids fit; [P, L] if the tokenizer has no start
      token.
    begins_word: whether a token begins a word. Shape of `tokens`, bool
    lengths: real tokens a row. [P] int32
    num_cut: passages longer than `length`, whose last tokens were dropped.
    num_tokens: of all passages, before any was cut; None: not counted, by an
      older version that wrote them.
    num_lost: of these, what was dropped.
    joined_by: how title and text were joined; see `find_joining`.
  """

  def __init__(
    self, passages: Sequence[Passage], tokenizer: Tokenizer, length: int
  ):
    """Tokenizes `passages`; `length` (L) counts a start token as well."""
    joined_by = find_joining(passages, tokenizer)
    starts = range(0, len(passages), _BLOCK_ROWS) or [0]
    blocks = [
      tokenize_rows(
        passages[start : start + _BLOCK_ROWS], tokenizer, length, joined_by
      )
      for start in starts
    ]
    rows = TokenRows(
      tokens=np.concatenate([block.tokens for block in blocks]),
      begins_word=np.concatenate([block.begins_word for block in blocks]),
      lengths=np.concatenate([block.lengths for block in blocks]),
      num_cut=sum(block.num_cut for block in blocks),
      num_by_ids=sum(block.num_by_ids for block in blocks),
      num_tokens=sum(block.num_tokens or 0 for block in blocks),
      num_lost=sum(block.num_lost or 0 for block in blocks),
    )
    self._keep(passages, tokenizer, rows, joined_by)

  def _keep(
    self,
    passages: Sequence[Passage],
    tokenizer: Tokenizer,
    rows: TokenRows,
    joined_by: JoinedBy,
  ) -> None:
    self.passages = passages
    self.tokenizer = tokenizer
    self.tokens = rows.tokens
    self.begins_word = rows.begins_word
    self.lengths = rows.lengths
    self.num_cut = rows.num_cut
    self.num_tokens = rows.num_tokens
    self.num_lost = rows.num_lost
    self.joined_by: JoinedBy = joined_by
    self._end = tokenizer.eos_id

  @classmethod
  def of_rows(
    cls,
    passages: Sequence[Passage],
    tokenizer: Tokenizer,
    rows: TokenRows,
    joined_by: JoinedBy,
  ) -> "TokenizedPassages":
    """Returns what was tokenised before: `rows`, perhaps on the disk."""
    tokenized = cls.__new__(cls)
    tokenized._keep(passages, tokenizer, rows, joined_by)
    return tokenized

  def titles(self, most: int = 0) -> Iterator[list[int]]:
    """Yields the tokens of each title; passages without one are left out.

    Args:
      most: passages that are looked at, evenly spaced; 0: all.
    """
    step = -(-len(self) // most) if most else 1
    step = max(step, 1)
    for row, length in zip(
      self.tokens[::step], self.lengths[::step], strict=True
    ):
      ends = np.flatnonzero(row[:length] == self._end)
      if len(ends) > 1:
        yield row[: ends[0]].tolist()

  def __len__(self) -> int:
    return len(self.tokens)
