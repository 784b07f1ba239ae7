"""Questions come from the bundled corpus or a folder, or not at all."""

import json

from corpora import assert_fails
import pytest

from rag_jax.data.questions import SPLITS
from rag_jax.data.questions import Question
from rag_jax.data.questions import load_questions
from rag_jax.data.questions import read_questions

RECORDS = (
  {"question": "Who?", "answers": ["Aaron", "Ahärôn"], "id": "a"},
  {"question": "Where?", "answers": ["Sinai"], "id": 7, "relation": "place"},
  {"question": " When? ", "answers": ["1 BC"], "entity": "x", "more": None},
)


@pytest.fixture
def folder(tmp_path):
  for split in SPLITS:
    write(tmp_path / f"{split}.jsonl", RECORDS)
  return tmp_path


def write(path, records):
  path.write_text("".join(json.dumps(r) + "\n" for r in records))
  return path


def test_a_folder_gives_the_questions_that_were_written(folder):
  expected = (
    Question("Who?", ("Aaron", "Ahärôn"), id="a"),
    Question("Where?", ("Sinai",), id="7", relation="place"),
    Question(" When? ", ("1 BC",)),
  )
  for split in SPLITS:
    assert load_questions(str(folder), split) == expected


def test_each_split_is_its_own_file(folder):
  write(folder / "test.jsonl", RECORDS[1:2])
  assert len(load_questions(str(folder), "train")) == 3
  assert load_questions(str(folder), "test")[0].question == "Where?"


def test_questions_without_id_are_not_the_same_question(tmp_path):
  path = write(tmp_path / "x.jsonl", [RECORDS[2], RECORDS[2]])
  assert len(read_questions(path)) == 2


def test_the_bundled_splits_share_no_question():
  splits = [load_questions("world_facts", split) for split in SPLITS]
  every = [q for questions in splits for q in questions]
  assert len({q.id for q in every}) == len(every) > 1000
  assert len({q.question for q in every}) == len(every)
  assert all(q.id and q.relation for q in every)


@pytest.mark.parametrize(
  ("record", "parts"),
  [
    ({"answers": ["x"]}, ["no field 'question'", "['answers']"]),
    ({"question": "Who?"}, ["no field 'answers'", "['question']"]),
    ({"question": 4, "answers": ["x"]}, ["'question' is 4", "a string"]),
    (
      {"question": " ", "answers": ["x"]},
      ["the question is empty, ' '", "Expected text", "Complete or remove"],
    ),
    (
      {"question": "Who?", "answers": "Aaron"},
      ["'answers' is 'Aaron', a string", "a list", '"answers": ["..."]'],
    ),
    (
      {"question": "Who?", "answers": []},
      ["there are no answers", 'such as ["Paris"]', "Correct or remove"],
    ),
    (
      {"question": "Who?", "answers": ["Aaron", " "]},
      ["' ' is one of the answers", "strings that are not empty"],
    ),
    (
      {"question": "Who?", "answers": ["Aaron", True]},
      ["True is one of the answers", "Expected a list of strings that are"],
    ),
    (
      {"question": "Who?", "answers": ["Aa\ud800ron"]},
      ["'answers' holds half of a surrogate pair", "Remove the character"],
    ),
    (
      {"question": "Who?", "answers": ["x"], "id": 1.5},
      ["field 'id' is 1.5", "a string or a whole number"],
    ),
    (
      {"question": "Who?", "answers": ["x"], "relation": 7},
      ["field 'relation' is 7", "Expected a string"],
    ),
    (
      {"question": "Who?", "answers": ["x"], "entity": 3},
      ["field 'entity' is 3", "Expected a string"],
    ),
    (
      {"question": "Who?", "answers": ["x"], "id": "a"},
      [" the id 'a' is that of", "train.jsonl:1 too", "Rename or remove"],
    ),
  ],
)
def test_a_bad_record_is_refused_with_its_line(folder, record, parts):
  path = write(folder / "train.jsonl", [*RECORDS, record])
  assert_fails(
    lambda: load_questions(str(folder), "train"), f"{path}:4: ", *parts
  )


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_a_split_without_questions_is_refused(folder, text):
  (folder / "test.jsonl").write_text(text)
  assert_fails(
    lambda: load_questions(str(folder), "test"),
    *("test.jsonl holds no questions", "Expected at least one", "right file"),
  )


def test_a_missing_split_is_reported_with_what_is_there(folder):
  (folder / "validation.jsonl").rename(folder / "check.jsonl")
  assert_fails(
    lambda: load_questions(str(folder), "validation"),
    *("have no validation split: there is no validation.jsonl", "Expected"),
    *("holds ['check.jsonl', 'test.jsonl', 'train.jsonl']", "Add or rename"),
    error=FileNotFoundError,
  )


def test_an_unknown_split_is_refused_before_anything_is_read():
  assert_fails(
    lambda: load_questions("/nowhere", "valid"),
    *("no split 'valid' of the questions /nowhere", "Expected one of"),
    *("['train', 'validation', 'test']", "Did you mean 'validation'?"),
  )
  assert_fails(
    lambda: load_questions("x", "dev"), "'dev'", "Choose one of them"
  )


def test_a_file_in_the_place_of_a_folder_is_refused(folder):
  assert_fails(
    lambda: load_questions(str(folder / "train.jsonl"), "train"),
    *("train.jsonl are a file. Expected one of ['world_facts',",),
    f"Give the folder, {folder},",
  )


def test_a_missing_folder_is_reported(tmp_path):
  assert_fails(
    lambda: load_questions(str(tmp_path / "no"), "train"),
    *("There are no questions", "Expected", "Correct the path"),
    error=FileNotFoundError,
  )


@pytest.mark.parametrize(
  ("source", "hint"),
  [
    ("world_fact", "Did you mean 'world_facts'?"),
    ("tfds_squad", "Did you mean 'tfds:squad'?"),
    ("", "Correct the path."),
  ],
)
def test_an_unknown_name_is_refused(tmp_path, monkeypatch, source, hint):
  monkeypatch.chdir(tmp_path)
  assert_fails(
    lambda: load_questions(source, "train"),
    *(
      f"There are no questions {source!r}",
      "'world_facts_dialogue'], a folder",
    ),
    *("'tfds:natural_questions_open', 'tfds:squad'", hint),
  )
