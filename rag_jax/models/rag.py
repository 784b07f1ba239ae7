"""Retriever and generator as one model: p(z|x) and p(y|x,z) from tokens.

In: a batch. Out: doc_scores [B, K] and target_logits [B, K, T, V], from which
losses.py computes -log p(y|x).
"""

import dataclasses
import typing

from flax import linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PyTree

from rag_jax.config import Config
from rag_jax.config_models import EncoderConfig
from rag_jax.config_models import GeneratorConfig
from rag_jax.models.batch import RagBatch
from rag_jax.models.causal import CausalGenerator
from rag_jax.models.causal import build_causal
from rag_jax.models.encoders import RetrieverEncoder
from rag_jax.models.generator import Generator
from rag_jax.models.hybrid import HybridScores
from rag_jax.models.layers import UNROLLED
from rag_jax.models.layers import LayerLoop
from rag_jax.models.length_groups import LengthGroups
from rag_jax.models.packing import Packing
from rag_jax.models.partitioning import named
from rag_jax.models.pointer import Copy
from rag_jax.models.pointer import mix_targets
from rag_jax.models.vocabulary import chunked_log_probs

AnyGenerator = Generator | CausalGenerator
# How contexts are computed without most of their padding.
ContextLayout = LengthGroups | Packing


# Not type-checked, because JAX also builds it from shapes and stacked arrays.
@typing.no_type_check
@flax.struct.dataclass
class RagOutput:
  """The inputs of the losses."""

  doc_scores: Float[Array, "B K"]
  target_logits: Float[Array, "B K T V"]


# Not type-checked, because JAX also builds it from shapes and stacked arrays.
@typing.no_type_check
@flax.struct.dataclass
class RagLogProbs:
  """The inputs of the losses, in nats, for the target tokens only."""

  doc_scores: Float[Array, "B K"]
  log_probs: Float[Array, "B K T"]  # log p(y_t | x, z, y_<t)
  mean: Float[Array, "B K T"]  # mean log p over the vocabulary


def score_docs(
  question_embedding: Float[Array, "B R"],
  doc_embeddings: Float[Array, "B K R"],
) -> Float[Array, "B K"]:
  """Returns doc_scores: inner products, in float32 at the highest precision.

  DPR's scores are 60 to 90: bfloat16 passes would visibly change p(z|x).
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
  `log_score_scale` if it is learned; `hybrid` with BM25 scores; `generator`.
  """

  question_encoder: RetrieverEncoder
  passage_encoder: RetrieverEncoder | None  # None: use the question tower
  generator: AnyGenerator
  score_scale: float = 1.0
  learn_score_scale: bool = False
  hybrid: HybridScores | None = None  # None: no BM25 scores

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

    Only this side is scaled, so that the inner product with an embedding of the
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
    """Returns passage embeddings, as stored in the index."""
    tower = self.passage_encoder
    tower = self.question_encoder if tower is None else tower
    return tower(passage_tokens, passage_mask, deterministic)

  def __call__(self, batch: RagBatch, deterministic: bool = True) -> RagOutput:
    """Returns the scores of K documents and the logits given each document.

    Args:
      batch: `doc_tokens` are embedded with gradient, `doc_embeddings` are used
        unchanged. A closed-book batch has one context per question, which holds
        only the question; its score is 0.
      deterministic: whether to turn dropout off.
    """
    b, k, _ = batch.context_tokens.shape
    doc_scores = self.doc_scores(batch, deterministic)
    states = self.generator.states(*_by_context(batch), deterministic)
    target_logits = self.generator.logits(*states)
    return RagOutput(
      doc_scores, target_logits.reshape(b, k, *target_logits.shape[1:])
    )

  def target_log_probs(
    self,
    batch: RagBatch,
    deterministic: bool = True,
    vocab_chunk: int = 0,
    context_layout: ContextLayout | None = None,
  ) -> RagLogProbs:
    """Returns the document scores and the log-probabilities of the targets.

    Used in training to save memory: the logits [B, K, T, V] are computed for
    `vocab_chunk` tokens at a time (0: all), forward and backward.

    Args:
      batch: as in `__call__`.
      deterministic: whether to turn dropout off.
      vocab_chunk: tokens of the vocabulary at a time.
      context_layout: that the contexts fit, and are computed in; None: each
        has a row of C tokens.
    """
    b, k, _ = batch.context_tokens.shape
    doc_scores = self.doc_scores(batch, deterministic)

    def read(
      tokens: Int[Array, "N C"], mask: Bool[Array, "N C"], targets: Array
    ) -> tuple[Float[Array, "N T"], Float[Array, "N T"]]:
      packing = context_layout if isinstance(context_layout, Packing) else None
      states = self.generator.states(
        tokens, mask, targets, deterministic, packing
      )
      return self._log_probs(*states, targets, vocab_chunk)

    inputs = _by_context(batch)
    if isinstance(context_layout, LengthGroups):
      log_probs, mean = context_layout.map(read, *inputs)
    else:
      log_probs, mean = read(*inputs)
    return RagLogProbs(
      doc_scores, log_probs.reshape(b, k, -1), mean.reshape(b, k, -1)
    )

  def joined_log_probs(
    self,
    batch: RagBatch,
    deterministic: bool = True,
    vocab_chunk: int = 0,
    context_layout: ContextLayout | None = None,
    leave_out: bool = False,
  ) -> RagLogProbs:
    """Returns the same for a generator that reads all documents at once.

    That is fusion in the decoder (Izacard and Grave 2021,
    https://arxiv.org/abs/2007.01282): contexts are encoded one by one, and the
    decoder attends to the states of all. log_probs and mean are [B, 1, T]. The
    states take as much memory as for RAG, the decoder 1/K of it.

    Args:
      batch: as in `__call__`.
      deterministic: whether to turn dropout off.
      vocab_chunk: tokens of the vocabulary at a time.
      context_layout: a `Packing` that the contexts fit, or None.
      leave_out: whether to return [B, K, T] instead: those of a generator that
        reads all documents but the k-th. K passes of the decoder.
    """
    b, k, c = batch.context_tokens.shape
    assert context_layout is None or isinstance(context_layout, Packing)
    doc_scores = self.doc_scores(batch, deterministic)
    tokens, mask, _ = _by_context(batch)
    generator = self.generator
    assert isinstance(generator, Generator)  # config_rules refuses others
    memory = generator.encode(tokens, mask, deterministic, context_layout)
    memory = memory.reshape(b, k * c, -1)
    tokens = tokens.reshape(b, k * c)
    owner = jnp.arange(k * c) // c
    targets, found = batch.target_tokens, []
    for doc in range(k) if leave_out else [-1]:
      read = mask.reshape(b, k * c) & (owner != doc)
      states = generator.decode(memory, tokens, read, targets, deterministic)
      found.append(self._log_probs(*states, targets, vocab_chunk))
    log_probs, mean = (jnp.stack(x, axis=1) for x in zip(*found, strict=True))
    return RagLogProbs(doc_scores, log_probs, mean)

  def attention_scores(
    self,
    batch: RagBatch,
    kind: str,
    context_layout: ContextLayout | None = None,
  ) -> Float[Array, "B K"]:
    """Returns how much a generator that reads all documents looks at each.

    Means over layers and heads, without dropout, of

    - "adist": attention times the norm of the value, summed over the tokens of
      a document, mean over the target's tokens (Izacard et al. 2022,
      https://arxiv.org/abs/2208.03299, section 2.2; their code divides by 256
      too);
    - "dkrr": the attention before the softmax, for the first token of the
      target, mean over the tokens of a document (Izacard and Grave 2021,
      https://arxiv.org/abs/2012.04584, section 3.2).

    Args:
      batch: as in `joined_log_probs`.
      kind: "adist" or "dkrr".
      context_layout: as in `joined_log_probs`.
    """
    b, k, c = batch.context_tokens.shape
    assert context_layout is None or isinstance(context_layout, Packing)
    tokens, mask, _ = _by_context(batch)
    generator, first = self.generator, kind == "dkrr"
    assert isinstance(generator, Generator)  # config_rules refuses others
    memory = generator.encode(tokens, mask, True, context_layout)
    looks = generator.looks(
      memory.reshape(b, k * c, -1),
      mask.reshape(b, k * c),
      batch.target_tokens[:, :1] if first else batch.target_tokens,
      logits=first,
    ).reshape(b, -1, k, c)
    if first:
      return _mean(looks[:, 0], batch.context_mask)
    return _mean(jnp.moveaxis(looks.sum(axis=-1), 1, 2),
                 batch.target_mask[:, None])  # fmt: skip

  def _log_probs(
    self,
    states: Float[Array, "N T D"],
    copy: Copy | None,
    targets: Int[Array, "N T"],
    vocab_chunk: int,
  ) -> tuple[Float[Array, "N T"], Float[Array, "N T"]]:
    """Returns log p of the targets, and its mean over the vocabulary."""
    generator = self.generator
    log_probs, mean = chunked_log_probs(
      generator.output_states(states),
      generator.output_table(),
      generator.output_bias(),
      targets,
      vocab_chunk or generator.config.vocab_size,
      generator.logits_soft_cap,
    )
    if copy is not None:  # config_rules refuses smoothing by `mean`
      log_probs = mix_targets(copy, log_probs, targets)
    return log_probs, mean

  def doc_scores(
    self, batch: RagBatch, deterministic: bool
  ) -> Float[Array, "B K"]:
    """Returns the scores of the documents; 0 for a closed-book batch."""
    if batch.question_tokens is None:
      return jnp.zeros(batch.context_tokens.shape[:2], jnp.float32)
    assert batch.question_mask is not None
    doc_embeddings = batch.doc_embeddings
    if batch.doc_tokens is not None:
      assert batch.doc_mask is not None
      *shape, length = batch.doc_tokens.shape
      rows = (-1, length)
      doc_embeddings = self.embed_passages(
        batch.doc_tokens.reshape(rows),
        batch.doc_mask.reshape(rows),
        deterministic,
      ).reshape(*shape, -1)
    assert doc_embeddings is not None
    question_embedding = self.embed_questions(
      batch.question_tokens, batch.question_mask, deterministic
    )
    scores = score_docs(question_embedding, doc_embeddings)
    if self.hybrid is None:
      return scores
    assert batch.bm25_scores is not None
    return self.hybrid(scores, batch.bm25_scores)

  def encode(
    self,
    context_tokens: Int[Array, "B K C"],
    context_mask: Bool[Array, "B K C"],
  ) -> PyTree[Float[Array, "B K ..."]]:
    """Returns what the generator's decoder looks at, for each document."""
    b, k, c = context_tokens.shape
    memory = self.generator.encode(
      context_tokens.reshape(b * k, c), context_mask.reshape(b * k, c)
    )
    return jax.tree.map(lambda x: x.reshape(b, k, *x.shape[1:]), memory)


def _mean(
  x: Float[Array, "B K N"], mask: Bool[Array, "B #K N"]
) -> Float[Array, "B K"]:
  """Returns means over what is not masked; 0 if all is."""
  total = jnp.sum(x, axis=-1, where=mask)
  return total / jnp.maximum(jnp.sum(mask, axis=-1), 1)


def _by_context(
  batch: RagBatch,
) -> tuple[Int[Array, "BK C"], Bool[Array, "BK C"], Int[Array, "BK T"]]:
  """Returns contexts, their masks and their targets, a row per context."""
  b, k, c = batch.context_tokens.shape
  return (
    batch.context_tokens.reshape(b * k, c),
    batch.context_mask.reshape(b * k, c),
    jnp.repeat(batch.target_tokens, k, axis=0),
  )


def compute_dtype(name: str) -> DTypeLike:
  """Returns the dtype of activations; "auto" is float32 on a CPU."""
  if name == "auto":
    name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
  return jnp.dtype(name)


def build_model(
  config: Config,
  *,
  vocab_size: int,
  decoder_start_id: int,
  retriever_vocab_size: int = 0,
) -> RagModel:
  """Returns the model that `config` describes.

  Args:
    config: the config; the other arguments replace its sizes of 0.
    vocab_size: number of token ids.
    decoder_start_id: the decoder's first input, unless the config sets it.
    retriever_vocab_size: number of the retriever's token ids; 0: the same.
  """
  dtype = compute_dtype(config.train.compute_dtype)
  e, g = config.encoder, config.generator
  t = config.train
  loop = LayerLoop(t.scan_layers, t.remat, t.attention_rows)

  generator: AnyGenerator
  if g.kind == "causal":
    size = config.causal.vocab_size or vocab_size
    causal = dataclasses.replace(config.causal, vocab_size=size)
    generator = build_causal(causal, dtype=dtype, loop=loop)
  else:
    generator = build_generator(
      g,
      vocab_size=vocab_size,
      decoder_start_id=decoder_start_id,
      dtype=dtype,
      loop=loop,
    )

  def tower() -> RetrieverEncoder:
    return build_encoder(
      e,
      vocab_size=retriever_vocab_size or vocab_size,
      max_positions=max(
        config.data.question_length, config.data.passage_length
      ),
      dtype=dtype,
      loop=loop,
    )

  return RagModel(
    question_encoder=tower(),
    passage_encoder=None if e.tied else tower(),
    generator=generator,
    score_scale=e.score_scale,
    learn_score_scale=e.learn_score_scale,
    hybrid=(
      HybridScores(config.index.hybrid_dense, config.index.hybrid_bm25)
      if config.index.hybrid
      else None
    ),
  )


def build_encoder(
  config: EncoderConfig,
  *,
  vocab_size: int,
  max_positions: int,
  dtype: DTypeLike,
  loop: LayerLoop = UNROLLED,
) -> RetrieverEncoder:
  """Returns one tower; the arguments replace sizes of 0 in `config`."""
  return RetrieverEncoder(
    config.frozen(
      vocab_size=config.vocab_size or vocab_size,
      max_positions=config.max_positions or max_positions,
    ),
    dtype=dtype,
    loop=loop,
  )


def build_generator(
  config: GeneratorConfig,
  *,
  vocab_size: int,
  decoder_start_id: int,
  dtype: DTypeLike,
  loop: LayerLoop = UNROLLED,
) -> Generator:
  """Returns only an encoder-decoder; arguments as in `build_model`."""
  start = config.decoder_start_id
  return Generator(
    config.frozen(
      vocab_size=config.vocab_size or vocab_size,
      decoder_start_id=decoder_start_id if start < 0 else start,
    ),
    dtype=dtype,
    loop=loop,
  )
