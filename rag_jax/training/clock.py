"""What a run used and met, over all its attempts and processes.

In: what each step took and cut. Out: sums, which a checkpoint keeps, so that a
run that was stopped counts as one that was not.
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
  """What a run used and met, over all attempts.

  Seconds do not count compilation.
  """

  train_secs: float = 0.0  # both stages, with validation and checkpoints
  question_secs: float = 0.0  # of the main stage, without validation
  # What was cut in batches, of all processes, up to the last checkpoint.
  cut: dict[str, int] = dataclasses.field(
    default_factory=lambda: dict.fromkeys(COUNTS, 0)
  )


class CutCounter:
  """Counts what was cut in the batches that steps have taken."""

  def __init__(self, before: Mapping[str, int] | None = None):
    """Goes on from `before`, which all processes counted together."""
    self._counts = dict.fromkeys(COUNTS, 0)
    if jax.process_index() == 0:
      self._counts |= before or {}
    # Of all processes; on the devices, so that no step is waited for.
    self._in_step: Array | int = 0

  def add(self, cut: Mapping[str, int]) -> None:
    """Adds what this process cut while it made its part of a batch."""
    for name, number in cut.items():
      self._counts[name] += number

  def add_contexts(self, share: Float[Array, ""], num_contexts: int) -> None:
    """Adds the share of all contexts that a step cut itself."""
    cut = jnp.rint(share * num_contexts).astype(jnp.int32)
    self._in_step = self._in_step + cut

  def total(self) -> dict[str, int]:
    """Returns the counts of all processes, each of which calls it."""
    counts = sum_counts(self._counts)
    counts["contexts_cut"] += int(self._in_step)
    return counts
