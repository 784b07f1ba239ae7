"""An index of kind "device": the accelerators search, the host calls them.

In: passage embeddings. Out: per question the passages that the devices found,
and a directory that holds the embeddings.
"""

from collections.abc import Sequence
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
from rag_jax.retrieval.device_refresh import with_norms
from rag_jax.retrieval.embeddings import Rows
from rag_jax.retrieval.exact import ExactIndex
from rag_jax.retrieval.exact import rank
from rag_jax.retrieval.index_core import REMEDY
from rag_jax.retrieval.index_core import Found
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

  The passages that the devices find are ranked by exact scores. So the only
  difference from `ExactIndex` is a recall below 1, from a recall target or from
  rounded embeddings. A train step uses `arrays`.
  """

  def __init__(
    self, inner: ExactIndex, settings: dict[str, Any], mesh: Mesh | None = None
  ):
    """Copies the embeddings of `inner` to the devices.

    Args:
      inner: keeps the embeddings in float32 on the host.
      settings: the settings of `device.place_arrays`.
      mesh: the devices; None for one device of this process. With several, do
        not search in a thread while another program runs on them. If they are
        of several processes, these make the same calls.
    """
    self.arrays = device.place_arrays(
      inner.embeddings[:], mesh or rows_mesh(), **settings
    )
    super().__init__(
      dataclasses.replace(inner.info, kind="device", settings=settings),
      inner.embeddings,
      inner.memory_bytes + _num_bytes(self.arrays),
    )
    self.collective = self.arrays.mesh.is_multi_process

  def search(
    self, question_embeddings: Float[np.ndarray, "B R"], n_docs: int
  ) -> Found:
    """Returns passages that the devices found; see `Index.search`."""
    questions = check_search(self.info, question_embeddings, n_docs)
    ids = np.zeros((len(questions), n_docs), np.int32)
    for start in range(0, len(questions), _BLOCK_QUESTIONS):
      block = questions[start : start + _BLOCK_QUESTIONS]
      # Padded to a power of two, so that few programs are compiled. Not with
      # zeros, for which all passages are equal: that takes a second search.
      padding = (1 << (len(block) - 1).bit_length()) - len(block)
      filled = np.pad(block, ((0, padding), (0, 0)), mode="edge")
      found, _ = _search(self.arrays, np.float32(filled), n_docs=n_docs)
      ids[start : start + len(block)] = np.asarray(found)[: len(block)]
    return rank(questions, self.embeddings, ids)

  @classmethod
  def load(
    cls, path: epath.PathLike, info: IndexInfo, mesh: Mesh | None = None
  ) -> "DeviceIndex":
    """Opens what `save` wrote, and copies it to the devices.

    Args:
      path: the directory.
      info: its manifest, which `index.load_index` has checked.
      mesh: as in the constructor; the saved index may have had another.

    Raises:
      ValueError: the files do not fit together.
    """
    settings = info.settings
    if (
      set(settings) != set(_SETTINGS)
      or settings["storage"] not in device.STORAGES
    ):
      raise ValueError(
        f"The manifest of {path} names the kind 'device', but its settings"
        f" {settings} are not {', '.join(_SETTINGS)}, with a storage of"
        f" {sorted(device.STORAGES)}. {REMEDY}"
      )
    return cls(ExactIndex.load(path, info), settings, mesh)


class RefreshedIndex(DeviceIndex):
  """Lets the host search the arrays of a train step, between two steps.

  The rows were embedded by the weights of several steps, so the index has no
  encoder fingerprint. It must not be used after the next step has started: that
  step takes over (donates) the arrays. All processes have to make the same
  calls.
  """

  collective = True

  def __init__(
    self,
    arrays: device.DeviceArrays,
    settings: dict[str, Any],
    *,
    passages_fingerprint: str,
  ):
    """Takes the arrays; nothing is copied."""
    self.arrays = with_norms(arrays)  # those of a checkpoint have none
    embeddings = DeviceRows(arrays)
    info = IndexInfo(
      kind="device",
      num_passages=arrays.num_passages,
      embedding_dim=embeddings.shape[1],
      encoder_fingerprint="",
      passages_fingerprint=passages_fingerprint,
      settings=settings,
    )
    Index.__init__(self, info, embeddings, _num_bytes(self.arrays))


class DeviceRows(Rows):
  """The embeddings of `DeviceArrays` as they are stored, in float32.

  Only the rows that are read are copied to the host.
  """

  def __init__(self, arrays: device.DeviceArrays):
    self._arrays = arrays
    shape = arrays.num_passages, arrays.embeddings.shape[1]
    super().__init__(shape, 4 * shape[0] * shape[1])

  def _take(self, numbers: Int[np.ndarray, "*N"]) -> np.ndarray:
    # Padded to a power of two, so that few programs are compiled.
    size = numbers.size
    filled = np.zeros((1, 1 << max(size - 1, 0).bit_length()), np.int32)
    filled[0, :size] = numbers.reshape(-1)
    found = np.asarray(_gather(self._arrays, filled))[0, :size]
    return found.reshape(*numbers.shape, self.shape[1])


def _num_bytes(arrays: device.DeviceArrays) -> int:
  return sum(x.nbytes for x in jax.tree.leaves(arrays))


def rows_mesh(devices: Sequence[Any] = ()) -> Mesh:
  """Returns a mesh over which rows are split.

  Args:
    devices: in any order; (): one of this process. Only one, because a thread
      may search while a train step runs on all devices: two programs that both
      wait for all devices could wait for each other.
  """
  devices = devices or jax.local_devices()[:1]
  return jax.make_mesh(
    (len(devices),),
    ("rows",),
    axis_types=(AxisType.Auto,),
    devices=devices,
  )
