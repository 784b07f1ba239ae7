"""Applies the generation settings to the scores of the next token.

In: scores [B, W, V], logits or log-probabilities, and the tokens that each beam
has written. Out: scores of the same shape. The order is Hugging Face's:
repetition penalty, banned tokens, the trie, forced tokens; and for sampling,
temperature, top_k and top_p. All of it can be traced inside a loop.

What Hugging Face sets to -inf is `finfo.min` here. Both lose against every
other token, but finfo.min makes no NaN of a row where everything is banned.
"""

from collections.abc import Sequence
import typing

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from rag_jax.decoding.settings import GenerationSettings

MIN = float(np.finfo(np.float32).min)

_BLOCK = 256  # scores whose maximum is looked at first, in `top_k`
_FEW = 64  # children of a node of a trie


def top_k(
  x: Float[Array, "B N"], k: int
) -> tuple[Float[Array, "B k"], Int[Array, "B k"]]:
  """Returns the k largest values and where they stand, largest first.

  The result is that of `jax.lax.top_k`, ties included: the lowest index first.
  On a CPU, `jax.lax.top_k` visits the values one by one. Here the maxima of
  blocks tell which k blocks hold the k largest values: k maxima come before any
  element of another block, each larger, or as large with a lower index.
  """
  b, n = x.shape
  num_blocks = n // _BLOCK
  if num_blocks < 4 * k:
    values, indices = jax.lax.top_k(x, k)
    return values, indices.astype(jnp.int32)
  # If XLA fused the computation of `x` into the maxima, it would not vectorise.
  x = jax.lax.optimization_barrier(x)
  cut = num_blocks * _BLOCK
  blocks = x[:, :cut].reshape(b, num_blocks, _BLOCK)
  best = jnp.sort(jax.lax.top_k(blocks.max(axis=-1), k)[1], axis=-1)  # B k
  inside = jnp.take_along_axis(blocks, best[:, :, None], axis=1)
  at = best[:, :, None] * _BLOCK + jnp.arange(_BLOCK)
  # The values after the last whole block have the highest indices.
  rest = jnp.broadcast_to(jnp.arange(cut, n), (b, n - cut))
  candidates = jnp.concatenate([inside.reshape(b, -1), x[:, cut:]], axis=1)
  at = jnp.concatenate([at.reshape(b, -1), rest], axis=1)
  values, indices = jax.lax.top_k(candidates, k)
  return values, jnp.take_along_axis(at, indices, axis=1).astype(jnp.int32)


# Unchecked, because JAX makes it of shapes and of tracers too.
@typing.no_type_check
@flax.struct.dataclass
class PrefixTrie:
  """The sequences that may be written, as arrays for a compiled loop.

  Node 0 is the start. Node 1 stands for every sequence that has ended or left
  the trie: only the end token may follow it. The edges of a node are stored
  next to each other, in ascending order of their tokens: those of node n begin
  at `first[n]`.
  """

  edge_tokens: Int[Array, "E"]
  edge_nodes: Int[Array, "E"]  # where an edge leads
  first: Int[Array, "nodes+1"]
  most_children: int = flax.struct.field(pytree_node=False)

  @classmethod
  def from_sequences(
    cls, sequences: Sequence[Sequence[int]], eos_token_id: int
  ) -> "PrefixTrie":
    """Returns the trie of `sequences`; the end token may follow each of them.

    Args:
      sequences: token ids as they are generated: without the decoder's start
        token, but with a forced bos token. The end token is optional.
      eos_token_id: the end token.

    Raises:
      ValueError: no sequence, an empty one, or a negative id.
    """
    children: list[dict[int, int]] = [{}, {int(eos_token_id): 1}]
    for number, sequence in enumerate(sequences):
      ids = [int(i) for i in sequence]
      if ids[-1:] == [eos_token_id]:
        ids.pop()
      if not ids or min(ids) < 0:
        raise ValueError(
          f"sequence {number} of the trie is {list(sequence)}, expected one or"
          " more token ids from 0 on before the end token. Leave it out."
        )
      node = 0
      for i in ids:
        if i not in children[node]:
          children[node][i] = len(children)
          children.append({})
        node = children[node][i]
      children[node][int(eos_token_id)] = 1
    if not children[0]:
      raise ValueError(
        "the trie has no sequence, so nothing could be generated. Give at"
        " least one, or generate without a trie."
      )
    edges = [sorted(edges.items()) for edges in children]
    flat = np.array([edge for part in edges for edge in part], np.int32)
    sizes = [len(part) for part in edges]
    return cls(
      edge_tokens=jnp.asarray(flat[:, 0]),
      edge_nodes=jnp.asarray(flat[:, 1]),
      first=jnp.asarray(np.cumsum([0, *sizes], dtype=np.int32)),
      most_children=max(sizes),
    )

  def allowed(self, prefix: Sequence[int]) -> list[int]:
    """Returns the tokens that may follow `prefix`. Slow; not for a loop."""
    first = np.asarray(self.first)
    tokens, nodes = np.asarray(self.edge_tokens), np.asarray(self.edge_nodes)
    node = 0
    for i in prefix:
      part = slice(first[node], first[node + 1])
      match = nodes[part][tokens[part] == i]
      node = int(match[0]) if len(match) else 1
    return tokens[first[node] : first[node + 1]].tolist()

  def advance(
    self, nodes: Int[Array, "B W"], tokens: Int[Array, "B W"]
  ) -> Int[Array, "B W"]:
    """Returns the nodes that `tokens` lead to."""
    last = len(self.edge_tokens) - 1
    low, end = self.first[nodes], self.first[nodes + 1]
    high = end
    for _ in range(self.most_children.bit_length()):  # a binary search
      middle = (low + high) // 2
      right = (low < high) & (
        self.edge_tokens[jnp.minimum(middle, last)] < tokens
      )
      low, high = (
        jnp.where(right, middle + 1, low),
        jnp.where(right, high, middle),
      )
    at = jnp.minimum(low, last)
    found = (low < end) & (self.edge_tokens[at] == tokens)
    return jnp.where(found, self.edge_nodes[at], 1)

  def constrain(
    self,
    scores: Float[Array, "B W V"],
    nodes: Int[Array, "B W"],
    *,
    together: bool,
  ) -> Float[Array, "B W V"]:
    """Returns the scores of the tokens that may follow, and `MIN` elsewhere.

    If all of them are banned, for instance by the minimum length, they get the
    score 0 as in Hugging Face: the trie wins.

    Args:
      scores: of the next token.
      nodes: where each beam is in the trie.
      together: the trie wins only if the allowed tokens of all beams of a
        question are banned; False decides per beam.
    """
    if self.most_children <= 4 * _FEW:
      return self._constrain(scores, nodes, together, self.most_children)
    # The root of a large trie has many children, the other nodes only a few.
    most = jnp.max(self.first[nodes + 1] - self.first[nodes])
    return jax.lax.cond(
      most <= _FEW,
      lambda: self._constrain(scores, nodes, together, _FEW),
      lambda: self._constrain(scores, nodes, together, self.most_children),
    )

  def _constrain(
    self, scores: Array, nodes: Array, together: bool, most: int
  ) -> Array:
    at = self.first[nodes][..., None] + jnp.arange(most)
    tokens = self.edge_tokens[jnp.minimum(at, len(self.edge_tokens) - 1)]
    inside = at < self.first[nodes + 1][..., None]
    tokens = jnp.where(inside, tokens, scores.shape[-1])  # B W most
    allowed = _gather(scores, tokens)
    banned = jnp.max(allowed, axis=-1, keepdims=True) <= MIN
    if together:
      banned = jnp.all(banned, axis=1, keepdims=True)
    allowed = jnp.where(banned, 0.0, allowed)
    return _scatter(jnp.full_like(scores, MIN), tokens, allowed)


def _gather(
  scores: Float[Array, "B W V"], tokens: Int[Array, "B W n"]
) -> Float[Array, "B W n"]:
  """Returns the scores of `tokens`; `MIN` for the token V."""
  b, w, _ = scores.shape
  rows = jnp.arange(b)[:, None, None], jnp.arange(w)[:, None]
  return scores.at[*rows, tokens].get(mode="fill", fill_value=MIN)


def _scatter(
  scores: Float[Array, "B W V"],
  tokens: Int[Array, "B W n"],
  values: Float[Array, "B W n"] | float,
) -> Float[Array, "B W V"]:
  """Returns `scores` with `values` at `tokens`; the token V is ignored."""
  b, w, _ = scores.shape
  rows = jnp.arange(b)[:, None, None], jnp.arange(w)[:, None]
  return scores.at[*rows, tokens].set(values, mode="drop")


def penalize_repetition(
  scores: Float[Array, "B W V"],
  written: Int[Array, "B W L"],
  position: Int[Array, ""],
  penalty: float,
) -> Float[Array, "B W V"]:
  """Returns the scores, lowered for the tokens written up to `position`.

  Keskar et al. 2019, https://arxiv.org/abs/1909.05858, section 4.1. As in
  Hugging Face, the decoder's start token is penalised too.
  """
  seen = jnp.arange(written.shape[-1]) <= position
  tokens = jnp.where(seen, written, scores.shape[-1])
  old = _gather(scores, tokens)
  return _scatter(
    scores, tokens, jnp.where(old < 0, old * penalty, old / penalty)
  )


def repeated_ngrams(
  written: Int[Array, "B W L"],
  position: Int[Array, ""],
  size: int,
  vocab_size: int,
) -> Int[Array, "B W n"]:
  """Returns the tokens that would repeat an n-gram of the sequence.

  `vocab_size` stands for no token. The last size - 1 tokens are compared with
  each window of the sequence, so that no array as large as V is needed.
  """
  num_windows = written.shape[-1] - size + 1
  if num_windows < 1:
    return jnp.full((*written.shape[:2], 1), vocab_size, jnp.int32)
  # Clamped at the start of a sequence, where no window is complete yet.
  suffix = jax.lax.dynamic_slice_in_dim(
    written, position - size + 2, size - 1, axis=2
  )
  matches = jnp.arange(num_windows) + size - 1 <= position
  matches = jnp.broadcast_to(matches, (*written.shape[:2], num_windows))
  for i in range(size - 1):
    window = written[:, :, i : i + num_windows]
    matches &= window == suffix[:, :, i : i + 1]
  return jnp.where(matches, written[:, :, size - 1 :], vocab_size)


def _bad_words(
  written: Int[Array, "B W L"],
  position: Int[Array, ""],
  settings: GenerationSettings,
  vocab_size: int,
) -> list[Int[Array, "B W n"]]:
  """Returns the tokens that would complete a bad word; V stands for none."""
  # The end token alone is never banned, as in Hugging Face.
  ends = {(token,) for token in settings.eos_token_id}
  words = [word for word in settings.bad_words_ids if word not in ends]
  groups = []
  for length in sorted({len(word) for word in words}):
    if length > written.shape[-1]:
      continue
    group = np.array([w for w in words if len(w) == length], np.int32)
    suffix = jax.lax.dynamic_slice_in_dim(
      written, position - length + 2, length - 1, axis=2
    )
    matches = jnp.all(suffix[:, :, None] == group[:, :-1], axis=-1)
    matches &= position + 1 >= length - 1  # enough tokens are there
    groups.append(jnp.where(matches, group[:, -1], vocab_size))
  return groups


def process(
  scores: Float[Array, "B W V"],
  written: Int[Array, "B W L"],
  position: Int[Array, ""],
  settings: GenerationSettings,
  trie: PrefixTrie | None = None,
  nodes: Int[Array, "B W"] | None = None,
) -> Float[Array, "B W V"]:
  """Returns the scores after all settings but those of sampling.

  Args:
    scores: logits (greedy, sampling) or log-probabilities (beams).
    written: the decoder's start token and the tokens after it. Values after
      `position` are ignored.
    position: of the last token written; 0 is the start token.
    settings: static.
    trie: the sequences that may be written.
    nodes: where each beam is in the trie.
  """
  b, w, v = scores.shape
  if settings.repetition_penalty != 1.0:
    scores = penalize_repetition(
      scores, written, position, settings.repetition_penalty
    )

  banned = []
  if settings.no_repeat_ngram_size:
    banned.append(
      repeated_ngrams(written, position, settings.no_repeat_ngram_size, v)
    )
  if settings.bad_words_ids:
    banned += _bad_words(written, position, settings, v)
  if settings.min_steps and settings.eos_token_id:
    ends = jnp.array(settings.eos_token_id, jnp.int32)
    ends = jnp.where(position < settings.min_steps, ends, v)
    banned.append(jnp.broadcast_to(ends, (b, w, len(ends))))
  if banned:
    scores = _scatter(scores, jnp.concatenate(banned, axis=-1), MIN)

  if trie is not None:
    assert nodes is not None
    scores = trie.constrain(scores, nodes, together=settings.num_beams > 1)

  if settings.forced_bos_token_id is not None:
    forced = _only(settings.forced_bos_token_id, vocab_size=v)
    scores = jnp.where(position == 0, forced, scores)
  if settings.forced_eos_token_id:
    forced = _only(*settings.forced_eos_token_id, vocab_size=v)
    scores = jnp.where(position == settings.num_steps - 1, forced, scores)
  return scores


def _only(*tokens: int, vocab_size: int) -> Float[Array, "V"]:
  """Returns the score 0 for `tokens` and `MIN` elsewhere."""
  every = jnp.arange(vocab_size)
  chosen = jnp.zeros(vocab_size, bool)
  for token in tokens:
    chosen |= every == token
  return jnp.where(chosen, 0.0, MIN)


def warp(
  scores: Float[Array, "B W V"], settings: GenerationSettings
) -> tuple[Float[Array, "B W n"], Int[Array, "B W n"] | None]:
  """Returns the scores to sample from, and the tokens that they belong to.

  With top_k, n = k scores are left, the largest first. Without it, all V are
  left and the tokens are None. Tokens that top_p excludes have the score `MIN`.

  If several tokens share the k-th score, Hugging Face keeps all of them; this
  keeps those with the lowest ids, k in all.
  """
  b, w, v = scores.shape
  # Beams need a token to continue with if all end tokens are sampled.
  ends = max(len(settings.eos_token_id), 1)
  least = 1 + ends if settings.num_beams > 1 else 1
  tokens = None
  if settings.top_k:
    k = min(max(settings.top_k, least), v)
    flat, at = top_k(scores.reshape(b * w, v), k)
    scores, tokens = flat.reshape(b, w, k), at.reshape(b, w, k)
  if settings.temperature != 1.0:
    # A banned score stays finite: MIN / 0.5 would be -inf.
    scores = jnp.maximum(scores / settings.temperature, MIN)
  if settings.top_p < 1.0:
    # Summed from the smallest upwards, as in Hugging Face; the largest `least`
    # are always kept.
    ascending = (
      jnp.sort(scores, axis=-1) if tokens is None else scores[..., ::-1]
    )
    mass = jnp.cumsum(jax.nn.softmax(ascending, axis=-1), axis=-1)
    out = mass[..., :-least] <= 1 - settings.top_p
    num_out = jnp.sum(out, axis=-1, keepdims=True)
    smallest = jnp.take_along_axis(ascending, num_out, axis=-1)
    scores = jnp.where(scores < smallest, MIN, scores)
  return scores, tokens
