"""The retriever's encoder: embeds the tokens of a question or passage."""

from collections.abc import Callable
import dataclasses
import functools

from flax import linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from rag_jax.config_models import EncoderConfig
from rag_jax.config_models import TransformerConfig
from rag_jax.models.attention import Bias
from rag_jax.models.attention import identity_init
from rag_jax.models.attention import relative_bias
from rag_jax.models.layers import ACTIVATIONS
from rag_jax.models.layers import UNROLLED
from rag_jax.models.layers import LayerLoop
from rag_jax.models.layers import Norm
from rag_jax.models.layers import TransformerLayer
from rag_jax.models.layers import check_positions
from rag_jax.models.layers import make_norm
from rag_jax.models.partitioning import INIT_STD
from rag_jax.models.partitioning import constrain
from rag_jax.models.partitioning import dense_init
from rag_jax.models.partitioning import named
from rag_jax.models.partitioning import split_table


def layer_config(config: EncoderConfig) -> TransformerConfig:
  """Returns the config of the layers, which share their relative positions."""
  names = {field.name for field in dataclasses.fields(TransformerConfig)}
  layer = TransformerConfig(**{name: getattr(config, name) for name in names})
  return layer.frozen(relative_buckets=0)


class RetrieverEncoder(nn.Module):
  """BERT, MPNet or T5's encoder with any number of layers, pooled to a vector.

  Without layers there are no positions and no embedding norm: the embedding is
  the pooled token embeddings, a trainable bag of words.

  The pooled vector of a row without real tokens is zero, so its score is 0 if
  no projection adds a bias. With pooling "cls" or "pooler" it is the state of
  the first padding token, as in DPR.

  Params: `token_embedding` [V, D]; with layers, `position_embedding` if
  positions are learned, `token_type_embedding` if there are types,
  `relative_bias` [buckets, N] if positions are relative, `embedding_norm` if
  configured, `layer_0` etc., `final_norm` if norms come before the blocks;
  `pooler` kernel [D, D] if configured; `pooling` kernel [D, 1] if pooling is
  learned; `projection` kernel [D, R] if projection_dim is not 0.
  """

  config: EncoderConfig  # `vocab_size` and `max_positions` must be set
  dtype: DTypeLike = jnp.bfloat16
  loop: LayerLoop = UNROLLED

  @nn.compact
  def __call__(
    self,
    tokens: Int[Array, "N L"],
    mask: Bool[Array, "N L"],  # True on real tokens
    deterministic: bool = True,
    token_types: Int[Array, "N L"] | None = None,  # None: the first
  ) -> Float[Array, "N R"]:
    """Returns one float32 embedding per row."""
    c = self.config
    embed = functools.partial(nn.Embed, features=c.embed_dim)
    # With layers, BERT's value, as a norm follows. Without, token embeddings
    # of about unit length, so that pooled embeddings do not start near zero.
    std = INIT_STD if c.num_layers else c.embed_dim**-0.5
    table = embed(
      c.vocab_size,
      embedding_init=named(nn.initializers.normal(std), "vocab", "embed"),
      name="token_embedding",
    ).embedding
    table = jnp.asarray(table)  # loaded parameters may be NumPy arrays
    x = jnp.take(split_table(table), tokens, axis=0)
    x = x.astype(self.dtype)  # N L D
    drop = nn.Dropout(c.dropout)
    if c.num_layers:
      x = self._enter(x, embed, token_types)
    x = drop(x, deterministic=deterministic)
    x = constrain(x, "batch", "length", "embed")
    layers = [
      TransformerLayer(layer_config(c), dtype=self.dtype, name=f"layer_{i}")
      for i in range(c.num_layers)
    ]
    bias = self._bias(tokens.shape[1])
    inputs = mask[:, None, :], None, None, bias
    x = self.loop.run(layers, x, *inputs, deterministic=deterministic)
    if c.num_layers and c.norm == "pre":
      x = self._norm("final_norm")(x)
      if c.norm_kind == "rms":  # as in `stack.Stack`
        x = drop(x, deterministic=deterministic)
    pooled = self._pool(x.astype(jnp.float32), mask)  # N D
    if c.projection_dim:
      square = c.projection_dim == c.embed_dim
      # The identity: a new projection has no effect before it is trained.
      init = identity_init if square else nn.initializers.normal(INIT_STD)
      pooled = nn.Dense(
        c.projection_dim,
        use_bias=c.projection_bias,
        kernel_init=named(init, "embed", "retrieval"),
        name="projection",
      )(pooled)
      if c.projection_activation != "none":
        pooled = ACTIVATIONS[c.projection_activation](pooled)
    if c.truncate_dim:
      pooled = pooled[:, : c.truncate_dim]
    if c.normalize:
      # Clipped inside the root: the gradient of sqrt at zero is infinite.
      norm_squared = jnp.sum(pooled**2, axis=-1, keepdims=True)
      pooled = pooled / jnp.sqrt(jnp.maximum(norm_squared, 1e-12))
    return pooled

  def _norm(self, name: str) -> Norm:
    return make_norm(layer_config(self.config), dtype=self.dtype, name=name)

  def _enter(
    self,
    x: Float[Array, "N L D"],
    embed: Callable[..., nn.Embed],
    token_types: Int[Array, "N L"] | None,
  ) -> Float[Array, "N L D"]:
    """Returns the input of the first layer, before dropout."""
    c, length = self.config, x.shape[1]
    embed = functools.partial(
      embed, embedding_init=dense_init("position", "embed")
    )
    if c.positions == "learned":
      check_positions(length, c.max_positions, "Questions or passages")
      x += embed(
        c.max_positions + c.position_offset, name="position_embedding"
      )(c.position_offset + jnp.arange(length)).astype(self.dtype)
    if c.num_token_types:
      if token_types is None:
        token_types = jnp.zeros(x.shape[:2], jnp.int32)
      x += embed(c.num_token_types, name="token_type_embedding")(
        token_types
      ).astype(self.dtype)
    return self._norm("embedding_norm")(x) if c.embedding_norm else x

  def _bias(self, length: int) -> Bias | None:
    """Returns what relative positions add to the logits of all layers."""
    c = self.config
    if not c.num_layers or not c.relative_buckets:
      return None
    table = self.param(
      "relative_bias",
      named(nn.initializers.zeros, "position", "heads"),
      (c.relative_buckets, c.num_heads),
    )
    places = jnp.arange(length)
    return relative_bias(
      jnp.asarray(table),
      (places - places[:, None])[None],
      c.relative_max_distance,
      bidirectional=True,
    )

  def _pool(
    self, x: Float[Array, "N L D"], mask: Bool[Array, "N L"]
  ) -> Float[Array, "N D"]:
    c = self.config
    if c.pooler:
      # Created for every kind of pooling, as BERT checkpoints contain it.
      pooler = nn.Dense(
        c.embed_dim,
        kernel_init=dense_init("embed", "retrieval"),
        name="pooler",
      )(x[:, 0])
      if c.pooling == "pooler":
        return jnp.tanh(pooler)
    if c.pooling == "cls":
      return x[:, 0]
    real = jnp.any(mask, axis=1, keepdims=True)  # N 1
    if c.pooling == "max":
      least = jnp.finfo(x.dtype).min
      pooled = jnp.max(jnp.where(mask[..., None], x, least), axis=1)
      return jnp.where(real, pooled, 0.0)
    weight_logits = jnp.zeros(mask.shape)
    if c.pooling == "learned":
      weight_logits = nn.Dense(
        1,
        kernel_init=named(nn.initializers.zeros, "embed", "retrieval"),
        name="pooling",
      )(x)[..., 0]
    weight_logits = jnp.where(
      mask, weight_logits, jnp.finfo(weight_logits.dtype).min
    )
    weights = jax.nn.softmax(weight_logits, axis=-1)
    return jnp.where(real, jnp.einsum("NL,NLD->ND", weights, x), 0.0)


class OneTower(nn.Module):
  """One encoder for questions and passages, with the methods of `RagModel`.

  Params: `question_encoder`.
  """

  question_encoder: RetrieverEncoder

  def embed_questions(
    self, question_tokens: Int[Array, "B Q"], question_mask: Bool[Array, "B Q"]
  ) -> Float[Array, "B R"]:
    """Returns question embeddings."""
    return self.question_encoder(question_tokens, question_mask)

  def embed_passages(
    self, passage_tokens: Int[Array, "N L"], passage_mask: Bool[Array, "N L"]
  ) -> Float[Array, "N R"]:
    """Returns passage embeddings."""
    return self.question_encoder(passage_tokens, passage_mask)
