"""Counts time and cut inputs of a run, over all its attempts and processes.

In: the time of each step, and how many inputs it cut. Out: sums, which a
checkpoint keeps, so that a resumed run counts like an uninterrupted one.
"""

from collections.abc import Mapping
import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rag_jax.data.context import COUNTS
from rag_jax.processes import sum_counts


@dataclasses.dataclass(slots=True)
class Clock:
  """Time and cut inputs of a run, over all attempts.

  Compilation is not counted.
  """

  train_secs: float = 0.0  # both stages, with validation and checkpoints
  question_secs: float = 0.0  # of the main stage, without validation
  # How many inputs of batches were cut, by all processes, up to the last
  # checkpoint.
  cut: dict[str, int] = dataclasses.field(
    default_factory=lambda: dict.fromkeys(COUNTS, 0)
  )
  # Seconds per kind of work, up to the last checkpoint: see ledger.py.
  ledger: dict[str, float] = dataclasses.field(default_factory=dict)


class CutCounter:
  """Counts the cut inputs in the batches that steps have used."""

  def __init__(self, before: Mapping[str, int] | None = None):
    """Starts from `before`, the total of all processes."""
    self._counts = dict.fromkeys(COUNTS, 0)
    if jax.process_index() == 0:
      self._counts |= before or {}
    # Of all processes. On the devices, so that the host waits for no step.
    self._in_step: Array | int = 0

  def add(self, cut: Mapping[str, int]) -> None:
    """Adds the inputs that this process cut in its part of a batch."""
    for name, number in cut.items():
      self._counts[name] += number

  def add_contexts(self, share: Float[Array, ""], num_contexts: int) -> None:
    """Adds contexts that were cut inside a step.

    Args:
      share: of the contexts, from 0 to 1.
      num_contexts: of the step, over all processes.
    """
    cut = jnp.rint(share * num_contexts).astype(jnp.int32)
    self._in_step = self._in_step + cut

  def total(self) -> dict[str, int]:
    """Returns the counts of all processes; each of them has to call it."""
    counts = sum_counts(self._counts)
    counts["contexts_cut"] += int(self._in_step)
    return counts
