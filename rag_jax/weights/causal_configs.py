"""A decoder-only generator's fields <-> config.json of its class.

In: `ConfigValues` of Llama (also SmolLM2), Qwen 2 and 3, Gemma 2 and 3 (text),
or GPT-2. Out: a `CausalConfig` with no size left at 0; and back. What is not
given has the default of its class in transformers.
"""

import dataclasses
from typing import Any

from rag_jax.config_models import CausalConfig
from rag_jax.config_models import check_causal
from rag_jax.weights.config_values import MAX_LENGTH
from rag_jax.weights.config_values import ConfigValues
from rag_jax.weights.config_values import SpecialIds
from rag_jax.weights.config_values import shorten
from rag_jax.weights.config_values import unsupported
from rag_jax.weights.rope_configs import read_rope
from rag_jax.weights.rope_configs import rope_config

# The fields that each class fixes.
_COMMON: dict[str, Any] = {"norm": "pre", "relative_buckets": 0}
_ROPE = _COMMON | {
  "positions": "rope", "gated": True, "scale_attention": True,
  "activation_dropout": 0.0, "dropout": 0.0,
}  # fmt: skip
_PLAIN = {
  "norm_kind": "rms", "post_norms": False, "scale_embedding": False,
  "query_pre_attn_scalar": 0, "attention_soft_cap": 0.0,
  "logits_soft_cap": 0.0,
}  # fmt: skip
_LLAMA = _ROPE | _PLAIN | {"rope_local_theta": 0.0, "qk_norm": False}
_GEMMA = _ROPE | {
  "norm_kind": "rms_plus_one", "post_norms": True, "scale_embedding": True,
  "use_bias": False,
}  # fmt: skip
_FIXED: dict[str, dict[str, Any]] = {
  "llama": _LLAMA | {"sliding_layers": ()},
  "qwen2": _LLAMA | {"qkv_bias": True, "out_bias": False, "use_bias": False},
  "qwen3": _LLAMA | {"qk_norm": True, "use_bias": False},
  "gemma2": _GEMMA | {"rope_local_theta": 0.0, "qk_norm": False},
  "gemma3_text": _GEMMA | {"qk_norm": True, "attention_soft_cap": 0.0},
  "gpt2": _COMMON | _PLAIN | {
    "positions": "learned", "gated": False, "norm_kind": "layer",
    "use_bias": True, "qkv_bias": True, "out_bias": True, "qk_norm": False,
    "sliding_layers": (), "activation_dropout": 0.0,
  },
}  # fmt: skip
CAUSAL_TYPES = tuple(_FIXED)
_ARCHITECTURES = {
  "llama": "LlamaForCausalLM",
  "qwen2": "Qwen2ForCausalLM",
  "qwen3": "Qwen3ForCausalLM",
  "gemma2": "Gemma2ForCausalLM",
  "gemma3_text": "Gemma3ForCausalLM",
  "gpt2": "GPT2LMHeadModel",
}
# Sizes where config.json does not say them: D, F, layers, N, G, V, positions.
_QWEN = (4096, 22016, 32, 32, 32, 151936, 32768)
_SIZES = {
  "llama": (4096, 11008, 32, 32, 0, 32000, 2048),
  "qwen2": _QWEN,
  "qwen3": _QWEN,
  "gemma2": (2304, 9216, 26, 8, 4, 256000, 8192),
  "gemma3_text": (2304, 9216, 26, 8, 4, 262208, 131072),
}
_HEAD_DIM = {"qwen3": 128, "gemma2": 256, "gemma3_text": 256}
_IDS = {
  "llama": SpecialIds(bos=1, eos=2),
  "qwen2": SpecialIds(),
  "qwen3": SpecialIds(),
  "gemma2": SpecialIds(pad=0, bos=2, eos=1),
  "gemma3_text": SpecialIds(pad=0, bos=2, eos=1),
  "gpt2": SpecialIds(bos=50256, eos=50256),
}
_SLIDING, _GLOBAL = "sliding_attention", "full_attention"


def read_causal_config(values: ConfigValues) -> CausalConfig:
  """Returns the generator that a config.json describes, nothing left at 0.

  Raises:
    ValueError: it describes something else, or a value is impossible.
  """
  model_type = values.text("model_type", "")
  if model_type not in CAUSAL_TYPES:
    architectures = values.values.get("architectures")
    raise unsupported(values.origin, model_type, architectures)
  values.refuse(is_encoder_decoder=False, per_layer_config={})
  read = _read_gpt2 if model_type == "gpt2" else _read_rope_model
  c = CausalConfig(**read(values, model_type) | _FIXED[model_type])
  try:
    return check_causal(c)
  except ValueError as error:
    raise ValueError(f"{values.origin}: {error}") from error


def _read_gpt2(values: ConfigValues, model_type: str) -> dict[str, Any]:
  values.refuse(
    add_cross_attention=False, scale_attn_by_inverse_layer_idx=False
  )
  dim, heads = values.size("n_embd", 768), values.size("n_head", 12)
  if dim % heads:
    raise ValueError(
      f"{values.origin} says n_embd={dim}, n_head={heads}; expected a multiple."
      " The file was edited; copy it again."
    )
  return {
    "vocab_size": values.size("vocab_size", 50257),
    "max_positions": values.size("n_positions", 1024, most=MAX_LENGTH),
    "num_layers": values.size("n_layer", 12),
    "embed_dim": dim,
    "num_heads": heads,
    "num_kv_heads": heads,
    "head_dim": dim // heads,
    "mlp_dim": values.size("n_inner", 4 * dim),
    "activation": values.activation("activation_function", "gelu_new"),
    "norm_eps": values.number("layer_norm_epsilon", 1e-5),
    "scale_attention": values.flag("scale_attn_weights", True),
    "tied_output": values.flag("tie_word_embeddings", True),
    "dropout": values.rate("resid_pdrop", 0.1),
    "attention_dropout": values.rate("attn_pdrop", 0.1),
  }


def _read_rope_model(values: ConfigValues, model_type: str) -> dict[str, Any]:
  gemma = model_type.startswith("gemma")
  dim, wide, layers, heads, kv_heads, vocab, positions = _SIZES[model_type]
  dim = values.size("hidden_size", dim)
  layers = values.size("num_hidden_layers", layers)
  heads = values.size("num_attention_heads", heads)
  positions = values.size("max_position_embeddings", positions)
  if values.values.get("num_key_value_heads", "") is None:
    kv_heads = heads  # null is as many
  fields = {
    "vocab_size": values.size("vocab_size", vocab),
    "max_positions": positions,
    "num_layers": layers,
    "embed_dim": dim,
    "num_heads": heads,
    "num_kv_heads": values.size("num_key_value_heads", kv_heads or heads),
    "head_dim": values.size(
      "head_dim", _HEAD_DIM.get(model_type) or dim // heads or 1
    ),
    "mlp_dim": values.size("intermediate_size", wide),
    "norm_eps": values.number("rms_norm_eps", 1e-6),
    "tied_output": values.flag("tie_word_embeddings", gemma),
    "attention_dropout": values.rate("attention_dropout", 0.0),
    "activation": (
      values.activation("hidden_activation", "gelu_pytorch_tanh")
      if gemma
      else values.activation("hidden_act", "silu")
    ),
    **read_rope(values, positions),
  }
  if model_type != "qwen2":
    fields["qkv_bias"] = values.flag("attention_bias", False)
    fields["out_bias"] = fields["qkv_bias"]
  if model_type == "llama":
    fields["use_bias"] = values.flag("mlp_bias", False)
  if gemma:
    values.refuse(use_bidirectional_attention=False)
    fields["query_pre_attn_scalar"] = values.size("query_pre_attn_scalar", 256)
    caps = (50.0, 30.0)
    if model_type == "gemma3_text":
      caps = (0.0, 0.0)
      # transformers has the field, and passes over it.
      values.refuse(attn_logit_softcapping=None)
    fields["attention_soft_cap"] = _cap(
      values, "attn_logit_softcapping", caps[0]
    )
    fields["logits_soft_cap"] = _cap(values, "final_logit_softcapping", caps[1])
  if model_type != "llama":
    fields |= _read_sliding(values, model_type, layers)
  return fields


def _cap(values: ConfigValues, name: str, default: float) -> float:
  """Returns a soft cap; null is none, also where the class has a default."""
  if values.values.get(name, default) is None:
    return 0.0
  cap = values.number(name, default)
  if cap < 0 or (cap == 0 and values.has(name)):
    raise ValueError(
      f"{values.origin} says {name}={cap}; expected a number above 0, or null"
      " for none. The file was edited; copy it again."
    )
  return cap


def _read_sliding(
  values: ConfigValues, model_type: str, num_layers: int
) -> dict[str, Any]:
  """Returns which layers slide, and their window."""
  window = 0  # null
  if values.values.get("sliding_window", 0) is not None:
    window = values.size("sliding_window", 4096)
  layers = range(num_layers)
  if model_type.startswith("qwen"):
    first = values.size("max_window_layers", 28, least=0)
    if not values.flag("use_sliding_window", False):
      window = 0
    slides = [window > 0 and i >= first for i in layers]
  elif model_type == "gemma2":
    slides = [i % 2 == 0 for i in layers]
  else:
    every = values.size("sliding_window_pattern", 6)
    slides = [(i + 1) % every != 0 for i in layers]
  if values.has("layer_types"):
    types = values.values["layer_types"]
    kinds = {_SLIDING: True, _GLOBAL: False}
    if (
      not isinstance(types, list)
      or len(types) != num_layers
      or not all(isinstance(x, str) and x in kinds for x in types)
    ):
      raise ValueError(
        f"{values.origin} says layer_types={shorten(types)}; expected a list of"
        f" {num_layers}, each {' or '.join(kinds)}. rag_jax has no other"
        " layers: take another checkpoint."
      )
    slides = [kinds[x] for x in types]
  sliding = tuple(i for i in layers if slides[i])
  if sliding and not window:
    raise ValueError(
      f"{values.origin} has sliding layers without a sliding_window; expected"
      " how many tokens they see. The file was edited; copy it again."
    )
  return {
    "sliding_layers": sliding,
    "sliding_window": window if sliding else 0,
  }


def num_layers(values: ConfigValues) -> int:
  """Returns how many layers a config.json describes, before any is counted."""
  model_type = values.text("model_type", "")
  if model_type == "gpt2":
    return values.size("n_layer", 12)
  return values.size("num_hidden_layers", _SIZES[model_type][2])


def read_causal_ids(values: ConfigValues) -> SpecialIds:
  """Returns the token ids of a config.json; null is none."""
  ids = _IDS[values.text("model_type", "")]
  named = {"pad": ids.pad, "bos": ids.bos, "eos": ids.eos}
  for name in named:
    key = f"{name}_token_id"
    if key in values.values:
      named[name] = values.token(key)
  return SpecialIds(**named)


def with_causal_ids(values: ConfigValues) -> dict[str, Any]:
  """Returns a config.json's content and the token ids of its class.

  They decide how it generates where it has no generation_config.json.
  """
  ids = _IDS[values.text("model_type", "")].to_config()
  given = {name: i for name, i in ids.items() if i is not None}
  return given | dict(values.values)


def explicit_causal(c: CausalConfig) -> dict[str, Any]:
  """Returns all fields, with the sizes that 0 stands for."""
  fields = dataclasses.asdict(c)
  return fields | {"num_kv_heads": c.kv_heads, "head_dim": c.head_size}


def causal_type(c: CausalConfig) -> str:
  """Returns the model_type that computes a generator with these fields.

  Raises:
    ValueError: none does; names what keeps the nearest from it.
  """
  wrong = {name: _differences(c, name) for name in _FIXED}
  for model_type, reasons in wrong.items():
    if not reasons:
      return model_type
  nearest = min(wrong, key=lambda name: len(wrong[name]))
  raise ValueError(
    "No model of transformers computes a decoder-only generator with these"
    f" fields. The nearest is {nearest}, but: {'; '.join(wrong[nearest])}."
    " Train one with the fields expected, or keep this one as a model of"
    " rag_jax."
  )


def _differences(c: CausalConfig, model_type: str) -> list[str]:
  wrong = [
    f"{name}={getattr(c, name)!r}, expected {value!r}"
    for name, value in _FIXED[model_type].items()
    if getattr(c, name) != value
  ]
  d, n = c.embed_dim, c.num_heads
  if model_type not in ("qwen2", "gpt2") and c.qkv_bias != c.out_bias:
    wrong.append(f"out_bias={c.out_bias}, expected qkv_bias, {c.qkv_bias}")
  if not model_type.startswith("qwen") and d % n:
    wrong.append(f"num_heads={n}, expected a divisor of embed_dim, {d}")
  if model_type == "gpt2" and (c.kv_heads, c.head_size * n) != (n, d):
    wrong.append(
      f"num_kv_heads={c.kv_heads}, head_dim={c.head_size}, expected num_heads,"
      f" {n}, and embed_dim / num_heads, {d / n:g}"
    )
  if model_type != "gpt2" and c.head_size % 2:
    wrong.append(f"head_dim={c.head_size}, expected an even number")
  return wrong


def causal_config(
  c: CausalConfig, model_type: str, special_ids: SpecialIds
) -> dict[str, Any]:
  """Returns config.json of the generator, as `causal_type` calls it."""
  config = {
    "architectures": [architecture_name(model_type)],
    "model_type": model_type,
    "vocab_size": c.vocab_size,
    "dtype": "float32",
    "torch_dtype": "float32",  # what version 4 calls it
    "tie_word_embeddings": c.tied_output,
    **special_ids.to_config(),
  }
  if model_type == "gpt2":
    return config | {
      "n_positions": c.max_positions,
      "n_embd": c.embed_dim,
      "n_layer": c.num_layers,
      "n_head": c.num_heads,
      "n_inner": c.mlp_dim,
      "activation_function": c.activation,
      "layer_norm_epsilon": c.norm_eps,
      "scale_attn_weights": c.scale_attention,
      "resid_pdrop": c.dropout,
      "embd_pdrop": c.dropout,
      "attn_pdrop": c.attention_dropout,
    }
  config |= {
    "max_position_embeddings": c.max_positions,
    "hidden_size": c.embed_dim,
    "num_hidden_layers": c.num_layers,
    "num_attention_heads": c.num_heads,
    "num_key_value_heads": c.kv_heads,
    "head_dim": c.head_size,
    "intermediate_size": c.mlp_dim,
    "rms_norm_eps": c.norm_eps,
    "attention_dropout": c.attention_dropout,
    **rope_config(c, per_kind=model_type == "gemma3_text"),
  }
  if model_type != "qwen2":
    config["attention_bias"] = c.qkv_bias
  if model_type == "llama":
    config["mlp_bias"] = c.use_bias
  if model_type.startswith("gemma"):
    # The same function; of the two names, Gemma's.
    act = "gelu_pytorch_tanh" if c.activation == "gelu_new" else c.activation
    config |= {
      "hidden_activation": act,
      "query_pre_attn_scalar": c.query_pre_attn_scalar or c.head_size,
      "attn_logit_softcapping": c.attention_soft_cap or None,
      "final_logit_softcapping": c.logits_soft_cap or None,
      "use_bidirectional_attention": False,
    }
  else:
    config["hidden_act"] = c.activation
  if model_type != "llama":
    config["layer_types"] = [
      _SLIDING if i in c.sliding_layers else _GLOBAL
      for i in range(c.num_layers)
    ]
    config["sliding_window"] = c.sliding_window or None
  if model_type.startswith("qwen"):
    config["use_sliding_window"] = bool(c.sliding_layers)
  elif model_type != "llama" and not c.sliding_layers:
    config["sliding_window"] = c.max_positions  # these always have one
  return config


def architecture_name(model_type: str) -> str:
  """Returns the class in transformers."""
  return _ARCHITECTURES[model_type]
