"""The tensors of BERT, its relatives, T5's encoder and DPR.

In: an `EncoderConfig` whose sizes are known. Out: the rules of its parameters,
under the names of `BertModel`, `DPRQuestionEncoder` and so on.
"""

from collections.abc import Callable, Iterator
import dataclasses
import re

from rag_jax.config_models import EncoderConfig
from rag_jax.config_models import GeneratorConfig
from rag_jax.weights.encoder_configs import architecture_name
from rag_jax.weights.encoder_configs import has_pooler
from rag_jax.weights.encoder_configs import has_token_types
from rag_jax.weights.mapping import Architecture
from rag_jax.weights.mapping import Redundant
from rag_jax.weights.mapping import Rule

DPR_PREFIXES = {"question": "question_encoder.", "passage": "ctx_encoder."}

TIED = "the embedding table again"
_DECODER = r"(decoder|lm_head)\..*"
_HEADS = r"(cls|lm_head|vocab_(transform|layer_norm|projector))\..*"
_OLD_NORM = re.compile(r"(LayerNorm|layer_norm)\.(gamma|beta)$")


def dense(
  ours: str,
  theirs: str,
  inputs: tuple[int, ...],
  outputs: tuple[int, ...],
  use_bias: bool = True,
) -> Iterator[Rule]:
  """Yields kernel and bias of a dense layer over one or several axes."""
  rows, columns = 1, 1
  for size in outputs:
    rows *= size
  for size in inputs:
    columns *= size
  yield Rule(
    f"{ours}/kernel",
    f"{theirs}.weight",
    (*inputs, *outputs),
    (rows, columns),
    transposed=True,
  )
  if use_bias:
    yield Rule(f"{ours}/bias", f"{theirs}.bias", outputs, (rows,))


def table(ours: str, theirs: str, rows: int, dim: int) -> Rule:
  """Returns the rule of an embedding table."""
  return Rule(f"{ours}/embedding", f"{theirs}.weight", (rows, dim), (rows, dim))


def norm(
  ours: str, theirs: str, dim: int, use_bias: bool = True
) -> Iterator[Rule]:
  """Yields scale and bias of a norm."""
  yield Rule(f"{ours}/scale", f"{theirs}.weight", (dim,), (dim,))
  if use_bias:
    yield Rule(f"{ours}/bias", f"{theirs}.bias", (dim,), (dim,))


# Names of a layer's parts, and where the layers are. Ours -> theirs.
_LAYER = {
  "layers": "encoder.layer",
  "query": "attention.self.query",
  "key": "attention.self.key",
  "value": "attention.self.value",
  "out": "attention.output.dense",
  "self_attention_norm": "attention.output.LayerNorm",
  "mlp/up": "intermediate.dense",
  "mlp/down": "output.dense",
  "mlp_norm": "output.LayerNorm",
}
_LAYERS = {
  "distilbert": {
    "layers": "transformer.layer",
    "query": "attention.q_lin",
    "key": "attention.k_lin",
    "value": "attention.v_lin",
    "out": "attention.out_lin",
    "self_attention_norm": "sa_layer_norm",
    "mlp/up": "ffn.lin1",
    "mlp/down": "ffn.lin2",
    "mlp_norm": "output_layer_norm",
  },
  "mpnet": _LAYER
  | {
    "query": "attention.attn.q",
    "key": "attention.attn.k",
    "value": "attention.attn.v",
    "out": "attention.attn.o",
    "self_attention_norm": "attention.LayerNorm",
  },
}


def attention(
  ours: str,
  theirs: str,
  parts: tuple[str, ...],
  sizes: EncoderConfig | GeneratorConfig,
  num_heads: int,
) -> Iterator[Rule]:
  """Yields the rules of an attention block; `parts` names its dense layers."""
  split = (num_heads, sizes.head_dim or sizes.embed_dim // num_heads)
  dim, bias = (sizes.embed_dim,), sizes.use_bias
  *inputs, out = parts
  for part, name in zip(("query", "key", "value"), inputs, strict=True):
    yield from dense(f"{ours}/{part}", f"{theirs}.{name}", dim, split, bias)
  yield from dense(f"{ours}/out", f"{theirs}.{out}", split, dim, bias)


def _bert_layer(e: EncoderConfig, i: int, family: str) -> Iterator[Rule]:
  names = _LAYERS.get(family, _LAYER)
  ours, theirs = f"layer_{i}", f"{names['layers']}.{i}"
  dim, wide = (e.embed_dim,), (e.mlp_dim,)
  parts = tuple(names[part] for part in ("query", "key", "value", "out"))
  yield from attention(f"{ours}/self_attention", theirs, parts, e, e.num_heads)
  for part, inputs, outputs in (("up", dim, wide), ("down", wide, dim)):
    their = f"{theirs}.{names[f'mlp/{part}']}"
    yield from dense(f"{ours}/mlp/{part}", their, inputs, outputs)
  for part in ("self_attention_norm", "mlp_norm"):
    yield from norm(f"{ours}/{part}", f"{theirs}.{names[part]}", e.embed_dim)


def _bert(e: EncoderConfig, prefix: str, family: str) -> Iterator[Rule]:
  d, theirs = e.embed_dim, "embeddings"
  rules = [
    table("token_embedding", f"{theirs}.word_embeddings", e.vocab_size, d),
    table(
      "position_embedding",
      f"{theirs}.position_embeddings",
      e.max_positions + e.position_offset,
      d,
    ),
    *norm("embedding_norm", f"{theirs}.LayerNorm", d),
  ]
  if e.num_token_types:
    rules.append(
      table(
        "token_type_embedding",
        f"{theirs}.token_type_embeddings",
        e.num_token_types,
        d,
      )
    )
  if e.relative_buckets:
    rules.append(_shared_bias(e, "encoder.relative_attention_bias"))
  for i in range(e.num_layers):
    rules += _bert_layer(e, i, family)
  if e.pooler:
    rules += dense("pooler", "pooler.dense", (d,), (d,))
  for rule in rules:
    yield dataclasses.replace(rule, theirs=prefix + rule.theirs)


def _shared_bias(e: EncoderConfig, theirs: str) -> Rule:
  """Returns the rule of the table of relative positions."""
  shape = (e.relative_buckets, e.num_heads)
  return Rule("relative_bias", f"{theirs}.weight", shape, shape)


def _bert_redundant(
  e: EncoderConfig, prefix: str, family: str
) -> Iterator[Redundant]:
  yield Redundant(
    f"{prefix}embeddings.position_ids",
    "counts the positions",
    kind="positions",
  )
  # BERT adds a row to every token, so one of zeros
  if not e.num_token_types and has_token_types(family):
    yield Redundant(
      f"{prefix}embeddings.token_type_embeddings.weight",
      "zeros, because this encoder has no token types",
      kind="zeros",
      shape=(1, e.embed_dim),
      written=True,
    )


def plain_encoder(e: EncoderConfig, family: str) -> Architecture:
  """Returns BertModel or a relative, or T5EncoderModel.

  The pooler is zero where the encoder has none.
  """
  if family == "t5_encoder":
    return Architecture(
      architecture_name(family),
      tuple(_t5(e)),
      (
        t5_copy("encoder"),
        Redundant(_DECODER, "an encoder does without the decoder"),
      ),
    )
  redundant = [
    *_bert_redundant(e, "", family),
    Redundant(_HEADS, "the heads of its own training"),
  ]
  if not e.pooler and has_pooler(family):
    d = e.embed_dim
    redundant += [
      Redundant(
        f"pooler.dense.{name}",
        "zeros, because this encoder has no pooler",
        kind="zeros",
        shape=shape,
        written=True,
      )
      for name, shape in (("weight", (d, d)), ("bias", (d,)))
    ]
  return Architecture(
    architecture_name(family),
    tuple(_bert(e, "", family)),
    tuple(redundant),
  )


def _t5(e: EncoderConfig) -> Iterator[Rule]:
  yield table("token_embedding", "shared", e.vocab_size, e.embed_dim)
  yield _shared_bias(e, T5_BIAS.format("encoder"))
  for i in range(e.num_layers):
    yield from t5_layer(f"layer_{i}", f"encoder.block.{i}.layer", e)
  yield from norm(
    "final_norm", "encoder.final_layer_norm", e.embed_dim, use_bias=False
  )


T5_BIAS = "{}.block.0.layer.0.SelfAttention.relative_attention_bias"


def t5_copy(stack: str) -> Redundant:
  """Returns what T5 saves of its embedding table with a stack, too."""
  return Redundant(
    f"{stack}.embed_tokens.weight",
    TIED,
    kind="copy",
    of="shared.weight",
  )


def t5_layer(
  ours: str,
  theirs: str,
  sizes: EncoderConfig | GeneratorConfig,
  decoder: bool = False,
) -> Iterator[Rule]:
  """Yields the rules of a layer of T5."""
  d, f = (sizes.embed_dim,), (sizes.mlp_dim,)
  parts = ("q", "k", "v", "o")
  attentions = {"self_attention": "SelfAttention"}
  if decoder:
    attentions["cross_attention"] = "EncDecAttention"
  for i, (mine, their) in enumerate(attentions.items()):
    yield from attention(
      f"{ours}/{mine}", f"{theirs}.{i}.{their}", parts, sizes, sizes.num_heads
    )
    yield from norm(
      f"{ours}/{mine}_norm", f"{theirs}.{i}.layer_norm", *d, use_bias=False
    )
  last = f"{theirs}.{len(attentions)}"
  kernels = {"up": "wi_1", "gate": "wi_0"} if sizes.gated else {"up": "wi"}
  for mine, their in kernels.items():
    yield from dense(
      f"{ours}/mlp/{mine}", f"{last}.DenseReluDense.{their}", d, f, False
    )
  yield from dense(f"{ours}/mlp/down", f"{last}.DenseReluDense.wo", f, d, False)
  yield from norm(f"{ours}/mlp_norm", f"{last}.layer_norm", *d, use_bias=False)


def dpr(e: EncoderConfig, role: str) -> Architecture:
  """Returns DPRQuestionEncoder or, for passages, DPRContextEncoder.

  The names are those below the prefix of its kind.
  """
  inner = "bert_model."
  rules = list(_bert(e, inner, "dpr"))
  if e.projection_dim:
    rules += dense(
      "projection", "encode_proj", (e.embed_dim,), (e.projection_dim,)
    )
  redundant = (
    *_bert_redundant(e, inner, "dpr"),
    Redundant(rf"{inner}pooler\..*", "DPR takes the first state as it is"),
  )
  name = {"question": "DPRQuestionEncoder", "passage": "DPRContextEncoder"}
  return Architecture(name[role], tuple(rules), redundant)


def old_spelling(name: str) -> str:
  """Returns today's name of a tensor: a norm once had gamma and beta."""
  new = {"gamma": "weight", "beta": "bias"}
  return _OLD_NORM.sub(lambda m: f"{m[1]}.{new[m[2]]}", name)


def encoder_names(names: list[str], model_type: str) -> Callable[[str], str]:
  """Returns the renaming of an encoder, saved alone or in a larger model."""
  prefix = {"xlm-roberta": "roberta"}.get(model_type, model_type) + "."
  inside = any(name.startswith(prefix) for name in names)

  def rename(name: str) -> str:
    return old_spelling(name.removeprefix(prefix) if inside else name)

  return rename


def dpr_role(names: list[str], wanted: str) -> str:
  """Returns whose encoder is among the tensors: `wanted`, or else the other."""
  held = [
    role
    for role, prefix in DPR_PREFIXES.items()
    if any(name.startswith(prefix) for name in names)
  ]
  return held[0] if held and wanted not in held else wanted


def dpr_names(names: list[str], role: str) -> Callable[[str], str | None]:
  """Returns the renaming of a DPR; of one that holds both, that of `role`."""
  mine = DPR_PREFIXES[role]
  inside = any(name.startswith(mine) for name in names)
  other = tuple(p for p in DPR_PREFIXES.values() if p != mine)

  def rename(name: str) -> str | None:
    if inside and name.startswith(other):
      return None
    return old_spelling(name.removeprefix(mine) if inside else name)

  return rename
