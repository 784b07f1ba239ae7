"""A random generator with documents, small enough to decode by hand."""

import dataclasses
import functools

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from rag_jax.config_models import GeneratorConfig
from rag_jax.decoding.settings import GenerationSettings
from rag_jax.models.rag import build_generator

B, K, C, V, D, STEPS, W = 4, 3, 6, 13, 8, 5, 3
PAD, EOS = 1, 2
CONFIG = GeneratorConfig(
  num_layers=1, embed_dim=D, num_heads=2, mlp_dim=8, max_positions=8
)
MODEL = build_generator(
  CONFIG, vocab_size=V, decoder_start_id=EOS, dtype=jnp.float32
)
BEAMS = GenerationSettings(
  max_new_tokens=STEPS,
  num_beams=W,
  num_return_sequences=W,
  eos_token_id=(EOS,),
  pad_token_id=PAD,
)
GREEDY = dataclasses.replace(BEAMS, num_beams=1, num_return_sequences=1)


@functools.cache
def params():
  """Returns random parameters; these make sequences of several lengths."""
  rng = np.random.default_rng(2)
  tokens = jnp.zeros((1, 2), jnp.int32)
  shapes = jax.eval_shape(
    MODEL.init, jax.random.key(0), tokens, tokens == 0, tokens
  )

  def draw(path, x):
    name = jax.tree_util.keystr(path)
    values = rng.normal(size=x.shape)
    if "scale" in name:
      values = 1 + 0.2 * values
    elif "position" in name:
      values = 3 * values
    elif "cross_attention" not in name or "norm" in name:
      values = 0.7 * values
    return jnp.asarray(values, jnp.float32)

  tree = jax.tree_util.tree_map_with_path(draw, nn.meta.unbox(shapes)["params"])
  bias = tree["final_logits_bias"]
  tree["final_logits_bias"] = bias.at[EOS].add(1.5)
  return {"generator": tree}


@functools.cache
def inputs():
  """Returns doc_scores, best first, contexts of many lengths, and mask."""
  rng = np.random.default_rng(1)
  scores = -np.sort(-2 * rng.normal(size=(B, K)), axis=1).astype(np.float32)
  lengths = 2 + np.arange(B * K).reshape(B, K, 1) % (C - 1)
  tokens = rng.integers(3, V, size=(B, K, C), dtype=np.int32)
  mask = np.arange(C) < lengths
  return scores, np.where(mask, tokens, PAD), mask


@functools.partial(jax.jit, static_argnums=0)
def compiled_apply(method, params, *args):
  return MODEL.apply({"params": params}, *args, method=method)


def apply(method, *args):
  """Returns what a method of the generator does."""
  return compiled_apply(method, params()["generator"], *args)
