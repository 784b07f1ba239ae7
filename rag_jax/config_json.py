"""A config as JSON, and the differences between two configs.

In: a `Config`, or the text that `to_json` wrote into a workdir, checkpoint or
index. Out: the other of the two. The file in a workdir contains its digest.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import difflib
import json
from typing import Any

from absl import logging
from etils import epath

from rag_jax import artifacts
from rag_jax import disk
from rag_jax.config import Config
from rag_jax.config_rules import fields
from rag_jax.config_rules import validate
from rag_jax.json_input import parse_settings


def to_json(config: Config) -> str:
  """Returns the config as JSON, with a line per setting."""
  return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


# Settings of how a model is trained and run, which do not change the model.
_RUN = (
  "train.", "optimizer.", "warmup.", "contrastive.", "eval.", "mesh.",
  "decoding.", "rerank.",
)  # fmt: skip
_ON_PURPOSE = (
  'If the change was yours, remove the line "sha256" from it: then the file is'
  " accepted. Otherwise restore it from a copy, or start in another workdir."
)


def write_config(path: epath.PathLike, config: Config) -> None:
  """Writes the config to a file, with a digest in it."""
  content = artifacts.with_digest(dataclasses.asdict(config))
  disk.write_atomically(path, json.dumps(content, indent=2) + "\n")


def read_config(
  path: epath.PathLike, trained: Mapping[str, Any] | None = None
) -> Config:
  """Returns what `write_config` wrote.

  A file without a digest was edited on purpose, or is older: it is accepted
  with a warning.

  Args:
    path: of the file.
    trained: what `settings_of` returned when the model was saved; None: there
      is no model, or this is unknown.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it changed since it was written, is a link, or belongs to
      another run than the model.
  """
  tree = _parse(
    disk.read_own(path, remedy="Restore it from a copy."), str(path)
  )
  config = _from_tree(tree, str(path))
  has_digest = artifacts.DIGEST in tree
  if not has_digest:
    logging.warning(
      "%s has no digest: it was edited, or written by an older version of"
      " rag_jax. Nobody can tell whether it has changed since then.",
      path,
    )
  now = settings_of(config)
  other = [
    f"{name}: {value!r} -> {now[name]!r}"
    for name, value in (trained or {}).items()
    if name in now and now[name] != value
  ]
  if other and has_digest:
    raise ValueError(
      f"{path} is not the config that the model beside it was trained with; it"
      " differs in\n  " + "\n  ".join(other) + "\nExpected the config of the"
      f" same run. {_ON_PURPOSE}"
    )
  if other:
    logging.warning(
      "%s was edited after the model was trained:\n  %s",
      *(path, "\n  ".join(other)),
    )
  return config


def settings_of(config: Config) -> dict[str, Any]:
  """Returns, by name, the settings that change what a trained model answers."""
  decides = {
    name: value
    for name, _, value in fields(config)
    if not name.startswith(_RUN)
  }
  return json.loads(json.dumps(decides))


def from_json(text: str, origin: str = "the config") -> Config:
  """Returns the `Config` that `to_json` wrote.

  Args:
    text: JSON.
    origin: the file it was read from, for messages.

  Raises:
    ValueError: it is not JSON; a field is unknown (the message names the
      nearest known one); or its digest is wrong.
  """
  return _from_tree(_parse(text, origin), origin)


def _parse(text: str | bytes, origin: str) -> Any:
  try:
    return parse_settings(text)
  except ValueError as error:
    raise ValueError(
      f"{origin} is not JSON ({error}); the file was cut off or edited."
      " Restore it, or start in another workdir."
    ) from error


def _from_tree(tree: Any, origin: str) -> Config:
  """Returns the `Config` that parsed JSON holds."""
  if isinstance(tree, dict) and artifacts.DIGEST in tree:
    tree = artifacts.without_digest(tree, origin=origin, remedy=_ON_PURPOSE)
  config = Config()
  _update(config, _renamed(tree), "", origin)
  return validate(config)


def _renamed(tree: Any) -> Any:
  """Returns the settings of an older run, with their present names."""
  index = tree.get("index") if isinstance(tree, dict) else None
  if isinstance(index, dict) and "word_rule" not in index:
    tree = tree | {"index": index | {"word_rule": 1}}
  try:
    # Runs without the setting `fixed` trained the bias.
    if tree["generator"]["logits_bias"] is True:
      tree["generator"].setdefault("fixed", [])
  except (AttributeError, KeyError, TypeError):
    pass  # not a config: `_update` reports it
  try:
    # There were two limits, of which the higher was in force.
    old = tree["eval"]["min_index_recall"]
    now = max(old, tree.get("index", {}).get("min_recall", 0.0))
  except (AttributeError, KeyError, TypeError):
    return tree
  rest = {k: v for k, v in tree["eval"].items() if k != "min_index_recall"}
  index = tree.get("index", {}) | {"min_recall": now}
  return tree | {"eval": rest, "index": index}


def _update(config: Any, tree: Any, prefix: str, origin: str) -> None:
  """Sets the fields of a config or a section to the values of JSON."""
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
  """Returns the error message for a setting that does not exist."""
  known = [known_name for known_name, _, _ in fields(Config())]
  close = difflib.get_close_matches(name, known, n=1)
  if not close:  # perhaps the right name in the wrong section
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
  """Raises `ValueError` if `--config.NAME` in `argv` names no setting."""
  known = {name for name, _, _ in fields(Config())}
  for argument in argv:
    name, _, _ = argument.lstrip("-").partition("=")
    if argument.startswith("-") and name.startswith("config."):
      name = name.removeprefix("config.")
      if name not in known:
        raise ValueError(unknown_field(name))
