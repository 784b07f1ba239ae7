"""The folder of one run: its lock, its config, and where its files are.

In: --workdir and the config of the run. Out: a `Workdir` that only this run
writes to, and whose checkpoints belong to the same experiment.
"""

import os
import stat
from typing import Any

from absl import logging
from etils import epath
import filelock
import jax

from rag_jax import artifacts
from rag_jax import disk
from rag_jax.config import Config
from rag_jax.config_json import differences
from rag_jax.config_json import read_config
from rag_jax.config_json import write_config
from rag_jax.config_rules import fields
from rag_jax.directory_lock import release_lock
from rag_jax.directory_lock import take_lock
from rag_jax.processes import first_alone
from rag_jax.training.metrics import METRICS_FILE

LOCK = ".lock"

# The files and folders that a run writes, apart from temporary ones.
_OWN = frozenset({
  LOCK, METRICS_FILE, "config.json", "checkpoints", "indexes", "model",
  "index", "tokenizer", "tokens", "tensorboard", "results.json",
  "learning_curves.png", "profile",
})  # fmt: skip
_REMOVE = "Remove it, or choose another --workdir."

_MAY_DIFFER = frozenset({
  "train.log_steps", "train.validate_steps", "train.checkpoint_steps",
  "train.keep_checkpoints", "train.vocab_chunk", "train.scan_layers",
  "train.remat", "train.accumulate", "train.length_groups",
  "train.pack_contexts", "train.dropout_prng",
  "train.peak_tflops", "train.profile_steps", "index.embed_batch_size",
  "data.token_cache",
})  # fmt: skip
_SECTIONS_MAY_DIFFER = ("eval.", "mesh.", "decoding.", "rerank.")
# Errors raised for a wrong setting or file. After any other error, such as a
# full disk or Ctrl-C, the new folders are kept so that the run can be resumed.
_REFUSALS = (ValueError, TypeError, ImportError, FileNotFoundError)
# Settings that may change when a run goes back to a checkpoint: all optimizer
# settings except those that the arrays of the optimizer state depend on.
_LEARNING = {
  "optimizer": (
    "peak_lr", "retriever_lr", "hybrid_lr", "warmup_steps", "schedule",
    "end_lr_ratio", "b1", "b2", "eps", "weight_decay", "clip_norm",
  ),
  "warmup": ("peak_lr", "retriever_lr", "warmup_steps"),
  "contrastive": ("retriever_lr", "warmup_steps"),
}  # fmt: skip


def learning_of(config: Config) -> dict[str, dict[str, Any]]:
  """Returns the values of the settings that `resume_from` may change."""
  return {
    section: {name: getattr(getattr(config, section), name) for name in names}
    for section, names in _LEARNING.items()
  }


class Workdir:
  """The paths of a run. If made by `open_workdir`, it holds the lock."""

  def __init__(
    self,
    path: epath.PathLike,
    lock: filelock.BaseFileLock | None = None,
    made: tuple[epath.Path, ...] = (),
  ):
    self.path = epath.Path(path)
    self._lock = lock
    self._made = made  # folders this run created, deepest first

  @property
  def config_path(self) -> epath.Path:
    """The JSON file of the run's config."""
    return self.path / "config.json"

  @property
  def checkpoints(self) -> epath.Path:
    """The directory of the checkpoints."""
    return self.path / "checkpoints"

  @property
  def indexes(self) -> epath.Path:
    """The directory of the built indexes, one folder per version."""
    return self.path / "indexes"

  @property
  def model(self) -> epath.Path:
    """The directory of the trained model; written when the run ends."""
    return self.path / "model"

  @property
  def index(self) -> epath.Path:
    """The directory of the trained model's index."""
    return self.path / "index"

  @property
  def tokenizer(self) -> epath.Path:
    """The directory of the tokenizer."""
    return self.path / "tokenizer"

  @property
  def tokens(self) -> epath.Path:
    """The cache directory of a passage store's tokens."""
    return self.path / "tokens"

  @property
  def profile(self) -> epath.Path:
    """The directory of the profile of train.profile_steps."""
    return self.path / "profile"

  @property
  def metrics(self) -> epath.Path:
    """The file of the metrics, one JSON object per line."""
    return self.path / METRICS_FILE

  def close(self) -> None:
    """Releases the lock. The lock file stays."""
    if self._lock is not None:
      release_lock(self._lock)

  def begin(self) -> None:
    """Marks the start of training: an error no longer removes the folder."""
    self._made = ()

  def __enter__(self) -> "Workdir":
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: object,
  ) -> None:
    if kind is not None and issubclass(kind, _REFUSALS):
      self._remove_made()
    self.close()
    if isinstance(error, OSError):
      with disk.explaining(
        self.path,
        "The run",
        "Then run the same command again to resume from the last checkpoint.",
      ):
        raise error

  def _remove_made(self) -> None:
    """Removes the folders created by a run that failed before training."""
    for number, folder in enumerate(self._made):
      if not number and folder.exists():
        folder.rmtree()
      elif folder.exists() and not any(folder.iterdir()):
        folder.rmdir()


def open_workdir(
  path: epath.PathLike,
  config: Config,
  *,
  process_index: int = 0,
  resume_from: int | None = None,
) -> Workdir:
  """Creates and locks the folder of a run, and writes its config there.

  A run resumes in an existing folder if the config there describes the same
  experiment. Settings that affect the parameters must be equal. The settings
  that may differ control

  - logging and validation: eval.*, train.log_steps and train.validate_steps;
  - checkpoints: train.checkpoint_steps and train.keep_checkpoints;
  - the hardware: mesh.* and index.embed_batch_size (results are equal up to
    rounding), and data.token_cache;
  - the length: train.num_steps, if optimizer.schedule is "constant" and its
    warm-up fits. The other schedules end at the last step, so every learning
    rate depends on the number of steps.

  A finished run can be extended with any schedule: if train.num_steps is
  larger, all optimizer.* except optimizer.freeze may differ. The run resumes
  from its last step. It keeps AdamW's moments and takes the learning rate of
  the new schedule at that step.

  A folder without a checkpoint accepts any config: its run may have failed
  because of a setting that has been corrected since.

  If eval.* changes, validation metrics before and after are measured on
  different questions, yet the best checkpoint is chosen by comparing them.

  The lock is released whenever the process ends; a leftover lock file does not
  block other runs. A bucket (gs://) has no locks: there, the user must make
  sure that only one run uses the folder.

  Args:
    path: the folder; created if it is missing.
    config: the config of this run.
    process_index: index of this process. Process 0 locks and writes; then the
      others compare their config.
    resume_from: step of the checkpoint to go back to. Learning rates and
      similar settings may then differ. See `loop.train`.

  Raises:
    FileNotFoundError: there is no checkpoint of `resume_from`.
    ValueError: the path is not a writable folder; another run uses it; its
      config.json is damaged or belongs to another experiment; it has
      checkpoints but no config.json; or one of its files is a link.
  """
  if not os.fspath(path):
    raise ValueError(
      "--workdir is empty; expected a folder for what the run writes. Give"
      " one, for instance --workdir=runs/first."
    )
  path = epath.Path(path).expanduser()
  # Process 0 runs first: it writes the config that the others read.
  return first_alone(
    f"open --workdir={path}",
    lambda: _open(path, config, process_index, resume_from),
  )


def _open(
  path: epath.Path,
  config: Config,
  process_index: int,
  resume_from: int | None,
) -> Workdir:
  # Only local folders are created: a bucket has none.
  missing = [p for p in (path, *path.parents) if not p.exists()]
  made = tuple(missing) if artifacts.is_local(path) else ()
  _make_folder(path)
  if process_index:
    workdir = Workdir(path)
    _check_config(workdir, config, False, resume_from)
    return workdir
  _check_writable(path)
  _check_no_links(path)
  workdir = Workdir(path, _lock(path), made)
  try:
    same = _check_config(workdir, config, True, resume_from)
    if not same and workdir.tokenizer.exists():
      workdir.tokenizer.rmtree()  # may be trained on other texts
    write_config(workdir.config_path, config)
  except BaseException:
    workdir.close()
    raise
  return workdir


def keep_compiled(path: epath.PathLike = "") -> None:
  """Sets JAX's compilation cache to the directory `path`.

  The cache holds executable code, so it is never read from a workdir, which
  may come from somebody else. JAX keys each program by everything it was
  compiled from: all runs can share one directory, which can be deleted at any
  time. Programs that compile in less than half a second are not cached. Call
  this before anything is compiled.

  Args:
    path: the directory; "" is rag_jax/compiled in the user's cache directory
      ($XDG_CACHE_HOME or ~/.cache), used only if no other user can write there.
  """
  if not os.fspath(path):
    path = _own_cache()
    if not path:
      return
  jax.config.update("jax_compilation_cache_dir", os.fspath(path))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _own_cache() -> str:
  """Returns the default cache directory; "" if other users can write there."""
  home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
  path = os.path.join(home, "rag_jax", "compiled")
  try:
    os.makedirs(path, mode=0o700, exist_ok=True)
    state = os.lstat(path)
  except OSError as error:
    logging.info("Compiled programs are not kept: %s", error)
    return ""
  ours = state.st_uid == os.geteuid() and stat.S_ISDIR(state.st_mode)
  if ours and not state.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
    return path
  logging.warning(
    "%s is not used for compiled programs: other users can write there, and its"
    " files are executed. Expected a folder that only this user can write to."
    " Remove it, or choose another one with --cache_dir.",
    path,
  )
  return ""


def _make_folder(path: epath.Path) -> None:
  try:
    path.mkdir(parents=True, exist_ok=True)
  except (FileExistsError, NotADirectoryError) as error:
    raise ValueError(
      f"--workdir={path} is not a folder: it, or a part of its path, is a file"
      f" ({error}). Expected a folder that the run can write to. Choose"
      " another --workdir, or move that file away."
    ) from error
  except OSError as error:
    raise _not_writable(path, error) from error


def _check_no_links(path: epath.Path) -> None:
  """Raises `ValueError` if a file or folder that a run writes is a link.

  The run would otherwise overwrite files outside the workdir.
  """
  if not artifacts.is_local(path):
    return
  for name in sorted(os.listdir(path)):
    if name in _OWN:
      artifacts.check_no_links(path, _REMOVE, name)


def _check_writable(path: epath.Path) -> None:
  """Raises `ValueError` if no file can be written.

  Writes a file to find out: permission bits do not apply to root, and do not
  show that a file system is full or mounted read-only.
  """
  probe = artifacts.temp_path(path / "probe")
  try:
    try:
      probe.write_text("probe")  # an empty file fits on a full disk
    finally:
      probe.unlink(missing_ok=True)
  except OSError as error:
    raise _not_writable(path, error) from error


def _not_writable(path: epath.Path, error: OSError) -> ValueError:
  return ValueError(
    f"--workdir={path} cannot be written to ({error}). Expected a folder that"
    " the run can write to. Make room on its disk or change its permissions, or"
    " choose another --workdir."
  )


def _lock(path: epath.Path) -> filelock.BaseFileLock | None:
  """Acquires and returns the lock of a folder; None in a bucket."""
  if not artifacts.is_local(path):
    logging.info(
      "%s is in a bucket, which has no locks: make sure that no other run"
      " writes there.",
      path,
    )
    return None
  return take_lock(
    path / LOCK,
    busy=f"--workdir={path} is in use by another run",
    expected="one run in a folder at a time. Wait until it ends, stop it, or"
    " choose another --workdir.",
    remedy=_REMOVE,
  )


def _check_config(
  workdir: Workdir,
  config: Config,
  may_correct: bool,
  resume_from: int | None,
) -> bool:
  """Returns whether the config in the folder describes the same experiment.

  Raises:
    FileNotFoundError: settings differ that only `resume_from` may change, and
      that checkpoint does not exist.
    ValueError: the folder belongs to another experiment, and it has checkpoints
      or `may_correct` is False.
  """
  path = workdir.config_path
  if not path.exists() and not os.path.islink(path):
    _check_no_checkpoints(workdir)
    return True
  old = read_config(path)
  different = {
    line.partition(":")[0]: line for line in differences(old, config)
  }
  goes_on = _goes_on(workdir, old, config)
  learning = [
    f"{section}.{name}"
    for section, names in _LEARNING.items()
    for name in names
  ]
  bad = [
    line
    for name, line in different.items()
    if not (
      name in _MAY_DIFFER
      or name.startswith(_SECTIONS_MAY_DIFFER)
      or (name == "train.num_steps" and _only_longer(old, config))
      or (goes_on and _is_of_schedule(name))
      or (resume_from is not None and name in learning)
    )
  ]
  # Checked before the config is written. If no such setting differs, the run
  # may already have gone back to that step, and removed its checkpoint since.
  if resume_from is not None and not different.keys().isdisjoint(learning):
    _check_step(workdir, resume_from)
  learned = _has_checkpoints(workdir) or workdir.model.exists()
  if bad and may_correct and not learned:
    logging.info(
      "%s has no checkpoint: it is used with the new config.", workdir.path
    )
    return False
  if bad:
    hint = ""
    if all(line.partition(":")[0] in learning for line in bad):
      hint = " Or use the new values from a checkpoint on: --resume_from=STEP."
    raise ValueError(
      f"--workdir={workdir.path} belongs to another experiment. Its config"
      " differs in settings that change what is learned:\n  "
      + "\n  ".join(bad)
      + "\nExpected the same values, to resume it. Choose another --workdir,"
      " or restore the old values (left). These may differ:"
      f" {', '.join(_free_settings())}.{hint}"
    )
  if different:
    logging.info(
      "Resuming in %s with other settings:\n  %s",
      workdir.path,
      "\n  ".join(different.values()),
    )
  return True


def _check_step(workdir: Workdir, step: int) -> None:
  folders = workdir.checkpoints.glob(f"*/{artifacts.MANIFEST}")
  names = {folder.parent.name for folder in folders}
  if str(step) not in names:
    steps = sorted(int(name) for name in names if name.isdecimal())
    raise FileNotFoundError(
      f"There is no complete checkpoint of step {step} in"
      f" {workdir.checkpoints}, to go back to with --resume_from={step}. Choose"
      f" one of {steps}."
    )


def _goes_on(workdir: Workdir, old: Config, new: Config) -> bool:
  """Returns whether the run is finished and the new config extends it."""
  last = str(old.steps_before_main + old.train.num_steps)
  ended = all(
    (folder / artifacts.MANIFEST).exists()
    for folder in (workdir.model, workdir.checkpoints / last)
  )
  return ended and new.train.num_steps > old.train.num_steps > 0


def _is_of_schedule(name: str) -> bool:
  """Returns whether a finished run may change the setting when extended."""
  movable = name.startswith("optimizer.") and name != "optimizer.freeze"
  return movable or name == "train.num_steps"


def _only_longer(old: Config, new: Config) -> bool:
  """Returns whether train.num_steps may change without changing any step."""
  shorter = min(old.train.num_steps, new.train.num_steps)
  # A warm-up longer than the run is cut to the number of steps.
  fits = new.optimizer.warmup_steps < shorter
  return fits and new.optimizer.schedule == "constant"


def _free_settings() -> list[str]:
  """Returns the settings that may differ, for the error message."""
  known = [name for name, _, _ in fields(Config())]
  single = [name for name in known if name in _MAY_DIFFER]
  sections = [f"{section}*" for section in _SECTIONS_MAY_DIFFER]
  constant = "train.num_steps with optimizer.schedule='constant'"
  ended = (
    "and optimizer.* of a run that has ended and gets more train.num_steps"
  )
  return [*single, *sections, constant, ended]


def _has_checkpoints(workdir: Workdir) -> bool:
  found = workdir.checkpoints
  return found.exists() and any(found.iterdir())


def _check_no_checkpoints(workdir: Workdir) -> None:
  if _has_checkpoints(workdir):
    raise ValueError(
      f"--workdir={workdir.path} has checkpoints but no"
      f" {workdir.config_path.name}, so it is unknown which experiment they"
      " belong to. Expected an empty folder or the folder of a run. Restore"
      f" {workdir.config_path}, or choose another --workdir."
    )
