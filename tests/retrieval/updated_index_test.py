"""An updated index against an exact one of the rows that are left."""

import numpy as np
import pytest

from rag_jax.retrieval.exact import ExactIndex
from rag_jax.retrieval.index import Index
from rag_jax.retrieval.index import load_index
from rag_jax.retrieval.updated_index import UpdatedIndex

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
