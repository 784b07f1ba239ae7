"""tools/benchmark_hf.py as a person runs it, at the size for trying it out."""

import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from rag_jax.corpus.passage_reader import load_passages

ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = ROOT / "tools" / "benchmark_hf.py"
CASES = [
  "train_rag_token",
  "train_rag_sequence",
  "generate_rag_token_beam4",
  "generate_rag_sequence_thorough_beam4",
  "generate_rag_sequence_fast_beam4",
  "encode_passages",
]
FROM_STRINGS = [
  "train_rag_token_strings",
  "generate_rag_token_beam4_strings",
  "generate_rag_sequence_thorough_beam4_strings",
]
CHOICES = CASES + FROM_STRINGS
NUMBERS = ("ours_secs", "hf_secs", "ratio", "compile_secs")
SHARE = "share of equal tokens"


@pytest.fixture(autouse=True)
def _torch(request):
  if not request.node.get_closest_marker("parity"):
    return
  if importlib.util.find_spec("torch") is None:
    if os.environ.get("RAG_JAX_REQUIRE_PARITY") == "1":
      pytest.fail("RAG_JAX_REQUIRE_PARITY=1, but PyTorch is not installed")
    pytest.skip("PyTorch is not installed")


def run(*arguments, command=(SCRIPT,)):
  """Returns the finished process."""
  environment = {
    "PYTHONPATH": str(ROOT),
    "JAX_PLATFORMS": "cpu",
    # Halves the run: nothing here depends on how fast it is.
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
  }
  return subprocess.run(
    [sys.executable, *command, *arguments],
    env=os.environ | environment,
    capture_output=True,
    encoding="utf-8",
    timeout=500,
    check=False,
  )


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
  """All cases at size tiny: what was printed, and the JSON."""
  output = tmp_path_factory.mktemp("benchmark") / "tiny.json"
  process = run(
    "--sizes=tiny",
    "--repetitions=1",
    "--cores=1",  # threads of PyTorch that wait for each other take minutes
    f"--output={output}",
  )
  assert process.returncode == 0, process.stderr
  return process.stdout, json.loads(output.read_text())


@pytest.mark.parity
def test_every_case_is_a_row_of_positive_numbers_and_the_machine_is_named(
  measured,
):
  _, result = measured
  assert list(result) == ["rows", "machine"]
  assert [row["case"] for row in result["rows"]] == CASES
  for row in result["rows"]:
    assert row["size"] == "tiny"
    assert all(row[name] > 0 for name in NUMBERS), row
    assert row["ratio"] == pytest.approx(row["hf_secs"] / row["ours_secs"])
    assert row["ours_runs"] == [row["ours_secs"]]
    assert row["hf_runs"] == [row["hf_secs"]]
  machine = result["machine"]
  assert machine["num_cpus"] == machine["torch_threads"] == 1
  assert set(machine["versions"]) >= {"jax", "torch", "transformers"}


@pytest.mark.parity
def test_both_sides_compute_the_same(measured):
  rows = {row["case"]: row for row in measured[1]["rows"]}
  for name in ("train_rag_token", "train_rag_sequence"):
    # After one update already: it is the same update.
    assert rows[name]["same"] < 1e-4
  for name in CASES[2:4]:
    assert rows[name]["same_is"] == SHARE
    assert rows[name]["same"] == 1.0
  # Another algorithm: the note says so.
  assert rows[CASES[4]]["same_is"] == SHARE
  assert 0 < rows[CASES[4]]["same"] <= 1
  assert "no fast decoding" in rows[CASES[4]]["note"]
  assert rows["encode_passages"]["same"] < 1e-5


@pytest.mark.parity
def test_the_table_is_markdown_with_a_row_for_each_case(measured):
  lines = [line for line in measured[0].splitlines() if line.startswith("|")]
  assert lines[0].startswith("| case | size | ours (s) | Hugging Face (s) |")
  assert len(lines) == 2 + len(CASES)
  assert {line.count("|") for line in lines} == {8}
  for line, row in zip(lines[2:], measured[1]["rows"], strict=True):
    assert line.startswith(f"| {row['case']} | tiny | ")
    assert f"| {row['ratio']:.2f} |" in line
  assert "no fast decoding" in measured[0]


@pytest.fixture(scope="module")
def from_strings(tmp_path_factory):
  """The cases from strings at size tiny: what was printed, and the rows."""
  folder = tmp_path_factory.mktemp("strings")
  articles = [
    {
      "title": passage.title,
      "paragraphs": [
        {
          "context": passage.text,
          "qas": [
            {
              "id": passage.id,
              "question": f"What is said about {passage.title}?",
              "answers": [
                {"text": " ".join(passage.text.split()[:2]), "answer_start": 0}
              ],
            }
          ],
        }
      ],
    }
    for passage in load_passages("world_facts")[:600:50]
  ]
  questions = folder / "questions.json"
  questions.write_text(json.dumps({"version": "1.1", "data": articles}))
  output = folder / "tiny.json"
  process = run(
    "--sizes=tiny",
    "--repetitions=1",
    "--cores=1",
    "--num_questions=6",
    f"--questions={questions}",
    f"--cases={','.join(FROM_STRINGS)}",
    f"--output={output}",
  )
  assert process.returncode == 0, process.stderr
  return process.stdout, json.loads(output.read_text())["rows"]


@pytest.mark.parity
def test_from_strings_both_sides_find_read_and_write_the_same(from_strings):
  _, rows = from_strings
  assert [row["case"] for row in rows] == FROM_STRINGS
  assert all(row[name] > 0 for name in NUMBERS for row in rows)
  train, token, sequence = rows
  assert train["same"] < 1e-4
  assert token["same_is"] == SHARE
  assert token["same"] == 1.0
  # transformers reads the padding; where ours does too, all is equal.
  assert 0 <= sequence["same"] <= 1
  assert "100.0% of our tokens are equal" in sequence["note"]


@pytest.mark.parity
def test_from_strings_the_note_says_what_each_side_pads_to(from_strings):
  printed, rows = from_strings
  for row in rows:
    assert row["note"] in printed
    said = re.search(
      r"(\d+) at most; 0 of 30 are cut at 300 by both. It is padded to (\d+)"
      r" here, and to 300 by RagRetriever",
      row["note"],
    )
    longest, padded = int(said[1]), int(said[2])
    assert 0 <= padded - longest < 8  # nothing real is cut
    assert padded % 8 == 0
    assert padded < 300


@pytest.mark.parity
def test_a_profile_says_which_operations_take_the_time(tmp_path):
  name = "generate_rag_token_beam4"
  process = run(
    f"--profile={name}", "--sizes=tiny", f"--profile_dir={tmp_path}"
  )
  assert process.returncode == 0, process.stderr
  rows = [line.split(" | ") for line in process.stdout.splitlines()]
  rows = [row for row in rows if len(row) == 4 and "%" in row[1]]
  shares = [float(row[1].rstrip("%")) for row in rows]
  assert len(shares) > 5
  assert shares == sorted(shares, reverse=True)
  assert 50 < sum(shares) < 101
  assert any("decoder" in row[3] for row in rows)  # names, not numbers
  (folder,) = tmp_path.iterdir()
  assert folder.name.startswith(name)
  assert list(folder.glob("plugins/profile/*/*.xplane.pb"))


@pytest.mark.parity
@pytest.mark.parametrize(
  ("argument", "message"),
  [
    ("--cases=train_rag", f"--cases=train_rag names ['train_rag']; {CHOICES}"),
    (
      "--sizes=tiny,huge",
      "--sizes=tiny,huge names ['huge']; ['tiny', 'base', 'large']",
    ),
    ("--profile=all", f"--profile=all names ['all']; {CHOICES}"),
  ],
)
def test_an_unknown_name_is_refused_with_the_choices(argument, message):
  process = run(argument)
  assert process.returncode == 1
  message = message.replace("; ", "; expected some of ", 1)
  last = process.stderr.splitlines()[-1]
  assert last.startswith(f"ValueError: {message}. Give one or several")
  assert "Traceback" not in process.stderr


@pytest.mark.parity
def test_an_output_that_has_nowhere_to_go_is_refused_before_measuring(tmp_path):
  process = run("--sizes=tiny", f"--output={tmp_path}/no/such.json")
  assert process.returncode == 1
  assert process.stderr.splitlines()[-1].startswith(
    f"FileNotFoundError: --output={tmp_path}/no/such.json: there is no folder"
  )


def test_missing_questions_are_refused_with_the_name_of_the_file(tmp_path):
  (tmp_path / "xquad.en.json").write_text("{}")
  process = run(f"--questions={tmp_path}/xquad.json")
  assert process.returncode == 1
  assert process.stderr.splitlines()[-1] == (
    f"FileNotFoundError: --questions={tmp_path}/xquad.json: There is no file"
    f" {tmp_path}/xquad.json. Expected a .json file in SQuAD's format. The"
    f" nearest names in {tmp_path} are ['xquad.en.json']; correct the path."
  )


@pytest.mark.parity
def test_a_case_from_strings_without_questions_is_refused():
  process = run(f"--cases={CASES[0]},{FROM_STRINGS[0]}")
  assert process.returncode == 1
  assert process.stderr.splitlines()[-1].startswith(
    f"ValueError: {FROM_STRINGS[0]}: these cases start from strings, but"
    " --questions is empty; expected a file in SQuAD's format."
  )


def test_a_negative_number_of_words_is_refused():
  process = run("--passage_words=-1")
  assert process.returncode == 1
  assert process.stderr.splitlines()[-1].startswith(
    "ValueError: --passage_words=-1 is negative; expected the words of a"
    " passage, or 0 for whole paragraphs."
  )


@pytest.mark.parity
def test_no_repetitions_are_refused():
  process = run("--repetitions=0")
  assert process.returncode == 1
  assert process.stderr.splitlines()[-1].startswith(
    "ValueError: --repetitions=0 measures nothing; expected 1 or more."
  )


def test_without_pytorch_the_extra_that_brings_it_is_named():
  script = (
    "import runpy, sys; sys.modules['torch'] = None;"
    f" sys.path.insert(0, {str(SCRIPT.parent)!r});"
    f" sys.argv[0] = {str(SCRIPT)!r};"
    f" runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
  )
  process = run("--sizes=tiny", command=("-c", script))
  assert process.returncode == 1
  last = process.stderr.splitlines()[-1]
  assert last.startswith("ImportError: PyTorch is not installed; expected it")
  assert last.endswith('the extra `parity`: pip install -e ".[parity]"')
