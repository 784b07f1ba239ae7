"""Question and passage embeddings outside the train step, and the search.

In: parameters of the retriever as they are at some step. Out: numbers of the
passages to read. Everything runs on one local device of this process, from a
copy of the parameters, so that a thread can do it while the devices train.
"""

from collections.abc import Callable, Iterator

from flax import linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, PyTree
import numpy as np

from rag_jax import artifacts
from rag_jax.config import IndexConfig
from rag_jax.models.partitioning import replicated
from rag_jax.retrieval.certificate import check_min_recall
from rag_jax.retrieval.index import Index
from rag_jax.retrieval.index import build_index

PassageTokens = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


class RetrieverSnapshots:
  """Copies the retriever's parameters out of a training state."""

  def __init__(self, mesh: jax.sharding.Mesh):
    # A true copy, on every device: the step that follows donates its input.
    self._copy = jax.jit(
      lambda tree: jax.tree.map(jnp.copy, tree), out_shardings=replicated(mesh)
    )

  def take(self, params: PyTree) -> PyTree:
    """Returns the retriever's parameters on one local device."""
    retriever = {k: v for k, v in params.items() if k != "generator"}
    return jax.tree.map(lambda x: x.addressable_data(0), self._copy(retriever))


def fingerprint(retriever_params: PyTree) -> str:
  """Identifies the weights that embed passages: those of their tower."""
  question_tower = retriever_params["question_encoder"]  # of both, if tied
  tower = retriever_params.get("passage_encoder", question_tower)
  leaves = jax.tree_util.tree_leaves_with_path(tower)
  return artifacts.fingerprint_arrays(
    {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
  )


class Embedder:
  """The two towers as compiled programs, one shape each."""

  def __init__(self, model: nn.Module, embed_batch_size: int):
    def apply(method: str) -> Callable:
      return jax.jit(
        lambda params, tokens, mask: model.apply(
          {"params": params}, tokens, mask, method=method
        )
      )

    self._questions = apply("embed_questions")
    self._passages = apply("embed_passages")
    self._batch_size = embed_batch_size

  def questions(
    self,
    retriever_params: PyTree,
    tokens: Int[np.ndarray, "B Q"],
    mask: Bool[np.ndarray, "B Q"],
  ) -> Float[np.ndarray, "B R"]:
    """Returns question embeddings."""
    return np.asarray(self._questions(retriever_params, tokens, mask))

  def passages(
    self,
    retriever_params: PyTree,
    passage_tokens: PassageTokens,
    num_passages: int,
  ) -> Float[np.ndarray, "P R"]:
    """Returns the embeddings of passages 0 to num_passages - 1.

    Args:
      retriever_params: of the retriever.
      passage_tokens: passage numbers -> (tokens, mask), both [N, L].
      num_passages: how many there are.
    """
    return np.concatenate(
      list(self._blocks(retriever_params, passage_tokens, num_passages))
    )

  def _blocks(
    self, params: PyTree, passage_tokens: PassageTokens, num_passages: int
  ) -> Iterator[np.ndarray]:
    for start in range(0, num_passages, self._batch_size):
      rows = np.arange(start, min(start + self._batch_size, num_passages))
      # The last block is filled up with its last passage: one shape alone.
      filled = np.minimum(np.arange(start, start + self._batch_size), rows[-1])
      tokens, mask = passage_tokens(filled)
      yield np.asarray(self._passages(params, tokens, mask))[: len(rows)]


class IndexBuilder:
  """Builds an index of all passages from a copy of the parameters."""

  def __init__(
    self,
    embedder: Embedder,
    passage_tokens: PassageTokens,
    num_passages: int,
    passages_fingerprint: str,
    config: IndexConfig,
    n_docs: int = 1,
  ):
    """Builds nothing yet.

    Args:
      embedder: embeds passages.
      passage_tokens: passage numbers -> (tokens, mask), both [N, L].
      num_passages: how many there are.
      passages_fingerprint: of them.
      config: of the index.
      n_docs: passages that are read for a question: where recall matters.
    """
    self._embedder = embedder
    self._passage_tokens = passage_tokens
    self._num_passages = num_passages
    self._passages_fingerprint = passages_fingerprint
    self._config = config
    self._n_docs = n_docs

  def build(self, retriever_params: PyTree) -> Index:
    """Embeds every passage and returns the index over them.

    Raises:
      ValueError: as `check`.
    """
    index = build_index(
      self._embedder.passages(
        retriever_params, self._passage_tokens, self._num_passages
      ),
      self._config,
      encoder_fingerprint=fingerprint(retriever_params),
      passages_fingerprint=self._passages_fingerprint,
    )
    self.check(index)
    return index

  def check(self, index: Index) -> None:
    """Raises `ValueError` if `index` finds less than index.min_recall."""
    check_min_recall(index, self._config.min_recall, self._n_docs)
