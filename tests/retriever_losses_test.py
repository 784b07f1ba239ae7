"""Losses of the retriever's own, against loops, and what they share."""

import collections
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rag_jax.losses import RETRIEVER_LOSSES
from rag_jax.losses import REWARD_LOSSES
from rag_jax.losses import RetrieverLoss
from rag_jax.losses import answer_rewards
from rag_jax.losses import doc_posterior
from rag_jax.losses import marginal_sequence_nll
from rag_jax.losses import marginal_token_nll

B, K, T = 3, 4, 5
VALUES = jax.random.uniform(jax.random.key(1), (B, K))
MASK = jnp.arange(T) < jnp.array([[5], [2], [1]])
ALL = pytest.mark.parametrize("kind", RETRIEVER_LOSSES)
DIVERGENCES = [
  kind
  for kind in RETRIEVER_LOSSES
  if "emdr2" not in kind and kind not in REWARD_LOSSES
]


@pytest.fixture
def inputs():
  rng = np.random.default_rng(0)
  scores = rng.normal(size=(B, K)).astype(np.float32)
  log_probs = -rng.exponential(size=(B, K, T)).astype(np.float32)
  return jnp.asarray(scores), jnp.asarray(log_probs)


def softmax(numbers):
  total = math.fsum(math.exp(x) for x in numbers)
  return [math.exp(x) / total for x in numbers]


def by_hand(kind, scores, log_probs, length, values, tau, target_tau):
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
  if kind == "reward":
    return math.fsum(p * (1 - r) for p, r in zip(prior, values, strict=True))
  if kind == "reward_sampled":
    return -math.fsum(
      r * math.log(p) for p, r in zip(prior, values, strict=True)
    )
  total = [math.fsum(row[:length]) for row in log_probs]
  wanted = {
    "pdist": [x / length for x in total],
    "loop": [-x / length for x in total],
    "replug": total,
    "adist": values,
    "dkrr": values,
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
      VALUES.tolist(),
      strict=True,
    )
  ]
  found = jax.jit(loss)(scores, log_probs, MASK, VALUES)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@ALL
def test_the_generator_has_no_gradient(kind, inputs):
  loss = RetrieverLoss(kind=kind)

  def total(scores, log_probs, values):
    return loss(scores, log_probs, MASK, values).sum()

  of_scores, *of_generator = jax.grad(total, argnums=(0, 1, 2))(*inputs, VALUES)
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
    "adist": VALUES,
    "dkrr": VALUES,
  }[kind]
  loss = RetrieverLoss(kind=kind, temperature=0.3, target_temperature=0.7)
  # A constant per question changes nothing.
  scores = 0.3 * wanted / 0.7 + np.array([[5.0], [-90.0], [0.0]])
  value, slope = jax.value_and_grad(
    lambda s: loss(s, log_probs, MASK, VALUES).sum()
  )(scores)
  np.testing.assert_allclose(value, 0, atol=1e-5)
  np.testing.assert_allclose(slope, np.zeros((B, K)), atol=1e-4)


@ALL
def test_a_single_document_teaches_nothing(kind, inputs):
  scores, log_probs = (x[:, :1] for x in inputs)
  loss = RetrieverLoss(kind=kind)
  given = log_probs, MASK, VALUES[:, :1]
  slope = jax.grad(lambda s: loss(s, *given).sum())(scores)
  np.testing.assert_allclose(slope, np.zeros((B, 1)), atol=1e-6)
  if kind in DIVERGENCES:
    np.testing.assert_allclose(loss(scores, *given), 0, atol=1e-6)
  elif kind in REWARD_LOSSES:
    expected = {"reward": 1 - VALUES[:, 0], "reward_sampled": np.zeros(B)}[kind]
    np.testing.assert_allclose(loss(scores, *given), expected, rtol=1e-5)
  else:
    nll = -np.sum(log_probs[:, 0], axis=-1, where=MASK)
    np.testing.assert_allclose(loss(scores, *given), nll, rtol=1e-5)


@ALL
def test_an_empty_target_and_large_scores_are_finite(kind, inputs):
  scores, log_probs = inputs
  loss = RetrieverLoss(kind=kind, temperature=0.01)
  mask = jnp.array([[False] * T, [True] * T, [True] * T])
  value, slope = jax.value_and_grad(
    lambda s: loss(s, 100 * log_probs, mask, 1000 * VALUES).sum()
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


def test_one_drawn_document_estimates_the_gradient_of_all():
  """The mean over documents, each as often as it is drawn, is exact."""
  scores = jax.random.normal(jax.random.key(2), (B, K))
  exact = RetrieverLoss(kind="reward", temperature=0.7)
  drawn = RetrieverLoss(kind="reward_sampled", temperature=0.7)
  nothing = jnp.zeros((B, K, T)), MASK
  expected = jax.grad(lambda s: exact(s, *nothing, VALUES).sum())(scores)
  prior = jax.nn.softmax(scores / 0.7, axis=-1)
  found = 0.0
  for doc in range(K):
    alone = VALUES * (jnp.arange(K) == doc)
    slope = jax.grad(lambda s, v=alone: drawn(s, *nothing, v).sum())(scores)
    found += prior[:, doc, None] * slope
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


END, PAD = 1, 0


def reward_by_hand(answer, accepted, kind):
  """SQuAD's measures of tokens, with Python's own counting."""
  best = 0.0
  ours = [x for x in answer if x not in (END, PAD)]
  for row in accepted:
    theirs = [x for x in row if x not in (END, PAD)]
    if not theirs:
      continue
    if kind == "em":
      best = max(best, float(ours == theirs))
      continue
    both = collections.Counter(ours) & collections.Counter(theirs)
    num_same = sum(both.values())
    if num_same:
      precision, recall = num_same / len(ours), num_same / len(theirs)
      best = max(best, 2 * precision * recall / (precision + recall))
  return best


@pytest.mark.parametrize("kind", ["em", "f1"])
def test_rewards_are_those_of_squad_on_tokens(kind):
  rng = np.random.default_rng(0)
  answers = rng.integers(5, size=(40, K, T))
  accepted = rng.integers(5, size=(40, 3, T))
  answers[:20, 0] = accepted[:20, 1]
  accepted[5] = PAD
  found = answer_rewards(
    jnp.asarray(answers), jnp.asarray(accepted), (END, PAD), kind
  )
  expected = [
    [reward_by_hand(answer, accepted[b].tolist(), kind) for answer in row]
    for b, row in enumerate(answers.tolist())
  ]
  assert np.unique(expected).size > 1
  np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_places_and_numbers_of_tokens_count():
  def reward(kind, *answer):
    accepted = jnp.array([[[7, 8, 8, END, PAD], [9, END, PAD, PAD, PAD]]])
    return float(
      answer_rewards(jnp.array([[answer]]), accepted, (END, PAD), kind)[0, 0]
    )

  assert reward("em", END, 7, 8, 8, END) == 1  # a special token first
  assert reward("em", 9, END, END, END, END) == 1  # the other answer
  assert reward("em", 8, 7, 8, END, END) == 0
  assert reward("em", 7, 8, END, END, END) == 0
  assert reward("em", 7, 8, 8, 8, END) == 0
  assert reward("f1", 8, 7, 8, END, END) == 1
  assert reward("f1", 7, 7, 7, END, END) == pytest.approx(1 / 3)
  assert reward("f1", 9, 8, END, END, END) == pytest.approx(2 / 3)
  assert reward("f1", END, END, END, END, END) == 0  # no answer
