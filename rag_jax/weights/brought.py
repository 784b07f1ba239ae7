"""Who chooses a setting of a run that starts from checkpoints.

In: a config, and what its checkpoints say. Out: the config with their settings
where nobody chose another, and the log of what was replaced and kept.

Who chooses a setting: a config file that names a checkpoint is written for it,
so its settings hold, and so do those of the command line. If only the command
line names the checkpoint, the file was written for a model from scratch. Then
only the command line chooses, and a warning lists the settings of the file that
the checkpoint replaced. A setting that is not set anywhere is not a choice;
assigning the default value is one.

The shape of a model cannot be chosen beside a checkpoint: a contradiction on
the command line is an error, and one in a file a warning.
"""

from collections.abc import Mapping
from typing import Any

from absl import logging

from rag_jax.config import Config

SAFE_LR = 3e-5  # of the RAG paper, for weights that were trained before
_HIGH_LR = 10 * SAFE_LR

# 0 means that these are derived, so it contradicts no checkpoint.
_OPEN = (
  "vocab_size", "max_positions", "num_decoder_layers", "num_decoder_heads",
  "head_dim", "decoder_mlp_dim",
)  # fmt: skip


class Brought:
  """Fills in a config, setting by setting, and logs the changes at the end."""

  def __init__(self, config: Config, overridden: Mapping[str, Any]):
    """Starts from the settings of the config file and the command line.

    Args:
      config: changed in place.
      overridden: the settings that the command line gave, by dotted name, with
        their values in the config file.
    """
    self._config, self._overridden = config, overridden
    # Parts that the file describes from scratch: it names no checkpoint of the
    # part or of the whole model.
    by_file = {
      name: overridden.get(name, self._get(name))
      for name in ("init_from", "encoder.init_from", "generator.init_from")
    }
    self._scratch = {
      part: not by_file["init_from"]
      and not by_file[f"{part}.init_from"]
      and bool(overridden.keys() & {"init_from", f"{part}.init_from"})
      for part in ("encoder", "generator")
    }
    self._replaced: list[str] = []
    self._kept: list[str] = []
    self._refused: list[str] = []

  def _holder(self, name: str) -> tuple[Any, str]:
    section, _, field = name.rpartition(".")
    return getattr(self._config, section) if section else self._config, field

  def _get(self, name: str) -> Any:
    holder, field = self._holder(name)
    return getattr(holder, field)

  def _put(self, name: str, value: Any) -> None:
    holder, field = self._holder(name)
    if holder.is_set(field) and getattr(holder, field) != value:
      self._replaced.append(f"{name}: {getattr(holder, field)!r} -> {value!r}")
    setattr(holder, field, value)

  def chosen(self, part: str, *names: str) -> bool:
    """Returns whether somebody set one of `names` for the checkpoint of `part`.

    Args:
      part: "encoder" or "generator".
      names: dotted, of settings.
    """
    for name in names:
      holder, field = self._holder(name)
      by_file = holder.is_set(field) and not self._scratch[part]
      if name in self._overridden or by_file:
        return True
    return False

  def bring(self, part: str, name: str, value: Any, warning: str = "") -> None:
    """Sets `name` to the checkpoint's value, unless the user chose one.

    Args:
      part: whose checkpoint, "encoder" or "generator".
      name: dotted, of the setting.
      value: the checkpoint's.
      warning: why another value may be wrong; "" logs nothing if it differs.
    """
    if not self.chosen(part, name):
      self._put(name, value)
    elif warning and self._get(name) != value:
      self._kept.append(f"{name}={self._get(name)!r}, not {value!r}: {warning}")

  def bring_lr(self, part: str, name: str) -> None:
    """Sets a learning rate to one that suits weights trained before."""
    warning = "" if self._get(name) <= _HIGH_LR else (
      "steps of this size destroy what the weights have learned"
    )  # fmt: skip
    self.bring(part, name, SAFE_LR, warning)

  def demand(self, section: str, field: str, value: Any) -> None:
    """Sets a field of a section that the checkpoint alone decides."""
    name = f"{section}.{field}"
    old = self._get(name)
    if (
      name in self._overridden and old != value and (old or field not in _OPEN)
    ):
      self._refused.append(f"{name}={old!r}, but the checkpoint has {value!r}")
    self._put(name, value)

  def note(self, text: str) -> None:
    """Keeps a warning for `finish`."""
    self._kept.append(text)

  def finish(self) -> None:
    """Logs what was replaced and kept.

    Raises:
      ValueError: the command line contradicts the shape of a checkpoint.
    """
    if self._refused:
      raise ValueError(
        "The command line contradicts the checkpoints that it starts from:\n  "
        + "\n  ".join(self._refused)
        + "\nExpected the shape that their weights have. Omit these settings,"
        " or use other checkpoints."
      )
    if self._replaced:
      logging.warning(
        "The checkpoints have settings of their own, which replace those of the"
        " config file:\n  %s\nSettings on the command line, and settings of a"
        " file that names the checkpoints, are kept where the checkpoint allows"
        " another value. configs/hf_finetune.py is such a file.",
        "\n  ".join(self._replaced),
      )
    if self._kept:
      logging.warning(
        "These settings may not suit the checkpoints:\n  %s",
        "\n  ".join(self._kept),
      )
