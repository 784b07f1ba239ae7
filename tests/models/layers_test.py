"""Layers against loops over positions."""

import math

import jax
import jax.numpy as jnp
from linen import apply
from linen import attention_by_hand
from linen import fresh_params
from linen import normal
from linen import random_params
import numpy as np
import pytest

from rag_jax.config import TransformerConfig
from rag_jax.models import layers

B, T, S, N, H, F = 2, 3, 4, 2, 3, 5
D = N * H


def mlp_by_hand(params, x, activation):
  hidden = x @ params["up"]["kernel"] + params["up"]["bias"]
  if activation == "relu":
    hidden = np.maximum(hidden, 0)
  else:
    hidden = hidden * np.vectorize(
      lambda h: 0.5 * (1 + math.erf(h / math.sqrt(2)))
    )(hidden)
  return hidden @ params["down"]["kernel"] + params["down"]["bias"]


def norm_by_hand(params, x, eps):
  x = x - x.mean(axis=-1, keepdims=True)
  x = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps)
  return x * params["scale"] + params["bias"]


X, MEMORY = normal(B, T, D), normal(B, S, D, seed=1)
MEMORY_MASK = np.array([[[1, 1, 0, 1]], [[0, 0, 1, 1]]], bool)


def make_config(**fields):
  sizes = {"embed_dim": D, "num_heads": N, "mlp_dim": F}
  return TransformerConfig(**(sizes | fields))


@pytest.mark.parametrize("scale", [1.0, 0.2])
def test_fresh_kernels_have_the_size_that_is_asked_for(scale):
  x, memory = np.zeros((1, 2, 64), np.float32), np.ones((1, 2, 64), np.float32)
  mask = np.ones((1, 1, 2), bool)
  layer = layers.TransformerLayer(
    make_config(embed_dim=64, num_heads=4, mlp_dim=64),
    cross=True,
    out_init_scale=scale,
  )
  params = fresh_params(layer, x, mask, memory, mask)
  attention, mlp = params["self_attention"], params["mlp"]
  for part in (attention["out"], mlp["down"]):
    np.testing.assert_allclose(part["kernel"].std(), 0.02 * scale, rtol=0.05)
  for part in (attention["query"], attention["value"], mlp["up"]):
    np.testing.assert_allclose(part["kernel"].std(), 0.02, rtol=0.05)


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_mlp_is_two_products_with_an_exact_activation_between(activation):
  mlp = layers.Mlp(make_config(activation=activation), dtype=jnp.float32)
  params = random_params(mlp, X)
  # The tanh approximation of gelu is off by 5e-4 and more.
  np.testing.assert_allclose(
    apply(mlp, params, X), mlp_by_hand(params, X, activation), atol=1e-5
  )


def layer_by_hand(params, x, mask, norm, cross):
  def block(x, name, function):
    scale = params[name + "_norm"]
    if norm == "pre":
      return x + function(norm_by_hand(scale, x, 1e-5))
    return norm_by_hand(scale, x + function(x), 1e-5)

  x = block(
    x,
    "self_attention",
    lambda y: attention_by_hand(params["self_attention"], y, y, mask),
  )
  if cross:
    x = block(
      x,
      "cross_attention",
      lambda y: attention_by_hand(
        params["cross_attention"], y, MEMORY, MEMORY_MASK
      ),
    )
  return block(x, "mlp", lambda y: mlp_by_hand(params["mlp"], y, "gelu"))


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("cross", [False, True])
def test_a_layer_is_residual_blocks_with_norms_where_they_belong(norm, cross):
  layer = layers.TransformerLayer(
    make_config(norm=norm), cross=cross, dtype=jnp.float32
  )
  mask = np.tril(np.ones((B, T, T), bool))
  args = (X, mask, *((MEMORY, MEMORY_MASK) if cross else ()))
  params = random_params(layer, *args)
  np.testing.assert_allclose(
    apply(layer, params, *args),
    layer_by_hand(params, X, mask, norm, cross),
    atol=1e-5,
  )


def test_dropout_is_a_function_of_its_key():
  layer = layers.TransformerLayer(make_config(dropout=0.5), dtype=jnp.float32)
  mask = np.ones((B, 1, T), bool)
  params = random_params(layer, X, mask)

  @jax.jit
  def run(seed, *args):
    rngs = {"dropout": jax.random.key(seed)}
    variables = {"params": params}
    return layer.apply(variables, *args, deterministic=False, rngs=rngs)

  result = run(0, X, mask)
  np.testing.assert_array_equal(run(0, X, mask), result)
  assert np.any(run(1, X, mask) != result)
  assert np.any(apply(layer, params, X, mask) != result)
