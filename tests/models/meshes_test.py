"""Meshes over the chips of TPU pods, which no test machine has.

The chips and hosts of every topology are those that the TPU's compiler tells
(`get_topology_desc`, in the extra `tpu`). Where it is installed, a test holds
what stands here against it.
"""

import dataclasses
import importlib.util
import itertools
import json
import os
import subprocess
import sys

from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np
import pytest

from rag_jax.config import MeshConfig
from rag_jax.models.partitioning import make_mesh
from rag_jax.models.partitioning import process_rows

_CORES = {"v4": 2}  # of a chip; each is a device, unless the two are joined
TOPOLOGIES = {
  **{f"{kind}:{size}": None for kind in ("v5e", "v6e") for size in (
    "1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")},
  **{f"{kind}:{size}": None for kind in ("v4", "v5p") for size in (
    "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8")},
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Chip:
  """A device as JAX shows it."""

  id: int
  process_index: int
  coords: tuple[int, int, int]
  core_on_chip: int
  slice_index: int = 0
  platform: str = "tpu"


def chips(name, num_slices=1):
  """Returns the devices of a topology, by id: along x first, hosts of 2x2."""
  kind, _, size = name.partition(":")
  x, y, z = (*map(int, size.split("x")), 1)[:3]
  found = []
  for part in range(num_slices):
    for k, j, i in itertools.product(range(z), range(y), range(x)):
      host = (k * -(-y // 2) + j // 2) * -(-x // 2) + i // 2
      host += part * z * -(-y // 2) * -(-x // 2)
      for core in range(_CORES.get(kind, 1)):
        found.append(Chip(len(found), host, (i, j, k), core, part))
  return found


EVERY = pytest.mark.parametrize("name", TOPOLOGIES)


def shapes(num_devices):
  """Yields every (data, fsdp, tensor) of powers of two."""
  sizes = [1 << i for i in range(num_devices.bit_length())]
  for fsdp, tensor in itertools.product(sizes, sizes):
    if fsdp * tensor <= num_devices:
      yield num_devices // (fsdp * tensor), fsdp, tensor


def mesh_of(shape, devices):
  data, fsdp, tensor = shape
  return make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor), devices)


def hosts_of(mesh):
  return np.vectorize(lambda device: device.process_index)(mesh.devices)


@EVERY
def test_hosts_follow_each_other_and_inner_axes_stay_within(name):
  devices = chips(name)
  size = len(devices) // len({d.process_index for d in devices})  # of a host
  num_shapes = 0
  for shape in shapes(len(devices)):
    hosts = hosts_of(mesh_of(shape, devices))
    assert hosts.shape == shape
    flat = hosts.reshape(-1)
    np.testing.assert_array_equal(flat, np.sort(flat))
    _, fsdp, tensor = shape
    # As many hosts as it takes, in each group along the inner axes.
    for inner in (tensor, fsdp * tensor):
      groups = flat.reshape(-1, inner)
      for group in groups:
        assert len(np.unique(group)) == -(-inner // size)
    num_shapes += 1
  assert num_shapes > len(devices).bit_length() // 2


@EVERY
def test_each_row_is_held_by_the_hosts_that_its_devices_are_on(name):
  devices = chips(name)
  size = len(devices) // len({d.process_index for d in devices})
  for data, fsdp, tensor in shapes(len(devices)):
    if len(devices) > 64 and tensor not in (1, 2, 8):
      continue  # as slow as they are many
    mesh = mesh_of((data, fsdp, tensor), devices)
    batch = 2 * data * fsdp
    held = [
      process_rows(mesh, batch, host)
      for host in sorted({d.process_index for d in devices})
    ]
    for rows in held:  # one block
      np.testing.assert_array_equal(
        rows, np.arange(rows[0], rows[0] + len(rows))
      )
    counts = np.bincount(np.concatenate(held), minlength=batch)
    # Once, or by each of the hosts that the axis `tensor` goes over.
    assert set(counts) == {-(-tensor // size)}


@pytest.mark.parametrize("shape", [(4, 1, 3), (1, 2, 6), (2, 3, 2), (1, 12, 1)])
def test_axes_that_do_not_fit_the_hosts_share_rows_and_lose_none(shape):
  devices = chips("v5e:2x6")
  mesh = mesh_of(shape, devices)
  sharding = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
  batch = 2 * shape[0] * shape[1]
  shards = sharding.devices_indices_map((batch,))
  for host in range(3):
    rows = process_rows(mesh, batch, host)
    expected = set()
    for device, (part,) in shards.items():
      if device.process_index == host:
        expected |= set(range(*part.indices(batch)))
    assert rows.tolist() == sorted(expected)


def test_the_outer_axis_alone_crosses_slices():
  devices = chips("v5e:4x4", num_slices=2)
  hosts = sorted({d.process_index for d in devices})
  swapped = {host: hosts[i ^ 1] for i, host in enumerate(hosts)}
  devices = [
    # As where the numbers of hosts are not those of their slices.
    dataclasses.replace(d, process_index=swapped[d.process_index], id=-d.id)
    for d in devices
  ][::-1]
  mesh = mesh_of((2, 4, 4), devices)
  slices = np.vectorize(lambda device: device.slice_index)(mesh.devices)
  np.testing.assert_array_equal(
    slices, np.broadcast_to(np.arange(2)[:, None, None], (2, 4, 4))
  )


_ASK = """
import json, sys
from jax.experimental import topologies
def devices(name):
  return topologies.get_topology_desc(name, platform="tpu").devices
print(json.dumps({
  name: [[d.id, d.process_index] for d in devices(name)]
  for name in sys.argv[1:]
}))
"""


def told_by_the_compiler():
  done = subprocess.run(
    [sys.executable, "-c", _ASK, *TOPOLOGIES],
    env=os.environ | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"},
    capture_output=True,
    text=True,
    check=True,
    timeout=300,
  )
  told = json.loads(done.stdout.splitlines()[-1])
  return {
    name: sorted((number, host) for number, host, *_ in told[name])
    for name in told
  }


def described_here():
  return {
    name: [(c.id, c.process_index) for c in chips(name)] for name in TOPOLOGIES
  }


SOURCES = [described_here]
if importlib.util.find_spec("libtpu") is not None:
  SOURCES.append(told_by_the_compiler)


@pytest.mark.parametrize("source", SOURCES)
def test_the_topologies_are_those_of_the_compiler(source):
  found = source()
  assert found == described_here()
  sizes = {
    name: (len(found[name]), len({host for _, host in found[name]}))
    for name in ("v5e:2x4", "v5e:16x16", "v6e:4x4", "v5p:4x4x8", "v4:2x2x2")
  }
  assert sizes == {  # devices and hosts
    "v5e:2x4": (8, 2),
    "v5e:16x16": (256, 64),
    "v6e:4x4": (16, 4),
    "v5p:4x4x8": (128, 32),
    "v4:2x2x2": (16, 2),
  }
  # In v5e:4x4 the first row of chips is on two hosts.
  assert found["v5e:4x4"][:5] == [(0, 0), (1, 0), (2, 1), (3, 1), (4, 0)]
