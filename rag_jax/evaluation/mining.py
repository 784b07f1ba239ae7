"""Hard negatives: passages that a search ranks high, and that do not answer.

In: questions, and a search by words or by embeddings. Out: for each question
the passages that answer it, and its hard negatives, for the contrastive stage.

Sources: BM25's best passages without the answer, Karpukhin et al. 2020,
https://arxiv.org/abs/2004.04906, section 3.2; those of a trained index, Xiong
et al. 2020, https://arxiv.org/abs/2007.00808; candidates that score too near to
the positive left out, Moreira et al. 2024, https://arxiv.org/abs/2407.15831.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
import dataclasses
import functools
from typing import Any

from jaxtyping import Float, Int
import numpy as np

from rag_jax.corpus.passages import Passages
from rag_jax.data.dialogue import Asked
from rag_jax.data.questions import Question
from rag_jax.evaluation.retrieval import contains_answer
from rag_jax.retrieval.bm25 import Bm25Index
from rag_jax.retrieval.index import Index

# (questions, depth) -> passage numbers [B, K], best first, -1 where nothing was
# found; and a function of (b, passage numbers) -> their scores, or None.
Scores = Callable[[int, Sequence[int]], Float[np.ndarray, "N"]]
Search = Callable[
  [Sequence[str | Asked], int], tuple[Int[np.ndarray, "B K"], Scores | None]
]
_BATCH = 64  # questions searched together


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MiningSettings:
  """Which candidates are kept.

  Attributes:
    depth: candidates per question that are looked at.
    num: hard negatives that are kept of them, the best ones.
    drop_answers: leave out candidates that state an accepted answer.
    find_positives: give questions whose gold passages are not known or not in
      the corpus the best candidate that states an answer.
    margin: leave out candidates that score above the best gold passage minus
      this; None: none for that.
    share: leave out candidates that score above this share of the best gold
      passage's score; None: none for that.
    variant: how answers are found in text; see `retrieval.contains_answer`.
  """

  depth: int = 100
  num: int = 5
  drop_answers: bool = True
  find_positives: bool = False
  margin: float | None = None
  share: float | None = None
  variant: str = "multilingual"

  def most(self, best: float) -> float:
    """Returns the score of the best gold passage as a limit for negatives."""
    limits = [np.inf]
    if self.margin is not None:
      limits.append(best - self.margin)
    if self.share is not None:  # also below, if the score is negative
      limits.append(best - (1 - self.share) * abs(best))
    return min(limits)


def search_words(words: Bm25Index) -> Search:
  """Returns a search by BM25. Its scores say nothing of how near passages are.

  They depend on the words of the question, so that there is no margin of them.
  """

  def search(asked: Sequence[str | Asked], depth: int) -> tuple[Any, None]:
    texts = [Asked.of(question).said for question in asked]
    return words.search(texts, depth)[0], None

  return search


def search_embeddings(
  index: Index,
  embed: Callable[[Sequence[str | Asked]], Float[np.ndarray, "B R"]],
) -> Search:
  """Returns a search by embeddings, whose scores are exact inner products."""

  def search(asked: Sequence[str | Asked], depth: int) -> tuple[Any, Scores]:
    embeddings = embed(asked)

    def scores(b: int, rows: Sequence[int]) -> Float[np.ndarray, "N"]:
      found = np.asarray(index.embeddings[np.asarray(rows)], np.float32)
      return found @ np.asarray(embeddings[b], np.float32)

    return index.search(embeddings, depth)[0], scores

  return search


def mine(
  questions: Sequence[Question],
  passages: Passages,
  search: Search,
  settings: MiningSettings,
  counts: Counter[str],
) -> Iterator[Question]:
  """Yields the questions with gold passages and hard negatives, in order.

  A passage in `gold`, or with the title and text of one, is never a negative.
  With a margin or share, a question without a gold passage in the corpus gets
  no negative: nothing says which score is too high.

  Args:
    questions: `negatives` that they have are replaced.
    passages: the corpus, as the search numbers it.
    search: finds the candidates.
    settings: which of them are kept.
    counts: what was kept and left out is added to it, by name.
  """
  depth = min(settings.depth, len(passages))
  for start in range(0, len(questions), _BATCH):
    part = questions[start : start + _BATCH]
    found, scores = search([q.asked for q in part], depth)
    for b, question in enumerate(part):
      rows = [row for row in found[b].tolist() if row >= 0]
      score = functools.partial(scores, b) if scores else None
      yield _mine_one(question, rows, passages, score, settings, counts)


def _mine_one(
  question: Question,
  rows: Sequence[int],
  passages: Passages,
  scores: Callable[[Sequence[int]], Any] | None,
  settings: MiningSettings,
  counts: Counter[str],
) -> Question:
  """Returns the question with the best candidates as negatives."""
  known = [passages.row_of(id_) for id_ in question.gold]
  gold = [row for row in known if row is not None]
  counts["gold not in the corpus"] += len(known) - len(gold)
  candidates = dict(zip(rows, passages.get(rows), strict=True))

  @functools.cache
  def answers(row: int) -> bool:
    text = f"{candidates[row].title} {candidates[row].text}"
    return contains_answer(text, question.answers, settings.variant)

  if not gold and settings.find_positives:
    gold = [row for row in rows if answers(row)][:1]
    counts["found a positive"] += len(gold)
  same = {(p.title, p.text) for p in passages.get(gold)}
  limit, values = np.inf, dict.fromkeys(rows, 0.0)
  if settings.margin is not None or settings.share is not None:
    assert scores is not None, "words have no margin"
    limit = -np.inf
    if gold:
      limit = settings.most(float(np.max(scores(gold))))
    if rows:
      values = dict(zip(rows, scores(rows).tolist(), strict=True))
  negatives: list[str] = []
  for row in rows:
    if len(negatives) == settings.num:
      break
    passage = candidates[row]
    if row in gold or (passage.title, passage.text) in same:
      counts["are gold"] += 1
    elif settings.drop_answers and answers(row):
      counts["state an answer"] += 1
    elif values[row] > limit:
      why = "have a score too high" if gold else "have no gold to compare with"
      counts[why] += 1
    else:
      negatives.append(passage.id)
  counts[f"{len(negatives)} negatives"] += 1
  counts["with a positive"] += bool(gold)
  ids = tuple(passages[row].id for row in gold)
  return dataclasses.replace(
    question, gold=ids or question.gold, negatives=tuple(negatives)
  )
