"""tools/ask.py as a person or a script runs it."""

import json
import os
import re

from processes import run_tool
from processes import run_tool_on_hosts
import pytest

FRANCE = "What is the capital of France?"
PERU = "What is the capital of Peru?"


def ask(workdir, *arguments, stdin="", **settings):
  """Returns the finished process."""
  return run_tool(
    "ask.py", f"--workdir={workdir}", *arguments, input=stdin, **settings
  )


def answered(process):
  """Returns the text of the answers, in JSON, of a process that worked."""
  assert process.returncode == 0, process.stderr
  records = [json.loads(line) for line in process.stdout.splitlines()]
  return [(record["question"], record["text"]) for record in records]


def blocks(process):
  """Returns, for each question, its lines, of a process that worked."""
  assert process.returncode == 0, process.stderr
  assert max(map(len, process.stdout.splitlines())) <= 80
  # One answer has an empty line inside, and one between it and the next.
  parts = process.stdout.split("\n\n")
  return [
    "\n".join(parts[i : i + 2]).splitlines() for i in range(0, len(parts), 2)
  ]


def test_one_question_is_answered_from_its_passages(
  learned, tmp_path, monkeypatch
):
  (tmp_path / "home").symlink_to(learned.workdir.parent)
  before = {path.name for path in learned.workdir.iterdir()}
  monkeypatch.setenv("HOME", str(tmp_path / "home"))
  process = ask("~/run", FRANCE, cwd=tmp_path)
  ((question, answer, header, first, *_),) = blocks(process)
  assert question == FRANCE
  assert answer.startswith("Paris   (p = 0.")
  assert header == "p(z|x)  p(z|x,y)  passage"
  assert first.endswith("France [country/FR/capital]")
  # Nothing is written but what was compiled, and that in the workdir.
  after = {path.name for path in learned.workdir.iterdir()}
  assert after - before <= {".jax_cache"}
  assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_several_questions_are_several_arguments_and_json_has_all(learned):
  process = ask(learned.workdir, "--json", FRANCE, PERU)
  assert answered(process) == [(FRANCE, "Paris"), (PERU, "Lima")]
  record = json.loads(process.stdout.splitlines()[0])
  assert list(record) == [
    "question", "text", "log_prob", "tokens", "token_log_probs", "docs",
    "question_cut", "retrieved", "labels", "sure",
  ]  # fmt: skip
  assert record["docs"][0]["id"] == "country/FR/capital"
  assert sum(doc["posterior"] for doc in record["docs"]) == pytest.approx(1)


def test_a_dash_reads_questions_from_standard_input_without_blank_lines(
  learned,
):
  lines = f"\n{FRANCE}\n\n  \n{PERU}  \r\n"
  france, peru = blocks(ask(learned.workdir, "-", stdin=lines))
  assert france[0] == FRANCE
  assert france[1].startswith("Paris ")
  assert peru[0] == PERU
  assert peru[1].startswith("Lima ")


def test_the_prompt_ends_at_an_empty_line(learned):
  process = ask(learned.workdir, stdin=f"{FRANCE}\n\n{PERU}\n")
  ((question, answer, *_),) = blocks(process)
  assert question == FRANCE
  assert answer.startswith("Paris ")
  assert process.stderr.endswith("Ask a question; an empty line ends.\n> > ")
  assert "PyTorch" not in process.stderr


def test_the_prompt_ends_at_the_end_and_is_not_among_the_answers(learned):
  process = ask(learned.workdir, "--json", "--verbosity=0", stdin=PERU)
  assert answered(process) == [(PERU, "Lima")]
  assert "Answered in " in process.stderr  # seconds


def test_an_answer_is_shown_while_it_is_written(learned):
  process = ask(learned.workdir, "--stream", FRANCE)
  assert process.returncode == 0, process.stderr
  texts = re.findall(r"([^\n]*)\x1b\[K", process.stderr)
  assert len(texts) > 2
  assert texts[-2:] == ["Paris", ""]
  assert all("Paris".startswith(text) for text in texts)
  whole = ask(learned.workdir, FRANCE)
  assert process.stdout == whole.stdout
  assert whole.stderr == ""  # nobody looks at a pipe


def test_another_corpus_is_answered_from_without_training(learned, tmp_path):
  corpus = tmp_path / "edited.jsonl"
  text = learned.passages.read_text()
  assert text.count("Paris") == 1
  corpus.write_text(text.replace("Paris", "Zorbville"))
  process = ask(
    learned.workdir, "--json", f"--corpus={corpus}", "--n_docs=1", FRANCE
  )
  assert answered(process) == [(FRANCE, "Zorbville")]
  assert len(json.loads(process.stdout)["docs"]) == 1


def assert_refused(process, message):
  assert process.returncode == 1
  assert process.stdout == ""
  assert "Traceback" not in process.stderr
  assert process.stderr.splitlines()[-1].startswith(message)


def test_a_folder_that_is_no_workdir_is_refused_and_not_made(tmp_path):
  path = tmp_path / "nothing"
  message = f"FileNotFoundError: No config.json in {path}; expected the"
  assert_refused(ask(path, FRANCE), message)
  assert not path.exists()


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ([" "], "ValueError: Question 1 of 1 is empty: ' '. Ask something"),
    (["--n_docs=-1", FRANCE], "ValueError: n_docs=-1; expected 1 or more"),
    (
      ["--corpus=BROKEN", FRANCE],
      "ValueError: BROKEN:2: not valid JSON (Expecting value",
    ),
  ],
)
def test_what_is_wrong_is_one_message(learned, tmp_path, arguments, message):
  broken = tmp_path / "broken.jsonl"
  broken.write_text('{"id": "1", "title": "", "text": "a"}\n{"id": \n')
  arguments = [a.replace("BROKEN", str(broken)) for a in arguments]
  process = ask(learned.workdir, *arguments)
  assert_refused(process, message.replace("BROKEN", str(broken)))


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ([FRANCE, ""], "ValueError: Question 2 of 2 is empty: ''. Ask something"),
    ([FRANCE, b"\xff"], "ValueError: Question 2 of the command line holds "),
  ],
)
def test_all_questions_are_checked_before_anything_is_opened(
  tmp_path, arguments, message
):
  assert_refused(
    ask(tmp_path / "nothing", *map(os.fsdecode, arguments)), message
  )


def test_a_run_or_a_checkpoint_is_named_and_a_checkpoint_has_a_corpus(tmp_path):
  assert_refused(
    run_tool("ask.py", FRANCE),
    "ValueError: --workdir='' and --model='': expected one of them, a run",
  )
  assert_refused(
    run_tool("ask.py", "--model=hf:facebook/rag-token-nq", FRANCE),
    "ValueError: --model=hf:facebook/rag-token-nq has no passages of its own;",
  )


def test_a_run_may_be_named_as_a_model_and_searched_with_beams(learned):
  process = run_tool(
    "ask.py", f"--model={learned.workdir}", "--num_beams=3", "--json", FRANCE
  )
  assert answered(process) == [(FRANCE, "Paris")]


def test_two_hosts_answer_as_one_does_and_the_first_prints(learned):
  asked = f"--workdir={learned.workdir}", FRANCE, PERU, f"{PERU} {FRANCE}"
  alone = run_tool("ask.py", *asked)
  assert alone.returncode == 0, alone.stderr
  (first, text, _), (second, others, _) = run_tool_on_hosts("ask.py", *asked)
  assert (first, second) == (0, 0), text + others
  assert alone.stdout in text  # Gloo prints there too
  assert "p(z|x)" not in others


def test_the_first_host_reads_the_questions_for_all(learned):
  asked = f"--workdir={learned.workdir}", "--json", "-"
  lines = f"{FRANCE}\n{PERU}\n"
  alone = run_tool("ask.py", *asked, input=lines)
  assert alone.returncode == 0, alone.stderr
  (first, text, _), (second, others, _) = run_tool_on_hosts(
    "ask.py", *asked, stdin=lines
  )
  assert (first, second) == (0, 0), text + others
  assert alone.stdout in text
  assert "log_prob" not in others


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ([FRANCE, ""], "Question 2 of 2 is empty"),  # both hosts see it
    (["--n_docs=-1", FRANCE], "n_docs=-1; expected 1 or more"),  # the first
  ],
)
def test_a_bad_question_ends_both_hosts(learned, arguments, message):
  for status, text, secs in run_tool_on_hosts(
    "ask.py", f"--workdir={learned.workdir}", *arguments
  ):
    assert status == 1
    assert message in text
    assert "Traceback" not in text
    assert secs < 60


def test_an_answer_is_chosen_from_labels(learned):
  process = ask(learned.workdir, "--labels=Nice, Paris", FRANCE)
  assert process.returncode == 0, process.stderr
  lines = process.stdout.splitlines()
  assert lines[1].startswith("Paris   (p = ")
  (labels,) = (x for x in lines if x.startswith("Of the labels: "))
  first, second = labels.removeprefix("Of the labels: ").split(", ")
  assert first.split()[0] == "Paris"
  assert float(first.split()[1]) > 0.9 > float(second.split()[1])


def test_a_chat_remembers_what_was_said(learned):
  lines = f"{FRANCE}\nAnd its continent?\n/new\nAnd its continent?\n\nNo\n"
  process = ask(learned.workdir, "--chat", "--json", stdin=lines)
  assert process.returncode == 0, process.stderr
  assert "an empty line ends. /new begins another dialogue." in process.stderr
  first, second, third = map(json.loads, process.stdout.splitlines())
  assert (first["text"], first["history"]) == ("Paris", [])
  assert second["history"] == [FRANCE, "Paris"]
  assert second["docs"][0]["title"] == "France"
  assert third["question"] == second["question"] == "And its continent?"
  assert third["history"] == []
  assert third["docs"] != second["docs"]
  # The same from standard input, and as arguments.
  piped = ask(learned.workdir, "--chat", "--json", "-", stdin=lines[:-4])
  assert piped.stdout == process.stdout
  arguments = lines.split("\n")[:4]
  given = ask(learned.workdir, "--chat", "--json", *arguments)
  assert given.stdout == process.stdout
  # Without --chat nothing is remembered.
  apart = ask(learned.workdir, "--json", FRANCE, "And its continent?")
  second = json.loads(apart.stdout.splitlines()[1])
  assert "history" not in second
  assert second["docs"] == third["docs"]


def test_a_chat_needs_one_host(learned):
  for status, text, _ in run_tool_on_hosts(
    "ask.py", f"--workdir={learned.workdir}", "--chat", FRANCE
  ):
    assert status == 1
    assert "--chat was given with --distributed; expected one" in text
