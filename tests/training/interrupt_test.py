"""The first signal is a wish; the second one acts as if nobody listened."""

import signal

import pytest

from rag_jax.training.interrupt import StoppedEarlyError
from rag_jax.training.interrupt import StopRequest

BOTH = pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])


@pytest.fixture(autouse=True)
def outer():
  """Stands for what would happen without a `StopRequest`: it is noted."""
  came = []
  before = {
    signum: signal.signal(signum, lambda number, _: came.append(number))
    for signum in (signal.SIGINT, signal.SIGTERM)
  }
  yield came
  for signum, handler in before.items():
    signal.signal(signum, handler)


@BOTH
def test_the_first_signal_is_noted_and_does_nothing_else(signum, outer):
  with StopRequest() as stop:
    assert not stop.signum
    signal.raise_signal(signum)
    assert stop.signum == signum
  assert not outer


@BOTH
def test_the_second_signal_acts(signum, outer):
  with StopRequest() as stop:
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signum)
    assert stop.signum == signal.SIGTERM
    assert outer == [signum]


@BOTH
def test_signals_act_again_afterwards(signum, outer):
  with StopRequest() as stop:
    pass
  signal.raise_signal(signum)
  assert outer == [signum]
  assert not stop.signum


def test_signals_act_again_after_an_error(outer):
  with pytest.raises(OSError, match="full"), StopRequest():
    raise OSError("full")
  signal.raise_signal(signal.SIGTERM)
  assert outer == [signal.SIGTERM]


@BOTH
def test_the_error_names_signal_and_step_and_says_how_to_go_on(signum):
  error = StoppedEarlyError(signum, 7)
  assert error.signum == signum
  assert str(error) == (
    f"Stopped by {signum.name} and saved at step 7. Run the same command again"
    " to continue from there."
  )
