"""Which passages become hard negatives, and which are left out."""

from collections import Counter
import dataclasses

import numpy as np
import pytest

from rag_jax.corpus.passages import Passage
from rag_jax.corpus.passages import PassageList
from rag_jax.data.questions import Question
from rag_jax.evaluation.mining import MiningSettings
from rag_jax.evaluation.mining import mine
from rag_jax.evaluation.mining import search_embeddings
from rag_jax.evaluation.mining import search_words
from rag_jax.retrieval.bm25 import Bm25Index
from rag_jax.retrieval.exact import ExactIndex

# In the order in which the search below finds them.
PASSAGES = PassageList(
  [
    Passage("a", "Peru", "The capital is Lima."),
    Passage("b", "Peru", "Its currency is the sol."),
    Passage("c", "Ohio", "Lima is a town there."),
    Passage("d", "Peru", "It borders Chile."),
    Passage("e", "Peru", "The capital is Lima."),
    Passage("f", "Chile", "Santiago is large."),
  ],
  "six",
)
SCORES = np.array([10.0, 9.0, 8.0, 6.0, 5.0, -1.0], np.float32)
ASKED = Question("What is the capital of Peru?", ("Lima",), "q1", gold=("a",))


def in_order(texts, depth):
  """Finds all passages in their order."""
  ids = np.tile(np.arange(depth), (len(texts), 1))
  return ids, lambda b, rows: SCORES[list(rows)]


def mined(question=ASKED, search=in_order, passages=PASSAGES, **settings):
  counts = Counter()
  [found] = mine(
    [question], passages, search, MiningSettings(**settings), counts
  )
  return found, counts


def test_gold_its_copies_and_answers_are_left_out():
  found, counts = mined()
  assert found == dataclasses.replace(ASKED, negatives=("b", "d", "f"))
  assert found.gold == ("a",)
  assert found.negatives == ("b", "d", "f")
  assert counts["are gold"] == 2  # e has the text of a
  assert counts["state an answer"] == 1
  assert (counts["3 negatives"], counts["with a positive"]) == (1, 1)


@pytest.mark.parametrize(
  ("settings", "negatives"),
  [
    ({"num": 1}, "b"),
    ({"depth": 3}, "b"),
    ({"drop_answers": False}, "bcdf"),
    ({"margin": 0.0}, "bdf"),
    ({"margin": 1.0}, "bdf"),  # b is exactly that much lower
    ({"margin": 1.5}, "df"),
    ({"margin": 20.0}, ""),
    ({"share": 0.9}, "bdf"),
    ({"share": 0.7}, "df"),
    ({"share": 0.5, "margin": 1.5}, "f"),  # the stricter one
  ],
)
def test_settings_choose_which_are_kept(settings, negatives):
  assert "".join(mined(**settings)[0].negatives) == negatives


def test_a_share_of_a_negative_score_is_below_it():
  question = dataclasses.replace(ASKED, gold=("f",), answers=("x",))
  assert mined(question, share=0.5)[0].negatives == ()
  assert MiningSettings(share=0.5).most(-1.0) == -1.5
  assert MiningSettings(share=0.5).most(10.0) == 5.0


def test_the_best_of_several_gold_passages_is_the_limit():
  question = dataclasses.replace(ASKED, gold=("d", "b"), answers=("x",))
  assert "".join(mined(question, margin=0.5)[0].negatives) == "cef"


@pytest.mark.parametrize("gold", [(), ("gone",)])
def test_a_positive_is_found_only_if_asked_for(gold):
  question = dataclasses.replace(ASKED, gold=gold)
  kept, counts = mined(question)
  assert (kept.gold, counts["with a positive"]) == (gold, 0)
  found, counts = mined(question, find_positives=True)
  assert found.gold == ("a",)
  assert found.negatives == ("b", "d", "f")
  assert counts["found a positive"] == counts["with a positive"] == 1
  assert counts["gold not in the corpus"] == len(gold)


def test_without_a_gold_passage_there_is_no_margin():
  question = dataclasses.replace(ASKED, gold=())
  found, counts = mined(question, margin=0.0)
  assert found.negatives == ()
  assert counts["have no gold to compare with"] > 0
  assert not counts["have a score too high"]


def test_known_gold_is_not_replaced_by_a_found_one():
  question = dataclasses.replace(ASKED, gold=("d", "gone"))
  found, _ = mined(question, find_positives=True)
  assert found.gold == ("d",)


def test_words_find_passages_that_share_them():
  words = Bm25Index.build(PASSAGES, passages_fingerprint="1")
  found, counts = mined(search=search_words(words))
  assert set(found.negatives) <= {"b", "d", "f"}
  assert {"b", "d"} <= set(found.negatives)
  assert counts["are gold"] == 2
  nothing, counts = mined(
    Question("Quokka?", ("x",), gold=("a",)), search_words(words)
  )
  assert nothing.negatives == ()
  assert counts["0 negatives"] == 1


def test_embeddings_are_searched_and_scored_by_inner_products():
  rng = np.random.default_rng(0)
  index = ExactIndex(
    rng.normal(size=(6, 4)).astype(np.float32),
    encoder_fingerprint="1", passages_fingerprint="2",
  )  # fmt: skip
  asked = rng.normal(size=(3, 4)).astype(np.float32)
  ids, scores = search_embeddings(index, lambda texts: asked[: len(texts)])(
    ["x", "y", "z"], 4
  )
  np.testing.assert_array_equal(ids, index.search(asked, 4)[0])
  np.testing.assert_allclose(
    scores(1, [5, 0]), index.embeddings[[5, 0]] @ asked[1], rtol=1e-6
  )


def test_many_questions_keep_their_order_and_their_own_scores():
  questions = [
    Question(f"Question {i}?", ("Lima",), str(i), gold=("abdf"[i % 4],))
    for i in range(150)
  ]

  def search(texts, depth):
    numbers = [int(text.split()[1][:-1]) for text in texts]
    ids = np.stack([np.roll(np.arange(6), -n)[:depth] for n in numbers])
    return ids, lambda b, rows: SCORES[list(rows)] * (numbers[b] + 1)

  counts = Counter()
  settings = MiningSettings(margin=1.5)
  found = list(mine(questions, PASSAGES, search, settings, counts))
  assert [q.id for q in found] == [q.id for q in questions]
  for number in (0, 64, 149):
    alone = list(
      mine([questions[number]], PASSAGES, search, settings, Counter())
    )
    assert alone == [found[number]]
    assert alone[0].negatives == found[number].negatives
  assert sum(counts[f"{n} negatives"] for n in range(6)) == 150
