"""Turns Ctrl-C and SIGTERM into a stop at the next step, on every host."""

import signal
import types
from typing import Any

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

# Name of a metric: an update sends the signal to all processes in its metrics.
# A separate program would keep the devices waiting.
SIGNAL = "signal"


class StoppedEarlyError(Exception):
  """The run was asked to stop, and has saved what it had."""

  def __init__(self, signum: int, step: int):
    super().__init__(
      f"Stopped by {signal.Signals(signum).name} and saved at step {step}. Run"
      " the same command again to continue from there."
    )
    self.signum = signum


class StopRequest:
  """Context in which the first signal is noted and the second one acts.

  Attributes:
    signum: of the signal that this process received; 0: none.
  """

  def __init__(self):
    self.signum = 0
    self._heard: list[jax.Array] = []  # from the last two updates
    self._before: dict[int, Any] = {}

  def __enter__(self) -> "StopRequest":
    for signum in (signal.SIGINT, signal.SIGTERM):
      self._before[signum] = signal.signal(signum, self._note)
    return self

  def to_send(self, mesh: jax.sharding.Mesh) -> tuple[jax.Array, ...]:
    """Returns the signal as an input of the next update; () in one process."""
    if jax.process_count() == 1:
      return ()
    return (
      jax.make_array_from_callback(
        (mesh.size,),
        NamedSharding(mesh, PartitionSpec(mesh.axis_names)),
        lambda _: np.array([self.signum], np.int32),
      ),
    )

  def receive(self, metrics: dict[str, Any]) -> None:
    """Removes the signal from the metrics of an update, and keeps it."""
    if SIGNAL in metrics:
      self._heard = [*self._heard[-1:], metrics.pop(SIGNAL)]

  def agreed(self) -> int:
    """Returns the signal on which all processes stop now; 0: none.

    Every process calls it after each step, and gets the same answer. With
    several processes, a signal takes effect two steps after it came: waiting
    for the metrics of the last update would keep the devices waiting.
    """
    if jax.process_count() == 1:
      return self.signum
    return int(self._heard[0]) if len(self._heard) > 1 else 0

  def _note(self, signum: int, frame: types.FrameType | None) -> None:
    self.signum = signum
    # A second signal means that the user does not want to wait for the save.
    self._restore()

  def _restore(self) -> None:
    for signum, handler in self._before.items():
      signal.signal(signum, handler)
    self._before = {}

  def __exit__(self, *exc_info: object) -> None:
    self._restore()
