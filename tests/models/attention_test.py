"""Attention against loops over positions, and what masks and starts promise."""

import functools
import math

import jax
import jax.numpy as jnp
import jax.test_util
from linen import apply
from linen import attention_by_hand
from linen import fresh_params
from linen import normal
from linen import on_mesh
from linen import random_params
import numpy as np
import pytest

from rag_jax.config_models import TransformerConfig
from rag_jax.models import attention as attention_lib
from rag_jax.models.attention import Attention

B, T, S, N, H = 2, 3, 4, 2, 3
D = N * H


CONFIG = TransformerConfig(embed_dim=D, num_heads=N)
RELATIVE = CONFIG.frozen(relative_buckets=8)
ATTENTION = Attention(CONFIG, dtype=jnp.float32)
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
  low = Attention(CONFIG, dtype=jnp.bfloat16)
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
      attention_lib.relative_bucket,
      num_buckets=num_buckets,
      max_distance=max_distance,
    )
  )(offset)
  expected = [
    bucket_by_hand(o, num_buckets, max_distance) for o in offset[0].tolist()
  ]
  np.testing.assert_array_equal(buckets[0], expected)


def test_relative_positions_add_a_bias_for_each_offset_and_head():
  attention = Attention(RELATIVE, dtype=jnp.float32)
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
  copying = Attention(CONFIG, start="copy", dtype=jnp.float32)
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
  config = TransformerConfig(embed_dim=dim, num_heads=heads)
  copying = Attention(config, start="copy", dtype=jnp.float32)
  signs = np.sign(normal(1, S, dim))
  memory = np.roll(signs, dim // 2, axis=-1)
  x = signs[:, [2, 0, 3]]
  mask = np.ones((1, 1, S), bool)
  result = apply(
    copying, fresh_params(copying, x, memory, mask), x, memory, mask
  )
  np.testing.assert_allclose(result[0], memory[0, [2, 0, 3]], atol=0.05)


def test_previous_attention_adds_the_token_before_rolled_by_half():
  previous = Attention(RELATIVE, start="previous", dtype=jnp.float32)
  mask = np.ones((B, 1, T), bool)
  result = apply(previous, fresh_params(previous, X, X, mask), X, X, mask)
  # exp(6) against 1 for each other position: all but 0.5 % of the weight.
  for t in range(1, T):
    expected = np.roll(X[:, t - 1], D // 2, axis=-1) / math.sqrt(D)
    np.testing.assert_allclose(result[:, t], expected, atol=0.02)


ROWS, LONG = 6, 5


def in_parts(rows, seed=None, biases=1, **fields):
  """Returns (params, x, memory, bias) -> output, and arguments for it."""
  module = Attention(RELATIVE.frozen(**fields), rows=rows, dtype=jnp.float32)
  x, memory = normal(ROWS, LONG, D), normal(ROWS, S, D, seed=1)
  mask = np.tile(MASK[:, :1], (ROWS // B, LONG, 1))
  params = random_params(module, x, memory, mask)
  params, x, memory, mask, bias = jax.tree.map(
    jnp.asarray, (params, x, memory, mask, normal(biases, N, LONG, S, seed=2))
  )
  rngs = {} if seed is None else {"dropout": jax.random.key(seed)}

  def run(params, x, memory, bias):
    return module.apply(
      {"params": params},
      *(x, memory, mask, bias),
      deterministic=seed is None,
      rngs=rngs,
    )

  return jax.jit(on_mesh(run)), (params, x, memory, bias)


@pytest.mark.parametrize(
  ("rows", "biases"), [(1, 1), (2, 1), (4, ROWS), (5, 1)]
)
def test_in_parts_attention_and_its_gradients_are_the_same(rows, biases):
  """4 and 5 do not divide the rows: parts of 3 are the largest that do."""
  found = []
  for number in (0, rows):
    run, args = in_parts(number, biases=biases)

    def loss(*args, run=run):
      y = run(*args)
      return jnp.sum(jnp.sin(y)), y

    grad_fn = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True))
    found.append(grad_fn(*args))
  for one, other in zip(*map(jax.tree.leaves, found), strict=True):
    np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-5)


def test_in_parts_the_logits_of_all_rows_never_exist():
  texts = []
  for rows in (0, 2):
    run, args = in_parts(rows)
    grad_fn = jax.grad(lambda *args, run=run: jnp.sum(run(*args)))
    texts.append(jax.jit(grad_fn).lower(*args).as_text())
  whole = f"tensor<{ROWS}x{N}x{LONG}x{S}xf32>"
  assert whole in texts[0]
  assert whole not in texts[1]
  assert f"tensor<2x{N}x{LONG}x{S}xf32>" in texts[1]


def test_in_parts_dropout_is_a_function_of_its_key():
  run, args = in_parts(2, seed=3, attention_dropout=0.5)
  y = run(*args)
  np.testing.assert_array_equal(run(*args), y)
  assert np.any(in_parts(2, seed=4, attention_dropout=0.5)[0](*args) != y)
  assert np.any(in_parts(2)[0](*args) != y)
  # The backward pass drops the same.
  jax.test_util.check_grads(
    jax.jit(run), args, order=1, modes=["rev"], rtol=1e-2
  )


def test_every_part_drops_other_weights():
  run, (params, _, memory, bias) = in_parts(1, seed=3, attention_dropout=0.5)
  x = jnp.zeros((ROWS, LONG, D))
  rows = run(params, x, jnp.broadcast_to(memory[:1], memory.shape), bias)
  assert len({np.asarray(row).tobytes() for row in rows}) == ROWS
