"""Which steps are profiled, and where the profile is."""

import jax
import jax.numpy as jnp
import pytest

from rag_jax.training.profiling import Profiler


def profile(steps, ran, directory, monkeypatch):
  """Runs the steps `ran`; returns those that a trace covered, and its files."""
  covered, active = [], []
  start, stop = jax.profiler.start_trace, jax.profiler.stop_trace

  def starting(path):
    active.append(path)
    start(path)

  def stopping():
    active.clear()
    stop()

  monkeypatch.setattr(jax.profiler, "start_trace", starting)
  monkeypatch.setattr(jax.profiler, "stop_trace", stopping)
  profiler = Profiler(steps, directory, enabled=True)
  for step in ran:
    profiler.before(step)
    result = jnp.ones(3) * step
    covered += [step] if active else []
    profiler.after(step, result)
  profiler.close()
  return covered, list(directory.rglob("*.xplane.pb"))


@pytest.mark.parametrize(
  ("ran", "expected"),
  [
    (range(1, 7), [3, 4]),
    (range(4, 7), [4]),  # resumed inside the range
    (range(1, 4), [3]),  # stopped inside the range
    (range(5, 7), []),  # resumed after it
  ],
)
def test_the_steps_of_the_range_are_profiled(
  ran, expected, tmp_path, monkeypatch
):
  covered, files = profile((3, 4), ran, tmp_path / "profile", monkeypatch)
  assert covered == expected
  assert len(files) == bool(expected)
  assert (tmp_path / "profile").exists() == bool(expected)


def test_without_a_range_nothing_is_profiled(tmp_path, monkeypatch):
  assert profile((), range(1, 4), tmp_path, monkeypatch) == ([], [])
