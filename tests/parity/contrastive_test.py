"""The contrastive loss against DPR's, in PyTorch.

The reference is `BiEncoderNllLoss.calc` of facebookresearch/DPR: a question is
compared with all passages of a batch, also the hard negatives of the others,
and `positive_idx_per_question` says which belongs to whom.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from rag_jax.losses import contrastive_nll

pytestmark = pytest.mark.parity


def dpr(questions, passages, own):
  """Returns the mean loss and how many are right, as DPR computes them."""
  scores = torch.matmul(questions, passages.T)
  log_probs = torch.nn.functional.log_softmax(scores, dim=1)
  index = torch.tensor(own)
  loss = torch.nn.functional.nll_loss(log_probs, index, reduction="mean")
  return loss, int((torch.max(log_probs, 1)[1] == index).sum())


@pytest.mark.parametrize("num_negatives", [0, 1, 7])
def test_loss_gradient_and_count_are_those_of_dpr(num_negatives):
  rng = np.random.default_rng(num_negatives)
  num, width = 16, 24
  own = list(range(0, num * (1 + num_negatives), 1 + num_negatives))
  questions = rng.normal(size=(num, width)).astype(np.float32)
  passages = rng.normal(
    size=(num * (1 + num_negatives), width)
  ).astype(np.float32)  # fmt: skip
  passages[own] += 0.3 * questions
  theirs = [torch.tensor(x, requires_grad=True) for x in (questions, passages)]
  expected, num_right = dpr(*theirs, own)
  expected.backward()

  def loss(questions, passages):
    counts = jnp.ones((num, len(passages)), bool)
    nll, first = contrastive_nll(questions, passages, jnp.asarray(own), counts)
    return jnp.mean(nll), jnp.sum(first)

  (value, first), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(
    jnp.asarray(questions), jnp.asarray(passages)
  )
  np.testing.assert_allclose(value, expected.item(), rtol=1e-5)
  assert 0 < num_right < num
  assert first == num_right
  for ours, other in zip(grads, theirs, strict=True):
    np.testing.assert_allclose(ours, other.grad, rtol=1e-4, atol=1e-7)
