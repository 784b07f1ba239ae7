"""Checkpoints that are whole, or say which of their files is not.

In: a pytree of arrays (the train state) and what JSON can hold (the position
in the data, the config). Out: the two again, on any mesh, bit for bit. The
only file that imports orbax.

One checkpoint is one folder, named by its step:

    DIRECTORY/200/state/         the arrays, written by orbax
    DIRECTORY/200/extra/         the JSON, written by orbax
    DIRECTORY/200/manifest.json  a digest of every file above, written last
    DIRECTORY/200.damaged/       one that was found not to be whole

Orbax checks neither: it restores a flipped bit, or casts to another dtype,
without a word. So the manifest has the digests, and each array's shape and
dtype. Orbax ignores it, as its items are subfolders; lying in the folder of its
step, it is copied and deleted with it. Digests are made while training goes on,
and checked when a checkpoint is read.
"""

from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
import contextlib
import itertools
import json
import logging as python_logging
import math
import os
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
from rag_jax.training.checkpoint_checks import arrays_of
from rag_jax.training.checkpoint_checks import check_extra
from rag_jax.training.checkpoint_checks import check_fit
from rag_jax.training.checkpoint_checks import check_state

FORMAT = 1  # raise when the files or the manifest change their meaning

_KIND = "checkpoint"
_EXTRA_FILE = "extra/metadata"  # the name that orbax gives to JSON


class Checkpointer:
  """The checkpoints in one directory.

  A checkpoint is complete when its manifest exists. One without, whose save was
  cut off, is ignored. Old checkpoints are removed after the new one is complete
  and no sooner, so that there is always one to resume from.

  Of several processes, all call `save`, on a directory that all of them see.
  Whatever reads or writes checkpoints waits for a save that still runs.
  """

  def __init__(
    self, directory: epath.PathLike, *, keep_last: int, process_index: int = 0
  ):
    """Opens `directory`, which the first save makes.

    Args:
      directory: where the checkpoints are or will be.
      keep_last: how many of the last are kept; the best is kept beside them.
      process_index: of this process; process 0 writes the manifests.
    """
    if keep_last < 1:
      raise ValueError(
        f"keep_last={keep_last} would remove every checkpoint; expected at"
        " least 1. Set train.keep_checkpoints to 1 or more."
      )
    directory = epath.Path(directory)
    if artifacts.is_local(directory):
      directory = epath.Path(os.path.abspath(directory))  # as orbax demands
    self._directory = directory
    self._keep_last = keep_last
    self._process_index = process_index
    self._reported: set[int] = set()  # incomplete steps that were logged
    self._whole: set[int] = set()  # steps whose files were checked already
    self._thread = futures.ThreadPoolExecutor(1)
    self._saving: futures.Future[None] | None = None
    python_logging.getLogger("absl").addFilter(_orbax_warnings_only)

  def save(
    self,
    step: int,
    state: PyTree,
    extra: Mapping[str, Any],
    metric: float | None = None,
    loss: float | None = None,
  ) -> None:
    """Copies the state off the devices, and begins to write a checkpoint.

    It is complete when `wait` returns.

    Args:
      step: names the checkpoint.
      state: any pytree of `jax.Array`, which may be donated afterwards.
      extra: what JSON can hold. Tuples come back as lists, keys as strings.
      metric: how good it is, more is better. Not finite counts as None.
      loss: of the step. Where no metric says which checkpoint is best, the one
        with the lowest loss is kept too: if a run diverges slowly, the last few
        are all bad.

    Raises:
      UnwritableError: it, or the checkpoint before, could not be written. What
        was saved earlier stays.
      TypeError: a leaf of `state` is no `jax.Array`, or JSON cannot hold
        `extra`.
      ValueError: `step` is negative, or has a complete checkpoint already.
    """
    if step < 0:
      raise ValueError(f"step={step} must be at least 0; it names a folder.")
    self.wait()
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
    # Nobody may find the files below, which change.
    wait_for_all("checkpoint: looked")
    if self._process_index == 0 and folder.exists():
      folder.rmtree()  # a save that was cut off
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
    self._saving = self._thread.submit(self._complete, manager, step, content)

  def _complete(
    self, manager: ocp.CheckpointManager, step: int, content: dict[str, Any]
  ) -> None:
    """Writes the digests of a step once orbax is done; removes old steps."""
    folder = self._folder(step)
    with _saying_what_to_do(folder):
      with manager:
        manager.wait_until_finished()
      if self._process_index == 0:
        artifacts.write_manifest(
          folder, kind=_KIND, format=FORMAT, content=content
        )
        self._remove_old(step)

  def wait(self) -> None:
    """Returns once every save is complete.

    Raises:
      UnwritableError: the last one could not be written.
    """
    saving, self._saving = self._saving, None
    if saving is not None:
      saving.result()

  def close(self) -> None:
    """Ends the use of the directory, once every save is complete."""
    self._thread.shutdown()
    self.wait()

  def steps(self) -> list[int]:
    """Returns the steps that have a complete checkpoint, ascending."""
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
    """Returns the last step that has a complete checkpoint."""
    return max(self.steps(), default=None)

  def best_step(self) -> int | None:
    """Returns the step with the highest metric; of equal ones, the later."""
    return self._best_of(self.steps())

  def newest_whole(
    self, problem: Callable[[int, dict[str, Any]], str] = lambda step, extra: ""
  ) -> int | None:
    """Returns the last step whose checkpoint can be used; None: there is none.

    Later ones, which are damaged, are set aside and logged: as 200.damaged, a
    name that is never read again. Every process gets the same answer, for which
    the first one reads the files.

    Args:
      problem: (step, extra) -> what else is wrong with the checkpoint, or "".
        The first process calls it.

    Raises:
      ValueError: there are checkpoints, but none is whole; or one is of a newer
        version of rag_jax. Nothing is set aside.
    """
    return self._first_whole(lambda: self.steps()[::-1], problem)

  def best_whole(self) -> int | None:
    """Returns the step with the highest metric whose checkpoint is whole.

    If none with a metric is, the newest. What is damaged is treated as by
    `newest_whole`, which has the errors too.
    """
    return self._first_whole(
      lambda: sorted(self.steps(), key=self._rank, reverse=True),
      lambda step, extra: "",
    )

  def set_aside_after(self, step: int) -> None:
    """Renames the checkpoints after `step`, as 250.left, and says so.

    Training then goes on from `step`, and may save these steps again.

    Raises:
      FileNotFoundError: there is no complete checkpoint of `step`.
      ValueError: it is damaged.
    """

    def act() -> None:
      self._read_whole(self._choose(step))
      for later in self.steps():
        if later > step:
          path = self._set_aside(later, "left")
          logging.info(
            "The checkpoint of step %d, after --resume_from=%d, is now %s. It"
            " is not used any more and can be deleted.",
            *(later, step, path),
          )

    is_first = self._process_index == 0
    first_alone("go back", act if is_first else lambda: None)

  def restore(
    self, abstract_state: PyTree, step: int | None = None
  ) -> tuple[PyTree, dict[str, Any]]:
    """Returns the state and the extra of a checkpoint, after checking it.

    Args:
      abstract_state: `jax.ShapeDtypeStruct`s with a sharding each, which may
        differ from the one that the array was saved with.
      step: which checkpoint; None: the latest.

    Raises:
      FileNotFoundError: there is no such checkpoint.
      ValueError: a file is missing, cut off or changed; or `abstract_state`
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
    """Returns the extra of a checkpoint; checks and raises as `restore`."""
    self._verify(self._choose(step))
    return self._read_extra(step)

  def peek_extra(self, step: int) -> dict[str, Any]:
    """Returns the extra of a checkpoint unchecked; {} if it is unreadable."""
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
    # Not by orbax, in which processes wait for each other: one alone may ask.
    return read_settings(self._folder(step) / _EXTRA_FILE)

  def _folder(self, step: int) -> epath.Path:
    return self._directory / str(step)

  def _manager(self, *, create: bool) -> ocp.CheckpointManager:
    """Returns orbax's manager, for one operation.

    Opening takes milliseconds, and one that is kept would remember folders that
    were deleted since. It keeps all: it would remove old steps too early.
    """
    return ocp.CheckpointManager(
      self._directory,
      options=ocp.CheckpointManagerOptions(
        # Otherwise a folder that is empty or half written counts.
        atomicity_options=ocp.options.AtomicityOptions(
          mode=ocp.options.AtomicityMode.COMMIT_FILE
        ),
        create=create,
        enable_async_checkpointing=create,
        # Reads nothing of the other steps, any of which may be damaged.
        lightweight_initialize=True,
        save_root_metadata=False,
      ),
    )

  def _find(self) -> tuple[list[int], list[int]]:
    """Returns the complete and the incomplete steps, ascending."""
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
    return self._noted(step, "metric")

  def _rank(self, step: int) -> tuple[bool, float, int]:
    """Returns a key to sort steps by: first those without a metric."""
    metric = self.metric(step)
    return (metric is not None, metric or 0.0, step)

  def _best_of(self, steps: list[int]) -> int | None:
    rated = [step for step in steps if self.metric(step) is not None]
    return max(rated, key=self._rank, default=None)

  def _noted(self, step: int, name: str) -> Any:
    """Returns what the manifest of a complete step says, unchecked."""
    manifest = self._folder(step) / artifacts.MANIFEST
    with contextlib.suppress(ValueError, KeyError, TypeError):
      return json.loads(manifest.read_bytes())["content"][name]
    return None  # damaged, or of an older version

  def _choose(self, step: int | None) -> int:
    """Returns the step to read; raises `FileNotFoundError` if there is none."""
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
    """Returns the first candidate that can be used; sets aside those before."""

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
    """Returns what is wrong with the files of a step; "": nothing.

    Raises:
      ValueError: it is of a newer version of rag_jax, which is no damage.
    """
    newer = False
    manifest = self._folder(step) / artifacts.MANIFEST
    with contextlib.suppress(ValueError, KeyError, TypeError):
      newer = json.loads(manifest.read_bytes())["format"] > FORMAT
    try:
      self._read_whole(step)
    except (FileNotFoundError, ValueError) as error:
      if newer:
        raise
      return str(error).strip()
    return ""

  def _set_aside(self, step: int, word: str) -> epath.Path:
    """Returns the new name of a checkpoint, which is not found any more."""
    self._whole.discard(step)
    names = (f"{step}.{word}{n or ''}" for n in itertools.count())
    paths = (self._directory / name for name in names)
    path = next(path for path in paths if not path.exists())
    return self._folder(step).rename(path)

  def _verify(self, step: int) -> dict[str, Any]:
    """Returns the content of the manifest after checking every file."""
    if step in self._whole:  # by the first process, of several
      manifest = self._folder(step) / artifacts.MANIFEST
      return json.loads(manifest.read_bytes())["content"]
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

  def _remove_old(self, saved: int) -> None:
    """Removes all but the last few, the best and what was just saved."""
    complete, incomplete = self._find()
    best = self._best_of(complete)
    if best is None:
      losses = {step: self._noted(step, "loss") for step in complete}
      rated = [step for step in complete if losses[step] is not None]
      best = min(rated, key=lambda step: losses[step], default=None)
    keep = {saved, best, *complete[-self._keep_last :]}
    old = [step for step in complete if step not in keep]
    for step in old + [step for step in incomplete if step < saved]:
      folder = self._folder(step)
      # First: if it is cut off here, the step is incomplete, not damaged.
      (folder / artifacts.MANIFEST).unlink(missing_ok=True)
      folder.rmtree()


@contextlib.contextmanager
def _saying_what_to_do(folder: epath.Path) -> Iterator[None]:
  """Raises one `UnwritableError` in the place of a library's many errors."""
  try:
    yield
  except Exception as error:  # orbax and tensorstore have many for a full disk
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    why = (lines[0] if lines else type(error).__name__).rstrip(".")
    raise disk.UnwritableError(
      f"The checkpoint {folder} could not be saved: {why}. Expected a folder"
      " that can be written to, on a disk with enough room. Make room, or"
      " change its permissions, and run the same command again: it goes on from"
      " the checkpoint before."
    ) from error


def _orbax_warnings_only(record: python_logging.LogRecord) -> bool:
  """Returns whether to log `record`: of orbax's, the warnings.

  Not its 60 info lines for a save, nor its errors, which it raises too.
  """
  from_orbax = f"{os.sep}orbax{os.sep}" in record.pathname
  return record.levelno == python_logging.WARNING or not from_orbax
