"""The generator as a search sees it: next-token scores, given K documents.

In: `Generator.step`'s logits [B, W, K, V]. Out: scores [B, W, V], either the
marginal over the documents, or the logits of the only one.
"""

from collections.abc import Callable
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from rag_jax.models.causal import CausalCache
from rag_jax.models.rag import AnyGenerator
from rag_jax.models.stack import DecoderCache

_GROUP = 8  # documents per unrolled sum

Cache = DecoderCache | CausalCache
Details = tuple[Float[Array, "B W K V"], Float[Array, "B W K"]]


def log_norm(logits: Float[Array, "*n V"]) -> Float[Array, "*n"]:
  """Returns logsumexp over the vocabulary.

  The sum is a matrix product with ones: on a CPU, XLA runs that on all cores,
  and a sum over the last axis on a single core.
  """
  largest = jnp.max(logits, axis=-1)
  ones = jnp.ones(logits.shape[-1], logits.dtype)
  return largest + jnp.log(jnp.exp(logits - largest[..., None]) @ ones)


def log_marginal(
  logits: Float[Array, "B W K V"], log_weights: Float[Array, "B W K"]
) -> Float[Array, "B W V"]:
  """Returns log sum_k exp(log_weights_k + logits_k).

  Unrolled over the documents, so that it becomes one pass over the logits;
  `jax.nn.logsumexp` over a middle axis takes ten times as long.
  """
  k = logits.shape[2]
  parts = [
    logits[:, :, i] + log_weights[:, :, i, None] for i in range(min(k, _GROUP))
  ]
  if k > _GROUP:  # the sum of all further documents is one more term
    parts.append(
      log_marginal(logits[:, :, _GROUP:], log_weights[:, :, _GROUP:])
    )
  largest = functools.reduce(jnp.maximum, parts)
  return largest + jnp.log(sum(jnp.exp(part - largest) for part in parts))


class DocScorer:
  """A `search.Scorer` with K documents per question.

  With `doc_log_probs` the scores are log sum_k p(z_k|x) p(y_t | x, z_k, y_<t):
  RAG-Token, Lewis et al. 2020, https://arxiv.org/abs/2005.11401, section 2.5.
  Without them K = 1, and there is nothing to sum.
  """

  def __init__(
    self,
    generator: AnyGenerator,
    params: PyTree,
    doc_log_probs: Float[Array, "B K"] | None,
    *,
    normalize: bool,
  ):
    """Prepares a scorer inside a traced function.

    Args:
      generator: the model.
      params: of the generator.
      doc_log_probs: the prior; None for one document.
      normalize: with one document, return log-probabilities, as beam search
        needs them. False returns logits, as Hugging Face uses them for greedy
        search and sampling.
    """
    variables = {"params": params}
    self._apply: Callable[..., PyTree] = functools.partial(
      generator.apply, variables
    )
    self._prior = doc_log_probs
    self._normalize = normalize

  def step(
    self,
    tokens: Int[Array, "B W"],
    position: Int[Array, ""],
    cache: Cache,
  ) -> tuple[Float[Array, "B W V"], Details, Cache]:
    """Returns the scores of the next token after `tokens`."""
    logits, cache = self._apply(tokens, position, cache, method="step")
    norm = log_norm(logits)  # B W K
    if self._prior is not None:
      scores = log_marginal(logits, self._prior[:, None] - norm)
    else:
      scores = logits[:, :, 0]
      if self._normalize:
        scores = scores - norm
    return scores, (logits, norm), cache

  def reorder(self, cache: Cache, beams: Int[Array, "B W"]) -> Cache:
    """Returns the cache of `beams`."""
    return cache.reorder(beams)

  def explain(
    self,
    details: Details,
    beams: Int[Array, "B n"],
    tokens: Int[Array, "B n"],
  ) -> Float[Array, "B n K"]:
    """Returns log p(token | document) after each beam."""
    logits, norm = details
    b, _, k, _ = logits.shape
    rows = jnp.arange(b)[:, None]
    chosen = logits[
      rows[..., None], beams[..., None], jnp.arange(k), tokens[..., None]
    ]
    return chosen - norm[rows, beams]


def sequence_log_probs(
  doc_log_probs: Float[Array, "B K"], evidence: Float[Array, "B R T K"]
) -> Float[Array, "B R"]:
  """Returns log p(y|x) where each token may come from another document."""
  joint = doc_log_probs[:, None, None] + evidence
  written = jnp.any(evidence != 0, axis=-1)  # all are 0 after the end
  marginal = jax.nn.logsumexp(joint, axis=-1)
  return jnp.sum(marginal, axis=-1, where=written)
