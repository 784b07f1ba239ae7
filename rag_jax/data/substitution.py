"""Answers changed in the passages too, so that only reading finds them.

In: training questions with their answers, documents retrieved for them. Out:
for some of the questions another answer, to be put in the place of the true one
wherever the documents say it: for a name the title of any passage, since there
are far more of them than answers; for a number another of its relation.

A generator that sees each entity many times learns its answers by heart and
reads no more; one whose passages change has to read. Longpre et al. 2021,
https://arxiv.org/abs/2109.05052, section 5.
"""

from collections.abc import Sequence
import functools

from jaxtyping import Int
import numpy as np

from rag_jax.corpus.folding import fold
from rag_jax.corpus.tokenized import TokenizedPassages
from rag_jax.corpus.tokenizer import Tokenizer
from rag_jax.data.questions import Question

# (tokens of the answer, tokens that stand in for it); None: as it is
Change = tuple[list[int], list[int]] | None

_MOST_PASSAGES = 1 << 20  # whose titles are in memory


class AnswerSubstitution:
  """Chooses whose answer is changed, and into what: by (seed, step) alone."""

  def __init__(
    self,
    questions: Sequence[Question],
    answer_ids: Sequence[list[int]],
    passages: TokenizedPassages,
    *,
    share: float,
    seed: int,
  ):
    """Gathers what an answer can become.

    Args:
      questions: of the training split.
      answer_ids: tokens of the answer that is taught for each.
      passages: in which answers are looked for.
      share: of the questions that are changed, from 0 to 1.
      seed: of the choice.
    """
    self._answer_ids = answer_ids
    self._passages = passages
    self._share = share
    self._seed = seed
    self._relations = [q.relation for q in questions]
    self._same: dict[str, list[int]] = {}
    for row, relation in enumerate(self._relations):
      self._same.setdefault(relation, []).append(row)
    self._is_name = [
      not any(c.isdigit() for c in q.answers[0]) for q in questions
    ]
    # Nothing is looked up if nothing is changed. Of all of Wikipedia a part.
    titles = passages.titles(_MOST_PASSAGES) if share else ()
    self._titles = list(dict.fromkeys(map(tuple, titles)))

  def changes(
    self,
    step: int,
    rows: Int[np.ndarray, "B"],
    doc_ids: Int[np.ndarray, "B K"],
  ) -> list[Change]:
    """Returns the change of each question, None for most that have no place.

    Args:
      step: of the main stage.
      rows: which questions are asked.
      doc_ids: passages retrieved for each.
    """
    changes: list[Change] = []
    for row, docs in zip(rows.tolist(), doc_ids, strict=True):
      rng = np.random.default_rng((self._seed, step, row))
      wanted = rng.random() < self._share
      old = self._answer_ids[row]
      if self._is_name[row] and self._titles:
        new = list(self._titles[rng.integers(len(self._titles))])
      else:
        new = self._answer_ids[rng.choice(self._same[self._relations[row]])]
      found = wanted and any(places(self._passages, int(d), old) for d in docs)
      changes.append((old, new) if found else None)
    return changes


def places(
  passages: TokenizedPassages, row: int, ids: Sequence[int]
) -> list[tuple[int, int]]:
  """Returns from where to where the words `ids` stand in passage `row`.

  However they are written there: what is compared is the folded text of whole
  words (corpus/folding.py).
  """
  wanted = _folded(passages.tokenizer, tuple(ids)).replace(" ", "")
  starts, ends, words = _words(passages, row)
  found: list[tuple[int, int]] = []
  for first, start in enumerate(starts):
    if found and start < found[-1][1]:
      continue
    text, last = words[first], first
    while text and len(text) < len(wanted) and last + 1 < len(words):
      if not wanted.startswith(text):
        break
      last += 1
      text += words[last]
    if text and text == wanted:
      found.append((start, ends[last]))
  return found


@functools.lru_cache(maxsize=1 << 13)  # each is looked at for every question
def _words(
  passages: TokenizedPassages, row: int
) -> tuple[list[int], list[int], list[str]]:
  """Returns where the words of a passage start and end, and them, folded."""
  tokenizer = passages.tokenizer
  length = int(passages.lengths[row])
  body = passages.tokens[row, :length].tolist()
  starts = np.flatnonzero(passages.begins_word[row, :length]).tolist()
  ends = [*starts[1:], length]
  words = [
    # No answer goes on behind the end of a title.
    "\n" if body[start] == tokenizer.eos_id
    else _folded(tokenizer, tuple(body[start:end]))
    for start, end in zip(starts, ends, strict=True)
  ]  # fmt: skip
  return starts, ends, words


@functools.lru_cache(maxsize=1 << 16)
def _folded(tokenizer: Tokenizer, ids: tuple[int, ...]) -> str:
  return fold(tokenizer.decode(ids))


def substitute(
  passages: TokenizedPassages, row: int, change: Change
) -> list[int]:
  """Returns the tokens of passage `row` after `change`."""
  body = passages.tokens[row, : passages.lengths[row]].tolist()
  if change is None:
    return body
  old, new = change
  for start, end in reversed(places(passages, row, old)):
    body[start:end] = new
  return body
