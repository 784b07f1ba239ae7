"""The arrays of one step, of fixed shape."""

import typing
from typing import Any

import flax.struct
from jaxtyping import Bool, Float, Int


# Unchecked, because JAX makes it of shapes and shardings too.
@typing.no_type_check
@flax.struct.dataclass
class RagBatch:
  """Questions, their documents and their answers, as tokens.

  A context is the question and one document as the generator reads them. A
  target is the answer, then the end token. Masks are True on real tokens.

  The retriever's fields are None for a closed-book model. Otherwise exactly one
  of `doc_tokens` (the passage encoder trains) and `doc_embeddings` (it is
  frozen) is given, and `bm25_scores` with index.hybrid.
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
