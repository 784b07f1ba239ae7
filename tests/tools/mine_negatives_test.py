"""tools/mine_negatives.py as a person runs it."""

import json

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
      {"id": "q", "relation": "where", **asked, "answers": ["owls of the north"],
       "gold": ["13"]},
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
    "3 questions, 2 of them with a gold passage in the corpus (1 ids of gold"
    " passages are not in it)",
    "1 positives were found",
    "3 questions have 3 negatives",
    "1 candidates were left out: they are gold",
    "4 candidates were left out: they state an answer",
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
  assert "3 questions have 5 negatives" in done.stdout
  every, _, _ = read_questions(folder / "dense/train.jsonl")
  done = run(folder, *settings, "--positive_share=0.9", output="far.jsonl")
  assert done.returncode == 0, done.stderr
  assert "candidates were left out: they score too high" in done.stdout
  far, unknown, _ = read_questions(folder / "far.jsonl")
  assert far.negatives != every.negatives
  assert unknown.negatives == ()  # nothing to compare scores with


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ([], "There is nothing to search; expected --corpus"),
    (["--corpus=passages", "--num=0"], "--num=0; expected 1 or more."),
    (
      ["--corpus=passages", "--num=5", "--depth=4"],
      "--num=5 negatives cannot be kept of --depth=4 candidates",
    ),
    (
      ["--corpus=passages", "--margin=0.1"],
      "--margin=0.1 compares inner products, but --by=bm25 has none.",
    ),
    (
      ["--corpus=passages", "--by=index", "--positive_share=1.5"],
      "--positive_share=1.5; expected a share above 0 and at most 1.",
    ),
    (
      ["--corpus=passages", "--by=index", "--margin=nan"],
      "--margin=nan; expected a number.",
    ),
    (
      ["--corpus=passages", "--by=index"],
      "has no embeddings to search by --by=index. Expected what rag-jax",
    ),
    (
      ["--corpus=passages", "--workdir=runs/x"],
      "--workdir=runs/x names a retriever, but --by=bm25 searches words.",
    ),
    (["--corpus=nowhere.jsonl"], "nowhere.jsonl"),
  ],
)
def test_what_a_user_can_mend_is_a_message(folder, arguments, message):
  arguments = [
    a.replace("=passages", f"={folder / 'passages.jsonl'}") for a in arguments
  ]
  done = run(folder, *arguments, output="none.jsonl")
  assert done.returncode == 1
  assert message in done.stderr
  assert "Traceback" not in done.stderr
  assert not (folder / "none.jsonl").exists()


def test_nothing_is_overwritten_without_being_told(folder):
  (folder / "there.jsonl").write_text("mine")
  corpus = f"--corpus={folder / 'passages.jsonl'}"
  done = run(folder, corpus, output="there.jsonl")
  assert done.returncode == 1
  assert "exists already. Expected a new file." in done.stderr
  assert (folder / "there.jsonl").read_text() == "mine"
  done = run(folder, corpus, "--overwrite", output="there.jsonl")
  assert done.returncode == 0, done.stderr
  assert len(read_questions(folder / "there.jsonl")) == 3


def test_an_output_that_training_does_not_read_is_refused(folder):
  done = run(folder, "--corpus=world_facts", output="mined.json")
  assert done.returncode == 1
  assert "is no name of a .jsonl file" in done.stderr
