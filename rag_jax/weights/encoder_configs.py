"""An encoder's fields <-> config.json of BERT, its relatives, T5 and DPR.

In: `ConfigValues`. Out: an `EncoderConfig` of the architecture alone; and back.
What is not given has the default of its class in transformers.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

from rag_jax.config_models import EncoderConfig
from rag_jax.weights.config_values import OUR_KEY
from rag_jax.weights.config_values import ConfigValues
from rag_jax.weights.config_values import SpecialIds
from rag_jax.weights.config_values import feed_forward_proj
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


# What layers are in BERT and most relatives; the defaults of `EncoderConfig`.
BERT_LAYERS: dict[str, Any] = {
  "positions": "learned", "embedding_norm": True, "norm": "post",
  "norm_kind": "layer", "use_bias": True, "gated": False,
  "relative_buckets": 0, "scale_attention": True,
}  # fmt: skip
# MPNet passes over relative_attention_num_buckets: it always has 32 buckets.
_MPNET_LAYERS = BERT_LAYERS | {
  "relative_buckets": 32, "relative_max_distance": 128
}  # fmt: skip
_T5_LAYERS: dict[str, Any] = {
  "positions": "none", "embedding_norm": False, "norm": "pre",
  "norm_kind": "rms", "use_bias": False, "scale_attention": False,
}  # fmt: skip


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
    layers: the fields of all its encoders.
    pooling: how states become one embedding, if nothing says it.
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
  layers: Mapping[str, Any] = dataclasses.field(
    default_factory=lambda: BERT_LAYERS
  )
  pooling: str = "cls"


_DISTILBERT_SIZES = {
  "vocab_size": ("vocab_size", 30522),
  "num_layers": ("n_layers", 6),
  "embed_dim": ("dim", 768),
  "num_heads": ("n_heads", 12),
  "mlp_dim": ("hidden_dim", 3072),
}
_T5_SIZES = {
  "vocab_size": ("vocab_size", 32128),
  "num_layers": ("num_layers", 6),
  "embed_dim": ("d_model", 512),
  "num_heads": ("num_heads", 8),
  "head_dim": ("d_kv", 64),
  "mlp_dim": ("d_ff", 2048),
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
  "mpnet": _Family(
    *("MPNetModel", _ROBERTA_IDS),
    sizes=_BERT_SIZES | {"vocab_size": ("vocab_size", 30527)},
    token_types=False,
    after_padding=True,
    layers=_MPNET_LAYERS,
  ),
  "t5_encoder": _Family(
    *("T5EncoderModel", SpecialIds(pad=0, eos=1), _T5_SIZES),
    token_types=False,
    pooler=False,
    layers=_T5_LAYERS,
    pooling="mean",
  ),
  "dpr": _Family("DPRQuestionEncoder", _BERT_IDS, pooler=False),
}
# Whose model_type is that of a generator. Ours -> theirs.
_MODEL_TYPES = {"t5_encoder": "t5"}
ENCODER_TYPES = tuple(_MODEL_TYPES.get(name, name) for name in _FAMILIES)
# Those of one encoder alone; the values of `EncoderConfig.family`.
PLAIN_ENCODERS = tuple(name for name in _FAMILIES if name != "dpr")
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
  name = family_name(values)
  family = _FAMILIES[name]
  read = _read_t5 if name == "t5_encoder" else _read_bert
  encoder = read(values, family)
  for field in WORDING:
    setattr(encoder, field, values.ours().text(field, ""))
  if name == "dpr":
    encoder.projection_dim = values.size("projection_dim", 0, least=0)
    return encoder
  ours = values.ours()
  encoder.family = name
  encoder.pooler = family.pooler and has_pooler and ours.flag("pooler", True)
  encoder.pooling = ours.text("pooling", family.pooling)
  return encoder


def family_name(values: ConfigValues) -> str:
  """Returns what a config.json of an encoder describes, a key of `USED`."""
  model_type = values.text("model_type", "")
  ours = {theirs: ours for ours, theirs in _MODEL_TYPES.items()}
  return ours.get(model_type, model_type)


def _read_bert(values: ConfigValues, family: _Family) -> EncoderConfig:
  """Returns BERT or a relative, without what its family decides."""
  values.refuse(
    position_embedding_type="absolute",
    is_decoder=False,
    is_encoder_decoder=False,
    add_cross_attention=False,
  )
  if buckets := family.layers["relative_buckets"]:
    # Both are constants there, whatever the file says.
    values.refuse(
      relative_attention_num_buckets=buckets, pad_token_id=family.ids.pad
    )
  names, ours = family.names, values.ours()
  types = values.size("type_vocab_size", 2) if family.token_types else 0
  sizes: dict[str, Any] = {
    name: values.size(*of) for name, of in family.sizes.items()
  }
  encoder = EncoderConfig(
    **sizes,
    **family.layers,
    max_positions=values.size("max_position_embeddings", 512),
    activation=values.activation(names["activation"], "gelu"),
    norm_eps=family.norm_eps or values.number("layer_norm_eps", 1e-12),
    num_token_types=ours.size("num_token_types", types, least=0),
    pooling=family.pooling,
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
  return encoder


def _read_t5(values: ConfigValues, family: _Family) -> EncoderConfig:
  """Returns the encoder of T5, without what its family decides."""
  values.refuse(is_decoder=False)
  sizes: dict[str, Any] = {
    name: values.size(*of) for name, of in family.sizes.items()
  }
  activation, gated = values.feed_forward("feed_forward_proj", "relu")
  # Below 8, transformers divides by zero for some distances.
  buckets = values.size("relative_attention_num_buckets", 32, least=8)
  rate = values.rate("dropout_rate", 0.1)
  return EncoderConfig(
    **sizes,
    **family.layers,
    activation=activation,
    gated=gated,
    norm_eps=values.number("layer_norm_epsilon", 1e-6),
    relative_buckets=buckets,
    relative_max_distance=values.size(
      "relative_attention_max_distance", 128, least=buckets // 2 + 1
    ),
    pooling=family.pooling,
    dropout=rate,  # in all places
    attention_dropout=rate,
    activation_dropout=rate,
  )


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
  ids = _FAMILIES[family_name(values) or "bert"].ids
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
  name = "dpr" if dpr else _type_of(architecture)
  family = _FAMILIES[name]
  _check_expressible(e, architecture, family)
  if family.after_padding:
    special_ids = _with_padding(e, architecture, special_ids)
  config = {
    "architectures": [architecture],
    "model_type": _MODEL_TYPES.get(name, name),
    **{theirs: getattr(e, name) for name, (theirs, _) in family.sizes.items()},
    "dtype": "float32",
    "torch_dtype": "float32",  # what version 4 calls it
    **special_ids.to_config(),
  }
  ours = {name: getattr(e, name) for name in WORDING if getattr(e, name)}
  if name == "t5_encoder":
    config |= _t5_config(e)
    return config | ({OUR_KEY: ours} if ours else {})
  config |= {theirs: getattr(e, name) for name, theirs in family.names.items()}
  config["max_position_embeddings"] = e.max_positions + e.position_offset
  if e.relative_buckets:
    config["relative_attention_num_buckets"] = e.relative_buckets
  if not family.norm_eps:
    config["layer_norm_eps"] = e.norm_eps
  if family.token_types:
    config["type_vocab_size"] = e.num_token_types or 1
    config["position_embedding_type"] = "absolute"
    if not e.num_token_types:
      ours["num_token_types"] = 0
  if dpr:
    config["projection_dim"] = e.projection_dim
  elif family.pooler:
    if not e.pooler:
      ours["pooler"] = False
    if e.pooling == "pooler":
      ours["pooling"] = "pooler"
  return config | ({OUR_KEY: ours} if ours else {})


def _t5_config(e: EncoderConfig) -> dict[str, Any]:
  """Returns what config.json of T5's encoder says, but its sizes."""
  return {
    "d_kv": e.head_dim or e.embed_dim // e.num_heads,
    "feed_forward_proj": feed_forward_proj(e.activation, e.gated),
    "dense_act_fn": e.activation,
    "is_gated_act": e.gated,
    "layer_norm_epsilon": e.norm_eps,
    "relative_attention_num_buckets": e.relative_buckets,
    "relative_attention_max_distance": e.relative_max_distance,
    "dropout_rate": e.dropout,
    "is_encoder_decoder": False,
  }


def architecture_name(family: str) -> str:
  """Returns the class of a plain encoder in transformers."""
  return _FAMILIES[family].architecture


def default_pooling(family: str) -> str:
  """Returns the pooling of the class, where its config.json has no word."""
  return _FAMILIES[family].pooling


def has_pooler(family: str) -> bool:
  """Returns whether the class has BERT's pooler."""
  return _FAMILIES[family].pooler


def has_token_types(family: str) -> bool:
  """Returns whether the class has a table of token types."""
  return _FAMILIES[family].token_types


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
  } | {name: (value,) for name, value in family.layers.items()}  # fmt: skip
  if architecture.startswith("DPR"):
    supported |= {"pooling": ("cls",)}
    if e.projection_dim:
      supported |= {
        "projection_bias": (True,), "projection_activation": ("none",)
      }  # fmt: skip
    remedy = "Choose kind 'sentence_transformers' for another pooling"
  else:
    supported |= {
      "pooling": ("cls", "pooler") if family.pooler else (family.pooling,),
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
  elif family.layers["relative_buckets"]:  # MPNet's padding is a constant
    supported["position_offset"] = (family.ids.pad + 1,)
  if "head_dim" not in family.sizes:
    supported["head_dim"] = (0, e.embed_dim // e.num_heads)
  else:
    if not e.relative_buckets:
      supported["relative_buckets"] = (32,)
    if e.gated and e.activation == "gelu":  # "gated-gelu" is taken
      supported["activation"] = ("gelu_new",)
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
