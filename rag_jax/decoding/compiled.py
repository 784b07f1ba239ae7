"""The compiled functions of decoding: encode, search, rank.

In: parameters and arrays. Out: arrays. Static values are in a `Plan` or in the
settings, so that decoders with equal ones share their compiled programs.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree
import numpy as np

from rag_jax.decoding.candidates import CandidateTree
from rag_jax.decoding.candidates import score_tree
from rag_jax.decoding.logits import PrefixTrie
from rag_jax.decoding.memory import Memory
from rag_jax.decoding.ranking import Generated
from rag_jax.decoding.ranking import HfParity
from rag_jax.decoding.ranking import rank_fast
from rag_jax.decoding.ranking import rank_thorough
from rag_jax.decoding.scorers import DocScorer
from rag_jax.decoding.scorers import sequence_log_probs
from rag_jax.decoding.search import Found
from rag_jax.decoding.search import Search
from rag_jax.decoding.search import SearchState
from rag_jax.decoding.settings import GenerationSettings
from rag_jax.losses import doc_log_prior
from rag_jax.models.causal import CausalGenerator
from rag_jax.models.rag import AnyGenerator

_MANY_CONTEXTS = 16  # B*K from which on they are encoded by length
_ONE_LENGTH = 64  # tokens that contexts are not shortened to less than
_PARTS = 4  # that contexts are encoded in
_NUM_LENGTHS = 8  # that these are padded to


@dataclasses.dataclass(frozen=True)
class Plan:
  """The static values that a search is compiled for."""

  generator: AnyGenerator
  settings: GenerationSettings
  marginal: bool  # over K documents at each token; otherwise K = 1
  hf_parity: bool = False  # see `Search`

  def search(
    self,
    params: PyTree,
    doc_log_probs: Float[Array, "B K"] | None,
    trie: PrefixTrie | None,
  ) -> Search:
    """Returns the search, inside a traced function."""
    scorer = DocScorer(
      self.generator,
      params,
      doc_log_probs if self.marginal else None,
      normalize=self.settings.num_beams > 1,
    )
    return Search(self.settings, scorer, trie, hf_parity=self.hf_parity)

  def start(
    self,
    search: Search,
    params: PyTree,
    memory: Memory,
    key: Any,
  ) -> SearchState:
    """Returns the state before the first token, inside a traced function."""
    cache = self.generator.apply(
      {"params": params},
      *memory.arrays,
      search.width,
      self.settings.num_steps,
      **memory.also,
      method="init_cache",
    )
    b, k = memory.tokens.shape[:2]
    return search.start(cache, b, k, key)


def encode(
  generator: AnyGenerator,
  params: PyTree,
  context_tokens: Int[Array | np.ndarray, "B K C"],
  context_mask: Bool[Array | np.ndarray, "B K C"],
  num_shared: int = 0,
) -> Memory:
  """Returns what the decoder looks at in each context.

  Of many contexts in host memory the shorter ones are padded to fewer tokens
  than C; what is returned for padding is then 0. Prompts there are cut to about
  the longest of them.

  Args:
    generator: if it is a decoder alone, it reads what all contexts begin with
      only once.
    params: of the generator.
    context_tokens: of the contexts.
    context_mask: True on real tokens.
    num_shared: the number of tokens that all contexts begin with.
  """
  shared = None
  if num_shared and isinstance(generator, CausalGenerator):
    shared = _encode_shared(generator, num_shared, params, context_tokens)
    context_tokens = context_tokens[:, :, num_shared:]
    context_mask = context_mask[:, :, num_shared:]
  b, k, c = context_tokens.shape
  if not isinstance(context_mask, np.ndarray):
    return _encode(generator, params, context_tokens, context_mask, shared)
  if isinstance(generator, CausalGenerator):
    c = min(_length(int(_ends(context_mask).max())), c)
    context_tokens = context_tokens[:, :, :c]
    context_mask = context_mask[:, :, :c]
  if b * k >= _MANY_CONTEXTS and c > _ONE_LENGTH:
    return _encode_by_length(
      generator, params, context_tokens, context_mask, shared
    )
  return _encode(generator, params, context_tokens, context_mask, shared)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _encode_shared(
  generator: CausalGenerator,
  num_shared: int,
  params: PyTree,
  context_tokens: Int[Array, "B K C"],
) -> PyTree[Float[Array, "1 ..."]]:
  """Returns the keys and values of what all contexts begin with."""
  tokens = context_tokens[0, :1, :num_shared]
  return generator.apply(
    {"params": params}, tokens, jnp.ones_like(tokens, bool), method="encode"
  )


def _ends(mask: Bool[np.ndarray, "*B C"]) -> Int[np.ndarray, "*B"]:
  """Returns the number of places up to the last real token, at least 1."""
  return np.max(np.where(mask, np.arange(1, mask.shape[-1] + 1), 1), axis=-1)


def _length(longest: int) -> int:
  """Returns `longest` rounded up by an eighth at most, to one of few sizes."""
  step = max(2 ** (longest.bit_length() - 4), 16)
  return -(-longest // step) * step


def _encode_by_length(
  generator: AnyGenerator,
  params: PyTree,
  context_tokens: Int[Array | np.ndarray, "B K C"],
  context_mask: Bool[np.ndarray, "B K C"],
  shared: PyTree[Float[Array, "1 ..."]] | None,
) -> Memory:
  """Returns what `_encode` does; compiles `_NUM_LENGTHS` programs at most."""
  b, k, c = context_tokens.shape
  tokens = np.asarray(context_tokens).reshape(b * k, c)
  mask = context_mask.reshape(b * k, c)
  lengths = _ends(mask)
  order = np.argsort(lengths, kind="stable")
  num, step = -(-b * k // _PARTS), -(-c // _NUM_LENGTHS)
  shapes: Any = jax.eval_shape(
    functools.partial(_apply_encode, generator), params, tokens, mask, shared
  )
  states = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  for start in range(0, b * k, num):
    # Filled up with the last, so that all parts have one shape.
    rows = order[np.minimum(np.arange(start, start + num), b * k - 1)]
    width = min(-(-lengths[rows[-1]] // step) * step, c)
    part = tokens[rows, :width], mask[rows, :width]
    states = _encode_rows(generator, params, states, *part, rows, shared)
  memory = Memory(states, jnp.asarray(mask), jnp.asarray(tokens), shared)
  return memory.change(lambda x: x.reshape(b, k, *x.shape[1:]))


def _apply_encode(
  generator: AnyGenerator,
  params: PyTree,
  tokens: Int[Array, "N C"],
  mask: Bool[Array, "N C"],
  shared: PyTree[Float[Array, "1 ..."]] | None,
) -> PyTree[Float[Array, "N ..."]]:
  also = {} if shared is None else {"shared": shared}
  return generator.apply(
    {"params": params}, tokens, mask, method="encode", **also
  )


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _encode_rows(
  generator: AnyGenerator,
  params: PyTree,
  states: PyTree[Float[Array, "N ..."]],
  tokens: Int[Array, "M S"],
  mask: Bool[Array, "M S"],
  rows: Int[Array, "M"],
  shared: PyTree[Float[Array, "1 ..."]] | None,
) -> PyTree[Float[Array, "N ..."]]:
  """Returns `states` with those of some contexts of at most S tokens."""

  def put(all_rows: Array, made: Array) -> Array:
    short = zip(all_rows.shape[1:], made.shape[1:], strict=True)
    padding = [(0, 0), *((0, long - size) for long, size in short)]
    return all_rows.at[rows].set(jnp.pad(made, padding))

  made = _apply_encode(generator, params, tokens, mask, shared)
  return jax.tree.map(put, states, made)


@functools.partial(jax.jit, static_argnums=0)
def _encode(
  generator: AnyGenerator,
  params: PyTree,
  context_tokens: Int[Array, "B K C"],
  context_mask: Bool[Array, "B K C"],
  shared: PyTree[Float[Array, "1 ..."]] | None,
) -> Memory:
  b, k, c = context_tokens.shape
  tokens = context_tokens.reshape(b * k, c)
  mask = context_mask.reshape(b * k, c)
  states = _apply_encode(generator, params, tokens, mask, shared)
  memory = Memory(states, mask, tokens, shared)
  return memory.change(lambda x: x.reshape(b, k, *x.shape[1:]))


@jax.jit
def best_doc(
  doc_scores: Float[Array, "B K"],
  context_tokens: Int[Array, "B K C"],
  context_mask: Bool[Array, "B K C"],
) -> tuple[Float[Array, "B 1"], Int[Array, "B 1 C"], Bool[Array, "B 1 C"]]:
  """Returns the arrays of the document with the highest score."""
  rows = jnp.arange(len(doc_scores))
  best = jnp.argmax(doc_scores, axis=1)
  return (
    doc_scores[rows, best][:, None],
    context_tokens[rows, best][:, None],
    context_mask[rows, best][:, None],
  )


@functools.partial(jax.jit, static_argnums=0)
def decode(
  plan: Plan,
  params: PyTree,
  trie: PrefixTrie | None,
  doc_scores: Float[Array, "B K"],
  memory: Memory,
  key: Any,
) -> Generated:
  """Searches with all documents of a question together."""
  prior = doc_log_prior(doc_scores)
  search = plan.search(params, prior, trie)
  state = plan.start(search, params, memory, key)
  state = search.advance(state, plan.settings.num_steps)
  return summarize(search.finish(state), prior)


@functools.partial(jax.jit, static_argnums=0)
def begin(
  plan: Plan,
  params: PyTree,
  memory: Memory,
  key: Any,
  trie: PrefixTrie | None,
) -> SearchState:
  """Returns the state of `decode` before the first token."""
  search = plan.search(params, None, trie)
  return plan.start(search, params, memory, key)


# The state is donated: its cache is as large as the encoded contexts.
@functools.partial(jax.jit, static_argnums=0, donate_argnames="state")
def advance(
  plan: Plan,
  params: PyTree,
  trie: PrefixTrie | None,
  doc_scores: Float[Array, "B K"],
  state: SearchState,
  limit: int | Int[Array, ""],
) -> SearchState:
  """Returns the state of `decode` after `limit` tokens."""
  search = plan.search(params, doc_log_prior(doc_scores), trie)
  return search.advance(state, limit)


@functools.partial(jax.jit, static_argnums=0)
def end(
  plan: Plan, doc_scores: Float[Array, "B K"], state: SearchState
) -> Generated:
  """Returns what `decode` returns, of a state in which all have ended."""
  prior = doc_log_prior(doc_scores)
  return summarize(plan.search({}, prior, None).finish(state), prior)


def summarize(found: Found, doc_log_probs: Float[Array, "B K"]) -> Generated:
  """Returns what a search with all documents together found."""
  return Generated(
    tokens=found.tokens,
    lengths=found.lengths,
    log_probs=sequence_log_probs(doc_log_probs, found.evidence),
    scores=found.scores,
    doc_log_probs=doc_log_probs,
    token_log_probs=jnp.swapaxes(found.evidence, 2, 3),
  )


@functools.partial(jax.jit, static_argnums=0)
def find_candidates(
  plan: Plan,
  params: PyTree,
  trie: PrefixTrie | None,
  memory: Memory,
  key: Any,
) -> Found:
  """Searches with each document alone; R = K * W, in the documents' order."""
  b, k, _ = memory.tokens.shape
  search = plan.search(params, None, trie)
  alone = memory.change(lambda x: x.reshape(b * k, 1, *x.shape[2:]))
  state = plan.start(search, params, alone, key)
  found = search.finish(search.advance(state, plan.settings.num_steps))
  return jax.tree.map(lambda x: x.reshape(b, -1, *x.shape[2:]), found)


@functools.partial(jax.jit, static_argnums=0)
def rank_without_pass(
  settings: GenerationSettings,
  doc_scores: Float[Array, "B K"],
  candidates: Found,
) -> Generated:
  """Ranks candidates by the scores of the beams that wrote them."""
  return rank_fast(doc_log_prior(doc_scores), candidates, settings)


@functools.partial(jax.jit, static_argnums=(0, 1))
def score_given(
  generator: AnyGenerator,
  by_token: bool,
  params: PyTree,
  doc_scores: Float[Array, "B K"],
  memory: Memory,
  tokens: Int[Array, "B R T"],
  lengths: Int[Array, "B R"],
  tree: CandidateTree,
) -> Generated:
  """Returns sequences by log p(y|x), the most likely first.

  With `by_token`, each token may come from another document.
  """
  scored: Any = generator.apply(
    {"params": params}, tree, tokens, memory, method=score_tree
  )
  real = jnp.arange(tokens.shape[-1]) < lengths[..., None]  # B R T
  given = jnp.where(real[..., None], scored[0], 0.0)  # B R T K
  prior = doc_log_prior(doc_scores)
  if by_token:
    log_probs = sequence_log_probs(prior, given)
  else:
    joint = prior[:, None] + jnp.sum(given, axis=2)
    log_probs = jax.nn.logsumexp(joint, axis=-1)
  best = jnp.argsort(-log_probs, axis=1)
  rows = jnp.arange(len(best))[:, None]
  return Generated(
    tokens=tokens[rows, best],
    lengths=lengths[rows, best],
    log_probs=log_probs[rows, best],
    scores=log_probs[rows, best],
    doc_log_probs=prior,
    token_log_probs=jnp.swapaxes(given, 2, 3)[rows, best],
  )


@dataclasses.dataclass(frozen=True)
class Ranking:
  """What a compiled ranking is made for."""

  generator: AnyGenerator
  settings: GenerationSettings
  parity: HfParity | None = None


@functools.partial(jax.jit, static_argnums=0)
def score_and_rank(
  ranking: Ranking,
  params: PyTree,
  doc_scores: Float[Array, "B K"],
  memory: Memory,
  candidates: Found,
  tree: CandidateTree,
) -> Generated:
  """Scores every candidate under every document, and ranks them."""
  generator = ranking.generator
  scored: Any = generator.apply(
    {"params": params},
    tree,
    candidates.tokens,
    memory,
    method=score_tree,
  )
  return rank_thorough(
    doc_log_prior(doc_scores),
    candidates,
    scored[0],
    scored[1],
    ranking.settings,
    generator.config.vocab_size,
    ranking.parity,
  )
