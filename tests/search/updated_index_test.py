"""An updated index against an exact one of the rows that are left."""

import numpy as np
import pytest

from rag_jax.config import IndexConfig
from rag_jax.retrieval.exact import ExactIndex
from rag_jax.retrieval.index import Index
from rag_jax.retrieval.index import build_index
from rag_jax.retrieval.index import load_index
from rag_jax.search.updated_index import UpdatedIndex

P, R = 30, 6
ENCODER = {"encoder_fingerprint": "1a2b"}


def normal(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.fixture(params=[[], [0, 4, 5, 29], list(range(P))])
def gone(request):
  return np.array(request.param, int)


@pytest.fixture
def updated(gone):
  base = ExactIndex(normal(P, R), **ENCODER, passages_fingerprint="3c")
  return UpdatedIndex(
    base, gone, normal(7, R, seed=1), passages_fingerprint="n"
  )


@pytest.fixture
def rows(gone):
  return np.concatenate(
    [np.delete(normal(P, R), gone, axis=0), normal(7, R, seed=1)]
  )


def test_it_finds_what_an_index_built_of_the_rows_finds(updated, rows):
  assert isinstance(updated, Index)
  built = ExactIndex(rows, **ENCODER, passages_fingerprint="n")
  questions = normal(9, R, seed=2)
  for k in (1, 5, len(rows)):
    ids, scores = updated.search(questions, k)
    expected = built.search(questions, k)
    np.testing.assert_array_equal(ids, expected[0])
    np.testing.assert_array_equal(scores, expected[1])


def test_its_embeddings_are_the_rows(updated, rows):
  np.testing.assert_array_equal(updated.embeddings[:], rows)
  np.testing.assert_array_equal(np.asarray(updated.embeddings), rows)
  for some in (slice(1, 5), slice(None, None, -2), 4, -2, [[3, 0], [-1, 2]]):
    np.testing.assert_array_equal(updated.embeddings[some], rows[some])
  for row in (len(rows), -len(rows) - 1):
    with pytest.raises(IndexError, match=f"Row {row} was asked for"):
      updated.embeddings[row]


def test_it_is_saved_as_an_exact_index_of_the_rows(updated, rows, tmp_path):
  updated.save(tmp_path)
  loaded = load_index(tmp_path, passages_fingerprint="n")
  assert loaded.kind == "exact"
  np.testing.assert_array_equal(loaded.embeddings[:], rows)


def test_the_changed_share_counts_what_went_and_came(updated, gone):
  changed = min((len(gone) + 7) / P, 1.0)
  assert updated.changed_share == pytest.approx(changed)
  assert updated.num_passages == P + 7 - len(gone)


@pytest.mark.parametrize(
  ("kind", "settings"),
  [("exact", {}), ("exact", {"passages_per_shard": 25}), ("scann", {})],
)
def test_on_any_base_it_finds_what_a_new_index_of_the_rows_finds(
  kind, settings
):
  config = IndexConfig(kind=kind, **settings)
  base = build_index(normal(60, R), config, **ENCODER, passages_fingerprint="3")
  rng = np.random.default_rng(0)
  for _ in range(12):
    gone = np.sort(rng.choice(60, rng.integers(0, 60), replace=False))
    added = normal(int(rng.integers(1, 9)), R, seed=int(rng.integers(99)))
    added[-1] = 0.0  # ties with the question of zeros
    index = UpdatedIndex(base, gone, added, passages_fingerprint="n")
    rows = np.concatenate([np.delete(normal(60, R), gone, axis=0), added])
    expected = ExactIndex(rows, **ENCODER, passages_fingerprint="n")
    questions = np.concatenate([normal(5, R, seed=2), np.zeros((1, R))])
    questions = questions.astype(np.float32)
    for k in {1, min(5, len(rows)), len(rows)}:
      for ours, theirs in zip(
        index.search(questions, k), expected.search(questions, k), strict=True
      ):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


def test_many_that_are_gone_around_a_question_never_shorten_its_result():
  base = ExactIndex(normal(60, R), **ENCODER, passages_fingerprint="3")
  question = normal(1, R, seed=3)
  best = base.search(question, 60)[0][0]
  none = np.zeros((0, R), np.float32)
  gone = np.sort(best[:57])  # all but the worst three
  index = UpdatedIndex(base, gone, none, passages_fingerprint="n")
  ids, scores = index.search(question, 3)
  left = np.delete(np.arange(60), gone)
  np.testing.assert_array_equal(left[ids[0]], best[57:])
  assert np.all(np.isfinite(scores))
  with pytest.raises(ValueError, match=r"n_docs=4 .*expected 1 to 3"):
    index.search(question, 4)
