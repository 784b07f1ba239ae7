"""Detects that a run has diverged.

In: the metrics of an update, the state that is about to be saved, or the
checkpoint to resume from. Out: nothing, or an error that says how to continue
the run.

The loss of an update belongs to the parameters before it. So the parameters in
a checkpoint are proven by the loss of the next update.
"""

from collections.abc import Mapping
import contextlib
import math
from typing import SupportsFloat

import jax
import jax.numpy as jnp

from rag_jax.models.partitioning import replicated
from rag_jax.processes import first_alone
from rag_jax.training.checkpoint import Checkpointer
from rag_jax.training.metrics import STAGES
from rag_jax.training.metrics import read_metrics
from rag_jax.training.stages import CONTRASTIVE
from rag_jax.training.stages import TRAIN
from rag_jax.training.stages import WARMUP
from rag_jax.training.stages import Stage
from rag_jax.training.state import TrainState
from rag_jax.training.workdir import Workdir

_SANE = 1e6  # parameters of a model that still learns are smaller
_FACTOR = 10.0  # see `is_too_high`


def is_too_high(loss: float, lowest: float, vocab_size: int) -> bool:
  """Returns whether a loss shows that the run has diverged.

  It does if it is not finite, or if it is both

  - above 10 log(vocab_size), ten times the loss of a uniform guess, and
  - above 10 times the lowest loss of the stage.

  The first limit lets noise pass: a model with a loss near 0 may be wrong about
  a whole batch. The second lets a run begin with any loss, for instance that of
  a model whose logits have another scale.

  Args:
    loss: of a batch, in nats per target token; of the contrastive stage, in
      nats per question.
    lowest: of the losses in the same stage; inf: unknown.
    vocab_size: number of token ids of the generator.
  """
  if not math.isfinite(loss):
    return True
  return loss > _FACTOR * max(math.log(vocab_size), lowest)


class DivergenceCheck:
  """Raises `FloatingPointError` if a run has diverged.

  Attributes:
    lowest: the lowest loss of each stage, by its name; saved with checkpoints.
    proven: step of the newest checkpoint whose parameters gave a good loss in
      the next update; None: there is none in this attempt.
  """

  def __init__(
    self,
    checkpoints: Checkpointer,
    workdir: Workdir,
    mesh: jax.sharding.Mesh,
    *,
    vocab_size: int,  # number of token ids of the generator
    warmup_steps: int,  # of the run
    contrastive_steps: int = 0,  # after them
  ):
    self.lowest: dict[str, float] = {}
    self.proven: int | None = None
    self._checkpoints = checkpoints
    self._vocab_size = vocab_size
    self._workdir = workdir
    self._ends = {WARMUP: warmup_steps}
    self._ends[CONTRASTIVE] = warmup_steps + contrastive_steps
    self._newest: int | None = None  # checkpoint
    self._failed: set[int] = set()  # checkpoints with a bad loss after them
    # Losses that stay on the devices until they are needed.
    self._first: dict[str, SupportsFloat] = {}  # by stage
    self._next: tuple[str, SupportsFloat] | None = None  # after `_newest`
    self._largest = jax.jit(
      lambda trees: jax.tree.map(
        lambda x: jnp.max(jnp.abs(x).astype(jnp.float32), initial=0.0), trees
      ),
      out_shardings=replicated(mesh),
    )

  def begin_at(self, step: int) -> None:
    """Notes that the state is now that of the checkpoint of `step`."""
    self._newest, self._next = step, None

  def follow(
    self, metrics: Mapping[str, SupportsFloat], stage: Stage, step: int
  ) -> None:
    """Keeps the losses that are needed later. Call it after every update."""
    loss = metrics[f"{stage.name}/loss"]
    self._first.setdefault(stage.name, loss)
    if self._newest == stage.first_step + step - 1:
      self._next = (stage.name, loss)

  def check_metrics(
    self, values: Mapping[str, SupportsFloat], stage: Stage, step: int
  ) -> None:
    """Raises if a metric is not finite, or the loss is far too high."""
    self._judge_newest()
    bad = [k for k, v in values.items() if not math.isfinite(float(v))]
    if bad:
      raise self._diverged(f"{', '.join(bad)} is not finite", stage, step)
    name = f"{stage.name}/loss"
    loss, lowest = float(values[name]), self._lowest(stage.name)
    if is_too_high(loss, lowest, self._vocab_size):
      raise self._diverged(
        f"{name} is {loss:.1e}, after {lowest:.3g} before,", stage, step
      )
    self.lowest[stage.name] = min(loss, lowest)

  def check_state(self, state: TrainState, stage: Stage, step: int) -> None:
    """Raises if a number in the state is not finite, or a parameter is huge."""
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

  def check_start(self, step: int) -> None:
    """Raises if a checkpoint was saved after the run had diverged.

    Only older versions of rag_jax saved such checkpoints.

    Args:
      step: of the checkpoint to resume from.

    Raises:
      ValueError: the message names the newest good checkpoint, also among those
        that an earlier --resume_from set aside.
    """

    def act() -> None:
      if step not in self._checkpoints.steps():
        return  # refused by who reads it
      loss = self._checkpoints.loss(step)
      good, _ = self._good()
      if loss is None or step in good:
        return
      remedy = self._remedy()
      raise ValueError(
        f"The checkpoint of step {step} was saved after the run had diverged:"
        f" its loss is {loss:.1e} nats per token. Expected one from before the"
        f" loss rose. {remedy[0].upper()}{remedy[1:]}"
      )

    is_first = jax.process_index() == 0
    first_alone("resume", act if is_first else lambda: None)

  def _judge_newest(self) -> None:
    """Notes whether the parameters in the newest checkpoint are good."""
    if self._newest is None or self._next is None:
      return
    stage, loss = self._next
    if is_too_high(float(loss), self._lowest(stage), self._vocab_size):
      self._failed.add(self._newest)
    else:
      self.proven = self._newest

  def _lowest(self, stage: str) -> float:
    """Returns the lowest known loss of a stage; inf: none is known."""
    first = float(self._first.get(stage, math.inf))
    known = (self.lowest.get(stage, math.inf), first)
    return min((x for x in known if math.isfinite(x)), default=math.inf)

  def _good(self) -> tuple[list[int], list[str]]:
    """Returns the steps with a good checkpoint, and the folders set aside."""
    steps, left = self._checkpoints.steps(), self._checkpoints.left()
    noted = [(step, self._checkpoints.loss(step)) for step in steps]
    aside = [(step, loss) for step, _, loss, _ in left]

    def stage_of(step: int) -> str:
      ends = self._ends.items()
      return next((stage for stage, end in ends if step <= end), TRAIN)

    lowest = {stage: self._logged(stage) for stage in STAGES}
    for step, loss in noted + aside:
      if loss is not None:
        stage = stage_of(step)
        lowest[stage] = min(lowest[stage], loss)

    def is_good(step: int, loss: float | None) -> bool:
      return loss is None or not is_too_high(
        loss, lowest[stage_of(step)], self._vocab_size
      )

    return (
      [s for s, loss in noted if s not in self._failed and is_good(s, loss)],
      [
        name
        for step, name, loss, versions in left
        if is_good(step, loss)
        and all((self._workdir.indexes / str(v)).exists() for v in versions)
      ],
    )

  def _logged(self, stage: str) -> float:
    """Returns the lowest loss of a stage in metrics.jsonl; inf: none."""
    records = []
    with contextlib.suppress(OSError, ValueError):
      records = read_metrics(self._workdir.metrics)
    losses = (record.get(f"{stage}/loss") for record in records)
    return min((x for x in losses if x is not None), default=math.inf)

  def _remedy(self) -> str:
    """Returns how to go back to a checkpoint from before the loss rose."""
    good, left = self._good()
    if good:
      *others, last = map(str, good)
      more = f", or to an earlier one: {', '.join(others)}" if others else ""
      return (
        "go back to a checkpoint from before the loss rose:"
        f" --resume_from={last}{more}."
      )
    if left:
      return self._checkpoints.how_to_use_left(left[-1])
    return "start in another --workdir: no checkpoint is from before that."

  def _diverged(self, what: str, stage: Stage, step: int) -> FloatingPointError:
    rates = {
      WARMUP: "warmup.peak_lr or warmup.retriever_lr",
      CONTRASTIVE: "contrastive.retriever_lr",
      TRAIN: "optimizer.peak_lr or optimizer.retriever_lr",
    }[stage.name]
    remedy = "run the command again: nothing was saved, so it starts afresh."
    if self._checkpoints.steps():
      remedy = self._remedy()
    return FloatingPointError(
      f"{what} at step {step} of {stage.name}: the run diverged. Expected"
      f" finite, moderate numbers. Lower {rates}, or set optimizer.clip_norm,"
      f" and {remedy}"
    )
