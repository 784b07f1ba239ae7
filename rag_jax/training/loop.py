"""The run: warm-up, then the marginal likelihood, with all that surrounds them.

In: an experiment, its questions, its workdir and a function that validates.
Out: checkpoints, metrics and index versions in the workdir.

What is done at a step depends on the step alone, so a run that was stopped and
resumed ends with the same parameters as one that was not.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import math
import time
from typing import SupportsFloat

from absl import logging
import jax
from jaxtyping import Int, PyTree
import numpy as np

from rag_jax.artifacts import fingerprint_lines
from rag_jax.data.experiment import Experiment
from rag_jax.data.pipeline import Ahead
from rag_jax.data.pipeline import Prepared
from rag_jax.data.questions import Question
from rag_jax.models.partitioning import place_batch
from rag_jax.models.partitioning import process_rows
from rag_jax.processes import join_rows
from rag_jax.retrieval.index import Index
from rag_jax.retrieval.index import load_index
from rag_jax.retrieval.retriever import RetrieverSnapshots
from rag_jax.retrieval.retriever import fingerprint
from rag_jax.retrieval.versions import IndexVersions
from rag_jax.training import in_step
from rag_jax.training import step as step_lib
from rag_jax.training.checkpoint import Checkpointer
from rag_jax.training.interrupt import StoppedEarlyError
from rag_jax.training.interrupt import StopRequest
from rag_jax.training.metrics import MetricWriter
from rag_jax.training.metrics import Progress
from rag_jax.training.resuming import check_end
from rag_jax.training.resuming import check_identity
from rag_jax.training.stages import TRAIN
from rag_jax.training.stages import Stage
from rag_jax.training.stages import make_stages
from rag_jax.training.stages import stage_optimizer
from rag_jax.training.state import TrainState
from rag_jax.training.state import abstract_state
from rag_jax.training.state import init_params
from rag_jax.training.state import make_state
from rag_jax.training.step import compile_update
from rag_jax.training.workdir import Workdir

# (params, index) -> metrics named "validation/..."
Validate = Callable[[PyTree, Index | None], dict[str, float]]

_BEST = "validation/exact_match"


@dataclasses.dataclass(slots=True)
class Clock:
  """Seconds of training, over all attempts; compilation is not counted."""

  train_secs: float = 0.0  # both stages, with validation and checkpoints
  question_secs: float = 0.0  # of the main stage, without validation


def train(
  experiment: Experiment,
  questions: Sequence[Question],
  workdir: Workdir,
  validate: Validate,
) -> Clock:
  """Runs what is left of the run in `workdir`.

  Raises:
    StoppedEarlyError: a signal asked to stop; everything is saved.
    FloatingPointError: the loss is not finite any more.
    ValueError: the checkpoints in the workdir do not belong to this run.
  """
  with StopRequest() as stop:
    run = _Run(experiment, questions, workdir, validate, stop)
    try:
      run.all_stages(make_stages(experiment, questions))
    finally:
      run.close()
  return run.clock


class _Run:
  """One attempt at a run: what its stages share."""

  def __init__(
    self,
    experiment: Experiment,
    questions: Sequence[Question],
    workdir: Workdir,
    validate: Validate,
    stop: StopRequest,
  ):
    config = experiment.config
    self._experiment = experiment
    self._config = config
    self._validate = validate
    self._stop = stop
    self._key = jax.random.key(config.seed)
    self._snapshots = RetrieverSnapshots(experiment.mesh)
    self._trains_passages = config.encoder.train_passage_encoder
    self._versions = IndexVersions(
      experiment.index_builder,
      workdir.indexes,
      refresh_steps=(
        config.index.refresh_steps if self._trains_passages else 0
      ),
      swap_steps=config.index.swap_steps,
      writes=jax.process_index() == 0,
    )
    self._checkpoints = Checkpointer(
      workdir.checkpoints,
      keep_last=config.train.keep_checkpoints,
      process_index=jax.process_index(),
    )
    self._writer = MetricWriter(workdir.path, enabled=jax.process_index() == 0)
    self._identity = experiment.identity | {
      "questions": fingerprint_lines(repr(q) for q in questions),
    }
    self.clock = Clock()

  def close(self) -> None:
    self._versions.close()
    self._checkpoints.close()
    self._writer.close()

  def all_stages(self, stages: list[Stage]) -> None:
    """Runs every stage, from the last checkpoint on."""
    latest = self._checkpoints.latest_step()
    extra = {} if latest is None else self._checkpoints.read_extra(latest)
    if latest is None:
      self._writer.truncate_after(stages[0].name, 0)
    else:
      check_identity(extra["identity"], self._identity, latest)
      check_end(stages[-1], latest)
      self._writer.truncate_after(extra["stage"], extra["stage_step"])
      self.clock = Clock(**extra["clock"])
      logging.info("Resuming from the checkpoint of step %d.", latest)
    params, layout = init_params(
      self._experiment.init,
      self._key,
      self._experiment.mesh,
      self._experiment.initial.params,
    )
    if self._config.index.path and not self._experiment.closed_book:
      self._adopt_index(params)
    for stage in stages:
      if latest is not None and latest > stage.first_step + stage.num_steps:
        continue  # a later stage goes on from the checkpoint
      resumed = extra if extra.get("stage") == stage.name else {}
      params = self._stage(stage, params, layout, resumed, latest)

  def _stage(
    self,
    stage: Stage,
    params: PyTree,
    layout: PyTree,
    extra: dict,
    latest: int | None,
  ) -> PyTree:
    """Runs one stage and returns the parameters at its end."""
    main = stage.name == TRAIN
    optimizer = stage_optimizer(self._config, stage.name, params)
    state, state_layout = make_state(
      params, layout, optimizer, self._experiment.mesh
    )
    doc_ids = None
    if extra:
      abstract = abstract_state(state, state_layout)
      if stage.in_step:
        kept = in_step.abstract_index(self._experiment, params)
        abstract = dataclasses.replace(abstract, index=kept)
      state, _ = self._checkpoints.restore(abstract, latest)
      doc_ids = self._own_rows(extra["doc_ids"], stage)
    step = int(state.step)
    if stage.in_step:
      state, state_layout = in_step.place_index(
        self._experiment, state, state_layout, self._snapshots
      )
    elif main and not (self._experiment.closed_book or self._config.index.path):
      self._open_index(state.params, extra, latest)
    if step >= stage.num_steps:
      return state.params
    index = self._versions.index if main else None
    first = stage.prepare(
      step, self._retriever_params(state.params), index, doc_ids
    )
    logging.info("Compiling the %s step.", stage.name)
    update = compile_update(
      stage.loss_fn,
      optimizer,
      state_layout,
      self._experiment.mesh,
      stage.name,
      stage.in_step.update if stage.in_step else step_lib.update,
      jax.process_count() > 1,
    )
    compiled = update.lower(
      state,
      self._to_devices(first.batch, stage),
      self._key,
      *self._stop.to_send(self._experiment.mesh),
    ).compile()
    if main:  # compiles what validation needs, outside the clock
      self._validate(
        state.params, in_step.searched(self._experiment, state, index)
      )
    return self._steps(stage, compiled, state, step, first)

  def _adopt_index(self, params: PyTree) -> None:
    """Opens the index of the config, whose passage tower never trains."""
    self._versions.adopt(
      load_index(
        self._config.index.path,
        encoder_fingerprint=fingerprint(self._snapshots.take(params)),
        passages_fingerprint=self._experiment.passages.fingerprint,
      )
    )

  def _open_index(self, params: PyTree, extra: dict, step: int | None) -> None:
    """Opens the index of the checkpoint of `step`, or builds the first."""
    if not extra:
      self._versions.start(self._snapshots.take(params))
      return
    passages = self._experiment.passages.fingerprint
    try:
      self._versions.restore(extra["index_versions"], passages)
    except (FileNotFoundError, ValueError) as error:
      raise ValueError(
        f"The run cannot go on from its checkpoint of step {step}, which needs"
        f" an index that cannot be used: {error} Delete the folder {step} of"
        " the checkpoints to go on from an earlier one, or start in another"
        " --workdir."
      ) from error

  def _retriever_params(self, params: PyTree) -> PyTree | None:
    closed_book = self._experiment.closed_book
    return None if closed_book else self._snapshots.take(params)

  def _to_devices(self, batch: PyTree, stage: Stage) -> PyTree:
    return place_batch(batch, self._experiment.mesh, stage.batch_size)

  def _own_rows(
    self, doc_ids: Sequence[Sequence[int]], stage: Stage
  ) -> Int[np.ndarray, "B K"] | None:
    """Returns this process's documents, of those that a checkpoint holds."""
    if len(doc_ids) == stage.batch_size:
      rows = process_rows(self._experiment.mesh, stage.batch_size)
      return np.asarray(doc_ids, np.int32)[rows]
    if doc_ids:
      logging.warning(
        "The checkpoint holds the documents of %d of %d questions: an older"
        " version of rag_jax saved those of one process. They are searched for"
        " again, by newer parameters than in a run that was not stopped.",
        len(doc_ids),
        stage.batch_size,
      )
    return None

  def _steps(
    self,
    stage: Stage,
    update: Callable,
    state: TrainState,
    step: int,
    prepared: Prepared,
  ) -> PyTree:
    """Runs `stage` from `step`, whose batch is `prepared`, to its end."""
    config = self._config.train
    main = stage.name == TRAIN
    versions = self._versions if main and self._versions.index else None
    ahead = Ahead()
    progress = Progress(stage.batch_size, first_step=step)
    start = time.perf_counter()
    waited, logged_step, paused = 0.0, step, 0.0
    clock, before = self.clock, dataclasses.replace(self.clock)

    def tick() -> None:
      now = time.perf_counter() - start
      clock.train_secs = before.train_secs + now
      if main:
        clock.question_secs = before.question_secs + now - paused

    try:
      while step < stage.num_steps:
        if versions:
          versions.swap_if_due(step)
        index = versions.index if versions else None
        last = step + 1 == stage.num_steps
        # After the last step too: the run may be made longer.
        more = not last or main
        # Before the update, which donates the parameters it is given.
        outside = more and not stage.in_step
        retriever = self._retriever_params(state.params) if outside else None
        state, metrics = update(
          state,
          self._to_devices(prepared.batch, stage),
          self._key,
          *self._stop.to_send(self._experiment.mesh),
        )
        self._stop.receive(metrics)
        if more:
          ahead.submit(stage.prepare, step + 1, retriever, index)
        step += 1
        if versions and versions.is_due(step):
          versions.refresh(step, self._snapshots.take(state.params))
        values: dict[str, float] = {}
        validate = main and _is_due(step, config.validate_steps, last)
        log = _is_due(step, config.log_steps, last) or validate
        if log:
          values = {k: float(v) for k, v in metrics.items()}
          self._check_finite(values, stage, step)
          values |= {
            f"{stage.name}/data_wait_secs": waited / (step - logged_step),
            f"{stage.name}/questions_per_second": progress.questions_per_sec(
              step
            ),
          }
          if versions:
            values["train/index_staleness_steps"] = (
              step - versions.version if self._trains_passages else 0
            )
            values["train/distinct_docs"] = (
              np.unique(prepared.doc_ids).size / prepared.doc_ids.size
            )
          waited, logged_step = 0.0, step
        if validate:
          began = time.perf_counter()
          with progress.paused():
            searched = in_step.searched(self._experiment, state, index)
            values |= self._validate(state.params, searched)
          paused += time.perf_counter() - began
        if log:
          self._writer.write(step, stage.name, values)
          logging.info(
            "%s", progress.line(step, stage.num_steps, stage.name, values)
          )
        tick()
        due = _is_due(step, config.checkpoint_steps, last and main)
        stopping = self._stop.agreed()
        due |= self._is_best(values) or bool(stopping)
        if due:
          # Or the good checkpoints could all give way to such as cannot train.
          self._check_finite(metrics, stage, step)
          self._save(stage, step, state, ahead, versions, values)
        if stopping and not (last and main):
          raise StoppedEarlyError(stopping, stage.first_step + step)
        if not last:
          prepared, secs = ahead.take(lambda s=state: s.step.is_ready())
          waited += secs
    finally:
      ahead.close()
      tick()
    return state.params

  def _check_finite(
    self, values: Mapping[str, SupportsFloat], stage: Stage, step: int
  ) -> None:
    bad = [k for k, v in values.items() if not math.isfinite(float(v))]
    if bad:
      raise FloatingPointError(
        f"{', '.join(bad)} is not finite at step {step} of {stage.name}. The"
        " run diverged: lower optimizer.peak_lr or optimizer.retriever_lr, or"
        " set optimizer.clip_norm. Checkpoints of steps"
        f" {self._checkpoints.steps()} are kept."
      )

  def _is_best(self, values: dict[str, float]) -> bool:
    if _BEST not in values:
      return False
    best = self._checkpoints.best_step()
    if best is None:
      return True
    return values[_BEST] > (self._checkpoints.metric(best) or 0.0)

  def _save(
    self,
    stage: Stage,
    step: int,
    state: TrainState,
    ahead: Ahead,
    versions: IndexVersions | None,
    values: dict[str, float],
  ) -> None:
    """Saves all that the run needs to go on as if it had not stopped."""
    name = stage.first_step + step
    if name in self._checkpoints.steps():
      return
    pending = ahead.peek()
    doc_ids = []
    if pending is not None:
      rows = process_rows(self._experiment.mesh, stage.batch_size)
      doc_ids = join_rows(pending.doc_ids, rows, stage.batch_size).tolist()
    # What follows is the same in every process, or that of the first, whose
    # clock and index files count.
    extra = {
      "stage": stage.name,
      "stage_step": step,
      "doc_ids": doc_ids,
      "index_versions": versions.save() if versions else [],
      "clock": dataclasses.asdict(self.clock),
      "identity": self._identity,
      "config": dataclasses.asdict(self._config),
      "metrics": {k: v for k, v in values.items() if math.isfinite(v)},
    }
    kept_state = in_step.without_tokens(state)
    self._checkpoints.save(name, kept_state, extra, values.get(_BEST))
    if versions:
      kept = [
        self._checkpoints.read_extra(s) for s in self._checkpoints.steps()
      ]
      versions.remove_except({v for e in kept for v in e["index_versions"]})


def _is_due(step: int, every: int, last: bool) -> bool:
  """Whether something done `every` so many steps, and at the end, is due."""
  return last or (every > 0 and step % every == 0)
