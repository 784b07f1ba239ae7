"""One update: batch -> loss -> gradients -> new state."""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Key, PyTree
import optax

from rag_jax.losses import RetrieverLoss
from rag_jax.losses import doc_log_prior
from rag_jax.losses import in_batch_contrastive_nll
from rag_jax.losses import marginal_sequence_nll
from rag_jax.losses import marginal_token_nll
from rag_jax.models.batch import AnyBatch
from rag_jax.models.batch import RagBatch
from rag_jax.models.batch import padding_share
from rag_jax.models.hybrid import learned_weights
from rag_jax.models.partitioning import batch_parts
from rag_jax.models.partitioning import batch_sharding
from rag_jax.models.partitioning import num_shards
from rag_jax.models.partitioning import replicated
from rag_jax.models.rag import ContextLayout
from rag_jax.models.rag import RagLogProbs
from rag_jax.models.rag import RagModel
from rag_jax.training.interrupt import SIGNAL
from rag_jax.training.state import TrainState

Metrics = dict[str, jax.Array]
# Share of the batches whose contexts did not fit into the layout.
UNGROUPED = "train/ungrouped"
# (params, batch of the stage, key) -> loss, metrics
LossFn = Callable[[PyTree, Any, Key[Array, ""]], tuple[Array, Metrics]]


def _apply(
  model: RagModel,
  params: PyTree,
  dropout_key: Key[Array, ""],
  *args: Any,
  **kwargs: Any,
) -> Any:
  """Returns the outputs of `model`, with dropout."""
  return model.apply(
    {"params": params},
    *args,
    deterministic=False,
    rngs={"dropout": dropout_key},
    **kwargs,
  )


def marginal_loss(
  params: PyTree,
  batch: RagBatch,
  dropout_key: Key[Array, ""],
  *,
  model: RagModel,
  nll_fn: Callable[..., Float[Array, "B"]],
  label_smoothing: float = 0.0,
  vocab_chunk: int = 0,
  context_layout: ContextLayout | None = None,
  retriever: RetrieverLoss | None = None,
  joined: bool = False,
  constant_scores: bool = False,
) -> tuple[Float[Array, ""], Metrics]:
  """Returns -log p(y|x) per target token, in nats, and the metrics to log.

  Args:
    params: of the model.
    batch: its contexts have to fit into the `context_layout`, if there is one.
    dropout_key: a key for this step.
    model: of retriever and generator.
    nll_fn: one of `losses.MARGINAL_NLL_FNS`.
    label_smoothing: of the targets.
    vocab_chunk: tokens of the vocabulary at a time.
    context_layout: how the contexts are computed.
    retriever: a loss of its own for the retriever, added to the generator's.
    joined: whether one context holds all documents, so that nothing is summed.
    constant_scores: whether the generator's loss has no gradient of the scores.
  """
  out = _apply(
    model,
    params,
    dropout_key,
    batch,
    vocab_chunk=vocab_chunk,
    context_layout=context_layout,
    method="target_log_probs",
  )
  scores = out.doc_scores
  if joined:
    scores = jnp.zeros_like(out.log_probs[..., 0])
  elif constant_scores:
    scores = jax.lax.stop_gradient(scores)
  nll = nll_fn(
    scores,
    out.log_probs,
    batch.target_mask,
    label_smoothing,
    out.mean,
  )  # B
  loss, metrics = _per_token(nll, out.doc_scores, batch, params)
  return _with_retriever(loss, metrics, retriever, out, batch)


def fid_loss(
  params: PyTree,
  batch: RagBatch,
  dropout_key: Key[Array, ""],
  *,
  model: RagModel,
  label_smoothing: float = 0.0,
  vocab_chunk: int = 0,
  context_layout: ContextLayout | None = None,
  retriever: RetrieverLoss | None = None,
) -> tuple[Float[Array, ""], Metrics]:
  """Returns the loss of a generator that reads all documents at once (FiD).

  In nats per target token, with the metrics to log. The `retriever` learns from
  the generator without dropout: as it reads each document alone, or for "loop"
  all but one. Other arguments as in `marginal_loss`.
  """
  settings: dict[str, Any] = {
    "vocab_chunk": vocab_chunk, "context_layout": context_layout
  }  # fmt: skip
  out = _apply(
    model, params, dropout_key, batch, method="joined_log_probs", **settings
  )
  nll = marginal_sequence_nll(
    jnp.zeros_like(out.doc_scores[:, :1]),
    out.log_probs,
    batch.target_mask,
    label_smoothing,
    out.mean,
  )  # B
  loss, metrics = _per_token(nll, out.doc_scores, batch, params)
  given: Any = out
  if retriever is not None:
    how: dict[str, Any] = {"method": "target_log_probs"}
    if retriever.kind == "loop":
      how = {"method": "joined_log_probs", "leave_out": True}
    given = model.apply(
      {"params": jax.lax.stop_gradient(params)}, batch, **how, **settings
    )
    # The scores with gradient, and dropout, are those of the first pass.
    given = dataclasses.replace(given, doc_scores=out.doc_scores)
  return _with_retriever(loss, metrics, retriever, given, batch)


def _with_retriever(
  loss: Float[Array, ""],
  metrics: Metrics,
  retriever: RetrieverLoss | None,
  given: RagLogProbs,
  batch: RagBatch,
) -> tuple[Float[Array, ""], Metrics]:
  """Returns the loss and metrics with those of the retriever's own loss.

  A likelihood counts per target token, a divergence per question.
  """
  if retriever is None:
    return loss, metrics
  added = retriever(given.doc_scores, given.log_probs, batch.target_mask)
  if retriever.is_likelihood:
    mean = jnp.sum(added) / jnp.sum(batch.target_mask)
  else:
    mean = jnp.mean(added)
  metrics |= {"train/retriever_loss": mean}
  return loss + retriever.weight * mean, metrics


def hf_loss(
  params: PyTree,
  batch: RagBatch,
  dropout_key: Key[Array, ""],
  *,
  model: RagModel,
  nll_fn: Callable[..., Float[Array, "*B"]],
  label_smoothing: float = 0.0,
) -> tuple[Float[Array, ""], Metrics]:
  """Returns Hugging Face's loss per target token, in nats, and metrics to log.

  `nll_fn` is one of `losses_hf.HF_NLL_FNS`, with their defects.
  """
  out = _apply(model, params, dropout_key, batch)
  nll = nll_fn(
    out.doc_scores,
    out.target_logits,
    batch.target_tokens,
    batch.target_mask,
    label_smoothing,
  )  # B
  return _per_token(nll, out.doc_scores, batch, params)


def _per_token(
  nll: Float[Array, "B"],
  doc_scores: Float[Array, "B K"],
  batch: RagBatch,
  params: PyTree,
) -> tuple[Float[Array, ""], Metrics]:
  """Returns the loss per target token, in nats, and the metrics to log."""
  loss = jnp.sum(nll) / jnp.sum(batch.target_mask)
  metrics = {"train/loss": loss}
  if batch.question_tokens is not None:
    prior = doc_log_prior(doc_scores)
    entropy = -jnp.sum(jnp.exp(prior) * prior, axis=-1)
    metrics["train/doc_entropy"] = jnp.mean(entropy)  # nats
  weights = learned_weights(params)
  if weights is not None:
    metrics["train/hybrid_dense"] = jnp.asarray(weights.dense)
    metrics["train/hybrid_bm25"] = jnp.asarray(weights.bm25)
  return loss, metrics


def cloze_loss(
  params: PyTree,
  batch: RagBatch,
  dropout_key: Key[Array, ""],
  *,
  model: RagModel,
  contrastive_weight: float,
) -> tuple[Float[Array, ""], Metrics]:
  """Returns the warm-up's loss: span infilling and in-batch contrast.

  Span infilling is in nats per target token, the contrast in nats per question.
  """
  closed_book = batch.question_tokens is None
  question_key, doc_key, generator_key = jax.random.split(dropout_key, 3)
  # Infilling only: the score of a single document has no effect, so the
  # retriever learns from the contrast below.
  alone = dataclasses.replace(
    batch,
    question_tokens=None,
    question_mask=None,
    doc_tokens=None,
    doc_mask=None,
  )
  out = _apply(model, params, generator_key, alone, method="target_log_probs")
  nll = marginal_token_nll(out.doc_scores, out.log_probs, batch.target_mask)
  loss = jnp.sum(nll) / jnp.sum(batch.target_mask)
  metrics = {"warmup/loss": loss}
  if not closed_book:
    assert batch.doc_tokens is not None
    assert batch.doc_mask is not None
    questions = _apply(
      model,
      params,
      question_key,
      batch.question_tokens,
      batch.question_mask,
      method="embed_questions",
    )
    passages = _apply(
      model,
      params,
      doc_key,
      batch.doc_tokens[:, 0],
      batch.doc_mask[:, 0],
      method="embed_passages",
    )
    contrast = jnp.mean(in_batch_contrastive_nll(questions, passages))
    metrics["warmup/contrastive_loss"] = contrast
    loss += contrastive_weight * contrast
  return loss, metrics


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
