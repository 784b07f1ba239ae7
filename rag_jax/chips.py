"""What an accelerator can do at most, from its maker's data sheet.

In: the name of a chip, as in a topology, or the `device_kind` that JAX reports.
Out: its peak speed, memory and bandwidths.
"""

import dataclasses
import re

_GIB = 2**30
CHIPS_PER_HOST = 4  # in the topologies of libtpu


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Chip:
  """The published limits of one chip. A JAX device is one chip."""

  name: str
  peak_flops: float  # per second, of dense bfloat16 matrix products
  hbm_bytes: int
  hbm_bytes_per_sec: float
  # Over all links to other chips together, as published; sending and receiving
  # at the same time counts once.
  ici_bytes_per_sec: float
  device_kinds: tuple[str, ...]  # `jax.Device.device_kind`
  # Memory of the host of four chips that slices of several hosts are made of.
  host_bytes: int = 0  # 0: not in the table


# TPUs: "Key chip specifications" in https://cloud.google.com/tpu/docs/v4, v5e,
# v5p and v6e; interconnects are published in Gbit/s per chip. Memory of hosts:
# the machine types ct4p-, ct5lp- and ct5p-hightpu-4t, and ct6e-standard-4t.
# GPUs: NVIDIA's data sheets, without sparsity; the interconnect is NVLink.
_CHIPS = (
  Chip(
    name="v4",
    peak_flops=275e12,
    hbm_bytes=32 * _GIB,
    hbm_bytes_per_sec=1.2e12,
    ici_bytes_per_sec=2400e9 / 8,  # six links of a 3D torus
    device_kinds=("TPU v4",),
    host_bytes=407 * _GIB,
  ),
  Chip(
    name="v5e",
    peak_flops=197e12,
    hbm_bytes=16 * _GIB,
    hbm_bytes_per_sec=819e9,
    ici_bytes_per_sec=1600e9 / 8,  # four links of a 2D torus
    device_kinds=("TPU v5 lite", "TPU v5e"),
    host_bytes=192 * _GIB,
  ),
  Chip(
    name="v5p",
    peak_flops=459e12,
    hbm_bytes=95 * _GIB,
    hbm_bytes_per_sec=2.765e12,
    ici_bytes_per_sec=4800e9 / 8,  # six links of a 3D torus
    device_kinds=("TPU v5", "TPU v5p"),
    host_bytes=448 * _GIB,
  ),
  Chip(
    name="v6e",
    peak_flops=918e12,
    hbm_bytes=32 * _GIB,
    hbm_bytes_per_sec=1.64e12,
    ici_bytes_per_sec=3584e9 / 8,  # four links of a 2D torus
    device_kinds=("TPU v6 lite", "TPU v6e"),
    host_bytes=720 * _GIB,
  ),
  Chip(
    name="a100",
    peak_flops=312e12,
    hbm_bytes=80 * _GIB,
    hbm_bytes_per_sec=2.039e12,
    ici_bytes_per_sec=600e9 / 2,
    device_kinds=("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB PCIe"),
  ),
  Chip(
    name="h100",
    peak_flops=989e12,
    hbm_bytes=80 * _GIB,
    hbm_bytes_per_sec=3.35e12,
    ici_bytes_per_sec=900e9 / 2,
    device_kinds=("NVIDIA H100 80GB HBM3",),
  ),
)


def chip_of_topology(topology: str) -> Chip:
  """Returns the chip of a topology such as "v5e:4x4", "v5e-16" or "v5e".

  Raises:
    ValueError: there is no such chip in the table.
  """
  name = re.split("[:-]", topology.strip().lower(), maxsplit=1)[0]
  for chip in _CHIPS:
    if chip.name == name:
      return chip
  raise ValueError(
    f"The topology {topology!r} names no known chip; expected it to begin with"
    f" one of {[chip.name for chip in _CHIPS]}, as in 'v5e:4x4'. Choose one of"
    " these."
  )


def chip_of_device(device_kind: str) -> Chip | None:
  """Returns the chip that JAX calls `device_kind`; None for a CPU or others."""
  kind = device_kind.lower()
  for chip in _CHIPS:
    if kind in (known.lower() for known in chip.device_kinds):
      return chip
  return None


def num_hosts(num_chips: int) -> int:
  """Returns how many hosts a topology of so many chips has."""
  return max(num_chips // CHIPS_PER_HOST, 1)
