"""Files that an earlier version wrote still open, and give the same results.

written_before.zip holds indexes, search directories and runs of version 0.1 at
the commit before the index kinds shared one core, as the tests' helpers made
them (small_search.py, tiny_run.py), and in expected.json what that commit found
and answered. Files that no reader needs (plots, TensorBoard's) are left out.
"""

import json
import pathlib
import zipfile

import numpy as np
import pytest
from small_search import QUESTION

import rag_jax
from rag_jax.config import Config
from rag_jax.retrieval.index import load_index
from rag_jax.training.metrics import read_metrics

ZIP = pathlib.Path(__file__).with_name("written_before.zip")
EXPECTED = json.loads(zipfile.ZipFile(ZIP).read("expected.json"))


def names(folder):
  return [name for name in EXPECTED if name.startswith(folder)]


@pytest.fixture
def old(tmp_path, monkeypatch):
  """The folder of the old files; the runs name their data relative to it."""
  zipfile.ZipFile(ZIP).extractall(tmp_path)
  monkeypatch.chdir(tmp_path)
  return tmp_path


@pytest.mark.parametrize("name", names("indexes/"))
def test_an_index_finds_the_same_passages(name, old):
  rng = np.random.default_rng(0)  # as when they were made
  passages = rng.normal(size=(60, 8)).astype(np.float32)
  questions = rng.normal(size=(4, 8)).astype(np.float32)
  index = load_index(
    old / name, encoder_fingerprint="e1", passages_fingerprint="p1"
  )
  ids, scores = index.search(questions, 5)
  assert np.asarray(ids).tolist() == EXPECTED[name]["ids"]
  np.testing.assert_allclose(scores, EXPECTED[name]["scores"], atol=1e-5)
  np.testing.assert_array_equal(
    np.asarray(index.embeddings[:], np.float32), passages
  )
  with pytest.raises(ValueError, match="e1"):
    load_index(old / name, encoder_fingerprint="e2")


@pytest.mark.parametrize("name", names("search/"))
def test_a_search_directory_finds_the_same_passages(name, old):
  directory = rag_jax.SearchDirectory.open(old / name)
  for mode, expected in EXPECTED[name].items():
    found = directory.search([QUESTION, "newts in the ponds"], mode=mode)
    hits = [[(hit.passage.id, hit.score) for hit in hits] for hits in found]
    assert [[id_ for id_, _ in h] for h in hits] == [
      [id_ for id_, _ in h] for h in expected
    ]
    np.testing.assert_allclose(
      [[score for _, score in h] for h in hits],
      [[score for _, score in h] for h in expected],
      atol=1e-3,
    )


def test_a_search_directory_can_be_updated(old):
  (old / "new.jsonl").write_text(
    json.dumps({"id": "n2", "title": "", "text": "voles of the fens"}) + "\n"
  )
  directory = rag_jax.SearchDirectory.open(old / "search" / "updated")
  before = len(directory)
  directory.update(upsert=str(old / "new.jsonl"), delete=["n1"])
  assert len(directory) == before
  [hits] = directory.search("voles in the fens", 1, mode="bm25")
  assert hits[0].passage.id == "n2"


@pytest.mark.parametrize("name", ["exact", "hybrid", "in_step"])
def test_a_run_gives_the_same_answers(name, old):
  expected = EXPECTED[f"runs/{name}"]
  pipeline = rag_jax.RagPipeline.load(str(old / "runs" / name))
  answers = pipeline.answer(expected["questions"])
  for answer, (text, log_prob, docs) in zip(
    answers, expected["answers"], strict=True
  ):
    assert answer.text == text
    assert answer.log_prob == pytest.approx(log_prob, abs=1e-3)
    assert [doc.id for doc in answer.docs] == docs
  config = rag_jax.load_config(old / "runs" / name / "config.json")
  assert isinstance(config, Config)


def test_a_run_that_was_stopped_goes_on_to_the_same_end(old):
  expected = EXPECTED["runs/stopped"]
  path = old / "runs" / "stopped"
  rag_jax.train(rag_jax.load_config(path / "config.json"), path)
  metrics = read_metrics(path / "metrics.jsonl")
  assert len(metrics) == expected["lines"]
  assert metrics[-1]["step"] == expected["loss"]["step"] == 12
  assert metrics[-1]["train/loss"] == pytest.approx(
    expected["loss"]["train/loss"], abs=1e-3
  )
