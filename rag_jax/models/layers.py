"""Transformer layers shared by the retriever encoder and the generator.

In: activations [N, T, D], where N is B or B*K. Out: the same shape.
"""

from collections.abc import Sequence
import dataclasses
import functools
import typing
from typing import Any

from flax import linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PyTree

from rag_jax.config_models import TransformerConfig
from rag_jax.models.attention import KEPT
from rag_jax.models.attention import Attention
from rag_jax.models.lora import DenseGeneral
from rag_jax.models.partitioning import INIT_STD
from rag_jax.models.partitioning import constrain
from rag_jax.models.partitioning import dense_init

# The axis names "B T S D N H" are those of DESIGN: here B may stand for B*K.
ACTIVATIONS = {
  "gelu": functools.partial(jax.nn.gelu, approximate=False),
  "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
  "relu": jax.nn.relu,
  "silu": jax.nn.silu,
  "tanh": jnp.tanh,
}


def check_positions(length: int, max_positions: int, what: str) -> None:
  """Raises `ValueError` if rows are longer than the table of positions.

  Without this check, JAX silently returns NaN or the last row of the table.

  Args:
    length: tokens per row, including padding.
    max_positions: rows of the table; 0 if there is none.
    what: name of the rows, for the error message.
  """
  if 0 < max_positions < length:
    raise ValueError(
      f"{what} of {length} tokens per row were given to a model with"
      f" {max_positions} learned positions; expected at most as many. Cut them"
      " to that length, or use a model with more positions."
    )


class PlusOneRmsNorm(nn.Module):
  """Gemma's RMS norm, which multiplies by 1 + `scale`.

  Params: `scale` [D], zero at first. It is stored without the 1, so that weight
  decay and rounding are those of the original.
  """

  epsilon: float
  dtype: DTypeLike = jnp.bfloat16

  @nn.compact
  def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    scale = self.param("scale", nn.initializers.zeros, x.shape[-1:])
    x = x.astype(jnp.float32)
    mean_square = jnp.mean(x * x, axis=-1, keepdims=True)
    x *= jax.lax.rsqrt(mean_square + self.epsilon)
    return (x * (1 + scale.astype(jnp.float32))).astype(self.dtype)


Norm = nn.LayerNorm | nn.RMSNorm | PlusOneRmsNorm


def make_norm(config: TransformerConfig, **kwargs: Any) -> Norm:
  """Returns a layer norm, T5's RMS norm without mean and bias, or Gemma's.

  All compute in float32 and return `dtype`.
  """
  kind = {
    "layer": nn.LayerNorm,
    "rms": nn.RMSNorm,
    "rms_plus_one": PlusOneRmsNorm,
  }[config.norm_kind]
  return kind(epsilon=config.norm_eps, **kwargs)


class Mlp(nn.Module):
  """Two dense layers with an activation between.

  Params: `up`, `down`; `gate` if config.gated: then `up` is multiplied by the
  activation of `gate` (Shazeer 2020, https://arxiv.org/abs/2002.05202).
  """

  config: TransformerConfig
  out_init_scale: float = 1.0
  dtype: DTypeLike = jnp.bfloat16

  @nn.compact
  def __call__(
    self, x: Float[Array, "B T D"], deterministic: bool = True
  ) -> Float[Array, "B T D"]:
    c = self.config
    dense = functools.partial(
      DenseGeneral, use_bias=c.use_bias, dtype=self.dtype
    )
    wide = functools.partial(
      dense, c.mlp_dim, kernel_init=dense_init("embed", "mlp")
    )
    act = ACTIVATIONS[c.activation]
    hidden = wide(name="up")(x)  # B T F
    hidden = act(wide(name="gate")(x)) * hidden if c.gated else act(hidden)
    drop = nn.Dropout(c.activation_dropout)
    hidden = drop(hidden, deterministic=deterministic)
    return dense(
      x.shape[-1],
      kernel_init=dense_init(
        "mlp", "embed", std=INIT_STD * self.out_init_scale
      ),
      name="down",
    )(hidden)


# Not type-checked, because JAX also builds it from shapes and stacked arrays.
@typing.no_type_check
@flax.struct.dataclass
class LayerCache:
  """The keys and values that one decoder layer keeps between steps.

  The self-attention part has one slot per step and beam, ordered by step.
  Slots are never moved: a beam finds the keys of its history through
  `DecoderCache.ancestors`, so reordering beams copies nothing.
  """

  self_key: Float[Array, "BK N H TW"]
  self_value: Float[Array, "BK N TW H"]
  cross_key: Float[Array, "BK N H S"]
  cross_value: Float[Array, "BK N S H"]


class TransformerLayer(nn.Module):
  """Self-attention, cross-attention in a decoder, and an MLP.

  Each is a residual block; `config.norm` places its norm after the sum ("post":
  BERT, BART) or before the block ("pre": T5).
  """

  config: TransformerConfig  # relative positions: self-attention only
  cross: bool = False  # a decoder layer
  self_start: str = "normal"  # of self-attention; see Attention
  cross_start: str = "normal"
  out_init_scale: float = 1.0  # of self-attention and MLP outputs
  attention_rows: int = 0  # see Attention
  dtype: DTypeLike = jnp.bfloat16

  def setup(self):
    c = self.config
    norm = functools.partial(make_norm, c, dtype=self.dtype)
    attention = functools.partial(
      Attention, rows=self.attention_rows, dtype=self.dtype
    )
    self.self_attention = attention(c, self.self_start, self.out_init_scale)
    self.self_attention_norm = norm()
    if self.cross:
      self.cross_attention = attention(
        c.frozen(relative_buckets=0), self.cross_start
      )
      self.cross_attention_norm = norm()
    self.mlp = Mlp(c, self.out_init_scale, dtype=self.dtype)
    self.mlp_norm = norm()
    self.drop = nn.Dropout(c.dropout)

  def _before(self, x: Array, norm: Norm) -> Array:
    return norm(x) if self.config.norm == "pre" else x

  def _after(
    self, x: Array, update: Array, norm: Norm, deterministic: bool
  ) -> Array:
    x = x + self.drop(update, deterministic=deterministic)
    return norm(x) if self.config.norm == "post" else x

  def __call__(
    self,
    x: Float[Array, "B T D"],
    mask: Bool[Array, "#B #T T"],
    memory: Float[Array, "B S D"] | None = None,
    memory_mask: Bool[Array, "B 1 S"] | None = None,
    bias: Float[Array, "#B N T T"] | None = None,
    deterministic: bool = True,
  ) -> Float[Array, "B T D"]:
    """Returns `x` after the layer; with `memory`, as a decoder layer."""
    inner = self._before
    x = self._after_self(x, mask, bias, deterministic)
    if self.cross:
      assert memory is not None
      assert memory_mask is not None
      norm = self.cross_attention_norm
      y = inner(x, norm)
      y = self.cross_attention(
        y, memory, memory_mask, deterministic=deterministic
      )
      x = self._after(x, y, norm, deterministic)
    norm = self.mlp_norm
    y = self.mlp(inner(x, norm), deterministic)
    return self._after(x, y, norm, deterministic)

  def _after_self(
    self,
    x: Float[Array, "B T D"],
    mask: Bool[Array, "#B #T T"],
    bias: Float[Array, "#B N T T"] | None,
    deterministic: bool,
  ) -> Float[Array, "B T D"]:
    """Returns `x` after self-attention, the first block."""
    norm = self.self_attention_norm
    y = self._before(x, norm)
    y = self.self_attention(y, y, mask, bias, deterministic)
    return self._after(x, y, norm, deterministic)

  def looks(
    self,
    x: Float[Array, "B T D"],
    mask: Bool[Array, "#B #T T"],
    memory: Float[Array, "B S D"],
    memory_mask: Bool[Array, "B 1 S"],
    bias: Float[Array, "#B N T T"] | None = None,
    *,
    logits: bool = False,
  ) -> Float[Array, "B T S"]:
    """Returns how much each token attends to the memory: `Attention.looks`."""
    x = self._after_self(x, mask, bias, True)
    x = self._before(x, self.cross_attention_norm)
    return self.cross_attention.looks(x, memory, memory_mask, logits=logits)

  def init_cache(
    self, memory: Float[Array, "B S D"], num_beams: int, num_steps: int
  ) -> LayerCache:
    """Returns the cache before the first of `num_steps` tokens."""
    cross_key, cross_value = self.cross_attention.keys_values(memory)
    rows, places = (len(memory), self.config.num_heads), num_steps * num_beams
    return LayerCache(
      jnp.zeros((*rows, self.config.head_size, places), self.dtype),
      jnp.zeros((*rows, places, self.config.head_size), self.dtype),
      cross_key,
      cross_value,
    )

  def step(
    self,
    x: Float[Array, "B W D"],
    position: Int[Array, ""],
    seen: Bool[Array, "B W TW"],
    memory_mask: Bool[Array, "B 1 S"],
    cache: LayerCache,
    bias: Float[Array, "#B N W TW"] | None = None,
  ) -> tuple[Float[Array, "B W D"], LayerCache]:
    """Returns the layer's output for the tokens at `position`, and the cache.

    Args:
      x: the activations of one token per beam.
      position: the step of these tokens.
      seen: True on the slots of the cache (T steps times W beams) that belong
        to the beam's history.
      memory_mask: True on real tokens of the memory, shared by all beams.
      cache: the cache of this layer.
      bias: relative position bias of the slots.
    """
    norm, inner = self.self_attention_norm, self._before
    y = inner(x, norm)
    update = functools.partial(
      jax.lax.dynamic_update_slice_in_dim, start_index=position * x.shape[1]
    )
    key, value = self.self_attention.keys_values(y)
    cache = dataclasses.replace(
      cache,
      self_key=update(cache.self_key, key, axis=-1),
      self_value=update(cache.self_value, value, axis=-2),
    )
    y = self.self_attention.attend(
      y, cache.self_key, cache.self_value, seen, bias
    )
    x = self._after(x, y, norm, True)
    norm = self.cross_attention_norm
    y = self.cross_attention.attend(
      inner(x, norm), cache.cross_key, cache.cross_value, memory_mask
    )
    x = self._after(x, y, norm, True)
    norm = self.mlp_norm
    return self._after(x, self.mlp(inner(x, norm)), norm, True), cache


# By `train.remat`: which intermediate values the backward pass finds in memory.
# It computes all others again, from the input of each layer.
REMAT = {
  "none": jax.checkpoint_policies.everything_saveable,
  # The products with weights, not those of attention.
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  "attention": jax.checkpoint_policies.save_only_these_names(*KEPT),
  "full": jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True, slots=True)
class LayerLoop:
  """How a program runs the layers of a stack. Their output stays the same.

  Attributes:
    scan: True compiles one layer and runs it once per layer, over parameters
      that are stacked inside the program. False compiles every layer: a program
      larger by about the number of layers, which takes longer to compile.
    remat: a key of `REMAT`.
    attention_rows: of how many rows of B the logits of attention exist at a
      time, on each device; 0: of all.
  """

  scan: bool = False
  remat: str = "none"
  attention_rows: int = 0

  def run(
    self,
    layers: Sequence[Any],
    x: Float[Array, "B T D"],
    *inputs: Any,
    deterministic: bool,
    each: Sequence[int] = (),
  ) -> Float[Array, "B T D"]:
    """Returns `x` after all layers.

    The parameters of a model are one subtree per layer, "layer_0" and so on,
    however the layers run. Freezing by name, checkpoints, and the weights of
    other libraries therefore do not depend on it.

    Args:
      layers: bound modules, which differ only in their parameters.
      x: the input of the first layer.
      *inputs: the arguments of a layer after `x`, the same for all layers.
      deterministic: whether to turn dropout off.
      each: the last argument of each layer, a number; (): there is none.
    """
    axes = "batch", "length", "embed"
    last = [(number,) for number in each] or [()] * len(layers)
    if self == UNROLLED or not layers or layers[0].is_initializing():
      for layer, own in zip(layers, last, strict=True):
        x = layer(x, *inputs, *own, deterministic=deterministic)
        x = constrain(x, *axes)
      return x
    layer = layers[0].clone(
      parent=None, name=None, attention_rows=self.attention_rows
    )
    params = [layer.variables["params"] for layer in layers]
    keys = None
    if not deterministic and layers[0].has_rng("dropout"):
      keys = jax.random.split(layers[0].make_rng("dropout"), len(layers))

    def body(x: Array, of_layer: Any) -> tuple[Array, None]:
      params, key, own = of_layer
      y = layer.apply(
        {"params": params},
        x,
        *inputs,
        *own,
        deterministic=deterministic,
        rngs={} if key is None else {"dropout": key},
      )
      assert isinstance(y, jax.Array)
      return constrain(y, *axes), None

    # A loop in the program keeps the compiler from undoing the recomputation.
    body = jax.checkpoint(
      body, policy=REMAT[self.remat], prevent_cse=not self.scan
    )
    if self.scan:
      own = tuple(map(jnp.asarray, zip(*last, strict=True)))
      of_layers = _stacked(params, layer.dtype), keys, own
      return jax.lax.scan(body, x, of_layers)[0]
    for i, (of_layer, own) in enumerate(zip(params, last, strict=True)):
      x, _ = body(x, (of_layer, None if keys is None else keys[i], own))
    return x


UNROLLED = LayerLoop()


def _stacked(params: Sequence[PyTree], dtype: DTypeLike) -> PyTree:
  """Returns the parameters of layers, stacked along a new first dimension.

  Kernels are stacked in the `dtype` they are multiplied in: a copy in float32
  would need twice the memory.
  """

  def stack(path: tuple[Any, ...], *arrays: Array) -> Array:
    if path[-1].key == "kernel":
      arrays = tuple(jnp.asarray(x, dtype) for x in arrays)
    return jnp.stack(arrays)

  return jax.tree_util.tree_map_with_path(stack, *params)
