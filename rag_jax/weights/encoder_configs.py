"""An encoder's fields <-> config.json of BERT, its relatives and DPR.

In: `ConfigValues`. Out: an `EncoderConfig` of the architecture alone; and back.
What is not given has the default of its class in transformers.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

from rag_jax.config import EncoderConfig
from rag_jax.weights.config_values import OUR_KEY
from rag_jax.weights.config_values import ConfigValues
from rag_jax.weights.config_values import SpecialIds
from rag_jax.weights.config_values import unsupported

# Our names of sizes -> theirs, and the default.
_BERT_SIZES = {
  "vocab_size": ("vocab_size", 30522),
  "num_layers": ("num_hidden_layers", 12),
  "embed_dim": ("hidden_size", 768),
  "num_heads": ("num_attention_heads", 12),
  "mlp_dim": ("intermediate_size", 3072),
}
_BERT_NAMES = {
  "activation": "hidden_act",
  "dropout": "hidden_dropout_prob",
  "attention_dropout": "attention_probs_dropout_prob",
}


@dataclasses.dataclass(frozen=True, slots=True)
class _Family:
  """What one model_type is called, and what it can compute.

  Attributes:
    architecture: its class.
    ids: its default token ids.
    sizes: our names -> theirs, and the default.
    names: our names -> theirs.
    token_types: whether it has a table of them.
    norm_eps: of norms, if config.json does not say it; 0.0: it does.
    after_padding: whether the first position is the row after that of the
      padding token's id.
    pooler: whether it has BERT's pooler.
  """

  architecture: str
  ids: SpecialIds
  sizes: Mapping[str, tuple[str, int]] = dataclasses.field(
    default_factory=lambda: _BERT_SIZES
  )
  names: Mapping[str, str] = dataclasses.field(
    default_factory=lambda: _BERT_NAMES
  )
  token_types: bool = True
  norm_eps: float = 0.0
  after_padding: bool = False
  pooler: bool = True


_DISTILBERT_SIZES = {
  "vocab_size": ("vocab_size", 30522),
  "num_layers": ("n_layers", 6),
  "embed_dim": ("dim", 768),
  "num_heads": ("n_heads", 12),
  "mlp_dim": ("hidden_dim", 3072),
}
_BERT_IDS, _ROBERTA_IDS = SpecialIds(pad=0), SpecialIds(pad=1, bos=0, eos=2)
_FAMILIES = {
  "bert": _Family("BertModel", _BERT_IDS),
  "roberta": _Family(
    *("RobertaModel", _ROBERTA_IDS),
    sizes=_BERT_SIZES | {"vocab_size": ("vocab_size", 50265)},
    after_padding=True,
  ),
  "xlm-roberta": _Family("XLMRobertaModel", _ROBERTA_IDS, after_padding=True),
  "distilbert": _Family(
    *("DistilBertModel", _BERT_IDS, _DISTILBERT_SIZES),
    names={
      name: name for name in ("activation", "dropout", "attention_dropout")
    },
    token_types=False,
    norm_eps=1e-12,
    pooler=False,
  ),
  "dpr": _Family("DPRQuestionEncoder", _BERT_IDS, pooler=False),
}
ENCODER_TYPES = tuple(_FAMILIES)
# Those of one encoder alone; the values of `EncoderConfig.family`.
PLAIN_ENCODERS = tuple(name for name in ENCODER_TYPES if name != "dpr")
ENCODER_KINDS = (
  "dpr_question", "dpr_context", "sentence_transformers", *PLAIN_ENCODERS
)  # fmt: skip

# Settings of a training or of two towers. A checkpoint decides all others.
_NOT_OF_A_CHECKPOINT = (
  "init_from", "passage_init_from", "tied", "train_passage_encoder",
  "score_scale", "learn_score_scale",
)  # fmt: skip
ENCODER_FIELDS = tuple(
  field.name
  for field in dataclasses.fields(EncoderConfig)
  if field.name not in _NOT_OF_A_CHECKPOINT
)

# How texts are read, which transformers has no word for.
WORDING = ("question_prompt", "passage_prompt", "title_sep")


def read_encoder_config(
  values: ConfigValues, *, has_pooler: bool
) -> EncoderConfig:
  """Returns the encoder that a config.json of one of `ENCODER_TYPES` describes.

  Args:
    values: of config.json.
    has_pooler: whether BERT's pooler is among the tensors.

  Raises:
    ValueError: it describes something else, or a value is impossible.
  """
  model_type = values.text("model_type", "")
  if model_type not in ENCODER_TYPES:
    architectures = values.values.get("architectures")
    raise unsupported(values.origin, model_type, architectures)
  family = _FAMILIES[model_type]
  values.refuse(
    position_embedding_type="absolute",
    is_decoder=False,
    is_encoder_decoder=False,
    add_cross_attention=False,
  )
  names, ours = family.names, values.ours()
  types = values.size("type_vocab_size", 2) if family.token_types else 0
  sizes: dict[str, Any] = {
    name: values.size(*of) for name, of in family.sizes.items()
  }
  told: dict[str, Any] = {name: ours.text(name, "") for name in WORDING}
  encoder = EncoderConfig(
    **sizes,
    **told,
    max_positions=values.size("max_position_embeddings", 512),
    activation=values.activation(names["activation"], "gelu"),
    norm_eps=family.norm_eps or values.number("layer_norm_eps", 1e-12),
    num_token_types=ours.size("num_token_types", types, least=0),
    pooling="cls",
    dropout=values.rate(names["dropout"], 0.1),
    attention_dropout=values.rate(names["attention_dropout"], 0.1),
  )
  if family.after_padding:
    _put_positions_after_padding(encoder, values)
  if encoder.embed_dim % encoder.num_heads:
    dim, heads = (family.sizes[k][0] for k in ("embed_dim", "num_heads"))
    raise ValueError(
      f"{values.origin} says {dim}={encoder.embed_dim},"
      f" {heads}={encoder.num_heads}; expected a multiple. The file"
      " was edited; copy it again."
    )
  if model_type == "dpr":
    encoder.projection_dim = values.size("projection_dim", 0, least=0)
    return encoder
  encoder.family = model_type
  encoder.pooler = family.pooler and has_pooler and ours.flag("pooler", True)
  encoder.pooling = ours.text("pooling", "cls")
  return encoder


def _put_positions_after_padding(
  encoder: EncoderConfig, values: ConfigValues
) -> None:
  """Sets the offset of positions, and leaves out the rows before it."""
  pad = read_special_ids(values).pad
  encoder.position_offset = pad + 1
  encoder.max_positions -= encoder.position_offset
  if pad < 0 or encoder.max_positions < 1:
    raise ValueError(
      f"{values.origin} says pad_token_id={pad}, max_position_embeddings="
      f"{encoder.max_positions + pad + 1}; expected an id, and more positions"
      " than ids up to it, because positions begin after it. The file was"
      " edited; copy it again."
    )


def read_special_ids(values: ConfigValues) -> SpecialIds:
  """Returns the token ids of a config.json, by default those of its class."""
  ids = _FAMILIES[values.text("model_type", "bert")].ids
  return SpecialIds(
    pad=values.token("pad_token_id", ids.pad),
    bos=values.token("bos_token_id", ids.bos),
    eos=values.token("eos_token_id", ids.eos),
  )


def encoder_config(
  e: EncoderConfig, architecture: str, special_ids: SpecialIds
) -> dict[str, Any]:
  """Returns config.json of an encoder's class in transformers.

  Raises:
    ValueError: names the fields that no such model has, or that contradict the
      tokenizer.
  """
  dpr = architecture.startswith("DPR")
  model_type = "dpr" if dpr else _type_of(architecture)
  family = _FAMILIES[model_type]
  _check_expressible(e, architecture, family)
  if family.after_padding:
    special_ids = _with_padding(e, architecture, special_ids)
  config = {
    "architectures": [architecture],
    "model_type": model_type,
    **{theirs: getattr(e, name) for name, (theirs, _) in family.sizes.items()},
    **{theirs: getattr(e, name) for name, theirs in family.names.items()},
    "max_position_embeddings": e.max_positions + e.position_offset,
    "dtype": "float32",
    "torch_dtype": "float32",  # what version 4 calls it
    **special_ids.to_config(),
  }
  ours: dict[str, Any] = {}
  if not family.norm_eps:
    config["layer_norm_eps"] = e.norm_eps
  if family.token_types:
    config["type_vocab_size"] = e.num_token_types or 1
    config["position_embedding_type"] = "absolute"
    if not e.num_token_types:
      ours["num_token_types"] = 0
  ours |= {name: getattr(e, name) for name in WORDING if getattr(e, name)}
  if dpr:
    config["projection_dim"] = e.projection_dim
  elif family.pooler:
    if not e.pooler:
      ours["pooler"] = False
    if e.pooling == "pooler":
      ours["pooling"] = "pooler"
  return config | ({OUR_KEY: ours} if ours else {})


def architecture_name(model_type: str) -> str:
  """Returns the class of a plain encoder in transformers."""
  return _FAMILIES[model_type].architecture


def has_pooler(model_type: str) -> bool:
  """Returns whether the class has BERT's pooler."""
  return _FAMILIES[model_type].pooler


def has_token_types(model_type: str) -> bool:
  """Returns whether the class has a table of token types."""
  return _FAMILIES[model_type].token_types


def _type_of(architecture: str) -> str:
  return next(k for k, f in _FAMILIES.items() if f.architecture == architecture)


def _with_padding(
  e: EncoderConfig, architecture: str, ids: SpecialIds
) -> SpecialIds:
  """Returns the token ids with padding where the positions expect it."""
  pad = e.position_offset - 1
  if ids.pad not in (-1, pad):
    raise ValueError(
      f"{architecture} counts positions from the row after its padding token's"
      f" id, {ids.pad}, but encoder.position_offset={e.position_offset};"
      f" expected {ids.pad + 1}. Export it with the tokenizer that it was"
      " trained with."
    )
  return dataclasses.replace(ids, pad=pad)


def _check_expressible(
  e: EncoderConfig, architecture: str, family: _Family
) -> None:
  """Raises `ValueError` unless the architecture computes this encoder."""
  supported: dict[str, tuple[Any, ...]] = {
    "normalize": (False,), "truncate_dim": (0,)
  }  # fmt: skip
  if architecture.startswith("DPR"):
    supported |= {"pooling": ("cls",)}
    if e.projection_dim:
      supported |= {
        "projection_bias": (True,), "projection_activation": ("none",)
      }  # fmt: skip
    remedy = "Choose kind 'sentence_transformers' for another pooling"
  else:
    supported |= {
      "pooling": ("cls", "pooler") if family.pooler else ("cls",),
      "projection_dim": (0,),
    }
    remedy = (
      "Choose kind 'sentence_transformers' for another pooling, 'dpr_question'"
      " for a projection"
    )
  if not family.pooler:
    supported["pooler"] = (False,)
  if not family.token_types:
    supported["num_token_types"] = (0,)
  if family.norm_eps:
    supported["norm_eps"] = (family.norm_eps,)
  if not family.after_padding:
    supported["position_offset"] = (0,)
  wrong = [name for name, values in supported.items()
           if getattr(e, name) not in values]  # fmt: skip
  wrong += [] if e.num_layers else ["num_layers"]
  if family.after_padding and not e.position_offset:
    wrong.append("position_offset")
  if wrong:
    given = ", ".join(f"encoder.{name}={getattr(e, name)!r}" for name in wrong)
    expected = ", ".join(
      f"{name} {' or '.join(map(repr, supported.get(name, ('1 or more',))))}"
      for name in wrong
    )
    raise ValueError(
      f"{architecture} cannot compute an encoder with {given}; expected"
      f" {expected}. {remedy}, or train an encoder with these fields."
    )
