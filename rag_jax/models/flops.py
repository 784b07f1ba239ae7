"""How much arithmetic one training step is, counted from the config.

In: a config and the shapes of a step. Out: the FLOPs of each part, forward and
backward, and the tokens that the step reads.

Counted are the multiplications and additions of matrix products, on padding
too, by all devices together, each product once: what rematerialisation or
vocabulary chunks compute again is left out. This is the convention of model
FLOPs utilisation (Chowdhery et al. 2022, https://arxiv.org/abs/2204.02311,
appendix B). A product of two tensors that both have gradients costs twice as
much backward as forward.
"""

from collections.abc import Iterable
import dataclasses
import functools
import operator
from typing import NamedTuple

from rag_jax.config import Config
from rag_jax.config_models import CausalConfig
from rag_jax.config_models import EncoderConfig
from rag_jax.config_models import GeneratorConfig
from rag_jax.models.encoders import layer_config


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepShapes:
  """The sizes of one step of the main stage, over all devices."""

  num_questions: int  # B
  n_docs: int  # K; 0 = closed book
  question_length: int  # Q
  passage_length: int  # L
  context_length: int  # C
  target_length: int  # T
  num_passages: int  # P
  # (contexts, length) of train.length_groups; (): all have the length C.
  context_groups: tuple[tuple[int, int], ...] = ()
  packed_rows: tuple[int, int] = (0, 0)  # (rows, length), if they are packed
  joined: bool = False  # one context per question holds all its documents

  @property
  def num_contexts(self) -> int:
    """B*K; or B, of all documents together or without any."""
    return self.num_questions * (1 if self.joined else max(self.n_docs, 1))

  @property
  def contexts(self) -> tuple[tuple[int, int], ...]:
    """(contexts, length) of each group."""
    return self.context_groups or ((self.num_contexts, self.context_length),)

  @property
  def encoder_rows(self) -> tuple[tuple[int, int], ...]:
    """(rows, length) as the generator's encoder reads them."""
    return (self.packed_rows,) if self.packed_rows[0] else self.contexts

  @property
  def context_tokens(self) -> int:
    """Tokens of all contexts, with padding, as the decoder attends to them."""
    return sum(rows * length for rows, length in self.contexts)

  @property
  def encoder_tokens(self) -> int:
    """Tokens that the generator's encoder reads, with padding."""
    return sum(rows * length for rows, length in self.encoder_rows)


class Flops(NamedTuple):
  """The FLOPs of a part of a step."""

  forward: float
  backward: float


@dataclasses.dataclass(frozen=True, slots=True)
class _Products:
  """The forward FLOPs of matrix products: those with kernels, and others."""

  with_kernels: int = 0
  others: int = 0

  @property
  def forward(self) -> int:
    return self.with_kernels + self.others

  def __add__(self, more: "_Products") -> "_Products":
    return _Products(
      self.with_kernels + more.with_kernels, self.others + more.others
    )

  def __rmul__(self, times: int) -> "_Products":
    return _Products(times * self.with_kernels, times * self.others)


def step_shapes(config: Config, num_passages: int) -> StepShapes:
  """Returns the shapes of the steps that `config` describes."""
  return StepShapes(
    num_questions=config.train.batch_size,
    n_docs=config.data.n_docs,
    question_length=config.data.question_length,
    passage_length=config.data.passage_length,
    context_length=config.data.context_length,
    target_length=config.data.target_length,
    num_passages=num_passages,
    joined=config.loss == "concatenate",
  )


def step_tokens(shapes: StepShapes) -> int:
  """Returns the tokens that pass through a model in one step, with padding.

  Questions and passages in the retriever, contexts in the generator's encoder,
  and targets in its decoder, once for each document. Every document counts
  whether its embedding is computed or comes from the index.
  """
  s = shapes
  questions = s.num_questions * s.question_length if s.n_docs else 0
  passages = s.num_questions * s.n_docs * s.passage_length
  contexts = s.encoder_tokens + s.num_contexts * s.target_length
  return questions + passages + contexts


def step_flops(
  config: Config, shapes: StepShapes, vocab_size: int
) -> dict[str, Flops]:
  """Returns the FLOPs of each part of one step of the main stage.

  The parts are: `question_encoder`, `passage_encoder`, `doc_scores`;
  `generator_encoder`, `generator_decoder_self`, `generator_decoder_cross`,
  `generator_decoder_mlp`, `pointer`, `logits`; `retriever_loss`, more passes of
  the decoder, with rewards, and with loss="fid" and a retriever loss of its
  own; and, with index.refresh_rows, `search` and `refresh`. A part that the
  step does not have is 0. Documents whose embeddings come from the index cost
  no passage encoder. Backward, a product with a kernel of a model that trains
  by adapters costs as much as forward, since the kernel has no gradient; the
  adapters' own products, for rank 16 about 1 in 100, are left out. Parameters
  that optimizer.freeze names count as if they trained.

  Args:
    config: sizes of the layers.
    shapes: of the step.
    vocab_size: number of the generator's token ids, if generator.vocab_size is
      0. The retriever's vocabulary costs no products.
  """
  s = shapes
  retriever = _retriever(config, s)
  learns = retriever if config.retriever_loss != "none" else {}
  flops = {
    name: _trained(products, _has_adapters(config, "encoder"))
    if name in learns
    else Flops(products.forward, 0)
    for name, products in retriever.items()
  } | {
    name: _trained(products, _has_adapters(config, "generator"))
    for name, products in _generator(config, s, vocab_size).items()
  }
  passes = _scoring(config, s, vocab_size)
  flops["retriever_loss"] = Flops(passes.forward, 0)
  rows = config.index.refresh_rows
  search = _tower(config.encoder, s.num_questions, s.question_length).forward
  search += 2 * s.num_questions * s.num_passages * _embedding_dim(config)
  refresh = _tower(config.encoder, min(rows, s.num_passages), s.passage_length)
  flops["search"] = Flops(search if rows else 0, 0)
  flops["refresh"] = Flops(refresh.forward if rows else 0, 0)
  return flops


def _has_adapters(config: Config, part: str) -> bool:
  named = any(t.startswith(f"{part}/") for t in config.lora.targets)
  return config.lora.rank > 0 and named


def _trained(products: _Products, adapted: bool) -> Flops:
  """Returns the FLOPs of a part that has a gradient."""
  kernels = products.with_kernels
  return Flops(
    products.forward, 2 * products.forward - (kernels if adapted else 0)
  )


def total_flops(flops: dict[str, Flops]) -> float:
  """Returns the FLOPs of all parts, forward and backward."""
  return float(sum(part.forward + part.backward for part in flops.values()))


def _retriever(config: Config, s: StepShapes) -> dict[str, _Products]:
  """Returns the products of the retriever inside the loss."""
  if not s.n_docs:
    return dict.fromkeys(
      ("question_encoder", "passage_encoder", "doc_scores"), _Products()
    )
  docs = s.num_questions * s.n_docs
  embeds = config.encoder.train_passage_encoder
  return {
    "question_encoder": _tower(
      config.encoder, s.num_questions, s.question_length
    ),
    "passage_encoder": (
      _tower(config.encoder, docs, s.passage_length) if embeds else _Products()
    ),
    "doc_scores": _Products(others=2 * docs * _embedding_dim(config)),
  }


def _embedding_dim(config: Config) -> int:
  return config.encoder.embedding_dim


def _tower(e: EncoderConfig, rows: int, length: int) -> _Products:
  """Returns the products of embedding `rows` of `length` tokens."""
  layer = layer_config(e)
  width = layer.num_heads * layer.head_size
  tokens = rows * length
  total = e.num_layers * (
    _projections(tokens, tokens, e.embed_dim, width)
    + _attention(rows, length, length, width)
    + _mlp(tokens, e.embed_dim, e.mlp_dim, layer.gated)
  )
  kernels = 2 * rows * e.embed_dim * e.projection_dim
  if e.pooling == "pooler":
    kernels += 2 * rows * e.embed_dim**2
  if e.pooling == "learned":
    kernels += 2 * tokens * e.embed_dim  # the weights
  sums = 2 * tokens * e.embed_dim if e.pooling in ("learned", "mean") else 0
  return total + _Products(kernels, sums)


def _generator(
  config: Config, s: StepShapes, vocab_size: int
) -> dict[str, _Products]:
  """Returns the products of the generator."""
  if config.generator.kind == "causal":
    return _causal(config.causal, s, vocab_size)
  g = config.generator
  d = g.embed_dim
  # The decoders: with FiD, one per question.
  n = s.num_questions if config.loss == "fid" else s.num_contexts
  contexts, targets = s.context_tokens, n * s.target_length
  width = g.num_heads * g.head_size
  layers, decoder_width = _decoder(g)
  encoder = (
    _projections(s.encoder_tokens, s.encoder_tokens, d, width)
    + _sum(_attention(rows, c, c, width) for rows, c in s.encoder_rows)
    + _mlp(s.encoder_tokens, d, g.mlp_dim, g.gated)
  )
  own = _projections(targets, targets, d, decoder_width) + _attention(
    n, s.target_length, s.target_length, decoder_width
  )
  cross = _projections(targets, contexts, d, decoder_width) + _sum(
    _attention(rows, s.target_length, c, decoder_width)
    for rows, c in s.contexts
  )
  mlp = _mlp(targets, d, g.decoder_mlp_dim or g.mlp_dim, g.gated)
  pointer = _Products(
    2 * d * d * (3 * contexts + 2 * targets)  # its five kernels
    + 4 * targets * d  # the two modes
  ) + _sum(_attention(rows, s.target_length, c, d) for rows, c in s.contexts)
  return {
    "generator_encoder": g.num_layers * encoder,
    "generator_decoder_self": layers * own,
    "generator_decoder_cross": layers * cross,
    "generator_decoder_mlp": layers * mlp,
    "pointer": pointer if g.pointer else _Products(),
    "logits": _Products(2 * targets * d * (g.vocab_size or vocab_size)),
  }


def _causal(
  c: CausalConfig, s: StepShapes, vocab_size: int
) -> dict[str, _Products]:
  """Returns the products of a decoder that reads contexts and targets."""
  rows = [(num, length + s.target_length - 1) for num, length in s.contexts]
  tokens = sum(num * length for num, length in rows)
  width = c.num_heads * c.head_size
  own = _Products(
    4 * tokens * c.embed_dim * (width + c.kv_heads * c.head_size)
  ) + _sum(_attention(num, length, length, width) for num, length in rows)
  targets = s.num_contexts * s.target_length
  none = dict.fromkeys(
    ("generator_encoder", "generator_decoder_cross", "pointer"), _Products()
  )
  return none | {
    "generator_decoder_self": c.num_layers * own,
    "generator_decoder_mlp": (
      c.num_layers * _mlp(tokens, c.embed_dim, c.mlp_dim, c.gated)
    ),
    "logits": _Products(
      2 * targets * c.embed_dim * (c.vocab_size or vocab_size)
    ),
  }


def _scoring(config: Config, s: StepShapes, vocab_size: int) -> _Products:
  """Returns the products of what a retriever's own loss needs.

  The states of contexts, their keys and values are those of the generator's own
  pass, but for answers that are written given one drawn document.
  """
  kind = config.retriever_loss
  alone = dataclasses.replace(config, loss="rag_token")
  if config.rewards_answers:
    drawn = kind == "reward_sampled"
    s = dataclasses.replace(
      s, n_docs=1 if drawn else s.n_docs, context_groups=(), packed_rows=(0, 0)
    )
    if drawn or config.generator.kind == "causal":
      return _sum(_generator(alone, s, vocab_size).values())
  elif config.loss != "fid" or kind in ("marginal", "none"):
    return _Products()
  names = ["generator_decoder_self", "generator_decoder_mlp"]
  num_targets = s.num_contexts
  if kind in ("adist", "dkrr"):  # one joined pass, without logits
    num_targets = s.num_questions
    s = dataclasses.replace(s, target_length=1) if kind == "dkrr" else s
  else:
    config = alone
    names.append("logits")
  parts = _generator(config, s, vocab_size)
  g, targets = config.generator, num_targets * s.target_length
  layers, width = _decoder(g)
  queries = layers * _projections(targets, 0, g.embed_dim, width)
  # With "loop", each pass reads K contexts, not one.
  times = layers * (s.n_docs if kind == "loop" else 1)
  attention = times * _sum(
    _attention(rows, s.target_length, c, width) for rows, c in s.contexts
  )
  return queries + attention + _sum(parts[name] for name in names)


def _decoder(g: GeneratorConfig) -> tuple[int, int]:
  """Returns the decoder's layers, and the width of their heads together."""
  heads = g.num_decoder_heads or g.num_heads
  width = heads * (g.head_dim or g.embed_dim // heads)
  return g.num_decoder_layers or g.num_layers, width


def _sum(parts: Iterable[_Products]) -> _Products:
  return functools.reduce(operator.add, parts, _Products())


def _projections(queries: int, keys: int, dim: int, width: int) -> _Products:
  """Returns the products with the four kernels of attention."""
  return _Products(4 * (queries + keys) * dim * width)  # query, out; key, value


def _attention(rows: int, queries: int, keys: int, width: int) -> _Products:
  """Returns the products of the logits and of the weighted sums.

  A causal mask leaves half of the products without effect; they count, because
  they are computed.
  """
  return _Products(others=4 * rows * queries * keys * width)


def _mlp(tokens: int, dim: int, mlp_dim: int, gated: bool) -> _Products:
  return _Products(2 * (3 if gated else 2) * tokens * dim * mlp_dim)
