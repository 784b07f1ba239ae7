"""Multi-head attention, and T5's relative positions.

In: activations [N, T, D], where N is B or B*K. Out: the same shape.
"""

from collections.abc import Callable, Sequence
import functools
from typing import Any

from flax import linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int
import numpy as np

from rag_jax.config_models import TransformerConfig
from rag_jax.models.lora import DenseGeneral
from rag_jax.models.partitioning import INIT_STD
from rag_jax.models.partitioning import batch_parts
from rag_jax.models.partitioning import batch_whole
from rag_jax.models.partitioning import named
from rag_jax.models.partitioning import num_batch_parts
from rag_jax.models.vocabulary import capped

# The axis names "B T S D N H" are those of DESIGN: here B may stand for B*K.
# The axis order is the one that the products in `attend` read. With any other,
# each decoding step would transpose all keys and values again.
Keys = Float[Array, "B G H S"]  # G heads: N, or fewer for groups of queries
Values = Float[Array, "B G S H"]
Bias = Float[Array, "#B N T S"]

_LOWEST = float(np.finfo(np.float32).min)  # logit of what may not be seen

# What the backward pass finds in memory with train.remat="attention".
KEPT = ("query", "key", "value", "mixed")


def identity_init(
  key: Array, shape: tuple[int, int], dtype: DTypeLike = jnp.float32
) -> Array:
  """Returns the identity; Flax passes the shapes of head kernels flattened."""
  return jnp.eye(*shape, dtype=dtype)


def rolled_identity(scale: float, roll: int) -> nn.initializers.Initializer:
  """Returns an initializer: `scale` times the column-rolled identity."""

  def init(
    key: Array, shape: tuple[int, int], dtype: DTypeLike = jnp.float32
  ) -> Array:
    return scale * jnp.roll(jnp.eye(*shape, dtype=dtype), roll, axis=1)

  return init


@functools.cache
def _buckets_by_distance(num_buckets: int, max_distance: int) -> np.ndarray:
  """Returns the bucket of each distance from 0 to `max_distance`.

  The first half of the buckets hold one distance each. Computed once, in
  float32 like PyTorch's T5: other rounding would change buckets at a border.
  """
  exact = num_buckets // 2
  distance = np.arange(max_distance + 1)
  far = np.maximum(distance, 1).astype(np.float32) / np.float32(exact)
  scale = np.float32(np.log(max_distance / exact))
  far = np.log(far) / scale * np.float32(num_buckets - exact)
  far = np.minimum(exact + far.astype(np.int64), num_buckets - 1)
  return np.where(distance < exact, distance, far).astype(np.int32)


def relative_bucket(
  offset: Int[Array, "*shape"],
  num_buckets: int,
  max_distance: int = 128,
  *,
  bidirectional: bool = True,
) -> Int[Array, "*shape"]:
  """Returns T5's bucket of each offset (key position - query position).

  Near offsets have a bucket each; far offsets share buckets that widen with
  distance. If bidirectional, half of the buckets are for keys before the query
  and half for keys after it; otherwise all are for keys before. Raffel et al.
  2020,
  https://arxiv.org/abs/1910.10683, section 2.1.
  """
  if bidirectional:
    num_buckets //= 2
    distance = jnp.abs(offset)
  else:
    distance = jnp.maximum(-offset, 0)
  table = jnp.asarray(_buckets_by_distance(num_buckets, max_distance))
  bucket = table[jnp.minimum(distance, max_distance)]
  return bucket + jnp.where((offset > 0) & bidirectional, num_buckets, 0)


def relative_bias(
  table: Float[Array, "buckets N"],
  offset: Int[Array, "#B T S"],
  max_distance: int,
  *,
  bidirectional: bool,
) -> Bias:
  """Returns the bias of the attention logits, given the offsets of the keys."""
  bucket = relative_bucket(
    offset, table.shape[0], max_distance, bidirectional=bidirectional
  )
  return jnp.moveaxis(table.astype(jnp.float32)[bucket], -1, 1)


# Initialisations of an attention module. "normal": as in BERT and BART. The
# others form an induction head, which copies
# (https://arxiv.org/abs/2209.11895). "previous" adds the previous token to each
# token. "copy" attends to the position whose previous token was just written,
# and outputs the token there. "previous again", in the decoder's first layer
# and the encoder's second, adds it with another roll, to match two tokens.
_COPY_LOGIT = 2.0  # attention logit of a match before training
_PREVIOUS_BIAS = 6.0  # bias of the offset -1: weight exp(6), others 1


def previous_bias_init(
  key: Array, shape: tuple[int, int], dtype: DTypeLike = jnp.float32
) -> Array:
  """Returns a table [buckets, N] that favours the offset -1, bucket 1."""
  previous = jnp.arange(shape[0])[:, None] == 1
  return jnp.broadcast_to(_PREVIOUS_BIAS * previous, shape).astype(dtype)


class Attention(nn.Module):
  """Multi-head attention of `x` over `memory`; self-attention if both are `x`.

  Params: `query`, `key`, `value` kernels [D, N, H]; `out` kernel [N, H, D];
  `relative_bias` [buckets, N] if the module has its own relative positions.
  """

  config: TransformerConfig
  start: str = "normal"  # or "previous", "previous again", "copy": see above
  out_init_scale: float = 1.0  # std of the `out` kernel, in INIT_STD
  rows: int = 0  # of B whose logits exist at a time, per device; 0: all
  dtype: DTypeLike = jnp.bfloat16  # of activations and matmuls

  def setup(self):
    c = self.config
    dense = functools.partial(
      DenseGeneral, use_bias=c.use_bias, dtype=self.dtype
    )
    heads = functools.partial(dense, features=(c.num_heads, c.head_size))
    self.drop = nn.Dropout(c.attention_dropout)
    inits = self._inits()
    axes = ("embed", "heads", "head_dim")
    self.query = heads(kernel_init=named(inits["query"], *axes))
    self.key = heads(kernel_init=named(inits["key"], *axes))
    self.value = heads(kernel_init=named(inits["value"], *axes))
    self.out = dense(
      features=c.embed_dim,
      axis=(-2, -1),
      kernel_init=named(inits["out"], *axes[1:], "embed"),
    )
    if c.relative_buckets:
      self.relative_bias = self.param(
        "relative_bias",
        named(inits["bias"], "position", "heads"),
        (c.relative_buckets, c.num_heads),
      )

  def _inits(self) -> dict[str, Any]:
    """Returns the initializer of each kernel."""
    dim = self.config.embed_dim
    normal = nn.initializers.normal(INIT_STD)
    inits: dict[str, Any] = dict.fromkeys(("query", "key", "value"), normal)
    inits["out"] = nn.initializers.normal(INIT_STD * self.out_init_scale)
    inits["bias"] = nn.initializers.zeros
    # If logits are not divided by sqrt(H), the initial query kernel is.
    c = self.config
    root = 1.0 if c.scale_attention else c.head_size**-0.5
    if self.start == "normal":
      inits["query"] = nn.initializers.normal(INIT_STD * root)
    elif self.start in ("previous", "previous again"):
      # The roll writes the previous token to other dimensions than the token.
      # The norm gives it length sqrt(D); the scale restores a token's length.
      roll = dim // 2 if self.start == "previous" else dim // 4
      inits["query"] = nn.initializers.normal(INIT_STD * root)
      inits["value"] = identity_init
      inits["out"] = rolled_identity(dim**-0.5, roll)
      inits["bias"] = previous_bias_init
    else:
      # `key` undoes the roll of "previous".
      inits["query"] = rolled_identity(root * _COPY_LOGIT**0.5, 0)
      inits["key"] = rolled_identity(_COPY_LOGIT**0.5, -(dim // 2))
      inits["value"] = inits["out"] = identity_init
    return inits

  def keys_values(self, memory: Float[Array, "B S D"]) -> tuple[Keys, Values]:
    """Returns the keys and values of `memory`."""
    key = checkpoint_name(self.key(memory), "key")  # B S N H
    value = checkpoint_name(self.value(memory), "value")
    return jnp.moveaxis(key, 1, -1), jnp.moveaxis(value, 1, -2)

  def attend(
    self,
    x: Float[Array, "B T D"],
    key: Keys,
    value: Values,
    mask: Bool[Array, "#B #T S"],  # True where attention is allowed
    bias: Bias | None = None,
    deterministic: bool = True,
  ) -> Float[Array, "B T D"]:
    """Returns the output projection of the values that `x` attends to.

    If every key is masked, as in a row of padding only, the weighted sum is
    zero, as in transformers; T5 takes the mean of the masked values.
    """
    c = self.config
    query = checkpoint_name(self.query(x), "query")  # B T N H
    if c.scale_attention:
      query *= c.head_size**-0.5
    if c.relative_buckets:
      offset = jnp.arange(key.shape[-1]) - jnp.arange(x.shape[1])[:, None]
      own = relative_bias(
        self.relative_bias,
        offset[None],
        c.relative_max_distance,
        bidirectional=True,
      )
      bias = own if bias is None else bias + own
    mixed = mix(
      self.drop,
      *(query, key, value, mask, bias),
      rows=self.rows,
      deterministic=deterministic,
    )
    mixed = checkpoint_name(mixed, "mixed")
    if c.scale_attention:  # T5 takes the mean
      mixed = jnp.where(jnp.any(mask, axis=-1)[..., None, None], mixed, 0.0)
    return self.out(mixed)

  def looks(
    self,
    x: Float[Array, "B T D"],
    memory: Float[Array, "B S D"],
    mask: Bool[Array, "#B #T S"],
    *,
    logits: bool = False,
  ) -> Float[Array, "B T S"]:
    """Returns how much each token attends to each place, a mean over heads.

    That is the attention times the L2 norm of the value (Kobayashi et al. 2020,
    https://arxiv.org/abs/2004.10102, without the output projection); with
    `logits`, the attention before the softmax, also where it is masked.
    """
    c = self.config
    key, value = self.keys_values(memory)
    query = self.query(x)
    if c.scale_attention:
      query *= c.head_size**-0.5
    found = _logits(query, key)
    if not logits:
      norms = jnp.linalg.norm(value.astype(jnp.float32), axis=-1)  # B N S
      found = _weights(found, mask, 0.0) * norms[:, :, None]
    return jnp.mean(found, axis=1)

  def __call__(
    self,
    x: Float[Array, "B T D"],
    memory: Float[Array, "B S D"],
    mask: Bool[Array, "#B #T S"],
    bias: Bias | None = None,
    deterministic: bool = True,
  ) -> Float[Array, "B T D"]:
    key, value = self.keys_values(memory)
    return self.attend(x, key, value, mask, bias, deterministic)


def mix(
  dropout: nn.Dropout,
  query: Float[Array, "B T N H"],
  key: Keys,
  value: Values,
  mask: Bool[Array, "#B #T S"],
  bias: Bias | None = None,
  *,
  rows: int = 0,
  soft_cap: float = 0.0,
  deterministic: bool = True,
) -> Float[Array, "B T N H"]:
  """Returns the means of the values, weighted by attention.

  Keys and values may have fewer heads than the queries: each is for as many
  queries that follow each other.

  Args:
    dropout: of the weights; a bound module.
    query: already scaled.
    key: of S places.
    value: of S places.
    mask: True where attention is allowed.
    bias: added to the logits.
    rows: of B whose logits exist at a time, on each device; 0: all.
    soft_cap: logits x become soft_cap * tanh(x / soft_cap); 0.0: no cap.
    deterministic: whether to turn dropout off.
  """
  parts = num_batch_parts(len(query), rows)
  if parts > 1:
    keys = None
    if dropout.rate and not deterministic:
      keys = jax.random.split(dropout.make_rng("dropout"), parts)
    return _mix_parts(
      parts, query, key, value, mask, bias, soft_cap, dropout.rate, keys
    )
  drop = functools.partial(dropout, deterministic=deterministic)
  return _mix(query, key, value, mask, bias=bias, drop=drop, soft_cap=soft_cap)


def _mix_parts(
  num_parts: int,
  query: Float[Array, "B T N H"],
  key: Keys,
  value: Values,
  mask: Bool[Array, "#B #T S"],
  bias: Bias | None,
  soft_cap: float,
  rate: float,
  keys: Array | None,
) -> Float[Array, "B T N H"]:
  """Returns what `_mix` does, from one part of the rows after the other.

  The backward pass computes the logits of each part again. Those of all rows
  never exist, and those of a part are small enough to stay on the chip.
  """
  axes = {
    "query": ("length", "heads", None),
    "key": ("heads", None, "length"),
    "value": ("heads", "length", None),
    "mask": (None, None),
    "bias": ("heads", None, None),
  }
  inputs = {"query": query, "key": key, "value": value, "mask": mask}
  if bias is not None:
    inputs["bias"] = bias
  of_rows = {
    name: batch_parts(x, num_parts, *axes[name])
    for name, x in inputs.items()
    if len(x) == len(query)
  }
  of_all: dict[str, Any] = {
    name: x for name, x in inputs.items() if name not in of_rows
  }

  def drop(x: Array, key: Array | None) -> Array:
    if key is None:
      return x
    module = nn.Dropout(rate, deterministic=False, parent=None)
    dropped = module.apply({}, x, rngs={"dropout": key})
    assert isinstance(dropped, jax.Array)
    return dropped

  def mix_part(_: None, part: tuple[dict[str, Any], Array | None]) -> Any:
    inputs, key = part
    mix = functools.partial(
      _mix, drop=functools.partial(drop, key=key), soft_cap=soft_cap
    )
    return None, mix(**inputs, **of_all)

  # The loop keeps the compiler from undoing the recomputation.
  body = jax.checkpoint(mix_part, prevent_cse=False)
  mixed = jax.lax.scan(body, None, (of_rows, keys))[1]
  return batch_whole(mixed, *axes["query"])


def _mix(
  query: Float[Array, "B T N H"],
  key: Keys,
  value: Values,
  mask: Bool[Array, "#B #T S"],
  *,
  drop: Callable[[Array], Array],
  bias: Bias | None = None,
  soft_cap: float = 0.0,
) -> Float[Array, "B T N H"]:
  """Returns the means of the values, weighted by attention."""
  logits = _logits(query, key)
  if bias is not None:
    logits += bias
  return _means(
    drop(_weights(logits, mask, soft_cap).astype(value.dtype)), value
  )


def mix_parts(
  query: Float[Array, "B T N H"],
  places: Sequence[tuple[Float[Array, "_b G H _s"], Float[Array, "_b G _s H"]]],
  masks: Sequence[Bool[Array, "B T _s"]],
  *,
  soft_cap: float = 0.0,
) -> Float[Array, "B T N H"]:
  """Returns what `mix` does, for keys and values in several arrays.

  Args:
    query: already scaled.
    places: keys and values. Their first axis may be shorter than B: each row is
      then for as many rows of the queries, which follow each other.
    masks: True where attention is allowed, for each of `places`.
    soft_cap: as in `mix`.
  """
  b, t, n, h = query.shape
  logits = []
  for (key, _), mask in zip(places, masks, strict=True):
    rows = len(key)
    part = _logits(query.reshape(rows, -1, n, h), key)
    part = part.reshape(rows, n, b // rows, t, -1)
    mask = mask.reshape(rows, 1, b // rows, t, -1)
    part = jnp.where(mask, capped(part, soft_cap), _LOWEST)
    logits.append(part)
  # One softmax over all parts, without an array that holds them together.
  largest = functools.reduce(
    jnp.maximum, [_by_row(jnp.max(part, axis=-1)) for part in logits]
  )  # B N T
  mixed, total = 0.0, 0.0
  for (_, value), part in zip(places, logits, strict=True):
    rows = len(value)
    top = largest.reshape(rows, b // rows, n, t)
    weights = jnp.exp(part - jnp.moveaxis(top, 2, 1)[..., None])
    total += _by_row(jnp.sum(weights, axis=-1))
    weights = weights.astype(value.dtype).reshape(rows, n, b // rows * t, -1)
    mixed += _means(weights, value).reshape(b, t, n, h).astype(jnp.float32)
  return (mixed / jnp.moveaxis(total, 1, 2)[..., None]).astype(query.dtype)


def _by_row(x: Float[Array, "R N g T"]) -> Float[Array, "B N T"]:
  """Returns the same numbers, whose rows are g queries after each other."""
  return jnp.moveaxis(x, 1, 2).reshape(-1, x.shape[1], x.shape[3])


def _logits(
  query: Float[Array, "B T N H"], key: Keys
) -> Float[Array, "B N T S"]:
  """Returns the products of queries and keys, in float32."""
  b, t, n, h = query.shape
  grouped = key.shape[1] != n
  if grouped:
    query = query.reshape(b, t, key.shape[1], -1, h)
  logits = jnp.einsum(
    "BTGRH,BGHS->BGRTS" if grouped else "BTNH,BNHS->BNTS",
    *(query, key),
    preferred_element_type=jnp.float32,
  )
  return logits.reshape(b, n, t, -1)


def _weights(
  logits: Float[Array, "B N T S"],
  mask: Bool[Array, "#B #T S"],
  soft_cap: float,
) -> Float[Array, "B N T S"]:
  """Returns the softmax, in float32: bfloat16 keeps 8 bits of mantissa."""
  logits = capped(logits, soft_cap)
  logits = jnp.where(mask[:, None], logits, _LOWEST)
  return jax.nn.softmax(logits, axis=-1)


def _means(
  weights: Float[Array, "B N T S"], value: Values
) -> Float[Array, "B T N H"]:
  """Returns the means of the values."""
  b, n, t, _ = weights.shape
  if value.shape[1] == n:
    return jnp.einsum("BNTS,BNSH->BTNH", weights, value)
  weights = weights.reshape(b, value.shape[1], -1, *weights.shape[2:])
  mixed = jnp.einsum("BGRTS,BGSH->BTGRH", weights, value)
  return mixed.reshape(b, t, n, -1)
