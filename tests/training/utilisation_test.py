"""Memory, and speed against the peak of the devices."""

import types

import jax
import pytest

from rag_jax.config import Config
from rag_jax.models import flops
from rag_jax.training.utilisation import Utilisation
from rag_jax.training.utilisation import memory


def utilisation(*kinds, peak_tflops=0.0):
  config = Config()
  config.train.peak_tflops = peak_tflops
  devices = [types.SimpleNamespace(device_kind=kind) for kind in kinds]
  return Utilisation(config, num_passages=100, vocab_size=512, devices=devices)


def test_mfu_is_the_speed_over_that_of_all_chips():
  config = Config()
  shapes = flops.step_shapes(config, 100)
  step = flops.total_flops(flops.step_flops(config, shapes, 512))
  speed = 2.5 * config.train.batch_size  # 2.5 steps per second
  expected = {"train/mfu": pytest.approx(2.5 * step / (2 * 197e12))}
  assert utilisation("TPU v5 lite", "TPU v5e").mfu(speed) == expected
  assert utilisation("cpu", "cpu", peak_tflops=197.0).mfu(speed) == expected


@pytest.mark.parametrize("kinds", [["cpu"], ["TPU v4", "TPU v9"]])
def test_there_is_no_mfu_if_a_peak_is_not_known(kinds):
  assert utilisation(*kinds).mfu(10.0) == {}


def test_memory_is_that_of_the_fullest_device():
  def device(stats):
    return types.SimpleNamespace(memory_stats=lambda: stats)

  devices = [
    device({"bytes_in_use": 3, "peak_bytes_in_use": 9}),
    device({"bytes_in_use": 5, "peak_bytes_in_use": 7}),
  ]
  assert memory("warmup", devices) == {
    "warmup/hbm_bytes_in_use": 5,
    "warmup/hbm_peak_bytes": 9,
  }
  assert memory("train", [device(None), *jax.devices("cpu")]) == {}
