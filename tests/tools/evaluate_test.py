"""tools/evaluate.py as a person runs it."""

import json
import shutil

from processes import run_tool
import pytest

FACTS = {
  "What is the capital of France?": "Paris",
  "What is the capital of Peru?": "Lima",
  "What is the capital of Kenya?": "Atlantis",  # which nobody answers
}


@pytest.fixture
def questions(tmp_path):
  path = tmp_path / "questions.jsonl"
  lines = [{"question": q, "answers": [a]} for q, a in FACTS.items()]
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))
  return path


def evaluate(learned, questions, output, *arguments):
  return run_tool(
    "evaluate.py",
    f"--workdir={learned.workdir}",
    f"--questions={questions}",
    f"--output={output}",
    *arguments,
  )


def test_a_run_is_measured_compared_and_goes_on(learned, questions, tmp_path):
  one, other = tmp_path / "one", tmp_path / "other"
  done = evaluate(learned, questions, one, "--batch_size=2")
  assert done.returncode == 0, done.stderr
  lines = (one / "answers.jsonl").read_text().splitlines()
  found = [json.loads(line) for line in lines]
  assert [x["question"] for x in found] == list(FACTS)
  assert [x["exact_match"] for x in found] == [1.0, 1.0, 0.0]
  assert [x["answer_rank"] for x in found][:2] == [1, 1]
  assert found[2]["answer_rank"] == 0
  assert found[0]["num_retrieved"] == 20
  metrics = json.loads((one / "metrics.json").read_text())["metrics"]["all"]
  assert metrics["exact_match"]["mean"] == pytest.approx(2 / 3)
  assert "answer_recall_at_20" in metrics
  assert "Atlantis" in (one / "report.html").read_text()
  assert "0.667 (" in done.stdout

  # Interrupted in the middle of a line, it goes on, and compares.
  other.mkdir()
  shutil.copy(one / "evaluation.json", other)
  (other / "answers.jsonl").write_text(lines[0] + "\n" + lines[1][:40])
  done = evaluate(learned, questions, other, f"--against={one}")
  assert done.returncode == 0, done.stderr
  # Rounding depends on how many questions are answered together.
  again = (other / "answers.jsonl").read_text().splitlines()
  assert again[0] == lines[0]
  names = "question", "prediction", "exact_match", "answer_rank"
  for a, b in zip(map(json.loads, again), found, strict=True):
    assert [a[name] for name in names] == [b[name] for name in names]
  difference = json.loads((other / "metrics.json").read_text())["difference"]
  assert difference["exact_match"]["difference"] == 0.0
  assert "Difference" in done.stdout

  # Nothing that was written is lost to a mistake.
  few = evaluate(learned, questions, one, "--num_questions=2")
  assert few.returncode != 0
  assert "holds another evaluation than this: questions differ" in few.stderr
  beams = evaluate(learned, questions, one, "--num_beams=2")
  assert "than this: num_beams differ" in beams.stderr
  assert (one / "answers.jsonl").read_text().splitlines() == lines


def test_pages_are_found_and_metrics_chosen(learned, tmp_path):
  # The ids of the passages are not Wikipedia's, so that titles have to do.
  title = {r["text"]: r["title"] for r in learned.records()}
  france = next(t for text, t in title.items() if "Paris" in text)
  questions = tmp_path / "kilt.jsonl"
  outputs = [
    [{"answer": "Paris", "provenance": [{"wikipedia_id": "5", "title": t}]}]
    for t in (france, "Atlantis")
  ]
  outputs.append([{"answer": "Lima"}])
  lines = [
    {"input": question, "output": output}
    for question, output in zip(FACTS, outputs, strict=True)
  ]
  questions.write_text("".join(json.dumps(line) + "\n" for line in lines))
  output = tmp_path / "out"
  done = evaluate(learned, questions, output, "--metrics=em,rouge,bleu,kilt")
  assert done.returncode == 0, done.stderr
  found = json.loads((output / "metrics.json").read_text())
  every = found["metrics"]["all"]
  assert set(every) == {
    "num_questions", "log_prob", "exact_match", "rouge1", "rouge2", "rougeL",
    "bleu", "r_precision", "gold_recall_at_5", "kilt_exact_match",
    "kilt_token_f1", "kilt_accuracy", "kilt_rougeL",
  }  # fmt: skip
  assert every["r_precision"]["num_questions"] == 2
  assert every["r_precision"]["mean"] == 0.5
  assert every["kilt_exact_match"]["mean"] == 0.5
  assert found["notes"] == [
    "1 of 3 questions name no gold passage or page: they have no R-precision"
    " and no KILT scores.",
    "Gold pages are recognised by their titles: their Wikipedia ids are not ids"
    " in this corpus.",
    "1 of 2 gold pages are not in the corpus: they count as not found.",
  ]
  assert all(note in done.stdout for note in found["notes"])


@pytest.mark.parametrize(
  ("argument", "message"),
  [
    ("--batch_size=0", "--batch_size=0; expected 1 or more"),
    ("--num_questions=-1", "--num_questions=-1; expected 0 or more"),
    ("--against=/nowhere", "There is no /nowhere"),
    ("--answers=best", "--answers"),
    ("--metrics=em,meteor", "no metric 'meteor'"),
    ("--metrics=em,kilt", "no question names a gold passage or page"),
    ("--model=also", "expected one of them"),
  ],
)
def test_what_cannot_work_is_refused_first(
  learned, questions, tmp_path, argument, message
):
  done = evaluate(learned, questions, tmp_path / "out", argument)
  assert done.returncode != 0
  assert message in done.stderr + done.stdout
  assert "Traceback" not in done.stderr
  assert not list((tmp_path / "out").glob("*"))


def test_answers_are_chosen_from_labels(learned, tmp_path):
  questions, output = tmp_path / "claims.jsonl", tmp_path / "labels"
  facts = {
    "Kenya": "Africa",
    "France": "Europe",
    "Peru": "Asia",
  }  # one is wrong
  lines = [
    {"claim": f"What is the continent of {name}?", "label": label}
    for name, label in facts.items()
  ]
  questions.write_text("".join(json.dumps(line) + "\n" for line in lines))
  labels = "--labels=Africa, Asia, Europe, South America"
  done = evaluate(learned, questions, output, labels)
  assert done.returncode == 0, done.stderr
  text = (output / "answers.jsonl").read_text()
  found = [json.loads(line) for line in text.splitlines()]
  assert [x["prediction"] for x in found] == [
    "Africa", "Europe", "South America"
  ]  # fmt: skip
  for x in found:
    assert len(x["labels"]) == 4
    assert sum(x["labels"].values()) == pytest.approx(1)
    assert max(x["labels"], key=x["labels"].get) == x["prediction"]
  metrics = json.loads((output / "metrics.json").read_text())["metrics"]["all"]
  assert metrics["accuracy"]["mean"] == pytest.approx(2 / 3)

  other = evaluate(learned, questions, tmp_path / "no", "--labels=Asia,Europe")
  assert other.returncode != 0
  assert "None of --labels=Asia,Europe is an answer of" in other.stderr
  again = evaluate(learned, questions, output)
  assert "holds another evaluation than this: labels differ" in again.stderr


@pytest.mark.parametrize("tool", ["evaluate.py", "probe.py"])
def test_a_checkpoint_is_asked_questions_that_are_given(tool, tmp_path):
  output = tmp_path / "none"
  done = run_tool(
    tool, f"--model={tmp_path}", "--corpus=x.jsonl", f"--output={output}"
  )
  assert done.returncode != 0
  assert "has no questions of its own; expected --questions" in done.stderr
  assert not output.exists()


def test_a_dialogue_is_measured_with_its_history(learned, tmp_path):
  path = tmp_path / "dialogue.jsonl"
  asked = {
    "question": "And its continent?",
    "answers": ["Europe"],
    "knowledge": "France belongs to the continent of Europe.",
  }
  said = ["What is the capital of France?", "Paris"]
  lines = [asked, asked | {"history": said}]
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))
  done = evaluate(
    learned, path, tmp_path / "out", "--metrics=em,f1,bleu,knowledge"
  )
  assert done.returncode == 0, done.stderr
  text = (tmp_path / "out" / "answers.jsonl").read_text()
  alone, after = map(json.loads, text.splitlines())
  assert (alone["history"], after["history"]) == ([], said)
  assert after["docs"][0]["title"] == "France" != alone["docs"][0]["title"]
  found = json.loads((tmp_path / "out" / "metrics.json").read_text())["metrics"]
  assert found["all"]["knowledge_f1"]["mean"] == pytest.approx(
    (alone["knowledge_f1"] + after["knowledge_f1"]) / 2
  )
  assert "bleu" in found["all"]
  assert found["question 2 of a dialogue"]["num_questions"] == 1
