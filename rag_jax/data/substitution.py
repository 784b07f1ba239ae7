"""Names changed in question and passages, so that only reading finds answers.

In: training questions with their answers, documents retrieved for them. Out:
for some of the questions another answer, to be put in the place of the true one
wherever the documents say it: for a name the title of any passage, since there
are far more of them than answers; for a number another of its relation. And for
some another subject: the title of a document that the question names becomes
that of any other, in question and documents, or in the question alone: then
there is no answer, and the empty one is right.

A generator that sees each entity many times learns its answers by heart and
reads no more; one whose passages change has to read. Longpre et al. 2021,
https://arxiv.org/abs/2109.05052, section 5. Names that stand for one another
teach it that the question's words may be any.
"""

from collections.abc import Sequence
import dataclasses
import functools
import re

from jaxtyping import Int
import numpy as np

from rag_jax.corpus.folding import fold
from rag_jax.corpus.tokenized import TokenizedPassages
from rag_jax.corpus.tokenizer import Tokenizer
from rag_jax.data.questions import Question

# (tokens, tokens that stand in for them)
Replacement = tuple[list[int], list[int]]


@dataclasses.dataclass(frozen=True, slots=True)
class Change:
  """What is changed for one question."""

  replacements: tuple[Replacement, ...] = ()  # in its documents
  answer_ids: list[int] | None = None  # None: as it is
  question: str | None = None  # None: as it is


_MOST_PASSAGES = 1 << 20  # whose titles are in memory


class Substitution:
  """Chooses what is changed, and into what: by (seed, step) alone."""

  def __init__(
    self,
    questions: Sequence[Question],
    answer_ids: Sequence[list[int]],
    passages: TokenizedPassages,
    *,
    share: float,
    subject_share: float = 0.0,
    unanswerable: float = 0.0,
    seed: int,
  ):
    """Gathers what an answer can become.

    Args:
      questions: of the training split.
      answer_ids: tokens of the answer that is taught for each.
      passages: in which answers are looked for.
      share: of the questions whose answer is changed, from 0 to 1.
      subject_share: of the questions whose subject is changed.
      unanswerable: of the questions that get a subject which no document is
        about, and no answer.
      seed: of the choice.
    """
    self._answer_ids = answer_ids
    self._passages = passages
    self._questions = questions
    self._share = share
    self._subject_share = subject_share
    self._unanswerable = unanswerable
    self._seed = seed
    self._relations = [q.relation for q in questions]
    self._same: dict[str, list[int]] = {}
    for row, relation in enumerate(self._relations):
      self._same.setdefault(relation, []).append(row)
    self._is_name = [
      not any(c.isdigit() for c in q.answers[0]) for q in questions
    ]
    # Nothing is looked up if nothing is changed. Of all of Wikipedia a part.
    titles = ()
    if share or subject_share or unanswerable:
      titles = passages.titles(_MOST_PASSAGES)
    self._titles = list(dict.fromkeys(map(tuple, titles)))

  def changes(
    self,
    step: int,
    rows: Int[np.ndarray, "B"],
    doc_ids: Int[np.ndarray, "B K"],
  ) -> list[Change]:
    """Returns the change of each question; most that have no place have none.

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
      change = Change(((old, new),), new) if found else Change()
      if rng.random() < self._subject_share:
        change = self._rename(change, row, docs, rng)
      if rng.random() < self._unanswerable:
        change = self._estrange(row, docs, rng) or change
      changes.append(change)
    return changes

  def _subject(
    self, row: int, docs: Int[np.ndarray, "K"]
  ) -> tuple[str, re.Pattern] | None:
    """Returns the title that the question names, and where it stands there."""
    question = self._questions[row]
    for doc in docs.tolist():
      title = self._passages.passages[doc].title
      if not title or title in question.answers[0]:
        continue  # an answer would no longer be what the passage says
      named = re.compile(rf"(?<!\w){re.escape(title)}(?!\w)")
      if named.search(question.question):
        return title, named
    return None

  def _rename(
    self,
    change: Change,
    row: int,
    docs: Int[np.ndarray, "K"],
    rng: np.random.Generator,
  ) -> Change:
    """Returns `change` with another subject, if the question names a title."""
    subject = self._subject(row, docs)
    if subject is None:
      return change
    title, named = subject
    new = list(self._titles[rng.integers(len(self._titles))])
    tokenizer = self._passages.tokenizer
    old = tokenizer.encode([title])[0]
    return dataclasses.replace(
      change,
      replacements=(*change.replacements, (old, new)),
      question=_renamed(
        self._questions[row].question, named, tokenizer.decode(new)
      ),
    )

  def _estrange(
    self, row: int, docs: Int[np.ndarray, "K"], rng: np.random.Generator
  ) -> Change | None:
    """Returns a question about what no document is about, if it names a title.

    Half of the names are titles, half begin as the true one and end as another.
    """
    subject = self._subject(row, docs)
    if subject is None:
      return None
    title, named = subject
    tokenizer = self._passages.tokenizer
    other = tokenizer.decode(self._titles[rng.integers(len(self._titles))])
    name = other
    if rng.random() < 0.5:
      name = title[: -(-len(title) // 2)] + other[len(other) // 2 :]
    if title in name:
      return None
    question = _renamed(self._questions[row].question, named, name)
    return Change(answer_ids=[], question=question)


def _renamed(question: str, named: re.Pattern, name: str) -> str:
  """Returns `question` with `name` where `named` matches."""
  return name.join(named.split(question))


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
  found = [
    (start, end - start, new)
    for old, new in change.replacements
    for start, end in places(passages, row, old)
  ]
  before = len(body)
  # From the end on; of two at one place the longer, and none inside another.
  for start, size, new in sorted(found, key=lambda x: x[:2], reverse=True):
    if start + size <= before:
      body[start : start + size] = new
      before = start
  return body
