"""R-precision and gold recall of passages and pages, beside KILT's rules."""

import random

import pytest

from rag_jax.corpus.passages import Passage
from rag_jax.data.questions import Question
from rag_jax.evaluation.evidence import find_evidence
from rag_jax.evaluation.evidence import page_id
from rag_jax.evaluation.ranking_metrics import evidence_recall
from rag_jax.evaluation.ranking_metrics import r_precision


def passage(id_, title="", **metadata):
  return Passage(id_, title, "text", tuple(metadata.items()))


def question(gold=(), pages=()):
  return Question("Who?", ("x",), gold=gold, pages=pages)


def slow_r_precision(ranked, sets):
  best = 0.0
  for members in sets:
    seen, right = [], 0
    for one in ranked:
      if len(seen) == len(members):
        break
      if one in seen:
        continue
      seen.append(one)
      right += one in members
    best = max(best, right / len(members))
  return best


def slow_recall(ranked, sets, k):
  """KILT's rank of evidence sets, as its paper's script describes it."""
  sets = [set(s) for i, s in enumerate(sets) if s not in sets[:i]]
  number, rank, seen = len(sets), [], []
  for one in ranked:
    if one in seen:
      continue
    seen.append(one)
    hit = False
    for i, members in enumerate(sets):
      if one not in members:
        continue
      hit = True
      rank = [x for x in rank if x != ("part", i)]
      members.remove(one)
      rank.append(("part", i) if members else "whole")
    if not hit:
      rank.append("other")
  return rank[:k].count("whole") / number


def test_random_rankings_are_scored_as_by_a_slow_loop():
  rng = random.Random(0)
  partly = 0
  for _ in range(500):
    ranked = rng.choices("abcdefgh", k=rng.randrange(12))
    sets = [
      set(rng.sample("abcdefgh", rng.randrange(1, 4)))
      for _ in range(rng.randrange(1, 4))
    ]
    assert r_precision(ranked, sets) == slow_r_precision(ranked, sets)
    found = evidence_recall(ranked, sets, 3)
    assert found == pytest.approx(slow_recall(ranked, sets, 3))
    partly += 0 < found < 1
  assert partly > 50


def test_sets_and_depth_are_checked():
  for sets in ([], [{"a"}, set()]):
    with pytest.raises(ValueError, match="expected at least one, none of them"):
      r_precision(["a"], sets)
  with pytest.raises(ValueError, match="k=0 places"):
    evidence_recall(["a"], [{"a"}], 0)


def test_named_passages_are_one_set():
  corpus = [passage("a"), passage("b"), passage("c")]
  asked = [question(gold=("a", "b")), question(gold=("z",)), question()]
  found = find_evidence(asked, corpus)
  assert found.score(asked[0], [corpus[0], corpus[2], corpus[1]]) == (0.5, 1.0)
  assert found.score(asked[1], corpus) == (0.0, 0.0)  # not in the corpus
  assert found.score(asked[2], corpus) is None
  assert found.notes == (
    "1 of 3 questions name no gold passage or page: they have no R-precision"
    " and no KILT scores.",
    "1 of 3 gold passages are not in the corpus: they count as not found.",
  )


def test_ids_of_another_corpus_are_not_scored():
  asked = [question(gold=("1", "2")), question(pages=((("9", "Peru"),),))]
  # Its ids are numbers too, of something else.
  found = find_evidence(asked, [passage("9", "Chile"), passage("8", "Bolivia")])
  assert [found.score(q, [passage("9", "Chile")]) for q in asked] == [None] * 2
  assert len(found.notes) == 2
  assert found.notes[0].startswith("None of the 2 gold passages is in the corp")
  assert found.notes[1].startswith("None of the 1 gold pages is in the corpus")


def test_parts_of_a_page_count_once():
  pages = ((("7", "Peru"), ("8", "Chile")), (("9", "Lima"),))
  corpus = [
    passage("7#0", "Peru: history"), passage("7#1", "Peru: climate"),
    passage("8", "Chile"), passage("x", "Lima", wikipedia_id="9"),
  ]  # fmt: skip
  asked = [question(pages=pages)]
  found = find_evidence(asked, corpus)
  assert (found.pages_by, found.notes) == ("id", ())
  assert [page_id(p) for p in corpus] == ["7", "7", "8", "9"]
  assert found.score(asked[0], corpus[:3]) == (1.0, 0.5)
  assert found.score(asked[0], corpus) == (1.0, 1.0)
  assert found.score(asked[0], corpus[:2]) == (0.5, 0.0)


def test_pages_are_recognised_by_title_where_ids_are_of_something_else():
  pages = ((("7", "Peru"),),)
  corpus = [passage("1", "Peru"), passage("2", "Peru"), passage("7", "Rome")]
  asked = [question(pages=pages), question(pages=((("5", ""),),))]
  found = find_evidence(asked, corpus)
  assert found.pages_by == "title"
  assert found.notes[0].startswith("Gold pages are recognised by their titles")
  assert found.score(asked[0], corpus[1:]) == (1.0, 1.0)
  assert found.score(asked[0], [corpus[2]]) == (0.0, 0.0)
  assert found.score(asked[1], corpus) is None  # the title is not given
