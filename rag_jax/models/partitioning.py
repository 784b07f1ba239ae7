"""Logical axis names, and the table that maps them to the device mesh."""

from collections.abc import Sequence
import math
from typing import Any, Literal

from flax import linen as nn
from flax.linen import spmd
import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, PyTree, Shaped
import numpy as np

from rag_jax.config import Config
from rag_jax.config import MeshConfig

LogicalAxis = Literal[
  "batch", "docs", "length", "embed", "heads", "head_dim", "mlp", "vocab",
  "position", "retrieval", "rank",
]  # fmt: skip

# (logical axis, mesh axes). A logical axis that is missing here would silently
# be replicated, so tests/models/partitioning_test.py checks that every name is
# listed.
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
  ("rank", None),
)


def _check_split(config: Config, mesh: MeshConfig) -> None:
  """Raises `ValueError` if the mesh does not divide a parameter evenly."""
  bad = []
  for name, part in (
    ("encoder", config.encoder),
    (
      "causal" if config.generator.kind == "causal" else "generator",
      config.generator_sizes,
    ),
  ):
    for field, axis in (
      ("num_heads", "tensor"),
      ("num_decoder_heads", "tensor"),
      ("mlp_dim", "tensor"),
      ("decoder_mlp_dim", "tensor"),
      ("embed_dim", "fsdp"),
    ):
      # 0 means the encoder's value. Only a generator has decoder fields.
      size, parts = getattr(part, field, 0), getattr(mesh, axis)
      if size % parts:
        bad.append(f"{name}.{field}={size} by mesh.{axis}={parts}")
  if bad:
    raise ValueError(
      f"The mesh cannot split {', '.join(bad)} evenly. Choose sizes that are"
      " multiples, or a smaller mesh.tensor or mesh.fsdp."
    )


def check_devices(config: Config, num_devices: int) -> MeshConfig:
  """Returns the mesh config with `data` filled in.

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
      " or mesh.data=0 to use all remaining devices."
    )
  _check_split(config, mesh)
  if config.train.dropout_prng == "rbg" and num_devices > 1:
    raise ValueError(
      "train.dropout_prng='rbg' is for one device: of several, each would make"
      f" the random numbers of all {num_devices}, since the compiler does not"
      " split its generator. Use 'threefry2x32'."
    )
  shards = data * mesh.fsdp
  parts = config.train.accumulate
  if parts > 1 and config.train.batch_size % (shards * parts):
    raise ValueError(
      f"train.batch_size={config.train.batch_size} must be a multiple of"
      f" {shards * parts}: train.accumulate={parts} times the {shards} devices"
      f" that the batch is split over (mesh.data={data} x mesh.fsdp="
      f"{mesh.fsdp}), so that each device gets an equal share of every part."
    )
  sizes = {
    "train.batch_size": config.train.batch_size,
    "eval.batch_size": config.eval.batch_size,
    "index.embed_batch_size": config.index.embed_batch_size,
  }
  if config.warmup.num_steps:
    sizes["warmup.batch_size"] = config.warmup.batch_size
  if config.contrastive.num_steps:
    sizes["contrastive.batch_size"] = config.contrastive.batch_size
    sizes["contrastive.chunk"] = config.contrastive.chunk  # 0: no parts
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
  """Returns the mesh over `devices`, by default all; `data` must be filled in.

  The devices of a host are neighbours in the mesh. `tensor`, and then `fsdp`,
  therefore stay within a host if their sizes allow it, and the batch rows that
  a host loads are consecutive. `jax.make_mesh` would follow the physical
  topology across hosts instead, and refuses some shapes.
  """
  devices = sorted(jax.devices() if devices is None else devices, key=_host)
  shape = config.data, config.fsdp, config.tensor
  # Auto, because Linen's logical constraints fail on Explicit axes.
  return jax.sharding.Mesh(
    np.array(devices, object).reshape(shape),
    ("data", "fsdp", "tensor"),
    axis_types=(AxisType.Auto,) * 3,
  )


def _host(device: Any) -> tuple[int, int]:
  """Returns a sort key equal on all devices of a host: pod slice, process."""
  # Links between slices are slow: as few mesh axes as possible should cross.
  return getattr(device, "slice_index", None) or 0, device.process_index


def named(
  init: nn.initializers.Initializer, *axes: LogicalAxis
) -> nn.initializers.Initializer:
  """Returns `init` with the dimensions of its arrays named `axes`."""
  return nn.with_logical_partitioning(init, axes)


INIT_STD = 0.02  # initial std of kernels and tables, as in BERT and BART


def dense_init(
  *axes: LogicalAxis, std: float = INIT_STD
) -> nn.initializers.Initializer:
  """Returns a normal initializer whose dimensions are named."""
  return named(nn.initializers.normal(std), *axes)


def constrain(x: jax.Array, *axes: LogicalAxis | None) -> jax.Array:
  """Asks the compiler to lay out activation `x` by its named dimensions."""
  return spmd.with_logical_constraint(x, axes, rules=AXIS_RULES)


def split_table(table: Float[Array, "V D"]) -> Float[Array, "V D"]:
  """Asks for a token table split by rows, even if they do not divide evenly.

  JAX cannot store uneven parts, so a parameter whose rows `tensor` does not
  divide is stored split by columns: see `shardings`. Here, the compiler pads
  the rows to a multiple and ignores the padding in every sum. Parameters and
  checkpoints therefore never contain padding rows.
  """
  return constrain(table, "vocab", "embed")


def shardings(abstract: PyTree, mesh: jax.sharding.Mesh) -> PyTree:
  """Returns the `NamedSharding` of every array in a boxed, abstract tree.

  A dimension (such as the vocabulary) that its mesh axes do not divide is not
  split. The next dimension takes over these mesh axes if they divide it.
  """
  specs = nn.get_partition_spec(abstract)
  layout = spmd.logical_to_mesh_sharding(specs, mesh, AXIS_RULES)
  return jax.tree.map(_even, layout, nn.meta.unbox(abstract))


def _even(sharding: NamedSharding, array: Any) -> NamedSharding:
  """Returns a sharding that gives each device an equal part of `array`."""
  mesh = sharding.mesh
  specs = [*sharding.spec, *[None] * array.ndim][: array.ndim]
  names = [(s,) if isinstance(s, str) else tuple(s or ()) for s in specs]

  def divide(size: int, axes: tuple[str, ...]) -> bool:
    return size % math.prod(mesh.shape[axis] for axis in axes) == 0

  if all(map(divide, array.shape, names)):
    return sharding
  even, left = [], ()
  for size, axes in zip(array.shape, names, strict=True):
    if not divide(size, axes):
      axes, left = (), axes
    elif left and divide(size, axes + left):
      axes, left = axes + left, ()
    even.append(axes)
  return NamedSharding(mesh, PartitionSpec(*even))


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
  """Returns the sharding of arrays whose first axis is B."""
  return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def batch_shards(mesh: jax.sharding.Mesh) -> int:
  """Returns into how many parts `batch_sharding` splits a batch."""
  return mesh.shape["data"] * mesh.shape["fsdp"]


def process_rows(
  mesh: jax.sharding.Mesh, num_rows: int, process_index: int | None = None
) -> Int[np.ndarray, "b"]:
  """Returns the batch rows on the devices of a process, in ascending order.

  If `tensor` spans several hosts, these hold the same rows.

  Args:
    mesh: the mesh that the batch is split over.
    num_rows: B, over all processes.
    process_index: index of the process; None: this one.
  """
  if process_index is None:
    process_index = jax.process_index()
  held = [
    np.arange(*rows.indices(num_rows))
    for device, (rows,) in batch_sharding(mesh)
    .devices_indices_map((num_rows,))
    .items()
    if device.process_index == process_index
  ]
  return np.unique(np.concatenate(held))


def place_batch(
  batch: PyTree, mesh: jax.sharding.Mesh, num_rows: int
) -> PyTree:
  """Returns the global batch on the devices, from each process's local rows.

  Args:
    batch: arrays with the rows `process_rows(mesh, num_rows)`, in that order.
    mesh: the mesh that the batch is split over.
    num_rows: B, over all processes.
  """
  sharding, rows = batch_sharding(mesh), process_rows(mesh, num_rows)

  def place(local: np.ndarray) -> jax.Array:
    def shard(index: tuple[slice, ...] | None) -> np.ndarray:
      assert index is not None, "it is of one dimension or more"
      start, stop, _ = index[0].indices(num_rows)
      # A device's rows are consecutive in the local arrays too.
      first = int(np.searchsorted(rows, start))
      return local[first : first + stop - start]

    return jax.make_array_from_callback(
      (num_rows, *local.shape[1:]), sharding, shard
    )

  return jax.tree.map(place, batch)


def batch_parts(
  batch: PyTree, num_parts: int, *axes: LogicalAxis | None
) -> PyTree:
  """Returns arrays [B, ...] as [num_parts, B / num_parts, ...].

  Inside a program for a mesh, each device takes the rows of every part from the
  rows of the batch that it holds: nothing moves between devices.

  Args:
    batch: arrays of B rows, a multiple of num_parts times the number of devices
      that the batch is split over.
    num_parts: number of parts.
    *axes: names of the dimensions after B; none are split if not given.
  """
  shards = num_shards()

  def split(x: Array) -> Array:
    x = x.reshape(shards, num_parts, -1, *x.shape[1:])
    x = jnp.swapaxes(x, 0, 1).reshape(num_parts, -1, *x.shape[3:])
    return constrain(x, None, "batch", *axes)

  return jax.tree.map(split, batch)


def batch_whole(
  parts: Shaped[Array, "parts B *rest"], *axes: LogicalAxis | None
) -> Shaped[Array, "B2 *rest"]:
  """Undoes `batch_parts` of an array."""
  num_parts, _, *rest = parts.shape
  x = parts.reshape(num_parts, num_shards(), -1, *rest)
  return constrain(jnp.swapaxes(x, 0, 1).reshape(-1, *rest), "batch", *axes)


def num_batch_parts(num_rows: int, most: int) -> int:
  """Returns the smallest number of equal parts of a batch.

  It is 1 if devices hold unequal shares, or if the program being traced was not
  told its mesh: a part could be the share of one device.

  Args:
    num_rows: B.
    most: the largest number of rows of a part on each device; 0: no limit.
  """
  held, left = divmod(num_rows, num_shards())
  if not most or left or jax.sharding.get_abstract_mesh().empty:
    return 1
  return next(
    n for n in range(1, held + 1) if not held % n and held // n <= most
  )


def num_shards() -> int:
  """Returns into how many parts the program being traced splits a batch."""
  sizes = jax.sharding.get_abstract_mesh().shape
  return sizes.get("data", 1) * sizes.get("fsdp", 1)


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
  """Returns the sharding of arrays replicated on every device."""
  return NamedSharding(mesh, PartitionSpec())
