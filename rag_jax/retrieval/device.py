"""Search in the memory of the accelerators, inside a compiled program.

In: passage embeddings, and passages as tokens. Out: arrays whose rows are
sharded over a mesh, and pure functions that search them and gather passages,
for a train step or an index of kind "device" (device_index.py).

Each device scores its own rows. Only the best are communicated: ids and scores
of B x K x devices passages, never of B x P.
"""

from collections.abc import Callable
import dataclasses
import functools
import typing
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Integer, Shaped
import numpy as np

from rag_jax.retrieval.index_core import check_dim
from rag_jax.retrieval.index_core import check_n_docs

_SPARE = 16  # rows that each device scores again, besides its n_docs best
STORAGES = {"float32": np.float32, "bfloat16": jnp.bfloat16, "int8": np.int8}


# No type check, because JAX also fills the fields with shapes and shardings.
@typing.no_type_check
@flax.struct.dataclass
class DeviceArrays:
  """Passages, their rows sharded over all devices of `mesh`. Row = passage id.

  There are N >= num_passages rows, so that all devices and all chunks have
  equally many. Search never returns the rows of this padding.
  """

  embeddings: Float[Any, "N R"]  # or int8
  scales: Float[Any, "N"] | None  # with int8: a row is scale * integers
  tokens: Integer[Any, "N L"] | None
  lengths: Int[Any, "N"] | None  # number of tokens; the rest is padding
  embedded_at: Int[Any, "N"]  # the step whose parameters embedded the row
  num_passages: int = flax.struct.field(pytree_node=False)  # P
  mesh: Mesh = flax.struct.field(pytree_node=False)
  num_chunks: int = flax.struct.field(pytree_node=False)  # per device
  recall_target: float = flax.struct.field(pytree_node=False)  # 1.0: exact


def place_arrays(
  embeddings: Float[np.ndarray, "P R"],
  mesh: Mesh,
  *,
  storage: str = "float32",
  recall_target: float = 1.0,
  chunk_passages: int = 0,
  step: int = 0,
) -> DeviceArrays:
  """Copies embeddings into the memory of the devices of `mesh`.

  Args:
    embeddings: finite numbers, which `build_index` checks. A memory map is read
      one device at a time. Each process only reads the rows of its own devices.
    mesh: the rows are split over all its axes together.
    storage: "float32", "bfloat16" or "int8" (with one scale per row).
    recall_target: below 1.0, the target of `jax.lax.approx_max_k`.
    chunk_passages: how many rows a device scores at a time, so that only
      [B, chunk_passages] scores exist; 0 for all its rows at once.
    step: the step whose parameters computed the embeddings.
  """
  abstract = abstract_arrays(
    len(embeddings),
    embeddings.shape[1],
    mesh,
    storage=storage,
    recall_target=recall_target,
    chunk_passages=chunk_passages,
  )
  place = functools.partial(
    _place, mesh=mesh, num_rows=abstract.embedded_at.shape[0]
  )
  if storage == "int8":
    stored = place(embeddings, lambda block: to_int8(block)[0])
    scales = place(embeddings, lambda block: to_int8(block)[1])
  else:
    stored = place(embeddings, lambda block: block.astype(STORAGES[storage]))
    scales = None
  return dataclasses.replace(
    abstract,
    embeddings=stored,
    scales=scales,
    embedded_at=place(
      embeddings, lambda block: np.full(len(block), step, np.int32)
    ),
  )


def abstract_arrays(
  num_passages: int,
  embedding_dim: int,
  mesh: Mesh,
  *,
  storage: str = "float32",
  recall_target: float = 1.0,
  chunk_passages: int = 0,
) -> DeviceArrays:
  """Returns the shapes, dtypes and shardings of what `place_arrays` returns."""
  num_rows, num_chunks = _split(num_passages, mesh, chunk_passages)
  sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))

  def array(dtype: Any, *tail: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((num_rows, *tail), dtype, sharding=sharding)

  return DeviceArrays(
    embeddings=array(STORAGES[storage], embedding_dim),
    scales=array(np.float32) if storage == "int8" else None,
    tokens=None,
    lengths=None,
    embedded_at=array(np.int32),
    num_passages=num_passages,
    mesh=mesh,
    num_chunks=num_chunks,
    recall_target=recall_target,
  )


def place_tokens(
  arrays: DeviceArrays,
  tokens: Integer[np.ndarray, "P L"],
  lengths: Integer[np.ndarray, "P"],
) -> DeviceArrays:
  """Returns `arrays` with the tokens of the passages, for `gather_passages`.

  Args:
    arrays: the embeddings of the same passages.
    tokens: their type is kept: uint16 takes half the memory of int32.
    lengths: the number of real tokens per row; the rest is padding.

  Raises:
    ValueError: there are more or fewer rows than passages.
  """
  if not len(tokens) == len(lengths) == arrays.num_passages:
    raise ValueError(
      f"There are tokens of {len(tokens)} passages and {len(lengths)} lengths,"
      f" but the index holds {arrays.num_passages} passages. Expected one row"
      " per passage; use the tokens of the passages in the index."
    )
  place = functools.partial(
    _place, mesh=arrays.mesh, num_rows=len(arrays.embeddings)
  )
  return dataclasses.replace(
    arrays,
    tokens=place(tokens, np.asarray),
    lengths=place(lengths, lambda block: block.astype(np.int32)),
  )


def search_device(
  arrays: DeviceArrays,
  question_embeddings: Float[Array, "B R"],
  n_docs: int,
) -> tuple[Int[Array, "B K"], Float[Array, "B K"]]:
  """Finds the passages with the largest inner product; call it inside a jit.

  It has no gradient. For a question with NaN it returns arbitrary passages, but
  valid ids.

  Args:
    arrays: the result of `place_arrays`. Pass it to the jit as an argument: a
      constant would be copied into the program.
    question_embeddings: [B, R].
    n_docs: how many passages to return per question (K), static.

  Returns:
    Passage ids [B, K] int32 and scores [B, K] float32 of the stored
    embeddings, best first; of equal scores the smaller id (if more than 16
    passages tie for the last place, not always). They are replicated.

  Raises:
    ValueError: there are fewer passages than `n_docs`, or the embeddings have
      another dimension.
  """
  check_dim(question_embeddings.shape, arrays.embeddings.shape[1])
  check_n_docs(n_docs, arrays.num_passages)
  rows = PartitionSpec(arrays.mesh.axis_names)
  search = jax.shard_map(
    functools.partial(_search_shard, arrays, n_docs),
    mesh=arrays.mesh,
    in_specs=(rows, rows, PartitionSpec()),
    out_specs=PartitionSpec(),  # all devices merge the same winners,
    check_vma=False,  # but JAX cannot prove it
  )
  return search(
    *jax.lax.stop_gradient(
      (
        arrays.embeddings,
        arrays.scales,
        question_embeddings.astype(jnp.float32),
      )
    )
  )


def gather_passages(
  arrays: DeviceArrays, ids: Int[Array, "B K"]
) -> tuple[Int[Array, "B K L"], Bool[Array, "B K L"]]:
  """Returns tokens [B, K, L] int32 and their mask; call it inside a jit.

  Raises:
    ValueError: `place_tokens` was not called.
  """
  all_tokens, all_lengths = placed_tokens(arrays)
  tokens = gather_rows(arrays, all_tokens, ids).astype(jnp.int32)
  lengths = gather_rows(arrays, all_lengths, ids)
  return tokens, jnp.arange(tokens.shape[-1]) < lengths[..., None]


def placed_tokens(
  arrays: DeviceArrays,
) -> tuple[Integer[Any, "N L"], Int[Any, "N"]]:
  """Returns tokens and lengths, or raises `ValueError` if there are none."""
  if arrays.tokens is None or arrays.lengths is None:
    raise ValueError(
      "The device index holds no tokens, only embeddings; expected both, to"
      " read passages. Call place_tokens(arrays, tokens, lengths) first."
    )
  return arrays.tokens, arrays.lengths


def gather_embeddings(
  arrays: DeviceArrays, ids: Int[Array, "B K"]
) -> Float[Array, "B K R"]:
  """Returns the stored embeddings in float32; without gradient."""
  embeddings = jax.lax.stop_gradient(arrays.embeddings)
  found = gather_rows(arrays, embeddings, ids).astype(jnp.float32)
  if arrays.scales is None:
    return found
  return found * gather_rows(arrays, arrays.scales, ids)[..., None]


def gather_rows(
  arrays: DeviceArrays,
  values: Shaped[Array, "N *rest"],
  ids: Int[Array, "B K"],
) -> Shaped[Array, "B K *rest"]:
  """Returns the rows `ids` of `values`, which is sharded as `arrays`.

  A row that does not exist gives zeros. Small integer types are widened.
  """
  axes = arrays.mesh.axis_names

  def take(block: jax.Array, ids: jax.Array) -> jax.Array:
    row = ids - jax.lax.axis_index(axes) * len(block)
    here = (row >= 0) & (row < len(block))
    found = block[jnp.clip(row, 0, len(block) - 1)]
    here = here.reshape(here.shape + (1,) * (found.ndim - here.ndim))
    # One device has the row. Small types have no sum, or no exact one.
    wide = jnp.promote_types(found.dtype, jnp.int32)
    return jax.lax.psum(jnp.where(here, found, 0).astype(wide), axes)

  return jax.shard_map(
    take,
    mesh=arrays.mesh,
    in_specs=(PartitionSpec(axes), PartitionSpec()),
    out_specs=PartitionSpec(),
  )(values, ids)


def _split(
  num_passages: int, mesh: Mesh, chunk_passages: int
) -> tuple[int, int]:
  """Returns the number of rows, and of chunks per device."""
  rows = -(-num_passages // mesh.size)
  num_chunks = -(-rows // (chunk_passages or rows))
  return -(-rows // num_chunks) * num_chunks * mesh.size, num_chunks


def _place(
  array: np.ndarray,
  convert: Callable[[np.ndarray], np.ndarray],
  *,
  mesh: Mesh,
  num_rows: int,
) -> jax.Array:
  """Returns `convert(array)`, padded with zeros and sharded over `mesh`."""
  tail = convert(array[:1]).shape[1:]

  def read(index: Any) -> np.ndarray:
    start, stop, _ = index[0].indices(num_rows)
    block = convert(np.asarray(array[start:stop]))
    filled = np.zeros((stop - start, *tail), block.dtype)
    filled[: len(block)] = block
    return filled

  return jax.make_array_from_callback(
    (num_rows, *tail),
    NamedSharding(mesh, PartitionSpec(mesh.axis_names)),
    read,
  )


def to_int8(
  embeddings: Float[Any, "N R"], xp: Any = np
) -> tuple[Any, Float[Any, "N"]]:
  """Returns int8 [N, R] and their scales; `xp` is the module: NumPy or JAX's.

  A row of zeros has the scale 1.
  """
  largest = xp.max(xp.abs(embeddings), axis=1)
  scales = xp.where(largest > 0, largest / 127, 1).astype(np.float32)
  return xp.rint(embeddings / scales[:, None]).astype(np.int8), scales


def _search_shard(
  arrays: DeviceArrays,  # only its settings are used
  n_docs: int,
  embeddings: jax.Array,  # n R, the rows of this device
  scales: jax.Array | None,  # n
  questions: jax.Array,  # B R
) -> tuple[jax.Array, jax.Array]:
  """Returns the best of all devices; runs on each, with its own rows."""
  axes, rows = arrays.mesh.axis_names, len(embeddings)
  first = jax.lax.axis_index(axes) * rows  # id of the first row
  spare = min(n_docs + _SPARE, rows)
  rough, row = _scan_chunks(arrays, spare, first, embeddings, scales, questions)
  # How a matrix product rounds depends on its shape and on the place of a row
  # in it. With this sum equal rows have equal scores, on any number of devices.
  found = embeddings[row].astype(jnp.float32)  # B k R
  scores = jnp.sum(questions[:, None] * found, axis=-1)
  if scales is not None:
    scores *= scales[row]
  scores = jnp.where(rough > -jnp.inf, _finite(scores), -jnp.inf)
  best = _sort(scores, first + row, min(n_docs, rows))
  scores, ids = jax.lax.all_gather(best, axes, axis=1, tiled=True)
  scores, ids = _sort(scores, ids, n_docs)
  return ids, scores


def _scan_chunks(
  arrays: DeviceArrays,
  k: int,
  first: jax.Array,
  embeddings: jax.Array,
  scales: jax.Array | None,
  questions: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Returns scores and rows [B, k] of the best, chunk by chunk.

  If there are fewer than k real rows, rows of the padding follow, with -inf.
  """
  size = len(embeddings) // arrays.num_chunks

  def merge(best: tuple, start: jax.Array) -> tuple[tuple, None]:
    block = jax.lax.dynamic_slice_in_dim(embeddings, start, size)
    scores = jnp.einsum(
      "BR,NR->BN",
      questions,
      block.astype(jnp.float32),
      precision=jax.lax.Precision.HIGHEST,
    )
    if scales is not None:
      scores *= jax.lax.dynamic_slice_in_dim(scales, start, size)
    real = first + start + jnp.arange(size) < arrays.num_passages
    scores = jnp.where(real, _finite(scores), -jnp.inf)
    if arrays.recall_target < 1:
      scores, row = jax.lax.approx_max_k(
        scores, min(k, size), recall_target=arrays.recall_target
      )
    else:  # of equal scores the first: the smaller id
      scores, row = jax.lax.top_k(scores, min(k, size))
    scores = jnp.concatenate([best[0], scores], axis=1)
    row = jnp.concatenate([best[1], start + row], axis=1)
    scores, chosen = jax.lax.top_k(scores, k)
    return (scores, jnp.take_along_axis(row, chosen, axis=1)), None

  shape = (len(questions), k)
  none = jnp.full(shape, -jnp.inf), jnp.zeros(shape, jnp.int32)
  starts = jnp.arange(arrays.num_chunks, dtype=jnp.int32) * size
  return jax.lax.scan(merge, none, starts)[0]


def _finite(scores: jax.Array) -> jax.Array:
  """Returns scores that can be sorted: without NaN, -inf and minus zero."""
  lowest = jnp.finfo(jnp.float32).min
  scores = jnp.where(scores > lowest, scores, lowest)
  return jnp.where(scores == 0, 0.0, scores)


def _sort(
  scores: jax.Array, ids: jax.Array, k: int
) -> tuple[jax.Array, jax.Array]:
  """Returns the best k scores and ids per row; of equal ones the smaller id."""
  scores, ids = jax.lax.sort((-scores, ids), num_keys=2)
  return -scores[:, :k], ids[:, :k]
