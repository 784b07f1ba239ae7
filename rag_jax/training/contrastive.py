"""The loss of the contrastive stage: questions against all passages of a batch.

In: the parameters and a `ContrastiveBatch`. Out: the loss, and metrics. Only
the retriever is computed.

With `chunk`, rows are encoded in parts whose activations are not kept. In the
backward pass each part is encoded again, with the same dropout, for the
gradient of the loss with respect to its embeddings. That is GradCache (Gao et
al. 2021, https://arxiv.org/abs/2101.06983), here as rematerialisation: the
memory for activations is that of a part, whatever the size of the batch.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from rag_jax.losses import contrastive_nll
from rag_jax.models.batch import ContrastiveBatch
from rag_jax.models.partitioning import constrain
from rag_jax.models.rag import RagModel


def contrastive_loss(
  params: PyTree,
  batch: ContrastiveBatch,
  dropout_key: Key[Array, ""],
  *,
  model: RagModel,
  temperature: float = 1.0,
  chunk: int = 0,
) -> tuple[Float[Array, ""], dict[str, Array]]:
  """Returns the mean loss per question, in nats, and the metrics to log.

  Inside a program for a mesh, the passages are those of all devices.

  Args:
    params: of the model.
    batch: of all devices.
    dropout_key: a key for this step.
    model: whose towers are used, with the score scale.
    temperature: that scores are divided by.
    chunk: rows to encode at a time; divides B. 0: all.
  """
  b, m, length = batch.doc_tokens.shape
  rows = b * m, length
  questions, docs = (
    _embed(model, params, method, key, *tokens, chunk)
    for method, key, tokens in zip(
      ("embed_questions", "embed_passages"),
      jax.random.split(dropout_key),
      (
        (batch.question_tokens, batch.question_mask),
        (batch.doc_tokens.reshape(rows), batch.doc_mask.reshape(rows)),
      ),
      strict=True,
    )
  )
  own = jnp.arange(b) * m
  nll, first = contrastive_nll(
    questions,
    constrain(docs, None, None),  # every device compares with all
    own,
    batch.counts,
    temperature,
  )
  loss = jnp.mean(nll)
  return loss, {
    "contrastive/loss": loss,
    # The share of questions whose own passage scores highest.
    "contrastive/accuracy": jnp.mean(first),
    "contrastive/negatives": jnp.mean(jnp.sum(batch.counts, axis=-1)) - 1,
  }


def _embed(
  model: RagModel,
  params: PyTree,
  method: str,
  key: Key[Array, ""],
  tokens: Int[Array, "N L"],
  mask: Bool[Array, "N L"],
  chunk: int,
) -> Float[Array, "N R"]:
  """Returns embeddings, computed `chunk` rows at a time."""

  def embed(key: Key[Array, ""], tokens: Any, mask: Any) -> Float[Array, "n R"]:
    embeddings: Any = model.apply(
      {"params": params},
      tokens,
      mask,
      deterministic=False,
      rngs={"dropout": key},
      method=method,
    )
    return embeddings

  num_parts = len(tokens) // chunk if chunk else 1
  if num_parts == 1:
    return embed(key, tokens, mask)

  # The parts are consecutive rows, on any number of devices: dropout is then
  # the same too.
  def parts(x: Array) -> Array:
    split = x.reshape(num_parts, -1, *x.shape[1:])
    return constrain(split, None, "batch", None)

  found = jax.lax.map(
    lambda part: jax.checkpoint(embed)(*part),
    (jax.random.split(key, num_parts), parts(tokens), parts(mask)),
  )
  return found.reshape(len(tokens), -1)
