"""Shows the progress of long work, and the time that is left.

In: how much there is to do, and how much is done. Out: a bar on a terminal;
elsewhere a line in the log every few seconds.
"""

import io
import sys

from absl import logging
from tqdm import tqdm

LOG_SECS = 10.0  # between two lines in the log


class Progress(tqdm):
  """Shows the progress of the work inside the `with`, from the first update."""

  monitor_interval = 0  # no thread that redraws the bar

  def __init__(self, what: str, total: int, unit: str, done: int = 0):
    """Shows nothing before the first update.

    Args:
      what: the work, for instance "Embedded".
      total: how much there is to do.
      unit: of `total`, for instance "passages".
      done: how much of `total` was done before.
    """
    terminal = sys.stderr.isatty()
    super().__init__(
      desc=what,
      total=total,
      unit=f" {unit}",
      initial=done,
      disable=done >= total,
      delay=1e-9,  # with 0, tqdm would show it before the first update
      miniters=1,
      mininterval=0.1 if terminal else LOG_SECS,
      file=sys.stderr if terminal else _Log(),
      dynamic_ncols=terminal,
      bar_format=None
      if terminal
      else "{desc} {n_fmt} of {total_fmt}{unit} ({percentage:.0f}%),"
      " {rate_noinv_fmt}, {remaining} left.",
    )

  def update(self, n: int | float | None = 1) -> None:
    """Notes that `n` more are done."""
    first = self.n == self.initial
    if not super().update(n) and first and self.n < self.total:
      self.refresh()


class _Log(io.StringIO):
  """A stream whose lines are logged."""

  def write(self, text: str) -> int:
    if line := text.strip():
      logging.info("%s", line)
    return len(text)
