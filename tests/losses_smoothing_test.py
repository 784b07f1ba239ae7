"""Label smoothing teaches the generator, and leaves the retriever alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rag_jax import losses
from rag_jax.losses import rag_sequence_nll
from rag_jax.losses import rag_token_nll

B, K, T, V = 2, 3, 4, 5
E = 0.1
BOTH = pytest.mark.parametrize("nll_fn", [rag_token_nll, rag_sequence_nll])


@pytest.fixture
def inputs():
  rng = np.random.default_rng(0)
  return {
    "doc_scores": rng.normal(size=(B, K)).astype(np.float32),
    "target_logits": rng.normal(size=(B, K, T, V)).astype(np.float32),
    "target_tokens": rng.integers(V, size=(B, T), dtype=np.int32),
    "target_mask": np.array([[1, 1, 1, 1], [1, 1, 0, 0]], bool),
  }


@functools.cache
def compiled(nll_fn, label_smoothing):
  def total(doc_scores, target_logits, rest):
    nll = nll_fn(
      doc_scores, target_logits, **rest, label_smoothing=label_smoothing
    )
    return nll.sum(), nll

  return jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))


def run(nll_fn, inputs, label_smoothing=E):
  """Returns nll [B] and its gradients by doc_scores and target_logits."""
  rest = {name: jnp.asarray(x) for name, x in inputs.items()}
  scores, logits = rest.pop("doc_scores"), rest.pop("target_logits")
  (_, nll), grads = compiled(nll_fn, label_smoothing)(scores, logits, rest)
  return [np.asarray(x) for x in (nll, *grads)]


def log_softmax(scores):
  scores = scores.astype(np.float64)
  return scores - np.log(np.sum(np.exp(scores), axis=-1, keepdims=True))


def responsibilities(nll_fn, inputs):
  """p(z|x,y) of each token's or the whole target's likelihood, [B, K, T]."""
  log_probs = log_softmax(inputs["target_logits"])
  indices = inputs["target_tokens"][:, None, :, None]
  chosen = np.take_along_axis(log_probs, indices, axis=-1)[..., 0]  # B K T
  if nll_fn is rag_sequence_nll:
    mask = inputs["target_mask"][:, None]
    chosen = np.sum(chosen, axis=-1, keepdims=True, where=mask)
    chosen = np.repeat(chosen, T, axis=-1)
  joint = np.exp(log_softmax(inputs["doc_scores"])[:, :, None] + chosen)
  return joint / joint.sum(axis=1, keepdims=True)


@BOTH
def test_each_document_is_taught_the_smoothed_target_as_it_is_responsible(
  nll_fn, inputs
):
  """The closed form: responsibility times (probability minus target)."""
  _, _, by_logits = run(nll_fn, inputs)
  onehot = np.eye(V)[inputs["target_tokens"]][:, None]  # B 1 T V
  target = (1 - E) * onehot + E / V
  taught = np.exp(log_softmax(inputs["target_logits"])) - target
  taught *= responsibilities(nll_fn, inputs)[..., None]
  taught *= inputs["target_mask"][:, None, :, None]
  np.testing.assert_allclose(by_logits, taught, rtol=1e-4, atol=1e-6)
  assert np.max(np.abs(by_logits)) > 0.1
  assert not np.any(by_logits[1, :, 2:])  # padding


@BOTH
def test_the_retriever_learns_what_it_learns_without(nll_fn, inputs):
  _, smooth, _ = run(nll_fn, inputs)
  _, plain, _ = run(nll_fn, inputs, 0.0)
  np.testing.assert_allclose(smooth, plain, rtol=1e-5, atol=1e-7)
  assert np.max(np.abs(plain)) > 0.05


@BOTH
def test_smoothing_of_one_document_is_the_standard_cross_entropy(
  nll_fn, inputs
):
  one = inputs | {
    "doc_scores": inputs["doc_scores"][:, :1] + 7.0,
    "target_logits": inputs["target_logits"][:, :1],
  }
  nll, _, _ = run(nll_fn, one)
  log_probs = log_softmax(one["target_logits"])[:, 0]  # B T V
  onehot = np.eye(V)[inputs["target_tokens"]]
  entropy = -np.sum(((1 - E) * onehot + E / V) * log_probs, axis=-1)
  expected = np.sum(entropy, axis=-1, where=inputs["target_mask"])
  np.testing.assert_allclose(nll, expected, rtol=1e-5)
  assert np.all(np.abs(nll - run(nll_fn, one, 0.0)[0]) > 1e-3)


@BOTH
def test_equal_documents_are_one_document(nll_fn, inputs):
  logits = inputs["target_logits"][:, :1]
  one = inputs | {
    "doc_scores": inputs["doc_scores"][:, :1],
    "target_logits": logits,
  }
  many = inputs | {"target_logits": np.repeat(logits, K, axis=1)}
  np.testing.assert_allclose(
    run(nll_fn, many)[0], run(nll_fn, one)[0], rtol=1e-5
  )


@BOTH
def test_a_target_of_padding_costs_nothing(nll_fn, inputs):
  inputs["target_mask"][1] = False
  nll, by_scores, by_logits = run(nll_fn, inputs)
  np.testing.assert_allclose(nll[1], 0.0, atol=1e-6)
  np.testing.assert_allclose(by_scores[1], 0.0, atol=1e-6)
  assert not np.any(by_logits[1])


def test_the_mean_is_over_the_log_probabilities_of_all_tokens(inputs):
  mean = jax.jit(losses.mean_log_probs)(inputs["target_logits"])
  expected = log_softmax(inputs["target_logits"]).mean(axis=-1)
  np.testing.assert_allclose(mean, expected, rtol=1e-5)
