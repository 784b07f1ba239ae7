"""The copying chain against its formulas in a loop, and what it must hold."""

import functools

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rag_jax.models.pointer import Pointer
from rag_jax.models.pointer import mix_logits
from rag_jax.models.pointer import mix_targets

N, T, S, D, V = 3, 5, 7, 4, 11
RNG = np.random.default_rng(0)
# Few different tokens, so that one stands in several places.
TOKENS = RNG.integers(3, 6, size=(N, S)).astype(np.int32)
MASK = np.arange(S) < np.array([[S], [4], [1]])
TARGETS = RNG.integers(3, 7, size=(N, T)).astype(np.int32)
READ = np.concatenate([np.full((N, 1), 2, np.int32), TARGETS[:, :-1]], axis=1)
STATES = RNG.normal(size=(N, T, D)).astype(np.float32)
MEMORY = RNG.normal(size=(N, S, D)).astype(np.float32)
LOGITS = RNG.normal(size=(N, T, V)).astype(np.float32)
POINTER = Pointer(D, dtype=jnp.float32)


def copies(pointer, tokens, mask, states, memory, read):
  tokens, mask, read = map(jnp.asarray, (tokens, mask, read))
  source = pointer.source(tokens, mask, jnp.asarray(memory))
  return pointer(jnp.asarray(states), read, source)


@functools.cache
def params():
  shapes = jax.eval_shape(
    functools.partial(POINTER.init, method=copies),
    *(jax.random.key(0), TOKENS, MASK, STATES, MEMORY, READ),
  )
  rng = np.random.default_rng(1)
  return jax.tree.map(
    lambda x: rng.normal(size=x.shape).astype(np.float32),
    nn.meta.unbox(shapes)["params"],
  )


@jax.jit
def run(params, tokens, mask, states, memory, read):
  arrays = tokens, mask, states, memory, read
  return POINTER.apply({"params": params}, *arrays, method=copies)


def mixture():
  """Returns log p of every token [N, T, V], and of the targets [N, T]."""
  copy = run(params(), TOKENS, MASK, STATES, MEMORY, READ)
  log_probs = jax.nn.log_softmax(LOGITS)
  chosen = jnp.take_along_axis(log_probs, TARGETS[..., None], -1)[..., 0]
  targets = jnp.asarray(TARGETS)
  return every(copy, LOGITS), np.asarray(mix_targets(copy, chosen, targets))


def every(copy, logits):
  return np.asarray(mix_logits(copy, jnp.asarray(logits)))


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def gelu(x):  # by tanh, as in jax.nn
  return x / 2 * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))


def softmax(x):
  return np.exp(x) / np.exp(x).sum()


def by_hand():
  """Returns p of every token, [N, T, V]: the formulas of the module."""
  p = {k: v.astype(np.float64) for k, v in flat(params()).items()}
  result = np.zeros((N, T, V))
  for n in range(N):
    length = int(MASK[n].sum())
    before = np.zeros(length)
    for t in range(T):
      query = STATES[n, t] @ p["query/kernel"] / D**0.5
      found = softmax(MEMORY[n, :length] @ p["key/kernel"] @ query)
      read = np.array(
        [before[s] * (TOKENS[n, s] == READ[n, t]) for s in range(length)]
      )
      if read.sum() > 0:
        read /= read.sum()
      onward = np.concatenate([[0.0], read[:-1]])
      hidden = STATES[n, t] @ p["state/kernel"] + p["state/bias"]
      for s in range(length):
        after = MEMORY[n, s + 1] if s + 1 < length else np.zeros(D)
        place = MEMORY[n, s] @ p["place/kernel"] + after @ p["behind/kernel"]
        hidden = hidden + onward[s] * place
      mode = gelu(hidden) @ p["mode/kernel"] + p["mode/bias"]
      write, on = sigmoid(mode[0]), sigmoid(mode[1])
      before = on * onward + (1 - on * onward.sum()) * found
      result[n, t] = write * softmax(LOGITS[n, t].astype(np.float64))
      for s in range(length):
        result[n, t, TOKENS[n, s]] += (1 - write) * before[s]
  return result


def flat(tree):
  return {
    "/".join(k.key for k in path): value
    for path, value in jax.tree_util.tree_leaves_with_path(tree)
  }


def test_the_mixture_is_that_of_the_formulas():
  expected = by_hand()
  mixed, chosen = mixture()
  np.testing.assert_allclose(np.exp(mixed), expected, rtol=2e-4, atol=1e-7)
  picked = np.take_along_axis(expected, TARGETS[..., None], -1)[..., 0]
  np.testing.assert_allclose(np.exp(chosen), picked, rtol=2e-4)


def test_the_probabilities_of_all_tokens_sum_to_1():
  np.testing.assert_allclose(np.exp(mixture()[0]).sum(axis=-1), 1, rtol=1e-5)


def test_what_stands_in_the_padding_is_never_copied():
  other = np.where(MASK, TOKENS, 9)
  expected = run(params(), TOKENS, MASK, STATES, MEMORY, READ)
  got = run(params(), other, MASK, STATES, MEMORY * MASK[..., None], READ)
  log_probs = [every(copy, LOGITS) for copy in (expected, got)]
  np.testing.assert_allclose(*log_probs, rtol=1e-5)


def test_a_copy_goes_on_behind_the_place_that_it_came_from():
  """Digits repeat: 1 7 1 7 2. After "1 7 1" comes 7, and then 2, not 1."""
  tokens = np.array([[4, 1, 7, 1, 7, 2, 4]], np.int32)
  read = np.array([[0, 1, 7, 1, 7]], np.int32)
  p = jax.tree.map(np.zeros_like, params())
  p["mode"]["bias"] = np.array([-20.0, 20.0], np.float32)
  # Attention finds the first 1, whose memory alone is not 0.
  memory = np.zeros((1, 7, D), np.float32)
  memory[0, 1] = 8.0
  p["query"]["kernel"] = p["key"]["kernel"] = np.eye(D, dtype=np.float32)
  mask, states = np.ones((1, 7), bool), np.ones((1, 5, D), np.float32)
  copy = run(p, tokens, mask, states, memory, read)
  best = every(copy, np.zeros((1, 5, V), np.float32)).argmax(axis=-1)
  np.testing.assert_array_equal(best, [[1, 7, 1, 7, 2]])


@pytest.mark.parametrize("scale", [1.0, 100.0, 1e4])
def test_gradients_are_finite_however_improbable_the_copy(scale):
  @jax.jit
  @jax.grad
  def gradient(arrays):
    states, memory = arrays
    copy = POINTER.apply(
      {"params": params()}, TOKENS, MASK, states, memory, READ, method=copies
    )
    low = jnp.full((N, T), -50.0)
    return jnp.sum(mix_targets(copy, low, jnp.asarray(TARGETS)))

  grads = gradient((STATES * scale, MEMORY))
  assert all(np.isfinite(g).all() for g in grads)
  assert np.any(grads[0])
