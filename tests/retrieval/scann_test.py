"""ScaNN against exact search, and where it would answer wrongly alone."""

import json

import numpy as np
import pytest

from rag_jax import artifacts
from rag_jax.config import IndexConfig
from rag_jax.retrieval.exact import ExactIndex
from rag_jax.retrieval.index import load_index
from rag_jax.retrieval.scann import ScannIndex

FINGERPRINTS = {"encoder_fingerprint": "e", "passages_fingerprint": "p"}


def normal(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def clusters(num_passages, dim, seed=0):
  """Returns vectors around 100 centres, as passages about 100 topics."""
  rng = np.random.default_rng(seed)
  centres = rng.normal(size=(100, dim))
  spread = 0.3 * rng.normal(size=(num_passages, dim))
  return (centres[rng.integers(100, size=num_passages)] + spread).astype(
    np.float32
  )


def build(embeddings, **config):
  return ScannIndex.build(
    embeddings, IndexConfig(kind="scann", **config), **FINGERPRINTS
  )


def exact_search(embeddings, questions, n_docs):
  return ExactIndex(embeddings, **FINGERPRINTS).search(questions, n_docs)


@pytest.fixture(scope="module")
def short_of_passages():
  """An index with about two passages a leaf that searches one leaf."""
  return build(
    normal(100, 8),
    scann_tree_passages=1,
    scann_num_leaves=50,
    scann_leaves_to_search=1,
  )


def test_below_the_threshold_it_finds_what_exact_search_finds():
  embeddings, questions = normal(3000, 24), normal(50, 24, seed=1)
  index = build(embeddings, scann_tree_passages=3001)
  assert index.settings["num_leaves"] == 0
  for found, expected in zip(
    index.search(questions, 20),
    exact_search(embeddings, questions, 20),
    strict=True,
  ):
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("num_passages", [1, 2, 15])
def test_a_handful_of_passages_is_never_quantised(num_passages):
  embeddings = normal(num_passages, 5)
  index = build(embeddings, scann_tree_passages=0, scann_num_leaves=3)
  ids, _ = index.search(embeddings, num_passages)
  expected, _ = exact_search(embeddings, embeddings, num_passages)
  np.testing.assert_array_equal(ids, expected)


def test_a_tree_finds_nine_of_ten_passages():
  embeddings = clusters(30_000, 32)
  questions = embeddings[::300] + 0.1 * normal(100, 32, seed=1)
  index = build(embeddings)
  assert index.settings == {
    "num_leaves": 173,  # the square root of 30,000
    "leaves_to_search": 17,
    "reorder": 100,
  }
  ids, scores = index.search(questions, 10)
  expected, expected_scores = exact_search(embeddings, questions, 10)
  overlap = [np.isin(a, b).mean() for a, b in zip(ids, expected, strict=True)]
  assert np.mean(overlap) >= 0.9
  # Ranked by exact scores, whatever the 4-bit codes said.
  same = ids == expected
  assert same.mean() > 0.5
  np.testing.assert_array_equal(scores[same], expected_scores[same])


def test_the_same_passages_give_the_same_index_each_time():
  embeddings, questions = clusters(2000, 16), normal(40, 16, seed=1)
  found = [
    build(embeddings, scann_tree_passages=1).search(questions, 10)
    for _ in range(5)
  ]
  for ids, scores in found[1:]:
    np.testing.assert_array_equal(ids, found[0][0])
    np.testing.assert_array_equal(scores, found[0][1])


def test_a_tree_finds_the_same_after_it_was_saved_and_moved(tmp_path):
  index = build(clusters(2000, 16), scann_tree_passages=1)
  index.save(tmp_path / "built")
  loaded = load_index((tmp_path / "built").rename(tmp_path / "moved"))
  assert loaded.settings == index.settings
  questions = normal(40, 16, seed=1)
  np.testing.assert_array_equal(
    loaded.search(questions, 10)[0], index.search(questions, 10)[0]
  )


def test_scann_alone_would_pad_with_passage_0(short_of_passages):
  # If this ever fails, ScaNN changed and the exact search may go.
  ids, distances = short_of_passages._searcher.search_batched(
    normal(20, 8, seed=1), final_num_neighbors=5
  )
  assert np.isnan(distances).any()
  assert not ids[np.isnan(distances)].any()


@pytest.mark.parametrize("n_docs", [5, 50, 100])
def test_questions_that_come_short_are_answered_by_exact_search(
  short_of_passages, n_docs
):
  questions = normal(20, 8, seed=1)
  ids, scores = short_of_passages.search(questions, n_docs)
  expected_ids, expected_scores = exact_search(
    short_of_passages.embeddings, questions, n_docs
  )
  np.testing.assert_array_equal(ids, expected_ids)
  np.testing.assert_array_equal(scores, expected_scores)
  assert all(len(set(row)) == n_docs for row in ids.tolist())


def test_an_answer_narrower_than_n_docs_is_answered_by_exact_search(
  short_of_passages, monkeypatch
):
  # ScaNN pads to n_docs here, but does not promise to.
  class Narrow:
    def search_batched_parallel(self, questions, **_):
      shape = (len(questions), 3)
      return np.zeros(shape, np.uint32), np.zeros(shape)

  monkeypatch.setattr(short_of_passages, "_searcher", Narrow())
  questions = normal(4, 8, seed=1)
  ids, _ = short_of_passages.search(questions, 20)
  expected, _ = exact_search(short_of_passages.embeddings, questions, 20)
  np.testing.assert_array_equal(ids, expected)


def test_questions_that_do_not_come_short_keep_what_scann_found(
  short_of_passages,
):
  questions = normal(20, 8, seed=1)
  raw, distances = short_of_passages._searcher.search_batched(
    questions, final_num_neighbors=2
  )
  full = ~np.isnan(distances).any(axis=1)
  assert full.any()
  assert not full.all()
  ids, _ = short_of_passages.search(questions, 2)
  np.testing.assert_array_equal(
    np.sort(ids[full], axis=1), np.sort(raw[full], axis=1)
  )
  expected, _ = exact_search(short_of_passages.embeddings, questions, 2)
  assert np.any(ids[full] != expected[full])
  np.testing.assert_array_equal(ids[~full], expected[~full])


def test_passage_0_is_not_found_where_it_scores_worst():
  embeddings = normal(100, 8)
  embeddings[0] = -100.0
  questions = np.abs(normal(20, 8, seed=1))
  index = build(
    embeddings,
    scann_tree_passages=1,
    scann_num_leaves=50,
    scann_leaves_to_search=1,
  )
  ids, _ = index.search(questions, 10)
  assert not np.any(ids == 0)


def test_more_passages_than_are_reordered_can_be_asked_for(monkeypatch):
  embeddings = clusters(500, 8)
  index = build(
    embeddings,
    scann_tree_passages=1,
    scann_leaves_to_search=22,  # all of them
    scann_reorder=1,
  )
  questions = normal(5, 8, seed=1)
  monkeypatch.setattr(index, "_exact", None)  # ScaNN has to find them itself
  ids, _ = index.search(questions, 500)
  expected, _ = exact_search(embeddings, questions, 500)
  np.testing.assert_array_equal(ids, expected)


def test_more_leaves_than_passages_become_as_many_as_passages():
  index = build(
    normal(40, 6),
    scann_tree_passages=1,
    scann_num_leaves=1000,
    scann_leaves_to_search=2000,
  )
  assert index.settings["num_leaves"] == 40
  assert index.settings["leaves_to_search"] == 40
  ids, _ = index.search(normal(3, 6, seed=1), 5)
  assert all(len(set(row)) == 5 for row in ids.tolist())


def test_the_files_of_scann_must_fit_the_embeddings(tmp_path):
  build(normal(50, 4)).save(tmp_path / "a")
  build(normal(49, 4)).save(tmp_path / "b")
  (tmp_path / "a" / "scann").rename(tmp_path / "old")
  (tmp_path / "b" / "scann").rename(tmp_path / "a" / "scann")
  manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
  artifacts.write_manifest(
    tmp_path / "a", kind="index", format=1, content=manifest["content"]
  )
  with pytest.raises(
    ValueError, match=r"49 passages, the embeddings 50; .*mix"
  ):
    load_index(tmp_path / "a")


def test_an_index_without_the_folder_of_scann_is_refused(tmp_path):
  ExactIndex(normal(50, 4), **FINGERPRINTS).save(tmp_path)
  manifest = json.loads((tmp_path / "manifest.json").read_text())
  manifest["content"]["kind"] = "scann"
  (tmp_path / "manifest.json").write_text(json.dumps(manifest))
  with pytest.raises(ValueError, match=r"kind 'scann', but there is no scann/"):
    load_index(tmp_path)
