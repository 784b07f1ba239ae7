"""The arrays of one step, of fixed shape."""

import typing
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

MAX_ACCEPTED = 8  # accepted answers of a question that a batch holds


# Not type-checked, because JAX also builds it from shapes and shardings.
@typing.no_type_check
@flax.struct.dataclass
class RagBatch:
  """Questions, their documents and their answers, as tokens.

  A context is the generator's input: the question and one document. A target is
  the answer, followed by the end token. Masks are True on real tokens.

  The retriever's fields are None for a closed-book model. Otherwise either
  `doc_tokens` (trained passage encoder) or `doc_embeddings` (frozen passage
  encoder) is set, and with index.hybrid also `bm25_scores`. `accepted_tokens`
  are for losses that compare answers with them.
  """

  context_tokens: Int[Any, "B K C"]
  context_mask: Bool[Any, "B K C"]
  target_tokens: Int[Any, "B T"]
  target_mask: Bool[Any, "B T"]
  question_tokens: Int[Any, "B Q"] | None = None
  question_mask: Bool[Any, "B Q"] | None = None
  doc_tokens: Int[Any, "B K L"] | None = None
  doc_mask: Bool[Any, "B K L"] | None = None
  doc_embeddings: Float[Any, "B K R"] | None = None
  bm25_scores: Float[Any, "B K"] | None = None
  # Targets that count as right, without a mask; a row of padding is none.
  accepted_tokens: Int[Any, "B A T"] | None = None


# Not type-checked, because JAX also builds it from shapes and shardings.
@typing.no_type_check
@flax.struct.dataclass
class ContrastiveBatch:
  """Questions, each with M passages: its own, and its hard negatives.

  `counts` says which of the B*M passages of the batch, in the order of
  `doc_tokens`, a question is compared with: its own, at [b, b*M], and its
  negatives.
  """

  question_tokens: Int[Any, "B Q"]
  question_mask: Bool[Any, "B Q"]
  doc_tokens: Int[Any, "B M L"]
  doc_mask: Bool[Any, "B M L"]
  counts: Bool[Any, "B P"]


AnyBatch = RagBatch | ContrastiveBatch


def padding_share(
  batch: AnyBatch,
  context_size: Float[Array, ""] | int | None = None,
) -> Float[Array, ""]:
  """Returns the share of a batch's tokens that are padding, from 0 to 1.

  Of questions, passages, contexts and targets together, as they are stored: the
  target once per question.

  Args:
    batch: of any size.
    context_size: tokens that its contexts are computed as; None: B*K*C.
  """
  masks: list[Any] = [batch.question_mask, batch.doc_mask]
  if isinstance(batch, RagBatch):
    masks += [batch.context_mask, batch.target_mask]
  masks = jax.tree.leaves(masks)  # without None
  real = sum((jnp.sum(mask) for mask in masks), start=jnp.zeros((), jnp.int32))
  size = sum(mask.size for mask in masks)
  if context_size is not None:
    assert isinstance(batch, RagBatch)
    size = size - batch.context_mask.size + context_size
  return 1 - real / size
