"""What building and searching an index takes: time and memory.

In: an index, or what builds one. Out: seconds, bytes, questions a second, as
this machine was at that moment.
"""

import dataclasses
import os
import time
from typing import Any

from jaxtyping import Shaped
import numpy as np

_LEAST_CALLS = 3  # of a search


@dataclasses.dataclass(slots=True, frozen=True, kw_only=True)
class BuildCost:
  """What building an index took, embedding the passages not included."""

  secs: float
  # At most so much more memory than before the build: the most that the process
  # ever had until its end, less what it had at its start. Pages of files that
  # are mapped count. None where the system does not say (no Linux).
  peak_bytes: int | None


class BuildMeter:
  """Measures from its creation to `cost`."""

  def __init__(self):
    self._before = _process_bytes("VmRSS")
    self._start = time.perf_counter()

  def cost(self) -> BuildCost:
    """Returns what it took since."""
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
) -> float:
  """Returns how many questions `index` answers a second, `batch_size` at once.

  From the median over as many searches as fit into `secs`.
  """
  # The next batch has other questions, or what they need would be in the cache.
  order = np.resize(
    np.arange(len(questions)), -(-len(questions) // batch_size) * batch_size
  ).reshape(-1, batch_size)
  index.search(questions[order[0]], k)  # the first call pays for what is kept
  times: list[float] = []
  # At least one, and a few unless one alone takes longer than is given.
  while (
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
  """Returns a line of /proc/self/status, where there is one."""
  try:
    with open("/proc/self/status", encoding="ascii") as file:
      lines = [line.split() for line in file if line.startswith(name + ":")]
  except OSError:
    return None
  return int(lines[0][1]) * 1024 if lines else None
