"""Greedy RAG-Token decoding: at each step the likeliest next token.

In: contexts [B, K, C] and doc_scores [B, K]. Out: tokens [B, T], and for each
of them its probability given each document, from which the posteriors follow.

Source: Lewis et al. 2020, https://arxiv.org/abs/2005.11401, section 2.5.
"""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from rag_jax.losses import doc_log_prior
from rag_jax.losses import doc_posterior
from rag_jax.models.generator import DecoderCache
from rag_jax.models.rag import RagModel


@flax.struct.dataclass
class Decoded:
  """What was written, and what each document had to do with it."""

  tokens: Int[Array, "B T"]
  mask: Bool[Array, "B T"]  # True up to and including the end token
  token_log_probs: Float[Array, "B T"]  # log p(y_t | x, y_<t), nats
  doc_log_probs: Float[Array, "B K"]  # the prior, log p(z|x)
  posterior: Float[Array, "B K"]  # p(z | x, y)
  token_posterior: Float[Array, "B K T"]  # p(z | x, y_t), a token


@flax.struct.dataclass
class _Loop:
  position: Int[Array, ""]
  last: Int[Array, "B"]
  done: Bool[Array, "B"]
  tokens: Int[Array, "B T"]
  token_log_probs: Float[Array, "B T"]
  log_probs: Float[Array, "B K T"]  # log p(y_t | x, z, y_<t)
  cache: DecoderCache


def make_greedy(
  model: RagModel, *, max_tokens: int, start_id: int, end_id: int, pad_id: int
) -> Callable[..., Decoded]:
  """Returns a compiled (params, doc_scores, contexts, mask) -> Decoded.

  The contexts are encoded once. All questions are decoded together in one
  `lax.while_loop`, which ends when each has its end token.

  Args:
    model: whose generator writes.
    max_tokens: T, the longest answer with its end token.
    start_id: what the decoder reads first.
    end_id: ends an answer.
    pad_id: fills the rest.
  """

  def decode(
    params: PyTree,
    doc_scores: Float[Array, "B K"],
    context_tokens: Int[Array, "B K C"],
    context_mask: Bool[Array, "B K C"],
  ) -> Decoded:
    b, k, c = context_tokens.shape
    prior = doc_log_prior(doc_scores)

    def apply(*args: object, method: str) -> PyTree:
      return model.apply({"params": params}, *args, method=method)

    def step(loop: _Loop) -> _Loop:
      logits, cache = apply(
        jnp.repeat(loop.last, k),
        loop.position,
        loop.cache,
        method="decode_step",
      )  # B*K V
      log_probs = jax.nn.log_softmax(logits.reshape(b, k, -1), axis=-1)
      marginal = jax.nn.logsumexp(log_probs + prior[:, :, None], axis=1)  # B V
      best = jnp.argmax(marginal, axis=-1).astype(jnp.int32)
      token = jnp.where(loop.done, pad_id, best)
      chosen = jnp.take_along_axis(log_probs, best[:, None, None], axis=-1)
      log_prob = jnp.take_along_axis(marginal, best[:, None], axis=-1)[:, 0]
      t = loop.position
      return _Loop(
        position=t + 1,
        last=token,
        done=loop.done | (token == end_id),
        tokens=loop.tokens.at[:, t].set(token),
        token_log_probs=loop.token_log_probs.at[:, t].set(
          jnp.where(loop.done, 0.0, log_prob)
        ),
        log_probs=loop.log_probs.at[:, :, t].set(
          jnp.where(loop.done[:, None], 0.0, chosen[..., 0])
        ),
        cache=cache,
      )

    loop = jax.lax.while_loop(
      lambda loop: (loop.position < max_tokens) & ~jnp.all(loop.done),
      step,
      _Loop(
        position=jnp.zeros((), jnp.int32),
        last=jnp.full((b,), start_id, jnp.int32),
        done=jnp.zeros((b,), bool),
        tokens=jnp.full((b, max_tokens), pad_id, jnp.int32),
        token_log_probs=jnp.zeros((b, max_tokens)),
        log_probs=jnp.zeros((b, k, max_tokens)),
        cache=apply(
          context_tokens.reshape(b * k, c),
          context_mask.reshape(b * k, c),
          max_tokens,
          method="init_cache",
        ),
      ),
    )
    ends = jnp.cumsum(loop.tokens == end_id, axis=1)
    mask = (ends == 0) | ((ends == 1) & (loop.tokens == end_id))
    mask &= jnp.arange(max_tokens) < loop.position
    posterior, token_posterior = doc_posterior(doc_scores, loop.log_probs, mask)
    return Decoded(
      tokens=loop.tokens,
      mask=mask,
      token_log_probs=loop.token_log_probs,
      doc_log_probs=prior,
      posterior=posterior,
      token_posterior=token_posterior,
    )

  return jax.jit(decode)
