"""The decoder-only generator: one model whose fields make it a known one.

Llama (arXiv:2302.13971), Qwen 2 and 3 (arXiv:2407.10671, arXiv:2505.09388),
Gemma 2 and 3 (arXiv:2408.00118, arXiv:2503.19786) or GPT-2, as a `CausalConfig`
says. In: tokens [N, S], padded on either side. Out: logits [N, S, V], float32.
The keys and values of prompts are computed once, and those of a beginning that
all prompts share only once for all of them.
"""

from collections.abc import Sequence
import dataclasses
import functools
import typing

from flax import linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from rag_jax.config_models import CausalConfig
from rag_jax.config_models import check_causal
from rag_jax.models.causal_layers import CausalLayer
from rag_jax.models.causal_layers import KeysValues
from rag_jax.models.layers import UNROLLED
from rag_jax.models.layers import LayerLoop
from rag_jax.models.layers import check_positions
from rag_jax.models.layers import make_norm
from rag_jax.models.packing import Packing
from rag_jax.models.partitioning import constrain
from rag_jax.models.partitioning import dense_init
from rag_jax.models.partitioning import split_table
from rag_jax.models.pointer import Copy
from rag_jax.models.rope import rotation
from rag_jax.models.stack import next_history
from rag_jax.models.vocabulary import capped

# Keys and values of each layer.
Kept = tuple[KeysValues, ...]


# Not type-checked, because JAX also builds it from shapes and stacked arrays.
@typing.no_type_check
@flax.struct.dataclass
class CausalCache:
  """The state between steps, for K prompts per question."""

  own: Kept  # of what was written: T steps times W beams
  before: tuple[Kept, ...]  # of the prompts: see `CausalGenerator.encode`
  # Of the prompts without their last token: their positions, -1: none is there.
  places: tuple[Int[Array, "#BK S"], ...]
  last: Int[Array, "BK"]  # token of each prompt, which the first step reads
  lengths: Int[Array, "BK"]  # of the prompts without it
  # The beam slot that holds the keys of each beam's history at each step.
  ancestors: Int[Array, "B W T"]

  def reorder(self, beams: Int[Array, "B W"]) -> "CausalCache":
    """Returns the cache whose beam w continues the old beam `beams[w]`."""
    ancestors = jnp.take_along_axis(self.ancestors, beams[..., None], axis=1)
    return dataclasses.replace(self, ancestors=ancestors)


class CausalGenerator(nn.Module):
  """A decoder that reads a prompt and then its own output.

  As a part of RAG it takes what an encoder-decoder takes (models/generator.py):
  contexts are prompts, and the target follows the last token of its prompt.

  Params: `token_embedding` [V, D]; `position_embedding` [positions, D] if they
  are learned; `layer_0` etc.; `final_norm`; `lm_head` [V, D] if the output is
  not tied.

  Positions count real tokens, so padding, also before a text, changes nothing.
  """

  config: CausalConfig
  dtype: DTypeLike = jnp.bfloat16
  loop: LayerLoop = UNROLLED

  def setup(self):
    c = self.config
    table = functools.partial(
      nn.Embed, c.vocab_size, c.embed_dim,
      embedding_init=dense_init("vocab", "embed"),
    )  # fmt: skip
    self.token_embedding = table()
    if c.positions == "learned":
      self.position_embedding = nn.Embed(
        c.max_positions,
        c.embed_dim,
        embedding_init=dense_init("position", "embed"),
      )
    self.layers = [
      CausalLayer(c, dtype=self.dtype, name=f"layer_{i}")
      for i in range(c.num_layers)
    ]
    self.final_norm = make_norm(c, dtype=self.dtype)
    if not c.tied_output:
      self.lm_head = table()
    self.drop = nn.Dropout(c.dropout)

  def _check_positions(self, length: int) -> None:
    learned = self.config.positions == "learned"
    check_positions(
      length, self.config.max_positions if learned else 0, "Texts"
    )

  @property
  def _kinds(self) -> tuple[bool, ...]:
    """The kinds of layers that there are: global (False), sliding (True)."""
    slide = self.config.sliding_layers
    kinds = {i in slide for i in range(self.config.num_layers)}
    return tuple(sorted(kinds or {False}))

  def _kind_of(self, layer: int) -> int:
    return self._kinds.index(layer in self.config.sliding_layers)

  def _embed(
    self,
    tokens: Int[Array, "N T"],
    positions: Int[Array, "N T"],
    deterministic: bool,
  ) -> Float[Array, "N T D"]:
    c = self.config
    table = split_table(jnp.asarray(self.token_embedding.embedding))
    x = jnp.take(table, tokens, axis=0).astype(self.dtype)
    if c.scale_embedding:
      x *= c.embed_dim**0.5
    if c.positions == "learned":
      x += self.position_embedding(positions).astype(self.dtype)
    x = self.drop(x, deterministic=deterministic)
    return constrain(x, "batch", "length", "embed")

  def _seen(
    self,
    positions: Int[Array, "N T"],
    places: Int[Array, "#N S"],
    allowed: Bool[Array, "#N #T S"] | None = None,
  ) -> Bool[Array, "kinds N T S"]:
    """Returns which places each token sees, for each kind of layers.

    Args:
      positions: of the tokens.
      places: the position of what is at each; -1: nothing.
      allowed: which places a token may see, beside its distance to them.
    """
    shape = (*positions.shape, places.shape[1])
    seen = jnp.broadcast_to(places[:, None] >= 0, shape)
    if allowed is not None:
      seen &= allowed
    near = positions[..., None] - places[:, None] < self.config.sliding_window
    return jnp.stack([seen & near if kind else seen for kind in self._kinds])

  def _rotations(
    self, positions: Int[Array, "N T"]
  ) -> Float[Array, "kinds 2 N T half"] | None:
    """Returns how RoPE rotates, for each kind; None if there is no RoPE."""
    if self.config.positions != "rope":
      return None
    return jnp.stack(
      [rotation(self.config, positions, local=kind) for kind in self._kinds]
    )

  def text_states(
    self,
    tokens: Int[Array, "N S"],
    mask: Bool[Array, "N S"],
    deterministic: bool = True,
  ) -> Float[Array, "N S D"]:
    """Returns the inputs of `logits` at each place of whole texts."""
    self._check_positions(tokens.shape[1])
    positions, places = _positions(mask)
    causal = jnp.tri(tokens.shape[1], dtype=bool)[None]
    x = self.loop.run(
      self.layers,
      self._embed(tokens, positions, deterministic),
      self._seen(positions, places, causal),
      self._rotations(positions),
      deterministic=deterministic,
      each=[self._kind_of(i) for i in range(len(self.layers))],
    )
    return self.final_norm(x)

  def states(
    self,
    context_tokens: Int[Array, "N C"],
    context_mask: Bool[Array, "N C"],
    target_tokens: Int[Array, "N T"],
    deterministic: bool = True,
    packing: Packing | None = None,
  ) -> tuple[Float[Array, "N T D"], None]:
    """Returns the inputs of `logits` at each position of the targets.

    Args:
      context_tokens: of the prompts, padded on either side.
      context_mask: True on real tokens.
      target_tokens: that follow.
      deterministic: whether to turn dropout off.
      packing: is of encoders.

    Raises:
      ValueError: prompts and targets exceed a learned table of positions.
    """
    assert packing is None  # config_rules refuses it
    c, t = context_tokens.shape[1], target_tokens.shape[1]
    # What stands after the end of a target is seen by nothing before.
    x = self.text_states(
      jnp.concatenate([context_tokens, target_tokens[:, :-1]], axis=1),
      jnp.pad(context_mask, ((0, 0), (0, t - 1)), constant_values=True),
      deterministic,
    )
    last = jnp.take_along_axis(x, _last(context_mask)[:, None, None], axis=1)
    return jnp.concatenate([last, x[:, c:]], axis=1), None

  def output_states(self, x: Float[Array, "*N D"]) -> Float[Array, "*N D"]:
    """Returns the states to multiply with `output_table`."""
    return x

  def output_table(self) -> Float[Array, "V D"]:
    """Returns the output embeddings: logits are their products with states."""
    tied = self.config.tied_output
    table = (self.token_embedding if tied else self.lm_head).embedding
    return split_table(jnp.asarray(table))

  def output_bias(self) -> None:
    """Returns the bias of the logits: there is none."""
    return

  @property
  def logits_soft_cap(self) -> float:
    """Logits x become cap * tanh(x / cap); 0.0: no cap."""
    return self.config.logits_soft_cap

  @property
  def start_id(self) -> int:
    """What stands before an answer: no token, but the prompt."""
    return self.config.vocab_size

  def logits(
    self, x: Float[Array, "N T D"], copy: Copy | None = None
  ) -> Float[Array, "N T V"]:
    """Returns float32 logits of the token after each state."""
    assert copy is None  # there is no pointer
    logits = jnp.einsum(
      "NTD,VD->NTV",
      x,
      self.output_table().astype(self.dtype),
      preferred_element_type=jnp.float32,
    )
    logits = capped(logits, self.logits_soft_cap)
    return constrain(logits, "batch", "length", "vocab")

  def __call__(
    self,
    tokens: Int[Array, "N S"],
    mask: Bool[Array, "N S"],
    deterministic: bool = True,
  ) -> Float[Array, "N S V"]:
    """Returns the logits of the token after each of `tokens`.

    Args:
      tokens: rows padded before or after their text.
      mask: True on real tokens. Logits at padding mean nothing.
      deterministic: whether to turn dropout off.

    Raises:
      ValueError: rows are longer than a learned table of positions.
    """
    return self.logits(self.text_states(tokens, mask, deterministic))

  def encode(
    self,
    context_tokens: Int[Array, "N C"],
    context_mask: Bool[Array, "N C"],
    shared: Kept | None = None,
  ) -> Kept:
    """Returns the keys and values of prompts, which answers are read with.

    Args:
      context_tokens: padded on either side.
      context_mask: True on real tokens.
      shared: keys and values of what stands before all of them, [1, ...]. The
        masks and tokens that go with the result are those given here.

    Raises:
      ValueError: prompts exceed a learned table of positions.
    """
    before, start = self._before(shared)
    positions, places = _positions(context_mask, start)
    self._check_positions(start + context_tokens.shape[1])
    causal = jnp.tri(context_tokens.shape[1], dtype=bool)[None]
    seen = [self._seen(positions, of) for of in self._shared_places(shared)]
    seen.append(self._seen(positions, places, causal))
    return self._read(context_tokens, positions, before, seen)[1]

  def init_cache(
    self,
    memory: Kept,
    memory_mask: Bool[Array, "B K S"],
    memory_tokens: Int[Array, "B K S"],
    num_beams: int,
    num_steps: int,
    shared: Kept | None = None,
  ) -> CausalCache:
    """Returns the cache before the first of `num_steps` tokens.

    Args:
      memory: the output of `encode`, for K prompts per question.
      memory_mask: True on real tokens.
      memory_tokens: of the prompts.
      num_beams: W, beams per question.
      num_steps: T, the maximum number of tokens to decode.
      shared: as for `encode`.

    Raises:
      ValueError: prompts and answers exceed a learned table of positions.
    """
    prompts = self._prompts(memory, memory_mask, memory_tokens, shared)
    before, places, last, lengths = prompts
    # The first step reads the last token of the prompts.
    self._check_positions(sum(x.shape[1] for x in places) + num_steps - 1)
    b, k, _ = memory_tokens.shape
    slots = num_steps * num_beams
    return CausalCache(
      own=tuple(layer.empty(b * k, slots) for layer in self.layers),
      before=before,
      places=places,
      last=last,
      lengths=lengths,
      ancestors=jnp.zeros((b, num_beams, num_steps), jnp.int32),
    )

  def step(
    self,
    tokens: Int[Array, "B W"],
    position: Int[Array, ""],
    cache: CausalCache,
  ) -> tuple[Float[Array, "B W K V"], CausalCache]:
    """Returns the logits after reading the tokens at `position`.

    At position 0 these are the last ones of the prompts, not `tokens`.
    """
    b, w = tokens.shape
    t = cache.ancestors.shape[-1]
    k = len(cache.last) // b
    read = jnp.repeat(tokens, k, axis=0)  # B*K W
    read = jnp.where(position == 0, cache.last[:, None], read)
    positions = jnp.broadcast_to(cache.lengths[:, None] + position, read.shape)
    ancestors, history = next_history(cache.ancestors, position, k)
    slots = cache.lengths[:, None] + jnp.repeat(jnp.arange(t), w)
    seen = [self._seen(positions, places) for places in cache.places]
    seen.append(self._seen(positions, slots, history))
    x, own = self._read(
      read, positions, cache.before, seen, cache.own, position * w
    )
    logits = self.logits(x)  # B*K W V
    logits = jnp.swapaxes(logits.reshape(b, k, w, -1), 1, 2)
    return logits, dataclasses.replace(cache, own=own, ancestors=ancestors)

  def tree_states(
    self,
    tokens: Int[Array, "B M"],
    depths: Int[Array, "B M"],
    seen: Bool[Array, "B M M"],
    memory: Kept,
    memory_mask: Bool[Array, "B K S"],
    memory_tokens: Int[Array, "B K S"],
    shared: Kept | None = None,
  ) -> tuple[Float[Array, "BK M D"], None]:
    """Returns the inputs of `logits` at M nodes of a prefix tree.

    Args:
      tokens: the last token of each prefix; at depth 0 that of the prompt is
        read instead.
      depths: the position of each node.
      seen: True where node m attends to a node: to its ancestors and itself.
      memory: the output of `encode`.
      memory_mask: True on real tokens.
      memory_tokens: of the prompts.
      shared: as for `encode`.
    """
    prompts = self._prompts(memory, memory_mask, memory_tokens, shared)
    before, places, last, lengths = prompts
    k = memory_tokens.shape[1]
    tokens, depths, own = (
      jnp.repeat(x, k, axis=0) for x in (tokens, depths, seen)
    )
    tokens = jnp.where(depths == 0, last[:, None], tokens)
    positions = lengths[:, None] + depths
    masks = [self._seen(positions, of) for of in places]
    masks.append(self._seen(positions, positions, own))
    return self._read(tokens, positions, before, masks)[0], None

  def _before(self, shared: Kept | None) -> tuple[tuple[Kept, ...], int]:
    """Returns what stands before all prompts, and its number of tokens."""
    if shared is None:
      return (), 0
    return (shared,), shared[0].value.shape[-2]

  def _shared_places(self, shared: Kept | None) -> list[Int[Array, "1 S"]]:
    return [jnp.arange(self._before(shared)[1])[None]] if shared else []

  def _prompts(
    self,
    memory: Kept,
    mask: Bool[Array, "B K S"],
    tokens: Int[Array, "B K S"],
    shared: Kept | None,
  ) -> tuple[
    tuple[Kept, ...],
    tuple[Int[Array, "_bk _s"], ...],
    Int[Array, "BK"],
    Int[Array, "BK"],
  ]:
    """Returns `before`, `places`, `last` and `lengths` of a `CausalCache`."""
    before, start = self._before(shared)
    b, k, s = tokens.shape
    mask, tokens = mask.reshape(b * k, s), tokens.reshape(b * k, s)
    memory = jax.tree.map(lambda x: x.reshape(b * k, *x.shape[2:]), memory)
    _, places = _positions(mask, start)
    at = _last(mask)
    places = jnp.where(jnp.arange(s) == at[:, None], -1, places)
    last = jnp.take_along_axis(tokens, at[:, None], axis=1)[:, 0]
    # Of an empty prompt, its padding counts as one token.
    length = jnp.maximum(jnp.sum(mask, axis=1, dtype=jnp.int32), 1)
    return (
      (*before, memory),
      (*self._shared_places(shared), places),
      last,
      start + length - 1,
    )

  def _read(
    self,
    tokens: Int[Array, "N T"],
    positions: Int[Array, "N T"],
    before: Sequence[Kept],
    seen: Sequence[Bool[Array, "kinds N T _s"]],
    own: Kept | None = None,
    first: int | Int[Array, ""] = 0,
  ) -> tuple[Float[Array, "N T D"], Kept]:
    """Returns the states of T tokens, and their keys and values.

    Arguments as in `CausalLayer.read`, of all layers and kinds of them.
    """
    rotations = self._rotations(positions)
    x, made = self._embed(tokens, positions, True), []
    for i, layer in enumerate(self.layers):
      kind = self._kind_of(i)
      x, kept = layer.read(
        x,
        None if rotations is None else rotations[kind],
        [of_layers[i] for of_layers in before],
        [mask[kind] for mask in seen],
        None if own is None else own[i],
        first,
      )
      made.append(kept)
    return self.final_norm(x), tuple(made)


def _positions(
  mask: Bool[Array, "N S"], start: int = 0
) -> tuple[Int[Array, "N S"], Int[Array, "N S"]]:
  """Returns the number of real tokens before each place; also with -1s.

  The second array has -1 at padding.
  """
  count = start + jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1
  return jnp.maximum(count, 0), jnp.where(mask, count, -1)


def _last(mask: Bool[Array, "N S"]) -> Int[Array, "N"]:
  """Returns the place of the last real token."""
  return mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)


def build_causal(
  config: CausalConfig, *, dtype: DTypeLike, loop: LayerLoop = UNROLLED
) -> CausalGenerator:
  """Returns the generator that `config` describes.

  Raises:
    ValueError: its fields do not fit together.
  """
  return CausalGenerator(check_causal(config).frozen(), dtype=dtype, loop=loop)
