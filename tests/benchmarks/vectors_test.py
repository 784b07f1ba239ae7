"""Mixtures of real embeddings: real ones first, all of length 1."""

import numpy as np
import pytest

from rag_jax.benchmarks.vectors import long_and_short_texts
from rag_jax.benchmarks.vectors import mix_embeddings
from rag_jax.corpus.document import Document


def test_texts_are_documents_and_the_sentences_of_several():
  documents = [
    Document(id="1", title="", text="One. Two is here.", metadata=(), where=""),
    Document(id="2", title="", text="Alone.", metadata=(), where=""),
  ]
  assert list(long_and_short_texts(documents)) == [
    "One. Two is here.", "One.", "Two is here.", "Alone.",
  ]  # fmt: skip


def test_each_mixture_lies_between_two_real_vectors():
  real = 3 * np.eye(5, dtype=np.float32)
  mixed = mix_embeddings(real, 200, beta=0.5, seed=1)
  np.testing.assert_array_equal(mixed[:5], np.eye(5))
  np.testing.assert_allclose(np.linalg.norm(mixed, axis=1), 1, rtol=1e-6)
  assert np.all(mixed >= 0)
  assert np.all(np.count_nonzero(mixed[5:], axis=1) == 2)
  assert len(np.unique(mixed, axis=0)) == 200
  again = mix_embeddings(real, 200, beta=0.5, seed=1)
  np.testing.assert_array_equal(mixed, again)
  other = mix_embeddings(real, 200, beta=0.5, seed=2)
  assert not np.array_equal(mixed, other)


def test_a_small_beta_keeps_mixtures_near_a_real_vector():
  real = np.eye(4, dtype=np.float32)
  near, far = (
    mix_embeddings(real, 500, beta=beta, seed=0)[4:].max(axis=1).mean()
    for beta in (0.1, 10.0)
  )
  assert near > 0.95 > far


def test_fewer_than_the_real_ones_are_the_first_of_them():
  real = np.eye(4, dtype=np.float32)
  np.testing.assert_array_equal(
    mix_embeddings(real, 2, beta=0.5, seed=0), real[:2]
  )


@pytest.mark.parametrize(
  ("real", "num", "beta"),
  [
    (np.eye(1), 3, 0.5),
    (np.eye(2), 0, 0.5),
    (np.eye(2), 3, 0.0),
    (np.zeros((2, 2)), 3, 0.5),
    (np.full((2, 2), np.nan), 3, 0.5),
  ],
)
def test_impossible_mixtures_are_refused(real, num, beta):
  with pytest.raises(ValueError, match=r"expected num of at least 1"):
    mix_embeddings(real.astype(np.float32), num, beta=beta, seed=0)
