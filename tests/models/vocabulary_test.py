"""Chunks of the vocabulary give what all of it gives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rag_jax import losses
from rag_jax.models.vocabulary import chunked_log_probs
from rag_jax.models.vocabulary import chunked_token_log_probs

N, T, D, V = 3, 4, 8, 23


@functools.cache
def inputs():
  """Returns hidden, table, bias, target tokens and weights of the outputs."""
  rng = np.random.default_rng(0)
  hidden = rng.normal(size=(N, T, D)).astype(np.float32)
  table = rng.normal(size=(V, D)).astype(np.float32)
  bias = rng.normal(size=V).astype(np.float32)
  tokens = rng.integers(V, size=(N, T), dtype=np.int32)
  tokens[0] = [0, V - 1, V - 2, 15]  # the ends of the table and of chunks
  weights = rng.normal(size=(N, T)).astype(np.float32)
  return tuple(map(jnp.asarray, (hidden, table, bias, tokens, weights)))


def direct(hidden, table, bias, tokens):
  """The oracle: all logits, then `token_log_probs`."""
  logits = jnp.einsum("NTD,VD->NTV", hidden, table)
  logits = logits if bias is None else logits + bias
  return losses.token_log_probs(logits[:, None], tokens)[:, 0]


def direct_both(hidden, table, bias, tokens):
  """The oracle of both results, weighted as `both` weights them."""
  logits = (jnp.einsum("NTD,VD->NTV", hidden, table) + bias)[:, None]
  log_probs = losses.token_log_probs(logits, tokens)
  return (log_probs + 3 * losses.mean_log_probs(logits))[:, 0]


def both(*args, **settings):
  log_probs, mean = chunked_log_probs(*args, **settings)
  return log_probs + 3 * mean


def with_gradients(log_probs_fn, arrays, **settings):
  """Returns the log-probabilities and the gradients of their weighted sum."""
  *floats, tokens, weights = arrays

  def total(*floats):
    log_probs = log_probs_fn(*floats, tokens, **settings)
    return jnp.sum(weights * log_probs), log_probs

  present = [i for i, x in enumerate(floats) if x is not None]
  grad_fn = jax.value_and_grad(total, argnums=present, has_aux=True)
  (_, log_probs), grads = jax.jit(grad_fn)(*floats)
  return [log_probs, *grads]


@functools.cache
def expected():
  return with_gradients(direct, inputs())


def assert_all_close(ours, theirs, **tolerance):
  assert len(ours) == len(theirs)
  for a, b in zip(ours, theirs, strict=True):
    assert np.max(np.abs(b)) > 0.1  # or closeness would mean little
    np.testing.assert_allclose(a, b, **tolerance)


# One row, many in common, a single row left over, more than there are.
@pytest.mark.parametrize("chunk_size", [1, 5, 22, 100])
def test_chunks_of_any_size_give_the_direct_values_and_gradients(chunk_size):
  got = with_gradients(chunked_token_log_probs, inputs(), chunk_size=chunk_size)
  assert_all_close(got, expected(), rtol=1e-5, atol=1e-5)


def test_the_mean_of_all_tokens_is_that_of_the_losses():
  got = with_gradients(both, inputs(), chunk_size=5)
  assert_all_close(
    got, with_gradients(direct_both, inputs()), rtol=1e-5, atol=1e-5
  )
  assert np.max(np.abs(got[0] - expected()[0])) > 0.1


def test_without_a_bias_nothing_is_added():
  hidden, table, _, tokens, weights = inputs()
  arrays = (hidden, table, None, tokens, weights)
  assert_all_close(
    with_gradients(chunked_token_log_probs, arrays, chunk_size=5),
    with_gradients(direct, arrays),
    rtol=1e-5,
    atol=1e-5,
  )


def test_gradients_are_those_of_finite_differences():
  hidden, table, bias, tokens, weights = map(np.asarray, inputs())
  got = with_gradients(chunked_token_log_probs, inputs(), chunk_size=5)
  step = 1e-2

  def total(*floats):
    logits = floats[0].astype(np.float64) @ floats[1].astype(np.float64).T
    logits += floats[2]
    log_probs = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
    chosen = np.take_along_axis(log_probs, tokens[..., None], axis=-1)[..., 0]
    return np.sum(weights * chosen)

  rng = np.random.default_rng(1)
  for i, gradient in enumerate(got[1:]):
    floats = [hidden, table, bias]
    direction = rng.normal(size=gradient.shape)
    ahead, behind = list(floats), list(floats)
    ahead[i] = floats[i] + step * direction
    behind[i] = floats[i] - step * direction
    slope = (total(*ahead) - total(*behind)) / (2 * step)
    assert np.sum(gradient * direction) == pytest.approx(slope, rel=1e-3)


def test_logits_of_hundreds_do_not_overflow():
  hidden, table, bias, tokens, weights = inputs()
  arrays = (100 * hidden, table, bias, tokens, weights)
  got = with_gradients(chunked_token_log_probs, arrays, chunk_size=5)
  assert all(np.all(np.isfinite(x)) for x in got)
  assert_all_close(got, with_gradients(direct, arrays), rtol=1e-4, atol=1e-3)


def test_bfloat16_is_multiplied_and_sums_are_float32():
  hidden, table, bias, tokens, weights = inputs()
  low = jnp.asarray(hidden, jnp.bfloat16)
  arrays = (low, table, bias, tokens, weights)
  got = with_gradients(chunked_token_log_probs, arrays, chunk_size=5)
  assert [x.dtype for x in got] == ["float32", "bfloat16", "float32", "float32"]
  # Rounded as the product sees them; the rest is exact.
  rounded = jnp.asarray(table, jnp.bfloat16).astype(jnp.float32)
  exact = (low.astype(jnp.float32), rounded, bias, tokens, weights)
  values, *gradients = with_gradients(direct, exact)
  np.testing.assert_allclose(got[0], values, rtol=1e-5, atol=1e-5)
  for ours, theirs in zip(got[1:], gradients, strict=True):
    np.testing.assert_allclose(
      ours.astype(jnp.float32), theirs, rtol=0.02, atol=0.03
    )


def test_no_array_of_positions_by_vocabulary_exists():
  hidden, table, bias, tokens, weights = inputs()

  def shapes(log_probs_fn, **settings):
    def total(hidden, table, bias):
      log_probs = log_probs_fn(hidden, table, bias, tokens, **settings)
      return jnp.sum(weights * log_probs)

    text = jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(
      hidden, table, bias
    )
    return text.as_text()

  def all_logits(text):
    return any(f"tensor<{x}x{V}xf32>" in text for x in (f"{N}x{T}", N * T))

  assert all_logits(shapes(direct))
  text = shapes(chunked_token_log_probs, chunk_size=5)
  assert f"tensor<{N * T}x5xf32>" in text
  assert not all_logits(text)


def test_the_losses_go_on_from_log_probabilities():
  hidden, table, bias, tokens, _ = inputs()
  scores = jnp.array([[0.5, -1.0, 2.0]])  # one question, N docs
  mask = jnp.array([[True, True, True, False]])
  target = tokens[:1]

  @jax.jit
  def both():
    log_probs = chunked_token_log_probs(
      hidden, table, bias, jnp.repeat(target, N, axis=0), 5
    )
    logits = (hidden @ table.T + bias)[None]
    return [
      (
        losses.MARGINAL_NLL_FNS[name](scores, log_probs[None], mask),
        nll_fn(scores, logits, target, mask),
      )
      for name, nll_fn in losses.NLL_FNS.items()
    ]

  for ours, theirs in both():
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


@pytest.mark.parametrize("chunk_size", [0, -5])
def test_chunks_without_rows_are_refused(chunk_size):
  hidden, table, bias, tokens, _ = inputs()
  with pytest.raises(
    ValueError,
    match=f"chunk_size={chunk_size} leaves no logits to compute; expected at"
    " least 1. A few thousand is a good size",
  ):
    chunked_token_log_probs(hidden, table, bias, tokens, chunk_size)


def test_chunks_are_alike_so_that_the_last_is_not_mostly_read_twice():
  def abstract(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)

  text = (
    jax.jit(lambda *args: chunked_token_log_probs(*args, 16384))
    .lower(
      abstract(2, 3, 8),
      abstract(50265, 8),  # BART's: 4 chunks, of 65,536 rows in all
      abstract(50265),
      abstract(2, 3, dtype=jnp.int32),
    )
    .as_text()
  )
  assert "tensor<6x12672xf32>" in text  # a quarter, rounded up to 128s
  assert "x16384xf32>" not in text
