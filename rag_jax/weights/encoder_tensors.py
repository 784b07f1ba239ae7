"""The tensors of BERT, its relatives and DPR, for an encoder's fields.

In: an `EncoderConfig` whose sizes are known. Out: the rules of its parameters,
under the names of `BertModel`, `DPRQuestionEncoder` and so on.
"""

from collections.abc import Callable, Iterator
import dataclasses
import re

from rag_jax.config import EncoderConfig
from rag_jax.weights.encoder_configs import architecture_name
from rag_jax.weights.encoder_configs import has_pooler
from rag_jax.weights.encoder_configs import has_token_types
from rag_jax.weights.mapping import Architecture
from rag_jax.weights.mapping import Redundant
from rag_jax.weights.mapping import Rule

DPR_PREFIXES = {"question": "question_encoder.", "passage": "ctx_encoder."}

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
}


def _bert_layer(e: EncoderConfig, i: int, model_type: str) -> Iterator[Rule]:
  names = _LAYERS.get(model_type, _LAYER)
  ours, theirs = f"layer_{i}", f"{names['layers']}.{i}"
  heads = (e.num_heads, e.embed_dim // e.num_heads)
  dim, wide = (e.embed_dim,), (e.mlp_dim,)
  for part in ("query", "key", "value", "out"):
    yield from dense(
      f"{ours}/self_attention/{part}",
      f"{theirs}.{names[part]}",
      *((heads, dim) if part == "out" else (dim, heads)),
    )
  for part, inputs, outputs in (("up", dim, wide), ("down", wide, dim)):
    their = f"{theirs}.{names[f'mlp/{part}']}"
    yield from dense(f"{ours}/mlp/{part}", their, inputs, outputs)
  for part in ("self_attention_norm", "mlp_norm"):
    yield from norm(f"{ours}/{part}", f"{theirs}.{names[part]}", e.embed_dim)


def _bert(e: EncoderConfig, prefix: str, model_type: str) -> Iterator[Rule]:
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
  for i in range(e.num_layers):
    rules += _bert_layer(e, i, model_type)
  if e.pooler:
    rules += dense("pooler", "pooler.dense", (d,), (d,))
  for rule in rules:
    yield dataclasses.replace(rule, theirs=prefix + rule.theirs)


def _bert_redundant(
  e: EncoderConfig, prefix: str, model_type: str
) -> Iterator[Redundant]:
  yield Redundant(
    f"{prefix}embeddings.position_ids",
    "counts the positions",
    kind="positions",
  )
  if not e.num_token_types and has_token_types(
    model_type
  ):  # BERT adds a row to every token, so one of zeros
    yield Redundant(
      f"{prefix}embeddings.token_type_embeddings.weight",
      "zeros, because this encoder has no token types",
      kind="zeros",
      shape=(1, e.embed_dim),
      written=True,
    )


def plain_encoder(e: EncoderConfig, model_type: str) -> Architecture:
  """Returns BertModel or a relative.

  The pooler is zero where the encoder has none.
  """
  redundant = [
    *_bert_redundant(e, "", model_type),
    Redundant(_HEADS, "the heads of its own training"),
  ]
  if not e.pooler and has_pooler(model_type):
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
    architecture_name(model_type),
    tuple(_bert(e, "", model_type)),
    tuple(redundant),
  )


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
