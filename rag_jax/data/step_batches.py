"""Batches without documents, for a train step that searches by itself.

In: questions, by step; tokens of the passages that the search inside the step
found. Out: the inputs of the step, and the generator's contexts. The contexts
are those of context.py, but joined on the devices.
"""

import typing
from typing import Any

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PyTree
import numpy as np

from rag_jax.data.pipeline import Prepared
from rag_jax.data.pipeline import QuestionBatches
from rag_jax.retrieval.index import Index


# Unchecked, because JAX makes it of shapes and shardings too.
@typing.no_type_check
@flax.struct.dataclass
class QuestionBatch:
  """Questions and answers, as tokens; a `RagBatch` without its documents."""

  question_tokens: Int[Any, "B Q"]
  question_mask: Bool[Any, "B Q"]
  head_tokens: Int[Any, "B C"]  # a context that holds the question alone
  head_mask: Bool[Any, "B C"]
  target_tokens: Int[Any, "B T"]
  target_mask: Bool[Any, "B T"]
  accepted_tokens: Int[Any, "B A T"] | None = None


class StepBatches(QuestionBatches):
  """The batches of the main stage, by step, without documents."""

  def _prepare(
    self,
    step: int,
    retriever_params: PyTree,
    index: Index | None,
    doc_ids: Int[np.ndarray, "B K"] | None,
  ) -> Prepared:
    """Returns the batch of `step`; the other arguments are not used."""
    del retriever_params, index, doc_ids
    rows = self.rows(step)
    nothing = np.zeros((len(rows), 0), np.int32)
    _, question_ids, context_ids = self.asked(step, rows)
    question_tokens, question_mask = self._context.questions(question_ids)
    heads, heads_mask = self._context.contexts(context_ids, nothing)
    return Prepared(
      QuestionBatch(
        question_tokens=question_tokens,
        question_mask=question_mask,
        head_tokens=heads[:, 0],
        head_mask=heads_mask[:, 0],
        **self.targets(rows),
      ),
      nothing,
    )


def join_contexts(
  head_tokens: Int[Array, "B C"],
  head_mask: Bool[Array, "B C"],
  body_tokens: Int[Array, "B K L"],
  body_mask: Bool[Array, "B K L"],
) -> tuple[Int[Array, "B K C"], Bool[Array, "B K C"], Int[Array, ""]]:
  """Returns contexts, their mask, and how many were cut; call it inside a jit.

  The result equals that of `ContextBuilder.contexts` for the same questions and
  passages. The masks are True on real tokens, which come first.
  """
  length = head_tokens.shape[-1]
  start = jnp.sum(head_mask, axis=-1)[:, None, None]  # B 1 1
  end = start + jnp.sum(body_mask, axis=-1)[..., None]  # B K 1
  place = jnp.arange(length)  # C
  source = jnp.clip(place - start, 0, body_tokens.shape[-1] - 1)  # B 1 C
  body = jnp.take_along_axis(body_tokens, source, axis=-1)  # B K C
  in_body = (place >= start) & (place < end)
  tokens = jnp.where(in_body, body, head_tokens[:, None])  # else padding
  return tokens, place < end, jnp.sum(end > length)


def add_start(
  tokens: Int[Array, "*N L"], mask: Bool[Array, "*N L"], bos_id: int | None
) -> tuple[Int[Array, "*N M"], Bool[Array, "*N M"]]:
  """Returns rows with the start token in front, for the passage encoder.

  As `ContextBuilder.passages`. Without a start token the rows stay as they are.
  """
  if bos_id is None:
    return tokens, mask
  start = jnp.full((*tokens.shape[:-1], 1), bos_id, tokens.dtype)
  real = jnp.ones((*mask.shape[:-1], 1), bool)
  return (
    jnp.concatenate([start, tokens], axis=-1),
    jnp.concatenate([real, mask], axis=-1),
  )
