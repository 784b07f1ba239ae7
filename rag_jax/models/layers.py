"""Transformer layers shared by the retriever encoder and the generator.

In: activations [N, T, D], where N is B or B*K. Out: the same shape.
"""

import dataclasses
import functools
import typing
from typing import Any

from flax import linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from rag_jax.models.partitioning import dense_init
from rag_jax.models.partitioning import named

# The axis names "B T S D N H" are those of DESIGN: here B may stand for B*K.
Keys = Float[Array, "B S N H"]


def identity_init(
  key: Array, shape: tuple[int, int], dtype: DTypeLike = jnp.float32
) -> Array:
  """Returns the identity; Flax hands kernels of heads over flattened."""
  return jnp.eye(*shape, dtype=dtype)


def rolled_identity(scale: float, roll: int) -> nn.initializers.Initializer:
  """Returns an initializer: `scale` times the identity, columns rolled."""

  def init(
    key: Array, shape: tuple[int, int], dtype: DTypeLike = jnp.float32
  ) -> Array:
    return scale * jnp.roll(jnp.eye(*shape, dtype=dtype), roll, axis=1)

  return init


def relative_bucket(
  offset: Int[Array, "T S"], num_buckets: int, max_distance: int = 128
) -> Int[Array, "T S"]:
  """Returns T5's bucket of each offset (key position - query position).

  Bidirectional: half of the buckets for keys behind, half for keys ahead; in
  each half the near offsets have one each, the far ones share, the farther the
  more. Raffel et al. 2020, https://arxiv.org/abs/1910.10683, section 2.1.
  """
  half = num_buckets // 2
  exact = half // 2
  distance = jnp.abs(offset)
  far = exact + (
    jnp.log(jnp.maximum(distance, 1) / exact)
    / jnp.log(max_distance / exact)
    * (half - exact)
  ).astype(jnp.int32)
  near = jnp.where(distance < exact, distance, jnp.minimum(far, half - 1))
  return near + jnp.where(offset > 0, half, 0)


# How an attention starts. "normal": BERT and BART. The other two make a pair
# that copies (an induction head, https://arxiv.org/abs/2209.11895): "previous"
# adds to each token what stands before it; "copy" looks for the place whose
# previous token is the one just written, and writes what stands there.
_COPY_LOGIT = 2.0  # of a match, before it is trained
_PREVIOUS_BIAS = 6.0  # of the offset -1: exp(6) against 1 for the others


class Attention(nn.Module):
  """Multi-head attention of `x` over `memory`; self-attention if they are one.

  Params: `query`, `key`, `value` kernels [D, N, H]; `out` kernel [N, H, D];
  `relative_bias` [buckets, N] if there are relative positions.
  """

  num_heads: int
  head_dim: int
  relative_buckets: int = 0  # T5's relative positions; 0 = none
  start: str = "normal"  # "normal", "previous" or "copy": see above
  kernel_std: float = 0.02  # of a fresh kernel; BERT's and BART's
  out_init_scale: float = 1.0  # times kernel_std, of the `out` kernel
  dtype: DTypeLike = jnp.bfloat16  # of activations and matmuls
  param_dtype: DTypeLike = jnp.float32  # of what the optimizer sees

  def setup(self):
    dense = functools.partial(
      nn.DenseGeneral, dtype=self.dtype, param_dtype=self.param_dtype
    )
    heads = functools.partial(dense, features=(self.num_heads, self.head_dim))
    inits = self._inits()
    axes = ("embed", "heads", "head_dim")
    self.query = heads(kernel_init=named(inits["query"], *axes))
    self.key = heads(kernel_init=named(inits["key"], *axes))
    self.value = heads(kernel_init=named(inits["value"], *axes))
    self.out = dense(
      features=self.num_heads * self.head_dim,
      axis=(-2, -1),
      kernel_init=named(inits["out"], *axes[1:], "embed"),
    )
    if self.relative_buckets:
      self.relative_bias = self.param(
        "relative_bias",
        named(inits["bias"], "position", "heads"),
        (self.relative_buckets, self.num_heads),
        self.param_dtype,
      )

  def _inits(self) -> dict[str, Any]:
    """Returns the initializer of each kernel."""
    normal = nn.initializers.normal(self.kernel_std)
    dim = self.num_heads * self.head_dim
    inits: dict[str, Any] = dict.fromkeys(("query", "key", "value"), normal)
    inits["out"] = nn.initializers.normal(self.kernel_std * self.out_init_scale)
    inits["bias"] = nn.initializers.zeros
    if self.start == "previous":
      # Rolled: what stands before goes where the token itself is not. Layer
      # norm made it sqrt(D) long; it is added with the length of a token.
      inits["value"] = identity_init
      inits["out"] = rolled_identity(dim**-0.5, dim // 2)
      previous = jnp.arange(self.relative_buckets)[:, None] == 1
      inits["bias"] = lambda _, shape, dtype: jnp.broadcast_to(
        _PREVIOUS_BIAS * previous, shape
      ).astype(dtype)
    elif self.start == "copy":
      # `key` undoes the roll of "previous".
      inits["query"] = rolled_identity(_COPY_LOGIT**0.5, 0)
      inits["key"] = rolled_identity(_COPY_LOGIT**0.5, -(dim // 2))
      inits["value"] = inits["out"] = identity_init
    return inits

  def keys_values(self, memory: Float[Array, "B S D"]) -> tuple[Keys, Keys]:
    """Returns what `memory` offers to be looked at: keys and values."""
    return self.key(memory), self.value(memory)

  def attend(
    self,
    x: Float[Array, "B T D"],
    key: Keys,
    value: Keys,
    mask: Bool[Array, "B #T S"],  # True where attention is allowed
  ) -> Float[Array, "B T D"]:
    """Returns the mixture of `value` that `x` asks for."""
    query = self.query(x) * self.head_dim**-0.5  # B T N H
    # Softmax in float32: bfloat16 keeps 8 bits of mantissa.
    attn_logits = jnp.einsum(
      "BTNH,BSNH->BNTS", query, key, preferred_element_type=jnp.float32
    )
    if self.relative_buckets:
      attn_logits += self._relative_logits(x.shape[1], key.shape[1])
    attn_logits = jnp.where(
      mask[:, None], attn_logits, jnp.finfo(jnp.float32).min
    )
    attn_probs = jax.nn.softmax(attn_logits, axis=-1).astype(self.dtype)
    return self.out(jnp.einsum("BNTS,BSNH->BTNH", attn_probs, value))

  def _relative_logits(
    self, num_queries: int, num_keys: int
  ) -> Float[Array, "N T S"]:
    offset = jnp.arange(num_keys) - jnp.arange(num_queries)[:, None]
    bucket = relative_bucket(offset, self.relative_buckets)
    return jnp.transpose(self.relative_bias[bucket], (2, 0, 1))

  def __call__(
    self,
    x: Float[Array, "B T D"],
    memory: Float[Array, "B S D"],
    mask: Bool[Array, "B #T S"],
  ) -> Float[Array, "B T D"]:
    key, value = self.keys_values(memory)
    return self.attend(x, key, value, mask)


class Mlp(nn.Module):
  """Two dense layers with an activation between. Params: `up`, `down`."""

  mlp_dim: int
  activation: str  # "gelu" (exact, as in BERT and BART) or "relu"
  kernel_std: float = 0.02
  out_init_scale: float = 1.0
  dtype: DTypeLike = jnp.bfloat16
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    dense = functools.partial(
      nn.Dense, dtype=self.dtype, param_dtype=self.param_dtype
    )
    act = {
      "gelu": functools.partial(jax.nn.gelu, approximate=False),
      "relu": jax.nn.relu,
    }[self.activation]
    hidden = act(
      dense(
        self.mlp_dim,
        kernel_init=dense_init("embed", "mlp", std=self.kernel_std),
        name="up",
      )(x)
    )  # B T F
    return dense(
      x.shape[-1],
      kernel_init=dense_init(
        "mlp", "embed", std=self.kernel_std * self.out_init_scale
      ),
      name="down",
    )(hidden)


# Unchecked, because JAX makes it of shapes and of stacked arrays too.
@typing.no_type_check
@flax.struct.dataclass
class LayerCache:
  """What one decoder layer remembers between steps. S: positions of T or C."""

  self_key: Keys
  self_value: Keys
  cross_key: Keys
  cross_value: Keys


class TransformerLayer(nn.Module):
  """Self-attention, cross-attention in a decoder, and an MLP.

  Each is a residual block; `norm` says whether its layer norm comes after the
  sum ("post": BERT, BART) or before the block ("pre").
  """

  num_heads: int
  head_dim: int
  mlp_dim: int
  activation: str = "gelu"
  norm: str = "post"
  norm_eps: float = 1e-5
  cross: bool = False  # a decoder layer
  relative_buckets: int = 0  # of self-attention
  self_start: str = "normal"  # of self-attention; see Attention
  cross_start: str = "normal"
  kernel_std: float = 0.02
  out_init_scale: float = 1.0  # of what self-attention and MLP add
  dropout: float = 0.0
  dtype: DTypeLike = jnp.bfloat16
  param_dtype: DTypeLike = jnp.float32

  def setup(self):
    attention = functools.partial(
      Attention,
      num_heads=self.num_heads,
      head_dim=self.head_dim,
      kernel_std=self.kernel_std,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
    )
    # Norms compute in float32 and hand on `dtype`.
    layer_norm = functools.partial(
      nn.LayerNorm,
      epsilon=self.norm_eps,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
    )
    self.self_attention = attention(
      relative_buckets=self.relative_buckets,
      start=self.self_start,
      out_init_scale=self.out_init_scale,
    )
    self.self_attention_norm = layer_norm()
    if self.cross:
      self.cross_attention = attention(start=self.cross_start)
      self.cross_attention_norm = layer_norm()
    self.mlp = Mlp(
      mlp_dim=self.mlp_dim,
      activation=self.activation,
      kernel_std=self.kernel_std,
      out_init_scale=self.out_init_scale,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
    )
    self.mlp_norm = layer_norm()
    self.drop = nn.Dropout(self.dropout)

  def _before(self, x: Array, norm: nn.LayerNorm) -> Array:
    return norm(x) if self.norm == "pre" else x

  def _after(
    self, x: Array, update: Array, norm: nn.LayerNorm, deterministic: bool
  ) -> Array:
    x = x + self.drop(update, deterministic=deterministic)
    return norm(x) if self.norm == "post" else x

  def __call__(
    self,
    x: Float[Array, "B T D"],
    mask: Bool[Array, "B #T T"],
    memory: Float[Array, "B S D"] | None = None,
    memory_mask: Bool[Array, "B 1 S"] | None = None,
    deterministic: bool = True,
  ) -> Float[Array, "B T D"]:
    """Returns `x` after the layer; with `memory`, as a decoder layer."""
    norm, inner = self.self_attention_norm, self._before
    y = inner(x, norm)
    x = self._after(x, self.self_attention(y, y, mask), norm, deterministic)
    if self.cross:
      assert memory is not None
      assert memory_mask is not None
      norm = self.cross_attention_norm
      y = self.cross_attention(inner(x, norm), memory, memory_mask)
      x = self._after(x, y, norm, deterministic)
    norm = self.mlp_norm
    return self._after(x, self.mlp(inner(x, norm)), norm, deterministic)

  def init_cache(
    self, memory: Float[Array, "B S D"], num_steps: int
  ) -> LayerCache:
    """Returns the cache before the first of `num_steps` tokens."""
    cross_key, cross_value = self.cross_attention.keys_values(memory)
    empty = jnp.zeros(
      (memory.shape[0], num_steps, self.num_heads, self.head_dim), self.dtype
    )
    return LayerCache(empty, empty, cross_key, cross_value)

  def step(
    self,
    x: Float[Array, "B 1 D"],
    position: Int[Array, ""],
    memory_mask: Bool[Array, "B 1 S"],
    cache: LayerCache,
  ) -> tuple[Float[Array, "B 1 D"], LayerCache]:
    """Returns `x` of the token at `position` after the layer, and the cache."""
    norm, inner = self.self_attention_norm, self._before
    y = inner(x, norm)
    key, value = self.self_attention.keys_values(y)
    update = functools.partial(
      jax.lax.dynamic_update_slice_in_dim, start_index=position, axis=1
    )
    cache = dataclasses.replace(
      cache,
      self_key=update(cache.self_key, key),
      self_value=update(cache.self_value, value),
    )
    seen = jnp.arange(cache.self_key.shape[1]) <= position
    seen = jnp.broadcast_to(seen, (x.shape[0], 1, seen.shape[0]))
    y = self.self_attention.attend(y, cache.self_key, cache.self_value, seen)
    x = self._after(x, y, norm, True)
    norm = self.cross_attention_norm
    y = self.cross_attention.attend(
      inner(x, norm), cache.cross_key, cache.cross_value, memory_mask
    )
    x = self._after(x, y, norm, True)
    norm = self.mlp_norm
    return self._after(x, self.mlp(inner(x, norm)), norm, True), cache
