"""Gold recall, MRR and nDCG, against trec_eval itself."""

import math
import random

import numpy as np
import pytest
import pytrec_eval

from rag_jax.evaluation.ranking_metrics import mrr_at_10
from rag_jax.evaluation.ranking_metrics import ndcg_at_10
from rag_jax.evaluation.ranking_metrics import recall_at_k
from rag_jax.evaluation.ranking_metrics import trec_eval_order

ALL = pytest.mark.parametrize(
  "metric",
  [lambda ranked, qrels: recall_at_k(ranked, qrels, 5), mrr_at_10, ndcg_at_10],
  ids=["recall_at_k", "mrr_at_10", "ndcg_at_10"],
)


def cases(seed, num_questions=200):
  """Returns runs with many ties, and grades of some of their passages."""
  rng = random.Random(seed)
  names = [*map(str, range(25)), "é", "z", "Z"]
  runs, qrels = [], []
  for _ in range(num_questions):
    found = rng.sample(names, rng.randrange(1, len(names)))
    runs.append({name: rng.randrange(6) / 3 for name in found})
    judged = rng.sample(names, rng.randrange(1, 15))
    qrels.append({name: rng.choice([-1, 0, 0, 1, 1, 2, 3]) for name in judged})
  return runs, qrels


def trec_eval(runs, qrels, measure):
  evaluator = pytrec_eval.RelevanceEvaluator(
    {str(i): judged for i, judged in enumerate(qrels)}, {measure}
  )
  results = evaluator.evaluate({str(i): run for i, run in enumerate(runs)})
  name = measure.replace(".", "_")
  return [results[str(i)][name] for i in range(len(runs))]


@pytest.mark.parametrize("k", [1, 5, 20, 100])
def test_recall_is_that_of_trec_eval(k):
  runs, qrels = cases(seed=k)
  ranked = [trec_eval_order(run) for run in runs]
  expected = trec_eval(runs, qrels, f"recall.{k}")
  np.testing.assert_allclose(recall_at_k(ranked, qrels, k), expected)
  assert 0 < np.mean(expected) < 1


def test_ndcg_is_that_of_trec_eval():
  runs, qrels = cases(seed=7)
  ranked = [trec_eval_order(run) for run in runs]
  expected = trec_eval(runs, qrels, "ndcg_cut.10")
  np.testing.assert_allclose(ndcg_at_10(ranked, qrels), expected)
  assert len(set(expected)) > 100


def test_mrr_is_that_of_trec_eval_for_a_run_that_ends_at_10():
  runs, qrels = cases(seed=8)
  ranked = [trec_eval_order(run) for run in runs]
  cut = [
    {name: run[name] for name in names[:10]}
    for run, names in zip(runs, ranked, strict=True)
  ]
  expected = trec_eval(cut, qrels, "recip_rank")
  np.testing.assert_allclose(mrr_at_10(ranked, qrels), expected)
  assert len(set(expected)) > 5


def test_scores_tie_in_float32_and_the_later_name_comes_first():
  run = {"9": 1.0, "10": 1.0 + 1e-12, "é": 1.0, "a": 2.0}
  assert trec_eval_order(run) == ["a", "é", "9", "10"]


def test_a_metric_by_hand():
  ranked = [[4, 2, 9, 7]]
  qrels = [{2: 1, 7: 3, 5: 2, 4: 0}]
  assert recall_at_k(ranked, qrels, 2).tolist() == [1 / 3]
  assert recall_at_k(ranked, qrels, 4).tolist() == [2 / 3]
  assert mrr_at_10(ranked, qrels).tolist() == [1 / 2]
  got = 1 / math.log2(3) + 3 / math.log2(5)
  best = 3 + 2 / math.log2(3) + 1 / 2
  np.testing.assert_allclose(ndcg_at_10(ranked, qrels), [got / best])


def test_a_passage_at_rank_11_counts_for_recall_alone():
  ranked, qrels = [list(range(11))], [{10: 1}]
  assert recall_at_k(ranked, qrels, 11).tolist() == [1]
  assert mrr_at_10(ranked, qrels).tolist() == [0]
  assert ndcg_at_10(ranked, qrels).tolist() == [0]


@ALL
def test_rows_of_an_index_are_ids_and_its_gaps_are_not(metric):
  ids = np.array([[3, -1, -1], [0, 1, 2]], np.int32)
  qrels = [{3: 1, -1: 1, 5: 1}, {7: 1}]
  short = metric([[3], [0, 1, 2]], qrels)
  np.testing.assert_array_equal(metric(ids, qrels), short)
  assert short[0] > 0 == short[1]


@ALL
def test_a_question_without_a_passage_of_use_has_0(metric):
  assert metric([["a"], ["a"], []], [{"a": 0}, {}, {}]).tolist() == [0, 0, 0]


@ALL
def test_one_number_a_question_is_needed(metric):
  with pytest.raises(ValueError, match="ranked_ids has 2 questions, qrels has"):
    metric([["a"], ["b"]], [{"a": 1}])


@ALL
def test_a_passage_that_is_ranked_twice_is_refused(metric):
  with pytest.raises(ValueError, match=r"'b' is ranked more.*question 1; exp"):
    metric([["a"], ["a", "b", "b"]], [{"a": 1}, {"a": 1}])


@ALL
def test_numbers_are_not_compared_with_strings(metric):
  with pytest.raises(ValueError, match=r"like \[3\], .* like \['3'\]; expect"):
    metric([[3]], [{"3": 1}])


@pytest.mark.parametrize("k", [0, -1])
def test_a_recall_of_no_passages_is_refused(k):
  with pytest.raises(ValueError, match=f"k={k} passages to look at; expected"):
    recall_at_k([["a"]], [{"a": 1}], k)
