"""tools/mine_negatives.py as a person runs it.

Run as a program, this file gives the command wrong flags, one after the other,
and prints its messages as JSON.
"""

import json
import os
import subprocess
import sys

from absl import flags
from processes import ROOT
from processes import run_tool
import pytest
from small_encoder import write_encoder
import small_search

from rag_jax.data.questions import read_questions

SENTENCES = [
  small_search.sentence(animal, place)
  for animal in small_search.ANIMALS
  for place in small_search.PLACES
]


def write(path, records):
  path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Passages, questions about them, and a search directory."""
  root = tmp_path_factory.mktemp("mine")
  write(
    root / "passages.jsonl",
    [{"id": str(i), "text": text} for i, text in enumerate(SENTENCES)],
  )
  asked = {"question": "where do the owls live in the caves"}
  write(
    root / "questions.jsonl",
    [
      {"id": "q", "relation": "where", "gold": ["13"], **asked,
       "answers": ["owls of the north"]},
      {**asked, "answers": ["bees"]},
      {**asked, "answers": ["nothing"], "gold": ["99"], "negatives": ["5"]},
    ],
  )  # fmt: skip
  encoder = write_encoder(root / "encoder", SENTENCES)
  small_search.build(root / "passages.jsonl", encoder, root / "index")
  return root


def run(folder, *arguments, output="mined.jsonl"):
  return run_tool(
    "mine_negatives.py",
    f"--questions={folder / 'questions.jsonl'}",
    f"--output={folder / output}",
    *arguments,
  )


def test_words_of_a_file_of_passages(folder):
  done = run(
    folder, f"--corpus={folder / 'passages.jsonl'}", "--num=3", "--positives"
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout.splitlines() == [
    "3 questions, 2 of them with a gold passage in the corpus (ids that are not"
    " in it: 1)",
    "Gold passages that were found: 1",
    "With 3 hard negatives: 3 questions",
    "Candidates left out, since they are gold: 1",
    "Candidates left out, since they state an answer: 4",
    f"Written to {folder / 'mined.jsonl'}.",
  ]
  first, second, third = read_questions(folder / "mined.jsonl")
  assert (first.id, first.relation, first.gold) == ("q", "where", ("13",))
  for question in (first, second, third):
    texts = [SENTENCES[int(id_)] for id_ in question.negatives]
    assert len(set(texts)) == 3
    assert not any(question.answers[0] in text for text in texts)
  assert "bees" in SENTENCES[int(second.gold[0])]
  assert third.gold == ("99",)  # nothing states "nothing"
  assert "5" not in third.negatives  # they are mined anew


def test_embeddings_of_a_search_directory(folder):
  settings = (f"--corpus={folder / 'index'}", "--by=index", "--num=5")
  done = run(folder, *settings, output="dense/train.jsonl")
  assert done.returncode == 0, done.stderr
  assert "With 5 hard negatives: 3 questions" in done.stdout
  every, _, _ = read_questions(folder / "dense/train.jsonl")
  done = run(folder, *settings, "--positive_share=0.9", output="far.jsonl")
  assert done.returncode == 0, done.stderr
  assert "left out, since they have a score too high: " in done.stdout
  far, unknown, _ = read_questions(folder / "far.jsonl")
  assert far.negatives != every.negatives
  assert unknown.negatives == ()  # nothing to compare scores with


WRONG = {
  "": "There is nothing to search; expected --corpus",
  "--corpus=PASSAGES --num=0": "--num=0; expected 1 or more.",
  "--corpus=PASSAGES --num=5 --depth=4": (
    "--num=5 negatives cannot be kept of --depth=4 candidates"
  ),
  "--corpus=PASSAGES --margin=0.1": (
    "--margin=0.1 compares inner products, but --by=bm25 has none."
  ),
  "--corpus=PASSAGES --by=index --positive_share=1.5": (
    "--positive_share=1.5; expected a share above 0 and at most 1."
  ),
  "--corpus=PASSAGES --by=index --margin=nan": "--margin=nan; expected a numb",
  "--corpus=PASSAGES --by=index": (
    "has no embeddings to search by --by=index. Expected what rag-jax"
  ),
  "--corpus=PASSAGES --workdir=runs/x": (
    "--workdir=runs/x names a retriever, but --by=bm25 searches words."
  ),
  "--by=index --workdir=runs/x": "No config.json in runs/x; expected the",
  "--corpus=nowhere.jsonl": "nowhere.jsonl",
  "--corpus=PASSAGES --output=mined.json": "is no name of a .jsonl file",
  "--corpus=PASSAGES --output=QUESTIONS": "exists already. Expected a new",
  "--corpus=PASSAGES --questions=no.jsonl": "no.jsonl",
}


@pytest.fixture(scope="module")
def messages(folder):
  """What the command says to each of the wrong flags."""
  done = subprocess.run(
    [sys.executable, __file__, folder],
    env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout)


@pytest.mark.parametrize("arguments", WRONG)
def test_what_a_user_can_mend_is_a_message(folder, arguments, messages):
  assert WRONG[arguments] in messages[arguments]
  assert not (folder / "none.jsonl").exists()


def refused(folder, arguments):
  """Returns the message of the error that the flags give."""
  from rag_jax.commands import mine_negatives

  names = {"PASSAGES": "passages.jsonl", "QUESTIONS": "questions.jsonl"}
  for name, file in names.items():
    arguments = arguments.replace(name, f"{folder}/{file}")
  flags.FLAGS.unparse_flags()
  flags.FLAGS([
    "mine", f"--questions={folder}/questions.jsonl", "--corpus=", "--workdir=",
    f"--output={folder}/none.jsonl", "--by=bm25", "--num=5", "--depth=100",
    *arguments.split(),
  ])  # fmt: skip
  for name in ("margin", "positive_share"):
    if f"--{name}" not in arguments:
      flags.FLAGS[name].value = None
  try:
    mine_negatives.main(["mine"])
  except (ValueError, FileNotFoundError) as error:
    return str(error)
  return "it ran"


def test_an_output_that_exists_is_overwritten_if_told(folder):
  (folder / "there.jsonl").write_text("mine")
  corpus = f"--corpus={folder / 'passages.jsonl'}"
  done = run(folder, corpus, "--overwrite", output="there.jsonl")
  assert done.returncode == 0, done.stderr
  assert len(read_questions(folder / "there.jsonl")) == 3


if __name__ == "__main__":
  json.dump({a: refused(sys.argv[1], a) for a in WRONG}, sys.stdout)
