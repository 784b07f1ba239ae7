"""The layers of the generator's encoder or decoder, on embedded tokens.

In: embedded tokens [N, T, D]. Out: the final activations, of the same shape.
"""

import dataclasses
import functools
import operator
import typing

from flax import linen as nn
import flax.struct
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int
import numpy as np

from rag_jax.config_models import GeneratorConfig
from rag_jax.models.attention import Bias
from rag_jax.models.attention import previous_bias_init
from rag_jax.models.attention import relative_bias
from rag_jax.models.layers import UNROLLED
from rag_jax.models.layers import LayerCache
from rag_jax.models.layers import LayerLoop
from rag_jax.models.layers import TransformerLayer
from rag_jax.models.layers import make_norm
from rag_jax.models.partitioning import constrain
from rag_jax.models.partitioning import dense_init
from rag_jax.models.partitioning import named
from rag_jax.models.pointer import PointerCache


# Not type-checked, because JAX also builds it from shapes and stacked arrays.
@typing.no_type_check
@flax.struct.dataclass
class DecoderCache:
  """The decoder's state between steps, for K documents per question."""

  layers: tuple[LayerCache, ...]
  memory_mask: Bool[Array, "BK 1 S"]
  # The beam slot that holds the keys of each beam's history at each step.
  ancestors: Int[Array, "B W T"]
  pointer: PointerCache | None = None  # None: no pointer

  def reorder(self, beams: Int[Array, "B W"]) -> "DecoderCache":
    """Returns the cache whose beam w continues the old beam `beams[w]`."""
    ancestors = jnp.take_along_axis(self.ancestors, beams[..., None], axis=1)
    pointer = None if self.pointer is None else self.pointer.reorder(beams)
    return dataclasses.replace(self, ancestors=ancestors, pointer=pointer)


def next_history(
  ancestors: Int[Array, "B W T"], position: Int[Array, ""], num_docs: int
) -> tuple[Int[Array, "B W T"], Bool[Array, "BK W TW"]]:
  """Returns the ancestors with a new token at `position`, and what it sees.

  The token of each beam is in the beam's own slot. It sees the slots, of T
  steps times W beams, of its own history, for each of `num_docs` documents.
  """
  b, w, t = ancestors.shape
  ancestors = ancestors.at[:, :, position].set(jnp.arange(w))
  seen = ancestors[..., None] == jnp.arange(w)  # B W T W
  seen &= (jnp.arange(t) <= position)[:, None]
  return ancestors, jnp.repeat(seen.reshape(b, w, t * w), num_docs, axis=0)


def sinusoid_init(
  key: Array, shape: tuple[int, int], dtype: DTypeLike = jnp.float32
) -> Array:
  """Returns Vaswani et al.'s sinusoids [positions, D], rows of unit norm.

  https://arxiv.org/abs/1706.03762, section 3.5; scaled to the norm of a token
  embedding.
  """
  positions, dim = shape
  rates = 1e4 ** (-np.arange(0, dim, 2) / dim)
  angles = np.arange(positions)[:, None] * rates
  table = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)[:, :dim]
  return jnp.asarray(table * (2 / dim) ** 0.5, dtype)


class Stack(nn.Module):
  """Position embeddings, `config.num_layers` layers, and norms.

  Params: `position_embedding` [positions, D] if positions are learned;
  `relative_bias` [buckets, N] if layers share one; `embedding_norm`; `layer_0`
  etc.; `final_norm` if norms come before the blocks.
  """

  config: GeneratorConfig
  cross: bool  # a decoder
  dtype: DTypeLike
  loop: LayerLoop = UNROLLED

  def setup(self):
    c = self.config
    if c.positions == "learned":
      init = {
        "normal": dense_init("position", "embed"),
        "sinusoid": named(sinusoid_init, "position", "embed"),
      }[c.position_init]
      self.position_embedding = nn.Embed(
        c.max_positions + c.position_offset, c.embed_dim, embedding_init=init
      )
    if c.relative_shared:
      init = previous_bias_init if c.init == "copy" else nn.initializers.zeros
      self.relative_bias = self.param(
        "relative_bias",
        named(init, "position", "heads"),
        (c.relative_buckets, c.num_heads),
      )
    norm = functools.partial(make_norm, c, dtype=self.dtype)
    if c.embedding_norm:
      self.embedding_layer_norm = norm(name="embedding_norm")
    if c.norm == "pre":
      self.final_norm = norm()
    # Layers have their own relative bias only in encoders that share none.
    own_bias = not c.relative_shared and not self.cross
    layer_config = c if own_bias else c.frozen(relative_buckets=0)
    self_starts, cross_start = self._starts()
    self.layers = [
      TransformerLayer(
        layer_config,
        cross=self.cross,
        self_start=self_starts.get(i, "normal"),
        # The last layer copies; it matches what the first encoder layer added.
        cross_start=cross_start if i == c.num_layers - 1 else "normal",
        # With a copying start, the other blocks' outputs start small.
        out_init_scale=0.2 if c.init == "copy" else 1.0,
        dtype=self.dtype,
        name=f"layer_{i}",
      )
      for i in range(c.num_layers)
    ]
    self.drop = nn.Dropout(c.dropout)

  def _starts(self) -> tuple[dict[int, str], str]:
    """Returns `start` of self-attention by layer, and of cross-attention."""
    if self.config.init != "copy":
      return {}, "normal"
    # With a shared relative bias, every layer favours the previous token.
    again = self.config.relative_shared and self.config.num_layers > 1
    if self.cross:
      return {0: "previous again"} if again else {}, "copy"
    starts = {0: "previous"}
    return starts | {1: "previous again"} if again else starts, "normal"

  def enter(
    self,
    x: Float[Array, "N T D"],
    positions: Int[Array, "*#N T"],
    deterministic: bool,
  ) -> Float[Array, "N T D"]:
    """Returns the input of the first layer: `x` with its positions added."""
    if self.config.positions == "learned":
      rows = positions + self.config.position_offset
      x += self.position_embedding(rows).astype(self.dtype)
    if self.config.embedding_norm:
      x = self.embedding_layer_norm(x)
    return self.drop(x, deterministic=deterministic)

  def leave(
    self, x: Float[Array, "N T D"], deterministic: bool = True
  ) -> Float[Array, "N T D"]:
    """Returns the output of the stack, given that of the last layer."""
    if self.config.norm == "pre":
      x = self.final_norm(x)
    if (
      self.config.norm_kind == "rms"
    ):  # T5 has dropout here, mBART and Pegasus do not
      x = self.drop(x, deterministic=deterministic)
    return x

  def bias(
    self,
    query_positions: Int[Array, "*#N T"],
    key_positions: Int[Array, "*#N S"],
  ) -> Bias | None:
    """Returns the shared relative bias, if there is one."""
    if not self.config.relative_shared:
      return None
    offset = key_positions[..., None, :] - query_positions[..., :, None]
    return relative_bias(
      self.relative_bias,
      offset if offset.ndim == 3 else offset[None],
      self.config.relative_max_distance,
      bidirectional=not self.cross,
    )

  def __call__(
    self,
    x: Float[Array, "N T D"],
    mask: Bool[Array, "#N #T T"],
    positions: Int[Array, "*#N T"],
    memory: Float[Array, "N C D"] | None = None,
    memory_mask: Bool[Array, "N 1 C"] | None = None,
    deterministic: bool = True,
  ) -> Float[Array, "N T D"]:
    """Returns the output of all layers for tokens `x` at `positions`."""
    x = self.enter(x, positions, deterministic)
    x = constrain(x, "batch", "length", "embed")
    # An encoder's rows may hold several contexts; offsets are within each.
    places = positions if self.cross else jnp.arange(x.shape[1])
    bias = self.bias(places, places)
    inputs = mask, memory, memory_mask, bias
    x = self.loop.run(self.layers, x, *inputs, deterministic=deterministic)
    return self.leave(x, deterministic)

  def looks(
    self,
    x: Float[Array, "N T D"],
    mask: Bool[Array, "#N #T T"],
    positions: Int[Array, "T"],
    memory: Float[Array, "N S D"],
    memory_mask: Bool[Array, "N 1 S"],
    *,
    logits: bool = False,
  ) -> Float[Array, "N T S"]:
    """Returns how much tokens attend to the memory, a mean over layers.

    In each layer as `Attention.looks`, without dropout. Arguments as in a call.
    """
    x, bias = self.enter(x, positions, True), self.bias(positions, positions)
    inputs, found = (mask, memory, memory_mask, bias), []
    for layer in self.layers:
      found.append(layer.looks(x, *inputs, logits=logits))
      x = layer(x, *inputs)
    return functools.reduce(operator.add, found) / len(found)

  def init_cache(
    self,
    memory: Float[Array, "B K S D"],
    memory_mask: Bool[Array, "B K S"],
    num_beams: int,
    num_steps: int,
  ) -> DecoderCache:
    """Returns the cache before the first of `num_steps` tokens."""
    b, k, s, d = memory.shape
    flat = memory.reshape(b * k, s, d)
    return DecoderCache(
      layers=tuple(
        layer.init_cache(flat, num_beams, num_steps) for layer in self.layers
      ),
      memory_mask=memory_mask.reshape(b * k, 1, s),
      ancestors=jnp.zeros((b, num_beams, num_steps), jnp.int32),
    )

  def step(
    self,
    x: Float[Array, "B W D"],
    position: Int[Array, ""],
    cache: DecoderCache,
  ) -> tuple[Float[Array, "BK W D"], DecoderCache]:
    """Returns the output for the new token of each beam and document."""
    b, w, _ = x.shape
    t = cache.ancestors.shape[-1]
    k = cache.memory_mask.shape[0] // b
    ancestors, seen = next_history(cache.ancestors, position, k)
    x = self.enter(x, jnp.full((w,), position), True)
    x = jnp.repeat(x, k, axis=0)  # B*K W D
    bias = self.bias(
      jnp.full((w,), position), jnp.repeat(jnp.arange(t), w)
    )  # 1 N W T*W
    layers = []
    for layer, layer_cache in zip(self.layers, cache.layers, strict=True):
      x, layer_cache = layer.step(
        x, position, seen, cache.memory_mask, layer_cache, bias
      )
      layers.append(layer_cache)
    return self.leave(x), DecoderCache(
      tuple(layers), cache.memory_mask, ancestors
    )
