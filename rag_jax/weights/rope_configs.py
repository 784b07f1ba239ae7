"""RoPE in a config.json <-> the fields of a `CausalConfig`.

In: the spellings of transformers 4 (`rope_theta`, `rope_scaling`) and 5
(`rope_parameters`, for Gemma 3 one per kind of layers). Out: fields; and back,
in both spellings.
"""

import math
from typing import Any

from rag_jax.config_models import CausalConfig
from rag_jax.weights.config_values import ConfigValues
from rag_jax.weights.config_values import shorten

# What any scaling may have. Each reads its own, and passes over the others.
_KEYS = {
  "rope_type", "type", "rope_theta", "factor", "partial_rotary_factor",
  "original_max_position_embeddings", "low_freq_factor", "high_freq_factor",
  "beta_fast", "beta_slow", "truncate", "attention_factor", "mscale",
  "mscale_all_dim",
}  # fmt: skip
_SCALINGS = ("default", "linear", "llama3", "yarn")
_GLOBAL, _SLIDING = "full_attention", "sliding_attention"
_ORIGINAL = "original_max_position_embeddings"


def read_rope(values: ConfigValues, max_positions: int) -> dict[str, Any]:
  """Returns the fields of RoPE.

  Args:
    values: of config.json.
    max_positions: the longest input.

  Raises:
    ValueError: it has another kind of RoPE, or an impossible value.
  """
  values.refuse(partial_rotary_factor=1.0)
  old, new = values.part("rope_scaling"), values.part("rope_parameters")
  if values.text("model_type", "") != "gemma3_text":
    rope = old if old.values else new
    theta = _positive(values, "rope_theta", 10_000.0)
    return _read_scaling(values, rope, theta, max_positions)
  _check_keys(new, {_GLOBAL, _SLIDING})
  sliding = new.part(_SLIDING)
  _check_keys(sliding, {"rope_type", "type", "rope_theta"})
  sliding.refuse(rope_type="default", type="default")
  local = _positive(values, "rope_local_base_freq", 10_000.0)
  merged = dict(new.part(_GLOBAL).values) | dict(old.values)
  theta = _positive(values, "rope_theta", 1_000_000.0)
  fields = _read_scaling(
    values, ConfigValues(merged, values.origin), theta, max_positions
  )
  local = _positive(sliding, "rope_theta", local)
  return fields | {"rope_local_theta": local}


def _read_scaling(
  values: ConfigValues, rope: ConfigValues, theta: float, max_positions: int
) -> dict[str, Any]:
  _check_keys(rope, _KEYS)
  rope.refuse(partial_rotary_factor=1.0)
  kind = rope.text("rope_type", rope.text("type", "default"))
  if kind not in _SCALINGS:
    raise ValueError(
      f"{rope.origin} says rope_type={shorten(kind)}; expected one of"
      f" {', '.join(_SCALINGS)}. rag_jax cannot compute this model: take"
      " another checkpoint."
    )
  fields: dict[str, Any] = {"rope_theta": _positive(rope, "rope_theta", theta)}
  if kind == "default":
    return fields
  original = rope.size(_ORIGINAL, max_positions)
  original = values.size(_ORIGINAL, original)
  factor = max_positions / original if kind == "yarn" else 0.0
  fields |= {
    "rope_scaling": kind,
    "rope_factor": _positive(rope, "factor", factor),
  }
  if kind == "linear":
    return fields
  fields["rope_original_positions"] = original
  if kind == "llama3":
    return fields | {
      "rope_low_freq_factor": _positive(rope, "low_freq_factor", 1.0),
      "rope_high_freq_factor": _positive(rope, "high_freq_factor", 4.0),
    }
  return fields | {
    "rope_beta_fast": _positive(rope, "beta_fast", 32.0),
    "rope_beta_slow": _positive(rope, "beta_slow", 1.0),
    "rope_truncate": rope.flag("truncate", True),
    "rope_attention_factor": _attention_factor(rope, fields["rope_factor"]),
  }


def _check_keys(rope: ConfigValues, known: set[str]) -> None:
  unknown = sorted(rope.values.keys() - known)
  if unknown:
    raise ValueError(
      f"{rope.origin} has {', '.join(map(shorten, unknown))} for RoPE, which"
      f" rag_jax does not know; expected {', '.join(sorted(known))}. Take"
      " another checkpoint, or remove what has no effect."
    )


def _positive(values: ConfigValues, name: str, default: float) -> float:
  number = values.number(name, default)
  if number <= 0:
    raise ValueError(
      f"{values.origin} says {name}={shorten(values.values.get(name))};"
      " expected a number above 0. The file was edited; copy it again."
    )
  return number


def _attention_factor(rope: ConfigValues, factor: float) -> float:
  """Returns what YaRN multiplies cosines and sines with, as DeepSeek may say.

  https://arxiv.org/abs/2309.00071, section 3.4: 0.1 ln(factor) + 1.
  """
  if rope.has("attention_factor"):
    return _positive(rope, "attention_factor", 1.0)
  growth = 0.1 * math.log(max(factor, 1.0))
  scale = rope.number("mscale", 0.0), rope.number("mscale_all_dim", 0.0)
  if all(scale):
    return (growth * scale[0] + 1.0) / (growth * scale[1] + 1.0)
  return growth + 1.0


def rope_config(c: CausalConfig, *, per_kind: bool) -> dict[str, Any]:
  """Returns the keys of config.json, for versions 4 and 5.

  Args:
    c: of the generator.
    per_kind: whether its class has one RoPE for each kind of layers: Gemma 3.
  """
  scaling: dict[str, Any] = {}
  if c.rope_scaling != "none":
    scaling = {"rope_type": c.rope_scaling, "factor": c.rope_factor}
  if c.rope_scaling in ("llama3", "yarn"):
    scaling[_ORIGINAL] = c.rope_original_positions
  if c.rope_scaling == "llama3":
    scaling |= {
      "low_freq_factor": c.rope_low_freq_factor,
      "high_freq_factor": c.rope_high_freq_factor,
    }
  if c.rope_scaling == "yarn":
    scaling |= {
      "beta_fast": c.rope_beta_fast,
      "beta_slow": c.rope_beta_slow,
      "truncate": c.rope_truncate,
      "attention_factor": c.rope_attention_factor,
    }
  theta = {"rope_theta": c.rope_theta}
  parameters: dict[str, Any] = {"rope_type": "default"} | scaling | theta
  config = theta | {"rope_scaling": scaling or None}
  if not per_kind:
    return config | {"rope_parameters": parameters}
  local = c.rope_local_theta or c.rope_theta
  return config | {
    "rope_local_base_freq": local,
    "rope_parameters": {
      _GLOBAL: parameters,
      _SLIDING: {"rope_type": "default", "rope_theta": local},
    },
  }
