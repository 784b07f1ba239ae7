"""Retriever and generator as one model: p(z|x) and p(y|x,z) from tokens.

In: the arrays of a batch, by name. Out: doc_scores [B, K] and target_logits
[B, K, T, V], which losses.py turns into -log p(y|x).
"""

import typing

from flax import linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from rag_jax.config import Config
from rag_jax.models.encoders import RetrieverEncoder
from rag_jax.models.generator import DecoderCache
from rag_jax.models.generator import Generator
from rag_jax.models.partitioning import named


# Unchecked, because JAX makes it of shapes and of stacked arrays too.
@typing.no_type_check
@flax.struct.dataclass
class RagOutput:
  """What the losses need."""

  doc_scores: Float[Array, "B K"]
  target_logits: Float[Array, "B K T V"]


def score_docs(
  question_embedding: Float[Array, "B R"],
  doc_embeddings: Float[Array, "B K R"],
) -> Float[Array, "B K"]:
  """Returns doc_scores: inner products, in float32 at the highest precision.

  DPR's scores are 60 to 90: bfloat16 passes would visibly move p(z|x).
  """
  return jnp.einsum(
    "BR,BKR->BK",
    question_embedding,
    doc_embeddings,
    precision=jax.lax.Precision.HIGHEST,
    preferred_element_type=jnp.float32,
  )


class RagModel(nn.Module):
  """Question tower, passage tower and generator.

  Params: `question_encoder`; `passage_encoder` if the towers are not tied;
  `log_score_scale` if it is learned; `generator`.
  """

  question_encoder: RetrieverEncoder
  passage_encoder: RetrieverEncoder | None  # None: the question tower
  generator: Generator
  score_scale: float = 1.0
  learn_score_scale: bool = False

  def setup(self):
    if self.learn_score_scale:
      self.log_score_scale = self.param(
        "log_score_scale",
        named(nn.initializers.constant(jnp.log(self.score_scale))),
        (),
      )

  def embed_questions(
    self,
    question_tokens: Int[Array, "B Q"],
    question_mask: Bool[Array, "B Q"],
    deterministic: bool = True,
  ) -> Float[Array, "B R"]:
    """Returns question embeddings, multiplied by the score scale.

    The scale sits on this side, so that an inner product with what is in the
    index is the score.
    """
    embedding = self.question_encoder(
      question_tokens, question_mask, deterministic
    )
    if self.learn_score_scale:
      return embedding * jnp.exp(self.log_score_scale)
    return embedding * self.score_scale

  def embed_passages(
    self,
    passage_tokens: Int[Array, "N L"],
    passage_mask: Bool[Array, "N L"],
    deterministic: bool = True,
  ) -> Float[Array, "N R"]:
    """Returns passage embeddings, as the index holds them."""
    tower = self.passage_encoder
    tower = self.question_encoder if tower is None else tower
    return tower(passage_tokens, passage_mask, deterministic)

  def __call__(
    self,
    context_tokens: Int[Array, "B K C"],
    context_mask: Bool[Array, "B K C"],
    target_tokens: Int[Array, "B T"],
    question_tokens: Int[Array, "B Q"] | None = None,
    question_mask: Bool[Array, "B Q"] | None = None,
    doc_tokens: Int[Array, "B K L"] | None = None,
    doc_mask: Bool[Array, "B K L"] | None = None,
    doc_embeddings: Float[Array, "B K R"] | None = None,
    deterministic: bool = True,
  ) -> RagOutput:
    """Returns the scores of K documents and the logits given each.

    Args:
      context_tokens: question and passage as the generator reads them.
      context_mask: True on real tokens.
      target_tokens: the answer, ending in the end token, then padding.
      question_tokens: for the question tower; None is closed book: one context
        that holds the question alone, whose score is 0.
      question_mask: True on real tokens.
      doc_tokens: embedded with gradient, if given.
      doc_mask: True on real tokens.
      doc_embeddings: taken as they are, if `doc_tokens` is not given.
      deterministic: no dropout.
    """
    b, k, c = context_tokens.shape
    if question_tokens is None:
      doc_scores = jnp.zeros((b, k), jnp.float32)
    else:
      assert question_mask is not None
      if doc_tokens is not None:
        assert doc_mask is not None
        length = doc_tokens.shape[-1]
        doc_embeddings = self.embed_passages(
          doc_tokens.reshape(b * k, length),
          doc_mask.reshape(b * k, length),
          deterministic,
        ).reshape(b, k, -1)
      assert doc_embeddings is not None
      question_embedding = self.embed_questions(
        question_tokens, question_mask, deterministic
      )
      doc_scores = score_docs(question_embedding, doc_embeddings)
    target_logits = self.generator(
      context_tokens.reshape(b * k, c),
      context_mask.reshape(b * k, c),
      jnp.repeat(target_tokens, k, axis=0),
      deterministic,
    )  # B*K T V
    return RagOutput(
      doc_scores, target_logits.reshape(b, k, *target_logits.shape[1:])
    )

  def init_cache(
    self,
    context_tokens: Int[Array, "N C"],
    context_mask: Bool[Array, "N C"],
    num_steps: int,
  ) -> DecoderCache:
    """Returns the generator's cache for decoding `num_steps` tokens."""
    return self.generator.init_cache(context_tokens, context_mask, num_steps)

  def decode_step(
    self,
    tokens: Int[Array, "N"],
    position: Int[Array, ""],
    cache: DecoderCache,
  ) -> tuple[Float[Array, "N V"], DecoderCache]:
    """Returns the logits after the token at `position`, and the cache."""
    return self.generator.step(tokens, position, cache)


def compute_dtype(name: str) -> DTypeLike:
  """Returns the dtype of activations; "auto" is float32 on a CPU."""
  if name == "auto":
    name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
  return jnp.dtype(name)


def build_model(
  config: Config, *, vocab_size: int, decoder_start_id: int
) -> RagModel:
  """Returns the model that `config` describes."""
  dtype = compute_dtype(config.train.compute_dtype)
  e, g = config.encoder, config.generator

  def tower() -> RetrieverEncoder:
    return RetrieverEncoder(
      vocab_size=vocab_size,
      num_layers=e.num_layers,
      embed_dim=e.embed_dim,
      num_heads=e.num_heads,
      mlp_dim=e.mlp_dim,
      max_positions=max(
        config.data.question_length, config.data.passage_length
      ),
      pooling=e.pooling,
      projection_dim=e.projection_dim,
      normalize=e.normalize,
      dropout=e.dropout,
      dtype=dtype,
    )

  return RagModel(
    question_encoder=tower(),
    passage_encoder=None if e.tied else tower(),
    generator=Generator(
      vocab_size=vocab_size,
      num_layers=g.num_layers,
      embed_dim=g.embed_dim,
      num_heads=g.num_heads,
      mlp_dim=g.mlp_dim,
      max_positions=g.max_positions,
      decoder_start_id=decoder_start_id,
      position_offset=g.position_offset,
      position_init=g.position_init,
      activation=g.activation,
      norm=g.norm,
      embedding_norm=g.embedding_norm,
      scale_embedding=g.scale_embedding,
      relative_buckets=g.relative_buckets,
      copy_init=g.init == "copy",
      dropout=g.dropout,
      dtype=dtype,
    ),
    score_scale=e.score_scale,
    learn_score_scale=e.learn_score_scale,
  )
