"""Detects that a run has diverged.

In: the metrics of an update, or the state that is about to be saved. Out:
nothing, or an error that says how to continue the run.
"""

from collections.abc import Mapping
import math
from typing import SupportsFloat

import jax
import jax.numpy as jnp

from rag_jax.models.partitioning import replicated
from rag_jax.training.checkpoint import Checkpointer
from rag_jax.training.stages import TRAIN
from rag_jax.training.stages import Stage
from rag_jax.training.state import TrainState

_SANE = 1e6  # parameters of a model that still learns are smaller


class DivergenceCheck:
  """Raises `FloatingPointError` if a run has diverged."""

  def __init__(self, checkpoints: Checkpointer, mesh: jax.sharding.Mesh):
    self._checkpoints = checkpoints
    self._largest = jax.jit(
      lambda trees: jax.tree.map(
        lambda x: jnp.max(jnp.abs(x).astype(jnp.float32), initial=0.0), trees
      ),
      out_shardings=replicated(mesh),
    )

  def check_metrics(
    self, values: Mapping[str, SupportsFloat], stage: Stage, step: int
  ) -> None:
    """Raises if a metric is not finite."""
    bad = [k for k, v in values.items() if not math.isfinite(float(v))]
    if bad:
      raise self._diverged(f"{', '.join(bad)} is not finite", stage, step)

  def check_state(self, state: TrainState, stage: Stage, step: int) -> None:
    """Raises if a number in the state is not finite, or a parameter is huge.

    The loss of an update belongs to the parameters before it, so it says
    nothing about the parameters that are saved.
    """
    trees = {"parameters": state.params, "optimizer": state.opt_state}
    found = jax.device_get(self._largest(trees))
    bad = []
    for path, x in jax.tree_util.tree_leaves_with_path(found):
      name = jax.tree_util.keystr(path, simple=True, separator="/")
      if not math.isfinite(x):
        bad.append(f"{name} is not finite")
      elif name.startswith("parameters") and x > _SANE:
        bad.append(f"{name} has a value of {float(x):.1e}")
    if bad:
      more = f" (and {len(bad) - 1} more arrays)" if len(bad) > 1 else ""
      raise self._diverged(bad[0] + more, stage, step)

  def _diverged(self, what: str, stage: Stage, step: int) -> FloatingPointError:
    steps = self._checkpoints.steps()
    rates = "optimizer.peak_lr or optimizer.retriever_lr"
    if stage.name != TRAIN:
      rates = "warmup.peak_lr or warmup.retriever_lr"
    remedy = "run the command again: nothing was saved, so it starts afresh."
    if steps:
      remedy = (
        "go back to a checkpoint from before the loss rose:"
        f" --resume_from={steps[-1]}, or another of {steps}."
      )
    return FloatingPointError(
      f"{what} at step {step} of {stage.name}: the run diverged. Expected"
      f" finite, moderate numbers. Lower {rates}, or set optimizer.clip_norm,"
      f" and {remedy}"
    )
