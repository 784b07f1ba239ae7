"""The marginal likelihoods against probabilities multiplied out by hand."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rag_jax import losses
from rag_jax.losses import rag_sequence_nll
from rag_jax.losses import rag_token_nll

B, K, T, V = 2, 3, 4, 5
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


def run(nll_fn, inputs):
  return np.asarray(jax.jit(nll_fn)(**inputs))


@functools.cache
def gradient_fn(nll_fn):
  def total(doc_scores, target_logits, rest):
    return nll_fn(doc_scores, target_logits, **rest).sum()

  return jax.jit(jax.grad(total, argnums=(0, 1)))


def gradients(nll_fn, inputs):
  """Returns d nll / d doc_scores [B, K] and d target_logits [B, K, T, V]."""
  rest = dict(inputs)
  scores, logits = rest.pop("doc_scores"), rest.pop("target_logits")
  return [np.asarray(g) for g in gradient_fn(nll_fn)(scores, logits, rest)]


def softmax(scores):
  """Probabilities of a list of numbers, in float64."""
  total = math.fsum(math.exp(s) for s in scores)
  return [math.exp(s) / total for s in scores]


def probabilities(inputs):
  """p(z|x) [B][K] and p(y_t | x, z, y_<t) of the target tokens [B][K][T]."""
  tokens = inputs["target_tokens"].tolist()
  p_doc = [softmax(row) for row in inputs["doc_scores"].tolist()]
  p_token = [
    [
      [softmax(logits)[tokens[b][t]] for t, logits in enumerate(doc)]
      for doc in docs
    ]
    for b, docs in enumerate(inputs["target_logits"].tolist())
  ]
  return p_doc, p_token


def rag_token_by_hand(inputs):
  p_doc, p_token = probabilities(inputs)
  mask = inputs["target_mask"].tolist()
  nll = []
  for b in range(len(mask)):
    likelihood = 1.0
    for t in range(len(mask[b])):
      marginal = 0.0
      for k in range(len(p_doc[b])):
        marginal += p_doc[b][k] * p_token[b][k][t]
      if mask[b][t]:
        likelihood *= marginal
    nll.append(-math.log(likelihood))
  return nll


def rag_sequence_by_hand(inputs):
  p_doc, p_token = probabilities(inputs)
  mask = inputs["target_mask"].tolist()
  nll = []
  for b in range(len(mask)):
    likelihood = 0.0
    for k in range(len(p_doc[b])):
      p_target = 1.0
      for t in range(len(mask[b])):
        if mask[b][t]:
          p_target *= p_token[b][k][t]
      likelihood += p_doc[b][k] * p_target
    nll.append(-math.log(likelihood))
  return nll


BY_HAND = pytest.mark.parametrize(
  ("nll_fn", "by_hand"),
  [
    (rag_token_nll, rag_token_by_hand),
    (rag_sequence_nll, rag_sequence_by_hand),
  ],
)


@BY_HAND
def test_nll_is_the_product_of_probabilities(nll_fn, by_hand, inputs):
  np.testing.assert_allclose(run(nll_fn, inputs), by_hand(inputs), rtol=1e-5)


def test_the_two_differ_when_documents_explain_different_tokens(inputs):
  assert np.all(
    np.abs(run(rag_token_nll, inputs) - run(rag_sequence_nll, inputs)) > 1e-3
  )


def test_names_of_the_config_choose_the_losses():
  assert losses.NLL_FNS["rag_token"] is rag_token_nll
  assert losses.NLL_FNS["rag_sequence"] is rag_sequence_nll


@BOTH
@pytest.mark.parametrize("order", [[2, 1, 0], [1, 2, 0], [0, 2, 1]], ids=str)
def test_order_of_documents_does_not_matter(nll_fn, order, inputs):
  shuffled = inputs | {
    "doc_scores": inputs["doc_scores"][:, order],
    "target_logits": inputs["target_logits"][:, order],
  }
  np.testing.assert_allclose(
    run(nll_fn, inputs), run(nll_fn, shuffled), rtol=1e-6
  )


@BOTH
def test_one_document_is_plain_nll_whatever_its_score(nll_fn, inputs):
  one = inputs | {
    "doc_scores": inputs["doc_scores"][:, :1] + 7.0,
    "target_logits": inputs["target_logits"][:, :1],
  }
  _, p_token = probabilities(one)
  expected = []
  for b, mask in enumerate(inputs["target_mask"].tolist()):
    expected.append(
      -sum(math.log(p_token[b][0][t]) for t in range(T) if mask[t])
    )
  np.testing.assert_allclose(run(nll_fn, one), expected, rtol=1e-5)


@BOTH
def test_equal_documents_are_one_document(nll_fn, inputs):
  logits = inputs["target_logits"][:, :1]
  one = inputs | {
    "doc_scores": inputs["doc_scores"][:, :1],
    "target_logits": logits,
  }
  many = inputs | {"target_logits": np.repeat(logits, K, axis=1)}
  np.testing.assert_allclose(run(nll_fn, many), run(nll_fn, one), rtol=1e-6)


def test_the_two_agree_on_targets_of_one_token(inputs):
  one = inputs | {
    "target_logits": inputs["target_logits"][:, :, :1],
    "target_tokens": inputs["target_tokens"][:, :1],
    "target_mask": inputs["target_mask"][:, :1],
  }
  np.testing.assert_allclose(
    run(rag_token_nll, one), run(rag_sequence_nll, one), rtol=1e-6
  )


def test_a_uniform_prior_averages_over_documents(inputs):
  uniform = inputs | {"doc_scores": np.full((B, K), -3.0, np.float32)}
  _, p_token = probabilities(uniform)
  tokens, sequences = [], []
  for b, mask in enumerate(inputs["target_mask"].tolist()):
    length = sum(mask)
    p = np.array(p_token[b])[:, :length]  # K T
    tokens.append(-np.log(p.mean(axis=0)).sum())
    sequences.append(-np.log(p.prod(axis=1).mean()))
  np.testing.assert_allclose(run(rag_token_nll, uniform), tokens, rtol=1e-5)
  np.testing.assert_allclose(
    run(rag_sequence_nll, uniform), sequences, rtol=1e-5
  )


@BOTH
def test_padding_has_no_gradient(nll_fn, inputs):
  _, grad = gradients(nll_fn, inputs)  # B K T V
  assert not np.any(grad[1, :, 2:])
  assert np.all(grad[0] != 0)
  assert np.all(grad[1, :, :2] != 0)


@BOTH
def test_the_token_ids_of_padding_do_not_matter(nll_fn, inputs):
  before = run(nll_fn, inputs)
  inputs["target_tokens"][1, 2:] += 1
  inputs["target_tokens"] %= V
  np.testing.assert_array_equal(run(nll_fn, inputs), before)


@BOTH
def test_a_target_that_is_all_padding_costs_nothing(nll_fn, inputs):
  full = run(nll_fn, inputs)
  inputs["target_mask"][1] = False
  nll = run(nll_fn, inputs)
  assert nll[0] == full[0]
  np.testing.assert_allclose(nll[1], 0.0, atol=1e-6)
  to_scores, to_logits = gradients(nll_fn, inputs)
  np.testing.assert_allclose(to_scores[1], np.zeros(K), atol=1e-6)
  np.testing.assert_array_equal(to_logits[1], np.zeros((K, T, V)))


def posteriors(inputs):
  log_probs = jax.jit(losses.token_log_probs)(
    inputs["target_logits"], inputs["target_tokens"]
  )
  return jax.jit(losses.doc_posterior)(
    inputs["doc_scores"], log_probs, inputs["target_mask"]
  )


def test_rag_sequence_moves_scores_by_posterior_minus_prior(inputs):
  whole, _ = posteriors(inputs)
  prior, _ = probabilities(inputs)
  to_scores, _ = gradients(rag_sequence_nll, inputs)
  np.testing.assert_allclose(-to_scores, whole - np.array(prior), atol=1e-6)
  assert np.max(np.abs(to_scores)) > 0.05


def test_rag_token_moves_scores_by_posterior_minus_prior_of_each_token(inputs):
  _, of_tokens = posteriors(inputs)  # B K T
  prior, _ = probabilities(inputs)
  moves = np.asarray(of_tokens) - np.array(prior)[:, :, None]
  expected = moves.sum(axis=-1, where=inputs["target_mask"][:, None])
  to_scores, _ = gradients(rag_token_nll, inputs)
  np.testing.assert_allclose(-to_scores, expected, atol=1e-6)
  assert np.max(np.abs(to_scores)) > 0.05


def test_posteriors_are_bayes_rule(inputs):
  whole, of_tokens = posteriors(inputs)
  p_doc, p_token = probabilities(inputs)
  for b, mask in enumerate(inputs["target_mask"].tolist()):
    joint = []
    for k in range(K):
      real = [p_token[b][k][t] for t in range(T) if mask[t]]
      joint.append(p_doc[b][k] * math.prod(real))
    np.testing.assert_allclose(
      whole[b], np.array(joint) / sum(joint), rtol=1e-5
    )
    for t in range(T):
      joint = np.array([p_doc[b][k] * p_token[b][k][t] for k in range(K)])
      np.testing.assert_allclose(
        of_tokens[b, :, t], joint / joint.sum(), rtol=1e-5
      )


def test_posteriors_sum_to_one_over_the_documents(inputs):
  inputs["doc_scores"] *= 30.0
  inputs["target_logits"] *= 30.0
  whole, of_tokens = map(np.asarray, posteriors(inputs))
  np.testing.assert_allclose(whole.sum(axis=1), np.ones(B), rtol=1e-6)
  np.testing.assert_allclose(of_tokens.sum(axis=1), np.ones((B, T)), rtol=1e-6)


@pytest.mark.parametrize("length", [0, 1, 3, 4])
def test_the_prior_is_added_once_whatever_the_length(length, inputs):
  inputs["target_mask"] = np.tile(np.arange(T) < length, (B, 1))
  # Only the first document can produce the target, and is sure of it.
  onehot = np.eye(V, dtype=np.float32)[inputs["target_tokens"]]  # B T V
  inputs["target_logits"] = np.stack(
    [50 * onehot, -50 * onehot, -50 * onehot], axis=1
  )
  prior, _ = probabilities(inputs)
  price = -np.log(np.array(prior)[:, 0])  # -log p(z|x) of that document
  np.testing.assert_allclose(
    run(rag_sequence_nll, inputs), min(length, 1) * price, atol=1e-5
  )
  # RAG-Token draws a document for every token, and pays for each.
  np.testing.assert_allclose(
    run(rag_token_nll, inputs), length * price, atol=1e-5
  )


@BOTH
def test_bfloat16_is_computed_in_float32(nll_fn, inputs):
  names = ("doc_scores", "target_logits")
  low = {name: jnp.asarray(inputs[name], jnp.bfloat16) for name in names}
  high = {name: np.asarray(low[name], np.float32) for name in names}
  nll = run(nll_fn, inputs | low)
  assert nll.dtype == np.float32
  np.testing.assert_allclose(nll, run(nll_fn, inputs | high), rtol=1e-6)


@BY_HAND
def test_scores_of_90_do_not_overflow(nll_fn, by_hand, inputs):
  # The exponential of 89 is infinite in float32.
  inputs["doc_scores"] = np.array([[90, -90, 89], [-90, 0, 90]], np.float32)
  inputs["target_logits"] = 90 * np.sign(inputs["target_logits"])
  np.testing.assert_allclose(run(nll_fn, inputs), by_hand(inputs), rtol=1e-5)
  assert all(np.all(np.isfinite(g)) for g in gradients(nll_fn, inputs))


@BOTH
def test_a_constant_added_to_all_scores_changes_nothing(nll_fn, inputs):
  moved = inputs | {"doc_scores": inputs["doc_scores"] + 64.0}
  np.testing.assert_allclose(run(nll_fn, moved), run(nll_fn, inputs), rtol=1e-5)


def test_the_mixture_is_a_distribution_over_all_tokens(inputs):
  mixture = np.asarray(
    jax.jit(losses.marginalize)(inputs["doc_scores"], inputs["target_logits"])
  )
  p_doc, _ = probabilities(inputs)
  expected = np.zeros((B, T, V))
  for b, k, t in np.ndindex(B, K, T):
    row = softmax(inputs["target_logits"][b, k, t].tolist())
    expected[b, t] += p_doc[b][k] * np.array(row)
  np.testing.assert_allclose(np.exp(mixture), expected, rtol=1e-5)
  np.testing.assert_allclose(np.exp(mixture).sum(axis=-1), 1.0, rtol=1e-5)
  chosen = np.take_along_axis(
    mixture, inputs["target_tokens"][..., None], axis=-1
  )[..., 0]
  np.testing.assert_allclose(
    run(rag_token_nll, inputs),
    -chosen.sum(axis=-1, where=inputs["target_mask"]),
    rtol=1e-5,
  )


def test_in_batch_contrast_is_a_softmax_over_the_batch():
  rng = np.random.default_rng(1)
  questions, passages = rng.normal(size=(2, 4, 3)).astype(np.float32)
  expected = []
  for i, question in enumerate(questions.tolist()):
    scores = []
    for passage in passages.tolist():
      scores.append(sum(a * b for a, b in zip(question, passage, strict=True)))
    expected.append(-math.log(softmax(scores)[i]))
  nll = jax.jit(losses.in_batch_contrastive_nll)(questions, passages)
  np.testing.assert_allclose(nll, expected, rtol=1e-5)


def test_in_batch_contrast_does_not_overflow_at_the_scores_of_dpr():
  questions = 80 * np.eye(4, dtype=np.float32)  # inner products of 6400
  nll_fn = jax.jit(losses.in_batch_contrastive_nll)
  np.testing.assert_array_equal(nll_fn(questions, questions), np.zeros(4))
  np.testing.assert_array_equal(
    nll_fn(questions, questions[::-1].copy()), np.full(4, 6400.0)
  )
