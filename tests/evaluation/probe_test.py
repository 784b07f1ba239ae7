"""Exchanged facts and worse documents, and the command that measures both."""

import collections
import json

import numpy as np
from processes import run_tool
import pytest

from rag_jax.corpus.passages import Passage
from rag_jax.data.questions import Question
from rag_jax.evaluation.probe import RECALLS
from rag_jax.evaluation.probe import choices
from rag_jax.evaluation.probe import exchange_facts

PASSAGES = [
  Passage("0", "France", "The capital of France is Paris. Paris is large."),
  Passage("1", "France", "Its river is the Seine; a city is Paris-Plage."),
  Passage("2", "Peru", "The capital of Peru is Lima, not Limassol."),
  Passage("3", "Kenya", "The capital of Kenya is New Nairobi (Nairobi)."),
  Passage("4", "Rome", "The capital of Italy is Rome."),
  Passage("5", "Chad", "Nothing is known of Chad."),
]


def ask(question, *answers, relation="capital"):
  return Question(question, answers, relation=relation)


QUESTIONS = [
  ask("What is the capital of France?", "Paris"),
  ask("Tell me the capital of Peru.", "Lima"),
  ask("What is the capital of Kenya?", "Nairobi", "New Nairobi"),
  ask("Which city is the capital of France?", "Paris"),
  ask("Which capital is Rome?", "Rome"),  # the title says so too
  ask("What is the capital of Chad?", "N'Djamena"),  # no passage says so
  ask("What is the river of France?", "Seine", relation="river"),  # no other
  ask("What is the capital of Atlantis?", "Poseidonis"),
]


@pytest.mark.parametrize("seed", range(4))
def test_passages_state_the_new_answers_and_only_these(seed):
  found = exchange_facts(PASSAGES, QUESTIONS, seed)
  assert [q.question for q in found.before] == [
    q.question for q in QUESTIONS[:4]
  ]
  assert found.num_left_out == 4
  new = {q.question: q.answers[0] for q in found.after}
  answers = {q.answers[0] for q in QUESTIONS if q.relation == "capital"}
  for question, (answer, *_) in zip(
    QUESTIONS, [q.answers for q in found.after], strict=False
  ):
    assert answer in answers - set(question.answers)
  # Questions about one fact have one answer.
  assert new[QUESTIONS[0].question] == new[QUESTIONS[3].question]
  paris, lima, nairobi = (new[q.question] for q in QUESTIONS[:3])
  texts = [p.text for p in found.passages]
  assert texts[0] == f"The capital of France is {paris}. {paris} is large."
  assert texts[1] == f"Its river is the Seine; a city is {paris}-Plage."
  assert texts[2] == f"The capital of Peru is {lima}, not Limassol."
  assert texts[3] == f"The capital of Kenya is {nairobi} ({nairobi})."
  assert texts[4:] == [p.text for p in PASSAGES[4:]]
  assert [p.title for p in found.passages] == [p.title for p in PASSAGES]


def test_an_answer_inside_another_is_replaced_once():
  passages = [
    Passage("0", "A", "The city of A is York."),
    Passage("1", "B", r"The city of B is New York\1."),
  ]
  questions = [
    ask("What city is in A?", "York"),
    ask("What city is in B?", r"New York\1"),
    ask("Which city is in A?", "York"),
  ]
  found = exchange_facts(passages, questions, 0)
  assert found.passages[0].text == r"The city of A is New York\1."
  assert found.passages[1].text == "The city of B is York."
  assert len(found.after) == 3


def test_questions_about_no_title_are_refused():
  with pytest.raises(ValueError, match="None of 1 questions names the title"):
    exchange_facts(PASSAGES, QUESTIONS[-1:], 0)


K, BLANK, NUM = 3, 60, 61
FOUND = np.stack(
  [np.random.default_rng(i).permutation(NUM)[:30] for i in range(40)]
)
FOUND[:, 1] = BLANK


def best(row):
  return [int(x) for x in row if x != BLANK][:K]


def test_conditions_change_what_they_say():
  found = choices(K, NUM, BLANK, seed=0)
  expected = np.array([best(row) for row in FOUND])
  np.testing.assert_array_equal(found["as retrieved"][2](FOUND), expected)
  recall = found["index recall 1.0"][2](FOUND)
  np.testing.assert_array_equal(recall, expected)
  shuffled = found["in random order"][2](FOUND)
  assert np.any(shuffled != expected)
  np.testing.assert_array_equal(np.sort(shuffled), np.sort(expected))
  for num in (1, 2):
    kept = expected[:, : K - num]
    for name, rest in (
      ("random passages", None),
      ("empty", np.full((40, num), BLANK)),
      ("the best again", np.repeat(expected[:, :1], num, axis=1)),
    ):
      docs = found[f"{num} of {K} {name}"][2](FOUND)
      np.testing.assert_array_equal(docs[:, : K - num], kept)
      if rest is not None:
        np.testing.assert_array_equal(docs[:, K - num :], rest)
        continue
      for row, own in zip(docs, expected, strict=True):
        assert len(set(row.tolist())) == K
        assert BLANK not in row
        assert not set(row[K - num :].tolist()) & set(own.tolist())
  assert len(found) == 2 + 3 * (K - 1) + len(RECALLS)


@pytest.mark.parametrize("recall", RECALLS)
def test_recall_is_what_is_left_of_the_best(recall):
  found = choices(K, NUM, BLANK, seed=0)
  choose = found[f"index recall {recall:.1f}"][2]
  kept = collections.Counter()
  for _ in range(30):
    for row, docs in zip(FOUND, choose(FOUND), strict=True):
      own = best(row)
      kept["kept"] += len(set(own) & set(docs.tolist()))
      kept["all"] += K
      # What fills up is next best, in its order.
      places = [row.tolist().index(x) for x in docs]
      assert places == sorted(places)
      assert BLANK not in docs
  assert kept["kept"] / kept["all"] == pytest.approx(recall, abs=0.03)


def test_a_model_that_reads_follows_the_passages(learned, tmp_path):
  done = run_tool(
    "probe.py",
    f"--workdir={learned.workdir}",
    f"--output={tmp_path / 'probe'}",
    "--num_questions=60",
  )
  assert done.returncode == 0, done.stderr
  found = json.loads((tmp_path / "probe" / "probe.json").read_text())
  assert found["num_questions"] == 60
  assert found["num_exchanged"] + found["num_left_out"] == 60
  assert found["num_exchanged"] > 40
  for corpus, other in (("before", "after"), ("after", "before")):
    assert found["exchanged"][corpus][corpus]["mean"] > 0.85
    assert found["exchanged"][corpus][other]["mean"] < 0.05
  docs = {name: x["mean"] for name, x in found["documents"].items()}
  assert docs["as retrieved"] == docs["index recall 1.0"] > 0.85
  assert docs["in random order"] == docs["as retrieved"]  # a sum has no order
  assert docs["index recall 0.5"] < docs["as retrieved"] - 0.2
  assert "| as retrieved | " in done.stdout
  assert (tmp_path / "probe" / "probe.png").stat().st_size > 10_000
  for name in ("passages", "exchanged"):
    lines = (tmp_path / "probe" / f"{name}.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["id"] == "blank"


@pytest.mark.parametrize(
  ("flag", "message"),
  [
    ("--batch_size=0", "--batch_size=0; expected 1 or more"),
    ("--max_passages=10", "at most --max_passages=10, since"),
  ],
)
def test_what_cannot_be_tested_is_refused(learned, tmp_path, flag, message):
  output = tmp_path / "probe"
  done = run_tool(
    "probe.py", f"--workdir={learned.workdir}", f"--output={output}", flag
  )
  assert done.returncode != 0
  assert message in done.stderr
  assert not output.exists()
