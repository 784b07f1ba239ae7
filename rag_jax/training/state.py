"""The training state: what changes from step to step, sharded over the mesh."""

from collections.abc import Callable, Mapping
import typing
from typing import Any

from flax import linen as nn
import flax.struct
import flax.traverse_util
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key, PyTree
import numpy as np
import optax

from rag_jax.models.lora import by_path
from rag_jax.models.lora import without_adapters
from rag_jax.models.partitioning import replicated
from rag_jax.models.partitioning import shardings


# Unchecked, because `layout`s below hold shardings in place of arrays.
@typing.no_type_check
@flax.struct.dataclass
class TrainState:
  """All that changes from one step to the next.

  A checkpoint saves all of it, except the tokens in the index, which can be
  made again.
  """

  step: Int[Array, ""]  # updates made in the stage
  params: PyTree
  opt_state: optax.OptState
  index: Any = None  # a search_in_step.StepIndex, if the step itself searches


def init_params(
  init: Callable[[Key[Array, ""]], PyTree],
  key: Key[Array, ""],
  mesh: jax.sharding.Mesh,
  given: Mapping[str, PyTree] | None = None,
) -> tuple[PyTree, PyTree]:
  """Returns the initial parameters and their shardings.

  Each parameter is created on the devices that hold it.

  Args:
    init: key -> boxed params, as `model.init(key, ...)["params"]` gives them.
    key: random key.
    mesh: devices.
    given: parts of the params to use instead of random ones, without adapters.
      They are on the host, and every process has all of them.

  Raises:
    ValueError: the arrays of a given part do not fit the model.
  """
  given = given or {}
  boxed = jax.eval_shape(init, key)
  layout, shapes = shardings(boxed, mesh), nn.meta.unbox(boxed)
  for name, part in given.items():
    _check_part(name, part, without_adapters(shapes[name]))
  flat_layout, flat_given = by_path(layout), by_path(dict(given))
  fresh = {k: v for k, v in flat_layout.items() if k not in flat_given}

  def make(key: Key[Array, ""]) -> dict[str, Array]:
    made = by_path(nn.meta.unbox(init(key)))
    return {name: made[name] for name in fresh}

  # XLA computes only what is returned, so given parts cost nothing.
  params = jax.jit(make, out_shardings=fresh)(key)
  for name, array in flat_given.items():
    params[name] = _place(array, flat_layout[name])
  return flax.traverse_util.unflatten_dict(params, sep="/"), layout


def _check_part(name: str, part: PyTree, shapes: PyTree) -> None:
  """Raises `ValueError` unless the arrays of `part` are those of the model."""
  ours, theirs = (
    {
      jax.tree_util.keystr(path, simple=True, separator="/"): x.shape
      for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }
    for tree in (shapes, part)
  )
  different = [
    f"{path}: {theirs.get(path, 'missing')}, expected {ours.get(path, 'none')}"
    for path in sorted(ours.keys() | theirs.keys())
    if ours.get(path) != theirs.get(path)
  ]
  if different:
    raise ValueError(
      f"The {name} to start from has other arrays than the config describes:"
      f" {'; '.join(different)}. Use the config that was loaded with it."
    )


def _place(array: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
  # With several processes, each takes its own part.
  return jax.make_array_from_callback(
    array.shape, sharding, lambda index: np.asarray(array[index])
  )


def make_state(
  params: PyTree,
  layout: PyTree,
  optimizer: optax.GradientTransformation,
  mesh: jax.sharding.Mesh,
) -> tuple[TrainState, TrainState]:
  """Returns the state before the first step, and the sharding of each array."""
  state_layout = state_layouts(params, layout, optimizer, mesh)
  make = jax.jit(optimizer.init, out_shardings=state_layout.opt_state)
  step = jax.device_put(jnp.zeros((), jnp.int32), replicated(mesh))
  state = TrainState(step=step, params=params, opt_state=make(params))
  return state, state_layout


def state_layouts(
  params: PyTree,
  layout: PyTree,
  optimizer: optax.GradientTransformation,
  mesh: jax.sharding.Mesh,
) -> TrainState:
  """Returns the sharding of each array of a state, without an index.

  Args:
    params: the parameters, or their shapes.
    layout: the sharding of each parameter.
    optimizer: made for `params`.
    mesh: devices.
  """
  opt_layout = _like_parameters(
    jax.eval_shape(optimizer.init, params), params, layout, replicated(mesh)
  )
  layouts: dict[str, Any] = {
    "step": replicated(mesh),
    "params": layout,
    "opt_state": opt_layout,
  }
  return TrainState(**layouts)


def _like_parameters(
  opt_state: PyTree,
  params: PyTree,
  layout: PyTree,
  other: jax.sharding.Sharding,
) -> PyTree:
  """Returns the sharding of each array of the optimizer state.

  An array with the name and the shape of a parameter, such as Adam's moments,
  is split like it. Others are `other`: counters, and Adafactor's means, which
  are as small as a row of a matrix.
  """
  known = {
    (*_names(path), x.shape): sharding
    for (path, x), sharding in zip(
      jax.tree_util.tree_leaves_with_path(params),
      jax.tree.leaves(layout),
      strict=True,
    )
  }

  def find(path: tuple[Any, ...], x: Any) -> jax.sharding.Sharding:
    names = _names(path)
    matches = (known.get((*names[i:], x.shape)) for i in range(len(names)))
    return next(filter(None, matches), other)

  return jax.tree_util.tree_map_with_path(find, opt_state)


def _names(path: tuple[Any, ...]) -> tuple[str, ...]:
  """Returns the keys of dicts in the path of an array."""
  return tuple(k.key for k in path if isinstance(k, jax.tree_util.DictKey))


def abstract_state(state: TrainState, layout: TrainState) -> TrainState:
  """Returns shapes, dtypes and shardings, which a restore is given."""
  return jax.tree.map(
    lambda x, sharding: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=sharding
    ),
    state,
    layout,
  )


def free(state: TrainState) -> None:
  """Frees the arrays of a state, which nobody may use any more.

  Call it before a checkpoint is restored in its place: the devices then hold
  one state at a time, not two.
  """
  for array in jax.tree.leaves(state):
    array.delete()
