"""The JSON of a config, and what differs between two of them.

In: a `Config`, or the text that `to_json` wrote into a workdir, checkpoint or
index. Out: the other of the two.
"""

from collections.abc import Sequence
import dataclasses
import difflib
import json
from typing import Any

from rag_jax.config import Config
from rag_jax.config_rules import fields
from rag_jax.config_rules import validate


def to_json(config: Config) -> str:
  """Returns the config as JSON, one setting a line."""
  return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_json(text: str, origin: str = "the config") -> Config:
  """Returns the `Config` that `to_json` wrote.

  Args:
    text: JSON.
    origin: where it was read, for messages.

  Raises:
    ValueError: not JSON, or a field is unknown; names the nearest known one.
  """
  try:
    tree = json.loads(text)
  except json.JSONDecodeError as error:
    raise ValueError(
      f"{origin} is not JSON ({error}); the file was cut off or edited."
      " Restore it, or start in another workdir."
    ) from error
  config = Config()
  _update(config, _renamed(tree), "", origin)
  return validate(config)


def _renamed(tree: Any) -> Any:
  """Returns the settings of a run of before by the names that they have now."""
  index = tree.get("index") if isinstance(tree, dict) else None
  if isinstance(index, dict) and "word_rule" not in index:
    tree = tree | {"index": index | {"word_rule": 1}}
  try:
    old = tree["eval"]["min_index_recall"]  # of two limits, the higher held
    now = max(old, tree.get("index", {}).get("min_recall", 0.0))
  except (AttributeError, KeyError, TypeError):
    return tree
  rest = {k: v for k, v in tree["eval"].items() if k != "min_index_recall"}
  index = tree.get("index", {}) | {"min_recall": now}
  return tree | {"eval": rest, "index": index}


def _update(config: Any, tree: Any, prefix: str, origin: str) -> None:
  if not isinstance(tree, dict):
    raise ValueError(
      f"{origin}: {prefix.rstrip('.') or 'the whole'} is"
      f" {type(tree).__name__}, expected an object of settings."
    )
  known = {field.name for field in dataclasses.fields(config)}
  for name, value in tree.items():
    if name not in known:
      raise ValueError(f"{origin}: {unknown_field(prefix + name)}")
    old = getattr(config, name)
    if dataclasses.is_dataclass(old):
      _update(old, value, f"{prefix}{name}.", origin)
    else:
      if isinstance(old, tuple) and isinstance(value, list):
        value = tuple(value)
      setattr(config, name, value)


def unknown_field(name: str) -> str:
  """Returns the message for a setting that does not exist."""
  known = [known_name for known_name, _, _ in fields(Config())]
  close = difflib.get_close_matches(name, known, n=1)
  if not close:  # the right name in the wrong section
    tail = name.rpartition(".")[2]
    close = [k for k in known if k.rpartition(".")[2] == tail][:1]
  hint = f" Did you mean {close[0]}?" if close else ""
  return f"There is no setting {name}.{hint} All are in rag_jax/config.py."


def differences(old: Config, new: Config) -> list[str]:
  """Returns "name: old -> new" for every setting that differs."""
  olds = {name: value for name, _, value in fields(old)}
  return [
    f"{name}: {olds[name]!r} -> {value!r}"
    for name, _, value in fields(new)
    if olds[name] != value
  ]


def check_overrides(argv: Sequence[str]) -> None:
  """Raises `ValueError` if a `--config.NAME` of `argv` is no setting."""
  known = {name for name, _, _ in fields(Config())}
  for argument in argv:
    name, _, _ = argument.lstrip("-").partition("=")
    if argument.startswith("-") and name.startswith("config."):
      name = name.removeprefix("config.")
      if name not in known:
        raise ValueError(unknown_field(name))
