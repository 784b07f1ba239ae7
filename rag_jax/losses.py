"""Marginal log-likelihood of a target over the documents retrieved for it.

    p(y|x) = sum_z p(z|x) p(y|x,z)

In: doc_scores [B, K], whose softmax is the prior p(z|x), and target_logits
[B, K, T, V], whose softmax is p(y_t | x, z, y_<t). Out: -log p(y|x) [B], in
nats. Everything is computed in float32.

Source: Lewis et al. 2020, https://arxiv.org/abs/2005.11401, section 2.1.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def token_log_probs(
  target_logits: Float[Array, "B K T V"],
  target_tokens: Int[Array, "B T"],
) -> Float[Array, "B K T"]:
  """Returns log p(y_t | x, z, y_<t) for every document and position."""
  target_logits = target_logits.astype(jnp.float32)
  indices = target_tokens[:, None, :, None]
  chosen = jnp.take_along_axis(target_logits, indices, axis=-1)[..., 0]
  return chosen - jax.nn.logsumexp(target_logits, axis=-1)


def doc_log_prior(doc_scores: Float[Array, "B K"]) -> Float[Array, "B K"]:
  """Returns log p(z|x): the documents retrieved are all there are."""
  return jax.nn.log_softmax(doc_scores.astype(jnp.float32), axis=-1)


def rag_token_nll(
  doc_scores: Float[Array, "B K"],
  target_logits: Float[Array, "B K T V"],
  target_tokens: Int[Array, "B T"],
  target_mask: Bool[Array, "B T"],
) -> Float[Array, "B"]:
  """Negative log-likelihood when each token may come from another document.

  RAG-Token: p(y|x) = prod_t sum_z p(z|x) p(y_t | x, z, y_<t)

  Args:
    doc_scores: inner products of question and document; any real number.
    target_logits: unnormalised next-token scores, one set per document.
    target_tokens: the tokens to predict; ids of padding are ignored.
    target_mask: True on real tokens, False on padding.

  Returns:
    One value per question, in nats, summed (not averaged) over real tokens.
  """
  joint = doc_log_prior(doc_scores)[:, :, None] + token_log_probs(
    target_logits, target_tokens
  )  # B K T
  marginal = jax.nn.logsumexp(joint, axis=1)  # B T
  return -jnp.sum(marginal, axis=-1, where=target_mask)


def rag_sequence_nll(
  doc_scores: Float[Array, "B K"],
  target_logits: Float[Array, "B K T V"],
  target_tokens: Int[Array, "B T"],
  target_mask: Bool[Array, "B T"],
) -> Float[Array, "B"]:
  """Negative log-likelihood when one document explains the whole target.

  RAG-Sequence: p(y|x) = sum_z p(z|x) prod_t p(y_t | x, z, y_<t)

  The prior is added once a sequence, whatever its length. Arguments and units
  as in `rag_token_nll`.
  """
  joint = doc_log_prior(doc_scores) + jnp.sum(
    token_log_probs(target_logits, target_tokens),
    axis=-1,
    where=target_mask[:, None, :],
  )  # B K
  return -jax.nn.logsumexp(joint, axis=-1)


NLL_FNS = {"rag_token": rag_token_nll, "rag_sequence": rag_sequence_nll}


def doc_posterior(
  doc_scores: Float[Array, "B K"],
  log_probs: Float[Array, "B K T"],
  target_mask: Bool[Array, "B T"],
) -> tuple[Float[Array, "B K"], Float[Array, "B K T"]]:
  """Returns p(z|x,y): of the whole target, and of each of its tokens.

  Bayes' rule with the prior p(z|x). For the whole, one document explains all
  tokens (RAG-Sequence); for a token, the likelihood is that token's alone
  (RAG-Token). Both sum to 1 over the documents.

  Args:
    doc_scores: inner products of question and document.
    log_probs: log p(y_t | x, z, y_<t), as `token_log_probs` gives them.
    target_mask: True on real tokens.
  """
  prior = doc_log_prior(doc_scores)
  total = jnp.sum(log_probs, axis=-1, where=target_mask[:, None, :])
  return (
    jax.nn.softmax(prior + total, axis=-1),
    jax.nn.softmax(prior[:, :, None] + log_probs, axis=1),
  )


def in_batch_contrastive_nll(
  question_embeddings: Float[Array, "B R"],
  passage_embeddings: Float[Array, "B R"],
) -> Float[Array, "B"]:
  """Returns -log p(own passage | question), the batch being all passages.

  Question i belongs to passage i, the other passages are its negatives.
  Source: Karpukhin et al. 2020, https://arxiv.org/abs/2004.04906, section 3.2;
  with cloze questions, Lee et al. 2019, https://arxiv.org/abs/1906.00300.
  """
  scores = jnp.einsum(
    "BR,PR->BP",
    question_embeddings,
    passage_embeddings,
    precision=jax.lax.Precision.HIGHEST,
  )
  return -jnp.diagonal(jax.nn.log_softmax(scores, axis=-1))
