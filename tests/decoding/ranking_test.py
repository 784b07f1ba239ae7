"""Where Hugging Face ranks RAG-Sequence's candidates otherwise, and why.

Each test sets up one of its defects alone: the default ranks by log p(y|x), and
`HfParity` as transformers does; tests/parity holds the latter against it.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rag_jax.decoding.ranking import HfParity
from rag_jax.decoding.ranking import rank_fast
from rag_jax.decoding.ranking import rank_thorough
from rag_jax.decoding.search import Found
from rag_jax.decoding.settings import GenerationSettings

BOS, PAD, EOS, V, STEPS = 0, 1, 2, 10, 4
SETTINGS = GenerationSettings(
  num_return_sequences=2, pad_token_id=PAD, bos_token_id=BOS
)


def candidates(*sequences, fill=PAD):
  """Returns one question's candidates."""
  tokens = np.full((1, len(sequences), STEPS), fill, np.int32)
  for c, sequence in enumerate(sequences):
    tokens[0, c, : len(sequence)] = sequence
  lengths = np.array([[len(sequence) for sequence in sequences]])
  return Found(
    tokens=jnp.asarray(tokens),
    lengths=jnp.asarray(lengths),
    scores=jnp.zeros(lengths.shape),
    evidence=jnp.zeros((*tokens.shape, 1)),
  )


def log_probs(*rows):
  """Returns [1, C, STEPS, K] from rows of [STEPS][K]."""
  return jnp.log(jnp.asarray(rows, jnp.float32))[None]


def rank(found, given, prior, parity=None, settings=SETTINGS, total=None):
  total = jnp.zeros_like(given) if total is None else total
  prior = jnp.log(jnp.asarray([prior], jnp.float32))
  ranked = rank_thorough(prior, found, given, total, settings, V, parity)
  return jax.tree.map(np.asarray, ranked)


def first(ranked):
  return ranked.tokens[0, 0, : ranked.lengths[0, 0]].tolist()


def test_the_default_is_the_likelihood():
  found = candidates([3, EOS], [4, 5, EOS])
  given = log_probs(
    [[0.5, 0.1], [0.5, 0.1], [1, 1], [1, 1]],
    [[0.1, 0.9], [0.2, 0.9], [0.3, 0.9], [1, 1]],
  )
  ranked = rank(found, given, [0.7, 0.3])
  expected = [0.3 * 0.9**3 + 0.7 * 0.1 * 0.2 * 0.3, 0.7 * 0.25 + 0.3 * 0.01]
  np.testing.assert_allclose(np.exp(ranked.log_probs[0]), expected, rtol=1e-5)
  np.testing.assert_array_equal(ranked.scores, ranked.log_probs)
  assert first(ranked) == [4, 5, EOS]


def test_hugging_face_forgets_the_prior_of_a_single_token():
  """It adds the prior at the second token, which is padding here."""
  found = candidates([EOS], [4, EOS])
  given = log_probs(
    [[0.2, 0.9], [1, 1], [1, 1], [1, 1]],
    [[0.7, 0.7], [0.7, 0.7], [1, 1], [1, 1]],
  )
  ranked = rank(found, given, [0.9, 0.1])
  assert first(ranked) == [4, EOS]
  parity = rank(found, given, [0.9, 0.1], HfParity())
  assert first(parity) == [EOS]
  # Without a prior the documents add up to more than a probability.
  np.testing.assert_allclose(np.exp(parity.scores[0, 0]), 0.2 + 0.9, rtol=1e-5)
  np.testing.assert_allclose(
    np.exp(parity.log_probs[0, 0]), 0.9 * 0.2 + 0.1 * 0.9, rtol=1e-5
  )


def test_hugging_face_leaves_the_bos_token_out_if_all_begin_with_it():
  found = candidates([BOS, 4, EOS], [BOS, 5, EOS])
  given = log_probs(
    [[0.9, 0.1], [0.5, 0.5], [0.5, 0.5], [1, 1]],
    [[0.1, 0.9], [0.4, 0.6], [0.4, 0.6], [1, 1]],
  )
  prior = [0.5, 0.5]
  assert first(rank(found, given, prior)) == [BOS, 5, EOS]
  parity = rank(found, given, prior, HfParity())
  np.testing.assert_allclose(np.exp(parity.scores[0]), [0.26, 0.25], rtol=1e-5)
  assert first(parity) == [BOS, 5, EOS]
  # One that begins otherwise, and it counts for all.
  found = candidates([BOS, 4, EOS], [3, 5, EOS])
  parity = rank(found, given, prior, HfParity())
  np.testing.assert_allclose(
    parity.scores, rank(found, given, prior).scores, rtol=1e-5
  )


def test_hugging_face_charges_for_ends_behind_the_end_if_padding_is_0():
  """T5: `pad_token_id or eos_token_id` is the end token."""
  settings = GenerationSettings(
    num_return_sequences=2, pad_token_id=0, eos_token_id=(EOS,)
  )
  found = candidates([3, EOS], [4, 5, 6, EOS], fill=EOS)
  given = log_probs([[0.6], [0.6], [0.3], [0.3]], [[0.7], [0.7], [0.7], [0.7]])
  assert first(rank(found, given, [1.0], settings=settings)) == [3, EOS]
  parity = rank(found, given, [1.0], HfParity(), settings)
  assert first(parity) == [4, 5, 6, EOS]
  np.testing.assert_allclose(
    np.exp(parity.scores[0, 1]), 0.6 * 0.6 * 0.3 * 0.3, rtol=1e-5
  )
  assert parity.tokens[0, 1].tolist() == [3, EOS, EOS, EOS]


def test_label_smoothing_moves_the_ranking_of_hugging_face():
  found = candidates([3, EOS], [4, EOS])
  given = log_probs(
    [[0.6], [0.6], [1], [1]],
    [[0.5], [0.6], [1], [1]],
  )
  # The first document-and-token has a far more peaked distribution.
  total = jnp.asarray([[[-90.0], [-30], [0], [0]], [[-30.0], [-30], [0], [0]]])
  plain = rank(found, given, [1.0], HfParity(), total=total[None])
  smooth = rank(
    found, given, [1.0], HfParity(label_smoothing=0.1), total=total[None]
  )
  assert first(plain) == [3, EOS]
  assert first(smooth) == [4, EOS]
  np.testing.assert_allclose(
    smooth.scores[0, 0], 0.9 * np.log(0.3) + 0.1 / V * -60, rtol=1e-5
  )


@pytest.mark.parametrize("parity", [None, HfParity()])
def test_what_is_the_same_counts_once(parity):
  found = candidates([3, EOS], [4, EOS], [3, EOS])
  given = log_probs(*[[[0.6], [0.6], [1], [1]]] * 3)
  settings = GenerationSettings(num_return_sequences=3, pad_token_id=PAD)
  ranked = rank(found, given, [1.0], parity, settings)
  assert ranked.lengths.tolist() == [[2, 2, 0]]
  assert ranked.tokens[0, 2].tolist() == [PAD] * STEPS


def test_fast_adds_up_the_documents_that_wrote_it():
  """Two documents, two beams each; one sequence is of both."""
  found = candidates([3, EOS], [4, EOS], [5, EOS], [3, EOS])
  evidence = np.zeros((1, 4, STEPS, 1), np.float32)
  evidence[0, :, 0, 0] = np.log([0.5, 0.2, 0.4, 0.3])
  evidence[0, :, 1, 0] = np.log([0.5, 0.9, 0.8, 0.6])
  found = found.replace(evidence=jnp.asarray(evidence))
  prior = jnp.log(jnp.asarray([[0.6, 0.4]]))
  ranked = jax.tree.map(np.asarray, rank_fast(prior, found, SETTINGS))
  assert ranked.tokens[0, :, 0].tolist() == [3, 5]
  np.testing.assert_allclose(
    np.exp(ranked.log_probs[0]),
    [0.6 * 0.25 + 0.4 * 0.18, 0.4 * 0.32],
    rtol=1e-5,
  )
  given = ranked.token_log_probs[0]  # R K T
  np.testing.assert_allclose(
    np.exp(given[0]), [[0.5, 0.5, 1, 1], [0.3, 0.6, 1, 1]], rtol=1e-5
  )
  assert given[1, 0, 0] < -1e8
  np.testing.assert_allclose(np.exp(given[1, 1]), [0.4, 0.8, 1, 1], rtol=1e-5)
