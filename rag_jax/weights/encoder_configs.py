"""An encoder's fields <-> config.json of BERT and DPR.

In: `ConfigValues`. Out: an `EncoderConfig` of the architecture alone; and back.
What is not given has the default of `BertConfig` and `DPRConfig`.
"""

import dataclasses
from typing import Any

from rag_jax.config import EncoderConfig
from rag_jax.weights.config_values import OUR_KEY
from rag_jax.weights.config_values import ConfigValues
from rag_jax.weights.config_values import SpecialIds
from rag_jax.weights.config_values import unsupported

ENCODER_TYPES = ("bert", "dpr")

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


def read_encoder_config(
  values: ConfigValues, *, has_pooler: bool
) -> EncoderConfig:
  """Returns the encoder that a config.json of BERT or DPR describes.

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
  values.refuse(
    position_embedding_type="absolute",
    is_decoder=False,
    is_encoder_decoder=False,
    add_cross_attention=False,
  )
  ours = values.ours()
  encoder = EncoderConfig(
    vocab_size=values.size("vocab_size", 30522),
    max_positions=values.size("max_position_embeddings", 512),
    num_layers=values.size("num_hidden_layers", 12),
    embed_dim=values.size("hidden_size", 768),
    num_heads=values.size("num_attention_heads", 12),
    mlp_dim=values.size("intermediate_size", 3072),
    activation=values.activation("hidden_act", "gelu"),
    norm_eps=values.number("layer_norm_eps", 1e-12),
    num_token_types=ours.size(
      "num_token_types", values.size("type_vocab_size", 2), least=0
    ),
    pooling="cls",
    dropout=values.rate("hidden_dropout_prob", 0.1),
    attention_dropout=values.rate("attention_probs_dropout_prob", 0.1),
  )
  if encoder.embed_dim % encoder.num_heads:
    raise ValueError(
      f"{values.origin} says hidden_size={encoder.embed_dim},"
      f" num_attention_heads={encoder.num_heads}; expected a multiple. The file"
      " was edited; copy it again."
    )
  if model_type == "dpr":
    encoder.projection_dim = values.size("projection_dim", 0, least=0)
  else:
    encoder.pooler = has_pooler and ours.flag("pooler", True)
    encoder.pooling = ours.text("pooling", "cls")
  return encoder


def read_special_ids(values: ConfigValues) -> SpecialIds:
  """Returns the token ids of a config.json; BERT's padding is 0."""
  return SpecialIds(
    pad=values.token("pad_token_id", 0),
    bos=values.token("bos_token_id"),
    eos=values.token("eos_token_id"),
  )


def bert_config(
  e: EncoderConfig, architecture: str, special_ids: SpecialIds
) -> dict[str, Any]:
  """Returns config.json of `BertModel` or of one of DPR's encoders.

  Raises:
    ValueError: names the fields that no such model has.
  """
  dpr = architecture.startswith("DPR")
  _check_expressible(e, architecture)
  config = {
    "architectures": [architecture],
    "model_type": "dpr" if dpr else "bert",
    "vocab_size": e.vocab_size,
    "max_position_embeddings": e.max_positions,
    "num_hidden_layers": e.num_layers,
    "hidden_size": e.embed_dim,
    "num_attention_heads": e.num_heads,
    "intermediate_size": e.mlp_dim,
    "hidden_act": e.activation,
    "layer_norm_eps": e.norm_eps,
    "type_vocab_size": e.num_token_types or 1,
    "position_embedding_type": "absolute",
    "hidden_dropout_prob": e.dropout,
    "attention_probs_dropout_prob": e.attention_dropout,
    "dtype": "float32",
    "torch_dtype": "float32",  # what version 4 calls it
    **special_ids.to_config(),
  }
  ours: dict[str, Any] = {}
  if not e.num_token_types:
    ours["num_token_types"] = 0
  if dpr:
    config["projection_dim"] = e.projection_dim
  else:
    if not e.pooler:
      ours["pooler"] = False
    if e.pooling == "pooler":
      ours["pooling"] = "pooler"
  return config | ({OUR_KEY: ours} if ours else {})


def _check_expressible(e: EncoderConfig, architecture: str) -> None:
  """Raises `ValueError` unless the architecture computes this encoder."""
  supported: dict[str, tuple[Any, ...]] = {"normalize": (False,)}
  if architecture.startswith("DPR"):
    supported |= {"pooling": ("cls",), "pooler": (False,)}
    remedy = "Choose kind 'sentence_transformers' for another pooling"
  else:
    supported |= {"pooling": ("cls", "pooler"), "projection_dim": (0,)}
    remedy = (
      "Choose kind 'sentence_transformers' for another pooling, 'dpr_question'"
      " for a projection"
    )
  wrong = [name for name, values in supported.items()
           if getattr(e, name) not in values]  # fmt: skip
  if not e.num_layers:
    wrong.append("num_layers")
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
