"""Search with ScaNN (Guo et al. 2020, arXiv:1908.10396). Linux only.

In: passage embeddings. Out: per question the passages that ScaNN found, and a
directory that holds the embeddings and what ScaNN trained. This is the only
module that imports `scann`, and it does so only when an index needs it.
"""

import contextlib
import dataclasses
import importlib.util
import math
import os
import re
import shutil
import tempfile
from typing import Any

from absl import logging
from etils import epath
from jaxtyping import Float
import numpy as np

from rag_jax import artifacts
from rag_jax import disk
from rag_jax.config import IndexConfig
from rag_jax.retrieval import exact
from rag_jax.retrieval.index_core import REMEDY
from rag_jax.retrieval.index_core import Found
from rag_jax.retrieval.index_core import Index
from rag_jax.retrieval.index_core import IndexInfo
from rag_jax.retrieval.index_core import check_search
from rag_jax.retrieval.resources import num_cpus

_ARTIFACTS = "scann"  # the folder that ScaNN writes, inside the index
_CONFIG, _LIST = "scann_config.pb", "scann_assets.pbtxt"  # in that folder
# One entry in ScaNN's list of its files, as it writes it: a name, no path.
_LISTED = re.compile(
  r"""\s*assets \{\s*asset_type: (\w+)\s*asset_path: "(\w[\w.-]*)"\s*\}\s*""",
  re.ASCII,
)
_TREE_SAMPLE = 256  # fewest passages that the centre of a leaf is trained on
_CODEBOOK = 16  # ScaNN cannot quantise fewer passages than this
_BATCH = 64  # most questions that one thread searches for at a time
# The settings that every manifest has; and those that the manifests of the
# first ScaNN indexes lack, with the values that they were built with.
_SETTINGS = ("num_leaves", "leaves_to_search", "reorder")
_LATER = {
  "pca_dims": 0,
  "dims_per_block": 2,
  "anisotropic_threshold": 0.2,
  "soar_lambda": 0.0,
  "soar_overretrieve": 0.0,
  "reorder_dtype": "float32",
}
_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}


def import_problem() -> str:
  """Returns why ScaNN cannot be used here, or ""."""
  if importlib.util.find_spec("scann") is None:
    return "the package scann is not installed"
  try:
    import scann  # noqa: F401
  except (ImportError, OSError) as e:  # OSError: no shared library
    return f"the package scann cannot be imported ({e})"
  return ""


class ScannIndex(Index):
  """Maximum-inner-product search by ScaNN. Row = passage id.

  With fewer than `index.scann_tree_passages` passages ScaNN scores all of them.
  With more it searches the most promising leaves of a tree by 4-bit codes, and
  scores the best of these passages again. What it finds is ranked by exact
  scores, so the only difference from `ExactIndex` is a recall below 1.
  """

  def __init__(
    self, inner: exact.ExactIndex, searcher: Any, settings: dict[str, Any]
  ):
    """Takes what was built. With all settings 0, every passage is scored."""
    super().__init__(
      dataclasses.replace(inner.info, kind="scann", settings=settings),
      inner.embeddings,
      inner.memory_bytes
      + _searcher_bytes(inner.num_passages, inner.embedding_dim, settings),
    )
    self._exact = inner
    self._searcher = searcher

  @classmethod
  def build(cls, inner: exact.ExactIndex, config: IndexConfig) -> "ScannIndex":
    """Trains ScaNN on the embeddings of `inner`, which are not copied.

    Raises:
      ValueError: ScaNN is not installed, or `index.scann_pca_dims` is more
        than the embeddings have.
    """
    module = _module()
    if config.scann_pca_dims > inner.embedding_dim:
      raise ValueError(
        f"index.scann_pca_dims={config.scann_pca_dims} principal components of"
        f" embeddings of {inner.embedding_dim} dimensions; expected no more"
        " components than dimensions. Lower it, for instance to half of the"
        " dimensions, or set it to 0 to use all of them."
      )
    settings = _settings(inner.num_passages, config)
    builder = module.builder(inner.embeddings[:], 10, "dot_product")
    builder = _configure(builder.set_n_training_threads(num_cpus()), settings)
    # Never pass `docids`: ScaNN saves them as a pickle.
    return cls(inner, builder.build(), settings)

  def search(
    self, question_embeddings: Float[np.ndarray, "B R"], n_docs: int
  ) -> Found:
    """Returns passages that ScaNN found; see `Index.search`.

    Some of the best may be missing. No passage occurs twice in a row.
    """
    questions = check_search(self.info, question_embeddings, n_docs)
    if not len(questions):
      return exact.stack_rows([], n_docs)
    reorder = max(self.settings["reorder"], n_docs)
    found, distances = self._searcher.search_batched_parallel(
      questions,
      final_num_neighbors=n_docs,
      pre_reorder_num_neighbors=reorder if self.settings["reorder"] else None,
      leaves_to_search=self.settings["leaves_to_search"] or None,
      batch_size=min(-(-len(questions) // num_cpus()), _BATCH),
    )
    ids = np.zeros((len(questions), n_docs), np.int32)
    width = found.shape[1]  # the length of the longest row
    ids[:, :width] = found
    # The leaves that were searched may hold fewer than n_docs passages. Then
    # ScaNN pads the row with passage 0 and the distance NaN.
    short = np.full(len(questions), width < n_docs) | np.isnan(distances).any(1)
    if short.any():
      logging.log_first_n(
        logging.WARNING,
        "ScaNN found fewer than data.n_docs=%d passages for %d of %d questions;"
        " a slow exact search answers these. Raise index.scann_leaves_to_search"
        " or lower index.scann_num_leaves to avoid it.",
        1,
        n_docs,
        short.sum(),
        len(questions),
      )
      ids[short], _ = self._exact.search(questions[short], n_docs)
    return exact.rank(questions, self.embeddings, ids)

  def with_search_settings(
    self, *, leaves_to_search: int, reorder: int
  ) -> "ScannIndex":
    """Returns the same index with other search settings; nothing is built.

    It has no certificate, because other settings have another recall.

    Args:
      leaves_to_search: more leaves find more, and take longer.
      reorder: how many candidates are scored again; likewise.

    Raises:
      ValueError: a number is out of range, or this index scores every passage.
    """
    leaves = self.settings["num_leaves"]
    if not leaves:
      raise ValueError(
        f"This index scores all of its {self.num_passages} passages, so it has"
        " no search settings: index.scann_tree_passages is larger than their"
        " number. Expected an index with a tree. Lower"
        " index.scann_tree_passages and build it again."
      )
    if not 1 <= leaves_to_search <= leaves or reorder < 1:
      raise ValueError(
        f"leaves_to_search={leaves_to_search} and reorder={reorder} were asked"
        f" for; expected 1 to {leaves} leaves, as many as the index has, and a"
        " reorder of at least 1. Change them."
      )
    settings = self.settings | {
      "leaves_to_search": leaves_to_search,
      "reorder": reorder,
    }
    other = ScannIndex(self._exact, self._searcher, settings)
    other.build_cost = self.build_cost
    return other

  def _save_files(self, path: epath.Path) -> None:
    super()._save_files(path)
    folder = path / _ARTIFACTS
    # ScaNN only writes to a local disk, and overwrites what it may be reading.
    parent = path if artifacts.is_local(path) else None
    with _temporary_folder(parent) as temp:
      try:
        self._searcher.serialize(os.fspath(temp), relative_path=True)
      except RuntimeError as error:  # ScaNN says "I/O error", whatever it is
        raise disk.UnwritableError(
          f"ScaNN's files cannot be written to {path} ({error}). Expected room"
          f" for {self.memory_bytes:,} bytes. Free some space, or choose"
          " another directory, and build the index again."
        ) from error
      if parent:
        if folder.exists():
          folder.rmtree()
        os.replace(temp, folder)
      else:
        _copy_files(temp, folder)

  @classmethod
  def load(cls, path: epath.PathLike, info: IndexInfo) -> "ScannIndex":
    """Opens what `save` wrote.

    Args:
      path: the directory.
      info: its manifest, which `index.load_index` has checked.

    Raises:
      ValueError: ScaNN is not installed, or the files do not fit together.
    """
    module = _module()
    inner = exact.ExactIndex.load(path, info)
    folder = epath.Path(path) / _ARTIFACTS
    settings = info.settings
    if not folder.exists() or not set(_SETTINGS) <= set(settings):
      raise ValueError(
        f"The manifest of {path} names the kind 'scann', but there is no"
        f" {_ARTIFACTS}/ in it or its settings {settings} lack one of"
        f" {', '.join(_SETTINGS)}. {REMEDY}"
      )
    with _temporary_folder(None) as temp:
      _show_verified(folder, temp)
      searcher = module.load_searcher(
        os.fspath(temp), assets_backcompat_shim=False
      )
    if searcher.size() != inner.num_passages:
      raise ValueError(
        f"{path}/{_ARTIFACTS} holds {searcher.size()} passages, the embeddings"
        f" {inner.num_passages}; the directory mixes two builds. {REMEDY}"
      )
    later = _LATER if settings["num_leaves"] else dict.fromkeys(_LATER, 0)
    return cls(inner, searcher, later | settings)


def check_import() -> None:
  """Raises `ValueError` if ScaNN cannot be used here."""
  problem = import_problem()
  if problem:
    raise ValueError(
      f"index.kind='scann', but {problem}. Install it with `pip install scann`"
      " (Linux, Python 3.11 to 3.13), or use index.kind='exact' and build a"
      " saved index of kind 'scann' again."
    )


def _module() -> Any:
  """Returns the Python module of ScaNN that does not need TensorFlow."""
  check_import()
  from scann import scann_ops_pybind

  return scann_ops_pybind


def _settings(num_passages: int, config: IndexConfig) -> dict[str, Any]:
  """Returns the settings with the automatic ones filled in."""
  if num_passages < max(config.scann_tree_passages, _CODEBOOK):
    return dict.fromkeys([*_SETTINGS, *_LATER], 0)
  leaves = config.scann_num_leaves or math.isqrt(num_passages)
  leaves = min(leaves, num_passages)
  searched = config.scann_leaves_to_search or max(leaves // 10, 1)
  return {
    "num_leaves": leaves,
    "leaves_to_search": min(searched, leaves),
    "reorder": config.scann_reorder,
  } | {name: getattr(config, f"scann_{name}") for name in _LATER}


def _configure(builder: Any, settings: dict[str, Any]) -> Any:
  """Returns the builder of ScaNN with our settings."""
  if not settings["num_leaves"]:
    return builder.score_brute_force()
  from scann.scann_ops.py import scann_builder

  if settings["pca_dims"]:
    builder = builder.pca(settings["pca_dims"], pca_significance_threshold=None)
  builder = builder.tree(
    num_leaves=settings["num_leaves"],
    num_leaves_to_search=settings["leaves_to_search"],
    # ScaNN's default of 100,000 is too small for a thousand leaves or more:
    # many more leaves have to be searched for the same recall.
    training_sample_size=max(_TREE_SAMPLE * settings["num_leaves"], 100_000),
    # ScaNN draws random centres without a seed (1.4.2). With k-means++ the same
    # passages give the same index, if the number of CPUs is the same.
    random_init=False,
    soar_lambda=settings["soar_lambda"] or None,
    overretrieve_factor=settings["soar_overretrieve"] or None,
  )
  builder = builder.score_ah(
    settings["dims_per_block"],
    # NaN turns this off in ScaNN.
    anisotropic_quantization_threshold=settings["anisotropic_threshold"]
    or math.nan,
  )
  dtype = scann_builder.ReorderType[settings["reorder_dtype"].upper()]
  return builder.reorder(settings["reorder"], quantize=dtype)


def planned_bytes(
  num_passages: int, embedding_dim: int, config: IndexConfig
) -> int:
  """Returns the bytes that ScaNN would add to the embeddings, without it."""
  settings = _settings(num_passages, config)
  return _searcher_bytes(num_passages, embedding_dim, settings)


def _searcher_bytes(rows: int, dim: int, settings: dict[str, Any]) -> int:
  """Returns the bytes that ScaNN adds to the embeddings, in memory or on disk.

  They are computed, not measured: the centres; per passage its leaf and codes
  (one byte per block, ScaNN 1.4.2), twice with SOAR; and the numbers that
  passages are reordered by.
  """
  leaves = settings["num_leaves"]
  if not leaves:
    return 4 * rows * dim
  scored = settings["pca_dims"] or dim
  codes = 4 + math.ceil(scored / settings["dims_per_block"])
  codes *= 2 if settings["soar_lambda"] else 1
  reorder = dim * _DTYPE_BYTES[settings["reorder_dtype"]]
  return rows * (codes + reorder) + 4 * leaves * dim


@contextlib.contextmanager
def _temporary_folder(parent: epath.Path | None):
  """Yields a new local folder and removes it afterwards, if it is still there.

  It is in `parent`, or where the system keeps temporary files.
  """
  if parent is None:
    folder = epath.Path(tempfile.mkdtemp())
  else:
    folder = artifacts.temp_path(parent / _ARTIFACTS)
    folder.mkdir()
  try:
    yield folder
  finally:
    shutil.rmtree(folder, ignore_errors=True)


def _show_verified(source: epath.Path, target: epath.Path) -> None:
  """Links the files that ScaNN's own list names into a private folder.

  ScaNN opens whatever file its list names, anywhere on the machine, and
  unpickles a file of a certain name beside the list. So it is never given the
  folder of the index. It is given this folder, which holds the verified files
  and no others.

  Args:
    source: the ScaNN folder of an index whose manifest was checked.
    target: an empty folder that only this process uses.

  Raises:
    ValueError: the list names anything but files beside it.
  """
  listed = (source / _LIST).read_bytes().decode("utf-8", errors="replace")
  rest = _LISTED.sub("", listed)
  names = [name for _, name in _LISTED.findall(listed)]
  names = list(dict.fromkeys([_CONFIG, _LIST, *names]))
  missing = [name for name in names if not (source / name).exists()]
  if rest or missing or any(name.endswith(".pkl") for name in names):
    raise ValueError(
      f"{source / _LIST} is not what ScaNN wrote there: it contains"
      f" {rest[:80]!r}, and names files that are not beside it: {missing}."
      " Expected the names of files in the same folder. Opening it could read"
      f" any file of this machine. {REMEDY}"
    )
  local = artifacts.is_local(source)
  for name in names:
    if local:  # a link, because files may be large
      os.symlink(os.path.realpath(source / name), target / name)
    else:
      (source / name).copy(target / name)


def _copy_files(source: epath.Path, target: epath.Path) -> None:
  target.mkdir(parents=True, exist_ok=True)
  for file in source.iterdir():
    file.copy(target / file.name, overwrite=True)
