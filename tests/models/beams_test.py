"""Beams, trees of prefixes and scores against whole targets, one by one."""

import functools

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rag_jax.config_models import GeneratorConfig
from rag_jax.models.generator import Generator

B, W, K, C, T, V, D, START = 2, 3, 2, 5, 4, 13, 8, 2
BART = {}
T5 = {
  "head_dim": 3,
  "norm": "pre",
  "norm_kind": "rms",
  "use_bias": False,
  "embedding_norm": False,
  "positions": "none",
  "relative_buckets": 8,
  "relative_max_distance": 9,
  "relative_shared": True,
  "scale_attention": False,
  "scale_output": True,
  "logits_bias": False,
}
POINTER = T5 | {"pointer": True}
VARIANTS = pytest.mark.parametrize(
  "fields", [BART, T5, POINTER], ids=["bart", "t5", "pointer"]
)
RNG = np.random.default_rng(0)
CONTEXT = RNG.integers(3, V, size=(B, K, C)).astype(np.int32)
MASK = np.arange(C) < RNG.integers(2, C + 1, size=(B, K, 1))


class Model:
  """A generator, random parameters, and its methods compiled."""

  def __init__(self, **fields):
    config = GeneratorConfig(
      vocab_size=V,
      num_layers=2,
      embed_dim=D,
      num_heads=2,
      mlp_dim=12,
      max_positions=8,
      decoder_start_id=START,
      **fields,
    )
    self.generator = Generator(config, dtype=jnp.float32)
    tokens = CONTEXT[:, 0]
    shapes = jax.eval_shape(
      self.generator.init, jax.random.key(0), tokens, tokens > 0, tokens
    )
    rng = np.random.default_rng(1)
    self.params = jax.tree.map(
      lambda x: 0.5 * rng.normal(size=x.shape).astype(np.float32),
      nn.meta.unbox(shapes)["params"],
    )
    self.memory = self.run("encode", CONTEXT.reshape(B * K, C), flat(MASK))
    self.memory = self.memory.reshape(B, K, C, D)

  def run(self, method, *args, **static):
    """Returns what a method makes of arrays."""
    return self._compiled(method, tuple(static.items()))(self.params, *args)

  @functools.cache  # noqa: B019 (two models, for the whole test run)
  def _compiled(self, method, static):
    return jax.jit(
      lambda params, *args: self.generator.apply(
        {"params": params}, *args, **dict(static), method=method
      )
    )

  def log_probs(self, targets):
    """Returns log p of every next token, [B, W, K, T, V], one call each."""
    result = np.zeros((*targets.shape[:2], K, targets.shape[2], V))
    for w in range(targets.shape[1]):
      logits = self.run(
        "__call__",
        CONTEXT.reshape(B * K, C),
        flat(MASK),
        np.repeat(targets[:, w], K, axis=0),
      )
      log_probs = jax.nn.log_softmax(logits).reshape(B, K, -1, V)
      result[:, w] = np.asarray(log_probs)
    return result


def flat(mask):
  return mask.reshape(B * K, C)


@functools.cache
def compiled(fields):
  return Model(**dict(fields))


@pytest.fixture
def model(fields):
  return compiled(tuple(fields.items()))


@VARIANTS
def test_a_beam_that_continues_another_remembers_what_that_one_wrote(model):
  """Each step, beams continue random ones, so that some of them die."""
  rng = np.random.default_rng(2)
  histories = np.zeros((B, W, 0), np.int32)
  tokens = np.full((B, W), START, np.int32)
  cache = model.run(
    "init_cache",
    model.memory,
    MASK,
    CONTEXT,
    num_beams=W,
    num_steps=T + 1,
  )
  steps = []
  for t in range(T):
    logits, cache = model.run("step", tokens, jnp.int32(t), cache)
    steps.append((histories, np.asarray(jax.nn.log_softmax(logits))))
    beams = rng.integers(W, size=(B, W)).astype(np.int32)
    tokens = rng.integers(3, V, size=(B, W)).astype(np.int32)
    cache = cache.reorder(jnp.asarray(beams))
    histories = np.take_along_axis(histories, beams[..., None], axis=1)
    histories = np.concatenate([histories, tokens[..., None]], axis=2)
  for t, (history, got) in enumerate(steps):
    # As long for each step, so that the oracle compiles once.
    targets = np.zeros((B, W, T), np.int32)
    targets[:, :, :t] = history
    expected = model.log_probs(targets)[:, :, :, t]  # B W K V
    np.testing.assert_allclose(got, expected, atol=2e-5, err_msg=f"step {t}")


@VARIANTS
def test_candidates_are_scored_under_every_document(model):
  targets = np.random.default_rng(3).integers(3, V, size=(B, W, T))
  targets = targets.astype(np.int32)
  expected = np.take_along_axis(
    model.log_probs(targets), targets[:, :, None, :, None], axis=-1
  )[..., 0]  # B W K T
  got = model.run("score", targets, model.memory, MASK, CONTEXT)
  np.testing.assert_allclose(got, expected, atol=2e-5)


@VARIANTS
def test_candidates_that_begin_alike_share_nodes_of_the_tree(model):
  """A b c and a d: the nodes are start, a, b, d, in any order."""
  a, b, c, d = 4, 5, 6, 7
  tokens = np.array([[START, a, b, d], [b, START, d, a]], np.int32)
  depths = np.array([[0, 1, 2, 2], [2, 0, 2, 1]], np.int32)
  parents = [[None, 0, 1, 1], [3, None, 3, 1]]
  seen = np.zeros((B, 4, 4), bool)
  for row in range(B):
    for node in range(4):
      ancestor = node
      while ancestor is not None:
        seen[row, node, ancestor] = True
        ancestor = parents[row][ancestor]
  states, copy = model.run(
    "tree_states", tokens, depths, seen, model.memory, MASK, CONTEXT
  )
  logits = model.run("logits", states, copy)
  got = np.asarray(jax.nn.log_softmax(logits)).reshape(B, K, 4, V)
  targets = np.tile(np.array([[a, b, c, 9], [a, d, 9, 9]], np.int32), (B, 1, 1))
  expected = model.log_probs(targets)  # B W K T V
  for row, places in enumerate([(0, 1, 2, 3), (1, 3, 0, 2)]):
    start, node_a, node_b, node_d = places
    for node, beam, t in (
      (start, 0, 0),
      (start, 1, 0),
      (node_a, 0, 1),
      (node_b, 0, 2),
      (node_d, 1, 2),
    ):
      np.testing.assert_allclose(
        got[row, :, node], expected[row, beam, :, t], atol=2e-5
      )
