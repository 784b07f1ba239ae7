"""Linen modules in tests: parameters, application, attention as a loop."""

import functools
import math

from flax import linen as nn
import jax
import numpy as np


def normal(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def on_mesh(run):
  """Returns `run`, traced as part of a program for a mesh of one device."""
  mesh = jax.sharding.AbstractMesh(
    (1, 1, 1),
    ("data", "fsdp", "tensor"),
    axis_types=(jax.sharding.AxisType.Auto,) * 3,
  )

  def traced(*args):
    with jax.sharding.use_abstract_mesh(mesh):
      return run(*args)

  return traced


def shapes(module, *args):
  variables = jax.eval_shape(module.init, jax.random.key(0), *args)
  return nn.meta.unbox(variables)["params"]


def random_params(module, *args):
  """Parameters none of which is 0 or 1, so that none can be forgotten."""
  rng = np.random.default_rng(7)
  return jax.tree.map(
    lambda x: 0.7 * rng.normal(size=x.shape).astype(np.float32),
    shapes(module, *args),
  )


def fresh_params(module, *args):
  init = jax.jit(lambda *a: nn.meta.unbox(module.init(*a))["params"])
  return jax.tree.map(np.array, init(jax.random.key(0), *args))


def apply(module, params, *args, **kwargs):
  run = jax.jit(functools.partial(module.apply, **kwargs))
  return np.asarray(run({"params": params}, *args))


def attention_by_hand(params, x, memory, mask):
  """One head, question and key at a time."""
  _, num_heads, head_dim = params["query"]["kernel"].shape
  query, key, value, out = (
    (params[name]["kernel"], params[name]["bias"])
    for name in ("query", "key", "value", "out")
  )
  result = np.zeros(x.shape)
  for b in range(len(x)):
    for t in range(x.shape[1]):
      for n in range(num_heads):
        q = x[b, t] @ query[0][:, n] + query[1][n]
        weights, values = [], []
        for s in range(memory.shape[1]):
          if mask[b, min(t, mask.shape[1] - 1), s]:
            k = memory[b, s] @ key[0][:, n] + key[1][n]
            weights.append(math.exp(q @ k / math.sqrt(head_dim)))
            values.append(memory[b, s] @ value[0][:, n] + value[1][n])
        for weight, v in zip(weights, values, strict=True):
          result[b, t] += weight / sum(weights) * (v @ out[0][n])
      result[b, t] += out[1]
  return result
