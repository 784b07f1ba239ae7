"""The time and memory that building and searching an index take.

In: an index, or a build. Out: seconds, bytes, questions per second, on this
machine at that moment.
"""

from collections.abc import Callable
import dataclasses
import os
import time
from typing import Any

from jaxtyping import Shaped
import numpy as np

_LEAST_CALLS = 3  # fewest searches that are timed


@dataclasses.dataclass(slots=True, frozen=True, kw_only=True)
class BuildCost:
  """What building an index took, without embedding the passages."""

  secs: float
  # An upper bound of the memory that the build added: the peak of the process
  # until the end of the build, minus its memory at the start. Pages of mapped
  # files count. None if the system does not tell (other than Linux).
  peak_bytes: int | None


class BuildMeter:
  """Measures from its creation until `cost` is called."""

  def __init__(self):
    self._before = _process_bytes("VmRSS")
    self._start = time.perf_counter()

  def cost(self) -> BuildCost:
    """Returns the time and memory since the creation."""
    secs = time.perf_counter() - self._start
    peak = _process_bytes("VmHWM")
    if peak is None or self._before is None:
      return BuildCost(secs=secs, peak_bytes=None)
    return BuildCost(secs=secs, peak_bytes=max(peak - self._before, 0))


def queries_per_second(
  index: Any,
  questions: Shaped[np.ndarray, "B ..."],  # as its `search` takes them
  k: int,
  batch_size: int,
  secs: float,
  agree: Callable[[int], int] = int,
) -> float:
  """Returns how many questions `index` answers per second, in batches.

  It is computed from the median of as many searches as fit into `secs`.

  Args:
    index: what is searched.
    questions: at least one.
    k: passages per question.
    batch_size: questions per search.
    secs: of timing.
    agree: whether this process would search again -> whether it does: where
      several processes have to make the same searches, `processes.from_first`.
  """
  # Each batch has other questions, because equal ones would be in the cache.
  order = np.resize(
    np.arange(len(questions)), -(-len(questions) // batch_size) * batch_size
  ).reshape(-1, batch_size)
  index.search(questions[order[0]], k)  # warms up
  times: list[float] = []
  # At least one search, and a few more unless one takes longer than `secs`.
  while agree(
    not times
    or sum(times) < secs
    or (len(times) < _LEAST_CALLS and max(times) < secs)
  ):
    batch = questions[order[len(times) % len(order)]]
    start = time.perf_counter()
    index.search(batch, k)
    times.append(time.perf_counter() - start)
  return batch_size / float(np.median(times))


def num_cpus() -> int:
  """Returns how many CPUs this process may use."""
  if hasattr(os, "sched_getaffinity"):  # not on macOS
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def _process_bytes(name: str) -> int | None:
  """Returns a value of /proc/self/status, or None if there is none."""
  try:
    with open("/proc/self/status", encoding="ascii") as file:
      lines = [line.split() for line in file if line.startswith(name + ":")]
  except OSError:
    return None
  return int(lines[0][1]) * 1024 if lines else None
