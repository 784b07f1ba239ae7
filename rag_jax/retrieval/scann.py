"""Search with ScaNN (Guo et al. 2020, arXiv:1908.10396). Linux only.

In: passage embeddings. Out: for each question the passages that ScaNN found,
and a directory that holds the embeddings and what ScaNN trained. The one module
that imports `scann`, and only when it is used.
"""

import contextlib
import importlib.util
import math
import os
import shutil
import tempfile
from typing import Any

from absl import logging
from etils import epath
from jaxtyping import Float, Int
import numpy as np

from rag_jax import artifacts
from rag_jax.config import IndexConfig
from rag_jax.retrieval import exact
from rag_jax.retrieval.embeddings import StoredEmbeddings
from rag_jax.retrieval.embeddings import save_embeddings

_ARTIFACTS = "scann"  # the folder that ScaNN writes, inside the index
_CODEBOOK = 16  # ScaNN cannot quantise fewer passages than these
_BATCH = 32  # questions that one thread searches for at a time
_SETTINGS = ("num_leaves", "leaves_to_search", "reorder")


def import_problem() -> str:
  """Returns why ScaNN cannot be used here, or ""."""
  if importlib.util.find_spec("scann") is None:
    return "the package scann is not installed"
  try:
    import scann  # noqa: F401
  except (ImportError, OSError) as e:  # OSError: its library cannot be loaded
    return f"the package scann cannot be imported ({e})"
  return ""


class ScannIndex:
  """Maximum-inner-product search by ScaNN. Row = passage id.

  Below `index.scann_tree_passages` ScaNN scores every passage; from there on it
  looks into the most promising leaves of a tree, scores 4-bit codes, and the
  best of these again. The passages that it finds are ranked by their exact
  scores, so a recall below 1 is all that differs from `ExactIndex`.
  """

  def __init__(
    self, inner: exact.ExactIndex, searcher: Any, settings: dict[str, int]
  ):
    self.kind = "scann"
    self.embeddings = inner.embeddings
    self.num_passages = inner.num_passages
    self.embedding_dim = inner.embedding_dim
    self.encoder_fingerprint = inner.encoder_fingerprint
    self.passages_fingerprint = inner.passages_fingerprint
    self.settings = settings  # all 0: every passage is scored
    self._exact = inner
    self._searcher = searcher

  @classmethod
  def build(
    cls,
    embeddings: Float[np.ndarray, "P R"] | StoredEmbeddings,
    config: IndexConfig,
    *,
    encoder_fingerprint: str,
    passages_fingerprint: str,
  ) -> "ScannIndex":
    """Trains ScaNN on passage embeddings, which are kept.

    Raises:
      ValueError: ScaNN is not installed.
    """
    builder = _module().builder(embeddings[:], 10, "dot_product")
    # The same passages give the same index: one thread, and k-means++ below,
    # as ScaNN draws the leaves' first centres without a seed (1.4.2).
    builder = builder.set_n_training_threads(1)
    settings = _settings(len(embeddings), config)
    if settings["num_leaves"]:
      builder = builder.tree(
        num_leaves=settings["num_leaves"],
        num_leaves_to_search=settings["leaves_to_search"],
        random_init=False,
      )
      # 2 dimensions a code and threshold 0.2: what ScaNN's authors recommend.
      builder = builder.score_ah(2, anisotropic_quantization_threshold=0.2)
      builder = builder.reorder(settings["reorder"])
    else:
      builder = builder.score_brute_force()
    inner = exact.ExactIndex(
      embeddings,
      encoder_fingerprint=encoder_fingerprint,
      passages_fingerprint=passages_fingerprint,
    )
    # Never `docids`: ScaNN saves them as a pickle.
    return cls(inner, builder.build(), settings)

  def search(
    self, question_embeddings: Float[np.ndarray, "B R"], n_docs: int
  ) -> tuple[Int[np.ndarray, "B K"], Float[np.ndarray, "B K"]]:
    """Finds passages with a large inner product.

    Args:
      question_embeddings: [B, R].
      n_docs: how many passages to return for each question (K).

    Returns:
      Passage ids [B, K] int32 and exact scores [B, K] float32, best first; of
      equal scores the smaller id. The ids of a row differ.

    Raises:
      ValueError: there are fewer passages than `n_docs`, or the embeddings
        have another dimension, NaN or infinity.
    """
    questions = exact.check_search(self, question_embeddings, n_docs)
    if not len(questions):
      return exact.stack_rows([], n_docs)
    reorder = max(self.settings["reorder"], n_docs)
    found, distances = self._searcher.search_batched_parallel(
      questions,
      final_num_neighbors=n_docs,
      pre_reorder_num_neighbors=reorder if self.settings["reorder"] else None,
      batch_size=_BATCH,
    )
    ids = np.zeros((len(questions), n_docs), np.int32)
    width = found.shape[1]  # of the longest row
    ids[:, :width] = found
    # The leaves that were searched may hold fewer than n_docs passages. Then
    # ScaNN pads with passage 0 and the distance NaN.
    short = np.full(len(questions), width < n_docs) | np.isnan(distances).any(1)
    if short.any():
      logging.log_first_n(
        logging.WARNING,
        "ScaNN found fewer than data.n_docs=%d passages for %d of %d questions;"
        " a slow exact search answers these. Raise index.scann_leaves_to_search"
        " or lower index.scann_num_leaves.",
        1,
        n_docs,
        short.sum(),
        len(questions),
      )
      ids[short], _ = self._exact.search(questions[short], n_docs)
    return exact.rank(questions, self.embeddings, ids)

  def save(self, path: epath.PathLike) -> None:
    """Writes the index to directory `path`, its manifest last."""
    path = artifacts.start_directory(path)
    save_embeddings(path, self.embeddings)
    folder = path / _ARTIFACTS
    # ScaNN writes to a local disk alone, and over what it may be reading.
    parent = path if artifacts.is_local(path) else None
    with _temporary_folder(parent) as temp:
      self._searcher.serialize(os.fspath(temp), relative_path=True)
      if parent:
        if folder.exists():
          folder.rmtree()
        os.replace(temp, folder)
      else:
        _copy_files(temp, folder)
    exact.write_index_manifest(self, path, self.settings)

  @classmethod
  def load(cls, path: epath.PathLike, content: dict[str, Any]) -> "ScannIndex":
    """Opens what `save` wrote.

    Args:
      path: the directory.
      content: of its manifest, once that was checked (`index.load_index`): it
        refuses the pickle that ScaNN would read.

    Raises:
      ValueError: ScaNN is not installed, or the files do not fit together.
    """
    module = _module()
    inner = exact.ExactIndex.load(path, content)
    folder = epath.Path(path) / _ARTIFACTS
    settings = content["settings"]
    if not folder.exists() or not set(_SETTINGS) <= set(settings):
      raise ValueError(
        f"{path} says that it is an index of kind 'scann', but there is no"
        f" {_ARTIFACTS}/ in it or its settings {settings} are not"
        f" {', '.join(_SETTINGS)}. {exact.REMEDY}"
      )
    with contextlib.ExitStack() as stack:
      if not artifacts.is_local(folder):
        temp = stack.enter_context(_temporary_folder(None))
        _copy_files(folder, temp)
        folder = temp
      searcher = module.load_searcher(
        os.fspath(folder), assets_backcompat_shim=False
      )
    if searcher.size() != inner.num_passages:
      raise ValueError(
        f"{path}/{_ARTIFACTS} holds {searcher.size()} passages, the embeddings"
        f" {inner.num_passages}; the directory mixes two builds. {exact.REMEDY}"
      )
    return cls(inner, searcher, settings)


def check_import() -> None:
  """Raises `ValueError` if ScaNN cannot be used here."""
  problem = import_problem()
  if problem:
    raise ValueError(
      f"index.kind='scann', but {problem}. Install it with `pip install scann`"
      " (Linux, Python 3.11 to 3.13), or use index.kind='exact'. A saved index"
      " of kind 'scann' has to be built again for that."
    )


def _module() -> Any:
  """Returns ScaNN's Python module that needs no TensorFlow."""
  check_import()
  from scann import scann_ops_pybind

  return scann_ops_pybind


def _settings(num_passages: int, config: IndexConfig) -> dict[str, int]:
  """Returns the settings with the automatic ones filled in."""
  if num_passages < max(config.scann_tree_passages, _CODEBOOK):
    return dict.fromkeys(_SETTINGS, 0)
  leaves = config.scann_num_leaves or math.isqrt(num_passages)
  leaves = min(leaves, num_passages)
  searched = config.scann_leaves_to_search or max(leaves // 10, 1)
  return {
    "num_leaves": leaves,
    "leaves_to_search": min(searched, leaves),
    "reorder": config.scann_reorder,
  }


@contextlib.contextmanager
def _temporary_folder(parent: epath.Path | None):
  """Yields a new local folder that is removed unless it was moved."""
  if parent is None:
    folder = epath.Path(tempfile.mkdtemp())
  else:
    folder = artifacts.temp_path(parent / _ARTIFACTS)
    folder.mkdir()
  try:
    yield folder
  finally:
    shutil.rmtree(folder, ignore_errors=True)


def _copy_files(source: epath.Path, target: epath.Path) -> None:
  target.mkdir(parents=True, exist_ok=True)
  for file in source.iterdir():
    file.copy(target / file.name, overwrite=True)
