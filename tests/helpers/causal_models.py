"""Tiny decoder-only generators: the variants that checkpoints have."""

import functools

from flax import linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from rag_jax.config_models import CausalConfig
from rag_jax.models.causal import build_causal
from rag_jax.models.layers import LayerLoop

V, S = 61, 13
_SIZES = {
  "vocab_size": V, "embed_dim": 24, "num_heads": 4, "mlp_dim": 32,
  "max_positions": 40,
}  # fmt: skip
GEMMA = {
  "norm_kind": "rms_plus_one", "post_norms": True, "scale_embedding": True,
  "activation": "gelu_new", "num_layers": 3, "sliding_window": 4,
  "head_dim": 8, "num_kv_heads": 1,
}  # fmt: skip
CONFIGS = {
  name: CausalConfig(**_SIZES | fields)
  for name, fields in {
    "llama": {"num_kv_heads": 2, "tied_output": False},
    "qwen2": {"num_kv_heads": 2, "qkv_bias": True},
    "qwen3": {"qk_norm": True, "head_dim": 8, "tied_output": False},
    "gemma2": {
      **GEMMA, "sliding_layers": (0, 2), "attention_soft_cap": 5.0,
      "logits_soft_cap": 3.0, "query_pre_attn_scalar": 20,
    },
    "gemma3_text": {
      **GEMMA, "sliding_layers": (0, 1), "qk_norm": True,
      "query_pre_attn_scalar": 8, "rope_theta": 1e6, "rope_local_theta": 1e4,
      "rope_scaling": "linear", "rope_factor": 8.0,
    },
    "gpt2": {
      "positions": "learned", "gated": False, "norm_kind": "layer",
      "norm_eps": 1e-5, "use_bias": True, "qkv_bias": True, "out_bias": True,
      "activation": "gelu_new",
    },
  }.items()
}  # fmt: skip


def random_params(config, seed=0):
  """Returns parameters none of which is 0 or 1, so that none is forgotten."""
  module = build_causal(config, dtype=jnp.float32)
  tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
  mask = jax.ShapeDtypeStruct((1, 2), jnp.bool_)
  shapes = jax.eval_shape(module.init, jax.random.key(0), tokens, mask)
  flat = flax.traverse_util.flatten_dict(
    nn.meta.unbox(shapes)["params"], sep="/"
  )
  rng = np.random.default_rng(seed)
  made = {}
  for name, x in sorted(flat.items()):
    made[name] = 0.3 * rng.normal(size=x.shape).astype(np.float32)
    if name.endswith("scale"):
      made[name] += config.norm_kind != "rms_plus_one"
  return flax.traverse_util.unflatten_dict(made, sep="/")


@functools.cache
def model(name, dtype=jnp.float32, **loop):
  """Returns a module and its parameters."""
  config = CONFIGS[name]
  module = build_causal(config, dtype=dtype, loop=LayerLoop(**loop))
  return module, random_params(config)


def texts(lengths, *, left=False, width=S, seed=0):
  """Returns tokens and their mask, padded to `width`."""
  rng = np.random.default_rng(seed)
  mask = np.arange(width) < np.array(lengths)[:, None]
  if left:
    mask = mask[:, ::-1]
  tokens = np.zeros(mask.shape, np.int32)
  for row, length in enumerate(lengths):
    tokens[row, mask[row]] = rng.integers(1, V, size=length)
  return tokens, mask


@functools.cache
def compiled(module, method="__call__", **static):
  """Returns a method of a module, compiled once."""
  return jax.jit(functools.partial(module.apply, method=method, **static))


def logits_of(module, params, tokens, mask):
  """Returns what the compiled module says."""
  return np.asarray(compiled(module)({"params": params}, tokens, mask))
