"""What is timed and counted, with a clock that the test turns."""

import os
import sys

import numpy as np
import pytest

from rag_jax.retrieval import resources


class Clock:
  """An index of which each search takes as long as it is told."""

  def __init__(self, secs):
    self.now = 0.0
    self.secs = secs
    self.batches = []

  def search(self, questions, n_docs):
    """Waits."""
    self.batches.append(questions[:, 0].astype(int).tolist())
    self.now += self.secs[min(len(self.batches), len(self.secs)) - 1]


@pytest.fixture
def speed(monkeypatch):
  def measure(clock, num_questions, batch_size, secs):
    monkeypatch.setattr(resources.time, "perf_counter", lambda: clock.now)
    questions = np.arange(num_questions, dtype=np.float32)[:, None]
    return resources.queries_per_second(clock, questions, 5, batch_size, secs)

  return measure


def test_speed_is_that_of_the_median_search_after_the_first(speed):
  # The first pays for what is loaded; one of the others was disturbed.
  clock = Clock([9.0, 0.1, 0.5, 0.1, 0.1])
  assert speed(clock, 10, 4, 0.75) == pytest.approx(4 / 0.1)
  assert len(clock.batches) == 5


def test_each_search_has_other_questions_until_all_had_their_turn(speed):
  clock = Clock([0.1])
  speed(clock, 5, 2, 0.35)
  assert clock.batches == [[0, 1], [0, 1], [2, 3], [4, 0], [0, 1]]
  clock = Clock([0.1])
  speed(clock, 2, 3, 0.0)
  assert clock.batches[0] == [0, 1, 0]


def test_one_search_that_takes_all_the_time_is_not_repeated(speed):
  clock = Clock([50.0])
  assert speed(clock, 4, 4, 1.0) == pytest.approx(4 / 50)
  assert len(clock.batches) == 2


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
def test_the_memory_of_a_build_is_at_least_what_it_held():
  meter = resources.BuildMeter()
  held = np.ones(2**25)  # 256 MiB
  del held
  found = meter.cost()
  # Where the process held more before, the bound is wider, never narrower. The
  # system counts pages in batches.
  assert found.peak_bytes >= 0.95 * 2**28
  assert found.secs > 0.0


def test_where_the_system_does_not_say_no_memory_is_claimed(monkeypatch):
  def missing(*args, **kwargs):
    raise FileNotFoundError

  monkeypatch.setattr("builtins.open", missing)
  assert resources.BuildMeter().cost().peak_bytes is None


def test_cpus_are_those_that_the_process_may_use(monkeypatch):
  monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5}, raising=False)
  assert resources.num_cpus() == 2
  monkeypatch.delattr(os, "sched_getaffinity")
  assert resources.num_cpus() == (os.cpu_count() or 1)
