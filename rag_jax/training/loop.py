"""The training loop: one stage after the other, the main stage last.

In: an experiment, its questions, its workdir and a function that validates.
Out: checkpoints, metrics and index versions in the workdir.

The loop's actions at a step depend only on the step, so a resumed run ends with
the same parameters as an uninterrupted one.
"""

from collections.abc import Callable, Sequence
import contextlib
import dataclasses
import functools
import json
import math
import time
from typing import Any

from absl import logging
import jax
from jaxtyping import Int, PyTree
import numpy as np

from rag_jax.artifacts import fingerprint_lines
from rag_jax.data.experiment import Experiment
from rag_jax.data.pipeline import Ahead
from rag_jax.data.pipeline import Prepared
from rag_jax.data.questions import Question
from rag_jax.models.partitioning import batch_shards
from rag_jax.models.partitioning import place_batch
from rag_jax.models.partitioning import process_rows
from rag_jax.processes import from_first
from rag_jax.processes import join_rows
from rag_jax.retrieval.index import Index
from rag_jax.retrieval.index import load_index
from rag_jax.retrieval.index_versions import IndexVersions
from rag_jax.retrieval.retriever import RetrieverSnapshots
from rag_jax.retrieval.retriever import fingerprint
from rag_jax.training import search_in_step
from rag_jax.training.checkpoint import Checkpointer
from rag_jax.training.checkpoint_checks import check_end
from rag_jax.training.checkpoint_checks import check_identity
from rag_jax.training.clock import Clock
from rag_jax.training.clock import CutCounter
from rag_jax.training.divergence import DivergenceCheck
from rag_jax.training.health import RetrievalHealth
from rag_jax.training.interrupt import StoppedEarlyError
from rag_jax.training.interrupt import StopRequest
from rag_jax.training.ledger import Ledger
from rag_jax.training.metrics import MetricWriter
from rag_jax.training.metrics import Progress
from rag_jax.training.profiling import Profiler
from rag_jax.training.stages import TRAIN
from rag_jax.training.stages import Stage
from rag_jax.training.stages import make_stages
from rag_jax.training.stages import stage_optimizer
from rag_jax.training.stages import trained
from rag_jax.training.state import TrainState
from rag_jax.training.state import abstract_state
from rag_jax.training.state import free
from rag_jax.training.state import init_params
from rag_jax.training.state import make_state
from rag_jax.training.step import compile_update
from rag_jax.training.utilisation import Utilisation
from rag_jax.training.utilisation import memory
from rag_jax.training.workdir import Workdir
from rag_jax.training.workdir import learning_of

# (params, index) -> metrics named "validation/..."
Validate = Callable[[PyTree, Index | None], dict[str, float]]

_BEST = "validation/exact_match"


def train(
  experiment: Experiment,
  questions: Sequence[Question],
  workdir: Workdir,
  validate: Validate,
  resume_from: int | None = None,
) -> Clock:
  """Trains in `workdir` from its newest whole checkpoint to the last step.

  Args:
    experiment: its model is trained.
    questions: of the training split.
    workdir: of the run.
    validate: measures parameters.
    resume_from: step of a checkpoint to go back to, usually with a config that
      learns differently. Later checkpoints are set aside, unless they were made
      with this config after going back.

  Raises:
    StoppedEarlyError: a signal asked to stop; everything is saved.
    FloatingPointError: the run diverged.
    ValueError: the checkpoints in the workdir do not belong to this run.
  """
  stages = make_stages(experiment, questions)
  workdir.begin()
  with StopRequest() as stop:
    run = _Run(experiment, questions, workdir, validate, stop, stages[-1])
    try:
      run.all_stages(stages, resume_from)
    finally:
      run.close()
      run.log_ledger()
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
    main: Stage,
  ):
    config = experiment.config
    self._ledger = Ledger()
    self._experiment = experiment
    self._config = config
    self._validate = validate
    self._stop = stop
    self._key = jax.random.key(config.seed)
    self._dropout_key = jax.random.key(
      config.seed, impl=config.train.dropout_prng
    )
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
    if config.contrastive.num_steps:
      self._identity["positives and negatives of questions"] = (
        fingerprint_lines(repr((q.gold, q.negatives)) for q in questions)
      )
    self.clock = Clock()
    self._cut = CutCounter()
    self._kept_indexes: dict[int, list[int]] = {}  # by checkpoint
    self._best: float | None = None  # metric of a checkpoint
    self._went_back_to: list[int] = []  # by --resume_from
    self._divergence = DivergenceCheck(
      self._checkpoints,
      workdir,
      experiment.mesh,
      vocab_size=experiment.model.generator.config.vocab_size,
      warmup_steps=config.warmup.num_steps,
      contrastive_steps=config.contrastive.num_steps,
    )
    self._utilisation = Utilisation(
      config,
      num_passages=len(experiment.passages),
      vocab_size=experiment.model.generator.config.vocab_size,
      devices=list(experiment.mesh.devices.flat),
      contexts=main.context_shapes(batch_shards(experiment.mesh)),
    )
    self._profiler = Profiler(
      config.train.profile_steps,
      workdir.profile,
      enabled=jax.process_index() == 0,
    )
    self._has_trained = False
    self._questions = questions
    self._health: RetrievalHealth | None = None  # of the main stage

  def log_ledger(self) -> None:
    """Logs where the time went, if there was a step."""
    if self._has_trained:
      logging.info("%s", self._ledger.line())

  def close(self) -> None:
    with contextlib.ExitStack() as stack:  # closes each, whichever fails
      stack.callback(self._profiler.close)
      stack.callback(self._checkpoints.close)
      stack.callback(self._writer.close)
      if self._health is not None:
        stack.callback(self._health.close)
      self._versions.close()
    if self._kept_indexes:
      self._remove_indexes([])

  def all_stages(
    self, stages: list[Stage], resume_from: int | None = None
  ) -> None:
    """Runs every stage, from the newest checkpoint or from `resume_from`."""
    if resume_from is not None:
      self._divergence.check_start(resume_from)
      self._go_back(resume_from)
    latest = self._checkpoints.newest_whole(self._open_indexes)
    extra = {} if latest is None else self._checkpoints.read_extra(latest)
    if latest is None:
      self._writer.truncate_after(stages[0].name, 0)
    else:
      if jax.process_index() and (why := self._open_indexes(latest, extra)):
        raise ValueError(
          f"The checkpoint of step {latest} cannot be used on this host: {why}"
          " Expected every host to see the same --workdir. Mount it there."
        )
      self._versions.connect()
      check_end(stages[-1], latest)
      self._divergence.check_start(latest)
      self._divergence.begin_at(latest)
      self._divergence.lowest = extra.get("lowest_loss", {})
      self._went_back_to += extra.get("went_back_to", [])
      self._writer.truncate_after(extra["stage"], extra["stage_step"])
      self.clock = Clock(**extra["clock"])
      self._ledger.continue_from(self.clock.ledger)
      self._cut = CutCounter(self.clock.cut)
      best = self._checkpoints.best_step()
      self._best = None if best is None else self._checkpoints.metric(best)
      logging.info("Resuming from the checkpoint of step %d.", latest)
    params, layout = init_params(
      self._experiment.init,
      self._key,
      self._experiment.mesh,
      self._experiment.initial.params,
    )
    if self._config.index.path and not self._experiment.closed_book:
      self._adopt_index(params)
    names = [stage.name for stage in stages]
    # Skip the stages before the checkpoint's.
    for stage in stages[names.index(extra["stage"]) if extra else 0 :]:
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
        kept = search_in_step.abstract_index(self._experiment, params)
        abstract = dataclasses.replace(abstract, index=kept)
      free(state)
      with self._ledger.span("checkpoint"):
        state, _ = self._checkpoints.restore(abstract, latest)
      doc_ids = self._own_rows(extra["doc_ids"], stage)
    step = int(state.step)
    with self._ledger.span("refresh"):
      if stage.in_step:
        state, state_layout = search_in_step.place_index(
          self._experiment, state, state_layout, stage.in_step
        )
      elif main and not (
        extra or self._experiment.closed_book or self._config.index.path
      ):
        self._versions.start(self._snapshots.take(state.params))
    if step >= stage.num_steps:
      if main and not stage.num_steps and not extra:
        self._save_unchanged(stage, state)
      return state.params
    index = self._versions.index if main else None
    if main and not self._experiment.closed_book:
      assert stage.batches is not None
      self._health = RetrievalHealth(
        self._experiment, self._questions, stage.batches
      )
      self._health.rank_shift = extra.get("rank_shift")
    with self._ledger.span("data_wait"):
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
      functools.partial(
        stage.update_fn, trained=trained(self._config, stage.name, params)
      ),
      jax.process_count() > 1,
    )
    with self._ledger.span("compile"):
      compiled = update.lower(
        state,
        self._to_devices(first.batch, stage),
        self._dropout_key,
        *self._stop.to_send(self._experiment.mesh),
      ).compile()
      if main:  # compiles what validation needs, outside the clock
        self._validate(
          state.params, search_in_step.searched(self._experiment, state, index)
        )
      if self._health is not None:
        self._health.compile(state.params, index)
    return self._steps(stage, compiled, state, step, first)

  def _save_unchanged(self, stage: Stage, state: TrainState) -> None:
    """Validates and saves the state of a main stage without steps."""
    index = search_in_step.searched(
      self._experiment, state, self._versions.index
    )
    values = self._validate(state.params, index)
    self._writer.write(0, stage.name, values)
    if from_first(stage.first_step in self._checkpoints.steps()):
      return  # the stage before ended with it
    versions = self._versions if self._versions.index else None
    self._save(stage, 0, state, Ahead(), versions, values, None)

  def _adopt_index(self, params: PyTree) -> None:
    """Opens index.path; the passage encoder does not train then."""
    self._versions.adopt(
      load_index(
        self._config.index.path,
        encoder_fingerprint=fingerprint(self._snapshots.take(params)),
        passages_fingerprint=self._experiment.passages.fingerprint,
        spread=True,
      )
    )

  def _go_back(self, step: int) -> None:
    """Sets aside the checkpoints after `step`, except those of this command.

    A job that is started again with the same flags continues where it stopped.
    """
    last = self._checkpoints.latest_step() or 0
    extra = self._checkpoints.peek_extra(last) if last > step else {}
    learns = json.loads(json.dumps(learning_of(self._config)))
    before = extra.get("config", {})
    same = step in extra.get("went_back_to", []) and all(
      # A checkpoint of an older version lacks newer settings.
      before.get(section, {}).get(name, value) == value
      for section, settings in learns.items()
      for name, value in settings.items()
    )
    if from_first(same):
      logging.info(
        "The checkpoint of step %d was made after --resume_from=%d with this"
        " config: the run continues from there.",
        *(last, step),
      )
      return
    self._checkpoints.set_aside_after(step)
    self._went_back_to = [step]

  def _open_indexes(self, step: int, extra: dict[str, Any]) -> str:
    """Opens the indexes of a checkpoint; returns an error message, or "".

    Raises:
      ValueError: the checkpoint of `step` had other inputs than the run.
    """
    if not extra:
      return "Its record of the run cannot be read."
    check_identity(extra["identity"], self._identity, step)
    if extra["index_versions"]:
      try:
        self._versions.restore(
          extra["index_versions"], self._experiment.passages.fingerprint
        )
      except (FileNotFoundError, ValueError) as error:
        return f"It needs an index that cannot be used: {error}"
    return ""

  def _retriever_params(self, params: PyTree) -> PyTree | None:
    closed_book = self._experiment.closed_book
    if closed_book:
      return None
    return self._snapshots.take(params, embeds_passages=False)

  def _to_devices(self, batch: PyTree, stage: Stage) -> PyTree:
    return place_batch(batch, self._experiment.mesh, stage.batch_size)

  def _own_rows(
    self, doc_ids: Sequence[Sequence[int]], stage: Stage
  ) -> Int[np.ndarray, "B K"] | None:
    """Returns this process's rows of the documents in a checkpoint."""
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
    health = self._health
    span, self._has_trained = self._ledger.span, True
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
          with span("refresh"):
            old = versions.index
            versions.swap_if_due(step)
            if health and old and versions.index and versions.index is not old:
              health.refreshed(
                old, versions.index, self._snapshots.take(state.params)
              )
        if main:
          self._profiler.before(step + 1)
        index = versions.index if versions else None
        last = step + 1 == stage.num_steps
        # After the last step too, since a later command may extend the run.
        more = not last or main
        # Before the update, which donates the parameters it is given.
        outside = more and not stage.in_step
        retriever = self._retriever_params(state.params) if outside else None
        with span("step"):
          state, metrics = update(
            state,
            self._to_devices(prepared.batch, stage),
            self._dropout_key,
            *self._stop.to_send(self._experiment.mesh),
          )
        self._stop.receive(metrics)
        doc_ids = metrics.pop(search_in_step.DOC_IDS, prepared.doc_ids)
        self._divergence.follow(metrics, stage, step + 1)
        if more:
          ahead.submit(stage.prepare, step + 1, retriever, index)
        step += 1
        if main:
          self._profiler.after(step, state.step)
        self._cut.add(prepared.cut)
        if stage.in_step:
          self._cut.add_contexts(
            metrics["train/contexts_cut"],
            stage.batch_size * self._config.data.n_docs,
          )
        if versions and versions.is_due(step):
          versions.refresh(step, self._snapshots.take(state.params))
        values: dict[str, float] = {}
        validate = main and _is_due(step, config.validate_steps, last)
        log = _is_due(step, config.log_steps, last) or validate
        if log:
          with span("step"):  # waits until it is done
            values = {k: float(v) for k, v in metrics.items()}
          self._divergence.check_metrics(values, stage, step)
          speed = progress.questions_per_sec(step)
          values |= {
            f"{stage.name}/data_wait_secs": waited / (step - logged_step),
            f"{stage.name}/questions_per_second": speed,
          }
          values |= self._utilisation.mfu(speed) if main else {}
          values |= memory(stage.name, jax.local_devices())
          if versions:
            values["train/index_staleness_steps"] = (
              step - versions.version if self._trains_passages else 0
            )
            values["train/index_staleness_max_steps"] = values[
              "train/index_staleness_steps"
            ]
            values["train/distinct_docs"] = (
              np.unique(doc_ids).size / doc_ids.size
            )
          if health:
            if stage.in_step:  # of all processes
              rows = process_rows(self._experiment.mesh, stage.batch_size)
              doc_ids = np.asarray(doc_ids)[rows]
            values |= health.metrics(step, doc_ids, values)
          waited, logged_step = 0.0, step
        if validate:
          began = time.perf_counter()
          with progress.paused(), span("validation"):
            searched = search_in_step.searched(self._experiment, state, index)
            values |= self._validate(state.params, searched)
            if health:
              values |= health.utility(state.params, step, doc_ids, index)
          paused += time.perf_counter() - began
        if log:
          values |= self._ledger.metrics()
          self._writer.write(step, stage.name, values)
          logging.info(
            "%s", progress.line(step, stage.num_steps, stage.name, values)
          )
        tick()
        due = _is_due(step, config.checkpoint_steps, last and main)
        with span("step"):
          stopping = self._stop.agreed()
        due |= self._is_best(values) or bool(stopping)
        if due:
          with span("step"):
            # Otherwise diverged checkpoints could replace all good ones.
            self._divergence.check_metrics(metrics, stage, step)
            loss = float(metrics[f"{stage.name}/loss"])
          with span("checkpoint"):
            self._save(stage, step, state, ahead, versions, values, loss)
        if stopping and not (last and main):
          raise StoppedEarlyError(stopping, stage.first_step + step)
        if not last:
          with span("step"):
            prepared, secs = ahead.take(lambda s=state: s.step.is_ready())
            self._ledger.move("data_wait", secs)
          waited += secs
    finally:
      ahead.close()
      tick()
    return state.params

  def _is_best(self, values: dict[str, float]) -> bool:
    if _BEST not in values:
      return False
    # From memory, since hosts may see different checkpoints on a shared disk.
    return self._best is None or values[_BEST] > self._best

  def _save(
    self,
    stage: Stage,
    step: int,
    state: TrainState,
    ahead: Ahead,
    versions: IndexVersions | None,
    values: dict[str, float],
    loss: float | None,
  ) -> None:
    """Saves all that the run needs to continue as if it had not stopped."""
    # Both wait for threads: what follows communicates between hosts, and
    # nothing else may communicate at the same time.
    pending = ahead.peek()
    index_versions = versions.save() if versions else []
    self._divergence.check_state(state, stage, step)
    doc_ids = []
    if pending is not None:
      rows = process_rows(self._experiment.mesh, stage.batch_size)
      doc_ids = join_rows(pending.doc_ids, rows, stage.batch_size).tolist()
    self.clock.cut = self._cut.total()
    self.clock.ledger = self._ledger.secs()
    # The same in every process, except for clock and index files, where those
    # of the first process count.
    extra = {
      "stage": stage.name,
      "stage_step": step,
      "doc_ids": doc_ids,
      "index_versions": index_versions,
      "clock": dataclasses.asdict(self.clock),
      "identity": self._identity,
      "went_back_to": self._went_back_to,
      "rank_shift": self._health and self._health.newest_rank_shift(),
      "config": dataclasses.asdict(self._config),
      "metrics": {k: v for k, v in values.items() if math.isfinite(v)},
      "lowest_loss": self._divergence.lowest,
    }
    self._writer.sync()
    kept_state = search_in_step.without_tokens(state)
    metric = values.get(_BEST)
    name = stage.first_step + step
    if versions:
      self._remove_indexes(index_versions)
      self._kept_indexes[name] = index_versions
    self._checkpoints.save(
      name, kept_state, extra, metric, loss, self._divergence.proven
    )
    self._divergence.begin_at(name)
    if self._is_best(values):
      self._best = metric

  def _remove_indexes(self, in_use: Sequence[int]) -> None:
    """Removes the versions that no checkpoint could be resumed with."""
    needed = set(in_use)
    for step in self._checkpoints.steps():
      if step not in self._kept_indexes:
        found = self._checkpoints.peek_extra(step)
        self._kept_indexes[step] = found.get("index_versions", [])
      needed.update(self._kept_indexes[step])
    self._versions.remove_except(needed)


def _is_due(step: int, every: int, last: bool) -> bool:
  """Returns whether an action of every `every` steps, and the last, is due."""
  return last or (every > 0 and step % every == 0)
