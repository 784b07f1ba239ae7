"""The tuner's choice against its own frontier, and against loops."""

import dataclasses
import re
import sys

from indexes import FINGERPRINTS
import numpy as np
import pytest

from rag_jax.config import Config
from rag_jax.config import IndexConfig
from rag_jax.config_rules import validate
from rag_jax.retrieval.certify import certify
from rag_jax.retrieval.index import build_index
from rag_jax.retrieval.index import load_index
from rag_jax.retrieval.recall import Recall
from rag_jax.retrieval.tuner import Trial
from rag_jax.retrieval.tuner import TunerSettings
from rag_jax.retrieval.tuner import tune

P, R, K, TARGET = 5000, 24, 10, 0.9
QUICK = TunerSettings(
  speed_secs=0.01,
  repeats=2,
  batch_size=64,
  pca_shares=(0.5,),
  soar_lambdas=(1.5,),
  reorder_dtypes=("int8",),
  dims_per_block=(4,),
  anisotropic_thresholds=(0.0,),
)
NO_BUDGET = dataclasses.replace(QUICK, budget_secs=0.0)


def clusters(*sizes):
  """Returns vectors about the same 100 topics, as often as there are sizes."""
  rng = np.random.default_rng(0)
  centres = rng.normal(size=(100, R))
  return [
    (centres[rng.integers(100, size=n)] + 0.6 * rng.normal(size=(n, R))).astype(
      np.float32
    )
    for n in sizes
  ]


PASSAGES, QUESTIONS = clusters(P, 900)


def run(passages=PASSAGES, questions=QUESTIONS, **changes):
  arguments = {
    "target_recall": TARGET,
    "k": K,
    "config": IndexConfig(),
    "settings": QUICK,
  }
  return tune(passages, questions, **arguments | changes)


@pytest.fixture(scope="module")
def tuned():
  return run()


def loop_recall(index, questions):
  """Returns the mean share of the exact top K, one question at a time."""
  shares = []
  for start in range(0, len(questions), QUICK.batch_size):
    batch = questions[start : start + QUICK.batch_size]
    for question, found in zip(batch, index.search(batch, K)[0], strict=True):
      scores = PASSAGES.astype(np.float64) @ question
      shares.append(len({*np.argsort(-scores)[:K]} & {*found}) / K)
  return np.mean(shares)


def rows_of(result):
  """Returns the frontier as it is printed: cells of each row."""
  lines = [r for r in result.table().splitlines() if r.startswith("| ")]
  return [[c.strip() for c in line.strip("|").split("|")] for line in lines[1:]]


def test_the_target_is_reached_on_questions_that_were_held_out(tuned):
  assert tuned.chosen.reaches(TARGET)
  assert tuned.held_out.high >= TARGET
  assert tuned.reached == (tuned.held_out.mean >= TARGET)
  assert (tuned.num_tuning, len(tuned.held_out_questions)) == (450, 450)
  held_out = {row.tobytes() for row in tuned.held_out_questions}
  assert len(held_out) == 450
  assert held_out < {row.tobytes() for row in QUESTIONS}
  expected = loop_recall(tuned.index, tuned.held_out_questions)
  assert tuned.held_out.mean == pytest.approx(expected)


def test_the_choice_is_the_fastest_that_reaches_the_target_as_printed(tuned):
  rows = rows_of(tuned)
  assert len(rows) == len(tuned.frontier)
  speeds = [int(row[1].replace(",", "")) for row in rows]
  assert speeds == sorted(speeds, reverse=True)
  reaching = [row for row in rows if row[-1].startswith("yes")]
  assert [row[-1] for row in rows].count("yes, chosen") == 1
  assert reaching[0][-1] == "yes, chosen"  # the rows are sorted by speed
  assert float(reaching[0][0].split()[0]) >= TARGET
  leaves = tuned.chosen.settings["leaves_to_search"]
  assert reaching[0][4] == str(leaves or "-")
  best = max(t.queries_per_second for t in tuned.trials if t.reaches(TARGET))
  assert tuned.chosen.queries_per_second == best


def test_nothing_that_was_tried_beats_the_frontier_in_both(tuned):
  for trial in tuned.frontier:
    better = [
      t
      for t in tuned.trials
      if t.recall.mean > trial.recall.mean
      and t.queries_per_second > trial.queries_per_second
    ]
    assert not better or trial is tuned.chosen
  for trial in tuned.trials:
    assert any(
      t.recall.mean >= trial.recall.mean
      and t.queries_per_second >= trial.queries_per_second
      for t in tuned.frontier
    )


def test_every_setting_of_scann_is_tried_and_all_passages_too(tuned):
  tried = {
    name: {t.settings[name] for t in tuned.trials}
    for name in tuned.chosen.settings
  }
  assert {70, 140} <= tried["num_leaves"]
  assert {0.0, 1.5} <= tried["soar_lambda"]
  assert {"float32", "int8"} <= tried["reorder_dtype"]
  assert {2, 4} <= tried["dims_per_block"]
  assert {0, R // 2} <= tried["pca_dims"]
  assert len(tried["leaves_to_search"]) > 4
  assert len(tried["reorder"]) > 3
  every = [t for t in tuned.trials if not t.settings["num_leaves"]]
  assert [t.recall.mean for t in every] == [1.0]


def test_the_chosen_config_builds_the_chosen_index(tuned):
  validate(dataclasses.replace(Config(), index=tuned.config))
  index = build_index(PASSAGES, tuned.config, **FINGERPRINTS)
  assert index.settings == tuned.index.settings == tuned.chosen.settings
  # Nearly always it is the same index, but on a busy machine one build in
  # hundreds was another: as good, with a few other passages found.
  recall = loop_recall(index, tuned.held_out_questions)
  assert recall == pytest.approx(tuned.held_out.mean, abs=0.03)


def test_the_tuned_index_can_be_certified_and_saved(tuned, tmp_path):
  index = tuned.index
  index.certificate = certify(
    index, tuned.held_out_questions, max_questions=100, speed_secs=0.0
  )
  index.save(tmp_path)
  loaded = load_index(tmp_path)
  assert loaded.certificate.recall(K).mean > TARGET - 0.1
  assert loaded.settings == index.settings


def test_a_target_that_no_search_reaches_is_said_not_to_be_reached(tuned):
  # On a busy machine the search of all passages may be the fastest.
  trials = tuple(t for t in tuned.trials if t.recall.mean < 1.0)
  best = max(trials, key=lambda t: t.recall.mean)
  result = dataclasses.replace(
    tuned, target_recall=1.0, trials=trials, chosen=best
  )
  assert result.chosen.recall.mean < 1.0
  assert not result.reached
  assert "1 is NOT reached" in result.table()
  assert re.search(r"\| no(: 0\.\d+ when checked)?, chosen \|", result.table())


def test_without_time_for_more_one_build_decides_or_all_passages_are_scored():
  config = IndexConfig(scann_reorder_dtype="int8")
  once, every = (
    run(
      PASSAGES[:600],
      QUESTIONS[:300],
      target_recall=target,
      config=config,
      settings=NO_BUDGET,
    )
    for target in (0.5, 1.0)
  )
  assert {t.settings["num_leaves"] for t in once.trials} == {24}
  assert once.reached
  # int8 orders a few passages otherwise: no leaf helps against that.
  assert {t.settings["num_leaves"] for t in every.trials} == {24, 0}
  assert every.reached
  assert every.chosen.settings["num_leaves"] == 0
  assert every.config.scann_tree_passages > 600


def trial(mean, low, checked=None):
  recall = Recall(k=1, mean=mean, low=low, high=1.0)
  other = checked and Recall(k=1, mean=checked, low=0.0, high=1.0)
  return Trial(
    settings={},
    recall=recall,
    checked=other,
    queries_per_second=1.0,
    memory_bytes=1,
    build_secs=0.0,
  )


def test_luck_with_a_few_questions_does_not_reach_a_target():
  assert not trial(0.96, 0.94).reaches(0.95)
  assert trial(0.97, 0.95).reaches(0.95)
  assert not trial(0.97, 0.95, checked=0.94).reaches(0.95)
  assert trial(0.97, 0.95, checked=0.95).reaches(0.95)
  assert trial(1.0, 0.9).reaches(1.0)


def test_the_table_says_which_trials_were_lucky(tuned):
  lucky = trial(0.99, 0.98, checked=TARGET - 0.05)
  lucky.settings, lucky.queries_per_second = tuned.chosen.settings, 1e9
  result = dataclasses.replace(tuned, trials=(*tuned.trials, lucky))
  assert rows_of(result)[0][-1] == "no: 0.8500 when checked"


@pytest.mark.parametrize("target", [0.0, -1.0, 1.01])
def test_a_recall_that_cannot_be_is_refused(target):
  with pytest.raises(
    ValueError, match=f"target_recall={target}; expected a number above 0"
  ):
    run(target_recall=target)


@pytest.mark.parametrize("number", [0, 2])
def test_too_few_questions_to_hold_some_out_are_refused(number):
  with pytest.raises(
    ValueError, match=f"has {number} questions; expected at least 3"
  ):
    run(questions=QUESTIONS[:number])


def test_three_questions_are_enough_to_tune():
  result = run(
    PASSAGES[:600], QUESTIONS[:3], target_recall=0.5, k=1, settings=NO_BUDGET
  )
  assert (result.num_tuning, len(result.held_out_questions)) == (2, 1)


@pytest.mark.parametrize("k", [0, P + 1])
def test_more_passages_than_there_are_cannot_be_tuned_for(k):
  with pytest.raises(ValueError, match=f"k={k} passages .*expected 1 to {P}"):
    run(k=k)


def test_questions_of_another_size_are_refused():
  with pytest.raises(ValueError, match="the index holds 24-dimensional"):
    run(questions=QUESTIONS[:, 1:])


def test_without_scann_nothing_is_tuned(monkeypatch):
  monkeypatch.setitem(sys.modules, "scann", None)
  with pytest.raises(ValueError, match=r"not installed.*pip install scann"):
    run()
