"""One update: batch -> loss -> gradients -> new state."""

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
from jaxtyping import Array, Key, PyTree
import optax

from rag_jax.models.batch import AnyBatch
from rag_jax.models.batch import RagBatch
from rag_jax.models.batch import padding_share
from rag_jax.models.partitioning import batch_parts
from rag_jax.models.partitioning import batch_sharding
from rag_jax.models.partitioning import num_shards
from rag_jax.models.partitioning import replicated
from rag_jax.models.rag import ContextLayout
from rag_jax.training.interrupt import SIGNAL
from rag_jax.training.objectives import Metrics
from rag_jax.training.state import TrainState

# Share of the batches whose contexts did not fit into the layout.
UNGROUPED = "train/ungrouped"
# (params, batch of the stage, key) -> loss, metrics
LossFn = Callable[[PyTree, Any, Key[Array, ""]], tuple[Array, Metrics]]


def _accumulated(
  grad_fn: Callable[..., tuple[PyTree, Metrics]],
  params: PyTree,
  batch: RagBatch,
  dropout_key: Key[Array, ""],
  stage: str,
  num_parts: int,
) -> tuple[PyTree, Metrics]:
  """Returns the gradient and the metrics of a batch, from those of its parts.

  The loss is a mean over target tokens. The gradient of each part therefore
  counts by its share of the target tokens, and so does its loss. Other metrics
  are means over rows.
  """
  num_tokens = jnp.sum(batch.target_mask)

  def add(
    grads: PyTree, part: tuple[Array, RagBatch]
  ) -> tuple[PyTree, Metrics]:
    i, rows = part
    share = jnp.sum(rows.target_mask) / num_tokens
    key = jax.random.fold_in(dropout_key, i)
    more, metrics = grad_fn(params, rows, key)
    grads = jax.tree.map(lambda x, y: x + share * y, grads, more)
    loss = f"{stage}/loss"
    return grads, metrics | {loss: metrics[loss] * share * num_parts}

  parts = jnp.arange(num_parts), batch_parts(batch, num_parts)
  grads, metrics = jax.lax.scan(
    add, jax.tree.map(jnp.zeros_like, params), parts
  )
  return grads, jax.tree.map(jnp.mean, metrics)


def _select(tree: PyTree, chosen: PyTree) -> PyTree:
  """Returns a tree that has None where `chosen` is False."""
  return jax.tree.map(lambda x, keep: x if keep else None, tree, chosen)


def _fill(tree: PyTree, others: PyTree) -> PyTree:
  """Returns a tree whose None are replaced by what `others` has there."""
  return jax.tree.map(
    lambda x, other: other if x is None else x,
    tree,
    others,
    is_leaf=lambda x: x is None,
  )


def _gradient(
  loss_fn: Callable[..., tuple[Array, Metrics]],
  context_layout: ContextLayout | None,
  params: PyTree,
) -> Callable[..., tuple[PyTree, Metrics]]:
  """Returns (some of params, batch, key) -> their gradient, and metrics."""

  def loss(
    some: PyTree, batch: AnyBatch, key: Key[Array, ""], **layout: Any
  ) -> tuple[Array, Metrics]:
    return loss_fn(_fill(some, params), batch, key, **layout)

  whole = jax.grad(loss, has_aux=True)
  if context_layout is None:
    return whole
  grouped = jax.grad(
    functools.partial(loss, context_layout=context_layout), has_aux=True
  )

  def grad_fn(
    params: PyTree, batch: RagBatch, key: Key[Array, ""]
  ) -> tuple[PyTree, Metrics]:
    mask = batch.context_mask
    fit = context_layout.fit(mask.reshape(-1, mask.shape[-1]))
    # Not inside the gradient, which would keep what both need in memory.
    grads, metrics = jax.lax.cond(fit, grouped, whole, params, batch, key)
    return grads, metrics | {UNGROUPED: 1.0 - fit}

  return grad_fn


def update(
  state: TrainState,
  batch: AnyBatch,
  key: Key[Array, ""],
  *,
  loss_fn: LossFn,
  optimizer: optax.GradientTransformation,
  stage: str,
  accumulate: int = 1,
  context_layout: ContextLayout | None = None,
  trained: PyTree | None = None,
) -> tuple[TrainState, Metrics]:
  """Applies one gradient update. Pure; `compile_update` jits it.

  Args:
    state: before the update.
    batch: its arrays have B rows.
    key: random key of the run; each step has its own dropout.
    loss_fn: a loss per target token; without `accumulate`, any mean.
    optimizer: makes the update of a gradient.
    stage: prefix of the metrics.
    accumulate: parts of B / accumulate rows that the gradient is computed in,
      one after the other. It equals that of the whole batch.
    context_layout: of the contexts of a part, if they fit into it; `loss_fn`
      then takes them too. None: all have the length C.
    trained: True for the parameters that change; None: all. The others have no
      gradient.
  """
  dropout_key = jax.random.fold_in(key, state.step)
  if trained is None:
    trained = jax.tree.map(lambda _: True, state.params)
  some = _select(state.params, trained)
  grad_fn = _gradient(loss_fn, context_layout, state.params)
  if accumulate > 1:
    assert isinstance(batch, RagBatch)
    grads, metrics = _accumulated(
      grad_fn, some, batch, dropout_key, stage, accumulate
    )
  else:
    grads, metrics = grad_fn(some, batch, dropout_key)
  # The optimizer expects all gradients, and changes no frozen parameter.
  zeros = jax.tree.map(jnp.zeros_like, state.params)
  updates, opt_state = optimizer.update(
    _fill(grads, zeros), state.opt_state, state.params
  )
  moved = optax.apply_updates(some, _select(updates, trained))
  params = _fill(moved, state.params)
  metrics |= {f"{stage}/grad_norm": optax.tree.norm(grads)}
  size = None
  if context_layout is not None:
    assert isinstance(batch, RagBatch)
    whole, parts = batch.context_mask.size, accumulate * num_shards()
    share = metrics[UNGROUPED]
    size = share * whole + (1 - share) * parts * context_layout.num_tokens
  metrics |= {f"{stage}/padding": padding_share(batch, size)}
  new_state = TrainState(
    step=state.step + 1, params=params, opt_state=opt_state
  )
  return new_state, metrics


def compile_update(
  loss_fn: LossFn,
  optimizer: optax.GradientTransformation,
  layout: TrainState,
  mesh: jax.sharding.Mesh,
  stage: str,
  update_fn: Callable[..., tuple[TrainState, Metrics]] = update,
  signals: bool = False,
) -> Any:
  """Returns `update_fn`, jitted over the mesh; its state is donated.

  With `signals` it has one more argument, a number per device. The metrics hold
  the largest of them: see `interrupt.StopRequest`.
  """
  each_device = NamedSharding(mesh, PartitionSpec(mesh.axis_names))

  def on_mesh(
    state: TrainState, batch: PyTree, key: Key[Array, ""], *sent: jax.Array
  ) -> tuple[TrainState, Metrics]:
    # Where no mesh is set, `constrain` in the model silently does nothing.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      state, metrics = update_fn(
        state, batch, key, loss_fn=loss_fn, optimizer=optimizer, stage=stage
      )
    if sent:
      metrics = metrics | {SIGNAL: jnp.max(sent[0])}
    return state, metrics

  return jax.jit(
    on_mesh,
    in_shardings=(
      *(layout, batch_sharding(mesh), replicated(mesh)),
      *([each_device] if signals else []),
    ),
    out_shardings=(layout, replicated(mesh)),
    donate_argnums=0,
  )
