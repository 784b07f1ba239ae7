"""An index of kind "device": the accelerators search, the host asks.

In: passage embeddings. Out: for each question the passages that the devices
found, and a directory that holds the embeddings.
"""

import dataclasses
from typing import Any

from etils import epath
import jax
from jax.sharding import AxisType
from jax.sharding import Mesh
from jaxtyping import Float, Int
import numpy as np

from rag_jax.config import IndexConfig
from rag_jax.retrieval import device
from rag_jax.retrieval.embeddings import Rows
from rag_jax.retrieval.exact import ExactIndex
from rag_jax.retrieval.exact import rank
from rag_jax.retrieval.index_core import REMEDY
from rag_jax.retrieval.index_core import Index
from rag_jax.retrieval.index_core import IndexInfo
from rag_jax.retrieval.index_core import check_search

_BLOCK_QUESTIONS = 256  # searched for at a time
_SETTINGS = ("storage", "recall_target", "chunk_passages")


_search = jax.jit(device.search_device, static_argnames="n_docs")
_gather = jax.jit(device.gather_embeddings)


def settings_of(config: IndexConfig) -> dict[str, Any]:
  """Returns the settings that `device.place_arrays` takes."""
  return {s: getattr(config, f"device_{s}") for s in _SETTINGS}


class DeviceIndex(Index):
  """`device.DeviceArrays` as an index that the host searches. Row = passage id.

  The passages that the devices find are ranked by their exact scores, so a
  recall below 1 (of a recall target, of stored numbers that are rounded) is all
  that differs from `ExactIndex`. A train step uses `arrays`.
  """

  def __init__(
    self,
    inner: ExactIndex,
    settings: dict[str, Any],
    mesh: Mesh | None = None,
  ):
    """Copies the embeddings of `inner` to the devices.

    Args:
      inner: keeps the embeddings in float32 on the host.
      settings: how, as in `device.place_arrays`.
      mesh: over which devices; None: one of this process. Over several, do
        not search in a thread while another program runs on them.
    """
    self.arrays = device.place_arrays(
      inner.embeddings[:], mesh or _one_device(), **settings
    )
    super().__init__(
      dataclasses.replace(inner.info, kind="device", settings=settings),
      inner.embeddings,
      inner.memory_bytes + _num_bytes(self.arrays),
    )

  def search(
    self, question_embeddings: Float[np.ndarray, "B R"], n_docs: int
  ) -> tuple[Int[np.ndarray, "B K"], Float[np.ndarray, "B K"]]:
    """Finds the passages with the largest inner product.

    Arguments, results and errors as in `ExactIndex.search`; the scores are
    exact, whatever the devices hold.
    """
    questions = check_search(self.info, question_embeddings, n_docs)
    ids = np.zeros((len(questions), n_docs), np.int32)
    for start in range(0, len(questions), _BLOCK_QUESTIONS):
      block = questions[start : start + _BLOCK_QUESTIONS]
      # Filled up to a power of two: few shapes to compile programs for.
      filled = np.zeros((1 << (len(block) - 1).bit_length(), block.shape[1]))
      filled[: len(block)] = block
      found, _ = _search(self.arrays, np.float32(filled), n_docs=n_docs)
      ids[start : start + len(block)] = np.asarray(found)[: len(block)]
    return rank(questions, self.embeddings, ids)

  @classmethod
  def load(
    cls,
    path: epath.PathLike,
    info: IndexInfo,
    mesh: Mesh | None = None,
  ) -> "DeviceIndex":
    """Opens what `save` wrote, and copies it to the devices.

    Args:
      path: the directory.
      info: of its manifest, once that was checked (`index.load_index`).
      mesh: over which devices, not those that it was saved from; None: one
        of this process.

    Raises:
      ValueError: the files do not fit together.
    """
    settings = info.settings
    if (
      set(settings) != set(_SETTINGS)
      or settings["storage"] not in device.STORAGES
    ):
      raise ValueError(
        f"{path} says that it is an index of kind 'device', but its settings"
        f" {settings} are not {', '.join(_SETTINGS)}, with a storage of"
        f" {sorted(device.STORAGES)}. {REMEDY}"
      )
    return cls(ExactIndex.load(path, info), settings, mesh)


class RefreshedIndex(DeviceIndex):
  """An index that a train step keeps fresh, seen from the host in between.

  Its rows are of the weights of several steps, so it has no fingerprint of an
  encoder. The next step, which is given its arrays for good, ends its use.
  Of several processes, all do the same with it.
  """

  def __init__(
    self,
    arrays: device.DeviceArrays,
    settings: dict[str, Any],
    *,
    passages_fingerprint: str,
  ):
    """Keeps the arrays; nothing is copied."""
    self.arrays = arrays
    embeddings = DeviceRows(arrays)
    info = IndexInfo(
      kind="device",
      num_passages=arrays.num_passages,
      embedding_dim=embeddings.shape[1],
      encoder_fingerprint="",
      passages_fingerprint=passages_fingerprint,
      settings=settings,
    )
    Index.__init__(self, info, embeddings, _num_bytes(arrays))


class DeviceRows(Rows):
  """The embeddings of `DeviceArrays`, of which the host copies what it reads.

  In float32, rounded as they are stored.
  """

  def __init__(self, arrays: device.DeviceArrays):
    self._arrays = arrays
    shape = arrays.num_passages, arrays.embeddings.shape[1]
    super().__init__(shape, 4 * shape[0] * shape[1])

  def _take(self, numbers: Int[np.ndarray, "*N"]) -> np.ndarray:
    # Filled up to a power of two: few shapes to compile programs for.
    size = numbers.size
    filled = np.zeros((1, 1 << max(size - 1, 0).bit_length()), np.int32)
    filled[0, :size] = numbers.reshape(-1)
    found = np.asarray(_gather(self._arrays, filled))[0, :size]
    return found.reshape(*numbers.shape, self.shape[1])


def _num_bytes(arrays: device.DeviceArrays) -> int:
  return sum(x.nbytes for x in jax.tree.leaves(arrays))


def _one_device() -> Mesh:
  """Returns a mesh of one device of this process.

  Of one alone, because a thread may search while a step runs on all: two
  programs that both wait for all devices could wait for each other.
  """
  return jax.make_mesh(
    (1,),
    ("rows",),
    axis_types=(AxisType.Auto,),
    devices=jax.local_devices()[:1],
  )
