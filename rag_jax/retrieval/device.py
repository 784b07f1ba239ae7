"""Search in the memory of the accelerators, inside a compiled program.

In: passage embeddings, and passages as tokens. Out: arrays whose rows are
sharded over a mesh, and pure functions that search them and gather passages,
for a train step or an index of kind "device" (device_index.py).

Each device scores its own rows. Only the best are communicated: ids and scores
of B x K x devices passages, never of B x P.

If bfloat16 or int8 is stored, an accelerator multiplies once, in bfloat16. This
is enough to find passages among which the best are; they are scored again in
float32. How far the product may be wrong is known (one_pass.py), so each device
proves that it left none of the best behind. Questions for which it cannot, as
many passages are nearly as good, it searches again at full precision.
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
from rag_jax.retrieval.one_pass import error_per_norm
from rag_jax.retrieval.one_pass import one_pass_scores
from rag_jax.retrieval.one_pass import row_norms

_SPARE = 16  # rows that each device scores again, besides its n_docs best
# As many after one product in bfloat16. Of 328,365 random passages of 768
# numbers, ranks 5 and 37 are 9 times the largest error apart, or 5 times for
# the worst of 200 questions. With 16 spares it would be 6 and 3 times.
_SPARE_ONE_PASS = 32
# Questions that are searched again at a time. On a TPU, fewer are no faster.
_REPEAT = 128
# In the names of the operations that hardly ever run; plans leave them out.
RARELY = "rarely"
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
  # Of the rows. None in a checkpoint; then the search is exact, but slower.
  norms: Float[Any, "N"] | None
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
    recall_target: below 1.0, the target of `jax.lax.approx_max_k`. Then nothing
      is proven, and nothing searched again.
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

  def convert(block: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    if storage == "int8":
      return to_int8(block)
    return block.astype(STORAGES[storage]), None

  return dataclasses.replace(
    abstract,
    embeddings=place(embeddings, lambda block: convert(block)[0]),
    scales=abstract.scales and place(embeddings, lambda x: to_int8(x)[1]),
    norms=place(embeddings, lambda block: row_norms(*convert(block))),
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
    norms=array(np.float32),
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
  # Few CPUs are faster so. For TPUs, XLA would make a copy of float32 rows.
  on_cpu = arrays.mesh.devices.flat[0].platform == "cpu"
  rounds = arrays.embeddings.dtype == jnp.float32
  one_pass = not (on_cpu or rounds or arrays.norms is None)
  ids, scores, _ = _search(arrays, question_embeddings, n_docs, one_pass)
  return ids, scores


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


def _search(
  arrays: DeviceArrays,
  questions: Float[Array, "B R"],
  n_docs: int,
  one_pass: bool,  # choose passages by one product in bfloat16
) -> tuple[Int[Array, "B K"], Float[Array, "B K"], Int[Array, "devices"]]:
  """Returns what `search_device` does, and the questions searched again."""
  arrays = dataclasses.replace(arrays, tokens=None, lengths=None)
  rows, all_rows = PartitionSpec(arrays.mesh.axis_names), PartitionSpec()
  search = jax.shard_map(
    functools.partial(_search_shard, n_docs=n_docs, one_pass=one_pass),
    mesh=arrays.mesh,
    in_specs=(rows, all_rows),
    # All devices merge the same winners, but JAX cannot prove it.
    out_specs=(all_rows, all_rows, rows),
    check_vma=False,
  )
  return search(*jax.lax.stop_gradient((arrays, jnp.float32(questions))))


def _search_shard(
  shard: DeviceArrays,  # with the rows of this device
  questions: jax.Array,
  *,
  n_docs: int,
  one_pass: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns the best of all devices; runs on each."""
  axes = shard.mesh.axis_names
  # An approximate search may leave passages behind in any case.
  proves = one_pass and shard.recall_target == 1
  kept = min(
    n_docs + (_SPARE_ONE_PASS if proves else _SPARE), len(shard.embeddings)
  )
  found = _scan_chunks(shard, kept, questions, one_pass)
  best = _score(shard, n_docs, questions, found)
  unproven = jnp.zeros(len(questions), bool)
  if proves and kept < len(shard.embeddings):
    # At least n_docs passages have this score or a higher one, on some device,
    # and no passage that was left behind has a higher one than `others`.
    reached, others = jax.lax.pmax(best[0][:, -1], axes), found[0][:, -1]
    unproven = ~(others < reached) & (others > -jnp.inf)

    def again() -> tuple[jax.Array, jax.Array]:
      surely = _search_again(shard, questions, unproven, found)
      # Sums of the same shapes as above, so that equal rows stay equal.
      return _score(shard, n_docs, questions, surely)

    with jax.named_scope(RARELY):
      # Each device decides for itself, so there is no communication in it.
      best = jax.lax.cond(jnp.any(unproven), again, lambda: best)
  scores, ids = jax.lax.all_gather(best, axes, axis=1, tiled=True)
  scores, ids = _sort(scores, ids, n_docs)
  return ids, scores, jnp.sum(unproven)[None]


def _search_again(
  shard: DeviceArrays,
  questions: jax.Array,
  unproven: jax.Array,
  found: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array]:
  """Returns `found`, at full precision for unproven questions."""
  count, kept = found[0].shape

  def some(state: tuple) -> tuple:
    left, *found = state
    # If there are fewer, `count` follows: a row that does not exist.
    (chosen,) = jnp.nonzero(left, size=min(_REPEAT, count), fill_value=count)
    block = questions[jnp.minimum(chosen, count - 1)]
    new = _scan_chunks(shard, kept, block, one_pass=False)
    return left.at[chosen].set(False, mode="drop"), *(
      x.at[chosen].set(y, mode="drop") for x, y in zip(found, new, strict=True)
    )

  return jax.lax.while_loop(
    lambda state: jnp.any(state[0]), some, (unproven, *found)
  )[1:]


def _score(
  shard: DeviceArrays,
  n_docs: int,
  questions: jax.Array,
  found: tuple[jax.Array, jax.Array],  # rough scores, and rows of this device
) -> tuple[jax.Array, jax.Array]:
  """Returns float32 scores and ids of the best of what was found."""
  rough, row = found
  # How a matrix product rounds depends on its shape and on the place of a row
  # in it. With this sum equal rows have equal scores, on any number of devices.
  rows = shard.embeddings[row].astype(jnp.float32)  # B k R
  scores = jnp.sum(questions[:, None] * rows, axis=-1)
  if shard.scales is not None:
    scores *= shard.scales[row]
  scores = jnp.where(rough > -jnp.inf, _finite(scores), -jnp.inf)
  k = min(n_docs, len(shard.embeddings))
  return _sort(scores, _first_id(shard) + row, k)


def _first_id(shard: DeviceArrays) -> jax.Array:
  """Returns the id of the first row of this device."""
  return jax.lax.axis_index(shard.mesh.axis_names) * len(shard.embeddings)


def _scan_chunks(
  shard: DeviceArrays,
  k: int,
  questions: jax.Array,
  one_pass: bool,
) -> tuple[jax.Array, jax.Array]:
  """Returns scores and rows [B, k] of the best, chunk by chunk.

  If there are fewer than k real rows, rows of the padding follow, with -inf.
  The scores of one pass are upper bounds, unless the search is approximate.
  """
  size = len(shard.embeddings) // shard.num_chunks
  first, exact = _first_id(shard), shard.recall_target == 1

  def merge(best: tuple, start: jax.Array) -> tuple[tuple, None]:
    def chunk(x: jax.Array) -> jax.Array:
      return jax.lax.dynamic_slice_in_dim(x, start, size)

    block = chunk(shard.embeddings)
    if one_pass:
      scores = one_pass_scores(questions, block)
    else:
      scores = jnp.einsum(
        "BR,NR->BN",
        questions,
        block.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
      )
    if shard.scales is not None:
      scores *= chunk(shard.scales)
    if one_pass and exact:
      assert shard.norms is not None
      error = error_per_norm(questions, block.dtype)
      scores += error[:, None] * chunk(shard.norms)
      # What is too large for a bound may be one of the best.
      scores = jnp.where(jnp.isfinite(scores), scores, jnp.inf)
    real = first + start + jnp.arange(size) < shard.num_passages
    scores = jnp.where(real, _finite(scores), -jnp.inf)
    if exact:  # of equal scores the first: the smaller id
      scores, row = jax.lax.top_k(scores, min(k, size))
    else:
      scores, row = jax.lax.approx_max_k(
        scores, min(k, size), recall_target=shard.recall_target
      )
    scores = jnp.concatenate([best[0], scores], axis=1)
    row = jnp.concatenate([best[1], start + row], axis=1)
    scores, chosen = jax.lax.top_k(scores, k)
    return (scores, jnp.take_along_axis(row, chosen, axis=1)), None

  shape = (len(questions), k)
  none = jnp.full(shape, -jnp.inf), jnp.zeros(shape, jnp.int32)
  starts = jnp.arange(shard.num_chunks, dtype=jnp.int32) * size
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
