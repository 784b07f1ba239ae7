"""The contrastive loss of a batch, against a loop, and its masks."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rag_jax.losses import contrastive_nll
from rag_jax.losses import in_batch_contrastive_nll

B, M, R = 4, 3, 5
P = B * M
OWN = jnp.arange(B) * M


@pytest.fixture
def inputs():
  rng = np.random.default_rng(0)
  questions = rng.normal(size=(B, R)).astype(np.float32)
  passages = rng.normal(size=(P, R)).astype(np.float32)
  return (
    jnp.asarray(questions),
    jnp.asarray(passages),
    jnp.asarray(rng.random((B, P)) < 0.7),
  )


def by_hand(questions, passages, counts, temperature):
  """The losses, from the definition, in float64; and who is first."""
  losses, first = [], []
  for b in range(B):
    scores = {
      p: sum(float(x) * float(y) for x, y in zip(questions[b], passages[p],
             strict=True)) / temperature
      for p in range(P) if counts[b, p] or p == b * M
    }  # fmt: skip
    own = scores.pop(b * M)
    total = math.fsum([math.exp(own), *map(math.exp, scores.values())])
    losses.append(math.log(total) - own)
    first.append(all(own > score for score in scores.values()))
  return losses, first


@pytest.mark.parametrize("temperature", [1.0, 0.05, 3.0])
def test_it_is_the_softmax_over_the_passages_that_count(inputs, temperature):
  nll, first = contrastive_nll(*inputs[:2], OWN, inputs[2], temperature)
  expected, best = by_hand(*inputs, temperature)
  np.testing.assert_allclose(nll, expected, rtol=1e-5, atol=1e-6)
  assert first.tolist() == best
  assert 0 < sum(best) < B  # both cases were seen


def test_the_gradient_is_that_of_differences(inputs):
  questions, passages, counts = inputs

  def loss(questions, passages):
    return jnp.sum(contrastive_nll(questions, passages, OWN, counts, 0.5)[0])

  grads = jax.grad(loss, argnums=(0, 1))(questions, passages)
  eps = 1e-3
  for which, array in enumerate((questions, passages)):
    for place in ((0, 0), (2, 3), (3, 1)):
      step = np.zeros(array.shape, np.float32)
      step[place] = eps
      moved = [[questions, passages] for _ in range(2)]
      moved[0][which], moved[1][which] = array + step, array - step
      high, low = (sum(by_hand(*x, counts, 0.5)[0]) for x in moved)
      wanted = (high - low) / (2 * eps)
      assert grads[which][place] == pytest.approx(wanted, rel=2e-2, abs=1e-3)


def test_a_passage_that_does_not_count_has_no_effect(inputs):
  questions, passages, _ = inputs
  counts = jnp.ones((B, P), bool).at[:, 1].set(False)  # for nobody

  def loss(passages):
    return jnp.sum(contrastive_nll(questions, passages, OWN, counts)[0])

  assert loss(passages.at[1].set(100.0)) == loss(passages)
  grads = jax.grad(loss)(passages)
  assert not np.any(grads[1])
  assert all(np.any(row) for row in np.delete(grads, 1, axis=0))


def test_alone_the_own_passage_is_certain_and_nothing_is_learned(inputs):
  questions, passages, _ = inputs
  nothing = jnp.zeros((B, P), bool)

  def loss(questions):
    return jnp.sum(contrastive_nll(questions, passages, OWN, nothing)[0])

  value, grads = jax.value_and_grad(loss)(questions)
  assert value == 0
  assert not np.any(grads)  # zeros, not NaN
  assert np.all(contrastive_nll(questions, passages, OWN, nothing)[1])


def test_without_hard_negatives_it_is_the_loss_of_the_warm_up(inputs):
  questions, passages, _ = inputs
  own, everything = jnp.arange(B), jnp.ones((B, B), bool)
  nll, _ = contrastive_nll(questions, passages[:B], own, everything)
  np.testing.assert_allclose(
    nll, in_batch_contrastive_nll(questions, passages[:B]), rtol=1e-6
  )


def test_bfloat16_embeddings_are_compared_in_float32(inputs):
  questions, passages, counts = inputs
  half = questions.astype(jnp.bfloat16), passages.astype(jnp.bfloat16)
  nll, _ = contrastive_nll(*half, OWN, counts, 0.1)
  assert nll.dtype == jnp.float32
  expected, _ = by_hand(*(np.asarray(x, np.float64) for x in half), counts, 0.1)
  np.testing.assert_allclose(nll, expected, rtol=1e-5)
