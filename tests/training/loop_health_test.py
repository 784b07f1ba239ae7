"""What the lines of a run say about its speed and its retrieval."""

import numpy as np
import pytest

from rag_jax.models import flops
from rag_jax.training.ledger import KINDS


def of_train(run):
  """The lines of the main stage."""
  return [r for r in run.metrics if r["stage"] == "train"]


@pytest.fixture(scope="module")
def profiled(tiny):
  config = tiny.config(train__peak_tflops=1e-3, train__profile_steps=(2, 3))
  return tiny.train(tiny.root / "profiled", config)


def test_mfu_is_that_of_the_speed_in_the_same_line(profiled):
  config, experiment = profiled.config, profiled.experiment
  shapes = flops.step_shapes(config, len(experiment.passages))
  vocab_size = experiment.model.generator.config.vocab_size
  step = flops.total_flops(flops.step_flops(config, shapes, vocab_size))
  devices = experiment.mesh.devices.size
  for record in of_train(profiled):
    steps_per_sec = record["train/questions_per_second"] / 8
    expected = step * steps_per_sec / (devices * 1e9)
    assert record["train/mfu"] == pytest.approx(expected)


def test_the_profile_is_in_the_workdir(profiled):
  assert list((profiled.path / "profile").rglob("*.xplane.pb"))


def test_the_ledger_grows_like_the_time(uninterrupted):
  totals, times = [], []
  for record in uninterrupted.metrics:
    assert all(record[f"ledger/{kind}_secs"] >= 0 for kind in KINDS)
    totals.append(sum(record[f"ledger/{kind}_secs"] for kind in KINDS))
    times.append(record["time_secs"])
  # It is opened a little before the clock of the metrics.
  ahead = np.array(totals) - times
  assert np.ptp(ahead) < 1
  assert np.all(ahead > -0.01)
  last = uninterrupted.metrics[-1]
  for kind in ("step", "validation", "checkpoint", "compile"):
    assert last[f"ledger/{kind}_secs"] > 0


def test_padding_is_a_share_of_the_batch(uninterrupted):
  # Nearly all inputs of the tiny run are shorter than its lengths.
  shares = [record["train/padding"] for record in of_train(uninterrupted)]
  assert all(0.2 < share < 0.9 for share in shares)
