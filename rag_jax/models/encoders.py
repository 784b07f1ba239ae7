"""The retriever's tower: tokens of a question or passage to one embedding."""

import functools

from flax import linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from rag_jax.models.attention import identity_init
from rag_jax.models.layers import TransformerLayer
from rag_jax.models.layers import check_positions
from rag_jax.models.partitioning import constrain
from rag_jax.models.partitioning import dense_init
from rag_jax.models.partitioning import named
from rag_jax.models.partitioning import split_table


class RetrieverEncoder(nn.Module):
  """BERT's architecture with any number of layers, pooled to one vector.

  With no layers there are no positions and no embedding norm: the embedding is
  the pooled sum of token embeddings, a trainable bag of words.

  The embedding of a row without a real token is zero, so that it scores 0
  before a projection's bias; where the first state is the embedding ("cls",
  "pooler"), it is that of the first padding token alone, as in DPR.

  Fields as in `config.EncoderConfig`.

  Params: `token_embedding` [V, D]; with layers `position_embedding`,
  `token_type_embedding` if there are types, `embedding_norm`, `layer_0` and on;
  `pooler` kernel [D, D] if there is one; `pooling` kernel [D, 1] if pooling is
  learned; `projection` kernel [D, R] if projection_dim is not 0.
  """

  vocab_size: int
  num_layers: int
  embed_dim: int
  num_heads: int
  mlp_dim: int
  max_positions: int
  activation: str = "gelu"
  norm_eps: float = 1e-12  # BERT's
  num_token_types: int = 0  # BERT's segments; every token gets the first
  pooler: bool = False  # its parameters exist, also where they are not used
  pooling: str = "cls"  # "cls", "mean", "max", "pooler" or "learned"
  projection_dim: int = 0  # R; 0 = no projection, R = D
  normalize: bool = False  # divide by the L2 norm
  dropout: float = 0.0
  attention_dropout: float = 0.0
  dtype: DTypeLike = jnp.bfloat16
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self,
    tokens: Int[Array, "N L"],
    mask: Bool[Array, "N L"],  # True on real tokens
    deterministic: bool = True,
  ) -> Float[Array, "N R"]:
    """Returns one float32 embedding a row."""
    embed = functools.partial(
      nn.Embed, features=self.embed_dim, param_dtype=self.param_dtype
    )
    # With layers BERT's std of 0.02, which the norm undoes; without, unit
    # vectors on average, so that pooled embeddings do not start near zero.
    std = 0.02 if self.num_layers else self.embed_dim**-0.5
    table = embed(
      self.vocab_size,
      embedding_init=named(nn.initializers.normal(std), "vocab", "embed"),
      name="token_embedding",
    ).embedding
    table = jnp.asarray(table)  # parameters may be those of a file
    x = jnp.take(split_table(table), tokens, axis=0)
    x = x.astype(self.dtype)  # N L D
    if self.num_layers:
      check_positions(
        tokens.shape[1], self.max_positions, "Questions or passages"
      )
      x += embed(
        self.max_positions,
        embedding_init=dense_init("position", "embed"),
        name="position_embedding",
      )(jnp.arange(tokens.shape[1])).astype(self.dtype)
      if self.num_token_types:
        x += embed(
          self.num_token_types,
          embedding_init=dense_init("position", "embed"),
          name="token_type_embedding",
        )(jnp.zeros_like(tokens)).astype(self.dtype)
      x = nn.LayerNorm(
        epsilon=self.norm_eps,
        dtype=self.dtype,
        param_dtype=self.param_dtype,
        name="embedding_norm",
      )(x)
    x = nn.Dropout(self.dropout)(x, deterministic=deterministic)
    x = constrain(x, "batch", "length", "embed")
    for i in range(self.num_layers):
      x = TransformerLayer(
        embed_dim=self.embed_dim,
        num_heads=self.num_heads,
        head_dim=self.embed_dim // self.num_heads,
        mlp_dim=self.mlp_dim,
        activation=self.activation,
        norm_eps=self.norm_eps,
        dropout=self.dropout,
        attention_dropout=self.attention_dropout,
        dtype=self.dtype,
        param_dtype=self.param_dtype,
        name=f"layer_{i}",
      )(x, mask[:, None, :], deterministic=deterministic)
    pooled = self._pool(x.astype(jnp.float32), mask)  # N D
    if self.projection_dim:
      square = self.projection_dim == self.embed_dim
      # The identity: a fresh projection changes nothing until it is trained.
      init = identity_init if square else nn.initializers.normal(0.02)
      pooled = nn.Dense(
        self.projection_dim,
        kernel_init=named(init, "embed", "retrieval"),
        param_dtype=self.param_dtype,
        name="projection",
      )(pooled)
    if self.normalize:
      # The bound is inside the root, whose gradient at zero is infinite.
      norm_squared = jnp.sum(pooled**2, axis=-1, keepdims=True)
      pooled = pooled / jnp.sqrt(jnp.maximum(norm_squared, 1e-12))
    return pooled

  def _pool(
    self, x: Float[Array, "N L D"], mask: Bool[Array, "N L"]
  ) -> Float[Array, "N D"]:
    if self.pooler:
      # Always made: checkpoints of BERT hold it, whatever is pooled.
      pooler = nn.Dense(
        self.embed_dim,
        kernel_init=dense_init("embed", "retrieval"),
        param_dtype=self.param_dtype,
        name="pooler",
      )(x[:, 0])
      if self.pooling == "pooler":
        return jnp.tanh(pooler)
    if self.pooling == "cls":
      return x[:, 0]
    real = jnp.any(mask, axis=1, keepdims=True)  # N 1
    if self.pooling == "max":
      least = jnp.finfo(x.dtype).min
      pooled = jnp.max(jnp.where(mask[..., None], x, least), axis=1)
      return jnp.where(real, pooled, 0.0)
    weight_logits = jnp.zeros(mask.shape)
    if self.pooling == "learned":
      weight_logits = nn.Dense(
        1,
        kernel_init=named(nn.initializers.zeros, "embed", "retrieval"),
        param_dtype=self.param_dtype,
        name="pooling",
      )(x)[..., 0]
    weight_logits = jnp.where(
      mask, weight_logits, jnp.finfo(weight_logits.dtype).min
    )
    weights = jax.nn.softmax(weight_logits, axis=-1)
    return jnp.where(real, jnp.einsum("NL,NLD->ND", weights, x), 0.0)


class OneTower(nn.Module):
  """One encoder for whatever is embedded, with the methods of `RagModel`.

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
