"""Logical axis names, and the one table that maps them onto the device mesh."""

from collections.abc import Sequence
from typing import Any, Literal

from flax import linen as nn
from flax.linen import spmd
import jax
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
from jaxtyping import PyTree

from rag_jax.config import Config
from rag_jax.config import MeshConfig

LogicalAxis = Literal[
  "batch", "docs", "length", "embed", "heads", "head_dim", "mlp", "vocab",
  "position", "retrieval",
]  # fmt: skip

# (logical axis, mesh axes). A logical axis that is missing here would be
# replicated without a word, so tests/models/partitioning_test.py checks that
# every name is listed.
AXIS_RULES = (
  ("batch", ("data", "fsdp")),
  ("docs", None),
  ("length", None),
  ("embed", "fsdp"),
  ("heads", "tensor"),
  ("head_dim", None),
  ("mlp", "tensor"),
  ("vocab", "tensor"),
  ("position", None),
  ("retrieval", None),
)


def _check_split(config: Config, mesh: MeshConfig) -> None:
  """Raises `ValueError` if a parameter cannot be split as the mesh says."""
  bad = []
  for name, part in (
    ("encoder", config.encoder),
    ("generator", config.generator),
  ):
    for field, axis in (
      ("num_heads", "tensor"),
      ("mlp_dim", "tensor"),
      ("embed_dim", "fsdp"),
    ):
      size, parts = getattr(part, field), getattr(mesh, axis)
      if size % parts:
        bad.append(f"{name}.{field}={size} by mesh.{axis}={parts}")
  if bad:
    raise ValueError(
      f"The mesh cannot split {', '.join(bad)} evenly. Choose sizes that are"
      " multiples, or a smaller mesh.tensor or mesh.fsdp."
    )


def check_devices(config: Config, num_devices: int) -> MeshConfig:
  """Returns the mesh with `data` filled in.

  Raises:
    ValueError: the mesh or a batch cannot be split over the devices.
  """
  mesh = config.mesh
  data = mesh.data or max(num_devices // (mesh.fsdp * mesh.tensor), 1)
  if data * mesh.fsdp * mesh.tensor != num_devices:
    raise ValueError(
      f"mesh.data={mesh.data}, mesh.fsdp={mesh.fsdp} and mesh.tensor="
      f"{mesh.tensor} need {data * mesh.fsdp * mesh.tensor} devices, but"
      f" there are {num_devices}. Choose values whose product is that number,"
      " or mesh.data=0 to use all that are left."
    )
  _check_split(config, mesh)
  shards = data * mesh.fsdp
  sizes = {
    "train.batch_size": config.train.batch_size,
    "eval.batch_size": config.eval.batch_size,
    "index.embed_batch_size": config.index.embed_batch_size,
  }
  if config.warmup.num_steps:
    sizes["warmup.batch_size"] = config.warmup.batch_size
  bad = [f"{name}={size}" for name, size in sizes.items() if size % shards]
  if bad:
    raise ValueError(
      f"{', '.join(bad)} must be a multiple of {shards}, the devices that the"
      f" batch is split over (mesh.data={data} x mesh.fsdp={mesh.fsdp}), so"
      " that each gets an equal share."
    )
  return MeshConfig(data=data, fsdp=mesh.fsdp, tensor=mesh.tensor)


def make_mesh(
  config: MeshConfig, devices: Sequence[Any] | None = None
) -> jax.sharding.Mesh:
  """Returns the mesh over `devices`, by default all; data is filled in."""
  # Auto, because Linen's logical constraints fail on Explicit axes, which
  # jax.make_mesh now makes by default.
  return jax.make_mesh(
    (config.data, config.fsdp, config.tensor),
    ("data", "fsdp", "tensor"),
    axis_types=(AxisType.Auto,) * 3,
    devices=devices,
  )


def named(
  init: nn.initializers.Initializer, *axes: LogicalAxis
) -> nn.initializers.Initializer:
  """Returns `init` with the dimensions of what it makes named `axes`."""
  return nn.with_logical_partitioning(init, axes)


def dense_init(
  *axes: LogicalAxis, std: float = 0.02
) -> nn.initializers.Initializer:
  """Returns a normal initializer, BERT's and BART's, its dimensions named."""
  return named(nn.initializers.normal(std), *axes)


def constrain(x: jax.Array, *axes: LogicalAxis) -> jax.Array:
  """Asks the compiler to lay out activation `x` by its named dimensions."""
  return spmd.with_logical_constraint(x, axes, rules=AXIS_RULES)


def shardings(abstract: PyTree, mesh: jax.sharding.Mesh) -> PyTree:
  """Returns the `NamedSharding` of every array in a boxed, abstract tree."""
  specs = nn.get_partition_spec(abstract)
  return spmd.logical_to_mesh_sharding(specs, mesh, AXIS_RULES)


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
  """Returns the sharding of arrays whose first axis is B."""
  return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
  """Returns the sharding of arrays that every device holds whole."""
  return NamedSharding(mesh, PartitionSpec())
