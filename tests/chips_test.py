"""The table of chips, by the names of topologies and of devices."""

import pytest

from rag_jax import chips


@pytest.mark.parametrize("topology", ["v5e", "v5e:4x4", "v5e-256", " V5E "])
def test_a_topology_names_its_chip(topology):
  assert chips.chip_of_topology(topology).peak_flops == 197e12


def test_an_unknown_topology_lists_those_that_are_known():
  with pytest.raises(ValueError, match=r"'v9:2x2'.*'v4', 'v5e', 'v5p', 'v6e'"):
    chips.chip_of_topology("v9:2x2")


@pytest.mark.parametrize(
  ("kind", "name"),
  [
    ("TPU v4", "v4"),
    ("TPU v5 lite", "v5e"),
    ("TPU v5e", "v5e"),
    ("TPU v5", "v5p"),
    ("TPU v5p", "v5p"),
    ("TPU v6 lite", "v6e"),
    ("NVIDIA H100 80GB HBM3", "h100"),
  ],
)
def test_a_device_is_known_by_what_jax_calls_it(kind, name):
  chip = chips.chip_of_device(kind)
  assert chip is not None
  assert chip.name == name


@pytest.mark.parametrize("kind", ["cpu", "", "TPU v2", "TPU v5 lite pro"])
def test_a_device_without_published_limits_is_no_chip(kind):
  assert chips.chip_of_device(kind) is None
