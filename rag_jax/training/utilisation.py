"""How well the devices are used: speed against their peak, and memory.

In: the FLOPs of a step, its speed, the devices. Out: metrics.
"""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
from typing import Any

from rag_jax.chips import chip_of_device
from rag_jax.config import Config
from rag_jax.models.flops import step_flops
from rag_jax.models.flops import step_shapes
from rag_jax.models.flops import total_flops


class Utilisation:
  """Model FLOPs utilisation (MFU) of the steps of the main stage."""

  def __init__(
    self,
    config: Config,
    *,
    num_passages: int,
    vocab_size: int,  # of the generator
    devices: Sequence[Any],  # all that train
    contexts: Mapping[str, Any] | None = None,  # more fields of StepShapes
  ):
    shapes = dataclasses.replace(
      step_shapes(config, num_passages), **(contexts or {})
    )
    step = total_flops(step_flops(config, shapes, vocab_size))
    self._flops_per_question = step / config.train.batch_size
    self._peak = config.train.peak_tflops * 1e12 * len(devices)
    if not self._peak:
      chips = [chip_of_device(device.device_kind) for device in devices]
      known = [chip.peak_flops for chip in chips if chip is not None]
      self._peak = sum(known) if len(known) == len(chips) else 0.0

  def mfu(self, questions_per_sec: float) -> dict[str, float]:
    """Returns the metric, from 0 to 1; nothing without a known peak."""
    if not self._peak:
      return {}
    speed = questions_per_sec * self._flops_per_question
    return {"train/mfu": speed / self._peak}


def memory(stage: str, devices: Iterable[Any]) -> dict[str, float]:
  """Returns the memory in use on the fullest of `devices`, in bytes.

  Now, and at most since the process started. Nothing if the backend does not
  count it, as that of the CPU.
  """
  stats = [device.memory_stats() or {} for device in devices]
  metrics = {}
  for name, key in (
    ("hbm_bytes_in_use", "bytes_in_use"),
    ("hbm_peak_bytes", "peak_bytes_in_use"),
  ):
    found = [s[key] for s in stats if key in s]
    if found:
      metrics[f"{stage}/{name}"] = float(max(found))
  return metrics
