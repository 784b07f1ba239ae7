"""Layers against loops over positions, and what masks and starts promise."""

import functools
import math

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rag_jax.models import layers

B, T, S, N, H, F = 2, 3, 4, 2, 3, 5
D = N * H


def normal(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


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
  query, key, value, out = (
    (params[name]["kernel"], params[name]["bias"])
    for name in ("query", "key", "value", "out")
  )
  result = np.zeros(x.shape)
  for b in range(len(x)):
    for t in range(x.shape[1]):
      for n in range(N):
        q = x[b, t] @ query[0][:, n] + query[1][n]
        weights, values = [], []
        for s in range(memory.shape[1]):
          if mask[b, min(t, mask.shape[1] - 1), s]:
            k = memory[b, s] @ key[0][:, n] + key[1][n]
            weights.append(math.exp(q @ k / math.sqrt(H)))
            values.append(memory[b, s] @ value[0][:, n] + value[1][n])
        for weight, v in zip(weights, values, strict=True):
          result[b, t] += weight / sum(weights) * (v @ out[0][n])
      result[b, t] += out[1]
  return result


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


ATTENTION = layers.Attention(N, H, dtype=jnp.float32)
X, MEMORY = normal(B, T, D), normal(B, S, D, seed=1)
MASK = np.array(
  [[[1, 1, 0, 1], [0, 1, 0, 0], [1, 1, 1, 1]], [[0, 0, 1, 1]] * 3], bool
)


@pytest.fixture(scope="module")
def attention():
  """A compiled `Attention`, and parameters for it."""
  params = random_params(ATTENTION, X, MEMORY, MASK)
  run = jax.jit(lambda *args: ATTENTION.apply({"params": params}, *args))
  return params, lambda *args: np.asarray(run(*args))


def test_attention_is_a_mixture_of_what_the_mask_allows(attention):
  params, run = attention
  expected = attention_by_hand(params, X, MEMORY, MASK)
  np.testing.assert_allclose(run(X, MEMORY, MASK), expected, atol=1e-5)


def test_one_row_of_mask_serves_all_positions(attention):
  params, run = attention
  mask = MASK[:, :1]
  expected = attention_by_hand(params, X, MEMORY, mask)
  np.testing.assert_allclose(run(X, MEMORY, mask), expected, atol=1e-5)
  repeated = np.repeat(mask, T, axis=1)
  np.testing.assert_allclose(
    run(X, MEMORY, mask), run(X, MEMORY, repeated), atol=1e-6
  )


def test_what_is_masked_can_be_anything(attention):
  _, run = attention
  memory = np.where(MASK.any(axis=1)[:, :, None], MEMORY, 1e4)
  assert np.any(memory != MEMORY)
  np.testing.assert_array_equal(run(X, memory, MASK), run(X, MEMORY, MASK))
  memory = MEMORY.copy()
  memory[0, 2] = 1e4  # masked for the first two positions alone
  before, after = run(X, MEMORY, MASK)[0], run(X, memory, MASK)[0]
  np.testing.assert_array_equal(after[:2], before[:2])
  assert np.any(after[2] != before[2])


def test_a_position_that_may_look_at_nothing_is_finite(attention):
  _, run = attention
  assert np.all(np.isfinite(run(X, MEMORY, np.zeros_like(MASK))))


def test_attention_in_bfloat16_is_close_and_keeps_float32_parameters():
  low = layers.Attention(N, H, dtype=jnp.bfloat16)
  params = fresh_params(low, X, MEMORY, MASK)
  assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype("float32")}
  x, memory = 30 * X, 30 * MEMORY
  result = apply(low, params, x, memory, MASK)
  assert result.dtype == jnp.bfloat16
  expected = apply(ATTENTION, params, x, memory, MASK)
  np.testing.assert_allclose(
    result.astype(np.float32), expected, atol=0.02 * np.abs(expected).max()
  )


def bucket_by_hand(offset, num_buckets, max_distance):
  """T5's bucket: half for each side, of which half for single distances."""
  half = num_buckets // 2
  first = half if offset > 0 else 0
  distance, exact = abs(offset), half // 2
  if distance < exact:
    return first + distance
  # The others share the rest evenly in log(distance), up to max_distance.
  fraction = math.log(distance / exact) / math.log(max_distance / exact)
  bucket = exact + int(fraction * (half - exact) + 1e-9)
  return first + min(bucket, half - 1)


@pytest.mark.parametrize(
  ("num_buckets", "max_distance"), [(32, 128), (8, 16), (4, 128)]
)
def test_relative_buckets_are_those_of_t5(num_buckets, max_distance):
  offset = np.arange(-300, 301)[None]
  buckets = jax.jit(
    functools.partial(
      layers.relative_bucket,
      num_buckets=num_buckets,
      max_distance=max_distance,
    )
  )(offset)
  expected = [
    bucket_by_hand(o, num_buckets, max_distance) for o in offset[0].tolist()
  ]
  np.testing.assert_array_equal(buckets[0], expected)


def test_relative_positions_add_a_bias_for_each_offset_and_head():
  attention = layers.Attention(N, H, relative_buckets=8, dtype=jnp.float32)
  params = random_params(attention, X, X, np.ones((B, 1, T), bool))
  for name in ("query", "key"):  # no content: the bias alone decides
    params[name] = jax.tree.map(np.zeros_like, params[name])
  bias = params["relative_bias"]
  assert bias.shape == (8, N)
  value = X @ params["value"]["kernel"].reshape(D, D)
  value = value.reshape(B, T, N, H) + params["value"]["bias"]
  expected = np.zeros((B, T, D)) + params["out"]["bias"]
  for b in range(B):
    for t in range(T):
      for n in range(N):
        weights = [
          math.exp(bias[bucket_by_hand(s - t, 8, 128), n]) for s in range(T)
        ]
        for s in range(T):
          expected[b, t] += (
            weights[s]
            / sum(weights)
            * (value[b, s, n] @ params["out"]["kernel"][n])
          )
  result = apply(attention, params, X, X, np.ones((B, 1, T), bool))
  np.testing.assert_allclose(result, expected, atol=1e-5)


def test_copying_attention_returns_what_it_looks_at():
  copying = layers.Attention(N, H, start="copy", dtype=jnp.float32)
  params = fresh_params(copying, X, MEMORY, MASK)
  looks_at = np.array([[3, 0, 2], [1, 1, 0]])
  one = np.arange(S) == looks_at[:, :, None]  # B T S
  result = apply(copying, params, X, MEMORY, one)
  for b in range(B):
    np.testing.assert_allclose(result[b], MEMORY[b, looks_at[b]], atol=1e-6)


def test_copying_attention_looks_where_the_rolled_half_is_what_it_asks_for():
  """Of `memory` rolled by D / 2, it prefers what is like the question."""
  heads, width = 2, 16
  dim = heads * width
  copying = layers.Attention(heads, width, start="copy", dtype=jnp.float32)
  signs = np.sign(normal(1, S, dim))
  memory = np.roll(signs, dim // 2, axis=-1)
  x = signs[:, [2, 0, 3]]
  mask = np.ones((1, 1, S), bool)
  result = apply(
    copying, fresh_params(copying, x, memory, mask), x, memory, mask
  )
  np.testing.assert_allclose(result[0], memory[0, [2, 0, 3]], atol=0.05)


def test_previous_attention_adds_the_token_before_rolled_by_half():
  previous = layers.Attention(
    N, H, start="previous", relative_buckets=8, dtype=jnp.float32
  )
  mask = np.ones((B, 1, T), bool)
  result = apply(previous, fresh_params(previous, X, X, mask), X, X, mask)
  # exp(6) against 1 for each other position: all but 0.5 % of the weight.
  for t in range(1, T):
    expected = np.roll(X[:, t - 1], D // 2, axis=-1) / math.sqrt(D)
    np.testing.assert_allclose(result[:, t], expected, atol=0.02)


@pytest.mark.parametrize(("std", "scale"), [(0.02, 1.0), (0.1, 0.2)])
def test_fresh_kernels_have_the_size_that_is_asked_for(std, scale):
  x, memory = np.zeros((1, 2, 64), np.float32), np.ones((1, 2, 64), np.float32)
  mask = np.ones((1, 1, 2), bool)
  layer = layers.TransformerLayer(
    4, 16, 64, cross=True, kernel_std=std, out_init_scale=scale
  )
  params = fresh_params(layer, x, mask, memory, mask)
  attention, mlp = params["self_attention"], params["mlp"]
  for part in (attention["out"], mlp["down"]):
    np.testing.assert_allclose(part["kernel"].std(), std * scale, rtol=0.05)
  for part in (attention["query"], attention["value"], mlp["up"]):
    np.testing.assert_allclose(part["kernel"].std(), std, rtol=0.05)


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_mlp_is_two_products_with_an_exact_activation_between(activation):
  mlp = layers.Mlp(F, activation, dtype=jnp.float32)
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
        params["cross_attention"], y, MEMORY, MASK[:, :1]
      ),
    )
  return block(x, "mlp", lambda y: mlp_by_hand(params["mlp"], y, "gelu"))


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("cross", [False, True])
def test_a_layer_is_residual_blocks_with_norms_where_they_belong(norm, cross):
  layer = layers.TransformerLayer(
    N, H, F, norm=norm, cross=cross, dtype=jnp.float32
  )
  mask = np.tril(np.ones((B, T, T), bool))
  args = (X, mask, *((MEMORY, MASK[:, :1]) if cross else ()))
  params = random_params(layer, *args)
  np.testing.assert_allclose(
    apply(layer, params, *args),
    layer_by_hand(params, X, mask, norm, cross),
    atol=1e-5,
  )


def test_dropout_is_a_function_of_its_key():
  layer = layers.TransformerLayer(N, H, F, dropout=0.5, dtype=jnp.float32)
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
