"""Questions that follow other turns of a dialogue.

In: a question, and what was said before it. Out: the text that a model reads,
or its tokens, which know where the question begins:

    turn separator turn separator question        each after its speaker's name

The one who asks and the one who answers speak in turn, so the speakers follow
from the order: the last turn before a question is an answer. Where a dialogue
is too long, its beginning goes: whole turns, then the start of the oldest one
that remains. A question is cut only when no turn is left before it.
"""

import bisect
from collections.abc import Callable, Sequence
import dataclasses

from rag_jax.config import DialogueConfig
from rag_jax.corpus.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, slots=True)
class Asked:
  """A question, and the earlier turns of its dialogue, the oldest first."""

  question: str
  history: tuple[str, ...] = ()

  @classmethod
  def of(cls, question: "str | Asked") -> "Asked":
    """Returns a question; a text has no history."""
    if isinstance(question, str):
      return cls(question)
    return cls(question.question, question.history)

  @property
  def said(self) -> str:
    """All of the dialogue, a turn in a line."""
    return "\n".join((*self.history, self.question))


class TurnIds(list[int]):
  """Token ids of a question that follows other turns.

  Attributes:
    head: ids at the start that stand before the earlier turns: a prompt.
    before: how many ids after these are of earlier turns.
    turns: texts of the earlier turns that are read but are not among the ids.
  """

  def __init__(
    self,
    ids: Sequence[int],
    *,
    head: int = 0,
    before: int = 0,
    turns: tuple[str, ...] = (),
  ):
    super().__init__(ids)
    self.head, self.before, self.turns = head, before, turns

  def without(self, number: int) -> list[int]:
    """Returns the ids without the first `number` of earlier turns."""
    gone = min(number, self.before)
    return [*self[: self.head], *self[self.head + gone :]]

  def fitted(self, room: int, most: int = 0) -> list[int]:
    """Returns the ids without those of earlier turns that do not fit.

    More than `room` are left if the question alone has more.

    Args:
      room: the most ids.
      most: of them, of earlier turns; 0: any number.
    """
    gone = max(len(self) - room, 0)
    return self.without(max(gone, self.before - most) if most else gone)

  def longest(
    self, fits: Callable[[list[int]], bool], most: int = 0
  ) -> list[int]:
    """Returns the ids with as many of earlier turns as fit.

    Args:
      fits: whether ids do; if some do, fewer of earlier turns do too.
      most: of earlier turns; 0: any number.
    """
    least = max(self.before - most, 0) if most else 0
    tried = range(least, self.before)
    gone = bisect.bisect_left(
      tried, True, key=lambda number: fits(self.without(number))
    )
    return self.without(least + gone)


def own_length(ids: Sequence[int]) -> int:
  """Returns how many ids a question has, without those of earlier turns."""
  return len(ids) - (ids.before if isinstance(ids, TurnIds) else 0)


class DialogueText:
  """Writes dialogues as one text, in the way that the config describes."""

  def __init__(
    self, config: DialogueConfig | None = None, context_length: int = 0
  ):
    """Prepares to write.

    Args:
      config: None is the default.
      context_length: of the generator; 0: earlier turns may have any length.
    """
    config = config or DialogueConfig()
    self._user, self._assistant = config.user, config.assistant
    self._separator = config.separator
    self.generator_turns = config.turns
    self.retriever_turns = config.turns
    if config.retriever_turns >= 0:
      self.retriever_turns = config.retriever_turns
    self.history_length = config.history_length or context_length // 2

  def before(self, turns: Sequence[str]) -> str:
    """Returns the text before a question."""
    last = len(turns) - 1
    return "".join(
      (self._user if (last - i) % 2 else self._assistant)
      + turn
      + self._separator
      for i, turn in enumerate(turns)
    )

  def text(self, question: str, turns: Sequence[str] = ()) -> str:
    """Returns the question after the earlier turns."""
    return self.before(turns) + self._user + question

  def encode(
    self,
    tokenizer: Tokenizer,
    questions: Sequence[str | Asked],
    num_turns: int,
    prompt: str = "",
  ) -> list[list[int]]:
    """Returns the ids of dialogues; those with earlier turns are `TurnIds`.

    Args:
      tokenizer: of the model that reads them.
      questions: with their histories.
      num_turns: the most earlier turns of each; -1: all.
      prompt: stands before every dialogue.
    """
    asked = [Asked.of(question) for question in questions]
    befores = [prompt + self.before(last(a.history, num_turns)) for a in asked]
    texts = [
      before + self._user + a.question
      for before, a in zip(befores, asked, strict=True)
    ]
    ids = tokenizer.encode(texts)
    rows = [row for row, text in enumerate(befores) if text != prompt]
    ends = tokenizer.token_ends([texts[row] for row in rows])
    for row, places in zip(rows, ends, strict=True):
      head = sum(end <= len(prompt.rstrip(" ")) for end in places)
      # A space before the question is part of its first word.
      begin = len(befores[row].rstrip(" "))
      before = sum(end <= begin for end in places) - head
      ids[row] = TurnIds(ids[row], head=head, before=before)
    return ids


def last(turns: Sequence[str], number: int) -> tuple[str, ...]:
  """Returns the last `number` turns; -1: all."""
  start = 0 if number < 0 else max(len(turns) - number, 0)
  return tuple(turns[start:])


def without_start(
  turns: Sequence[str], ends: Sequence[Sequence[int]], number: int
) -> tuple[str, ...]:
  """Returns turns without their first `number` tokens.

  Args:
    turns: the oldest first.
    ends: where the tokens of each turn end, as `Tokenizer.token_ends` says.
    number: of tokens.
  """
  kept = []
  for turn, places in zip(turns, ends, strict=True):
    if number < len(places):
      rest = turn[places[number - 1] :].lstrip() if number else turn
      kept += [rest] if rest else []
      number = 0
    else:
      number -= len(places)
  return tuple(kept)
