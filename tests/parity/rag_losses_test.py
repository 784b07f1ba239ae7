"""The marginal likelihoods against PyTorch's RAG.

The reference: `get_nll` of transformers' `RagTokenForGeneration` and
`RagSequenceForGeneration`, of tiny models that need no retriever.

How its inputs relate to ours. `get_nll` takes labels that begin with what the
decoder reads first, and shifts them LEFT inside: it scores labels[:, i + 1]
with the logits of position i, and nothing with the last ones. So our
target_tokens [B, T] stand behind a start token in labels [B, T + 1], and the
logits have one position more, whose content must not matter. Padding is
marked by the pad id alone, where ours is a mask.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from rag_jax.losses import rag_sequence_nll
from rag_jax.losses import rag_token_nll

pytestmark = pytest.mark.parity

B, V = 4, 23
BOS, PAD, EOS = 0, 1, 2
DOCS = pytest.mark.parametrize("num_docs", [1, 2, 5])


@functools.cache
def rag(kind):
  """Returns a tiny RAG model; its sizes do not matter to `get_nll`."""
  question_encoder = transformers.DPRConfig(
    vocab_size=V,
    hidden_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=8,
    max_position_embeddings=8,
  )
  generator = transformers.BartConfig(
    vocab_size=V,
    d_model=8,
    encoder_layers=1,
    decoder_layers=1,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=8,
    decoder_ffn_dim=8,
    max_position_embeddings=8,
    pad_token_id=PAD,
    bos_token_id=BOS,
    eos_token_id=EOS,
    decoder_start_token_id=EOS,
    forced_eos_token_id=None,
  )
  config = transformers.RagConfig.from_question_encoder_generator_configs(
    question_encoder,
    generator,
    label_smoothing=0.0,
    exclude_bos_score=False,
    reduce_loss=False,
  )
  return {
    "token": transformers.RagTokenForGeneration,
    "sequence": transformers.RagSequenceForGeneration,
  }[kind](config)


def random_case(num_docs, lengths, length):
  """Returns doc_scores, logits (with one position more), target and mask."""
  rng = np.random.default_rng((num_docs, length))
  doc_scores = rng.normal(scale=2.0, size=(B, num_docs)).astype(np.float32)
  logits = rng.normal(scale=2.0, size=(B, num_docs, length + 1, V))
  mask = np.arange(length) < np.array(lengths)[:, None]
  tokens = rng.integers(EOS + 1, V, size=mask.shape)
  target = np.where(mask, tokens, PAD)
  return doc_scores, logits.astype(np.float32), target, mask


def torch_nll(kind, doc_scores, logits, target):
  """Returns PyTorch's nll [B], and its gradients by doc_scores and logits."""
  model = rag(kind)
  start = np.full((B, 1), EOS)
  labels = torch.tensor(np.concatenate([start, target], axis=1))
  scores = torch.tensor(doc_scores, requires_grad=True)
  flat = torch.tensor(logits.reshape(-1, *logits.shape[2:]), requires_grad=True)
  nll = model.get_nll(
    flat,
    scores,
    labels,
    reduce_loss=model.config.reduce_loss,
    epsilon=model.config.label_smoothing,
    n_docs=doc_scores.shape[1],
    # A question of RAG-Sequence alone.
    **({"exclude_bos_score": False} if kind == "sequence" else {}),
  )
  by_score, by_logits = torch.autograd.grad(nll.sum(), (scores, flat))
  by_logits = by_logits.numpy().reshape(logits.shape)
  return nll.detach().numpy(), by_score.numpy(), by_logits


@functools.cache
def compiled(kind):
  nll_fn = {"token": rag_token_nll, "sequence": rag_sequence_nll}[kind]

  def total(doc_scores, logits, target, mask):
    # The last position, which predicts nothing, stays out.
    nll = nll_fn(doc_scores, logits[:, :, :-1], target, mask)
    return jnp.sum(nll), nll

  return jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))


def our_nll(kind, doc_scores, logits, target, mask):
  """Returns the same three of ours."""
  (_, nll), grads = compiled(kind)(
    jnp.asarray(doc_scores),
    jnp.asarray(logits),
    jnp.asarray(target, jnp.int32),
    jnp.asarray(mask),
  )
  return nll, *grads


def assert_same(kind, case):
  doc_scores, logits, target, _ = case
  expected = torch_nll(kind, doc_scores, logits, target)
  actual = our_nll(kind, *case)
  for name, ours, theirs in zip(
    ("nll", "doc_scores", "logits"), actual, expected, strict=True
  ):
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5, err_msg=name)


# Rows of no, one, some and all tokens. RAG-Sequence begins at two: below, the
# reference has a defect, which has a test of its own.
TOKEN_LENGTHS = {
  1: (1, 0, 1, 1),
  2: (2, 0, 1, 2),
  3: (3, 0, 1, 2),
  7: (7, 0, 1, 4),
}
SEQUENCE_LENGTHS = {2: (2, 2, 2, 2), 3: (3, 2, 2, 3), 7: (7, 2, 4, 6)}


@DOCS
@pytest.mark.parametrize("length", list(TOKEN_LENGTHS))
def test_rag_token_is_that_of_pytorch_with_its_gradients(num_docs, length):
  assert_same("token", random_case(num_docs, TOKEN_LENGTHS[length], length))


@DOCS
@pytest.mark.parametrize("length", list(SEQUENCE_LENGTHS))
def test_rag_sequence_is_that_of_pytorch_with_its_gradients(num_docs, length):
  case = random_case(num_docs, SEQUENCE_LENGTHS[length], length)
  assert_same("sequence", case)


@pytest.mark.parametrize("length", [1, 2, 7])
def test_rag_sequence_of_one_document_has_no_prior_to_lose(length):
  """So it is PyTorch's for targets of no and of one token too."""
  case = random_case(1, TOKEN_LENGTHS[length], length)
  assert_same("sequence", case)


def log_softmax(x):
  x = x.astype(np.float64)
  return x - np.log(np.sum(np.exp(x), axis=-1, keepdims=True))


@pytest.mark.parametrize("num_docs", [2, 5])
@pytest.mark.parametrize("length", [1, 2, 7])
def test_pytorch_loses_the_prior_of_short_targets_and_ours_adds_it_once(
  num_docs, length
):
  """PyTorch adds the prior to the second predicted token.

  Where that is padding the mask erases it with the token: the documents then
  weigh the same, and no gradient reaches the doc_scores. Ours adds it once to
  each document, whatever the length of the target.
  """
  lengths = TOKEN_LENGTHS[length]
  doc_scores, logits, target, mask = random_case(num_docs, lengths, length)
  theirs, theirs_by_score, _ = torch_nll("sequence", doc_scores, logits, target)
  ours, ours_by_score, _ = our_nll("sequence", doc_scores, logits, target, mask)
  likelihood = np.zeros((B, num_docs))  # log p(y|x, z)
  log_probs = log_softmax(logits)
  for b, k in np.ndindex(B, num_docs):
    for t in range(lengths[b]):
      likelihood[b, k] += log_probs[b, k, t, target[b, t]]
  prior = log_softmax(doc_scores)
  with_prior = -np.log(np.sum(np.exp(prior + likelihood), axis=1))
  without = -np.log(np.sum(np.exp(likelihood), axis=1))

  np.testing.assert_allclose(ours, with_prior, rtol=1e-5, atol=1e-5)
  short = np.array(lengths) < 2
  np.testing.assert_allclose(
    theirs, np.where(short, without, with_prior), rtol=1e-5, atol=1e-5
  )
  assert np.all(np.abs(with_prior - without)[short] > 0.01)
  np.testing.assert_array_equal(theirs_by_score[short], 0.0)
  # An empty target says nothing about the documents: that gradient is zero in
  # ours as well. One token does.
  single = np.array(lengths) == 1
  assert np.all(np.abs(ours_by_score[single]).max(axis=1) > 1e-3)
  np.testing.assert_allclose(
    ours_by_score[~short], theirs_by_score[~short], rtol=1e-5, atol=1e-5
  )
