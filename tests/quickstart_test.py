"""The README's first command, shortened, and the questions it invites.

A run of a third of the steps: what it must not do is answer the README's own
question wrongly, in whatever form a person types it.
"""

import json

from processes import run_tool
import pytest

from rag_jax.corpus.documents import BUNDLED

FRANCE = (
  "What is the capital of France?",
  "what is the capital of france?",
  "what's the capital of france",
  "What's France's capital?",
)
NOWHERE = (
  "What is the capital of Atlantis?",
  "what's the capital of narnia",
  "What is the currency of Mordor?",
  "Which currency does Wakanda use?",
)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  path = tmp_path_factory.mktemp("quickstart") / "run"
  trained = run_tool(
    "train.py",
    "--config=configs/quickstart.py",
    f"--workdir={path}",
    "--config.warmup.num_steps=80",
    "--config.train.num_steps=200",
    "--config.eval.num_test=256",
    optimized=True,
    timeout=1500,  # minutes, on a machine that does other things too
  )
  assert trained.returncode == 0, trained.stderr[-3000:]
  return path


@pytest.fixture(scope="module")
def answers(workdir):
  return ask(workdir, *FRANCE, *NOWHERE)


def ask(workdir, *arguments):
  """Returns the answer to each question."""
  asked = run_tool("ask.py", f"--workdir={workdir}", "--json", *arguments)
  assert asked.returncode == 0, asked.stderr
  records = [json.loads(line) for line in asked.stdout.splitlines()]
  return {record["question"]: record for record in records}


def test_most_questions_about_unseen_entities_are_answered(workdir):
  results = json.loads((workdir / "results.json").read_text())
  assert results["test/exact_match"] >= 0.8
  assert results["test/answer_recall_at_5"] >= 0.95


@pytest.mark.parametrize("question", FRANCE)
def test_the_capital_of_france_is_paris_however_one_asks(answers, question):
  answer = answers[question]
  assert answer["text"] == "Paris"
  assert answer["docs"][0]["id"] == "country/FR/capital"


def test_the_question_of_the_readme_is_surer_than_what_nobody_can_answer(
  answers,
):
  # The whole recipe is sure; a third of its steps are too few for that.
  likely = answers[FRANCE[0]]["log_prob"]
  assert likely > max(answers[question]["log_prob"] for question in NOWHERE)


@pytest.mark.parametrize("question", NOWHERE)
def test_what_no_passage_answers_is_not_answered_surely(answers, question):
  assert not answers[question]["sure"]


def test_an_edited_passage_changes_the_answer(workdir, tmp_path):
  corpus = (BUNDLED["world_facts"] / "passages.jsonl").read_text()
  edited = corpus.replace("The capital is Paris", "The capital is Marseille")
  assert edited != corpus
  (tmp_path / "edited.jsonl").write_text(edited)
  answers = ask(workdir, f"--corpus={tmp_path / 'edited.jsonl'}", *FRANCE)
  assert [a["text"] for a in answers.values()] == ["Marseille"] * 4
