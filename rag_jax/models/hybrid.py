"""p(z|x) from a weighted sum of embedding scores and BM25 scores.

In: inner products and BM25 scores of the same documents. Out: their weighted
sum, doc_scores. The two weights are parameters of the model.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from rag_jax.models.partitioning import named

_Arrays = jax.Array | np.ndarray

PARAMS = "hybrid"  # key of the weights in the parameters of `RagModel`


class HybridWeights(NamedTuple):
  """p(z|x) = softmax(dense * dense score + bm25 * BM25 score). A pytree."""

  dense: float | Float[Array, ""]
  bm25: float | Float[Array, ""]


def hybrid_scores(
  weights: HybridWeights,
  dense_scores: Float[_Arrays, "*B"],
  bm25_scores: Float[_Arrays, "*B"],
) -> Float[Array, "*B"]:
  """Returns doc_scores, the weighted sum; their softmax is p(z|x)."""
  return (
    jnp.float32(weights.dense) * dense_scores
    + jnp.float32(weights.bm25) * bm25_scores
  )


class HybridScores(nn.Module):
  """`hybrid_scores` with learned weights.

  Params: `log_dense` and `log_bm25`. BM25 scores can be ten times the inner
  products, or a tenth of them. With logarithms, one learning rate changes both
  weights by the same ratio per step, whatever the scale of the scores. They
  also keep the weights positive: with a negative weight, the search would
  return the documents that the model scores lowest.
  """

  dense: float = 1.0  # initial weights
  bm25: float = 0.1

  @nn.compact
  def __call__(
    self,
    dense_scores: Float[Array, "B K"],
    bm25_scores: Float[Array, "B K"],
  ) -> Float[Array, "B K"]:
    """Returns doc_scores."""

    def weight(name: str, start: float) -> Float[Array, ""]:
      init = nn.initializers.constant(np.log(start))
      return jnp.exp(self.param(name, named(init), ()))

    weights = HybridWeights(
      weight("log_dense", self.dense), weight("log_bm25", self.bm25)
    )
    return hybrid_scores(weights, dense_scores, bm25_scores)


def learned_weights(params: Mapping[str, Any]) -> HybridWeights | None:
  """Returns the weights in the parameters of a `RagModel`; None if not hybrid.

  `params` may hold all parameters or only the retriever's. Can be traced.
  """
  if PARAMS not in params:
    return None
  logs = params[PARAMS]
  return HybridWeights(jnp.exp(logs["log_dense"]), jnp.exp(logs["log_bm25"]))
