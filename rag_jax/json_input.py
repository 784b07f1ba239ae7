"""JSON that anybody may have written.

In: a file or its text. Out: its value. Whatever is wrong with it, its size
included, is a `ValueError`, and is found before much memory is taken.
"""

import json
import os
from typing import Any

from etils import epath

MAX_DEPTH = 100  # of lists and objects inside one another
MAX_SETTINGS_BYTES = 1 << 28  # of a manifest, a config or a tokenizer.json

_MAX_INT = 2**63  # what a 64-bit number holds


def _refuse_constant(name: str) -> None:
  raise ValueError(f"{name} is not a JSON value")


def _small_int(digits: str) -> int:
  value = int(digits)
  if abs(value) > _MAX_INT:
    raise ValueError(
      f"a whole number of {len(digits)} digits, {digits[:20]}..., where 64 bits"
      " are the most"
    )
  return value


_STRICT = json.JSONDecoder(parse_constant=_refuse_constant)
_SETTINGS = json.JSONDecoder(parse_int=_small_int)


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

  As `parse_json`, but no whole number has more than 64 bits, and NaN and
  Infinity are read: Python writes them.

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
