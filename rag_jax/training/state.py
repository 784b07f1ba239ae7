"""What changes from one step to the next, laid out over the mesh."""

from collections.abc import Callable
import typing
from typing import Any

from flax import linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key, PyTree
import optax

from rag_jax.models.partitioning import replicated
from rag_jax.models.partitioning import shardings


# Unchecked, because `layout`s below hold shardings in place of arrays.
@typing.no_type_check
@flax.struct.dataclass
class TrainState:
  """All that changes from one step to the next, and all that is saved."""

  step: Int[Array, ""]  # of the stage: updates made
  params: PyTree
  opt_state: optax.OptState


def init_params(
  init: Callable[[Key[Array, ""]], PyTree],
  key: Key[Array, ""],
  mesh: jax.sharding.Mesh,
) -> tuple[PyTree, PyTree]:
  """Returns fresh parameters, each born where it lives, and their shardings.

  Args:
    init: key -> boxed params, as `model.init(key, ...)["params"]` gives them.
    key: random key.
    mesh: devices.
  """
  layout = shardings(jax.eval_shape(init, key), mesh)
  params = jax.jit(lambda k: nn.meta.unbox(init(k)), out_shardings=layout)(key)
  return params, layout


def make_state(
  params: PyTree,
  layout: PyTree,
  optimizer: optax.GradientTransformation,
  mesh: jax.sharding.Mesh,
) -> tuple[TrainState, TrainState]:
  """Returns the state before the first step, and the sharding of each array."""
  # Adam's moments lie beside the parameters they belong to; counters are
  # replicated.
  abstract = jax.eval_shape(optimizer.init, params)
  opt_layout = optax.tree.map_params(
    optimizer,
    lambda moment, sharding: moment if _is_masked(moment) else sharding,
    abstract,
    layout,
    transform_non_params=lambda _: replicated(mesh),
    is_leaf=_is_masked,
  )
  opt_state = jax.jit(optimizer.init, out_shardings=opt_layout)(params)
  step = jax.device_put(jnp.zeros((), jnp.int32), replicated(mesh))
  state = TrainState(step=step, params=params, opt_state=opt_state)
  layouts: dict[str, Any] = {
    "step": replicated(mesh),
    "params": layout,
    "opt_state": opt_layout,
  }
  return state, TrainState(**layouts)


def _is_masked(node: object) -> bool:
  """Whether `node` stands for a parameter that an optimizer leaves alone."""
  return isinstance(node, optax.MaskedNode)


def abstract_state(state: TrainState, layout: TrainState) -> TrainState:
  """Returns shapes, dtypes and shardings, which a restore is given."""
  return jax.tree.map(
    lambda x, sharding: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=sharding
    ),
    state,
    layout,
  )
