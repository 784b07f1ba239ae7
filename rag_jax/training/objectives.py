"""The losses of the stages: parameters and a batch -> loss, metrics to log."""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from rag_jax.losses import ATTENTION_LOSSES
from rag_jax.losses import REWARD_LOSSES
from rag_jax.losses import RetrieverLoss
from rag_jax.losses import answer_rewards
from rag_jax.losses import doc_log_prior
from rag_jax.losses import in_batch_contrastive_nll
from rag_jax.losses import marginal_sequence_nll
from rag_jax.losses import marginal_token_nll
from rag_jax.models.batch import RagBatch
from rag_jax.models.greedy import greedy_answers
from rag_jax.models.hybrid import learned_weights
from rag_jax.models.rag import ContextLayout
from rag_jax.models.rag import RagLogProbs
from rag_jax.models.rag import RagModel

Metrics = dict[str, jax.Array]
_REWARD_KEY = 7  # of the random numbers that draw a document


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
  values = None
  if retriever is not None and retriever.kind in REWARD_LOSSES:
    values = _rewards(retriever, model, params, batch, scores, dropout_key)
  return _with_retriever(loss, metrics, retriever, out, batch, values)


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
  the generator without dropout: as it reads each document alone, for "loop" all
  but one, for "adist" and "dkrr" from what it attends to. Other arguments as in
  `marginal_loss`.
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
  values: Any = None
  fixed = {"params": jax.lax.stop_gradient(params)}
  if retriever is None:
    pass
  elif retriever.kind in REWARD_LOSSES:
    values = _rewards(
      retriever, model, params, batch, out.doc_scores, dropout_key
    )
  elif retriever.kind in ATTENTION_LOSSES:
    values = model.apply(
      fixed, batch, retriever.kind, context_layout, method="attention_scores"
    )
  else:
    how: dict[str, Any] = {"method": "target_log_probs"}
    if retriever.kind == "loop":
      how = {"method": "joined_log_probs", "leave_out": True}
    given = model.apply(fixed, batch, **how, **settings)
    # The scores with gradient, and dropout, are those of the first pass.
    given = dataclasses.replace(given, doc_scores=out.doc_scores)
  return _with_retriever(loss, metrics, retriever, given, batch, values)


def _rewards(
  retriever: RetrieverLoss,
  model: RagModel,
  params: PyTree,
  batch: RagBatch,
  doc_scores: Float[Array, "B K"],
  dropout_key: Key[Array, ""],
) -> Float[Array, "B K"]:
  """Returns the reward of the greedy answer given each document.

  Without dropout or gradient. With "reward_sampled", a single document is drawn
  from p(z|x), by the largest of the scores with Gumbel noise; the others get 0.
  """
  b, k, c = batch.context_tokens.shape
  assert batch.accepted_tokens is not None
  tokens, mask = batch.context_tokens, batch.context_mask
  drawn = jnp.ones((b, k), bool)
  if retriever.kind == "reward_sampled":
    key = jax.random.fold_in(dropout_key, _REWARD_KEY)
    scores = jax.lax.stop_gradient(doc_scores) / retriever.temperature
    doc = jnp.argmax(scores + jax.random.gumbel(key, (b, k)), axis=-1)
    drawn = doc[:, None] == jnp.arange(k)
    tokens, mask = (
      jnp.take_along_axis(x, doc[:, None, None], axis=1) for x in (tokens, mask)
    )
  answers = greedy_answers(
    model.generator,
    jax.lax.stop_gradient(params["generator"]),
    tokens.reshape(-1, c),
    mask.reshape(-1, c),
    num_steps=batch.target_tokens.shape[1],
    end_ids=retriever.end_ids,
  ).reshape(b, tokens.shape[1], -1)
  rewards = answer_rewards(
    answers, batch.accepted_tokens, retriever.ignored_ids, retriever.reward
  )
  return jnp.where(drawn, rewards, 0.0)


def _with_retriever(
  loss: Float[Array, ""],
  metrics: Metrics,
  retriever: RetrieverLoss | None,
  given: RagLogProbs,
  batch: RagBatch,
  values: Float[Array, "B K"] | None,
) -> tuple[Float[Array, ""], Metrics]:
  """Returns the loss and metrics with those of the retriever's own loss.

  A likelihood counts per target token, all others per question. `values` are
  those of `RetrieverLoss`.
  """
  if retriever is None:
    return loss, metrics
  added = retriever(
    given.doc_scores, given.log_probs, batch.target_mask, values
  )
  if retriever.is_likelihood:
    mean = jnp.sum(added) / jnp.sum(batch.target_mask)
  else:
    mean = jnp.mean(added)
  metrics |= {"train/retriever_loss": mean}
  if retriever.kind in REWARD_LOSSES:
    assert values is not None
    # What is expected of a document drawn from p(z|x), or of that drawn.
    weights = jnp.ones_like(values)
    if retriever.kind == "reward":
      weights = jnp.exp(doc_log_prior(given.doc_scores / retriever.temperature))
    metrics["train/reward"] = jnp.mean(jnp.sum(weights * values, axis=-1))
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
