"""Questions of TFDS, made up, written by it, damaged or not to be had."""

import shutil

from corpora import assert_fails
from nq_open import prepare_nq_open
import numpy as np
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.core import constants
from tensorflow_datasets.core import download
from tensorflow_datasets.core.download import download_manager

from rag_jax.data.questions import SPLITS
from rag_jax.data.questions import Question
from rag_jax.data.questions import load_questions

NUM_TRAIN, NUM_VALIDATION = 43, 4  # rows of the data set written here


@pytest.mark.parametrize("name", ["web_questions", "squad/v2.0", "nope", ""])
def test_a_tfds_data_set_that_is_not_known_to_work_is_refused(name):
  assert_fails(
    lambda: load_questions(f"tfds:{name}", "train"),
    f"tfds:{name} is not a data set that rag_jax reads",
    "['tfds:natural_questions_open', 'tfds:squad'], which need no TensorFlow",
    *("folder of .jsonl files", "pip install 'rag_jax[tf]'"),
  )


def test_a_misspelt_tfds_name_gets_a_hint():
  assert_fails(
    lambda: load_questions("tfds:natural_question_open", "train"),
    "Did you mean 'tfds:natural_questions_open'?",
  )


def mock_rows(rows):
  """TFDS answers with these rows, whatever the split."""
  return tfds.testing.mock_data(as_data_source_fn=lambda self, **kwargs: rows)


def squad_row(i, answers, as_type=str, question="Who is {}?"):
  return {
    "id": as_type(f"id{i}"),
    "question": as_type(question.format(i)),
    "context": as_type("..."),
    "title": as_type("Aaron"),
    "answers": {
      "text": np.array([as_type(a) for a in answers], dtype=object),
      "answer_start": np.zeros(len(answers), np.int32),
    },
  }


def utf8(text):
  return text.encode()


@pytest.mark.parametrize("as_type", [str, np.str_, utf8])
def test_squad_answers_are_unique_and_in_order_as_str_or_bytes(as_type):
  rows = [squad_row(i, ["é b", "a", "é b"], as_type) for i in range(2)]
  with mock_rows(rows):
    questions = load_questions("tfds:squad", "test")
  assert questions == (
    Question("Who is 0?", ("é b", "a"), id="id0"),
    Question("Who is 1?", ("é b", "a"), id="id1"),
  )
  assert {type(a) for q in questions for a in (q.id, *q.answers)} == {str}


@pytest.mark.parametrize("name", ["natural_questions_open", "squad"])
def test_what_tfds_makes_up_from_the_features_is_understood(name):
  with tfds.testing.mock_data(num_examples=20):
    train = load_questions(f"tfds:{name}", "train")
    validation = load_questions(f"tfds:{name}", "validation")
    test = load_questions(f"tfds:{name}", "test")
  assert (len(train), len(validation), len(test)) == (18, 2, 20)
  # Its train and validation splits are the same.
  assert train + validation == test
  assert all(q.question.strip() and q.answers for q in test)


def test_tfds_questions_that_cannot_be_used_are_left_out_and_counted(caplog):
  rows = [
    squad_row(0, ["a", " "]),
    squad_row(1, [" "]),
    squad_row(2, []),
    squad_row(3, ["a"], question=" "),
  ]
  with mock_rows(rows), caplog.at_level("WARNING", logger="absl"):
    questions = load_questions("tfds:squad", "test")
  assert questions == (Question("Who is 0?", ("a",), id="id0"),)
  assert "tfds:squad: left out 3 of the 4 test questions" in caplog.text


def test_a_tfds_split_without_usable_questions_is_refused():
  with mock_rows([squad_row(0, [])]):
    assert_fails(
      lambda: load_questions("tfds:squad", "test"),
      *("tfds:squad has no questions with an answer among the 1 rows of its",),
      *("test split", "Expected at least one", "prepared again"),
    )


def examples(name, count):
  return [(f"{name} é {i}", [f"a{i}", "b"]) for i in range(count)]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  return prepare_nq_open(
    tmp_path_factory.mktemp("prepared"),
    train=examples("train", NUM_TRAIN),
    validation=examples("dev", NUM_VALIDATION),
  )


@pytest.fixture
def nq_open(prepared, tmp_path, monkeypatch):
  """A folder of real TFDS files that a test may damage."""
  copy = tmp_path / "natural_questions_open" / "1.0.0"
  shutil.copytree(prepared, copy)
  monkeypatch.setattr(constants, "DATA_DIR", str(tmp_path))
  return copy


def test_real_tfds_files_give_every_question_in_one_split(nq_open, caplog):
  with caplog.at_level("INFO", logger="absl"):
    splits = {
      s: load_questions("tfds:natural_questions_open", s) for s in SPLITS
    }
  assert {s: len(q) for s, q in splits.items()} == {
    "train": NUM_TRAIN - 4,
    "validation": 4,
    "test": NUM_VALIDATION,
  }
  assert {q for s in ("train", "validation") for q in splits[s]} == {
    Question(f"train é {i}", (f"a{i}", "b")) for i in range(NUM_TRAIN)
  }
  assert set(splits["test"]) == {
    Question(f"dev é {i}", (f"a{i}", "b")) for i in range(NUM_VALIDATION)
  }
  assert (
    "split validation is rows 39 to 43 of the 43 of TFDS's train split"
    in caplog.text
  )


def test_real_tfds_files_give_the_same_order_each_time(nq_open):
  first = load_questions("tfds:natural_questions_open", "train")
  assert load_questions("tfds:natural_questions_open", "train") == first


@pytest.mark.parametrize("damage", ["cut", "gone", "byte"])
def test_damaged_tfds_files_are_refused(nq_open, damage):
  (path,) = nq_open.glob("*train.array_record*")
  data = bytearray(path.read_bytes())
  data[600] ^= 0xFF  # in the compressed examples, not the padding
  if damage == "gone":
    path.unlink()
  else:
    path.write_bytes(data if damage == "byte" else data[: len(data) // 2])
  assert_fails(
    lambda: load_questions("tfds:natural_questions_open", "train"),
    *("tfds:natural_questions_open cannot be read (", "Expected complete"),
    *(f"in {constants.DATA_DIR}. Delete its folder", "TFDS_DATA_DIR"),
  )


def test_tfds_files_in_the_format_that_needs_tensorflow_are_refused(
  nq_open,
):
  info = nq_open / "dataset_info.json"
  info.write_text(info.read_text().replace("array_record", "tfrecord"))
  assert_fails(
    lambda: load_questions("tfds:natural_questions_open", "train"),
    *("cannot be read (", "TFRECORD", "Expected complete files in the Array"),
    "TFDS_DATA_DIR",
  )


@pytest.mark.parametrize(
  "error",
  [
    ConnectionError("no route to host"),
    download.DownloadError("404"),
    download_manager.NonMatchingChecksumError("not the file that was expected"),
  ],
)
def test_a_failed_download_says_how_to_prepare_elsewhere(
  tmp_path, monkeypatch, error
):
  def fail(self, **kwargs):
    raise error

  monkeypatch.setattr(constants, "DATA_DIR", str(tmp_path))
  builder = tfds.core.DatasetBuilder
  monkeypatch.setattr(builder, "download_and_prepare", fail)
  assert_fails(
    lambda: load_questions("tfds:squad", "train"),
    "tfds:squad is not prepared on this machine and could not be downloaded",
    f"({type(error).__name__}: {error}). Expected it in {tmp_path}",
    """run `python -c "import tensorflow_datasets as tfds; tfds.data_source""",
    """('squad')"`""",
    *("~/tensorflow_datasets/squad", "TFDS_DATA_DIR"),
    error=FileNotFoundError,
  )


@pytest.mark.parametrize(
  ("package", "install"),
  [
    ("importlib_resources", "pip install importlib_resources"),
    ("tensorflow", "pip install 'rag_jax[tf]'"),
  ],
)
def test_a_package_that_tfds_misses_is_named(
  tmp_path, monkeypatch, package, install
):
  def fail(self, **kwargs):
    raise ModuleNotFoundError(f"No module named {package!r}", name=package)

  monkeypatch.setattr(constants, "DATA_DIR", str(tmp_path))
  builder = tfds.core.DatasetBuilder
  monkeypatch.setattr(builder, "download_and_prepare", fail)
  assert_fails(
    lambda: load_questions("tfds:squad", "train"),
    f"tfds:squad cannot be prepared: TFDS needs the Python package {package},",
    install,
    error=ImportError,
  )
