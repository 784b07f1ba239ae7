"""Hugging Face's RAG losses, defects included, to compare and to reproduce.

`get_nll` of `RagTokenForGeneration` and `RagSequenceForGeneration`, as of
transformers 5. Inputs and outputs as in losses.py, which has the defaults.

How its arguments relate to ours: `labels` begin with a token that the decoder
only reads, and are shifted LEFT inside. The logits of position i score label
i + 1, those of the last position score nothing, and padding is recognised by
its id. So `labels` without the start token are our target_tokens; `shift_left`
makes them. RAG-Token shifts the labels, and RAG-Sequence the decoder's input:
these are the same unless a caller passes both.

Where it differs from losses.py:

- RAG-Sequence adds the prior to the second predicted token, because BART's
  first is <s>. If the second token is padding, the mask removes the prior too:
  an answer of one token is scored as if all documents were equally likely, and
  gives the retriever no gradient. Ours adds the prior once per document.
- RAG-Sequence leaves <s> out of the score only if all targets of the batch
  begin with it: a question's loss depends on the other questions.
- Label smoothing of RAG-Sequence: see `hf_rag_sequence_nll`. RAG-Token smooths
  the mixture, as is standard; this needs [B, T, V], ours does not.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rag_jax.losses import doc_log_prior
from rag_jax.losses import marginalize


def shift_left(
  labels: Int[Array, "B T"], pad_id: int
) -> tuple[Int[Array, "B T"], Bool[Array, "B T"]]:
  """Returns target_tokens and target_mask of Hugging Face's `labels`.

  They belong to the logits of a decoder that reads `labels`; the last position
  is padding. If the labels have no start token, as T5's without
  decoder_input_ids, their first token is read and never scored.
  """
  tokens = jnp.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=pad_id)
  return tokens, tokens != pad_id


def _combine(
  nll: Float[Array, "B"],
  smooth: Float[Array, "B"],
  vocab_size: int,
  label_smoothing: float,
  reduce_loss: bool,
) -> Float[Array, "*B"]:
  if reduce_loss:
    nll, smooth = jnp.sum(nll), jnp.sum(smooth)
  share = label_smoothing / vocab_size
  return (1 - label_smoothing) * nll + share * smooth


def hf_rag_token_nll(
  doc_scores: Float[Array, "B K"],
  target_logits: Float[Array, "B K T V"],
  target_tokens: Int[Array, "B T"],
  target_mask: Bool[Array, "B T"],
  label_smoothing: float = 0.0,
  reduce_loss: bool = False,
) -> Float[Array, "*B"]:
  """Returns the loss of `RagTokenForGeneration`.

  Args:
    doc_scores: as in `rag_token_nll`, and so the next three.
    target_logits: of every position whose token is scored.
    target_tokens: the tokens to predict.
    target_mask: where they are not padding.
    label_smoothing: share of the target distribution that is spread over all
      tokens. 0 gives `rag_token_nll`.
    reduce_loss: sum over the questions; never a mean.

  Returns:
    One value per question, in nats, or their sum.
  """
  log_probs = marginalize(doc_scores, target_logits)  # B T V
  indices = target_tokens[..., None]
  chosen = jnp.take_along_axis(log_probs, indices, axis=-1)[..., 0]
  nll = -jnp.sum(chosen, axis=-1, where=target_mask)
  all_tokens = jnp.sum(log_probs, axis=-1)  # B T
  smooth = -jnp.sum(all_tokens, axis=-1, where=target_mask)
  size = log_probs.shape[-1]
  return _combine(nll, smooth, size, label_smoothing, reduce_loss)


def hf_rag_sequence_nll(
  doc_scores: Float[Array, "B K"],
  target_logits: Float[Array, "B K T V"],
  target_tokens: Int[Array, "B T"],
  target_mask: Bool[Array, "B T"],
  label_smoothing: float = 0.0,
  reduce_loss: bool = False,
  excluded_bos: int | None = None,
) -> Float[Array, "*B"]:
  """Returns the loss of `RagSequenceForGeneration`.

  Its label smoothing sums the log-probabilities of all tokens over all
  positions, adds the prior V times, and takes the logsumexp of this sum over
  the documents, as if it were a likelihood. The sums are in the hundred
  thousands, so only the largest counts, and the document with the flattest
  predictions gets all the gradient. This can also change which of two targets
  has the lower loss.

  Args:
    doc_scores: as in `rag_token_nll`, and so the next three.
    target_logits: of every position whose token is scored.
    target_tokens: the tokens to predict.
    target_mask: where they are not padding.
    label_smoothing: weight of the smoothing term.
    reduce_loss: sum over the questions; never a mean.
    excluded_bos: with `exclude_bos_score`, the begin token: the RAG config's,
      or the generator's if that is None or 0. The first token is not scored if
      it is this one in every row of the batch; the smoothing term keeps it.
      None scores all, as for T5, which has no begin token.

  Returns:
    One value per question, in nats, or their sum.
  """
  target_logits = target_logits.astype(jnp.float32)
  size = target_logits.shape[-1]
  log_norm = jax.nn.logsumexp(target_logits, axis=-1)  # B K T
  indices = target_tokens[:, None, :, None]
  chosen = jnp.take_along_axis(target_logits, indices, axis=-1)[..., 0]
  # The sum of log-probabilities over the vocabulary, without computing them.
  all_tokens = jnp.sum(target_logits, axis=-1) - size * log_norm
  # The prior is at the second position; with T = 1 there is none.
  second = jnp.arange(target_tokens.shape[1]) == 1
  prior = jnp.where(second, doc_log_prior(doc_scores)[:, :, None], 0.0)
  mask = target_mask[:, None, :]
  scored = mask
  if excluded_bos is not None:
    first = jnp.arange(target_tokens.shape[1]) == 0
    scored = mask & ~(first & jnp.all(target_tokens[:, 0] == excluded_bos))
  joint = jnp.sum(chosen - log_norm + prior, axis=-1, where=scored)
  flat = jnp.sum(all_tokens + size * prior, axis=-1, where=mask)
  return _combine(
    -jax.nn.logsumexp(joint, axis=1),
    -jax.nn.logsumexp(flat, axis=1),
    size,
    label_smoothing,
    reduce_loss,
  )


HF_NLL_FNS = {
  "rag_token": hf_rag_token_nll,
  "rag_sequence": hf_rag_sequence_nll,
}
