"""Tokenizes passages into one array of ids, from which batches are gathered.

In: passages and a tokenizer. Out: [P, L] ids, and how many passages were cut;
in memory, or mapped from the disk by `token_store.py`.
"""

from collections.abc import Iterator, Sequence
import dataclasses
from typing import Literal, NamedTuple

from absl import logging
import numpy as np

from rag_jax.config_models import EncoderConfig
from rag_jax.corpus.passages import Passage
from rag_jax.corpus.tokenizer import Tokenizer

# "ids": title and text are tokenised separately. "text": "title</s>text</s>" is
# tokenised as one string.
JoinedBy = Literal["ids", "text"]

_SAMPLE = 256  # passages on which the two are compared
_BLOCK_ROWS = 1024  # passages tokenised at a time


@dataclasses.dataclass(frozen=True, slots=True)
class Wording:
  """How a retriever's encoder reads questions and passages, as texts.

  Attributes:
    question_prompt: stands before every question.
    passage_prompt: stands before every passage.
    title_sep: between title and text; "": the end token.
  """

  question_prompt: str = ""
  passage_prompt: str = ""
  title_sep: str = ""

  @classmethod
  def of(cls, e: EncoderConfig) -> "Wording":
    """Returns that of a config."""
    return cls(e.question_prompt, e.passage_prompt, e.title_sep)

  @property
  def of_passages(self) -> tuple[str, str]:
    """What changes passages."""
    return self.passage_prompt, self.title_sep

  def questions(self, questions: Sequence[str]) -> list[str]:
    """Returns the texts to tokenise."""
    return [self.question_prompt + question for question in questions]

  def passages(self, passages: Sequence[Passage]) -> Sequence[Passage]:
    """Returns passages with the title and text to tokenise.

    The prompt is part of the text after it, so that the ids are those of one
    string: SentencePiece marks words by the space before them.
    """
    if self.of_passages == ("", ""):
      return passages
    return [self._passage(passage) for passage in passages]

  def _passage(self, passage: Passage) -> Passage:
    title, text = passage.title, passage.text
    if title and self.title_sep:
      title, text = "", f"{title}{self.title_sep}{text}"
    if title:
      title = self.passage_prompt + title
    else:
      text = self.passage_prompt + text
    return dataclasses.replace(passage, title=title, text=text)


PLAIN = Wording()


class TokenRows(NamedTuple):
  """Rows of tokens, as described at `TokenizedPassages`."""

  tokens: np.ndarray  # [P, L - 1]
  begins_word: np.ndarray  # [P, L - 1] bool
  lengths: np.ndarray  # [P] int32
  num_cut: int
  num_by_ids: int  # rows that could not be joined as text
  # Tokens before rows were cut, and tokens cut off; None if not counted.
  num_tokens: int | None = None
  num_lost: int | None = None


def find_joining(
  passages: Sequence[Passage], tokenizer: Tokenizer, wording: Wording = PLAIN
) -> JoinedBy:
  """Returns how to join title and text, so that the ids fit the joined text.

  This is "ids", if that gives the same as "text" on a sample of the passages.
  SentencePiece may give other ids, since it marks the first word of a string,
  but not the first word after an end token. The result is then "text", which is
  logged.
  """
  count = min(len(passages), _SAMPLE)
  rows = np.linspace(0, len(passages) - 1, count).astype(int).tolist()
  sample = wording.passages([passages[row] for row in rows])
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
  """Returns the ids, and where words begin, of passages joined by ids."""
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
  """Returns the ids, and where words begin, of passages joined as text.

  The ids are None for a passage that holds the text of a special token, or
  whose end tokens are not tokenised as such: the passage could end early.

  Args:
    passages: of any length.
    apart: their ids joined by `_by_ids`, which tell which ones have a title.
    tokenizer: for the ids.
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
  wording: Wording = PLAIN,
) -> TokenRows:
  """Returns the rows of `passages`, joined as `find_joining` said.

  A passage that cannot be joined as text is joined by ids: see `_by_text`.
  """
  passages = wording.passages(passages)
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

  Unless its `Wording` says otherwise.

  Attributes:
    passages: the passages that were tokenised.
    tokenizer: the tokenizer that made the ids.
    tokens: ids, padded with the tokenizer's `pad_id`. [P, L - 1] int32; on the
      disk uint16 if the ids fit; [P, L] if the tokenizer has no start token.
    begins_word: whether a token begins a word. Shape of `tokens`, bool.
    lengths: number of real tokens per row. [P] int32
    num_cut: passages longer than `length`, whose last tokens were dropped.
    num_tokens: tokens of all passages before cutting; None if an older version
      wrote the rows and did not count.
    num_lost: tokens that were dropped; None like `num_tokens`.
    joined_by: how title and text were joined; see `find_joining`.
  """

  def __init__(
    self,
    passages: Sequence[Passage],
    tokenizer: Tokenizer,
    length: int,
    wording: Wording = PLAIN,
  ):
    """Tokenizes `passages`; `length` (L) includes the start token."""
    joined_by = find_joining(passages, tokenizer, wording)
    blocks = [
      tokenize_rows(
        passages[start : start + _BLOCK_ROWS],
        tokenizer,
        length,
        joined_by,
        wording,
      )
      for start in range(0, len(passages), _BLOCK_ROWS) or [0]
    ]
    tokens, words, lengths, *counts = zip(*blocks, strict=True)
    rows = TokenRows(
      np.concatenate(tokens),
      np.concatenate(words),
      np.concatenate(lengths),
      *map(sum, counts),
    )
    self._set(passages, tokenizer, rows, joined_by)

  def _set(
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

  @classmethod
  def of_rows(
    cls,
    passages: Sequence[Passage],
    tokenizer: Tokenizer,
    rows: TokenRows,
    joined_by: JoinedBy,
  ) -> "TokenizedPassages":
    """Returns passages whose `rows` exist already, perhaps on the disk."""
    tokenized = cls.__new__(cls)
    tokenized._set(passages, tokenizer, rows, joined_by)
    return tokenized

  @classmethod
  def without_rows(
    cls, passages: Sequence[Passage], tokenizer: Tokenizer
  ) -> "TokenizedPassages":
    """Returns passages without tokens, for when only their texts are used."""
    empty = np.zeros((0, 1), np.int32)
    rows = TokenRows(empty, empty.astype(bool), empty[:, 0], 0, 0)
    return cls.of_rows(passages, tokenizer, rows, "ids")

  def titles(self, most: int = 0) -> Iterator[list[int]]:
    """Yields the tokens of each title; passages without a title are skipped.

    Args:
      most: how many evenly spaced passages to look at; 0 means all.
    """
    step = max(-(-len(self) // most), 1) if most else 1
    for row, length in zip(
      self.tokens[::step], self.lengths[::step], strict=True
    ):
      ends = np.flatnonzero(row[:length] == self.tokenizer.eos_id)
      if len(ends) > 1:
        yield row[: ends[0]].tolist()

  def __len__(self) -> int:
    return len(self.tokens)
