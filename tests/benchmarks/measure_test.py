"""What a benchmark measures, against loops over a corpus with known answers."""

import math

import numpy as np
import pytest

from rag_jax.benchmarks.measure import measure
from rag_jax.benchmarks.systems import System
from rag_jax.evaluation.judged_questions import Known
from rag_jax.evaluation.judged_questions import QuestionMetrics
from rag_jax.evaluation.retrieval import answer_recall_at_k

P, B = 30, 12


@pytest.fixture
def rng():
  return np.random.default_rng(0)


@pytest.fixture
def known(rng):
  """Passage r holds the words of the questions that it answers."""
  answered = rng.random((B, P)) < 0.1
  answered[0] = False  # nothing answers this one
  texts = [
    "words " + " ".join(f"answer{i}." for i in np.flatnonzero(answered[:, r]))
    for r in range(P)
  ]
  answers = [(f"Answer{i}", "not there") for i in range(B)]
  answers[3] = ()
  gold = [
    {int(r): int(rng.integers(0, 3)) for r in rng.choice(P, 4, replace=False)}
    for _ in range(B)
  ]
  gold[5] = {}
  gold[6] = {4: 0}
  return Known(answers, gold, texts.__getitem__)


def system(ids, *, family="planted", by_embeddings=True):
  """Finds what `ids` says, whatever is asked for."""
  return System(
    family=family,
    settings="",
    search=lambda rows, k: ids[rows, :k],
    by_embeddings=by_embeddings,
    build_secs=None,
    memory_bytes=1,
  )


def rankings(rng):
  return np.array([rng.permutation(P) for _ in range(B)], np.int32)


def quick(systems, exact_ids, known=None):
  return measure(systems, exact_ids, known, rounds=2, speed_secs=1e-3)


def test_answer_recall_is_that_of_texts_looked_through_one_by_one(known, rng):
  ids = rankings(rng)
  metrics = QuestionMetrics(known)(ids)
  asked = [i for i in range(B) if known.answers[i]]
  texts = [[known.text_of(r) for r in ids[i]] for i in asked]
  for k in (1, 5, 20, P):
    expected = answer_recall_at_k(texts, [known.answers[i] for i in asked], k)
    assert metrics[f"answer_recall@{k}"].mean == expected.mean()
    assert 0 < expected.mean() < 1


def test_gold_metrics_are_those_of_a_loop(known, rng):
  ids = rankings(rng)
  metrics = QuestionMetrics(known)(ids)
  recalls, reciprocals, gains = [], [], []
  for i in range(B):
    grades = known.gold[i]
    useful = [r for r in grades if grades[r] > 0]
    if not useful:
      continue
    recalls.append(sum(r in ids[i, :5] for r in useful) / len(useful))
    places = [n for n in range(10) if ids[i, n] in useful]
    reciprocals.append(1 / (1 + places[0]) if places else 0.0)
    gain = sum(
      grades.get(int(ids[i, n]), 0) / math.log2(n + 2) for n in range(10)
    )
    ideal = sorted(grades.values(), reverse=True)
    best = sum(g / math.log2(n + 2) for n, g in enumerate(ideal))
    gains.append(gain / best)
  assert len(recalls) == B - 2
  assert metrics["gold_recall@5"].mean == pytest.approx(np.mean(recalls))
  assert metrics["MRR@10"].mean == pytest.approx(np.mean(reciprocals))
  assert metrics["nDCG@10"].mean == pytest.approx(np.mean(gains))
  for mean in metrics.values():
    assert mean.low <= mean.mean <= mean.high


def test_a_gap_is_no_find(known):
  none = np.full((B, P), -1, np.int32)
  metrics = QuestionMetrics(known)(none)
  assert {mean.mean for mean in metrics.values()} == {0.0}


def test_metrics_are_left_out_where_nothing_is_known(rng):
  known = Known([()] * B, [{}] * B, str)
  assert QuestionMetrics(known)(rankings(rng)) == {}


def test_relevant_are_the_graded_passages_or_those_with_an_answer(known):
  assert known.relevant(6, [4]) == [False]  # no use, and no answer in it
  for number in range(B):
    rows = list(range(P))
    grades, found = known.gold[number], known.relevant(number, rows)
    if any(grades.values()):
      assert found == [grades.get(r, 0) > 0 for r in rows]
    else:
      wanted = f"answer{number}."
      assert found == [wanted in known.text_of(r).split() for r in rows]


def test_index_recall_is_low_for_wrong_ids_and_1_for_the_right_ones(rng):
  exact = rankings(rng)
  half = exact.copy()
  half[:, 0] = exact[:, 20]  # the first is wrong, the next nine are right
  half[:, 20] = exact[:, 0]
  wrong = np.full_like(exact, -1)
  right, partly, low = quick(
    [system(exact), system(half), system(wrong)], exact
  )
  assert [right.recall(k).mean for k in (1, 10, P)] == [1, 1, 1]
  assert partly.recall(1).mean == 0
  assert partly.recall(10).mean == pytest.approx(0.9)
  assert partly.recall(P).mean == 1
  assert [low.recall(k).mean for k in (1, 10, P)] == [0, 0, 0]
  assert right.recall(100) is None


def test_a_search_of_words_has_no_index_recall(known, rng):
  ids = rankings(rng)
  (row,) = quick([system(ids, by_embeddings=False)], ids, known)
  assert row.index_recalls == ()
  assert row.metrics == QuestionMetrics(known)(ids)


def test_rounds_go_through_the_systems_in_turn_and_back(rng):
  exact, order = rankings(rng), []

  def spy(name):
    def search(rows, k):
      order.append((name, len(rows)))
      return exact[rows, :k]

    return System(
      family=name,
      settings="",
      search=search,
      by_embeddings=True,
      build_secs=None,
      memory_bytes=1,
    )

  rows = quick([spy("a"), spy("b")], exact)
  timed = [name for name, size in order if size == 256]
  assert list(dict.fromkeys(timed)) == ["a", "b"]
  changes = [timed[0]]
  for name in timed:
    if name != changes[-1]:
      changes.append(name)
  assert changes == ["a", "b", "a"]  # the second round begins with b
  for row in rows:
    assert {size: len(v) for size, v in row.speeds.items()} == {1: 2, 256: 2}
    assert row.speed(1) == np.median(row.speeds[1])


@pytest.mark.parametrize(
  "changes", [{"rounds": 0}, {"speed_secs": 0.0}, {"systems": []}]
)
def test_measuring_nothing_is_refused(changes, rng):
  exact = rankings(rng)
  arguments = {"systems": [system(exact)], "exact_ids": exact} | changes
  with pytest.raises(ValueError, match=r"expected at least one.*Change them"):
    measure(**arguments)
