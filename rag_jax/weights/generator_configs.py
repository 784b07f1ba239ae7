"""A generator's fields <-> config.json of BART, its relatives and T5.

In: `ConfigValues`. Out: a `GeneratorConfig` of the architecture alone; and
back. What is not given has the default of its class in transformers.
"""

import dataclasses
from typing import Any, Literal

from rag_jax.config_models import GeneratorConfig
from rag_jax.weights.config_values import ConfigValues
from rag_jax.weights.config_values import SpecialIds
from rag_jax.weights.config_values import feed_forward_proj
from rag_jax.weights.config_values import unsupported

LmHead = Literal["absent", "copy", "own"]  # copy: of the embedding table

# How a fresh generator starts. A checkpoint decides all other fields.
_NOT_OF_A_CHECKPOINT = ("init_from", "init", "position_init")
GENERATOR_FIELDS = tuple(
  field.name
  for field in dataclasses.fields(GeneratorConfig)
  if field.name not in _NOT_OF_A_CHECKPOINT
)

_SINUSOIDS = ("encoder/position_embedding", "decoder/position_embedding")

_T5_TYPES = ("t5", "mt5")
# What the relatives of BART differ in, and their token ids.
_BART_TYPES: dict[str, dict[str, Any]] = {
  "bart": {"norm": "post", "embedding_norm": True, "position_offset": 2},
  "mbart": {"norm": "pre", "embedding_norm": True, "position_offset": 2},
  "pegasus": {"norm": "pre", "embedding_norm": False, "position_offset": 0},
}
# What does not learn in the original; of Pegasus, positions are constants too.
_FIXED = {"pegasus": ("final_logits_bias", *_SINUSOIDS)}
_BART_IDS = {
  "bart": {"pad": 1, "bos": 0, "eos": 2, "start": 2},
  "mbart": {"pad": 1, "bos": 0, "eos": 2, "start": -1},
  "pegasus": {"pad": 0, "bos": -1, "eos": 1, "start": 0},
}
# Of all of them, and of T5.
_BART: dict[str, Any] = {
  "gated": False, "norm_kind": "layer", "norm_eps": 1e-5, "use_bias": True,
  "positions": "learned", "relative_buckets": 0, "relative_shared": False,
  "scale_attention": True, "scale_output": False, "logits_bias": True,
  "pointer": False,
}  # fmt: skip
_T5: dict[str, Any] = {
  "norm": "pre", "norm_kind": "rms", "use_bias": False,
  "embedding_norm": False, "scale_embedding": False, "positions": "none",
  "relative_shared": True, "scale_attention": False, "logits_bias": False,
  "pointer": False,
}  # fmt: skip
GENERATOR_TYPES = (*_BART_TYPES, *_T5_TYPES)
ENCODER_DECODER = "a generator with an encoder"  # for messages


def read_generator_config(
  values: ConfigValues, lm_head: LmHead
) -> GeneratorConfig:
  """Returns the generator that a config.json describes, nothing left at 0.

  Args:
    values: of config.json, or of the generator's part of RAG's.
    lm_head: whether the tensors hold a table for the output, and which.

  Raises:
    ValueError: it describes something else, or a value is impossible.
  """
  model_type = values.text("model_type", "")
  if model_type in _BART_TYPES:
    return _read_bart(values, model_type, lm_head)
  if model_type in _T5_TYPES:
    return _read_t5(values, model_type, lm_head)
  architectures = values.values.get("architectures")
  raise unsupported(values.origin, model_type, architectures)


def _read_bart(
  values: ConfigValues, model_type: str, lm_head: LmHead
) -> GeneratorConfig:
  values.refuse(is_decoder=False, is_encoder_decoder=True)
  g = GeneratorConfig(
    vocab_size=values.size("vocab_size", 50265),
    max_positions=values.size("max_position_embeddings", 1024),
    num_layers=values.size("encoder_layers", 12),
    num_decoder_layers=values.size("decoder_layers", 12),
    embed_dim=values.size("d_model", 1024),
    num_heads=values.size("encoder_attention_heads", 16),
    num_decoder_heads=values.size("decoder_attention_heads", 16),
    mlp_dim=values.size("encoder_ffn_dim", 4096),
    decoder_mlp_dim=values.size("decoder_ffn_dim", 4096),
    activation=values.activation("activation_function", "gelu"),
    scale_embedding=values.flag("scale_embedding", False),
    tied_output=_tied(values, lm_head),
    decoder_start_id=values.token(
      "decoder_start_token_id", _BART_IDS[model_type]["start"]
    ),
    dropout=values.rate("dropout", 0.1),
    attention_dropout=values.rate("attention_dropout", 0.0),
    activation_dropout=values.rate("activation_dropout", 0.0),
    fixed=_FIXED.get(model_type, ("final_logits_bias",)),
    **_BART,
    **_BART_TYPES[model_type],
  )
  if g.embed_dim % g.num_heads or g.embed_dim % g.num_decoder_heads:
    raise ValueError(
      f"{values.origin} says d_model={g.embed_dim},"
      f" encoder_attention_heads={g.num_heads},"
      f" decoder_attention_heads={g.num_decoder_heads}; expected a multiple of"
      " both. The file was edited; copy it again."
    )
  if g.num_heads == g.num_decoder_heads:
    g.head_dim = g.embed_dim // g.num_heads
  return g


def _read_t5(
  values: ConfigValues, model_type: str, lm_head: LmHead
) -> GeneratorConfig:
  values.refuse(is_decoder=False, is_encoder_decoder=True)
  v1_1 = model_type == "mt5"
  activation, gated = values.feed_forward(
    "feed_forward_proj", "gated-gelu" if v1_1 else "relu"
  )
  # Version 4 divides tied outputs by the root of D, and says that they are not
  # tied where it shall not. Version 5 says both.
  scale = values.flag(
    "scale_decoder_outputs",
    not v1_1 and values.flag("tie_word_embeddings", True),
  )
  tied = _tied(values, lm_head)
  if scale and not tied:
    raise ValueError(
      f"{values.origin} says scale_decoder_outputs=true, but lm_head.weight is"
      " not the embedding table; expected one of them, as rag_jax scales tied"
      " outputs alone. Multiply lm_head.weight by d_model**-0.5 and set"
      " scale_decoder_outputs and tie_word_embeddings to false."
    )
  heads = values.size("num_heads", 6 if v1_1 else 8)
  layers = values.size("num_layers", 8 if v1_1 else 6)
  mlp_dim = values.size("d_ff", 1024 if v1_1 else 2048)
  dropout = values.rate("dropout_rate", 0.1)
  return GeneratorConfig(
    vocab_size=values.size("vocab_size", 250112 if v1_1 else 32128),
    num_layers=layers,
    num_decoder_layers=values.size("num_decoder_layers", layers),
    embed_dim=values.size("d_model", 512),
    num_heads=heads,
    num_decoder_heads=heads,
    head_dim=values.size("d_kv", 64),
    mlp_dim=mlp_dim,
    decoder_mlp_dim=mlp_dim,
    activation=activation,
    gated=gated,
    norm_eps=values.number("layer_norm_epsilon", 1e-6),
    position_offset=0,
    relative_buckets=values.size("relative_attention_num_buckets", 32, least=2),
    relative_max_distance=values.size("relative_attention_max_distance", 128),
    tied_output=tied,
    scale_output=scale,
    decoder_start_id=values.token(
      "decoder_start_token_id", values.token("pad_token_id", 0)
    ),
    dropout=dropout,  # in all places
    attention_dropout=dropout,
    activation_dropout=dropout,
    **_T5,
  )


def _tied(values: ConfigValues, lm_head: LmHead) -> bool:
  """Returns whether the output uses the embedding table."""
  if lm_head != "own":
    return True
  # Version 5's T5 always says that they are tied, and looks at the tensors.
  by_tensors = values.has("scale_decoder_outputs")
  if values.flag("tie_word_embeddings", True) and not by_tensors:
    raise ValueError(
      f"{values.origin} says tie_word_embeddings=true, but lm_head.weight is"
      " not the embedding table: version 4 of transformers would take the"
      " table, version 5 lm_head.weight. Expected one answer. Set"
      " tie_word_embeddings to false to take lm_head.weight, or remove it."
    )
  return False


def read_generator_ids(values: ConfigValues) -> SpecialIds:
  """Returns the token ids of a config.json."""
  ids = _ids(values)
  return SpecialIds(
    pad=values.token("pad_token_id", ids["pad"]),
    bos=values.token("bos_token_id", ids["bos"]),
    eos=values.token("eos_token_id", ids["eos"]),
  )


def _ids(values: ConfigValues) -> dict[str, int]:
  t5 = {"pad": 0, "bos": -1, "eos": 1, "start": -1}
  return _BART_IDS.get(values.text("model_type", ""), t5)


def with_default_ids(values: ConfigValues) -> dict[str, Any]:
  """Returns a config.json's content and the token ids of its class.

  They decide how it generates where it has no generation_config.json.
  """
  ids = _ids(values)
  named = {
    "pad_token_id": ids["pad"],
    "bos_token_id": ids["bos"],
    "eos_token_id": ids["eos"],
    "decoder_start_token_id": ids["start"],
  }
  if values.text("model_type", "") in _BART_TYPES:
    named["forced_eos_token_id"] = ids["eos"]
  given = {name: i for name, i in named.items() if i >= 0}
  return given | dict(values.values)


def explicit(g: GeneratorConfig) -> dict[str, Any]:
  """Returns what a checkpoint decides, with the sizes that 0 stands for."""
  fields = {name: getattr(g, name) for name in GENERATOR_FIELDS}
  fields["num_decoder_layers"] = g.num_decoder_layers or g.num_layers
  fields["num_decoder_heads"] = g.num_decoder_heads or g.num_heads
  fields["decoder_mlp_dim"] = g.decoder_mlp_dim or g.mlp_dim
  if g.num_heads == fields["num_decoder_heads"]:
    fields["head_dim"] = g.head_dim or g.embed_dim // g.num_heads
  return fields


def generator_type(g: GeneratorConfig) -> str:
  """Returns the model_type that computes a generator with these fields.

  Raises:
    ValueError: none does; names what keeps the nearest from it.
  """
  wrong = {"t5": _not_t5(g)} | {
    name: _not_bart(g, name) for name in _BART_TYPES
  }
  for model_type, reasons in wrong.items():
    if not reasons:
      return model_type
  nearest = min(wrong, key=lambda name: len(wrong[name]))
  raise ValueError(
    "No model of transformers computes a generator with these fields. The"
    f" nearest is {nearest}, but: {'; '.join(wrong[nearest])}. Train a"
    " generator with the fields expected, or keep this one as a model of"
    " rag_jax."
  )


def _differences(g: GeneratorConfig, expected: dict[str, Any]) -> list[str]:
  return [
    f"generator.{name}={getattr(g, name)!r}, expected {value!r}"
    for name, value in expected.items()
    if getattr(g, name) != value
  ]


def _not_bart(g: GeneratorConfig, model_type: str) -> list[str]:
  wrong = _differences(g, _BART | _BART_TYPES[model_type])
  if g.head_dim:
    for name in ("num_heads", "num_decoder_heads"):
      heads = getattr(g, name) or g.num_heads
      if g.head_dim * heads != g.embed_dim:
        wrong.append(
          f"generator.head_dim={g.head_dim}, expected embed_dim / {name} ="
          f" {g.embed_dim / heads:g}"
        )
  return wrong


def _not_t5(g: GeneratorConfig) -> list[str]:
  wrong = _differences(g, _T5)
  for name, same in (
    ("num_decoder_heads", "num_heads"), ("decoder_mlp_dim", "mlp_dim")
  ):  # fmt: skip
    if getattr(g, name) not in (0, getattr(g, same)):
      wrong.append(
        f"generator.{name}={getattr(g, name)}, expected {same},"
        f" {getattr(g, same)}"
      )
  if not g.relative_buckets:
    wrong.append("generator.relative_buckets=0, expected 32")
  if g.gated and g.activation == "gelu":
    wrong.append(
      "generator.activation='gelu' with gated=True, expected 'gelu_new'"
    )
  return wrong


def generator_config(
  g: GeneratorConfig, model_type: str, special_ids: SpecialIds
) -> dict[str, Any]:
  """Returns config.json of the generator, as `generator_type` calls it."""
  f = explicit(g)
  start = special_ids.eos if g.decoder_start_id < 0 else g.decoder_start_id
  config = {
    "architectures": [architecture_name(model_type)],
    "model_type": model_type,
    "is_encoder_decoder": True,
    "vocab_size": g.vocab_size,
    "d_model": g.embed_dim,
    "dtype": "float32",
    "torch_dtype": "float32",  # what version 4 calls it
    "decoder_start_token_id": None if start < 0 else start,
    **special_ids.to_config(),
  }
  if model_type == "t5":
    return config | {
      "num_layers": g.num_layers,
      "num_decoder_layers": f["num_decoder_layers"],
      "num_heads": g.num_heads,
      "d_kv": f["head_dim"],
      "d_ff": g.mlp_dim,
      "feed_forward_proj": feed_forward_proj(g.activation, g.gated),
      "dense_act_fn": g.activation,
      "is_gated_act": g.gated,
      "layer_norm_epsilon": g.norm_eps,
      "relative_attention_num_buckets": g.relative_buckets,
      "relative_attention_max_distance": g.relative_max_distance,
      "dropout_rate": g.dropout,
      "tie_word_embeddings": g.scale_output,
      "scale_decoder_outputs": g.scale_output,
    }
  return config | {
    "encoder_layers": g.num_layers,
    "decoder_layers": f["num_decoder_layers"],
    "encoder_attention_heads": g.num_heads,
    "decoder_attention_heads": f["num_decoder_heads"],
    "encoder_ffn_dim": g.mlp_dim,
    "decoder_ffn_dim": f["decoder_mlp_dim"],
    "activation_function": g.activation,
    "scale_embedding": g.scale_embedding,
    "max_position_embeddings": g.max_positions,
    "dropout": g.dropout,
    "attention_dropout": g.attention_dropout,
    "activation_dropout": g.activation_dropout,
    "tie_word_embeddings": g.tied_output,
    "forced_eos_token_id": None,  # 2 if it is left out
  }


def architecture_name(model_type: str) -> str:
  """Returns the class in transformers."""
  names = {"bart": "Bart", "mbart": "MBart", "pegasus": "Pegasus"}
  names |= {"t5": "T5", "mt5": "MT5"}
  return names[model_type] + "ForConditionalGeneration"
