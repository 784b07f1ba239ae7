"""Where the wall time of a run goes.

In: spans of time of the thread that runs the steps. Out: seconds per kind of
work. They sum to the time since the ledger was opened, since what lies between
the spans is counted too; nothing here waits for a device.
"""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import time

# What the loop spends time on; `other` is the time in none of the spans.
KINDS: tuple[str, ...] = (
  "step", "data_wait", "refresh", "validation", "checkpoint", "compile",
  "other",
)  # fmt: skip
_WORDS = {
  "data_wait": "waiting for data and retrieval",
  "refresh": "waiting for the index",
}


class Ledger:
  """Seconds per kind of work, over all attempts of a run."""

  def __init__(self, clock: Callable[[], float] = time.perf_counter):
    """Opens the ledger; the time of this attempt begins here."""
    self._clock = clock
    self._opened_at = clock()
    self._before: dict[str, float] = dict.fromkeys(KINDS, 0.0)
    self._here: dict[str, float] = dict.fromkeys(KINDS, 0.0)
    self._moved = 0.0  # out of the innermost open span, into others

  def continue_from(self, before: Mapping[str, float]) -> None:
    """Adds the seconds of earlier attempts, which a checkpoint holds."""
    self._before |= {k: v for k, v in before.items() if k in KINDS}

  @contextlib.contextmanager
  def span(self, kind: str) -> Iterator[None]:
    """Counts the time inside the `with` as `kind`, without inner spans."""
    outer, self._moved = self._moved, 0.0
    began = self._clock()
    try:
      yield
    finally:
      secs = self._clock() - began
      self._here[kind] += secs - self._moved
      self._moved = outer + secs

  def move(self, kind: str, secs: float) -> None:
    """Counts `secs` of the open span as `kind` instead."""
    self._here[kind] += secs
    self._moved += secs

  def attempt_secs(self) -> float:
    """Returns the wall time of this attempt."""
    return self._clock() - self._opened_at

  def secs(self) -> dict[str, float]:
    """Returns the seconds of each kind, over all attempts."""
    here = dict(self._here)
    here["other"] += self.attempt_secs() - sum(here.values())
    return {kind: self._before[kind] + here[kind] for kind in KINDS}

  def metrics(self) -> dict[str, float]:
    """Returns the seconds of each kind under the names of their metrics."""
    return {f"ledger/{kind}_secs": secs for kind, secs in self.secs().items()}

  def line(self) -> str:
    """Returns the ledger as one line of text, the largest part first."""
    secs = self.secs()
    total = sum(secs.values())
    parts = [
      f"{_WORDS.get(kind, kind)} {secs[kind]:.1f} s ({secs[kind] / total:.0%})"
      for kind in sorted(KINDS, key=lambda kind: -secs[kind])
      if secs[kind] >= 0.05
    ]
    return f"The run took {total:.1f} s: " + ", ".join(parts) + "."
