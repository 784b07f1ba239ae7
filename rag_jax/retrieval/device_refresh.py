"""Rows of a device index that are embedded again, inside a compiled program.

In: the arrays of an index, a step, a passage encoder as a function. Out: the
arrays with some rows as that encoder embeds them, and how old the others are.

Which rows a step embeds is a function of the step alone, on however many
devices the rows lie: those whose passage id leaves the same remainder as the
step. So each device embeds an equal share, of its own rows: no embedding
travels to another device's row.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from rag_jax.retrieval.device import DeviceArrays


def num_turns(num_passages: int, num_rows: int) -> int:
  """Returns in how many steps every row is embedded, `num_rows` in each."""
  return -(-num_passages // num_rows)


def due_rows(
  arrays: DeviceArrays, step: Int[Array, ""], num_rows: int
) -> Int[Array, "M"]:
  """Returns the rows that `step` embeds, for each device those that it holds.

  Of P passages those whose id is `step` modulo ceil(P / num_rows), so that
  every row has its turn in as many steps. A device has as many places as any
  other; one that is left over says N, which is no row.

  Args:
    arrays: of N rows.
    step: from 0.
    num_rows: about how many, over all devices; static.

  Raises:
    ValueError: `num_rows` is below 1.
  """
  if num_rows < 1:
    raise ValueError(
      f"num_rows={num_rows} passages are to be embedded again; expected at"
      " least 1. Set index.refresh_rows to 1 or more."
    )
  axes, total = arrays.mesh.axis_names, len(arrays.embedded_at)
  turns = num_turns(arrays.num_passages, num_rows)

  def of_device(embedded_at: jax.Array, step: jax.Array) -> jax.Array:
    size = len(embedded_at)
    first = jax.lax.axis_index(axes) * size  # id of the first row
    row = (step - first) % turns + turns * jnp.arange(-(-size // turns))
    real = (row < size) & (first + row < arrays.num_passages)
    return jnp.where(real, first + row, total)

  return jax.shard_map(
    of_device,
    mesh=arrays.mesh,
    in_specs=(PartitionSpec(axes), PartitionSpec()),
    out_specs=PartitionSpec(axes),
  )(arrays.embedded_at, step)


def own_passages(
  arrays: DeviceArrays, rows: Int[Array, "M"]
) -> tuple[Int[Array, "M L"], Bool[Array, "M L"]]:
  """Returns the tokens of `rows`, as `due_rows` gave them, and their mask.

  Nothing travels: each device reads its own. A place that is left over has the
  tokens of some row, for an encoder likes no empty ones.

  Raises:
    ValueError: the index holds no tokens.
  """
  if arrays.tokens is None or arrays.lengths is None:
    raise ValueError(
      "The device index holds no tokens, only embeddings; expected both to"
      " embed passages again. Call place_tokens(arrays, tokens, lengths) first."
    )
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
  )(arrays.tokens, arrays.lengths, rows)
  return tokens, jnp.arange(tokens.shape[-1]) < lengths[:, None]


def refresh_rows(
  arrays: DeviceArrays,
  rows: Int[Array, "M"],
  embeddings: Float[Array, "M R"],
  step: Int[Array, ""],
) -> DeviceArrays:
  """Returns `arrays` with other embeddings in `rows`; without gradient.

  They are written in place where `arrays` is donated to the program.

  Args:
    arrays: of an index.
    rows: as `due_rows` gave them. What a device is given for a row that it does
      not hold is dropped.
    embeddings: of these rows, rounded to what the index stores.
    step: whose parameters embedded them.
  """
  axes = arrays.mesh.axis_names
  own = PartitionSpec(axes)
  stored, scales = _store(arrays, jax.lax.stop_gradient(embeddings))
  steps = jnp.full(rows.shape, step, jnp.int32)

  def write(block: jax.Array, rows: jax.Array, values: jax.Array) -> jax.Array:
    row = rows - jax.lax.axis_index(axes) * len(block)
    # Numbers below zero would count from the end.
    row = jnp.where((row >= 0) & (row < len(block)), row, len(block))
    return block.at[row].set(values, mode="drop")

  put = jax.shard_map(
    write, mesh=arrays.mesh, in_specs=(own, own, own), out_specs=own
  )
  if arrays.scales is not None and scales is not None:
    arrays = dataclasses.replace(
      arrays, scales=put(arrays.scales, rows, scales)
    )
  return dataclasses.replace(
    arrays,
    embeddings=put(arrays.embeddings, rows, stored),
    embedded_at=put(arrays.embedded_at, rows, steps),
  )


def staleness(
  arrays: DeviceArrays, step: Int[Array, ""]
) -> tuple[Float[Array, ""], Int[Array, ""]]:
  """Returns how many steps old the embeddings are: their mean and the most."""
  real = jnp.arange(len(arrays.embedded_at)) < arrays.num_passages
  age = jnp.where(real, step - arrays.embedded_at, 0)
  # In float32, for many rows times many steps are beyond int32.
  mean = jnp.sum(age.astype(jnp.float32)) / arrays.num_passages
  return mean, jnp.max(age)


def _store(
  arrays: DeviceArrays, embeddings: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
  """Returns embeddings as `arrays` stores them, and what their integers mean.

  As `device.place_arrays` does.
  """
  if arrays.scales is None:
    return embeddings.astype(arrays.embeddings.dtype), None
  embeddings = embeddings.astype(jnp.float32)
  largest = jnp.max(jnp.abs(embeddings), axis=1)
  scales = jnp.where(largest > 0, largest / 127, 1.0)
  integers = jnp.rint(embeddings / scales[:, None])
  return integers.astype(arrays.embeddings.dtype), scales
