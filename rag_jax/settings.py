"""The fields of a config: which values they take, and which of them were set.

In: a class of fields. Out: a class whose objects know what was chosen.
"""

import dataclasses
from typing import Any, TypeVar, cast


def choice(default: str, *others: str) -> Any:
  """Returns a field whose value is one of these strings."""
  choices = (default, *others)
  return dataclasses.field(default=default, metadata={"choices": choices})


def number(default: int | float, **limits: Any) -> Any:
  """Returns a numeric field with limits; without any it is at least 0.

  Args:
    default: of the field.
    **limits: `least` and `most` are inclusive, `above` and `below` exclusive.
      `why` is the message about a number outside of these limits.
  """
  return dataclasses.field(default=default, metadata=limits)


_T = TypeVar("_T", bound="Settings")


class Settings:
  """Remembers which of its fields were set, also if to their defaults."""

  __slots__ = ("_set",)
  _set: set[str] | frozenset[str]  # frozen: no field can be set

  def __post_init__(self):
    """Forgets the fields that __init__ set, which nobody chose."""
    object.__setattr__(self, "_set", set())

  def __setattr__(self, name: str, value: Any):
    chosen = getattr(self, "_set", None)
    if isinstance(chosen, frozenset):
      raise dataclasses.FrozenInstanceError(
        f"{name} is part of a model. Change it in the config, and build the"
        " model again."
      )
    object.__setattr__(self, name, value)
    if chosen is not None:
      chosen.add(name)

  def __setstate__(self, state: tuple[None, dict[str, Any]]):
    """Copies the fields without marking them as set."""
    for name, value in state[1].items():
      value = type(value)(value) if name == "_set" else value
      object.__setattr__(self, name, value)

  def frozen(self: _T, **changes: Any) -> _T:
    """Returns a read-only copy with `changes`, as a model needs it."""
    copy: Any = dataclasses.replace(cast(Any, self), **changes)
    object.__setattr__(copy, "_set", frozenset())
    return copy

  def is_set(self, name: str) -> bool:
    """Returns whether field `name` was set, or differs from its default."""
    default = getattr(type(self)(), name)
    return name in self._set or getattr(self, name) != default
