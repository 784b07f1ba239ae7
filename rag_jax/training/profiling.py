"""Profiles some steps of a run, for XProf or TensorBoard.

In: the steps that train.profile_steps names. Out: WORKDIR/profile, which
`tensorboard --logdir=WORKDIR` opens with its profile plugin.
"""

from collections.abc import Sequence
import os
import pathlib
import tempfile

from absl import logging
from etils import epath
import jax


class Profiler:
  """Starts and stops the trace of a range of steps; does nothing without one.

  An attempt that starts inside the range profiles the rest of it, and one that
  starts after it nothing.
  """

  def __init__(
    self, steps: Sequence[int], directory: epath.PathLike, *, enabled: bool
  ):
    """Prepares to profile.

    Args:
      steps: (first, last) step, counted from 1 as in the log; () for none.
      directory: gets the profile.
      enabled: on one process alone.
    """
    self._steps: tuple[int, ...] = tuple(steps) if enabled else ()
    self._directory = epath.Path(directory)
    self._traced: tempfile.TemporaryDirectory | None = None

  def before(self, step: int) -> None:
    """Starts the trace if `step`, which is about to run, is in the range."""
    if not self._steps or self._traced is not None:
      return
    first, last = self._steps
    if first <= step <= last:
      # Not in the workdir: that can be in a bucket, where nothing is appended.
      self._traced = tempfile.TemporaryDirectory(prefix="rag_jax_profile_")
      jax.profiler.start_trace(self._traced.name)

  def after(self, step: int, result: jax.Array) -> None:
    """Ends the trace after the last step, of which `result` is an output."""
    if self._traced is not None and step >= self._steps[1]:
      # The only step that is waited for: it may not have run yet.
      jax.block_until_ready(result)
      self.close()

  def close(self) -> None:
    """Ends a trace that is running, and writes it."""
    if self._traced is None:
      return
    traced, self._traced = self._traced, None
    self._steps = ()  # once per attempt
    try:
      jax.profiler.stop_trace()
      source = pathlib.Path(traced.name)
      for file in source.rglob("*"):
        if file.is_file():
          target = self._directory / os.fspath(file.relative_to(source))
          target.parent.mkdir(parents=True, exist_ok=True)
          target.write_bytes(file.read_bytes())
    finally:
      traced.cleanup()
    logging.info(
      "The profile is in %s; open it with `tensorboard --logdir=%s` and its"
      " profile plugin, XProf.",
      *(self._directory, self._directory.parent),
    )
