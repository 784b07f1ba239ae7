"""Measures the cost of an index as the corpus grows: building, memory, latency.

In: files of embeddings of several sizes, embeddings of questions. Out: for each
size and kind of index, the cost of building it and the speed of its search.
Each is built in a separate process, to measure its own peak memory.
"""

from collections.abc import Callable, Sequence
import dataclasses
import math
import multiprocessing
import os
import tempfile
from typing import Any

from absl import logging
from etils import epath
from jaxtyping import Int
import numpy as np

from rag_jax.benchmarks import faiss_systems
from rag_jax.benchmarks.machine import describe_machine
from rag_jax.benchmarks.run import open_embeddings
from rag_jax.config import IndexConfig
from rag_jax.retrieval import scann
from rag_jax.retrieval.exact import ExactIndex
from rag_jax.retrieval.index import build_index
from rag_jax.retrieval.index import build_index_directory
from rag_jax.retrieval.index import load_index
from rag_jax.retrieval.recall import Recall
from rag_jax.retrieval.recall import index_recall_at_k
from rag_jax.retrieval.recall import mean_recall
from rag_jax.retrieval.resources import BuildCost
from rag_jax.retrieval.resources import BuildMeter
from rag_jax.retrieval.resources import queries_per_second
from rag_jax.retrieval.sharded import ShardedIndex

K = 10  # passages per question
BATCHES = (1, 256)  # questions at a time
_REORDER = (80, 160, 320, 640)  # candidates that ScaNN rescores
_SEED = 0  # of the choice of tuning questions


@dataclasses.dataclass(slots=True, frozen=True, kw_only=True)
class GrowthSettings:
  """How the indexes of each size are built and measured."""

  target_recall: float = 0.99  # index_recall@10 that each search is tuned to
  max_questions: int = 500  # to measure with, and as many again to tune with
  passages_per_shard: int = 100_000  # of the index in shards
  speed_secs: float = 2.0  # of timing, per batch size


@dataclasses.dataclass(slots=True, frozen=True, kw_only=True)
class Grown:
  """The measurements of one kind of index at one size.

  Attributes:
    system: its kind.
    settings: as text.
    num_passages: P.
    embeddings_bytes: size of the file that it is built from.
    build_secs: time to build it.
    peak_bytes: peak memory of the process during the build, including mapped
      files, less its memory before; None where the system does not report it.
    memory_bytes: memory that a search uses, as the index reports it.
    recall: index_recall@10 on questions that were not used for tuning.
    speeds: batch size -> questions per second.
  """

  system: str
  settings: str
  num_passages: int
  embeddings_bytes: int
  build_secs: float
  peak_bytes: int | None
  memory_bytes: int
  recall: Recall
  speeds: dict[int, float]


@dataclasses.dataclass(slots=True, frozen=True, kw_only=True)
class Growth:
  """The measurements of all sizes, and their inputs."""

  inputs: list[str]  # files
  embedding_dim: int
  num_questions: int  # that were measured
  target_recall: float
  rows: tuple[Grown, ...]
  machine: dict[str, Any]
  notes: tuple[str, ...]


@dataclasses.dataclass(slots=True, frozen=True)
class _Work:
  """The inputs of a process that builds an index."""

  path: str  # of the embeddings
  questions: np.ndarray  # [B, R], the first half tunes the search
  truth: Int[np.ndarray, "B K"]
  settings: GrowthSettings


def benchmark_growth(
  embeddings: Sequence[epath.PathLike],
  question_embeddings: epath.PathLike,
  settings: GrowthSettings,
) -> Growth:
  """Builds and measures indexes of each file, smallest first.

  These are exact search of the file itself, ScaNN, ScaNN in shards if there is
  more than one, and FAISS's IVF-PQ if it is installed. Each search is tuned to
  the least effort that reaches the target on half of the questions; the other
  half is measured.

  Args:
    embeddings: .npy files in float32, [P, R], which stay on the disk.
    question_embeddings: .npy of questions, [B, R].
    settings: how to build and measure.

  Raises:
    FileNotFoundError: one of the files is not there.
    ValueError: one of them cannot be used, or two have the same size.
  """
  load = os.getloadavg()[0]
  questions = open_embeddings(question_embeddings)
  files = sorted((len(open_embeddings(p)), os.fspath(p)) for p in embeddings)
  _check(files, question_embeddings, settings)
  order = np.random.default_rng(_SEED).permutation(len(questions))
  chosen = np.array(questions[order[: 2 * settings.max_questions]])
  notes: list[str] = []
  kinds = _kinds(notes)
  rows: list[Grown] = []
  for num_passages, path in files:
    logging.info("Exact search of %d passages, to compare with.", num_passages)
    exact = ExactIndex(
      open_embeddings(path), encoder_fingerprint="", passages_fingerprint=""
    )
    work = _Work(path, chosen, exact.search(chosen, K)[0], settings)
    for measure in kinds:
      if measure is _shards and num_passages <= settings.passages_per_shard:
        continue
      # Spawned: a fork would inherit the memory of this process, and its locks.
      with multiprocessing.get_context("spawn").Pool(1) as pool:
        rows.append(pool.apply(measure, (work,)))
      logging.info("%s", rows[-1])
  return Growth(
    inputs=[*(path for _, path in files), os.fspath(question_embeddings)],
    embedding_dim=chosen.shape[1],
    num_questions=len(chosen) - len(chosen) // 2,
    target_recall=settings.target_recall,
    rows=tuple(rows),
    machine=describe_machine(load),
    notes=tuple(notes),
  )


def _check(
  files: Sequence[tuple[int, str]],
  question_embeddings: epath.PathLike,
  settings: GrowthSettings,
) -> None:
  """Raises `ValueError` if the files do not fit together."""
  shapes = [open_embeddings(p).shape for _, p in files]
  asked = open_embeddings(question_embeddings).shape
  sizes = [rows for rows, _ in shapes]
  if {dim for _, dim in shapes} != {asked[1]}:
    raise ValueError(
      f"The embeddings have the shapes {shapes}, the questions {asked};"
      " expected the same last number. Take all from one encoder."
    )
  if len(set(sizes)) < len(sizes) or min(sizes) < K or asked[0] < 2:
    raise ValueError(
      f"There are files of {sizes} passages and {asked[0]} questions; expected"
      f" files of different sizes, of {K} passages or more, and at least two"
      " questions, since half of them set the search. Change the files."
    )
  if settings.max_questions < 1 or settings.passages_per_shard < 1:
    raise ValueError(
      f"max_questions={settings.max_questions} and passages_per_shard="
      f"{settings.passages_per_shard}; expected at least 1 of each. Raise them."
    )


def _kinds(notes: list[str]) -> list[Callable[[_Work], Grown]]:
  """Returns the functions that measure each kind of index available here."""
  kinds: list[Callable[[_Work], Grown]] = [_exact]
  if problem := scann.import_problem():
    notes.append(f"ScaNN is left out: {problem}.")
  else:
    kinds += [_scann, _shards]
  if problem := faiss_systems.faiss_problem():
    notes.append(f"FAISS is left out: {problem}.")
  else:
    kinds.append(_faiss)
  return kinds


def _exact(work: _Work) -> Grown:
  embeddings = open_embeddings(work.path)
  meter = BuildMeter()
  index = build_index(
    embeddings,
    IndexConfig(kind="exact"),
    encoder_fingerprint="",
    passages_fingerprint="",
  )
  cost = meter.cost()
  return _measure(work, "exact", "", index, cost)


def _scann(work: _Work) -> Grown:
  embeddings = open_embeddings(work.path)
  meter = BuildMeter()
  index = build_index(
    embeddings,
    _config(embeddings.shape),
    encoder_fingerprint="",
    passages_fingerprint="",
  )
  cost = meter.cost()
  return _measure_scann(work, "ScaNN", [index], cost)


def _shards(work: _Work) -> Grown:
  embeddings = open_embeddings(work.path)
  per_shard = work.settings.passages_per_shard
  config = dataclasses.replace(
    _config((per_shard, embeddings.shape[1])), passages_per_shard=per_shard
  )
  with tempfile.TemporaryDirectory() as folder:
    meter = BuildMeter()
    build_index_directory(
      folder,
      embeddings,
      config,
      encoder_fingerprint="",
      passages_fingerprint="",
    )
    cost = meter.cost()  # the shards are built one after the other
    index = load_index(folder)
    assert isinstance(index, ShardedIndex)
    return _measure_scann(work, "ScaNN, shards", index.shards, cost)


def _faiss(work: _Work) -> Grown:
  embeddings = open_embeddings(work.path)
  meter = BuildMeter()
  built = faiss_systems.build_ivf_pq(embeddings, math.isqrt(len(embeddings)))
  cost = meter.cost()

  def index(lists: int, depth: int) -> _Faiss:
    return _Faiss(built, lists, depth)

  lists, depth = _least(work, index, built.most, built.depths)
  found, words = index(lists, depth), built.describe(lists, depth)
  return _measure(work, built.family, words, found, cost)


@dataclasses.dataclass(slots=True, frozen=True)
class _Faiss:
  """FAISS's index, searched as ours are."""

  built: faiss_systems.FaissIndex
  lists: int
  depth: int

  @property
  def memory_bytes(self) -> int:
    """Size of the index, as FAISS reports it."""
    return self.built.memory_bytes

  def search(self, questions: np.ndarray, k: int) -> tuple[np.ndarray, None]:
    """Returns ids, and an empty array of scores."""
    return self.built.search(questions, k, self.lists, self.depth), None


def _config(shape: tuple[int, ...]) -> IndexConfig:
  """Returns ScaNN's settings: half of the principal components, and a tree."""
  return IndexConfig(
    kind="scann",
    scann_tree_passages=0,
    scann_num_leaves=math.isqrt(shape[0]),
    scann_pca_dims=shape[1] // 2,
  )


def _measure_scann(
  work: _Work, name: str, shards: Sequence[Any], cost: BuildCost
) -> Grown:
  """Measures ScaNN in one or more shards."""
  most = max(shard.settings["num_leaves"] for shard in shards)

  def index(leaves: int, reorder: int) -> Any:
    changed = [
      shard.with_search_settings(
        leaves_to_search=min(leaves, shard.settings["num_leaves"]),
        reorder=reorder,
      )
      for shard in shards
    ]
    return ShardedIndex(changed) if len(changed) > 1 else changed[0]

  leaves, reorder = _least(work, index, most, _REORDER)
  words = f"{leaves} of {most} leaves, reorder {reorder}"
  words += f", PCA {shards[0].settings['pca_dims']}"
  if len(shards) > 1:
    words = f"{len(shards)} shards, in each {words}"
  return _measure(work, name, words, index(leaves, reorder), cost)


def _least(
  work: _Work,
  index: Callable[[int, int], Any],
  most: int,
  depths: Sequence[int],
) -> tuple[int, int]:
  """Returns effort and depth of the fastest search that reaches the target.

  If none does, those with the highest recall.

  Args:
    work: the first half of its questions is used.
    index: returns the index for an effort and a depth.
    most: the largest effort.
    depths: numbers of candidates that are rescored.
  """
  half, target = len(work.questions) // 2, work.settings.target_recall
  questions, truth = work.questions[:half], work.truth[:half]
  best, choice = 0.0, (most, depths[-1])
  for depth in depths:

    def enough(effort: int, depth: int = depth) -> bool:
      found, _ = index(effort, depth).search(questions, K)
      recall = mean_recall(index_recall_at_k(found, truth, K), K)
      return recall.mean == 1.0 or recall.low >= target

    effort = faiss_systems.least_effort(enough, most)
    if not effort:
      continue
    speed = queries_per_second(
      index(effort, depth), questions, K, BATCHES[-1], work.settings.speed_secs
    )
    if speed > best:
      best, choice = speed, (effort, depth)
  return choice


def _measure(
  work: _Work,
  system: str,
  settings: str,
  index: Any,
  cost: BuildCost,
) -> Grown:
  """Returns recall and speed on the questions that were not used for tuning."""
  half = len(work.questions) // 2
  questions, truth = work.questions[half:], work.truth[half:]
  found, _ = index.search(questions, K)
  return Grown(
    system=system,
    settings=settings,
    num_passages=len(open_embeddings(work.path)),
    embeddings_bytes=open_embeddings(work.path).nbytes,
    build_secs=cost.secs,
    peak_bytes=cost.peak_bytes,
    memory_bytes=index.memory_bytes,
    recall=mean_recall(index_recall_at_k(found, truth, K), K),
    speeds={
      size: queries_per_second(
        index, questions, K, size, work.settings.speed_secs
      )
      for size in BATCHES
    },
  )
