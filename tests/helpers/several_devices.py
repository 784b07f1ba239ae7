"""Tests that run on one device, and on two to eight in another process."""

import jax
from jax.sharding import AxisType
import pytest

SEVERAL = jax.device_count() == 8  # in the process with eight devices


def over(*counts):
  """Numbers of devices, among those that this process has."""
  counts = counts if SEVERAL else (1,)
  ids = [f"over{n}" for n in counts]
  return pytest.mark.parametrize("count", counts, ids=ids)


def mesh_of(count):
  shape = {1: (1, 1), 2: (2, 1), 4: (2, 2), 8: (4, 2)}[count]
  return jax.make_mesh(
    shape,
    ("data", "tensor"),
    axis_types=(AxisType.Auto,) * 2,
    devices=jax.devices()[:count],
  )
