"""Builds the retrieval systems that a benchmark compares.

In: passage embeddings, a BM25 index and a reranker if there are, and questions.
Out: `System`s that return passages for the number of a question.

On a pod, the device index is searched by all processes together, on all chips.
The others are indexes of one host, which the first process has alone.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
import dataclasses
import functools
import time
from typing import Any

from absl import logging
import jax
from jax.sharding import Mesh
from jaxtyping import Float, Int
import numpy as np

from rag_jax.benchmarks import faiss_systems
from rag_jax.config import IndexConfig
from rag_jax.corpus.passages import Passages
from rag_jax.models.hybrid import HybridWeights
from rag_jax.processes import is_first
from rag_jax.retrieval import scann
from rag_jax.retrieval.bm25 import Bm25Index
from rag_jax.retrieval.device_index import rows_mesh
from rag_jax.retrieval.exact import ExactIndex
from rag_jax.retrieval.hybrid import HybridRetriever
from rag_jax.retrieval.hybrid import Rrf
from rag_jax.retrieval.hybrid import fit_weights
from rag_jax.retrieval.hybrid import label_log_likelihoods
from rag_jax.retrieval.index import Index
from rag_jax.retrieval.index import build_index
from rag_jax.retrieval.tuner import TunerSettings
from rag_jax.retrieval.tuner import tune
from rag_jax.search.reranker import Reranker

# "index" is the one in the directory, as it was built.
SYSTEMS = (
  "index", "exact", "scann", "tuned", "device", "bm25", "hybrid", "learned",
  "faiss",
)  # fmt: skip
# With a cross-encoder after exact search, and after that of both by ranks.
RERANKED = ("reranked", "hybrid_reranked")
_ALL = (*SYSTEMS, *RERANKED)
_OF_WORDS = ("bm25", "hybrid", "learned", "hybrid_reranked")
_TUNING = ("tuned", "learned")  # what needs questions of its own
_COLLECTIVE = ("device",)  # what all processes of a pod search together

# Of ScaNN's leaves, and candidates scored again.
_SCANN_SEARCHES = (
  (1 / 64, 50), (1 / 32, 100), (1 / 16, 100), (1 / 10, 100), (1 / 5, 200),
  (1 / 2, 400),
)  # fmt: skip

_Search = Callable[[Int[np.ndarray, "B"], int], Int[np.ndarray, "B K"]]


@dataclasses.dataclass(slots=True, frozen=True, kw_only=True)
class System:
  """A retrieval system to measure.

  Attributes:
    family: one line of the picture.
    settings: as text.
    search: (numbers of questions, k) -> passages [B, K], best first, -1 where
      none was found.
    by_embeddings: whether its results are compared with exact search.
    collective: whether all processes have to make the same searches.
  """

  family: str
  settings: str
  search: _Search
  by_embeddings: bool
  build_secs: float | None  # None: not built here
  memory_bytes: int
  collective: bool = False


@dataclasses.dataclass(slots=True, frozen=True)
class Sample:
  """Questions as embeddings, and as texts if there are any.

  Attributes:
    texts: () if there are only embeddings.
  """

  embeddings: Float[np.ndarray, "B R"]
  texts: Sequence[str] = ()


@dataclasses.dataclass(slots=True, frozen=True, kw_only=True)
class Workload:
  """The passages and questions that every system is measured on.

  Attributes:
    embeddings: of the passages, row = passage id; in memory.
    measured: questions that no system is tuned on.
    tuning: other questions, to tune systems with; may be empty.
    relevant: (number of a tuning question, passages) -> which are relevant.
    index: of the search directory, if one was given.
    bm25: of the same passages.
    bm25_bytes: its size.
    passages: their texts, for the reranker.
    reranker: the second stage; None: it is not measured.
  """

  embeddings: Float[np.ndarray, "P R"]
  measured: Sample
  tuning: Sample
  relevant: Callable[[int, Sequence[int]], list[bool]] | None = None
  index: Index | None = None
  bm25: Bm25Index | None = None
  bm25_bytes: int = 0
  passages: Passages | None = None
  reranker: Reranker | None = None


def needs_tuning(names: Collection[str]) -> bool:
  """Returns whether one of the systems needs tuning questions."""
  return bool(set(names) & set(_TUNING))


def build_systems(
  names: Collection[str],
  workload: Workload,
  *,
  target_recall: float,
  tune_secs: float,
  k: int,
  notes: list[str],
) -> list[System]:
  """Builds the systems to measure; of a host, in the first process alone.

  Args:
    names: of SYSTEMS and RERANKED.
    workload: the same for all systems.
    target_recall: index_recall_at_k that "tuned" and FAISS are tuned to.
    tune_secs: time limit of the tuner.
    k: passages per question that the tuner tunes for.
    notes: receives a line for each system that is left out or tuned.

  Raises:
    ValueError: one of `names` is no system, none can be measured, or there are
      no questions to tune with.
  """
  unknown = sorted(set(names) - set(_ALL))
  if unknown or not names:
    raise ValueError(
      f"systems={unknown or list(names)} cannot be measured; expected one or"
      f" more of {list(_ALL)}. Correct them."
    )
  if needs_tuning(names) and len(workload.tuning.embeddings) < 3:
    raise ValueError(
      f"{len(workload.tuning.embeddings)} questions are left to tune"
      f" {sorted(set(names) & set(_TUNING))} with; expected at least 3. Give"
      " more questions, or leave these systems out."
    )
  builder = _Builder(workload, target_recall, tune_secs, k, notes)
  systems: list[System] = []
  for name in [name for name in _ALL if name in names]:
    if name not in _COLLECTIVE and not is_first():
      continue
    problem = _problem(name, workload)
    if problem:
      notes.append(f"{name} is left out: {problem}.")
      logging.warning("%s", notes[-1])
      continue
    systems += getattr(builder, name)()
  if not systems and is_first():
    raise ValueError(
      f"None of the systems {sorted(names)} can be measured: {' '.join(notes)}"
      " Expected at least one. Choose others."
    )
  return systems


def _problem(name: str, workload: Workload) -> str:
  """Returns why a system cannot be measured here, or ""."""
  if name in _OF_WORDS and workload.bm25 is None:
    return "it searches words, and there are none, only embeddings"
  if name in RERANKED and (
    workload.reranker is None or workload.passages is None
  ):
    return "there is no cross-encoder, or there are only embeddings"
  if name == "learned" and workload.relevant is None:
    return "neither answers nor passages of use are known of the questions"
  if name == "index" and workload.index is None:
    return "there is no index, only embeddings"
  if name in ("scann", "tuned"):
    return scann.import_problem()
  return faiss_systems.faiss_problem() if name == "faiss" else ""


class _Builder:
  """Builds systems; a method for each of SYSTEMS and RERANKED."""

  def __init__(
    self,
    workload: Workload,
    target_recall: float,
    tune_secs: float,
    k: int,
    notes: list[str],
  ):
    self._workload, self._notes = workload, notes
    self._target, self._tune_secs = target_recall, tune_secs
    self._k = min(k, len(workload.embeddings))
    # With the fingerprint of BM25's passages, or a hybrid would refuse it.
    of = workload.bm25.passages_fingerprint if workload.bm25 else ""
    self._exact = ExactIndex(
      workload.embeddings, encoder_fingerprint="", passages_fingerprint=of
    )

  def index(self) -> Iterator[System]:
    index = self._workload.index
    assert index is not None
    secs = index.certificate.build_secs if index.certificate else None
    yield self._of_index("index as built", index, _settings(index), secs)

  def exact(self) -> Iterator[System]:
    yield self._of_index("exact", self._exact, "")

  def device(self) -> Iterator[System]:
    chips = jax.devices()  # of all processes
    index = self._build(IndexConfig(kind="device"), rows_mesh(chips))
    settings = _settings(index)
    if len(chips) > 1:
      settings += f", {len(chips)} chips of {jax.process_count()} hosts"
    yield self._of_index("device", index, settings, _secs(index))

  def scann(self) -> Iterator[System]:
    index = self._build(IndexConfig(kind="scann"))
    assert isinstance(index, scann.ScannIndex)
    leaves = index.settings["num_leaves"]
    if not leaves:
      yield self._of_index("ScaNN", index, _settings(index), _secs(index))
      return
    searches = [(max(1, int(leaves * p)), n) for p, n in _SCANN_SEARCHES]
    for leaves_to_search, reorder in dict.fromkeys(searches):
      searched = index.with_search_settings(
        leaves_to_search=leaves_to_search, reorder=reorder
      )
      settings = _settings(searched)
      yield self._of_index("ScaNN", searched, settings, _secs(index))

  def tuned(self) -> Iterator[System]:
    logging.info("Tuning ScaNN, for at most %.0f s.", self._tune_secs)
    start = time.perf_counter()
    result = tune(
      self._workload.embeddings,
      self._workload.tuning.embeddings,
      target_recall=self._target,
      k=self._k,
      config=IndexConfig(kind="scann"),
      # The measured questions show how good the choice is.
      settings=TunerSettings(budget_secs=self._tune_secs, held_out=0.1),
    )
    verdict = "reached" if result.reached else "NOT reached"
    self._notes.append(
      f"The tuner tried {len(result.trials)} settings of ScaNN in"
      f" {time.perf_counter() - start:.0f} s; index_recall@{self._k} of"
      f" {self._target:g} is {verdict} on the tuning questions that it held"
      f" out: {result.held_out}."
    )
    settings = _settings(result.index)
    secs = result.chosen.build_secs
    yield self._of_index("ScaNN, tuned", result.index, settings, secs)

  def bm25(self) -> Iterator[System]:
    bm25, texts = self._workload.bm25, self._workload.measured.texts
    assert bm25 is not None
    settings = f"k1 {bm25.settings.k1:g}, b {bm25.settings.b:g}"

    def search(rows: np.ndarray, k: int) -> np.ndarray:
      return bm25.search([texts[int(row)] for row in rows], k)[0]

    yield self._of_words("BM25", settings, search, self._workload.bm25_bytes)

  def hybrid(self) -> Iterator[System]:
    yield self._fused(Rrf(), f"reciprocal ranks, k {Rrf().k}")

  def learned(self) -> Iterator[System]:
    tuning, relevant = self._workload.tuning, self._workload.relevant
    assert self._workload.bm25 is not None
    assert relevant is not None
    hybrid = HybridRetriever(self._exact, self._workload.bm25, Rrf())
    found = hybrid.candidates(tuning.embeddings, tuning.texts)
    of_use = np.zeros(found.ids.shape, bool)
    for row, (ids, mask) in enumerate(zip(found.ids, found.mask, strict=True)):
      of_use[row, : mask.sum()] = relevant(row, ids[mask].tolist())
    weights = fit_weights(
      found.dense, found.bm25, label_log_likelihoods(of_use), found.mask
    )
    settings = f"learned: {weights.dense:.3g} dense + {weights.bm25:.3g} BM25"
    yield self._fused(weights, settings)

  def faiss(self) -> Iterator[System]:
    work = self._workload
    questions = work.measured.embeddings
    tuning = work.tuning.embeddings
    truth = self._exact.search(tuning, self._k)[0]
    for built in faiss_systems.build_faiss(work.embeddings):
      settings = {(e, d) for e in built.efforts for d in built.depths[1:2]}
      settings |= {(e, 0) for e in built.efforts if built.depths == (0,)}
      best: set[tuple[int, int]] = set()
      if len(tuning) and built.most:
        for depth in built.depths:
          effort = built.tuned_effort(tuning, truth, self._target, depth)
          best |= {(effort, depth)} if effort else set()
      for effort, depth in sorted(settings | best):
        mark = ", tuned" if (effort, depth) in best else ""
        yield System(
          family=built.family,
          settings=built.describe(effort, depth) + mark,
          search=functools.partial(
            _search_faiss, built, effort, depth, questions
          ),
          by_embeddings=True,
          build_secs=built.build_secs,
          memory_bytes=built.memory_bytes,
        )

  def reranked(self) -> Iterator[System]:
    (exact,) = self.exact()
    yield self._reranked(exact, "exact search")

  def hybrid_reranked(self) -> Iterator[System]:
    (hybrid,) = self.hybrid()
    yield self._reranked(hybrid, "hybrid search")

  def _reranked(self, first: System, name: str) -> System:
    reranker, passages = self._workload.reranker, self._workload.passages
    texts = self._workload.measured.texts
    assert reranker is not None
    assert passages is not None
    candidates = reranker.config.candidates

    def search(rows: np.ndarray, k: int) -> np.ndarray:
      found = first.search(rows, min(max(k, candidates), len(passages)))
      asked = [texts[int(row)] for row in rows]
      best, _ = reranker.rank(asked, found[:, :candidates], passages)
      return np.concatenate([best, found[:, candidates:]], axis=1)[:, :k]

    memory = first.memory_bytes + reranker.memory_bytes
    settings = f"{candidates} candidates of {name}"
    return self._of_words("cross-encoder", settings, search, memory)

  def _build(self, config: IndexConfig, mesh: Mesh | None = None) -> Index:
    logging.info("Building an index of kind %r.", config.kind)
    return build_index(
      self._workload.embeddings,
      config,
      encoder_fingerprint="",
      passages_fingerprint="",
      mesh=mesh,
    )

  def _of_index(
    self, family: str, index: Any, settings: str, secs: float | None = None
  ) -> System:
    questions = self._workload.measured.embeddings
    return System(
      family=family,
      settings=settings,
      search=lambda rows, k: index.search(questions[rows], k)[0],
      by_embeddings=True,
      build_secs=secs,
      memory_bytes=index.memory_bytes,
      collective=index.collective,
    )

  def _of_words(
    self, family: str, settings: str, search: _Search, memory: int
  ) -> System:
    return System(
      family=family,
      settings=settings,
      search=search,
      by_embeddings=False,
      build_secs=None,
      memory_bytes=memory,
    )

  def _fused(self, fusion: HybridWeights | Rrf, settings: str) -> System:
    work = self._workload
    assert work.bm25 is not None
    hybrid = HybridRetriever(self._exact, work.bm25, fusion)
    sample = work.measured

    def search(rows: np.ndarray, k: int) -> np.ndarray:
      texts = [sample.texts[int(row)] for row in rows]
      return hybrid.search(sample.embeddings[rows], texts, k)[0]

    memory = work.bm25_bytes + self._exact.memory_bytes
    return self._of_words("hybrid", settings, search, memory)


def _search_faiss(
  index: faiss_systems.FaissIndex,
  effort: int,
  depth: int,
  questions: np.ndarray,
  rows: np.ndarray,
  k: int,
) -> np.ndarray:
  return index.search(questions[rows], k, effort, depth)


def _secs(index: Index) -> float | None:
  return index.build_cost.secs if index.build_cost else None


def _settings(index: Index) -> str:
  """Returns an index's settings as text."""
  settings = index.settings
  if index.kind != "scann":
    return ", ".join(f"{name} {value}" for name, value in settings.items())
  if not settings["num_leaves"]:
    return "every passage is scored"
  parts = [
    f"{settings['leaves_to_search']} of {settings['num_leaves']} leaves",
    f"reorder {settings['reorder']} {settings['reorder_dtype']}",
    f"{settings['dims_per_block']} dims a code",
    f"T {settings['anisotropic_threshold']:g}",
  ]
  if settings["pca_dims"]:
    parts.append(f"PCA {settings['pca_dims']}")
  if settings["soar_lambda"]:
    parts.append(f"SOAR {settings['soar_lambda']:g}")
  return ", ".join(parts)
