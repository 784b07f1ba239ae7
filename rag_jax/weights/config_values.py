"""Typed values of somebody else's config.json.

In: the JSON of versions 4 and 5 of transformers, which may leave out what is
the default of its class. Out: numbers, flags and names of the expected types.
"""

from collections.abc import Mapping
import dataclasses
import math
from typing import Any

# Theirs -> ours. The second to fourth differ from gelu_new in rounding alone.
_ACTIVATIONS = {
  "gelu": "gelu",
  "gelu_python": "gelu",
  "gelu_new": "gelu_new",
  "gelu_pytorch_tanh": "gelu_new",
  "gelu_fast": "gelu_new",
  "gelu_python_tanh": "gelu_new",
  "relu": "relu",
  "silu": "silu",
  "swish": "silu",
  "tanh": "tanh",
}

MAX_SIZE = 2**31 - 1  # of anything; what tensors hold is compared with them
MAX_LENGTH = 1_000_000  # of an input, in tokens

# What exports say, in a key of their config.json that transformers passes over,
# of what its classes have no word for.
OUR_KEY = "rag_jax"


def shorten(value: Any) -> str:
  """Returns `repr(value)`, cut: somebody may have written pages."""
  try:
    shown = repr(value)
  except ValueError:  # of a whole number with too many digits to be written
    return f"a number of {value.bit_length()} bits"
  return shown if len(shown) <= 80 else f"{shown[:77]}..."


@dataclasses.dataclass(frozen=True, slots=True)
class ConfigValues:
  """The values of one config.json, or of a part of it."""

  values: Mapping[str, Any]
  origin: str  # for messages

  def has(self, name: str) -> bool:
    """Returns whether `name` is given; null means that it is not."""
    return self.values.get(name) is not None

  def _get(self, name: str, default: Any, expected: str, *types: type) -> Any:
    value = self.values.get(name)
    value = default if value is None else value
    if type(value) not in types:  # a bool is no int here
      raise ValueError(
        f"{self.origin} says {name}={shorten(value)}; expected {expected}. The"
        " file was edited or is of another program; copy it again."
      )
    return value

  def size(
    self, name: str, default: int, least: int = 1, most: int = MAX_SIZE
  ) -> int:
    """Returns a whole number from `least` to `most`."""
    expected = f"a whole number from {least} to {most}"
    value = self._get(name, default, expected, int)
    if not least <= value <= most:
      raise ValueError(
        f"{self.origin} says {name}={shorten(value)}; expected {expected}. The"
        " file was edited or cut off; copy it again."
      )
    return value

  def number(self, name: str, default: float) -> float:
    """Returns a finite number."""
    value = self._get(name, default, "a number", int, float)
    try:
      number = float(value)
    except OverflowError:  # a whole number of hundreds of digits
      number = math.inf
    if not math.isfinite(number):
      raise ValueError(
        f"{self.origin} says {name}={shorten(value)}; expected a finite number."
        " The file was edited; copy it again."
      )
    return number

  def rate(self, name: str, default: float) -> float:
    """Returns a share from 0 to below 1."""
    value = self.number(name, default)
    if not 0 <= value < 1:
      raise ValueError(
        f"{self.origin} says {name}={value}; expected a number from 0 to below"
        " 1. The file was edited; copy it again."
      )
    return value

  def flag(self, name: str, default: bool) -> bool:
    """Returns True or False."""
    return self._get(name, default, "true or false", bool)

  def text(self, name: str, default: str) -> str:
    """Returns a text."""
    return self._get(name, default, "a text", str)

  def token(self, name: str, default: int = -1) -> int:
    """Returns a token id, the first of several; -1 if there is none."""
    value = self.values.get(name)
    if isinstance(value, list) and value:  # generation may end with several
      return ConfigValues({name: value[0]}, self.origin).token(name)
    return self.size(name, default, least=-1)

  def activation(self, name: str, default: str) -> str:
    """Returns our name of an activation function."""
    value = self.text(name, default)
    if value not in _ACTIVATIONS:
      raise ValueError(
        f"{self.origin} says {name}={shorten(value)}; expected one of"
        f" {', '.join(_ACTIVATIONS)}. rag_jax cannot compute this model: take"
        " another checkpoint."
      )
    return _ACTIVATIONS[value]

  def feed_forward(self, name: str, default: str) -> tuple[str, bool]:
    """Returns T5's activation, and whether it is gated, by "gated-" before."""
    value = self.text(name, default)
    gate, _, activation = value.rpartition("-")
    if gate not in ("", "gated"):
      raise ValueError(
        f"{self.origin} says {name}={shorten(value)}; expected an activation"
        " like 'relu', or 'gated-' and one. Take another checkpoint."
      )
    if value == "gated-gelu":
      activation = "gelu_new"  # in spite of its name
    inner = ConfigValues({name: activation}, self.origin)
    return inner.activation(name, ""), gate == "gated"

  def part(self, name: str) -> "ConfigValues":
    """Returns the values of an object inside this one; {} if it is missing."""
    value = self._get(name, {}, "an object", dict)
    return ConfigValues(value, f"{self.origin} ({name})")

  def ours(self) -> "ConfigValues":
    """Returns what an export of ours said beside."""
    return self.part(OUR_KEY)

  def refuse(self, **supported: Any) -> None:
    """Raises `ValueError` if a given value is not the one that is supported."""
    wrong = {
      name: self.values[name]
      for name, value in supported.items()
      if self.has(name) and self.values[name] != value
    }
    if wrong:
      given = ", ".join(f"{k}={shorten(v)}" for k, v in wrong.items())
      expected = ", ".join(f"{name}={supported[name]!r}" for name in wrong)
      raise ValueError(
        f"{self.origin} says {given}; rag_jax supports only {expected}. Take a"
        " checkpoint of such a model."
      )


def unsupported(origin: str, model_type: Any, architectures: Any) -> ValueError:
  """Returns the error for a model that is none of those below."""
  return ValueError(
    f"{origin} describes model_type={shorten(model_type)}"
    f" (architectures={shorten(architectures)}), which rag_jax does not have."
    " Supported are, as encoders: dpr (DPRQuestionEncoder, DPRContextEncoder),"
    " bert, roberta, xlm-roberta, distilbert and mpnet (...Model), t5"
    " (T5EncoderModel), and sentence-transformers directories of these; as"
    " generators: bart, mbart,"
    " pegasus, t5 and mt5 (...ForConditionalGeneration); as decoder-only"
    " generators: llama, qwen2, qwen3, gemma2, gemma3_text and gpt2; and rag"
    " (RagTokenForGeneration, RagSequenceForGeneration). Take a checkpoint of"
    " one of them."
  )


def feed_forward_proj(activation: str, gated: bool) -> str:
  """Returns what `ConfigValues.feed_forward` reads as these."""
  if gated and activation == "gelu_new":
    activation = "gelu"
  return ("gated-" if gated else "") + activation


@dataclasses.dataclass(frozen=True, slots=True)
class SpecialIds:
  """Token ids that a model gives a meaning to; -1 where it has none."""

  pad: int = -1
  bos: int = -1
  eos: int = -1

  def to_config(self) -> dict[str, int | None]:
    """Returns the keys of config.json."""
    named = {
      "pad_token_id": self.pad,
      "bos_token_id": self.bos,
      "eos_token_id": self.eos,
    }
    return {name: None if i < 0 else i for name, i in named.items()}
