"""Saves and restores checkpoints, and detects damaged files.

In: a pytree of arrays (the train state) and JSON data (the position in the
dataset, the config). Out: the same two, on any mesh, bit for bit. The only file
that imports orbax.

One checkpoint is one folder, named by its step:

    DIRECTORY/200/state/         the arrays, written by orbax
    DIRECTORY/200/extra/         the JSON, written by orbax
    DIRECTORY/200/manifest.json  a digest of every file above, written last
    DIRECTORY/200.damaged/       a checkpoint that failed the checks

Orbax silently restores flipped bits and casts to another dtype. The manifest
therefore stores the digests, and the shape and dtype of each array. Orbax
ignores it, because orbax items are subfolders. It is copied and deleted with
the folder of its step. Digests are computed in the background during training
and checked when a checkpoint is read.
"""

from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
import contextlib
import itertools
import math
import os
import sys
from typing import Any

from absl import logging
from etils import epath
from jaxtyping import PyTree
import orbax.checkpoint as ocp

from rag_jax import artifacts
from rag_jax import disk
from rag_jax.json_input import read_settings
from rag_jax.processes import first_alone
from rag_jax.processes import from_first
from rag_jax.processes import wait_for_all
from rag_jax.training import orbax_messages
from rag_jax.training.checkpoint_checks import arrays_of
from rag_jax.training.checkpoint_checks import check_extra
from rag_jax.training.checkpoint_checks import check_fit
from rag_jax.training.checkpoint_checks import check_state

FORMAT = 1  # raise when the files or the manifest change their meaning

_KIND = "checkpoint"
_EXTRA_FILE = "extra/metadata"  # the name that orbax gives to JSON


class Checkpointer:
  """The checkpoints in one directory.

  A checkpoint is complete when its manifest exists. A checkpoint without one
  is ignored: its save was interrupted. Old checkpoints are removed only after
  the new one is complete, so that there is always one to resume from.

  With several processes, all must call `save`, on a shared directory. Methods
  that read or write checkpoints wait for a save that is still running.
  """

  def __init__(
    self, directory: epath.PathLike, *, keep_last: int, process_index: int = 0
  ):
    """Opens `directory`; the first save creates it.

    Args:
      directory: where the checkpoints are or will be.
      keep_last: number of latest checkpoints to keep, in addition to the best.
      process_index: index of this process; process 0 writes the manifests.
    """
    if keep_last < 1:
      raise ValueError(
        f"keep_last={keep_last} would remove every checkpoint; expected at"
        " least 1. Set train.keep_checkpoints to 1 or more."
      )
    directory = epath.Path(directory)
    if artifacts.is_local(directory):
      directory = epath.Path(os.path.abspath(directory))  # orbax needs it
    self._directory = directory
    self._keep_last = keep_last
    self._process_index = process_index
    self._reported: set[int] = set()  # incomplete or damaged, already logged
    self._whole: set[int] = set()  # steps whose files passed the checks
    self._thread = futures.ThreadPoolExecutor(1)
    self._saving: futures.Future[None] | None = None
    orbax_messages.quieten()

  def save(
    self,
    step: int,
    state: PyTree,
    extra: Mapping[str, Any],
    metric: float | None = None,
    loss: float | None = None,
    proven: int | None = None,
  ) -> None:
    """Copies the state to the host and starts writing a checkpoint.

    The checkpoint is complete when `wait` returns.

    Args:
      step: training step; the name of the checkpoint.
      state: any pytree of `jax.Array`, which may be donated afterwards.
      extra: JSON data. Tuples are restored as lists, keys as strings.
      metric: validation metric, higher is better. A value that is not finite
        counts as None.
      loss: training loss of the step. If no checkpoint has a metric, the one
        with the lowest loss is kept too: when a run diverges slowly, the latest
        few are all bad.
      proven: step of a complete checkpoint that is kept until a later one is
        proven, since nobody knows yet whether the state is good.

    Raises:
      UnwritableError: this checkpoint or the previous one could not be written.
        Earlier checkpoints are kept.
      TypeError: a leaf of `state` is not a `jax.Array`, or `extra` cannot be
        written as JSON.
      ValueError: `step` is negative, or already has a complete checkpoint.
    """
    if step < 0:
      raise ValueError(f"step={step} must be at least 0; it names a folder.")
    self.wait()
    if proven is not None and self._process_index == 0:
      self._remove_old(proven)  # so that there is room for the new one
    check_state(state)
    check_extra(extra)
    if not math.isfinite(metric or 0.0):
      logging.warning("Step %d: metric %s never counts as best.", step, metric)
      metric = None
    folder = self._folder(step)
    if (folder / artifacts.MANIFEST).exists():
      raise ValueError(
        f"There is a complete checkpoint of step {step} in {self._directory}"
        f" already; expected to save each step once. Delete {folder} first,"
        " or save in another directory."
      )
    # All processes look before any file below changes.
    wait_for_all("checkpoint: looked")
    if self._process_index == 0 and folder.exists():
      folder.rmtree()  # left by an interrupted save
    wait_for_all("checkpoint: cleared")
    items = ocp.args.Composite(
      state=ocp.args.StandardSave(state),
      extra=ocp.args.JsonSave(dict(extra)),
    )
    content = {
      "step": step,
      "metric": metric,
      "loss": loss,
      "arrays": arrays_of(state),
    }
    self._whole.discard(step)
    with _saying_what_to_do(folder):
      manager = self._manager(create=True)
      manager.save(step, args=items, force=True)  # the caller chose the step
    self._saving = self._thread.submit(
      self._complete, manager, step, content, proven
    )

  def _complete(
    self,
    manager: ocp.CheckpointManager,
    step: int,
    content: dict[str, Any],
    proven: int | None,
  ) -> None:
    """Writes the manifest when orbax has finished; removes old checkpoints."""
    folder = self._folder(step)
    with _saying_what_to_do(folder):
      with manager:
        manager.wait_until_finished()
      if self._process_index == 0:
        artifacts.write_manifest(
          folder, kind=_KIND, format=FORMAT, content=content
        )
        self._remove_old(step, proven)

  def wait(self) -> None:
    """Blocks until every save is complete.

    Raises:
      UnwritableError: the last checkpoint could not be written.
    """
    saving, self._saving = self._saving, None
    if saving is not None:
      saving.result()

  def close(self) -> None:
    """Waits until every save is complete, then stops the writer thread."""
    self._thread.shutdown()
    self.wait()

  def steps(self) -> list[int]:
    """Returns the steps with a complete checkpoint, in ascending order."""
    self.wait()
    complete, incomplete = self._find()
    for step in incomplete:
      if step not in self._reported:
        self._reported.add(step)
        logging.warning(
          "The checkpoint of step %d in %s has no %s, so its save was cut off"
          " (or still runs in another process). It is ignored.",
          step,
          self._directory,
          artifacts.MANIFEST,
        )
    return complete

  def latest_step(self) -> int | None:
    """Returns the latest step with a complete checkpoint, or None."""
    return max(self.steps(), default=None)

  def best_step(self) -> int | None:
    """Returns the step with the highest metric; the later one of a tie."""
    return self._best_of(self.steps())

  def newest_whole(
    self, problem: Callable[[int, dict[str, Any]], str] = lambda step, extra: ""
  ) -> int | None:
    """Returns the latest step with a usable checkpoint; None if there is none.

    Later, damaged checkpoints are renamed to 200.damaged and logged; they are
    never read again. Process 0 reads the files and every process gets its
    answer.

    Args:
      problem: (step, extra) -> any other reason to reject the checkpoint, or
        "". Only process 0 calls it.

    Raises:
      ValueError: every checkpoint is damaged, or one was written by a newer
        version of rag_jax. Nothing is renamed.
    """
    return self._first_whole(lambda: self.steps()[::-1], problem)

  def best_whole(self) -> int | None:
    """Returns the undamaged step with the highest metric.

    If no undamaged checkpoint has a metric, returns the latest one. Damaged
    checkpoints are renamed, and errors raised, as in `newest_whole`.
    """
    return self._first_whole(
      lambda: sorted(self.steps(), key=self._rank, reverse=True),
      lambda step, extra: "",
    )

  def set_aside_after(self, step: int) -> None:
    """Renames the checkpoints after `step` to, say, 250.left and logs it.

    Training can then resume from `step` and save the later steps again.

    Raises:
      FileNotFoundError: there is no complete checkpoint of `step`.
      ValueError: that checkpoint is damaged.
    """

    def act() -> None:
      self._read_whole(self._choose(step))
      for later in self.steps():
        if later > step:
          path = self._set_aside(later, "left")
          logging.info(
            "The checkpoint of step %d, after --resume_from=%d, is now %s. It"
            " is no longer used and can be deleted.",
            *(later, step, path),
          )

    is_first = self._process_index == 0
    first_alone("go back", act if is_first else lambda: None)

  def restore(
    self, abstract_state: PyTree, step: int | None = None
  ) -> tuple[PyTree, dict[str, Any]]:
    """Checks a checkpoint and returns its state and its `extra`.

    Args:
      abstract_state: pytree of `jax.ShapeDtypeStruct`, each with a sharding.
        The sharding may differ from the one the array was saved with.
      step: which checkpoint; None: the latest.

    Raises:
      FileNotFoundError: there is no such checkpoint.
      ValueError: a file is missing, truncated or changed; or `abstract_state`
        has other arrays, shapes or dtypes, or leaves without a sharding.
    """
    step = self._choose(step)
    saved = self._verify(step)["arrays"]
    check_fit(saved, abstract_state, origin=str(self._folder(step)))
    with self._manager(create=False) as manager:
      restored = manager.restore(
        step,
        args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state)),
      )
    return restored.state, self._read_extra(step)

  def read_extra(self, step: int) -> dict[str, Any]:
    """Returns the `extra` of a checkpoint; checks and raises as `restore`."""
    self._verify(self._choose(step))
    return self._read_extra(step)

  def peek_extra(self, step: int) -> dict[str, Any]:
    """Returns the `extra` of an unchecked checkpoint; {} if unreadable."""
    try:
      return self._read_extra(step)
    except (OSError, ValueError) as error:
      logging.warning(
        "The checkpoint of step %d in %s is damaged and cannot be resumed from:"
        " %s",
        *(step, self._directory, str(error).splitlines()[:1]),
      )
      return {}

  def _read_extra(self, step: int) -> dict[str, Any]:
    # Without orbax, which synchronises processes: only one may call this.
    return read_settings(self._folder(step) / _EXTRA_FILE)

  def _folder(self, step: int) -> epath.Path:
    return self._directory / str(step)

  def _manager(self, *, create: bool) -> ocp.CheckpointManager:
    """Returns an orbax manager for one operation.

    Opening takes milliseconds, and a manager kept open would remember folders
    deleted since. It keeps all steps, as it would remove old ones too early.
    """
    return ocp.CheckpointManager(
      self._directory,
      options=ocp.CheckpointManagerOptions(
        # Otherwise orbax accepts an empty or half-written folder.
        atomicity_options=ocp.options.AtomicityOptions(
          mode=ocp.options.AtomicityMode.COMMIT_FILE
        ),
        create=create,
        enable_async_checkpointing=create,
        # Reads no files of the other steps, which may be damaged.
        lightweight_initialize=True,
        save_root_metadata=False,
      ),
    )

  def _find(self) -> tuple[list[int], list[int]]:
    """Returns the complete and the incomplete steps, in ascending order."""
    complete, incomplete = [], []
    if not self._directory.exists():
      return complete, incomplete
    for folder in self._directory.iterdir():
      name = folder.name
      if name.isdecimal() and name == str(int(name)) and folder.is_dir():
        found = (folder / artifacts.MANIFEST).exists()
        (complete if found else incomplete).append(int(name))
    return sorted(complete), sorted(incomplete)

  def metric(self, step: int) -> float | None:
    """Returns the metric of a complete step, without checking its files."""
    return _finite(self._noted(step).get("metric"))

  def loss(self, step: int) -> float | None:
    """Returns the loss of a complete step, without checking its files."""
    return _finite(self._noted(step).get("loss"))

  def left(self) -> list[tuple[int, str, float | None, list[int]]]:
    """Returns the complete checkpoints that --resume_from set aside.

    In ascending order, of each: its step, the name of its folder, its loss and
    the index versions that it needs.
    """
    found = []
    for path in self._directory.glob(f"*.left*/{artifacts.MANIFEST}"):
      with contextlib.suppress(ValueError, KeyError, TypeError, OSError):
        content = artifacts.peek_manifest(path.parent, remedy="")["content"]
        needed = read_settings(path.parent / _EXTRA_FILE)["index_versions"]
        loss = _finite(content.get("loss"))
        found.append((int(content["step"]), path.parent.name, loss, needed))
    return sorted(found, key=lambda checkpoint: checkpoint[:2])

  def how_to_use_left(self, name: str) -> str:
    """Returns what to do to resume from the folder `name` in `left()`."""
    step, _, _ = name.partition(".")
    folder = self._directory / step
    first = f"remove {folder}, " if folder.exists() else ""
    return (
      f"{first}rename {self._directory / name}, which is from before that, to"
      f" {folder}, and run the command with --resume_from={step}."
    )

  def _rank(self, step: int) -> tuple[bool, float, int]:
    """Returns a sort key for steps: those without a metric come first."""
    metric = self.metric(step)
    return (metric is not None, metric or 0.0, step)

  def _best_of(self, steps: list[int]) -> int | None:
    rated = [step for step in steps if self.metric(step) is not None]
    return max(rated, key=self._rank, default=None)

  def _noted(self, step: int) -> dict[str, Any]:
    """Returns the content of a manifest; {} if it is damaged.

    The manifest has a digest of its own. The files that it names are not read.
    """
    manifest = self._manifest(step)
    return {} if manifest is None else manifest["content"]

  def _manifest(self, step: int) -> dict[str, Any] | None:
    """Returns a manifest whose files are not checked; None if it is damaged."""
    try:
      return artifacts.peek_manifest(self._folder(step), remedy="")
    except (OSError, ValueError) as error:
      if step not in self._reported:
        self._reported.add(step)
        logging.warning(
          "The manifest of the checkpoint of step %d is damaged: %s Its metric"
          " and loss are not known, so it is kept, but never counts as best.",
          *(step, str(error).strip()),
        )
      return None

  def _choose(self, step: int | None) -> int:
    """Returns the step to read; raises `FileNotFoundError` if it is missing."""
    steps = self.steps()
    if step is None:
      if steps:
        return steps[-1]
      raise FileNotFoundError(
        f"There is no complete checkpoint in {self._directory}; expected one"
        " to restore. Train first, or check the path."
      )
    if step not in steps:
      raise FileNotFoundError(
        f"There is no complete checkpoint of step {step} in"
        f" {self._directory}. Choose one of {steps}."
      )
    return step

  def _first_whole(
    self,
    candidates: Callable[[], list[int]],
    problem: Callable[[int, dict[str, Any]], str],
  ) -> int | None:
    """Returns the first usable candidate; renames the damaged ones before."""

    def act() -> int | None:
      bad: dict[int, str] = {}
      steps = candidates()
      for step in steps:
        why = self._problem(step) or problem(step, self.peek_extra(step))
        if why:
          bad[step] = why
        else:
          for damaged, what in bad.items():
            logging.warning(
              "The checkpoint of step %d cannot be used: %s It is now %s. The"
              " run goes on from step %d, which is whole.",
              *(damaged, what, self._set_aside(damaged, "damaged"), step),
            )
          return step
      if bad:
        step, why = next(iter(bad.items()))
        raise ValueError(
          f"The checkpoint of step {step} cannot be used: {why} Expected the"
          " files as they were saved. No earlier checkpoint is whole: restore"
          f" {self._folder(step)} from a copy, or start in another workdir."
        )
      return None

    is_first = self._process_index == 0
    found = first_alone(
      "find a whole checkpoint", act if is_first else lambda: None
    )
    step = from_first(-1 if found is None else found)
    if step < 0:
      return None
    self._whole.add(step)
    return step

  def _problem(self, step: int) -> str:
    """Returns what is wrong with the files of a step, or "".

    Raises:
      ValueError: a newer version of rag_jax wrote them; that is not damage.
    """
    try:
      self._read_whole(step)
    except (FileNotFoundError, ValueError) as error:
      if (self._manifest(step) or {"format": 0})["format"] > FORMAT:
        raise
      return str(error).strip()
    return ""

  def _set_aside(self, step: int, word: str) -> epath.Path:
    """Renames a checkpoint so that it is ignored; returns the new path."""
    self._whole.discard(step)
    names = (f"{step}.{word}{n or ''}" for n in itertools.count())
    paths = (self._directory / name for name in names)
    path = next(path for path in paths if not path.exists())
    return self._folder(step).rename(path)

  def _verify(self, step: int) -> dict[str, Any]:
    """Checks every file of a step and returns the content of its manifest."""
    if step in self._whole:  # process 0 checked it, if there are several
      return artifacts.peek_manifest(self._folder(step), remedy="")["content"]
    try:
      return self._read_whole(step)
    except (FileNotFoundError, ValueError) as error:
      good = self._last_good_before(step)
      folder = self._folder(step)
      remedy = f"Delete {folder} to resume from step {good}, which is whole."
      if good is None:
        remedy = (
          f"No earlier checkpoint is whole: restore {folder} from a copy, or"
          " start in another workdir."
        )
      raise ValueError(
        f"The checkpoint of step {step} cannot be used: {str(error).strip()}"
        f" Expected the files as they were saved. {remedy}"
      ) from error

  def _read_whole(self, step: int) -> dict[str, Any]:
    content = artifacts.read_manifest(
      self._folder(step), kind=_KIND, format=FORMAT, remedy=""
    )
    if content.get("step") != step:
      raise ValueError(
        f"{self._folder(step)} holds step {content.get('step')}: the folder"
        " was renamed."
      )
    self._whole.add(step)
    return content

  def _last_good_before(self, step: int) -> int | None:
    for earlier in reversed(self.steps()):
      with contextlib.suppress(FileNotFoundError, ValueError):
        if earlier < step and self._read_whole(earlier):
          return earlier
    return None

  def _remove_old(self, saved: int, proven: int | None = None) -> None:
    """Removes all checkpoints but the latest few, the best and these two.

    One whose manifest is damaged stays: it may be the best.
    """
    complete, incomplete = self._find()
    complete = [step for step in complete if self._manifest(step) is not None]
    best = self._best_of(complete)
    if best is None:
      losses = [(self.loss(step), step) for step in complete]
      rated = [(loss, step) for loss, step in losses if loss is not None]
      best = min(rated, default=(0.0, None))[1]
    keep = {saved, proven, best, *complete[-self._keep_last :]}
    old = [step for step in complete if step not in keep]
    for step in old + [step for step in incomplete if step < saved]:
      folder = self._folder(step)
      # Manifest first: if interrupted, the step is incomplete, not damaged.
      (folder / artifacts.MANIFEST).unlink(missing_ok=True)
      folder.rmtree()


def _finite(value: Any) -> float | None:
  """Returns a number of a manifest; None if it is no finite number."""
  is_number = type(value) in (int, float)
  return value if is_number and abs(value) <= sys.float_info.max else None


@contextlib.contextmanager
def _saying_what_to_do(folder: epath.Path) -> Iterator[None]:
  """Replaces any error of the library by an `UnwritableError`."""
  try:
    yield
  except Exception as error:  # a full disk raises many types
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    why = (lines[0] if lines else type(error).__name__).rstrip(".")
    raise disk.UnwritableError(
      f"The checkpoint {folder} could not be saved: {why}. Expected a folder"
      " that can be written to, on a disk with enough room. Make room, or"
      " change its permissions, and run the same command again: it resumes from"
      " the previous checkpoint."
    ) from error
