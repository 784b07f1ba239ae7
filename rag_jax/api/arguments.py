"""Checks the arguments of public functions, before they are used."""

import os
from typing import Any

from rag_jax.corpus.text_files import shorten


def check_type(
  name: str, value: Any, kinds: type | tuple[type, ...], expected: str
) -> None:
  """Raises `TypeError` unless `value` is of one of `kinds`.

  Args:
    name: of the argument.
    value: of the argument.
    kinds: accepted types. A bool is not accepted as an int.
    expected: what to give, for the message, with an example.
  """
  accepted = kinds if isinstance(kinds, tuple) else (kinds,)
  is_flag = isinstance(value, bool) and bool not in accepted
  if is_flag or not isinstance(value, accepted):
    raise TypeError(
      f"{name}={shorten(value)} is of type {type(value).__name__}; expected"
      f" {expected}."
    )


def path_of(name: str, value: Any, expected: str) -> str:
  """Returns a path or name as text; arguments as in `check_type`.

  Raises:
    TypeError: it is neither text nor a path.
    ValueError: it is empty.
  """
  check_type(name, value, (str, os.PathLike), expected)
  text = os.fspath(value)
  if not text:
    raise ValueError(f"{name} is empty; expected {expected}.")
  return text


def texts_of(name: str, value: Any) -> list[str]:
  """Returns one text as a list, and several as they are.

  Raises:
    TypeError: it is something else.
  """
  expected = "text, or a list of texts"
  if isinstance(value, str):
    return [value]
  check_type(name, value, (list, tuple), expected)
  for number, text in enumerate(value):
    check_type(f"{name}[{number}]", text, str, "text")
  return list(value)
