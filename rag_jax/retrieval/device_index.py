"""An index of kind "device": the accelerators search, the host asks.

In: passage embeddings. Out: for each question the passages that the devices
found, and a directory that holds the embeddings.
"""

from typing import Any

from etils import epath
import jax
from jax.sharding import AxisType
from jax.sharding import Mesh
from jaxtyping import Float, Int
import numpy as np

from rag_jax import artifacts
from rag_jax.config import IndexConfig
from rag_jax.retrieval import device
from rag_jax.retrieval import exact
from rag_jax.retrieval.embeddings import save_embeddings

_BLOCK_QUESTIONS = 256  # searched for at a time
_SETTINGS = ("storage", "recall_target", "chunk_passages")


_search = jax.jit(device.search_device, static_argnames="n_docs")
_gather = jax.jit(device.gather_embeddings)


def settings_of(config: IndexConfig) -> dict[str, Any]:
  """Returns the settings that `device.place_arrays` takes."""
  return {s: getattr(config, f"device_{s}") for s in _SETTINGS}


class DeviceIndex:
  """`device.DeviceArrays` as an index that the host searches. Row = passage id.

  The passages that the devices find are ranked by their exact scores, so a
  recall below 1 (of a recall target, of stored numbers that are rounded) is all
  that differs from `ExactIndex`. A train step uses `arrays`.
  """

  def __init__(
    self,
    inner: exact.ExactIndex,
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
    self.kind = "device"
    self.embeddings = inner.embeddings
    self.num_passages = inner.num_passages
    self.embedding_dim = inner.embedding_dim
    self.encoder_fingerprint = inner.encoder_fingerprint
    self.passages_fingerprint = inner.passages_fingerprint
    self.settings = settings
    self.arrays = device.place_arrays(
      inner.embeddings[:], mesh or _one_device(), **settings
    )
    on_devices = sum(x.nbytes for x in jax.tree.leaves(self.arrays))
    self.memory_bytes = inner.memory_bytes + on_devices
    self.certificate: Any = None  # see certificate.py
    self.build_cost: Any = None
    self._exact = inner

  @classmethod
  def build(
    cls,
    embeddings: Float[np.ndarray, "P R"],
    config: IndexConfig,
    *,
    encoder_fingerprint: str,
    passages_fingerprint: str,
    mesh: Mesh | None = None,
  ) -> "DeviceIndex":
    """Returns an index of embeddings in float32, which are kept."""
    inner = exact.ExactIndex(
      embeddings,
      encoder_fingerprint=encoder_fingerprint,
      passages_fingerprint=passages_fingerprint,
    )
    return cls(inner, settings_of(config), mesh)

  def search(
    self, question_embeddings: Float[np.ndarray, "B R"], n_docs: int
  ) -> tuple[Int[np.ndarray, "B K"], Float[np.ndarray, "B K"]]:
    """Finds the passages with the largest inner product.

    Arguments, results and errors as in `ExactIndex.search`; the scores are
    exact, whatever the devices hold.
    """
    questions = exact.check_search(self, question_embeddings, n_docs)
    ids = np.zeros((len(questions), n_docs), np.int32)
    for start in range(0, len(questions), _BLOCK_QUESTIONS):
      block = questions[start : start + _BLOCK_QUESTIONS]
      # Filled up to a power of two: few shapes to compile programs for.
      filled = np.zeros((1 << (len(block) - 1).bit_length(), block.shape[1]))
      filled[: len(block)] = block
      found, _ = _search(self.arrays, np.float32(filled), n_docs=n_docs)
      ids[start : start + len(block)] = np.asarray(found)[: len(block)]
    return exact.rank(questions, self.embeddings, ids)

  def save(self, path: epath.PathLike) -> None:
    """Writes the index to directory `path`, its manifest last."""
    path = artifacts.start_directory(path)
    save_embeddings(path, self.embeddings)
    exact.write_index_manifest(self, path, self.settings)

  @classmethod
  def load(
    cls,
    path: epath.PathLike,
    content: dict[str, Any],
    mesh: Mesh | None = None,
  ) -> "DeviceIndex":
    """Opens what `save` wrote, and copies it to the devices.

    Args:
      path: the directory.
      content: of its manifest, once that was checked (`index.load_index`).
      mesh: over which devices, not those that it was saved from; None: one
        of this process.

    Raises:
      ValueError: the files do not fit together.
    """
    settings = content["settings"]
    if (
      set(settings) != set(_SETTINGS)
      or settings["storage"] not in device.STORAGES
    ):
      raise ValueError(
        f"{path} says that it is an index of kind 'device', but its settings"
        f" {settings} are not {', '.join(_SETTINGS)}, with a storage of"
        f" {sorted(device.STORAGES)}. {exact.REMEDY}"
      )
    return cls(exact.ExactIndex.load(path, content), settings, mesh)


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
    self.kind = "device"
    self.arrays = arrays
    self.embeddings = DeviceRows(arrays)
    self.num_passages, self.embedding_dim = self.embeddings.shape
    self.encoder_fingerprint = ""
    self.passages_fingerprint = passages_fingerprint
    self.settings = settings
    self.memory_bytes = sum(x.nbytes for x in jax.tree.leaves(arrays))
    self.certificate: Any = None
    self.build_cost: Any = None


class DeviceRows:
  """The embeddings of `DeviceArrays`, of which the host copies what it reads.

  In float32, rounded as they are stored.
  """

  def __init__(self, arrays: device.DeviceArrays):
    self._arrays = arrays
    self.dtype = np.dtype(np.float32)
    self.shape = (arrays.num_passages, arrays.embeddings.shape[1])
    self.ndim = 2
    self.nbytes = 4 * self.shape[0] * self.shape[1]

  def __len__(self) -> int:
    return self.shape[0]

  def __getitem__(self, rows: Any) -> np.ndarray:
    """Returns the rows that a slice or an array of numbers names."""
    if isinstance(rows, slice):
      rows = np.arange(*rows.indices(len(self)))
    rows = np.asarray(rows, np.int32)
    # Filled up to a power of two: few shapes to compile programs for.
    filled = np.zeros((1, 1 << max(rows.size - 1, 0).bit_length()), np.int32)
    filled[0, : rows.size] = rows.reshape(-1)
    found = np.asarray(_gather(self._arrays, filled))[0, : rows.size]
    return found.reshape(*rows.shape, self.shape[1])


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
