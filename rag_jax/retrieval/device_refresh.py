"""Embeds rows of a device index again, inside a compiled program.

In: the arrays of an index, a step, a passage encoder as a function. Out: the
arrays with some rows embedded by that encoder, and how old the others are.

Which rows a step embeds depends on the step alone, not on the number of
devices: those whose passage id has the same remainder as the step. So each
device embeds an equal share, and only its own rows: no embedding is sent to
another device.
"""

from collections.abc import Iterator
import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int
import numpy as np

from rag_jax.retrieval.device import DeviceArrays
from rag_jax.retrieval.device import placed_tokens
from rag_jax.retrieval.device import to_int8
from rag_jax.retrieval.index_core import LARGEST
from rag_jax.retrieval.one_pass import row_norms


def refresh_period(num_passages: int, num_rows: int) -> int:
  """Returns after how many steps every row was embedded once."""
  return -(-num_passages // num_rows)


def due_rows(
  arrays: DeviceArrays, step: Int[Array, ""], num_rows: int
) -> Int[Array, "M"]:
  """Returns the rows that `step` embeds; each device gets rows that it holds.

  They are the passages whose id is `step` modulo ceil(P / num_rows), so after
  that many steps every row has been embedded once. All devices get equally many
  entries; an unused entry is N, which is no row.

  Args:
    arrays: the index, with N rows.
    step: from 0.
    num_rows: about how many rows to embed, over all devices; static.

  Raises:
    ValueError: `num_rows` is below 1.
  """
  if num_rows < 1:
    raise ValueError(
      f"num_rows={num_rows} passages per step are to be embedded again;"
      " expected at least 1. Set index.refresh_rows to 1 or more."
    )
  axes, total = arrays.mesh.axis_names, len(arrays.embedded_at)
  period = refresh_period(arrays.num_passages, num_rows)

  def of_device(embedded_at: jax.Array, step: jax.Array) -> jax.Array:
    size = len(embedded_at)
    first = jax.lax.axis_index(axes) * size  # id of the first row here
    row = (step - first) % period + period * jnp.arange(-(-size // period))
    real = (row < size) & (first + row < arrays.num_passages)
    return jnp.where(real, first + row, total)

  return jax.shard_map(
    of_device,
    mesh=arrays.mesh,
    in_specs=(PartitionSpec(axes), PartitionSpec()),
    out_specs=PartitionSpec(axes),
  )(arrays.embedded_at, step)


def all_rows(
  arrays: DeviceArrays, lengths: Int[np.ndarray, "P"], num_rows: int
) -> Iterator[tuple[Int[Array, "M"], int]]:
  """Yields batches of rows, together all, and the tokens of the longest row.

  As in `due_rows`, each device gets rows that it holds, and N for an unused
  entry. Those of similar length are together.

  Args:
    arrays: the index, with N rows.
    lengths: tokens of each passage.
    num_rows: per device and batch; M is as many for each device.
  """
  mesh, total = arrays.mesh, len(arrays.embedded_at)
  own = total // mesh.size  # rows of a device
  padded = np.zeros(total, np.int32)
  padded[: len(lengths)] = lengths
  padded = padded.reshape(mesh.size, own)
  order = np.argsort(padded, axis=1, kind="stable")
  first = own * np.arange(mesh.size)[:, None]
  sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
  for start in range(0, own, num_rows):
    part = order[:, start : start + num_rows]
    longest = np.take_along_axis(padded, part, axis=1).max()
    rows = np.full((mesh.size, num_rows), total, np.int32)
    ids = first + part
    rows[:, : part.shape[1]] = np.where(ids < len(lengths), ids, total)
    if longest:  # else this is padding alone
      yield (
        jax.make_array_from_callback(
          (rows.size,), sharding, rows.reshape(-1).__getitem__
        ),
        int(longest),
      )


def own_passages(
  arrays: DeviceArrays, rows: Int[Array, "M"]
) -> tuple[Int[Array, "M L"], Bool[Array, "M L"]]:
  """Returns the tokens and mask of `rows`, which `due_rows` returned.

  There is no communication: each device reads its own rows. An unused entry
  gets the tokens of some row, because encoders do not accept empty passages.

  Raises:
    ValueError: the index holds no tokens.
  """
  all_tokens, all_lengths = placed_tokens(arrays)
  axes = arrays.mesh.axis_names
  own = PartitionSpec(axes)

  def take(
    tokens: jax.Array, lengths: jax.Array, rows: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    row = rows - jax.lax.axis_index(axes) * len(lengths)
    row = jnp.clip(row, 0, len(lengths) - 1)
    return tokens[row].astype(jnp.int32), lengths[row]

  tokens, lengths = jax.shard_map(
    take, mesh=arrays.mesh, in_specs=(own, own, own), out_specs=(own, own)
  )(all_tokens, all_lengths, rows)
  return tokens, jnp.arange(tokens.shape[-1]) < lengths[:, None]


def refresh_rows(
  arrays: DeviceArrays,
  rows: Int[Array, "M"],
  embeddings: Float[Array, "M R"],
  step: Int[Array, ""],
) -> DeviceArrays:
  """Returns `arrays` with new embeddings in `rows`; without gradient.

  If `arrays` is donated to the program, they are written in place.

  Args:
    arrays: the index.
    rows: what `due_rows` returned. An entry for a row that its device does not
      hold is ignored.
    embeddings: of these rows; they are rounded to what the index stores.
    step: the step whose parameters computed them.
  """
  axes = arrays.mesh.axis_names
  own = PartitionSpec(axes)
  embeddings = jax.lax.stop_gradient(embeddings)
  if arrays.scales is None:
    stored, scales = embeddings.astype(arrays.embeddings.dtype), None
  else:
    stored, scales = to_int8(embeddings.astype(jnp.float32), jnp)
  steps = jnp.full(rows.shape, step, jnp.int32)

  def write(block: jax.Array, rows: jax.Array, values: jax.Array) -> jax.Array:
    row = rows - jax.lax.axis_index(axes) * len(block)
    # Negative numbers would count from the end.
    row = jnp.where((row >= 0) & (row < len(block)), row, len(block))
    return block.at[row].set(values, mode="drop")

  put = jax.shard_map(
    write, mesh=arrays.mesh, in_specs=(own, own, own), out_specs=own
  )
  if arrays.scales is not None and scales is not None:
    arrays = dataclasses.replace(
      arrays, scales=put(arrays.scales, rows, scales)
    )
  if arrays.norms is not None:
    norms = row_norms(stored, scales, jnp)
    arrays = dataclasses.replace(arrays, norms=put(arrays.norms, rows, norms))
  return dataclasses.replace(
    arrays,
    embeddings=put(arrays.embeddings, rows, stored),
    embedded_at=put(arrays.embedded_at, rows, steps),
  )


def empty_arrays(abstract: DeviceArrays) -> DeviceArrays:
  """Returns arrays of zeros, as `device.abstract_arrays` describes them."""

  def zeros() -> DeviceArrays:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract)

  shardings = jax.tree.map(lambda x: x.sharding, abstract)
  return jax.jit(zeros, out_shardings=shardings)()


def with_norms(arrays: DeviceArrays) -> DeviceArrays:
  """Returns `arrays`, with the norms of the rows if there are none."""
  if arrays.norms is not None:
    return arrays
  norms = jax.jit(
    lambda rows, scales: row_norms(rows, scales, jnp),
    out_shardings=arrays.embedded_at.sharding,
  )(arrays.embeddings, arrays.scales)
  return dataclasses.replace(arrays, norms=norms)


def count_bad(
  arrays: DeviceArrays, rows: Int[Array, "M"], embeddings: Float[Array, "M R"]
) -> Int[Array, ""]:
  """Returns how many new rows hold NaN, infinity or too large a number."""
  # Written so that NaN, which compares as False, is bad as well.
  bad = ~jnp.all(jnp.abs(embeddings) <= LARGEST, axis=1)
  return jnp.sum(bad & (rows < len(arrays.embedded_at)))


def staleness(
  arrays: DeviceArrays, step: Int[Array, ""]
) -> tuple[Float[Array, ""], Int[Array, ""]]:
  """Returns the age of the embeddings in steps: the mean and the largest."""
  real = jnp.arange(len(arrays.embedded_at)) < arrays.num_passages
  age = jnp.where(real, step - arrays.embedded_at, 0)
  # In float32, because the sum over many rows may overflow int32.
  mean = jnp.sum(age.astype(jnp.float32)) / arrays.num_passages
  return mean, jnp.max(age)
