"""The layers of a decoder-only generator.

In: activations [B, T, D], and which places each token sees. Out: the same
shape; and keys and values, which the next tokens need.
"""

from collections.abc import Sequence
import functools
import typing

from flax import linen as nn
import flax.struct
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from rag_jax.config_models import CausalConfig
from rag_jax.models.attention import Keys
from rag_jax.models.attention import Values
from rag_jax.models.attention import mix
from rag_jax.models.attention import mix_parts
from rag_jax.models.layers import Mlp
from rag_jax.models.layers import make_norm
from rag_jax.models.lora import DenseGeneral
from rag_jax.models.partitioning import constrain
from rag_jax.models.partitioning import dense_init
from rag_jax.models.rope import Rotation
from rag_jax.models.rope import rotate


class CausalAttention(nn.Module):
  """Self-attention whose keys and values may have fewer heads (G) than N.

  Params: `query` kernel [D, N, H]; `key`, `value` kernels [D, G, H]; `out`
  kernel [N, H, D]; `query_norm`, `key_norm` [H] if config.qk_norm.

  The tensor axis of the mesh splits heads. If it does not divide G, it splits H
  of the kernels of keys and values instead (`partitioning.shardings`).
  """

  config: CausalConfig
  rows: int = 0  # of B whose logits exist at a time, per device; 0: all
  dtype: DTypeLike = jnp.bfloat16

  def setup(self):
    c = self.config
    axes = ("embed", "heads", "head_dim")
    dense = functools.partial(DenseGeneral, dtype=self.dtype)
    heads = functools.partial(
      dense, use_bias=c.qkv_bias, kernel_init=dense_init(*axes)
    )
    self.query = heads((c.num_heads, c.head_size))
    self.key = heads((c.kv_heads, c.head_size))
    self.value = heads((c.kv_heads, c.head_size))
    self.out = dense(
      c.embed_dim,
      axis=(-2, -1),
      use_bias=c.out_bias,
      kernel_init=dense_init(*axes[1:], "embed"),
    )
    if c.qk_norm:
      self.query_norm = make_norm(c, dtype=self.dtype)
      self.key_norm = make_norm(c, dtype=self.dtype)
    self.drop = nn.Dropout(c.attention_dropout)

  def keys_values(
    self, x: Float[Array, "B T D"], rotation: Rotation | None
  ) -> tuple[Keys, Values]:
    """Returns the keys and values of tokens; `rotation` is of their places."""
    key = self.key(x)  # B T G H
    if self.config.qk_norm:
      key = self.key_norm(key)
    if rotation is not None:
      key = rotate(key, rotation)
    key = checkpoint_name(key, "key")
    value = checkpoint_name(self.value(x), "value")
    key, value = jnp.moveaxis(key, 1, -1), jnp.moveaxis(value, 1, -2)
    return (
      constrain(key, "batch", "heads", None, "length"),
      constrain(value, "batch", "heads", "length", None),
    )

  def queries(
    self, x: Float[Array, "B T D"], rotation: Rotation | None
  ) -> Float[Array, "B T N H"]:
    """Returns the scaled queries of tokens; `rotation` is of their places."""
    c = self.config
    query = self.query(x)  # B T N H
    if c.qk_norm:
      query = self.query_norm(query)
    if rotation is not None:
      query = rotate(query, rotation)
    query = checkpoint_name(query, "query")
    if c.scale_attention:
      query *= (c.query_pre_attn_scalar or c.head_size) ** -0.5
    return query

  def __call__(
    self,
    x: Float[Array, "B T D"],
    mask: Bool[Array, "#B T T"],
    rotation: Rotation | None,
    deterministic: bool = True,
  ) -> Float[Array, "B T D"]:
    """Returns the output for tokens that see each other as `mask` says."""
    key, value = self.keys_values(x, rotation)
    mixed = mix(
      self.drop,
      *(self.queries(x, rotation), key, value, mask),
      rows=self.rows,
      soft_cap=self.config.attention_soft_cap,
      deterministic=deterministic,
    )
    return self.out(checkpoint_name(mixed, "mixed"))

  def attend(
    self,
    x: Float[Array, "B T D"],
    rotation: Rotation | None,
    places: Sequence["KeysValues"],
    masks: Sequence[Bool[Array, "B T _s"]],
  ) -> Float[Array, "B T D"]:
    """Returns the output for tokens that see keys and values kept before."""
    mixed = mix_parts(
      self.queries(x, rotation),
      [(kept.key, kept.value) for kept in places],
      masks,
      soft_cap=self.config.attention_soft_cap,
    )
    return self.out(mixed)


# Not type-checked, because JAX also builds it from shapes and stacked arrays.
@typing.no_type_check
@flax.struct.dataclass
class KeysValues:
  """The keys and values that a layer keeps, of S places."""

  key: Keys
  value: Values


class CausalLayer(nn.Module):
  """Self-attention and an MLP, each a residual block with its norm before.

  Params: `self_attention`, `self_attention_norm`, `mlp`, `mlp_norm`; with
  config.post_norms `self_attention_post_norm` and `mlp_post_norm`.
  """

  config: CausalConfig
  attention_rows: int = 0  # see CausalAttention
  dtype: DTypeLike = jnp.bfloat16

  def setup(self):
    c = self.config
    norm = functools.partial(make_norm, c, dtype=self.dtype)
    self.self_attention = CausalAttention(c, self.attention_rows, self.dtype)
    self.self_attention_norm = norm()
    self.mlp = Mlp(c, dtype=self.dtype)
    self.mlp_norm = norm()
    if c.post_norms:
      self.self_attention_post_norm = norm()
      self.mlp_post_norm = norm()
    self.drop = nn.Dropout(c.dropout)

  def __call__(
    self,
    x: Float[Array, "B T D"],
    masks: Bool[Array, "kinds B T T"],
    rotations: Float[Array, "kinds 2 B T half"] | None,
    kind: int | Int[Array, ""],
    deterministic: bool = True,
  ) -> Float[Array, "B T D"]:
    """Returns `x` after the layer, which is the `kind`-th of its kinds."""
    mask = masks[kind]
    rotation = None if rotations is None else rotations[kind]
    y = self.self_attention_norm(x)
    y = self.self_attention(y, mask, rotation, deterministic)
    return self._finish(x, y, deterministic)

  def _finish(
    self, x: Array, update: Array, deterministic: bool
  ) -> Float[Array, "B T D"]:
    """Returns the layer's output, given that of attention."""
    post_norms = self.config.post_norms
    if post_norms:
      update = self.self_attention_post_norm(update)
    x = x + self.drop(update, deterministic=deterministic)
    update = self.mlp(self.mlp_norm(x), deterministic)
    if post_norms:
      update = self.mlp_post_norm(update)
    return x + self.drop(update, deterministic=deterministic)

  def empty(self, num_rows: int, num_places: int) -> KeysValues:
    """Returns keys and values of places where nothing is yet."""
    c = self.config
    size = num_rows, c.kv_heads
    return KeysValues(
      jnp.zeros((*size, c.head_size, num_places), self.dtype),
      jnp.zeros((*size, num_places, c.head_size), self.dtype),
    )

  def read(
    self,
    x: Float[Array, "B T D"],
    rotation: Rotation | None,
    before: Sequence[KeysValues],
    masks: Sequence[Bool[Array, "B T _s"]],
    own: KeysValues | None = None,
    first: int | Int[Array, ""] = 0,
  ) -> tuple[Float[Array, "B T D"], KeysValues]:
    """Returns the output for T tokens, and their keys and values.

    Args:
      x: the activations of the tokens.
      rotation: of their positions.
      before: keys and values of what stands before them: see
        `attention.mix_parts`.
      masks: which places each token sees: those of `before`, and last its own.
      own: to write the new keys and values into, if there are other places
        beside theirs; None: there are not.
      first: the place of the first token in `own`.
    """
    y = self.self_attention_norm(x)
    made = KeysValues(*self.self_attention.keys_values(y, rotation))
    if own is not None:
      write = functools.partial(
        jax.lax.dynamic_update_slice_in_dim, start_index=first
      )
      made = KeysValues(
        write(own.key, made.key, axis=-1), write(own.value, made.value, axis=-2)
      )
    y = self.self_attention.attend(y, rotation, [*before, made], masks)
    return self._finish(x, y, True), made
