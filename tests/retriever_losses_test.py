"""Losses of the retriever's own, against loops, and what they share."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rag_jax.losses import RETRIEVER_LOSSES
from rag_jax.losses import RetrieverLoss
from rag_jax.losses import doc_posterior
from rag_jax.losses import marginal_sequence_nll
from rag_jax.losses import marginal_token_nll

B, K, T = 3, 4, 5
ATTENTION = jax.random.normal(jax.random.key(1), (B, K))
MASK = jnp.arange(T) < jnp.array([[5], [2], [1]])
ALL = pytest.mark.parametrize("kind", RETRIEVER_LOSSES)
DIVERGENCES = [kind for kind in RETRIEVER_LOSSES if "emdr2" not in kind]


@pytest.fixture
def inputs():
  rng = np.random.default_rng(0)
  scores = rng.normal(size=(B, K)).astype(np.float32)
  log_probs = -rng.exponential(size=(B, K, T)).astype(np.float32)
  return jnp.asarray(scores), jnp.asarray(log_probs)


def softmax(numbers):
  total = math.fsum(math.exp(x) for x in numbers)
  return [math.exp(x) / total for x in numbers]


def by_hand(kind, scores, log_probs, length, attention, tau, target_tau):
  """The loss of one question, from its definition, in float64."""
  prior = softmax([s / tau for s in scores])
  given = [[math.exp(x) for x in row[:length]] for row in log_probs]
  if kind == "emdr2":
    return -math.log(
      math.fsum(p * math.prod(row) for p, row in zip(prior, given, strict=True))
    )
  if kind == "emdr2_token":
    columns = zip(*given, strict=True)
    marginals = (np.dot(prior, column) for column in columns)
    return -math.fsum(map(math.log, marginals))
  total = [math.fsum(row[:length]) for row in log_probs]
  wanted = {
    "pdist": [x / length for x in total],
    "loop": [-x / length for x in total],
    "replug": total,
    "adist": attention,
    "dkrr": attention,
  }[kind]
  target = softmax([x / target_tau for x in wanted])
  a, b = (prior, target) if kind == "replug" else (target, prior)
  return math.fsum(x * math.log(x / y) for x, y in zip(a, b, strict=True))


@ALL
@pytest.mark.parametrize(("tau", "target_tau"), [(1.0, 1.0), (0.5, 2.0)])
def test_losses_are_their_definitions(kind, tau, target_tau, inputs):
  scores, log_probs = inputs
  loss = RetrieverLoss(
    kind=kind, temperature=tau, target_temperature=target_tau
  )
  expected = [
    by_hand(kind, s, lp, n, a, tau, target_tau)
    for s, lp, n, a in zip(
      scores.tolist(),
      log_probs.tolist(),
      MASK.sum(1).tolist(),
      ATTENTION.tolist(),
      strict=True,
    )
  ]
  found = jax.jit(loss)(scores, log_probs, MASK, ATTENTION)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@ALL
def test_the_generator_has_no_gradient(kind, inputs):
  loss = RetrieverLoss(kind=kind)

  def total(scores, log_probs, attention):
    return loss(scores, log_probs, MASK, attention).sum()

  of_scores, *of_generator = jax.grad(total, argnums=(0, 1, 2))(
    *inputs, ATTENTION
  )
  assert np.abs(of_scores).max() > 1e-3
  for grad in of_generator:
    np.testing.assert_array_equal(grad, np.zeros_like(grad))


@pytest.mark.parametrize(("kind", "nll_fn"), [
  ("emdr2", marginal_sequence_nll), ("emdr2_token", marginal_token_nll),
])  # fmt: skip
def test_emdr2_moves_scores_as_the_marginal_likelihood_does(
  kind, nll_fn, inputs
):
  scores, log_probs = inputs
  loss = RetrieverLoss(kind=kind)
  found, expected = (
    jax.grad(lambda s, fn=fn: fn(s, log_probs, MASK).sum())(scores)
    for fn in (loss, nll_fn)
  )
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_emdr2_moves_scores_by_prior_minus_posterior(inputs):
  scores, log_probs = inputs
  loss = RetrieverLoss(kind="emdr2", temperature=0.5)
  found = jax.grad(lambda s: loss(s, log_probs, MASK).sum())(scores)
  posterior, _ = doc_posterior(scores / 0.5, log_probs, MASK)
  expected = (jax.nn.softmax(scores / 0.5, axis=-1) - posterior) / 0.5
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_a_divergence_is_0_where_the_prior_is_the_target(kind, inputs):
  _, log_probs = inputs
  total = jnp.sum(log_probs, axis=-1, where=MASK[:, None])
  wanted = {
    "replug": total,
    "pdist": total / MASK.sum(1, keepdims=True),
    "loop": -total / MASK.sum(1, keepdims=True),
    "adist": ATTENTION,
    "dkrr": ATTENTION,
  }[kind]
  loss = RetrieverLoss(kind=kind, temperature=0.3, target_temperature=0.7)
  # A constant per question changes nothing.
  scores = 0.3 * wanted / 0.7 + np.array([[5.0], [-90.0], [0.0]])
  value, slope = jax.value_and_grad(
    lambda s: loss(s, log_probs, MASK, ATTENTION).sum()
  )(scores)
  np.testing.assert_allclose(value, 0, atol=1e-5)
  np.testing.assert_allclose(slope, np.zeros((B, K)), atol=1e-4)


@ALL
def test_a_single_document_teaches_nothing(kind, inputs):
  scores, log_probs = (x[:, :1] for x in inputs)
  loss = RetrieverLoss(kind=kind)
  given = log_probs, MASK, ATTENTION[:, :1]
  slope = jax.grad(lambda s: loss(s, *given).sum())(scores)
  np.testing.assert_allclose(slope, np.zeros((B, 1)), atol=1e-6)
  if kind in DIVERGENCES:
    np.testing.assert_allclose(loss(scores, *given), 0, atol=1e-6)
  else:
    nll = -np.sum(log_probs[:, 0], axis=-1, where=MASK)
    np.testing.assert_allclose(loss(scores, *given), nll, rtol=1e-5)


@ALL
def test_an_empty_target_and_large_scores_are_finite(kind, inputs):
  scores, log_probs = inputs
  loss = RetrieverLoss(kind=kind, temperature=0.01)
  mask = jnp.array([[False] * T, [True] * T, [True] * T])
  value, slope = jax.value_and_grad(
    lambda s: loss(s, 100 * log_probs, mask, 1000 * ATTENTION).sum()
  )(90 * scores)
  assert np.isfinite(value)
  assert np.all(np.isfinite(slope))


@pytest.mark.parametrize("kind", ["emdr2", "pdist", "replug"])
def test_a_likely_document_gets_a_higher_score(kind, inputs):
  log_probs = inputs[1].at[:, 2].set(-0.01)
  step = functools.partial(RetrieverLoss(kind=kind), target_mask=MASK)
  slope = jax.grad(lambda s: step(s, log_probs).sum())(jnp.zeros((B, K)))
  assert (np.argmin(slope, axis=1) == 2).all()
  # Of a document that is left out, it is the other way round.
  loop = functools.partial(RetrieverLoss(kind="loop"), target_mask=MASK)
  slope = jax.grad(lambda s: loop(s, log_probs).sum())(jnp.zeros((B, K)))
  assert (np.argmax(slope, axis=1) == 2).all()
