"""Ctrl-C and SIGTERM as a wish to stop at the next step."""

import signal
import types
from typing import Any


class StoppedEarlyError(Exception):
  """The run was asked to stop, and has saved what it had."""

  def __init__(self, signum: int, step: int):
    super().__init__(
      f"Stopped by {signal.Signals(signum).name} and saved at step {step}. Run"
      " the same command again to go on from there."
    )
    self.signum = signum


class StopRequest:
  """Context in which the first signal is noted and the second one acts."""

  def __init__(self):
    self.signum = 0  # of the signal that came; 0 = none
    self._before: dict[int, Any] = {}

  def __enter__(self) -> "StopRequest":
    for signum in (signal.SIGINT, signal.SIGTERM):
      self._before[signum] = signal.signal(signum, self._note)
    return self

  def _note(self, signum: int, frame: types.FrameType | None) -> None:
    self.signum = signum
    # Whoever asks twice does not want to wait for the save.
    self._restore()

  def _restore(self) -> None:
    for signum, handler in self._before.items():
      signal.signal(signum, handler)
    self._before = {}

  def __exit__(self, *exc_info: object) -> None:
    self._restore()
