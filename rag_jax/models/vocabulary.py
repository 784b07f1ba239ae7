"""Log-probabilities of target tokens, without storing all logits at once.

In: the decoder's final states [N, T, D], and the output table [V, D]; their
inner products are the logits. Out: [N, T], N = B*K, for
`losses.marginal_token_nll` and `losses.marginal_sequence_nll`.

The logits of 40 targets of 25 tokens over 50,000 words take 200 MB, and several
times that with the values kept for the gradient. Here they are computed for one
chunk of the vocabulary at a time, forward and backward. The backward pass
recomputes them, which is one matrix product in four.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_LOWEST = jnp.finfo(jnp.float32).min


def chunked_token_log_probs(
  hidden: Float[Array, "N T D"],
  table: Float[Array, "V D"],
  bias: Float[Array, "V"] | None,
  target_tokens: Int[Array, "N T"],
  chunk_size: int,
) -> Float[Array, "N T"]:
  """Returns log softmax(hidden @ table.T + bias) of the target tokens.

  Values and gradients by `hidden`, `table` and `bias` are those of
  `losses.token_log_probs` of the logits. Products are computed in the dtype of
  `hidden` and summed in float32.

  Args:
    hidden: activations of the decoder, scaled if its output is scaled.
    table: token embeddings, or the transposed kernel of the output layer. If
      its rows are split over devices, each chunk is gathered.
    bias: added to the logits of each token; None adds nothing.
    target_tokens: the tokens to predict.
    chunk_size: maximum number of table rows whose logits exist at a time. If V
      or more, all logits are kept for the gradient: faster if they fit.

  Raises:
    ValueError: `chunk_size` is not positive.
  """
  return chunked_log_probs(hidden, table, bias, target_tokens, chunk_size)[0]


def chunked_log_probs(
  hidden: Float[Array, "N T D"],
  table: Float[Array, "V D"],
  bias: Float[Array, "V"] | None,
  target_tokens: Int[Array, "N T"],
  chunk_size: int,
  soft_cap: float = 0.0,
) -> tuple[Float[Array, "N T"], Float[Array, "N T"]]:
  """Returns log-probabilities of the target tokens, and the vocabulary's mean.

  The mean is `losses.mean_log_probs` of the logits, for label smoothing. Logits
  x are soft_cap * tanh(x / soft_cap), unless that is 0. Other arguments and
  errors as in `chunked_token_log_probs`.
  """
  if chunk_size < 1:
    raise ValueError(
      f"chunk_size={chunk_size} leaves no logits to compute; expected at least"
      " 1. A few thousand is a good size; the size of the vocabulary turns"
      " chunking off."
    )
  n, t, d = hidden.shape
  if bias is None:
    bias = jnp.zeros(len(table), jnp.float32)
  rows, tokens = hidden.reshape(n * t, d), target_tokens.reshape(n * t)
  if chunk_size >= len(table):
    log_probs, mean = _whole_log_probs(rows, table, bias, tokens, soft_cap)
  else:
    chunk = _Chunk(_even(chunk_size, len(table)), soft_cap)
    log_probs, mean = _log_probs(chunk, rows, table, bias, tokens)
  return log_probs.reshape(n, t), mean.reshape(n, t)


class _Chunk(NamedTuple):
  """How logits are computed; static."""

  size: int  # tokens of the vocabulary at a time
  soft_cap: float


def capped(logits: Float[Array, "*n"], soft_cap: float) -> Float[Array, "*n"]:
  """Returns soft_cap * tanh(logits / soft_cap); 0.0: no cap."""
  return soft_cap * jnp.tanh(logits / soft_cap) if soft_cap else logits


def _whole_log_probs(
  hidden: Array, table: Array, bias: Array, tokens: Array, soft_cap: float
) -> tuple[Array, Array]:
  """Returns both results [M], M = N*T; the logits are kept for the gradient."""
  logits = jnp.einsum(
    "MD,VD->MV",
    hidden,
    table.astype(hidden.dtype),
    preferred_element_type="float32",
  )
  logits = capped(logits + bias.astype(jnp.float32), soft_cap)
  # Not a gather, whose gradient would be a scatter; this one can be fused.
  here = tokens[:, None] == jnp.arange(len(table))
  chosen = jnp.sum(logits, axis=-1, where=here)
  log_norm = jax.nn.logsumexp(logits, axis=-1)
  return chosen - log_norm, jnp.mean(logits, axis=-1) - log_norm


def _even(chunk_size: int, vocab_size: int) -> int:
  """Returns the size of the fewest equal chunks of at most `chunk_size`.

  Otherwise the last chunk could have few new rows at full cost. Rounded up to a
  multiple of 128, which is efficient on accelerators.
  """
  count = -(-vocab_size // chunk_size)
  size = -(-vocab_size // count)
  return min(chunk_size, vocab_size, -(-size // 128) * 128)


def _chunk(
  chunk: _Chunk, i: Array, hidden: Array, table: Array, bias: Array
) -> tuple[Array, Array, Array, Array]:
  """Returns chunk `i`: its first row, mask of new rows, rows and logits."""
  chunk_size = chunk.size
  # If V is not a multiple of the size, the last chunk starts early, so that all
  # have one size. Rows shared with the chunk before count only there.
  start = jnp.minimum(i * chunk_size, len(table) - chunk_size)
  new = start + jnp.arange(chunk_size) >= i * chunk_size
  rows = jax.lax.dynamic_slice_in_dim(table, start, chunk_size)
  rows = rows.astype(hidden.dtype)
  logits = jnp.einsum(
    "MD,VD->MV", hidden, rows, preferred_element_type="float32"
  )
  part = jax.lax.dynamic_slice_in_dim(bias, start, chunk_size)
  logits = capped(logits + part.astype(jnp.float32), chunk.soft_cap)
  logits = jnp.where(new, logits, _LOWEST)
  return start, new, rows, logits


def _forward(
  chunk: _Chunk, hidden: Array, table: Array, bias: Array, tokens: Array
) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
  """Returns both results [M], M = N*T, and what `_backward` needs."""

  def add(carry: tuple[Array, ...], i: Array) -> tuple[tuple[Array, ...], None]:
    largest, total, chosen, everything = carry
    start, new, _, logits = _chunk(chunk, i, hidden, table, bias)
    before, largest = largest, jnp.maximum(largest, jnp.max(logits, axis=-1))
    total *= jnp.exp(before - largest)
    total += jnp.sum(jnp.exp(logits - largest[:, None]), axis=-1)
    here = (tokens[:, None] == start + jnp.arange(chunk.size)) & new
    chosen += jnp.sum(logits, axis=-1, where=here)
    everything += jnp.sum(logits, axis=-1, where=new)
    return (largest, total, chosen, everything), None

  zeros = jnp.zeros(len(hidden), jnp.float32)
  chunks = jnp.arange(-(-len(table) // chunk.size))
  (largest, total, chosen, everything), _ = jax.lax.scan(
    add, (zeros + _LOWEST, zeros, zeros, zeros), chunks
  )
  log_norm = largest + jnp.log(total)
  results = chosen - log_norm, everything / len(table) - log_norm
  return results, (hidden, table, bias, tokens, log_norm)


def _backward(
  chunk: _Chunk, saved: tuple[Array, ...], by_results: tuple[Array, Array]
) -> tuple[Array, Array, Array, None]:
  """Returns the gradients; a logit's is (is target) minus its probability."""
  hidden, table, bias, tokens, log_norm = saved
  by_chosen, by_mean = (by[:, None] for by in by_results)

  def add(carry: tuple[Array, ...], i: Array) -> tuple[tuple[Array, ...], None]:
    by_hidden, by_table, by_bias = carry
    start, new, rows, logits = _chunk(chunk, i, hidden, table, bias)
    here = tokens[:, None] == start + jnp.arange(chunk.size)
    by_logits = jnp.where(here, by_chosen, 0.0) + by_mean / len(table)
    by_logits -= (by_chosen + by_mean) * jnp.exp(logits - log_norm[:, None])
    if chunk.soft_cap:  # the slope of tanh is 1 - tanh ** 2
      by_logits *= 1 - (logits / chunk.soft_cap) ** 2
    by_logits = jnp.where(new, by_logits, 0.0)
    low = by_logits.astype(hidden.dtype)
    by_hidden += jnp.einsum(
      "MV,VD->MD", low, rows, preferred_element_type="float32"
    )
    by_rows = jnp.einsum(
      "MV,MD->VD", low, hidden, preferred_element_type="float32"
    )
    part = jax.lax.dynamic_slice_in_dim(by_table, start, chunk.size)
    by_table = jax.lax.dynamic_update_slice_in_dim(
      by_table, part + by_rows, start, axis=0
    )
    part = jax.lax.dynamic_slice_in_dim(by_bias, start, chunk.size)
    by_bias = jax.lax.dynamic_update_slice_in_dim(
      by_bias, part + jnp.sum(by_logits, axis=0), start, axis=0
    )
    return (by_hidden, by_table, by_bias), None

  start = tuple(jnp.zeros(x.shape, jnp.float32) for x in (hidden, table, bias))
  chunks = jnp.arange(-(-len(table) // chunk.size))
  (by_hidden, by_table, by_bias), _ = jax.lax.scan(add, start, chunks)
  return (
    by_hidden.astype(hidden.dtype),
    by_table.astype(table.dtype),
    by_bias.astype(bias.dtype),
    None,
  )


def _primal(*args: Any) -> tuple[Array, Array]:
  return _forward(*args)[0]


_log_probs = jax.custom_vjp(_primal, nondiff_argnums=(0,))
_log_probs.defvjp(_forward, _backward)
