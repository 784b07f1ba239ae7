"""Candidates as a tree of prefixes: the same scores, each prefix once."""

import numpy as np
from small_rag import EOS
from small_rag import STEPS
from small_rag import B
from small_rag import C
from small_rag import D
from small_rag import K
from small_rag import V
from small_rag import apply
from small_rag import inputs

from rag_jax.decoding.candidates import bucket
from rag_jax.decoding.candidates import build_tree
from rag_jax.decoding.candidates import score_tree
from rag_jax.decoding.memory import Memory


def test_candidates_that_begin_alike_share_their_prefixes():
  rng = np.random.default_rng(2)
  tokens = rng.integers(3, size=(B, 7, STEPS), dtype=np.int32)
  lengths = rng.integers(1, STEPS + 1, size=(B, 7))
  tree = build_tree(tokens, lengths, EOS)
  for b in range(B):
    prefixes = {
      tuple(tokens[b, c, :t]) for c in range(7) for t in range(lengths[b, c])
    }
    depths = np.asarray(tree.depths[b])
    seen = np.asarray(tree.seen[b])
    # What fills up stands at depth 0, as the start does.
    assert np.sum(depths > 0) == len(prefixes) - 1
    np.testing.assert_array_equal(
      seen.sum(axis=1)[depths > 0] - 1, depths[depths > 0]
    )
  memory = rng.normal(size=(B, K, C, D)).astype(np.float32)
  read, mask = inputs()[1:3]
  log_probs, total = apply(score_tree, tree, tokens, Memory(memory, mask, read))
  expected = apply("score", tokens, memory, mask, read)  # B C K T
  real = (np.arange(STEPS) < lengths[..., None])[..., None]
  np.testing.assert_allclose(
    np.where(real, log_probs, 0),
    np.where(real, np.swapaxes(expected, 2, 3), 0),
    rtol=1e-4,
    atol=1e-5,
  )
  # Of the first token, which all share: over the vocabulary.
  every = np.tile(np.arange(V, dtype=np.int32)[:, None], (B, 1, STEPS))
  first = apply("score", every, memory, mask, read)
  np.testing.assert_allclose(
    total[:, 0, 0], first[:, :, :, 0].sum(axis=1), rtol=1e-4
  )


def test_trees_come_in_few_sizes():
  sizes = [bucket(n, 10_000) for n in range(1, 2000)]
  assert all(size >= n for n, size in enumerate(sizes, start=1))
  assert all(size <= max(16, 1.5 * n) for n, size in enumerate(sizes, start=1))
  assert len(set(sizes)) == 15
  assert bucket(17, 20) == 20
