"""Seconds are counted once, whatever encloses what."""

import contextlib

import pytest

from rag_jax.training.ledger import Ledger


class Time:
  """A clock that tests turn."""

  def __init__(self):
    self.now = 100.0

  def __call__(self):
    """Returns the time in seconds."""
    return self.now


@pytest.fixture
def time():
  return Time()


def test_spans_and_the_time_between_them_sum_to_the_wall_time(time):
  ledger = Ledger(time)
  time.now += 1
  with ledger.span("step"):
    time.now += 2
    with ledger.span("data_wait"):
      time.now += 4
      ledger.move("refresh", 1.5)
    time.now += 8
  time.now += 16
  with contextlib.suppress(KeyError), ledger.span("validation"):
    time.now += 32
    raise KeyError
  assert ledger.secs() == {
    "step": 10, "data_wait": 2.5, "refresh": 1.5, "validation": 32,
    "checkpoint": 0, "compile": 0, "other": 17,
  }  # fmt: skip
  assert sum(ledger.secs().values()) == ledger.attempt_secs() == 63


def test_a_later_attempt_goes_on_counting(time):
  first = Ledger(time)
  with first.span("step"):
    time.now += 3
  second = Ledger(time)
  second.continue_from(first.secs() | {"of a newer version": 1.0})
  time.now += 1
  assert second.metrics()["ledger/step_secs"] == 3
  assert second.metrics()["ledger/other_secs"] == 1


def test_the_line_names_what_took_longest_first(time):
  ledger = Ledger(time)
  with ledger.span("data_wait"):
    time.now += 3
  with ledger.span("step"):
    time.now += 9
  assert ledger.line() == (
    "The run took 12.0 s: step 9.0 s (75%), waiting for data and retrieval"
    " 3.0 s (25%)."
  )
