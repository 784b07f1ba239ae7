"""Greedy search, sampling, beam search and beam sampling, compiled.

In: a `Scorer`, which scores the next token, and the settings. Out: `Found`:
sequences, their scores, and the log-probability of each token given each
document. One `lax.while_loop` writes for the whole batch, and ends when every
row has ended; no row's result depends on the others.

The algorithm is that of transformers 5.23, `generation/utils.py`: `_sample`
and `_beam_search`, constants and order of operations included. Between equal
values, transformers takes what `torch.topk` happens to return; here the lowest
index wins.
"""

import dataclasses
import typing
from typing import Any, Protocol, runtime_checkable

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree
import numpy as np

from rag_jax.decoding.logits import MIN
from rag_jax.decoding.logits import PrefixTrie
from rag_jax.decoding.logits import process
from rag_jax.decoding.logits import top_k
from rag_jax.decoding.logits import warp
from rag_jax.decoding.settings import GenerationSettings

# Hugging Face's score of a beam or a sequence that does not exist yet; it is
# also added to the score of one that may not be chosen. Finite, so that sums
# stay finite.
ABSENT = -1e9


@runtime_checkable
class Scorer(Protocol):
  """Scores the next token of B rows with W beams each."""

  def step(
    self, tokens: Int[Array, "B W"], position: Int[Array, ""], cache: PyTree
  ) -> tuple[Float[Array, "B W V"], PyTree, PyTree]:
    """Returns the scores after `tokens`, details for `explain`, the cache.

    For beam search the scores are log-probabilities. For greedy search and
    sampling they may be logits, to which Hugging Face applies the settings.
    """
    ...

  def reorder(self, cache: PyTree, beams: Int[Array, "B W"]) -> PyTree:
    """Returns the cache whose beam w continues the old beam `beams[w]`."""
    ...

  def explain(
    self, details: PyTree, beams: Int[Array, "B n"], tokens: Int[Array, "B n"]
  ) -> Float[Array, "B n K"]:
    """Returns log p(token | document) of `tokens` after `beams`."""
    ...


# Unchecked, because JAX makes it of shapes and of numpy's arrays too.
@typing.no_type_check
@flax.struct.dataclass
class Found:
  """The sequences that a search wrote, R per row, the best first."""

  tokens: Int[Array, "B R T"]  # without the start token
  lengths: Int[Array, "B R"]  # with the end token; 0: no such sequence
  scores: Float[Array, "B R"]  # of beams: sum of scores / length ** penalty
  evidence: Float[Array, "B R T K"]  # log p(token | document), 0 after the end


@typing.no_type_check
@flax.struct.dataclass
class Sequences:
  """Sequences while they are written."""

  written: Int[Array, "B W L"]  # with the start token: L = T + 1
  evidence: Float[Array, "B W T K"]
  lengths: Int[Array, "B W"]
  scores: Float[Array, "B W"]
  finished: Bool[Array, "B W"]

  def pick(self, indices: Int[Array, "B n"]) -> "Sequences":
    """Returns the sequences at `indices`."""
    return jax.tree.map(lambda x: _pick(x, indices), self)


@typing.no_type_check
@flax.struct.dataclass
class SearchState:
  """Everything the loop carries, and streaming keeps between its chunks."""

  position: Int[Array, ""]  # of the last token written; 0 is the start token
  running: Sequences
  ended: Sequences | None  # the best that have ended; beam search only
  active: Bool[Array, "B"]  # rows that can still change
  nodes: Int[Array, "B W"] | None  # in the trie
  cache: Any
  key: Any  # of the random numbers


def _pick(x: Array, indices: Int[Array, "B n"]) -> Array:
  """Returns the rows `indices` of axis 1."""
  return x[jnp.arange(len(x))[:, None], indices]


def _empty(
  batch_size: int,
  width: int,
  num_docs: int,
  start: Array,
  fill: int,
  steps: int,
) -> Sequences:
  shape = (batch_size, width)
  written = jnp.full((*shape, steps + 1), fill, jnp.int32)
  return Sequences(
    written=written.at[:, :, 0].set(start),
    evidence=jnp.zeros((*shape, steps, num_docs)),
    lengths=jnp.zeros(shape, jnp.int32),
    scores=jnp.zeros(shape),
    finished=jnp.zeros(shape, bool),
  )


class Search:
  """The loop over tokens for one kind of settings; everything here is traced.

  Attributes:
    settings: static; `seed` is not read, a key is passed instead.
    width: W, beams or independent samples of a row.
  """

  def __init__(
    self,
    settings: GenerationSettings,
    scorer: Scorer,
    trie: PrefixTrie | None = None,
    *,
    hf_parity: bool = False,
  ):
    """Prepares a search.

    Args:
      settings: checked already.
      scorer: the model.
      trie: the sequences that may be written; None allows any.
      hf_parity: returns beams as Hugging Face does. There, end tokens follow
        the end if padding is token 0. If there are fewer sequences than beams,
        some are returned again, with a score of -1e9 divided by their length;
        without `hf_parity` these have length 0.
    """
    self.settings = settings
    self.width = max(settings.num_beams, settings.num_return_sequences)
    self._scorer = scorer
    self._trie = trie
    self._hf_parity = hf_parity
    lengths = np.maximum(np.arange(self._steps + 1), 1).astype(np.float64)
    self._penalties = (lengths**settings.length_penalty).astype(np.float32)

  @property
  def _steps(self) -> int:
    return self.settings.num_steps

  @property
  def _beams(self) -> bool:
    return self.settings.num_beams > 1

  def start(
    self, cache: PyTree, batch_size: int, num_docs: int, key: Any
  ) -> SearchState:
    """Returns the state before the first token.

    Args:
      cache: of `batch_size` rows and `width` beams.
      batch_size: B.
      num_docs: K, the documents in what `Scorer.explain` returns.
      key: of the random numbers that sampling needs.
    """
    start = jnp.asarray(self.settings.start_id)
    fill = self.settings.pad_id
    if self._hf_parity and self._beams and not fill:
      fill = (*self.settings.eos_token_id, fill)[0]
    empty = _empty(batch_size, self.width, num_docs, start, fill, self._steps)
    running, ended = empty, None
    if self._beams:
      # Before the first token all beams are equal, so only one may continue.
      first = jnp.arange(self.width) == 0
      running = dataclasses.replace(
        empty, scores=jnp.where(first, empty.scores, ABSENT)
      )
      ended = dataclasses.replace(empty, scores=empty.scores + ABSENT)
    nodes = jnp.zeros((batch_size, self.width), jnp.int32)
    return SearchState(
      position=jnp.zeros((), jnp.int32),
      running=running,
      ended=ended,
      active=jnp.ones(batch_size, bool),
      nodes=None if self._trie is None else nodes,
      cache=cache,
      key=key,
    )

  def advance(
    self, state: SearchState, limit: int | Int[Array, ""]
  ) -> SearchState:
    """Returns the state after `limit` tokens, or when all rows have ended."""
    return jax.lax.while_loop(
      lambda s: (
        (s.position < jnp.minimum(limit, self._steps)) & jnp.any(s.active)
      ),
      self._beam_step if self._beams else self._single_step,
      state,
    )

  def finish(self, state: SearchState) -> Found:
    """Returns the best sequences of the final state."""
    best = state.running if state.ended is None else state.ended
    returned = self.settings.num_return_sequences
    best = jax.tree.map(lambda x: x[:, :returned], best)
    found = Found(
      best.written[:, :, 1:], best.lengths, best.scores, best.evidence
    )
    if not self._beams or self._hf_parity:
      return found
    total = best.scores * jnp.asarray(self._penalties)[best.lengths]
    there = total > ABSENT / 2
    return Found(
      tokens=jnp.where(there[..., None], found.tokens, self.settings.pad_id),
      lengths=jnp.where(there, found.lengths, 0),
      scores=jnp.where(there, found.scores, MIN),
      evidence=jnp.where(there[..., None, None], found.evidence, 0.0),
    )

  def _scores(self, state: SearchState) -> tuple[Array, PyTree, PyTree]:
    """Returns the scores after the settings, details and cache."""
    written, position = state.running.written, state.position
    last = jax.lax.dynamic_index_in_dim(written, position, 2, keepdims=False)
    scores, details, cache = self._scorer.step(last, position, state.cache)
    scores = process(
      scores, written, position, self.settings, self._trie, state.nodes
    )
    return scores, details, cache

  def _noise(self, state: SearchState, shape: tuple[int, ...]) -> Array:
    """Returns Gumbel noise: the argmax of scores plus noise is a sample.

    The n largest sums are a sample without replacement, in the order in which
    it was drawn: Kool et al. 2019, https://arxiv.org/abs/1903.06059.
    """
    return jax.random.gumbel(
      jax.random.fold_in(state.key, state.position), shape
    )

  def _is_end(self, tokens: Int[Array, "*n"]) -> Bool[Array, "*n"]:
    ends = self.settings.eos_token_id
    return jnp.any(tokens[..., None] == jnp.array(ends, jnp.int32), axis=-1)

  def _advance_nodes(self, nodes: Array | None, tokens: Array) -> Array | None:
    if self._trie is None or nodes is None:
      return None
    return self._trie.advance(nodes, tokens)

  def _single_step(self, state: SearchState) -> SearchState:
    """One token of greedy search or sampling."""
    running, position = state.running, state.position
    scores, details, cache = self._scores(state)
    b, w, v = scores.shape
    if self.settings.do_sample:
      values, ids = warp(scores, self.settings)
      choice = jnp.argmax(
        values + self._noise(state, values.shape), axis=-1, keepdims=True
      )
      tokens = choice if ids is None else jnp.take_along_axis(ids, choice, 2)
      tokens = tokens[..., 0].astype(jnp.int32)
    else:
      tokens = top_k(scores.reshape(b * w, v), 1)[1].reshape(b, w)
    rows = jnp.broadcast_to(jnp.arange(w), (b, w))
    evidence = self._scorer.explain(details, rows, tokens)  # B W K
    chosen = jnp.take_along_axis(scores, tokens[..., None], axis=-1)[..., 0]
    tokens = jnp.where(running.finished, self.settings.pad_id, tokens)
    going = ~running.finished
    finished = running.finished | self._is_end(tokens)
    return dataclasses.replace(
      state,
      position=position + 1,
      running=Sequences(
        written=running.written.at[:, :, position + 1].set(tokens),
        evidence=running.evidence.at[:, :, position].set(
          jnp.where(going[..., None], evidence, 0.0)
        ),
        lengths=running.lengths + going,
        scores=running.scores + jnp.where(going, chosen, 0.0),
        finished=finished,
      ),
      active=~jnp.all(finished, axis=1),
      nodes=self._advance_nodes(state.nodes, tokens),
      cache=cache,
    )

  def _continuations(
    self, state: SearchState, scores: Float[Array, "B W V"], num: int
  ) -> tuple[Float[Array, "B n"], Int[Array, "B n"], Int[Array, "B n"]]:
    """Returns the best `num` continuations: score, beam and token.

    When sampling, `num` continuations that were drawn, in their order.
    """
    ids = None
    if self.settings.do_sample:
      scores, ids = warp(scores, self.settings)
    b, w, m = scores.shape
    total = (scores + state.running.scores[..., None]).reshape(b, w * m)
    if self.settings.do_sample:
      noisy = total + self._noise(state, total.shape)
      _, indices = top_k(noisy, num)
      values = jnp.take_along_axis(total, indices, axis=1)
    else:
      values, indices = top_k(total, num)
    beams, tokens = indices // m, indices % m
    if ids is not None:
      tokens = ids[jnp.arange(b)[:, None], beams, tokens]
    return values, beams, tokens

  def _beam_step(self, state: SearchState) -> SearchState:
    """One token of beam search: `_beam_search` of transformers."""
    settings, width = self.settings, self.width
    running, ended, position = state.running, state.ended, state.position
    assert ended is not None
    scores, details, cache = self._scores(state)
    # More than W, so that W are left to continue if others end.
    num = max(2, 1 + len(settings.eos_token_id)) * width
    values, beams, tokens = self._continuations(state, scores, num)
    evidence = self._scorer.explain(details, beams, tokens)  # B n K
    grown = running.pick(beams)
    grown = dataclasses.replace(
      grown,
      written=grown.written.at[:, :, position + 1].set(tokens),
      evidence=grown.evidence.at[:, :, position].set(evidence),
      lengths=grown.lengths + 1,
    )
    ends = self._is_end(tokens) | (position + 1 == self._steps)  # B n

    # The best that have not ended continue.
    going = values + jnp.where(ends, ABSENT, 0.0)
    going, order = jax.lax.top_k(going, width)
    next_beams = jnp.take_along_axis(beams, order, axis=1)
    next_tokens = jnp.take_along_axis(tokens, order, axis=1)
    next_running = dataclasses.replace(grown.pick(order), scores=going)

    # Of the first W, those that end now compete with those that ended earlier.
    ends_now = ends & (jnp.arange(num) < width)
    penalties = jnp.asarray(self._penalties)
    final = values / penalties[position + 1]
    final += jnp.where(state.active[:, None], 0.0, ABSENT)
    final += jnp.where(ends_now, 0.0, ABSENT)
    grown = dataclasses.replace(grown, scores=final, finished=ends_now)
    merged = jax.tree.map(
      lambda x, y: jnp.concatenate([x, y], axis=1), ended, grown
    )
    ended = merged.pick(jax.lax.top_k(merged.scores, width)[1])

    # A row is active while a running beam could still beat the worst sequence
    # that has ended, for an assumed final length.
    never = settings.early_stopping == "never" and settings.length_penalty > 0
    length = self._steps if never else position + 1
    possible = going[:, :1] / penalties[length]
    worst = jnp.min(ended.scores, axis=1, keepdims=True)
    worst = jnp.where(ended.finished, worst, ABSENT)
    active = state.active & jnp.any(possible > worst, axis=1)
    if settings.early_stopping is True:
      active &= ~jnp.all(ended.finished, axis=1)
    active &= ~jnp.all(ends, axis=1)

    nodes = state.nodes
    if nodes is not None:
      nodes = jnp.take_along_axis(nodes, next_beams, axis=1)
    return dataclasses.replace(
      state,
      position=position + 1,
      running=next_running,
      ended=ended,
      active=active,
      nodes=self._advance_nodes(nodes, next_tokens),
      cache=self._scorer.reorder(cache, next_beams),
    )
