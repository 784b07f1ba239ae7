"""Checkpoints that are whole, or say which of their files is not.

In: a pytree of arrays (the train state) and what JSON can hold (the position
in the data, the config). Out: the two again, on any mesh, bit for bit. The
only file that imports orbax.

One checkpoint is one folder, named by its step:

    DIRECTORY/200/state/         the arrays, written by orbax
    DIRECTORY/200/extra/         the JSON, written by orbax
    DIRECTORY/200/manifest.json  a digest of every file above, written last

Orbax checks neither: it restores a flipped bit, or casts to another dtype,
without a word. So the manifest has the digests, and each array's shape and
dtype. Orbax ignores it, as its items are subfolders; lying in the folder of its
step, it is copied and deleted with it.
"""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import json
import logging as python_logging
import math
import os
from typing import Any

from absl import logging
from etils import epath
import jax
from jaxtyping import PyTree
import orbax.checkpoint as ocp

from rag_jax import artifacts
from rag_jax.processes import wait_for_all

FORMAT = 1  # raise when the files or the manifest change their meaning

_KIND = "checkpoint"
_NAMES_SHOWN = 10  # in a message about arrays that do not fit


class Checkpointer:
  """The checkpoints in one directory.

  A checkpoint is complete when its manifest exists. One without, whose save was
  cut off, is ignored. Old checkpoints are removed after the new one is complete
  and no sooner, so that there is always one to resume from.

  Of several processes, all call `save`, on a directory that all of them see.
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
    python_logging.getLogger("absl").addFilter(_orbax_warnings_only)

  def save(
    self,
    step: int,
    state: PyTree,
    extra: Mapping[str, Any],
    metric: float | None = None,
  ) -> None:
    """Writes one checkpoint; it is complete when this returns.

    Args:
      step: names the checkpoint.
      state: any pytree of `jax.Array`.
      extra: what JSON can hold. Tuples come back as lists, keys as strings.
      metric: how good it is, more is better. Not finite counts as None.

    Raises:
      TypeError: a leaf of `state` is no `jax.Array`, or JSON cannot hold
        `extra`.
      ValueError: `step` is negative, or has a complete checkpoint already.
    """
    if step < 0:
      raise ValueError(f"step={step} must be at least 0; it names a folder.")
    _check_state(state)
    _check_extra(extra)
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
    wait_for_all(
      "checkpoint: looked"
    )  # nobody may find the files below, which change
    if self._process_index == 0 and folder.exists():
      folder.rmtree()  # a save that was cut off
    wait_for_all("checkpoint: cleared")
    items = ocp.args.Composite(
      state=ocp.args.StandardSave(state),
      extra=ocp.args.JsonSave(dict(extra)),
    )
    with self._manager(create=True) as manager:
      manager.save(step, args=items, force=True)  # the caller chose the step
      manager.wait_until_finished()
    if self._process_index == 0:
      artifacts.write_manifest(
        folder,
        kind=_KIND,
        format=FORMAT,
        content={"step": step, "metric": metric, "arrays": _arrays(state)},
      )
      self._remove_old(step)
    wait_for_all("checkpoint: saved")

  def steps(self) -> list[int]:
    """Returns the steps that have a complete checkpoint, ascending."""
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
    metrics = {step: self.metric(step) for step in self.steps()}
    rated = [(m, step) for step, m in metrics.items() if m is not None]
    return max(rated)[1] if rated else None

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
    _check_fit(saved, abstract_state, origin=str(self._folder(step)))
    restored = self._read(
      step,
      state=ocp.args.StandardRestore(abstract_state),
      extra=ocp.args.JsonRestore(),
    )
    return restored.state, restored.extra

  def read_extra(self, step: int) -> dict[str, Any]:
    """Returns the extra of a checkpoint; checks and raises as `restore`."""
    self._verify(self._choose(step))
    return self._read(step, extra=ocp.args.JsonRestore()).extra

  def wait(self) -> None:
    """Returns once every save is complete: at once, as `save` waits itself."""

  def close(self) -> None:
    """Ends the use of the directory, once every save is complete."""
    self.wait()

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
        enable_async_checkpointing=False,
        # Reads nothing of the other steps, any of which may be damaged.
        lightweight_initialize=True,
        save_root_metadata=False,
      ),
    )

  def _read(self, step: int, **items: Any) -> ocp.args.Composite:
    with self._manager(create=False) as manager:
      return manager.restore(step, args=ocp.args.Composite(**items))

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
    manifest = self._folder(step) / artifacts.MANIFEST
    with contextlib.suppress(ValueError, KeyError, TypeError):
      return json.loads(manifest.read_bytes())["content"]["metric"]
    return None  # damaged: `restore` of this step says so

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

  def _verify(self, step: int) -> dict[str, Any]:
    """Returns the content of the manifest after checking every file."""
    try:
      return self._read_manifest(step)
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

  def _read_manifest(self, step: int) -> dict[str, Any]:
    content = artifacts.read_manifest(
      self._folder(step), kind=_KIND, format=FORMAT, remedy=""
    )
    if content.get("step") != step:
      raise ValueError(
        f"{self._folder(step)} holds step {content.get('step')}: the folder"
        " was renamed."
      )
    return content

  def _last_good_before(self, step: int) -> int | None:
    for earlier in reversed(self.steps()):
      with contextlib.suppress(FileNotFoundError, ValueError):
        if earlier < step and self._read_manifest(earlier):
          return earlier
    return None

  def _remove_old(self, saved: int) -> None:
    """Removes all but the last few, the best and what was just saved."""
    complete, incomplete = self._find()
    keep = {saved, self.best_step(), *complete[-self._keep_last :]}
    old = [step for step in complete if step not in keep]
    for step in old + [step for step in incomplete if step < saved]:
      folder = self._folder(step)
      # First: if it is cut off here, the step is incomplete, not damaged.
      (folder / artifacts.MANIFEST).unlink(missing_ok=True)
      folder.rmtree()


def _orbax_warnings_only(record: python_logging.LogRecord) -> bool:
  """Returns whether to log `record`: not orbax's 60 info lines for a save."""
  from_orbax = f"{os.sep}orbax{os.sep}" in record.pathname
  return record.levelno >= python_logging.WARNING or not from_orbax


def _leaves(tree: PyTree) -> Iterator[tuple[str, Any]]:
  """Yields ("params/encoder/kernel", leaf) of every leaf."""
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    yield jax.tree_util.keystr(path, simple=True, separator="/"), leaf


def _arrays(tree: PyTree) -> dict[str, list[Any]]:
  """Returns [shape, dtype] of every array, as JSON can hold it."""
  return {
    name: [list(leaf.shape), str(leaf.dtype)] for name, leaf in _leaves(tree)
  }


def _check_state(state: PyTree) -> None:
  """Raises `TypeError` unless every leaf is a `jax.Array`."""
  named = _leaves(state)
  bad = [f"{n}: {type(x)}" for n, x in named if not isinstance(x, jax.Array)]
  if bad:
    raise TypeError(
      f"The state to save has leaves that are no jax.Array: {_shown(bad)}."
      " Convert them with jnp.asarray, or put them into `extra`."
    )


def _check_extra(extra: Mapping[str, Any]) -> None:
  """Raises `TypeError` unless JSON can hold `extra`."""
  for name, value in extra.items():
    try:
      json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
      raise TypeError(
        f"extra[{name!r}] cannot be saved as JSON: {error}. Expected finite"
        " numbers, strings, and lists and dicts of them. Convert it, or save"
        " arrays in the state."
      ) from error


def _check_fit(
  saved: Mapping[str, Sequence[Any]], abstract_state: PyTree, *, origin: str
) -> None:
  """Raises `ValueError` unless the saved arrays are those of the state."""
  no_sharding = [
    name
    for name, leaf in _leaves(abstract_state)
    if getattr(leaf, "sharding", None) is None
  ]
  if no_sharding:
    raise ValueError(
      f"abstract_state has no sharding for {_shown(no_sharding)}; expected"
      " where to put each array. Give jax.ShapeDtypeStruct a `sharding`."
    )
  wanted = _arrays(abstract_state)
  problems = []
  if unknown := [name for name in saved if name not in wanted]:
    problems.append(f"saved, but not expected: {_shown(unknown)}")
  if missing := [name for name in wanted if name not in saved]:
    problems.append(f"expected, but not saved: {_shown(missing)}")
  different = [
    f"{name}: saved as {_typed(saved[name])}, expected {_typed(spec)}"
    for name, spec in wanted.items()
    if name in saved and saved[name] != spec
  ]
  if different:
    problems.append(_shown(different, "\n  "))
  if problems:
    lines = "\n  ".join(problems)
    raise ValueError(
      f"The checkpoint {origin} has other arrays than the model and optimizer"
      f" of this config:\n  {lines}\nUse the config that it was trained with,"
      " or another workdir."
    )


def _typed(spec: Sequence[Any]) -> str:
  """Returns "float32[3,4]" of [[3, 4], "float32"]."""
  shape, dtype = spec
  return f"{dtype}[{','.join(map(str, shape))}]"


def _shown(names: Sequence[str], separator: str = ", ") -> str:
  """Returns the first of `names`, and how many more there are."""
  more = len(names) - _NAMES_SHOWN
  tail = [f"and {more} more"] if more > 0 else []
  return separator.join([*names[:_NAMES_SHOWN], *tail])
