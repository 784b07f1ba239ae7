"""Layers against loops over positions."""

import math

from flax import linen as nn
import jax
import jax.numpy as jnp
from linen import apply
from linen import attention_by_hand
from linen import fresh_params
from linen import normal
from linen import on_mesh
from linen import random_params
import numpy as np
import pytest

from rag_jax.config_models import TransformerConfig
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


class Stack(nn.Module):
  """Three decoder layers."""

  loop: layers.LayerLoop = layers.UNROLLED
  dropout: float = 0.0

  @nn.compact
  def __call__(self, x, mask, memory, memory_mask, deterministic=True):
    """Returns the output."""
    stack = [
      layers.TransformerLayer(
        make_config(dropout=self.dropout),
        cross=True,
        dtype=jnp.float32,
        name=f"layer_{i}",
      )
      for i in range(3)
    ]
    inputs = mask, memory, memory_mask
    return self.loop.run(stack, x, *inputs, deterministic=deterministic)


CAUSAL = np.tril(np.ones((B, T, T), bool))
STACK_ARGS = tuple(map(jnp.asarray, (X, CAUSAL, MEMORY, MEMORY_MASK)))
LOOPS = [layers.LayerLoop(scan=True, remat=remat) for remat in layers.REMAT]
LOOPS += [layers.LayerLoop(remat="full"), layers.LayerLoop(attention_rows=1)]
LOOPS += [layers.LayerLoop(scan=True, remat="attention", attention_rows=1)]


def output_and_gradients(loop, params, x, mask, memory, memory_mask, seed=None):
  """Of the parameters and of both inputs; with dropout if there is a seed."""
  module = Stack(loop, dropout=0.0 if seed is None else 0.5)
  rngs = {} if seed is None else {"dropout": jax.random.key(seed)}

  def run(params, x, memory):
    y = module.apply(
      {"params": params},
      *(x, mask, memory, memory_mask),
      deterministic=seed is None,
      rngs=rngs,
    )
    return jnp.sum(jnp.sin(y)), y

  grad_fn = jax.value_and_grad(run, argnums=(0, 1, 2), has_aux=True)
  (_, y), grads = jax.jit(on_mesh(grad_fn))(params, x, memory)
  return y, grads


@pytest.mark.parametrize("loop", LOOPS, ids=str)
def test_however_layers_run_output_and_gradients_are_the_same(loop):
  params = random_params(Stack(), *STACK_ARGS)
  y, grads = output_and_gradients(layers.UNROLLED, params, *STACK_ARGS)
  other_y, other_grads = output_and_gradients(loop, params, *STACK_ARGS)
  np.testing.assert_allclose(other_y, y, rtol=1e-5, atol=1e-6)
  for one, other in zip(
    jax.tree.leaves(grads), jax.tree.leaves(other_grads), strict=True
  ):
    np.testing.assert_allclose(other, one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loop", LOOPS, ids=str)
def test_however_layers_run_they_are_born_the_same(loop):
  one = fresh_params(Stack(), *STACK_ARGS)
  other = fresh_params(Stack(loop), *STACK_ARGS)
  jax.tree.map(np.testing.assert_array_equal, one, other)


def test_the_dropout_of_a_loop_is_the_same_when_it_is_computed_again():
  loop = layers.LayerLoop(scan=True, remat="full")
  params = random_params(Stack(), *STACK_ARGS)
  y, grads = output_and_gradients(loop, params, *STACK_ARGS, seed=0)
  # The backward pass computes the same dropout again: without recomputation the
  # gradients are the same.
  kept = layers.LayerLoop(scan=True)
  same_y, same_grads = output_and_gradients(kept, params, *STACK_ARGS, seed=0)
  np.testing.assert_allclose(same_y, y, rtol=1e-5, atol=1e-6)
  for one, other in zip(
    jax.tree.leaves(grads), jax.tree.leaves(same_grads), strict=True
  ):
    np.testing.assert_allclose(other, one, rtol=1e-4, atol=1e-5)
  other_y, _ = output_and_gradients(loop, params, *STACK_ARGS, seed=1)
  assert np.any(other_y != y)


def test_a_loop_over_layers_makes_a_program_of_one_layer():
  params = random_params(Stack(), *STACK_ARGS)

  def products(loop):
    def loss(params):
      return jnp.sum(Stack(loop).apply({"params": params}, *STACK_ARGS))

    return jax.jit(jax.grad(loss)).lower(params).as_text().count("dot_general")

  every = products(layers.UNROLLED)
  # The first layer has no gradient of its input to compute; the loop has.
  assert products(layers.LayerLoop(scan=True)) <= every / 3 + 1


def test_what_is_not_kept_for_the_backward_pass_needs_no_memory():
  sizes = {}
  args = [jnp.repeat(x, 64, axis=0) for x in STACK_ARGS]
  params = random_params(Stack(), *STACK_ARGS)
  for remat in layers.REMAT:
    module = Stack(layers.LayerLoop(scan=True, remat=remat))

    def loss(params, module=module):
      return jnp.sum(module.apply({"params": params}, *args))

    compiled = jax.jit(jax.grad(loss)).lower(params).compile()
    sizes[remat] = compiled.memory_analysis().temp_size_in_bytes
  assert sizes["full"] < sizes["attention"] < sizes["dots"] < sizes["none"]
