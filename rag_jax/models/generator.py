"""The encoder-decoder that reads a context and writes a target.

BART's architecture: Lewis et al. 2019, https://arxiv.org/abs/1910.13461. The
fields say where a variant departs from it; the defaults do not.

In: context tokens [N, C] and target tokens [N, T], N = B*K.
Out: target_logits [N, T, V].
"""

import dataclasses
import functools
import typing

from flax import linen as nn
import flax.struct
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int
import numpy as np

from rag_jax.models.layers import LayerCache
from rag_jax.models.layers import TransformerLayer
from rag_jax.models.partitioning import constrain
from rag_jax.models.partitioning import dense_init
from rag_jax.models.partitioning import named


# Unchecked, because JAX makes it of shapes and of stacked arrays too.
@typing.no_type_check
@flax.struct.dataclass
class DecoderCache:
  """What decoding remembers between tokens."""

  layers: tuple[LayerCache, ...]
  memory_mask: Bool[Array, "N 1 C"]


def sinusoid_init(
  key: Array, shape: tuple[int, int], dtype: DTypeLike = jnp.float32
) -> Array:
  """Returns Vaswani et al.'s sinusoids [positions, D], rows of unit norm.

  https://arxiv.org/abs/1706.03762, section 3.5; scaled so that a position
  weighs as much as a token embedding.
  """
  positions, dim = shape
  rates = 1e4 ** (-np.arange(0, dim, 2) / dim)
  angles = np.arange(positions)[:, None] * rates
  table = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)[:, :dim]
  return jnp.asarray(table * (2 / dim) ** 0.5, dtype)


class Stack(nn.Module):
  """Positions and layers of the encoder or decoder, on embedded tokens."""

  num_layers: int
  embed_dim: int
  num_heads: int
  mlp_dim: int
  max_positions: int
  position_offset: int
  position_init: str
  activation: str
  norm: str
  embedding_norm: bool
  relative_buckets: int
  cross: bool
  copy_init: bool
  dropout: float
  dtype: DTypeLike
  param_dtype: DTypeLike

  def setup(self):
    init = {
      "normal": dense_init("position", "embed"),
      "sinusoid": named(sinusoid_init, "position", "embed"),
    }[self.position_init]
    self.position_embedding = nn.Embed(
      self.max_positions + self.position_offset,
      self.embed_dim,
      embedding_init=init,
      param_dtype=self.param_dtype,
    )
    layer_norm = functools.partial(
      nn.LayerNorm,
      epsilon=1e-5,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
    )
    if self.embedding_norm:
      self.embedding_layer_norm = layer_norm(name="embedding_norm")
    if self.norm == "pre":
      self.final_norm = layer_norm()
    previous = self.copy_init and not self.cross
    copies = self.copy_init and self.cross
    self.layers = [
      TransformerLayer(
        num_heads=self.num_heads,
        head_dim=self.embed_dim // self.num_heads,
        mlp_dim=self.mlp_dim,
        activation=self.activation,
        norm=self.norm,
        cross=self.cross,
        relative_buckets=self.relative_buckets,
        # The last layer copies, what the first has put beside each token.
        self_start="previous" if previous and i == 0 else "normal",
        cross_start="copy" if copies and i == self.num_layers - 1 else "normal",
        # A copying start: what the other blocks add is small beside it.
        out_init_scale=0.2 if self.copy_init else 1.0,
        dropout=self.dropout,
        dtype=self.dtype,
        param_dtype=self.param_dtype,
        name=f"layer_{i}",
      )
      for i in range(self.num_layers)
    ]
    self.drop = nn.Dropout(self.dropout)

  def add_positions(
    self,
    x: Float[Array, "N T D"],
    positions: Int[Array, "#T"],
    deterministic: bool,
  ) -> Float[Array, "N T D"]:
    """Returns what enters the first layer."""
    x += self.position_embedding(positions + self.position_offset).astype(
      self.dtype
    )
    if self.embedding_norm:
      x = self.embedding_layer_norm(x)
    return self.drop(x, deterministic=deterministic)

  def __call__(
    self,
    x: Float[Array, "N T D"],
    mask: Bool[Array, "N #T T"],
    memory: Float[Array, "N C D"] | None = None,
    memory_mask: Bool[Array, "N 1 C"] | None = None,
    deterministic: bool = True,
  ) -> Float[Array, "N T D"]:
    x = self.add_positions(x, jnp.arange(x.shape[1]), deterministic)
    x = constrain(x, "batch", "length", "embed")
    for layer in self.layers:
      x = layer(x, mask, memory, memory_mask, deterministic=deterministic)
      x = constrain(x, "batch", "length", "embed")
    return self.final_norm(x) if self.norm == "pre" else x


class Generator(nn.Module):
  """BART: a bidirectional encoder, a causal decoder, tied embeddings.

  Params: `token_embedding` [V, D], shared by encoder, decoder and output;
  `encoder` and `decoder`; `final_logits_bias` [V], which BART holds at zero.
  """

  vocab_size: int
  num_layers: int
  embed_dim: int
  num_heads: int
  mlp_dim: int
  max_positions: int
  decoder_start_id: int  # what the decoder reads before the first token
  position_offset: int = 2
  position_init: str = "normal"
  activation: str = "gelu"
  norm: str = "post"
  embedding_norm: bool = True
  scale_embedding: bool = False
  relative_buckets: int = 0  # T5's relative positions, in the encoder
  copy_init: bool = False  # attention starts by copying
  dropout: float = 0.0
  dtype: DTypeLike = jnp.bfloat16
  param_dtype: DTypeLike = jnp.float32

  def setup(self):
    std = self.embed_dim**-0.5 if self.copy_init else 0.02
    self.token_embedding = nn.Embed(
      self.vocab_size,
      self.embed_dim,
      embedding_init=named(nn.initializers.normal(std), "vocab", "embed"),
      param_dtype=self.param_dtype,
    )
    stack = functools.partial(
      Stack,
      num_layers=self.num_layers,
      embed_dim=self.embed_dim,
      num_heads=self.num_heads,
      mlp_dim=self.mlp_dim,
      max_positions=self.max_positions,
      position_offset=self.position_offset,
      position_init=self.position_init,
      activation=self.activation,
      norm=self.norm,
      embedding_norm=self.embedding_norm,
      copy_init=self.copy_init,
      dropout=self.dropout,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
    )
    # The decoder's positions are absolute alone: cached steps then need no
    # offsets.
    self.encoder = stack(cross=False, relative_buckets=self.relative_buckets)
    self.decoder = stack(cross=True, relative_buckets=0)
    self.final_logits_bias = self.param(
      "final_logits_bias",
      named(nn.initializers.zeros, "vocab"),
      (self.vocab_size,),
      self.param_dtype,
    )

  def _embed(self, tokens: Int[Array, "N T"]) -> Float[Array, "N T D"]:
    x = self.token_embedding(tokens).astype(self.dtype)
    return x * self.embed_dim**0.5 if self.scale_embedding else x

  def _logits(self, x: Float[Array, "N T D"]) -> Float[Array, "N T V"]:
    table = self.token_embedding.embedding.astype(self.dtype)
    logits = jnp.einsum(
      "NTD,VD->NTV", x, table, preferred_element_type=jnp.float32
    )
    logits = logits + self.final_logits_bias.astype(jnp.float32)
    return constrain(logits, "batch", "length", "vocab")

  def encode(
    self,
    context_tokens: Int[Array, "N C"],
    context_mask: Bool[Array, "N C"],
    deterministic: bool = True,
  ) -> Float[Array, "N C D"]:
    """Returns what the decoder looks at."""
    return self.encoder(
      self._embed(context_tokens),
      context_mask[:, None, :],
      deterministic=deterministic,
    )

  def __call__(
    self,
    context_tokens: Int[Array, "N C"],
    context_mask: Bool[Array, "N C"],
    target_tokens: Int[Array, "N T"],
    deterministic: bool = True,
  ) -> Float[Array, "N T V"]:
    """Returns target_logits: at each position, scores of the token there.

    The decoder reads the target shifted right by one behind
    `decoder_start_id`, so position t has seen the tokens before t alone.
    """
    memory = self.encode(context_tokens, context_mask, deterministic)
    inputs = jnp.pad(
      target_tokens[:, :-1], ((0, 0), (1, 0)),
      constant_values=self.decoder_start_id,
    )  # fmt: skip
    length = target_tokens.shape[1]
    # No mask of padding: it stands at the end, where causal positions that
    # count never look.
    causal = jnp.tril(jnp.ones((1, length, length), bool))
    causal = jnp.broadcast_to(causal, (len(inputs), length, length))
    x = self.decoder(
      self._embed(inputs),
      causal,
      memory,
      context_mask[:, None, :],
      deterministic=deterministic,
    )
    return self._logits(x)

  def init_cache(
    self,
    context_tokens: Int[Array, "N C"],
    context_mask: Bool[Array, "N C"],
    num_steps: int,
  ) -> DecoderCache:
    """Returns the cache for decoding `num_steps` tokens; encodes once."""
    memory = self.encode(context_tokens, context_mask)
    return DecoderCache(
      tuple(
        layer.init_cache(memory, num_steps) for layer in self.decoder.layers
      ),
      context_mask[:, None, :],
    )

  def step(
    self,
    tokens: Int[Array, "N"],
    position: Int[Array, ""],
    cache: DecoderCache,
  ) -> tuple[Float[Array, "N V"], DecoderCache]:
    """Returns the logits after reading the token at `position`."""
    x = self.decoder.add_positions(
      self._embed(tokens[:, None]), position[None], True
    )  # N 1 D
    layers = []
    for layer, layer_cache in zip(
      self.decoder.layers, cache.layers, strict=True
    ):
      x, layer_cache = layer.step(x, position, cache.memory_mask, layer_cache)
      layers.append(layer_cache)
    if self.norm == "pre":
      x = self.decoder.final_norm(x)
    return self._logits(x)[:, 0], dataclasses.replace(
      cache, layers=tuple(layers)
    )
