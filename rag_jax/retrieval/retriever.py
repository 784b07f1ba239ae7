"""Question and passage embeddings outside the train step, and the search.

In: parameters of the retriever as they are at some step. Out: numbers of the
passages to read. Everything runs on one local device of this process, from a
copy of the parameters, so that a thread can do it while the devices train.
"""

from collections.abc import Callable, Iterator, Sequence

from flax import linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, PyTree
import numpy as np

from rag_jax import artifacts
from rag_jax.config import IndexConfig
from rag_jax.models.hybrid import learned_weights
from rag_jax.models.partitioning import batch_sharding
from rag_jax.models.partitioning import replicated
from rag_jax.processes import to_host
from rag_jax.retrieval.bm25 import Bm25Index
from rag_jax.retrieval.certify import check_min_recall
from rag_jax.retrieval.hybrid import HybridRetriever
from rag_jax.retrieval.index import Index
from rag_jax.retrieval.index import build_index

PassageTokens = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]

_SORTED_PASSAGES = 65_536  # whose tokens are sorted by length at a time


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


def find_docs(
  index: Index,
  bm25: Bm25Index | None,
  retriever_params: PyTree,
  question_embeddings: Float[np.ndarray, "B R"],
  questions: Sequence[str],
  n_docs: int,
) -> Int[np.ndarray, "B K"]:
  """Returns the passages to read for each question, best first.

  By the scores of `index`, and by the words too if the retriever has weights of
  both scores. Errors as in `HybridRetriever.search`.
  """
  weights = learned_weights(retriever_params)
  if weights is None:
    return index.search(question_embeddings, n_docs)[0]
  assert bm25 is not None, "the experiment opens one with index.hybrid"
  both = HybridRetriever(index, bm25, weights)
  return both.search(question_embeddings, questions, n_docs)[0]


def fingerprint(retriever_params: PyTree) -> str:
  """Identifies the weights that embed passages: those of their tower."""
  question_tower = retriever_params["question_encoder"]  # of both, if tied
  tower = retriever_params.get("passage_encoder", question_tower)
  leaves = jax.tree_util.tree_leaves_with_path(tower)
  return artifacts.fingerprint_arrays(
    {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
  )


class Embedder:
  """The two towers as compiled programs.

  Questions have one shape. Passages are embedded with others of like length,
  padded to the longest of them, rounded up to one of a few lengths: each is
  compiled once.
  """

  def __init__(
    self,
    model: nn.Module,
    embed_batch_size: int,
    mesh: jax.sharding.Mesh | None = None,
  ):
    """Compiles nothing yet.

    Args:
      model: whose methods `embed_questions` and `embed_passages` are used.
      embed_batch_size: passages embedded at a time; a multiple of the devices.
      mesh: of local devices that share each batch, each with all parameters;
        None: where the parameters are.
    """

    def apply(method: str) -> Callable:
      return jax.jit(
        lambda params, tokens, mask: model.apply(
          {"params": params}, tokens, mask, method=method
        )
      )

    self._questions = apply("embed_questions")
    self._passages = apply("embed_passages")
    self.batch_size = embed_batch_size
    self._mesh = mesh

  def place(self, retriever_params: PyTree) -> PyTree:
    """Returns the parameters where passages are embedded."""
    if self._mesh is None:
      return retriever_params
    return jax.device_put(retriever_params, replicated(self._mesh))

  def embedding_dim(self, retriever_params: PyTree) -> int:
    """Returns R."""
    tokens = jax.ShapeDtypeStruct((1, 8), np.int32)
    mask = jax.ShapeDtypeStruct((1, 8), np.bool_)
    shape = jax.eval_shape(self._passages, retriever_params, tokens, mask)
    return shape.shape[-1]

  def questions(
    self,
    retriever_params: PyTree,
    tokens: Int[np.ndarray, "B Q"],
    mask: Bool[np.ndarray, "B Q"],
  ) -> Float[np.ndarray, "B R"]:
    """Returns question embeddings."""
    return to_host(self._questions(retriever_params, tokens, mask))

  def passages(
    self,
    retriever_params: PyTree,
    passage_tokens: PassageTokens,
    num_passages: int,
  ) -> Float[np.ndarray, "P R"]:
    """Returns the embeddings of passages 0 to num_passages - 1.

    Args:
      retriever_params: of the retriever.
      passage_tokens: passage numbers -> (tokens, mask), both [N, L], real
        tokens first.
      num_passages: how many there are.
    """
    starts = range(0, num_passages, _SORTED_PASSAGES)
    return np.concatenate(
      [
        self.rows(
          retriever_params,
          passage_tokens,
          np.arange(start, min(start + _SORTED_PASSAGES, num_passages)),
        )
        for start in starts
      ]
    )

  def rows(
    self,
    retriever_params: PyTree,
    passage_tokens: PassageTokens,
    rows: Int[np.ndarray, "N"],
    on_block: Callable[[int], None] = lambda num_passages: None,
  ) -> Float[np.ndarray, "N R"]:
    """Returns the embeddings of the passages `rows`, in their order.

    Their tokens are in memory all at once, [N, L]. Arguments as in `passages`;
    `on_block` gets the number of passages of each block that was started.
    """
    tokens, mask = passage_tokens(rows)
    lengths = mask.sum(axis=1)
    order = np.argsort(lengths, kind="stable")
    blocks = []
    for part, block in self._blocks(
      retriever_params, tokens, mask, lengths, order
    ):
      # Waiting for a block here lets the next one be computed meanwhile.
      blocks.append(block[: len(part)])
      if len(blocks) > 1:
        blocks[-2] = np.asarray(blocks[-2])
      on_block(len(part))
    embeddings = np.concatenate([np.asarray(block) for block in blocks])
    result = np.empty_like(embeddings)
    result[order] = embeddings
    return result

  def _blocks(
    self,
    params: PyTree,
    tokens: np.ndarray,
    mask: np.ndarray,
    lengths: np.ndarray,
    order: np.ndarray,
  ) -> Iterator[tuple[np.ndarray, jax.Array]]:
    """Yields which rows a block embeds, and it, before it is computed."""
    for start in range(0, len(order), self.batch_size):
      part = order[start : start + self.batch_size]
      # The last block is filled up with its last passage: one size alone.
      filled = np.pad(part, (0, self.batch_size - len(part)), mode="edge")
      width = padded_length(int(lengths[part[-1]]), tokens.shape[1])
      batch = tokens[filled, :width], mask[filled, :width]
      if self._mesh is not None:
        batch = jax.device_put(batch, batch_sharding(self._mesh))
      yield part, self._passages(params, *batch)


def padded_length(length: int, longest: int) -> int:
  """Returns to how many tokens rows of `length` are padded.

  Steps of an eighth of the power of two below, and of 8 at least: eight
  lengths an octave, for at most an eighth of padding.
  """
  step = max(8, (1 << max(length - 1, 1).bit_length()) // 16)
  return min(-(-max(length, 1) // step) * step, longest)


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

  def build(
    self, retriever_params: PyTree, mesh: jax.sharding.Mesh | None = None
  ) -> Index:
    """Embeds every passage and returns the index over them.

    Of kind "device" it lies over `mesh`; None: on one local device.

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
      mesh=mesh,
    )
    self.check(index)
    return index

  def check(self, index: Index) -> None:
    """Raises `ValueError` if `index` finds less than index.min_recall."""
    check_min_recall(index, self._config.min_recall, self._n_docs)
