"""Reads JSON that anybody may have written.

In: a file or its text. Out: its value, or the content of a manifest. Whatever
is wrong with it, its size included, raises a `ValueError` before much memory is
used.
"""

from collections.abc import Iterable, Mapping
import json
import os
from typing import Any

from etils import epath

MAX_INT = 2**63 - 1  # the largest count in a manifest
MAX_DEPTH = 100  # levels of nested lists and objects
MAX_SETTINGS_BYTES = 1 << 28  # of a manifest, a config or a tokenizer.json


def _refuse_constant(name: str) -> None:
  raise ValueError(f"{name} is not a JSON value")


_STRICT = json.JSONDecoder(parse_constant=_refuse_constant)
_SETTINGS = json.JSONDecoder()


class Content(dict[str, Any]):
  """The content of a manifest; missing or wrong values raise a clear error.

  A digest only shows that a manifest is as it was written. The writer may have
  been another program.
  """

  def __init__(
    self,
    values: Mapping[str, Any] | Iterable[tuple[str, Any]],
    origin: str = "",
    remedy: str = "",
  ):
    """Wraps `values`, and the objects inside them.

    Args:
      values: a mapping; or (name, value) pairs, since `dataclasses.asdict`
        copies a dict that way.
      origin: the file, for messages.
      remedy: the last sentence of each message: what to do next.
    """
    super().__init__(values)
    self._origin, self._remedy = origin, remedy
    for name, value in list(self.items()):
      if isinstance(value, dict):
        self[name] = Content(value, f"{origin} ({name})", remedy)

  def __missing__(self, name: str) -> Any:
    """Raises `ValueError` instead of `KeyError`."""
    raise ValueError(
      f"{self._origin} says nothing about {name!r}; it has {sorted(self)}. It"
      f" was edited, or written by another program. {self._remedy}"
    )

  def check(self, **types: type | tuple[type, ...]) -> None:
    """Raises `ValueError` unless the values have these types.

    A whole number must be from 0 to `MAX_INT`; true is not a number.
    """
    for name, expected in types.items():
      value = self[name]
      kinds = expected if isinstance(expected, tuple) else (expected,)
      good = any(type(value) is kind for kind in kinds) or (
        dict in kinds and isinstance(value, dict)
      )
      if good and type(value) is int:
        good = 0 <= value <= MAX_INT
      if not good:
        shown = "too large a number" if type(value) is int else repr(value)
        raise ValueError(
          f"{self._origin} says {name}={shown[:80]}; expected"
          f" {' or '.join(kind.__name__ for kind in kinds)}. It was edited, or"
          f" written by another program. {self._remedy}"
        )


def parse_json(text: str) -> Any:
  """Returns the JSON value in `text`.

  Raises:
    json.JSONDecodeError: the text is not JSON.
    ValueError: a number is not finite or has too many digits, or lists and
      objects are nested too deeply.
  """
  return _decode(_STRICT, text)


def parse_settings(text: str | bytes) -> Any:
  """Returns the JSON value of a manifest or a config.

  Like `parse_json`, but accepts NaN and Infinity, which Python writes.

  Raises:
    ValueError: the text is not JSON, or not UTF-8.
  """
  text = text.decode("utf-8") if isinstance(text, bytes) else text
  return _decode(_SETTINGS, text)


def read_settings(path: epath.PathLike) -> Any:
  """Returns the JSON value of a file, read as `parse_settings` does.

  Raises:
    OSError: the file cannot be read.
    ValueError: it is not a plain file, is too large, or is not JSON.
  """
  path = epath.Path(path)
  # Checked before opening: opening a FIFO waits until somebody writes to it.
  if "://" not in os.fspath(path) and path.exists() and not path.is_file():
    raise ValueError(f"{path} is no plain file")
  with path.open("rb") as file:
    data = file.read(MAX_SETTINGS_BYTES + 1)
  if len(data) > MAX_SETTINGS_BYTES:
    raise ValueError(f"{path} has more than {MAX_SETTINGS_BYTES:,} bytes")
  return parse_settings(data)


def _decode(decoder: json.JSONDecoder, text: str) -> Any:
  problem = f"lists and objects are nested more than {MAX_DEPTH} deep"
  try:
    value = decoder.decode(text)
  except RecursionError as error:
    raise ValueError(problem) from error
  # Python parses about 1,000 levels, but later code may not recurse that far.
  # Counting brackets first is fast, and few texts have enough of them.
  brackets = text.count("[") + text.count("{")
  if brackets > MAX_DEPTH and _is_deep(value):
    raise ValueError(problem)
  return value


def _is_deep(value: Any) -> bool:
  level = [value]
  for _ in range(MAX_DEPTH + 1):
    level = [
      child
      for parent in level
      if isinstance(parent, (dict, list))
      for child in (parent.values() if isinstance(parent, dict) else parent)
    ]
    if not level:
      return False
  return True
