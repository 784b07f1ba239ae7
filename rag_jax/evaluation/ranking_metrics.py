"""Retrieval metrics against passages with graded relevance judgements.

In: ids of retrieved passages, best first, and the grades of the judges. Out:
one number from 0 to 1 per question. All metrics are those of trec_eval
(https://github.com/usnistgov/trec_eval): a passage without a grade, or with a
grade below 1, is not relevant.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
import math
from typing import Any

from jaxtyping import Float, Int
import numpy as np

Id = int | str  # a row of the passages, or the id of one
Ranked = Sequence[Sequence[Id]] | Int[np.ndarray, "B K"]
# Per question: passage -> grade. `Any` instead of `Id`: to a type checker, a
# mapping from strings is not a mapping from strings or numbers.
Qrels = Sequence[Mapping[Any, int]]

_CUT = 10  # of MRR and nDCG


def recall_at_k(
  ranked_ids: Ranked, qrels: Qrels, k: int
) -> Float[np.ndarray, "B"]:
  """Returns the share of the relevant passages among the first `k`.

  trec_eval's `recall_k`. 0 for a question without a relevant passage: exclude
  such questions from a mean.

  Args:
    ranked_ids: best first; -1 where nothing was found. A question may have
      fewer than `k`.
    qrels: grades by id, of the same type as those in `ranked_ids`.
    k: how many passages count.

  Raises:
    ValueError: `k` is below 1, the two have different lengths, a passage is
      ranked twice for a question, or ids are numbers in one and strings in the
      other.
  """
  if k < 1:
    raise ValueError(
      f"k={k} passages to look at; expected at least 1. Raise k."
    )
  recalls = []
  for grades, judged in _graded(ranked_ids, qrels):
    of_use = sum(grade > 0 for grade in judged.values())
    found = sum(grade > 0 for grade in grades[:k])
    recalls.append(found / of_use if of_use else 0.0)
  return np.array(recalls, np.float64)


def mrr_at_10(ranked_ids: Ranked, qrels: Qrels) -> Float[np.ndarray, "B"]:
  """Returns 1 / rank of the first relevant passage, 0 if beyond rank 10.

  trec_eval's `recip_rank` of runs that end at rank 10. Arguments and errors as
  in `recall_at_k`.
  """
  ranks = (
    next((r for r, g in enumerate(grades[:_CUT], 1) if g > 0), math.inf)
    for grades, _ in _graded(ranked_ids, qrels)
  )
  return np.array([1 / rank for rank in ranks], np.float64)


def ndcg_at_10(ranked_ids: Ranked, qrels: Qrels) -> Float[np.ndarray, "B"]:
  """Returns the discounted gain of the top 10 over that of the best ranking.

  trec_eval's `ndcg_cut_10` (Jarvelin and Kekalainen 2002): the gain is the
  grade itself, divided by log2(1 + rank). 0 for a question without a relevant
  passage. Arguments and errors as in `recall_at_k`.
  """
  values = []
  for grades, judged in _graded(ranked_ids, qrels):
    ideal = _discounted_gain(sorted(judged.values(), reverse=True))
    values.append(_discounted_gain(grades) / ideal if ideal else 0.0)
  return np.array(values, np.float64)


def r_precision(
  ranked: Sequence[Any], sets: Sequence[Collection[Any]]
) -> float:
  """Returns the R-precision of one question (Petroni et al. 2021, KILT).

  The share of a set of R that is among the first R found, for the best set:
  https://arxiv.org/abs/2009.02252, section 5. With one set it is trec_eval's
  `Rprec`.

  Args:
    ranked: what was found, best first; only the first place of each counts.
    sets: each is enough to answer the question.

  Raises:
    ValueError: there are no sets, or one is empty.
  """
  _check_sets(sets)
  found = list(dict.fromkeys(ranked))
  return max(
    len(set(found[: len(set(s))]) & set(s)) / len(set(s)) for s in sets
  )


def evidence_recall(
  ranked: Sequence[Any], sets: Sequence[Collection[Any]], k: int
) -> float:
  """Returns KILT's recall@k: the share of the sets that the first `k` complete.

  As published, a set takes one place, that of its last member: of a set of two,
  the first does not count among the `k`. Arguments and errors as in
  `r_precision`, and `ValueError` if `k` is below 1.
  """
  if k < 1:
    raise ValueError(f"k={k} places to look at; expected at least 1. Raise k.")
  _check_sets(sets)
  distinct = dict.fromkeys(map(frozenset, sets))
  left = [set(members) for members in distinct]
  places: list[int | None] = []  # the number of a set, or None: of none
  for one in dict.fromkeys(ranked):
    of = [number for number, members in enumerate(left) if one in members]
    for number in of:
      left[number].discard(one)
      if number in places:
        places.remove(number)
      places.append(number)
    if not of:
      places.append(None)
  done = [n for n in places[:k] if n is not None and not left[n]]
  return len(done) / len(distinct)


def _check_sets(sets: Sequence[Collection[Any]]) -> None:
  if not sets or not all(sets):
    raise ValueError(
      f"The sets that answer a question are {list(sets)}; expected at least"
      " one, none of them empty. Leave out questions for which none is known."
    )


def trec_eval_order(scores: Mapping[str, float]) -> list[str]:
  """Returns ids as trec_eval ranks them; it ignores the ranks of a run.

  By score in float32, the largest first; of equal scores, the id that is later
  in the alphabet first. Our own searches put the smaller row first: use this
  function to compare with results that trec_eval computed.
  """
  return sorted(
    scores, key=lambda id_: (np.float32(scores[id_]), id_), reverse=True
  )


def _discounted_gain(grades: Sequence[int]) -> float:
  """Returns the sum of grade / log2(1 + rank) over the first 10."""
  return math.fsum(
    max(grade, 0) / math.log2(1 + rank)
    for rank, grade in enumerate(grades[:_CUT], 1)
  )


def _graded(
  ranked_ids: Ranked, qrels: Qrels
) -> Iterator[tuple[list[int], Mapping[Any, int]]]:
  """Yields the grades of the found passages, best first, and all grades."""
  if len(ranked_ids) != len(qrels):
    raise ValueError(
      f"ranked_ids has {len(ranked_ids)} questions, qrels has {len(qrels)};"
      " expected one of each per question, in the same order."
    )
  for number, (row, judged) in enumerate(zip(ranked_ids, qrels, strict=True)):
    ids = [id_ if isinstance(id_, str) else int(id_) for id_ in row]
    _check_ids(number, ids, judged)
    yield [0 if id_ == -1 else judged.get(id_, 0) for id_ in ids], judged


def _check_ids(
  number: int, ids: Sequence[Id], judged: Mapping[Any, int]
) -> None:
  """Raises `ValueError` unless the ids are different, and of the same type."""
  found = [id_ for id_ in ids if id_ != -1]
  if len(set(found)) < len(found):
    twice = next(id_ for id_ in found if found.count(id_) > 1)
    raise ValueError(
      f"Passage {twice!r} is ranked more than once for question {number};"
      " expected different passages. Keep the first place of each."
    )
  kinds = {isinstance(id_, str) for id_ in (*found, *judged)}
  if len(kinds) > 1:
    raise ValueError(
      f"For question {number} the ranked ids are like {found[:2]}, those of"
      f" qrels like {list(judged)[:2]}; expected all to be strings, or all to"
      " be row numbers of passages. Convert one of the two."
    )
