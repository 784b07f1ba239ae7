"""RAG-Sequence's candidates, ranked by the likelihood of the whole sequence.

In: the sequences that each document's beams wrote. Out: `Generated`, the best
sequence first.

Source: Lewis et al. 2020, https://arxiv.org/abs/2005.11401, section 2.5.
"""

import dataclasses
import typing

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rag_jax.decoding.logits import MIN
from rag_jax.decoding.search import ABSENT
from rag_jax.decoding.search import Found
from rag_jax.decoding.settings import GenerationSettings


# Unchecked, because JAX makes it of shapes and of numpy's arrays too.
@typing.no_type_check
@flax.struct.dataclass
class Generated:
  """The sequences written for each question, R of them, the best first."""

  tokens: Int[Array, "B R T"]  # without the start token
  lengths: Int[Array, "B R"]  # with the end token; 0: no such sequence
  log_probs: Float[Array, "B R"]  # log p(y|x), nats; see `RagDecoder`
  scores: Float[Array, "B R"]  # the sequences are ranked by these
  doc_log_probs: Float[Array, "B K"]  # the prior, log p(z|x)
  # log p(y_t | x, z, y_<t), 0 after the end.
  token_log_probs: Float[Array, "B R K T"]

  @property
  def mask(self) -> Bool[Array, "B R T"]:
    """True up to and including the end token."""
    steps = jnp.arange(self.tokens.shape[-1])
    return steps < self.lengths[..., None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class HfParity:
  """Hugging Face's `RagSequenceForGeneration.generate`, its defects included.

  As of transformers 5.23:

  - the search reads the padding of contexts, since it has no mask;
  - a candidate of a single token loses the prior;
  - the bos token is not scored if all candidates start with it;
  - if padding is token 0, shorter candidates are charged for end tokens after
    their end;
  - the two fields change the ranking.
  """

  # `config.n_docs`: how many documents rank the candidates, whatever
  # `generate(n_docs=...)` says. None: as many as are read.
  n_docs: int | None = None
  # `config.label_smoothing`, of training: it changes the ranking.
  label_smoothing: float = 0.0


def rank_fast(
  prior: Float[Array, "B K"], candidates: Found, settings: GenerationSettings
) -> Generated:
  """Returns the candidates ranked by the documents whose beams wrote them.

  A document contributes nothing to a sequence that its beams did not write: the
  log-probability of the first token is then -1e9. This needs no second pass
  over the documents, and log p(y|x) is a lower bound.

  Args:
    prior: log p(z|x).
    candidates: C = K * W, in the order of the documents.
    settings: of the search.
  """
  b, k = prior.shape
  c, t = candidates.tokens.shape[1:]
  alive = candidates.lengths > 0
  same, first = first_of_equals(candidates.tokens, alive)
  if not settings.do_deduplication:
    first = alive
  evidence = candidates.evidence[..., 0]  # B C T
  own = jnp.sum(evidence, axis=-1)  # 0 after the end
  joint = jnp.repeat(prior, c // k, axis=1) + own  # B C
  scores = jax.nn.logsumexp(jnp.where(same, joint[:, None, :], MIN), axis=-1)
  # The beam of each document that wrote the same sequence, if there is one.
  wrote = same.reshape(b, c, k, c // k)
  given = jnp.einsum(
    "BCKW,BKWT->BCKT",
    wrote.astype(evidence.dtype),
    evidence.reshape(b, k, c // k, t),
  )
  absent = jnp.where(jnp.arange(t) == 0, ABSENT, 0.0)
  given = jnp.where(jnp.any(wrote, axis=-1)[..., None], given, absent)
  return _best(candidates, scores, scores, first, prior, given, settings)


def rank_thorough(
  prior: Float[Array, "B K"],
  candidates: Found,
  given: Float[Array, "B C T K"],
  total: Float[Array, "B C T K"],
  settings: GenerationSettings,
  vocab_size: int,
  parity: HfParity | None,
) -> Generated:
  """Returns the candidates ranked by log sum_k p(z_k|x) p(y|x, z_k).

  Args:
    prior: log p(z|x) of the documents that rank.
    candidates: from the beams of any document.
    given: log p(y_t | x, z, y_<t).
    total: the sum of log p(v | x, z, y_<t) over the vocabulary.
    settings: of the search.
    vocab_size: V.
    parity: ranks as Hugging Face does; None ranks by the likelihood.
  """
  real = jnp.arange(given.shape[2]) < candidates.lengths[..., None]
  alive = candidates.lengths > 0
  counted = alive
  if settings.do_deduplication:
    _, counted = first_of_equals(candidates.tokens, alive)
  each = jnp.sum(given, axis=2, where=real[..., None])  # B C K
  log_probs = jax.nn.logsumexp(prior[:, None] + each, axis=-1)
  scores = log_probs
  if parity is not None:
    # After the end of a question's longest candidate there is only padding.
    longest = jnp.max(candidates.lengths, axis=1)[:, None, None]
    behind = jnp.arange(given.shape[2]) >= longest
    candidates = dataclasses.replace(
      candidates, tokens=jnp.where(behind, settings.pad_id, candidates.tokens)
    )
    scores = hf_ranking(
      prior,
      given,
      total,
      candidates,
      settings,
      parity.label_smoothing,
      vocab_size,
    )
  given = jnp.swapaxes(jnp.where(real[..., None], given, 0.0), 2, 3)
  return _best(candidates, scores, log_probs, counted, prior, given, settings)


def _best(
  candidates: Found,
  scores: Float[Array, "B C"],
  log_probs: Float[Array, "B C"],
  counted: Bool[Array, "B C"],
  prior: Float[Array, "B K"],
  given: Float[Array, "B C K T"],
  settings: GenerationSettings,
) -> Generated:
  """Returns the best candidates, of those where `counted` is True."""
  scores, best = jax.lax.top_k(
    jnp.where(counted, scores, MIN), settings.num_return_sequences
  )
  rows = jnp.arange(len(best))[:, None]
  there = counted[rows, best]
  return Generated(
    tokens=jnp.where(
      there[..., None], candidates.tokens[rows, best], settings.pad_id
    ),
    lengths=jnp.where(there, candidates.lengths[rows, best], 0),
    log_probs=jnp.where(there, log_probs[rows, best], MIN),
    scores=scores,
    doc_log_probs=prior,
    token_log_probs=given[rows, best],
  )


def first_of_equals(
  tokens: Int[Array, "B C T"], alive: Bool[Array, "B C"]
) -> tuple[Bool[Array, "B C C"], Bool[Array, "B C"]]:
  """Returns which pairs of candidates are equal, and the first of each group.

  Only candidates that are `alive` count.
  """
  same = jnp.all(tokens[:, :, None] == tokens[:, None, :], axis=-1)
  same &= alive[:, :, None] & alive[:, None, :]
  before = jnp.tril(same, -1)  # one with a lower number is the same
  return same, alive & ~jnp.any(before, axis=-1)


def hf_ranking(
  prior: Float[Array, "B K"],
  given: Float[Array, "B C T K"],
  total: Float[Array, "B C T K"],
  candidates: Found,
  settings: GenerationSettings,
  label_smoothing: float,
  vocab_size: int,
) -> Float[Array, "B C"]:
  """Returns minus the loss that Hugging Face ranks candidates by.

  `RagSequenceForGeneration.get_nll` with exclude_bos_score=True. The prior is
  added at the second token, so it is lost where that is padding.

  Args:
    prior: log p(z|x).
    given: log p(y_t | x, z, y_<t), also of the end tokens after the end.
    total: the sum of log p(v | x, z, y_<t) over the vocabulary.
    candidates: are ranked.
    settings: of the search: pad and bos token.
    label_smoothing: epsilon of training.
    vocab_size: V.
  """
  tokens = candidates.tokens
  longest = jnp.max(candidates.lengths, axis=1)[:, None, None]
  steps = jnp.arange(tokens.shape[-1])
  counts = (tokens != settings.pad_id) & (steps < longest)  # B C T
  at_second = jnp.where(steps == 1, 1.0, 0.0)[:, None] * prior[:, None, None]
  log_probs = jnp.where(counts[..., None], given + at_second, 0.0)
  ranking = jnp.sum(log_probs, axis=2)  # B C K
  if settings.bos_token_id is not None:
    first_is_bos = jnp.all(tokens[:, :, 0] == settings.bos_token_id, axis=1)
    without = jnp.sum(log_probs[:, :, 1:], axis=2)
    ranking = jnp.where(first_is_bos[:, None, None], without, ranking)
  ranking = jax.nn.logsumexp(ranking, axis=-1)
  if label_smoothing:
    smooth = jnp.where(counts[..., None], total + vocab_size * at_second, 0.0)
    smooth = jax.nn.logsumexp(jnp.sum(smooth, axis=2), axis=-1)
    ranking *= 1 - label_smoothing
    ranking += label_smoothing / vocab_size * smooth
  return ranking
