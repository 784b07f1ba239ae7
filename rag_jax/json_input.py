"""JSON that anybody may have written.

In: a file or its text. Out: its value, or what a manifest says. Whatever is
wrong with it, its size included, is a `ValueError`, and is found before much
memory is taken.
"""

from collections.abc import Mapping
import json
import os
from typing import Any

from etils import epath

MAX_INT = 2**63 - 1  # of what a manifest counts
MAX_DEPTH = 100  # of lists and objects inside one another
MAX_SETTINGS_BYTES = 1 << 28  # of a manifest, a config or a tokenizer.json


def _refuse_constant(name: str) -> None:
  raise ValueError(f"{name} is not a JSON value")


_STRICT = json.JSONDecoder(parse_constant=_refuse_constant)
_SETTINGS = json.JSONDecoder()


class Content(dict[str, Any]):
  """What a manifest says; what it does not say, or says wrong, is named.

  A digest shows that a manifest is as somebody wrote it, who need not have been
  this program.
  """

  def __init__(self, values: Mapping[str, Any], origin: str, remedy: str):
    """Wraps `values`, and the objects in them.

    Args:
      values: by name.
      origin: the file, for messages.
      remedy: a sentence for the end of each message: what to do next.
    """
    super().__init__(values)
    self._origin, self._remedy = origin, remedy
    for name, value in values.items():
      if isinstance(value, dict):
        self[name] = Content(value, f"{origin} ({name})", remedy)

  def __missing__(self, name: str) -> Any:
    """Raises `ValueError`, in place of `KeyError`."""
    raise ValueError(
      f"{self._origin} says nothing about {name!r}; it has {sorted(self)}. It"
      f" was edited, or written by another program. {self._remedy}"
    )

  def check(self, **types: type | tuple[type, ...]) -> None:
    """Raises `ValueError` unless the values have these types.

    A whole number is from 0 to `MAX_INT`; true is none.
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
  """Returns the JSON value that `text` is.

  Raises:
    json.JSONDecodeError: it is none; a `ValueError`, as is that of a number
      that is not finite or has too many digits, and of lists and objects that
      are nested too deeply.
  """
  return _decode(_STRICT, text)


def parse_settings(text: str | bytes) -> Any:
  """Returns the JSON value of a manifest or a config.

  As `parse_json`, but NaN and Infinity are read: Python writes them.

  Raises:
    ValueError: it is none, or is not UTF-8.
  """
  text = text.decode("utf-8") if isinstance(text, bytes) else text
  return _decode(_SETTINGS, text)


def read_settings(path: epath.PathLike) -> Any:
  """Returns the JSON value of a file; as `parse_settings`.

  Raises:
    OSError: it cannot be read.
    ValueError: it is no plain file, is too large, or is no JSON.
  """
  return parse_settings(read_limited(path, MAX_SETTINGS_BYTES))


def read_limited(path: epath.PathLike, most_bytes: int) -> bytes:
  """Returns what a file holds, unless that is more than `most_bytes`.

  Raises:
    OSError: it cannot be read.
    ValueError: it is larger, or no plain file.
  """
  path = epath.Path(path)
  # Before it is opened: opening a FIFO waits for somebody to write.
  if "://" not in os.fspath(path) and path.exists() and not path.is_file():
    raise ValueError(f"{path} is no plain file")
  with path.open("rb") as file:
    data = file.read(most_bytes + 1)
  if len(data) > most_bytes:
    raise ValueError(f"{path} has more than {most_bytes:,} bytes")
  return data


def _decode(decoder: json.JSONDecoder, text: str) -> Any:
  problem = f"lists and objects are nested more than {MAX_DEPTH} deep"
  try:
    value = decoder.decode(text)
  except RecursionError as error:
    raise ValueError(problem) from error
  # Python reads some 1,000 levels, but not everything that is done with the
  # value goes as deep. Few texts have so many brackets that it could be so.
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
