"""Hugging Face's losses against slow loops over their formulas.

Where they differ from ours, a test shows how. PyTorch itself is the reference
in tests/parity/rag_losses_test.py.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rag_jax import losses
from rag_jax.losses_hf import HF_NLL_FNS
from rag_jax.losses_hf import hf_rag_sequence_nll
from rag_jax.losses_hf import hf_rag_token_nll
from rag_jax.losses_hf import shift_left

B, K, T, V = 3, 2, 4, 6
BOS, PAD = 0, 1
BOTH = pytest.mark.parametrize("name", list(HF_NLL_FNS))


def make(lengths, length=T, starts_with=None, seed=0):
  """Returns a case with `lengths` real tokens a row."""
  rng = np.random.default_rng(seed)
  mask = np.arange(length) < np.array(lengths)[:, None]
  tokens = rng.integers(PAD + 1, V, size=mask.shape)
  if starts_with is not None:
    tokens[:, 0] = starts_with
  return {
    "doc_scores": rng.normal(size=(B, K)).astype(np.float32),
    "target_logits": rng.normal(size=(B, K, length, V)).astype(np.float32),
    "target_tokens": np.where(mask, tokens, PAD).astype(np.int32),
    "target_mask": mask,
  }


@functools.cache
def compiled(nll_fn, settings):
  return jax.jit(functools.partial(nll_fn, **dict(settings)))


def run(nll_fn, case, **settings):
  case = {name: jnp.asarray(x) for name, x in case.items()}
  return np.asarray(compiled(nll_fn, tuple(settings.items()))(**case))


def log_softmax(scores):
  total = math.log(math.fsum(math.exp(s) for s in scores))
  return [s - total for s in scores]


def logsumexp(scores):
  largest = max(scores)
  return largest + math.log(math.fsum(math.exp(s - largest) for s in scores))


def sequence_by_hand(case, e=0.0, exclude_bos_score=False):
  """RAG-Sequence's loss, from the table of log-probabilities they make."""
  tokens, mask = case["target_tokens"].tolist(), case["target_mask"].tolist()
  use_bos = all(row[0] == BOS for row in tokens)
  losses_ = []
  for b in range(B):
    prior = log_softmax(case["doc_scores"][b].tolist())
    scored, flat = [], []
    for k in range(K):
      score, everything = 0.0, 0.0
      for t in range(len(tokens[b])):
        row = log_softmax(case["target_logits"][b, k, t].tolist())
        if t == 1:
          row = [x + prior[k] for x in row]
        if not mask[b][t]:
          continue
        everything += sum(row)
        if t > 0 or not (exclude_bos_score and use_bos):
          score += row[tokens[b][t]]
      scored.append(score)
      flat.append(everything)
    losses_.append(-(1 - e) * logsumexp(scored) - e / V * logsumexp(flat))
  return losses_


def token_by_hand(case, e=0.0):
  """RAG-Token's loss, from the mixture's log-probabilities."""
  losses_ = []
  for b in range(B):
    prior = log_softmax(case["doc_scores"][b].tolist())
    loss = 0.0
    for t, token in enumerate(case["target_tokens"][b].tolist()):
      if not case["target_mask"][b, t]:
        continue
      rows = [
        log_softmax(case["target_logits"][b, k, t].tolist()) for k in range(K)
      ]
      mixture = [
        logsumexp([prior[k] + rows[k][v] for k in range(K)]) for v in range(V)
      ]
      loss -= (1 - e) * mixture[token] + e / V * sum(mixture)
    losses_.append(loss)
  return losses_


@pytest.mark.parametrize("e", [0.0, 0.1])
def test_rag_token_is_their_formula(e):
  case = make((4, 1, 0))
  np.testing.assert_allclose(
    run(hf_rag_token_nll, case, label_smoothing=e),
    token_by_hand(case, e),
    rtol=1e-5,
    atol=1e-6,
  )


@pytest.mark.parametrize("e", [0.0, 0.1])
@pytest.mark.parametrize("length", [1, 4])
def test_rag_sequence_is_their_formula(e, length):
  case = make((length, 1, 0), length)
  np.testing.assert_allclose(
    run(hf_rag_sequence_nll, case, label_smoothing=e),
    sequence_by_hand(case, e),
    rtol=1e-5,
  )


@BOTH
def test_reducing_sums_over_the_questions(name):
  case = make((4, 2, 1))
  each = run(HF_NLL_FNS[name], case, label_smoothing=0.1)
  total = run(HF_NLL_FNS[name], case, label_smoothing=0.1, reduce_loss=True)
  assert each.shape == (B,)
  np.testing.assert_allclose(total, each.sum(), rtol=1e-6)


def test_targets_from_two_tokens_on_have_the_paper_s_likelihood():
  case = make((4, 2, 3))
  for name, nll_fn in losses.NLL_FNS.items():
    np.testing.assert_allclose(
      run(HF_NLL_FNS[name], case), run(nll_fn, case), rtol=1e-5
    )


def test_theirs_loses_the_prior_of_a_single_token_and_ours_does_not():
  case = make((1, 4, 0))
  other = case | {"doc_scores": case["doc_scores"][:, ::-1].copy()}
  theirs = run(hf_rag_sequence_nll, case), run(hf_rag_sequence_nll, other)
  ours = (
    run(losses.rag_sequence_nll, case), run(losses.rag_sequence_nll, other)
  )  # fmt: skip
  # Another prior: for one token theirs does not notice.
  assert theirs[0][0] == theirs[1][0]
  assert abs(ours[0][0] - ours[1][0]) > 0.01
  assert abs(theirs[0][1] - theirs[1][1]) > 0.01
  # An empty target costs ours nothing; theirs gains log K.
  np.testing.assert_allclose(ours[0][2], 0.0, atol=1e-6)
  np.testing.assert_allclose(theirs[0][2], -math.log(K), rtol=1e-5)


def test_the_first_token_is_left_out_only_if_all_rows_begin_with_it():
  case = make((4, 3, 2), starts_with=BOS)
  settings = {"excluded_bos": BOS}
  without = run(hf_rag_sequence_nll, case, **settings)
  np.testing.assert_allclose(
    without, sequence_by_hand(case, exclude_bos_score=True), rtol=1e-5
  )
  assert np.all(without < run(hf_rag_sequence_nll, case) - 0.1)
  # One row that begins otherwise changes the loss of all the others.
  case["target_tokens"][2, 0] = V - 1
  together = run(hf_rag_sequence_nll, case, **settings)
  np.testing.assert_array_equal(together, run(hf_rag_sequence_nll, case))
  assert np.all(together[:2] > without[:2] + 0.1)


def test_a_tokenizer_without_a_start_token_leaves_nothing_out():
  case = make((4, 3, 2), starts_with=BOS)
  np.testing.assert_array_equal(
    run(hf_rag_sequence_nll, case, excluded_bos=None),
    run(hf_rag_sequence_nll, case),
  )


def test_the_smoothing_term_keeps_the_token_that_is_left_out():
  case = make((4, 3, 2), starts_with=BOS)
  settings = {"excluded_bos": BOS, "label_smoothing": 0.5}
  np.testing.assert_allclose(
    run(hf_rag_sequence_nll, case, **settings),
    sequence_by_hand(case, 0.5, exclude_bos_score=True),
    rtol=1e-5,
  )


def by_doc_scores(nll_fn, case, e):
  def total(scores):
    rest = {k: jnp.asarray(x) for k, x in case.items() if k != "doc_scores"}
    return jnp.sum(nll_fn(scores, **rest, label_smoothing=e))

  return np.asarray(jax.jit(jax.grad(total))(jnp.asarray(case["doc_scores"])))


def test_their_smoothing_prefers_the_flattest_document_whatever_the_target():
  """Both documents give the target the same: its likelihood prefers none."""
  case = make((2, 2, 2), 2)
  case["doc_scores"][:] = 0.0
  # Of what is left beside the token, the first shares alike, the second not.
  flat, steep = np.full(V, 0.14), np.full(V, 1e-3)
  for b, t in np.ndindex(B, 2):
    token = case["target_tokens"][b, t]
    for k, probs in enumerate((flat, steep)):
      probs = probs.copy()
      probs[(token + 1) % V] += 0.7 - probs.sum() + probs[token]
      probs[token] = 0.3
      case["target_logits"][b, k, t] = np.log(probs)
  plain = by_doc_scores(losses.rag_sequence_nll, case, 0.0)
  np.testing.assert_allclose(plain, 0.0, atol=1e-6)
  ours = by_doc_scores(losses.rag_sequence_nll, case, 0.1)
  np.testing.assert_allclose(ours, 0.0, atol=1e-6)
  # The flat one's share of the smoothing term is 1 where its prior is 1/2.
  theirs = by_doc_scores(hf_rag_sequence_nll, case, 0.1)
  np.testing.assert_allclose(theirs, [[-0.05, 0.05]] * B, rtol=1e-4)


def test_smoothing_of_the_mixture_is_not_that_of_each_document():
  case = make((4, 2, 1))
  theirs = run(hf_rag_token_nll, case, label_smoothing=0.1)
  ours = run(losses.rag_token_nll, case, label_smoothing=0.1)
  assert np.all(np.abs(ours - theirs) > 1e-4)
  one = case | {
    "doc_scores": case["doc_scores"][:, :1],
    "target_logits": case["target_logits"][:, :1],
  }
  np.testing.assert_allclose(
    run(hf_rag_token_nll, one, label_smoothing=0.1),
    run(losses.rag_token_nll, one, label_smoothing=0.1),
    rtol=1e-5,
  )


def test_padding_has_no_gradient():
  case = make((4, 1, 0))
  for nll_fn in HF_NLL_FNS.values():

    def total(logits, nll_fn=nll_fn):
      rest = {k: jnp.asarray(x) for k, x in case.items()}
      rest["target_logits"] = logits
      return jnp.sum(nll_fn(**rest, label_smoothing=0.1))

    grad = jax.jit(jax.grad(total))(jnp.asarray(case["target_logits"]))
    assert not np.any(grad[1, :, 1:])
    assert not np.any(grad[2])
    assert np.all(grad[0] != 0)


def test_labels_are_shifted_left_and_end_in_padding():
  labels = jnp.array([[2, 0, 5, 4], [2, 0, 4, PAD], [5, 4, PAD, PAD]])
  tokens, mask = shift_left(labels, PAD)
  np.testing.assert_array_equal(
    tokens, [[0, 5, 4, PAD], [0, 4, PAD, PAD], [4, PAD, PAD, PAD]]
  )
  np.testing.assert_array_equal(mask.sum(axis=1), [3, 2, 1])
