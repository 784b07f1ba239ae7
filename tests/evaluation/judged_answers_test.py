"""Judged answers: what is measured, compared, kept and shown."""

import itertools
import json
import math

import numpy as np
import pytest

from rag_jax.data.questions import Question
from rag_jax.decoding.answerer import Answer
from rag_jax.decoding.answerer import AnswerDoc
from rag_jax.evaluation import differences
from rag_jax.evaluation import judged_answers
from rag_jax.evaluation.answer_metrics import compare
from rag_jax.evaluation.answer_metrics import metrics
from rag_jax.evaluation.answers_page import write_summary
from rag_jax.evaluation.judged_answers import JudgedAnswer
from rag_jax.evaluation.judged_answers import judge
from rag_jax.evaluation.judged_answers import line_of
from rag_jax.evaluation.judged_answers import read_judged


def judged(number, match, *, f1=None, rank=0, relation="", words=3):
  return JudgedAnswer(
    question=" ".join([f"q{number}", *["word"] * (words - 1)]),
    answers=("right",),
    relation=relation,
    prediction="right" if match else "wrong <b>",
    log_prob=-1.0 - number,
    exact_match=float(match),
    token_f1=float(match) if f1 is None else f1,
    num_retrieved=5,
    answer_rank=rank,
    docs=(
      {"id": "a<", "title": "T", "text": "<script>", "score": 1.0,
       "prior": 0.5, "posterior": 0.25},
    ),
  )  # fmt: skip


def test_an_answer_is_judged_by_the_first_passage_that_holds_it():
  doc = AnswerDoc("id", "Title", "text", 1.0, 0.5, 0.25, (0.25,))
  answer = Answer(
    question="Where?", text="The Lima.", log_prob=-0.5, tokens=("Lima",),
    token_log_probs=(-0.5,), docs=(doc,), question_cut=False, retrieved=(1, 2),
  )  # fmt: skip
  texts = ["Peru: its capital", "It is Lima, in Peru", "Lima"]
  question = Question("Where?", ("Lima", "Callao"), relation="capital")
  found = judge(answer, question, texts, variant="squad", language="en")
  assert (found.exact_match, found.token_f1) == (1.0, 1.0)
  assert (found.answer_rank, found.num_retrieved) == (2, 3)
  assert found.docs == (
    {"id": "id", "title": "Title", "text": "text", "score": 1.0, "prior": 0.5,
     "posterior": 0.25},
  )  # fmt: skip
  none = judge(answer, question, ["Peru"], variant="squad", language="en")
  assert none.answer_rank == 0
  assert json.loads(line_of(found))["prediction"] == "The Lima."


def test_metrics_are_means_of_all_and_of_parts():
  answers = [
    judged(0, True, rank=1, relation="river", words=3),
    judged(1, False, f1=0.5, rank=4, relation="river", words=8),
    judged(2, True, rank=0, relation="capital", words=8),
    judged(3, False, rank=2, words=30),
  ]
  found = metrics(answers)
  assert list(found) == [
    "all", "relation: capital", "relation: river", "words: 1 to 5",
    "words: 6 to 10", "words: 21 or more",
  ]  # fmt: skip
  every = found["all"]
  assert every["num_questions"] == 4
  assert every["exact_match"]["mean"] == 0.5
  assert every["token_f1"]["mean"] == 0.625
  assert every["answer_recall_at_1"]["mean"] == 0.25
  assert every["answer_recall_at_5"]["mean"] == 0.75
  assert "answer_recall_at_10" not in every
  assert every["log_prob"] == -2.5
  low, high = every["exact_match"]["low"], every["exact_match"]["high"]
  assert 0.0 < low < 0.5 < high < 1.0
  assert found["relation: river"]["exact_match"]["mean"] == 0.5
  assert found["words: 6 to 10"]["num_questions"] == 2
  with pytest.raises(ValueError, match="no answers to measure"):
    metrics([])


def test_closed_book_answers_have_no_recall():
  one = judged(0, True)
  values = {name: getattr(one, name) for name in one.__slots__}
  alone = JudgedAnswer(**values | {"num_retrieved": 0, "docs": ()})
  assert set(metrics([alone])["all"]) == {
    "num_questions", "exact_match", "token_f1", "log_prob"
  }  # fmt: skip


@pytest.mark.parametrize(("better", "worse"), [(5, 1), (1, 5), (7, 0), (3, 3)])
def test_p_values_are_those_of_all_assignments(better, worse):
  one = [judged(i, i < better) for i in range(better + worse + 4)]
  other = [
    judged(i, better <= i < better + worse) for i in range(better + worse + 4)
  ]
  found = compare(one, other)
  match = found["exact_match"]
  assert (match["better"], match["worse"]) == (better, worse)
  total = better + worse + 4
  assert match["difference"] == pytest.approx((better - worse) / total)
  assert match["low"] <= match["difference"] <= match["high"]
  # McNemar and random signs agree where differences are -1, 0 and 1: count all
  # signs of those that differ.
  signs = itertools.product((-1, 1), repeat=better + worse)
  extreme = [abs(sum(s)) >= abs(better - worse) for s in signs]
  expected = np.mean(extreme)
  assert match["p"] == pytest.approx(expected)
  assert found["token_f1"]["p"] == pytest.approx(expected, abs=0.02)


def test_the_interval_of_a_difference_covers_it_about_as_often_as_it_says(
  monkeypatch,
):
  monkeypatch.setattr(differences, "_RESAMPLES", 400)
  rng = np.random.default_rng(0)
  true, covered, trials = 0.2, 0, 100
  for _ in range(trials):
    answers, others = [], []
    for i in range(60):
      one, other = rng.random() < 0.6, rng.random() < 0.4
      answers.append(judged(i, one))
      others.append(judged(i, other))
    found = compare(answers, others)["exact_match"]
    covered += found["low"] <= true <= found["high"]
  assert covered >= 88


def test_equal_models_do_not_differ_and_no_interval_is_a_point():
  answers = [judged(i, i % 2) for i in range(10)]
  for name in ("exact_match", "token_f1"):
    found = compare(answers, answers[::-1])[name]  # order does not matter
    assert (found["difference"], found["p"]) == (0.0, 1.0)
    assert -0.7 < found["low"] < 0 < found["high"] < 0.7


def test_other_questions_are_refused_with_an_example():
  one = [judged(i, True) for i in range(4)]
  with pytest.raises(
    ValueError, match=r"1 of 4 are not among .*'q3 word word', and 2 of 5"
  ):
    compare(one, [*one[:3], judged(7, True), judged(8, True)])


def test_lines_come_back_and_damage_is_named(tmp_path):
  answers = [judged(i, i % 2, relation="r") for i in range(3)]
  path = tmp_path / judged_answers.LINES
  path.write_text("".join(line_of(x) + "\n" for x in answers))
  assert read_judged(tmp_path) == read_judged(path) == answers
  path.write_text(path.read_text() + '{"question": "q"}\n')
  with pytest.raises(ValueError, match=r"answers.jsonl:4: no field 'answers'"):
    read_judged(path)
  with pytest.raises(FileNotFoundError, match="rag-jax evaluate wrote"):
    read_judged(tmp_path / "none")


def test_the_page_shows_the_surest_wrong_answers_and_escapes_all(tmp_path):
  answers = [judged(i, i == 0, rank=i % 3) for i in range(60)]
  found, tables = write_summary(tmp_path, "A & B", answers, answers)
  assert json.loads((tmp_path / "metrics.json").read_text()) == found
  assert [heading for heading, _ in tables] == [
    "Metrics",
    "Parts",
    "Difference",
  ]
  text = (tmp_path / "report.html").read_text()
  assert "<title>A &amp; B</title>" in text
  assert "<script>" not in text
  assert "wrong <b>" not in text
  assert "50 of 59" in text
  # q0 is right, so q1 is the surest wrong one; the last are not shown.
  assert text.index("<h3>q1 ") < text.index("<h3>q2 ")
  assert "<h3>q0 " not in text
  assert "<h3>q51 " not in text
  assert "http" not in text  # self-contained
  assert math.isclose(found["difference"]["exact_match"]["p"], 1.0)
