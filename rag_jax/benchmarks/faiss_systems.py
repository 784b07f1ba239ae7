"""FAISS's indexes, to compare with ours where FAISS is installed.

In: passage embeddings. Out: indexes of FAISS (Douze et al. 2024,
arXiv:2401.08281), each with its search settings. This is the only module that
imports `faiss`, and only when it is used. Searches use one thread per CPU.
"""

from collections.abc import Callable, Iterator
import dataclasses
import importlib
import importlib.util
import math
import time
from typing import Any

from absl import logging
from jaxtyping import Float, Int
import numpy as np

from rag_jax.retrieval.recall import index_recall_at_k
from rag_jax.retrieval.recall import mean_recall
from rag_jax.retrieval.resources import num_cpus

_LEAST_PASSAGES = 256  # fewer are not worth clustering
_PROBES = (1 / 128, 1 / 64, 1 / 32, 1 / 16, 1 / 8)  # shares of the lists
_EF = (16, 32, 64, 128, 256)  # candidates that HNSW keeps
_DEPTHS = (4, 8, 16)  # candidates that are rescored, times k


def faiss_problem() -> str:
  """Returns why FAISS cannot be used here, or ""."""
  if importlib.util.find_spec("faiss") is None:
    return "the package faiss is not installed (`pip install faiss-cpu`)"
  try:
    _module()
  except (ImportError, OSError) as e:  # OSError: its library cannot be loaded
    return f"the package faiss cannot be imported ({e})"
  return ""


def _module() -> Any:
  """Returns the package `faiss`, which has no type annotations."""
  return importlib.import_module("faiss")


@dataclasses.dataclass(slots=True, frozen=True, kw_only=True)
class FaissIndex:
  """An index of FAISS.

  Attributes:
    family: its kind.
    name: how it was built.
    effort_name: FAISS's name of the search parameter that `efforts` are values
      of, such as nprobe.
    efforts: values to search with, rising; (0,) if there is no such parameter.
    most: the largest useful effort.
    depths: candidates that are rescored, times k; (0,) if none are.
    memory_bytes: of what FAISS would save.
  """

  family: str
  name: str
  effort_name: str
  efforts: tuple[int, ...]
  most: int
  depths: tuple[int, ...]
  build_secs: float
  memory_bytes: int
  inner: Any

  def search(
    self,
    questions: Float[np.ndarray, "B R"],
    k: int,
    effort: int,
    depth: int,
  ) -> Int[np.ndarray, "B K"]:
    """Returns ids, best first; -1 where FAISS found no more."""
    parameters = self._parameters(effort, depth)
    _, ids = self.inner.search(questions, k, params=parameters)
    return ids.astype(np.int32)

  def tuned_effort(
    self,
    questions: Float[np.ndarray, "B R"],
    exact_ids: Int[np.ndarray, "B K"],
    target_recall: float,
    depth: int,
  ) -> int:
    """Returns the least effort that reaches the target recall; 0 if none does.

    The low end of the recall's interval has to reach it, as in the tuner of
    ScaNN. A binary search, which assumes that recall rises with effort.
    """
    k = exact_ids.shape[1]

    def enough(effort: int) -> bool:
      found = self.search(questions, k, effort, depth)
      recall = mean_recall(index_recall_at_k(found, exact_ids, k), k)
      return recall.mean == 1.0 or recall.low >= target_recall

    return least_effort(enough, self.most)

  def describe(self, effort: int, depth: int) -> str:
    """Returns the settings of a search, as text."""
    parts = [self.name] if self.name else []
    parts += [f"{self.effort_name} {effort}"] if effort else []
    parts += [f"reorder {depth} x k"] if depth else []
    return ", ".join(parts)

  def _parameters(self, effort: int, depth: int) -> Any:
    if not effort:
      return None
    faiss = _module()
    if self.effort_name == "efSearch":
      return faiss.SearchParametersHNSW(efSearch=effort)
    lists = faiss.SearchParametersIVF(nprobe=effort)
    if not depth:
      return lists
    return faiss.IndexRefineSearchParameters(
      k_factor=float(depth), base_index_params=lists
    )


def least_effort(enough: Callable[[int], bool], most: int) -> int:
  """Returns nearly the least effort from 1 to `most` that is enough, or 0.

  It is at most a sixteenth above the least, if more effort is never worse. 0
  means that no effort is enough.
  """
  good = 1
  while not enough(good):
    if good == most:
      return 0
    good = min(2 * good, most)
  bad = good // 2
  while good - bad > max(1, good // 16):
    middle = (bad + good) // 2
    good, bad = (middle, bad) if enough(middle) else (good, middle)
  return good


def build_faiss(embeddings: Float[np.ndarray, "P R"]) -> Iterator[FaissIndex]:
  """Yields FAISS's indexes over passage embeddings, row = passage id.

  Flat; IVF; IVF with product quantisation ("fast scan"), with 4 bits per two
  dimensions as in ScaNN, and rescoring in float32; HNSW. For fewer than 256
  passages only the flat index.
  """
  faiss = _module()
  faiss.omp_set_num_threads(num_cpus())
  embeddings = np.ascontiguousarray(embeddings, np.float32)
  rows = len(embeddings)
  yield _build("FAISS flat", "", "Flat", embeddings)
  if rows < _LEAST_PASSAGES:
    logging.info("%d passages: of FAISS, only the flat index.", rows)
    return
  lists = [math.isqrt(rows), 4 * math.isqrt(rows)]
  lists = [n for n in lists if 16 * n <= rows]  # FAISS recommends 39 per list
  for n in lists:
    yield _build("FAISS IVF", f"{n} lists", f"IVF{n},Flat", embeddings, n)
    yield build_ivf_pq(embeddings, n)
  yield _build("FAISS HNSW", "M 32", "HNSW32", embeddings)


def build_ivf_pq(
  embeddings: Float[np.ndarray, "P R"], num_lists: int
) -> FaissIndex:
  """Returns IVF with codes of 4 bits per two dimensions, and rescoring."""
  dim = embeddings.shape[1]
  blocks = dim // 2 if dim % 2 == 0 else dim
  name = f"{num_lists} lists, PQ{blocks}x4fs"
  factory = f"IVF{num_lists},PQ{blocks}x4fs,RFlat"
  return _build("FAISS IVF-PQ", name, factory, embeddings, num_lists)


def _build(
  family: str,
  name: str,
  factory: str,
  embeddings: np.ndarray,
  num_lists: int = 0,
) -> FaissIndex:
  faiss = _module()
  logging.info("Building %s (%s).", family, factory)
  rows, dim = embeddings.shape
  start = time.perf_counter()
  inner = faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
  inner.train(embeddings)
  inner.add(embeddings)
  secs = time.perf_counter() - start
  efforts, effort_name, most = (0,), "", 0
  if num_lists:
    efforts = tuple(sorted({max(1, int(num_lists * p)) for p in _PROBES}))
    effort_name, most = "nprobe", num_lists
  elif family == "FAISS HNSW":
    efforts, effort_name, most = _EF, "efSearch", rows
  return FaissIndex(
    family=family,
    name=name,
    effort_name=effort_name,
    efforts=efforts,
    most=most,
    depths=_DEPTHS if "RFlat" in factory else (0,),
    build_secs=secs,
    memory_bytes=_size(inner),
    inner=inner,
  )


def _size(inner: Any) -> int:
  """Returns the size of the index as FAISS would save it, in bytes."""
  size = 0

  def count(data: bytes) -> None:
    nonlocal size
    size += len(data)

  faiss = _module()
  faiss.write_index(inner, faiss.PyCallbackIOWriter(count))
  return size
