"""Embeds questions and passages outside the train step, and searches.

In: the parameters of the retriever at some step. Out: the ids of the passages
to read. Everything runs on one local device of this process, with a copy of the
parameters, so that a thread can do it while the devices train.
"""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
from typing import Any

from absl import logging
from etils import epath
from flax import linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, PyTree
import numpy as np

from rag_jax import artifacts
from rag_jax.config import IndexConfig
from rag_jax.models.hybrid import learned_weights
from rag_jax.models.lora import merged
from rag_jax.models.partitioning import batch_sharding
from rag_jax.models.partitioning import replicated
from rag_jax.processes import to_host
from rag_jax.retrieval.bm25 import Bm25Index
from rag_jax.retrieval.certify import check_min_recall
from rag_jax.retrieval.hybrid import HybridRetriever
from rag_jax.retrieval.index import Index
from rag_jax.retrieval.index import build_index
from rag_jax.retrieval.index import own_rows
from rag_jax.retrieval.shared_embedding import PREFIX
from rag_jax.retrieval.shared_embedding import embed_shared

PassageTokens = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]

# Tokenized, and sorted by length, at a time; what one of several hosts embeds.
_SORTED_PASSAGES = 16_384


class RetrieverSnapshots:
  """Copies the retriever's parameters out of a training state, merged.

  The log says once what the copies cost.
  """

  def __init__(self, mesh: jax.sharding.Mesh):
    # A real copy, on every device: the next train step donates its input.
    self._copy = jax.jit(
      lambda tree: merged(jax.tree.map(jnp.copy, tree)),
      out_shardings=replicated(mesh),
    )
    self._logged: set[bool] = set()

  def take(self, params: PyTree, *, embeds_passages: bool = True) -> PyTree:
    """Returns the retriever's parameters on one local device.

    Args:
      params: of the whole model, on the mesh.
      embeds_passages: False leaves out a passage encoder of its own, which
        questions do not need. A copy for questions is taken in every step.
    """
    left_out = {"generator"} | (
      set() if embeds_passages else {"passage_encoder"}
    )
    retriever = {k: v for k, v in params.items() if k not in left_out}
    copy = jax.tree.map(lambda x: x.addressable_data(0), self._copy(retriever))
    if embeds_passages not in self._logged:
      self._logged.add(embeds_passages)
      size = sum(x.nbytes for x in jax.tree.leaves(copy)) / 2**20
      what = "passages, for each index" if embeds_passages else "questions"
      logging.info(
        "A copy of the parameters that embed %s takes %.1f MiB: of every device"
        " while it is made, and then of one device of each host%s.",
        *(what, size, "" if embeds_passages else ", two in turn"),
      )
    return copy


def find_docs(
  index: Index,
  bm25: Bm25Index | None,
  retriever_params: PyTree,
  question_embeddings: Float[np.ndarray, "B R"],
  questions: Sequence[str],
  n_docs: int,
) -> Int[np.ndarray, "B K"]:
  """Returns the ids of the passages to read per question, best first.

  They are ranked by `index`, or by both indexes if the retriever has learned
  weights for the two scores. Errors as in `HybridRetriever.search`.
  """
  weights = learned_weights(retriever_params)
  if weights is None:
    return index.search(question_embeddings, n_docs)[0]
  assert bm25 is not None, "the experiment opens one with index.hybrid"
  both = HybridRetriever(index, bm25, weights)
  return both.search(question_embeddings, questions, n_docs)[0]


def fingerprint(retriever_params: PyTree) -> str:
  """Returns the fingerprint of the weights of the passage encoder."""
  question_tower = retriever_params["question_encoder"]  # the only one if tied
  tower = retriever_params.get("passage_encoder", question_tower)
  leaves = jax.tree_util.tree_leaves_with_path(tower)
  return artifacts.fingerprint_arrays(
    {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
  )


class Embedder:
  """The two encoders as compiled programs.

  Questions have one shape. Passages are batched with others of similar length
  and padded to one of a few lengths; one program is compiled per length.
  """

  def __init__(
    self,
    model: nn.Module,
    embed_batch_size: int,
    mesh: jax.sharding.Mesh | None = None,
  ):
    """Compiles nothing yet.

    Args:
      model: has the methods `embed_questions` and `embed_passages`.
      embed_batch_size: passages per batch; a multiple of the devices.
      mesh: local devices that share each batch, each with all parameters; None
        for the device of the parameters.
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
    """Returns the parameters on the devices that embed passages."""
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
    tokens: Int[Any, "B Q"],
    mask: Bool[Any, "B Q"],
  ) -> Float[np.ndarray, "B R"]:
    """Returns question embeddings; the tokens are anywhere, or on a mesh."""
    return to_host(self._questions(retriever_params, tokens, mask))

  def passages(
    self,
    retriever_params: PyTree,
    passage_tokens: PassageTokens,
    num_passages: int,
    *,
    folder: epath.PathLike = "",
    devices: Sequence[Any] = (),
    kept: range | None = None,
  ) -> Float[np.ndarray, "N R"]:
    """Returns the embeddings of passages 0 to num_passages - 1.

    They do not depend on the number of processes or devices.

    Args:
      retriever_params: on one device.
      passage_tokens: passage ids -> (tokens, mask), both [N, L], real tokens
        first.
      num_passages: P.
      folder: as in `embed_shared`, through which all processes share the work;
        "": this process embeds all.
      devices: of this process, which share the batches; (): that of the
        parameters. Each gets a copy of the parameters.
      kept: with a folder, the passages that this process needs; None: all.
    """
    more = []
    if devices:
      leaves = jax.tree.leaves(retriever_params)
      here = {device for leaf in leaves for device in leaf.devices()}
      others = [device for device in devices if device not in here]
      more = [jax.device_put(retriever_params, device) for device in others]

    def embed(rows: Int[np.ndarray, "N"]) -> Float[np.ndarray, "N R"]:
      return self.rows(retriever_params, passage_tokens, rows, more=more)

    blocks = [
      np.arange(start, min(start + _SORTED_PASSAGES, num_passages))
      for start in range(0, num_passages, _SORTED_PASSAGES)
    ]
    if folder and jax.process_count() > 1:
      return embed_shared(embed, blocks, folder, kept)
    return np.concatenate([embed(rows) for rows in blocks])

  def rows(
    self,
    retriever_params: PyTree,
    passage_tokens: PassageTokens,
    rows: Int[np.ndarray, "N"],
    on_block: Callable[[int], None] = lambda num_passages: None,
    *,
    more: Sequence[PyTree] = (),
  ) -> Float[np.ndarray, "N R"]:
    """Returns the embeddings of the passages `rows`, in this order.

    All their tokens, [N, L], are in memory at once. Arguments as in `passages`;
    `on_block` is called with the number of passages of each batch. `more` are
    copies of the parameters, on other devices, which take turns with the first.
    """
    tokens, mask = passage_tokens(rows)
    lengths = mask.sum(axis=1)
    order = np.argsort(lengths, kind="stable")
    blocks, copies = [], (retriever_params, *more)
    for part, block in self._blocks(copies, tokens, mask, lengths, order):
      # Waits for an earlier block, while each device computes one.
      blocks.append(block[: len(part)])
      if len(blocks) > len(copies):
        earlier = -1 - len(copies)
        blocks[earlier] = np.asarray(blocks[earlier])
      on_block(len(part))
    embeddings = np.concatenate([np.asarray(block) for block in blocks])
    result = np.empty_like(embeddings)
    result[order] = embeddings
    return result

  def _blocks(
    self,
    copies: Sequence[PyTree],
    tokens: np.ndarray,
    mask: np.ndarray,
    lengths: np.ndarray,
    order: np.ndarray,
  ) -> Iterator[tuple[np.ndarray, jax.Array]]:
    """Yields the rows of each batch and its embeddings, not yet computed."""
    for number, start in enumerate(range(0, len(order), self.batch_size)):
      part = order[start : start + self.batch_size]
      # The last batch is padded with its last passage, to have the same size.
      filled = np.pad(part, (0, self.batch_size - len(part)), mode="edge")
      width = padded_length(int(lengths[part[-1]]), tokens.shape[1])
      batch = tokens[filled, :width], mask[filled, :width]
      if self._mesh is not None:
        batch = jax.device_put(batch, batch_sharding(self._mesh))
      yield part, self._passages(copies[number % len(copies)], *batch)


def padded_length(length: int, longest: int) -> int:
  """Returns the length that rows with up to `length` tokens are padded to.

  Lengths are multiples of an eighth of the power of two below, and of 8. So
  there are eight lengths per octave, and at most an eighth is padding.
  """
  step = max(8, (1 << max(length - 1, 1).bit_length()) // 16)
  return min(-(-max(length, 1) // step) * step, longest)


@dataclasses.dataclass(eq=False)
class IndexBuilder:
  """Builds an index of all passages from a copy of the parameters.

  Attributes:
    embedder: embeds the passages.
    passage_tokens: passage ids -> (tokens, mask), both [N, L].
    num_passages: P.
    passages_fingerprint: identifies the passages.
    config: the settings of the index.
    n_docs: how many passages are read per question; the recall that is checked.
  """

  embedder: Embedder
  passage_tokens: PassageTokens
  num_passages: int
  passages_fingerprint: str
  config: IndexConfig
  n_docs: int = 1

  def build(
    self,
    retriever_params: PyTree,
    *,
    directory: epath.PathLike = "",
    devices: Sequence[Any] = (),
  ) -> Index:
    """Embeds all passages and returns their index.

    Several processes share the work, if they are given a directory. An index in
    shards (index.passages_per_shard) is spread over them: each holds some of
    the shards. Of any other index that a host searches each holds all rows, 4 *
    P * R bytes of float32, and what the index adds. (The index that a train
    step searches is built by search_in_step.py, with no row on a host.)

    Args:
      retriever_params: on one device.
      directory: which all processes see. With several processes, all call this
        with the same arguments, and exchange their rows in a folder there,
        until `remove_shared`. "": each process embeds everything.
      devices: of this process, which embed; (): that of the parameters.

    Raises:
      ValueError: as `check`.
    """
    weights = fingerprint(retriever_params)
    folder = ""
    if directory:
      kind = [weights, self.passages_fingerprint, self.embedder.batch_size]
      name = artifacts.fingerprint_lines(map(str, kind))
      folder = epath.Path(directory) / f"{PREFIX}{name[:16]}"
    shared = bool(folder) and jax.process_count() > 1
    kept = own_rows(self.config, self.num_passages) if shared else None
    is_spread = kept is not None and len(kept) < self.num_passages
    index = build_index(
      self.embedder.passages(
        retriever_params,
        self.passage_tokens,
        self.num_passages,
        folder=folder,
        devices=devices,
        kept=kept,
      ),
      self.config,
      encoder_fingerprint=weights,
      passages_fingerprint=self.passages_fingerprint,
      num_passages=self.num_passages if is_spread else 0,
    )
    self.check(index)
    return index

  def check(self, index: Index) -> None:
    """Raises `ValueError` if the recall is below index.min_recall."""
    check_min_recall(index, self.config.min_recall, self.n_docs)
