"""Replaces names in questions and passages, so that the generator has to read.

In: training questions with their answers, and the documents retrieved for them.
Out: the replacements to make.

- For some questions, another answer replaces the true one wherever the
  documents have it. It is another answer of the same relation. For names, every
  other time it is the title of any passage, since there are far more titles.
- Other facts of the same document that training questions ask for are replaced
  in the same way.
- For some questions, another subject: the title of a document that the question
  names becomes the title of any other passage, in question and documents.

A generator that sees each entity many times memorises the answers and stops
reading; if the passages change, it has to read. Longpre et al. 2021,
https://arxiv.org/abs/2109.05052, section 5. If the other facts stayed, it could
memorise them, and answer with the one that it has not memorised. Changed
subjects teach it that a question may name anything. A retriever that learns to
embed passages reads the changed subjects too, so that it learns to find names
that no training question asks for.

In a dialogue the subject may stand in an earlier turn, where it is changed too.
An answer that was said before is not replaced.
"""

from collections.abc import Sequence, Set
import dataclasses
import functools
import re

from jaxtyping import Int
import numpy as np

from rag_jax.corpus.folding import fold
from rag_jax.corpus.tokenized import TokenizedPassages
from rag_jax.corpus.tokenizer import Tokenizer
from rag_jax.data.dialogue import Asked
from rag_jax.data.questions import Question

# (tokens, tokens that stand in for them)
Replacement = tuple[list[int], list[int]]


@dataclasses.dataclass(frozen=True, slots=True)
class Change:
  """The replacements for one question."""

  replacements: tuple[Replacement, ...] = ()  # in its documents
  answer_ids: list[int] | None = None  # None: as it is
  question: str | Asked | None = None  # None: as it is
  # What it is about, and what stands there instead; () if it stays.
  subject: tuple[str, str] | tuple[()] = ()


_MOST_PASSAGES = 1 << 20  # whose titles are in memory
_MOST_WORDS = 8  # of a title that is looked for in questions
_TITLES = 0.5  # share of the names that become a title


class Substitution:
  """Chooses the replacements; a function of (seed, step) alone."""

  def __init__(
    self,
    questions: Sequence[Question],
    answer_ids: Sequence[list[int]],
    passages: TokenizedPassages,
    *,
    share: float,
    subject_share: float = 0.0,
    seed: int,
  ):
    """Collects the possible replacements.

    Args:
      questions: of the training split.
      answer_ids: tokens of each question's first answer, which is the target.
      passages: are searched for answers.
      share: of the questions whose answer is changed, from 0 to 1.
      subject_share: of the questions whose subject is changed.
      seed: of the choice.
    """
    self._answer_ids = answer_ids
    self._passages = passages
    self._questions = questions
    self._share = share
    self._subject_share = subject_share
    self._seed = seed
    self._relations = [q.relation for q in questions]
    self._same: dict[str, list[int]] = {}
    for row, relation in enumerate(self._relations):
      self._same.setdefault(relation, []).append(row)
    self._is_name = [
      not any(c.isdigit() for c in q.answers[0]) for q in questions
    ]
    # Nothing is looked up if nothing is changed. A large corpus: only a part.
    titles = ()
    if share or subject_share:
      titles = passages.titles(_MOST_PASSAGES)
    self._titles = list(dict.fromkeys(map(tuple, titles)))
    # The questions that name a title.
    self._about: dict[str, list[int]] = {}
    if share:
      names = {passages.tokenizer.decode(title) for title in self._titles}
      for row, question in enumerate(questions):
        for name in named(question.said, names):
          self._about.setdefault(name, []).append(row)

  def changes(
    self,
    step: int,
    rows: Int[np.ndarray, "B"],
    doc_ids: Int[np.ndarray, "B K"],
  ) -> list[Change]:
    """Returns the change of each question, which may be empty.

    Args:
      step: of the main stage.
      rows: which questions are asked.
      doc_ids: passages retrieved for each.
    """
    changes: list[Change] = []
    for row, docs in zip(rows.tolist(), doc_ids, strict=True):
      rng = np.random.default_rng((self._seed, step, row))
      wanted = rng.random() < self._share
      wanted &= not self._was_said(self._questions[row])
      old, new = self._answer_ids[row], self._another(row, rng)
      found = wanted and any(places(self._passages, int(d), old) for d in docs)
      change = Change(((old, new),), new) if found else Change()
      others = self._other_facts(row, docs, rng)
      change = dataclasses.replace(
        change, replacements=(*change.replacements, *others)
      )
      if rng.random() < self._subject_share:
        change = self._rename(change, row, docs, rng)
      changes.append(change)
    return changes

  def _was_said(self, question: Question) -> bool:
    """Returns whether the answer stands in an earlier turn."""
    return any(question.answers[0] in turn for turn in question.history)

  def _another(self, row: int, rng: np.random.Generator) -> list[int]:
    """Returns the answers that can replace that of question `row`."""
    same = self._same[self._relations[row]]
    new = self._answer_ids[same[rng.integers(len(same))]]
    if self._titles:
      title = self._titles[rng.integers(len(self._titles))]
      if self._is_name[row] and rng.random() < _TITLES:
        return list(title)
    return new

  def _other_facts(
    self, row: int, docs: Int[np.ndarray, "K"], rng: np.random.Generator
  ) -> list[Replacement]:
    """Returns replacements of other questions' answers in the same documents.

    Names that occur in the question itself, or before it, are kept.
    """
    if not self._about:
      return []
    own, said = self._answer_ids[row], self._questions[row].said
    asked: dict[tuple[int, ...], int] = {}
    for doc in dict.fromkeys(docs.tolist()):
      for other in self._about.get(self._passages.passages[doc].title, ()):
        asked.setdefault(tuple(self._answer_ids[other]), other)
    return [
      (list(old), self._another(other, rng))
      for old, other in asked.items()
      if list(old) != own
      and self._questions[other].answers[0] not in said
      and rng.random() < self._share
    ]

  def _rename(
    self,
    change: Change,
    row: int,
    docs: Int[np.ndarray, "K"],
    rng: np.random.Generator,
  ) -> Change:
    """Returns `change` with another subject, if the question names a title."""
    question = self._questions[row]
    new = list(self._titles[rng.integers(len(self._titles))])
    tokenizer = self._passages.tokenizer
    for doc in docs.tolist():
      title = self._passages.passages[doc].title
      if not title or title in question.answers[0]:
        continue  # the answer would no longer stand in the passage
      named = re.compile(rf"(?<!\w){re.escape(title)}(?!\w)")
      if named.search(question.said):
        name = tokenizer.decode(new)
        renamed = dataclasses.replace(
          question,
          question=name.join(named.split(question.question)),
          history=tuple(name.join(named.split(x)) for x in question.history),
        )
        return dataclasses.replace(
          change,
          replacements=(
            *change.replacements,
            (tokenizer.encode([title])[0], new),
          ),
          question=renamed.asked,
          subject=(title, name),
        )
    return change


def named(question: str, names: Set[str]) -> list[str]:
  """Returns which of `names` occur in `question`, as whole words."""
  words = [match.span() for match in re.finditer(r"\w+", question)]
  runs = (
    question[start:end]
    for first, (start, _) in enumerate(words)
    for _, end in words[first : first + _MOST_WORDS]
  )
  return [run for run in dict.fromkeys(runs) if run in names]


def places(
  passages: TokenizedPassages, row: int, ids: Sequence[int]
) -> list[tuple[int, int]]:
  """Returns (start, end) of each occurrence of `ids` in passage `row`.

  The folded texts of whole words are compared (corpus/folding.py), so that case
  and spelling variants match.
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


@functools.lru_cache(maxsize=1 << 13)  # a passage is searched repeatedly
def _words(
  passages: TokenizedPassages, row: int
) -> tuple[list[int], list[int], list[str]]:
  """Returns start, end and folded text of each word of a passage, as lists."""
  tokenizer = passages.tokenizer
  length = int(passages.lengths[row])
  body = passages.tokens[row, :length].tolist()
  starts = np.flatnonzero(passages.begins_word[row, :length]).tolist()
  ends = [*starts[1:], length]
  words = [
    # No answer extends beyond the end of a title.
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
  # Backwards, so that positions stay valid. Of overlapping occurrences only one
  # is replaced: of two with the same start the longer.
  for start, size, new in sorted(found, key=lambda x: x[:2], reverse=True):
    if start + size <= before:
      body[start : start + size] = new
      before = start
  return body
