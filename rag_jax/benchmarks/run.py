"""Runs a retrieval benchmark on a search directory or on embeddings.

In: a directory of tools/build_index.py with questions, or only embeddings.
Out: the `Benchmark`. Nothing is written.

All processes of a pod call these functions. They embed a share of the
questions, and search exactly for it; what they measure, systems.py says. The
first process returns all measurements, the others what they have.
"""

from collections.abc import Sequence
import dataclasses
import os
from typing import Any

from absl import logging
from etils import epath
import jax
from jaxtyping import Float
import numpy as np

from rag_jax import artifacts
from rag_jax.benchmarks.machine import describe_machine
from rag_jax.benchmarks.measure import BATCHES
from rag_jax.benchmarks.measure import INDEX_DEPTHS
from rag_jax.benchmarks.measure import SPEED_K
from rag_jax.benchmarks.measure import measure
from rag_jax.benchmarks.report import Benchmark
from rag_jax.benchmarks.systems import Sample
from rag_jax.benchmarks.systems import Workload
from rag_jax.benchmarks.systems import build_systems
from rag_jax.benchmarks.systems import needs_tuning
from rag_jax.config import RerankConfig
from rag_jax.config_rules import check_choice
from rag_jax.corpus.passages import Passages
from rag_jax.corpus.twins import Twins
from rag_jax.evaluation.answers import VARIANTS
from rag_jax.evaluation.judged_questions import JudgedQuestion
from rag_jax.evaluation.judged_questions import Known
from rag_jax.evaluation.judged_questions import gold_rows
from rag_jax.evaluation.judged_questions import read_judged_questions
from rag_jax.evaluation.regex_answers import REGEX
from rag_jax.evaluation.regex_answers import check_patterns
from rag_jax.processes import share
from rag_jax.retrieval.exact import ExactIndex
from rag_jax.search.directory import OpenedDirectory
from rag_jax.search.reranker import open_reranker

_SEED = 0  # of the split into tuning and measured questions


@dataclasses.dataclass(slots=True, frozen=True, kw_only=True)
class BenchmarkSettings:
  """The systems to measure, and how long."""

  systems: tuple[str, ...]  # of systems.SYSTEMS and systems.RERANKED
  max_questions: int = 1000  # to measure with, and as many again to tune with
  target_recall: float = 0.99  # index_recall@10 that systems are tuned to
  tune_secs: float = 120.0  # time limit of ScaNN's tuner
  rounds: int = 3  # of timing
  speed_secs: float = 0.3  # of timing, per system, batch size and round
  # Remove the passage with the question's own id from the results, if questions
  # are themselves documents, as in BEIR's ArguAna and Quora.
  drop_own_id: bool = False
  answers: str = "multilingual"  # how they are found in text; of VARIANTS
  # The cross-encoder of systems.RERANKED; without init_from, there is none.
  rerank: RerankConfig = dataclasses.field(default_factory=RerankConfig)


def benchmark_directory(
  index: epath.PathLike,
  questions: epath.PathLike,
  settings: BenchmarkSettings,
) -> Benchmark:
  """Measures on a directory that tools/build_index.py made.

  If a system needs tuning, half of the questions are used for it, and the other
  half is measured.

  Args:
    index: the directory.
    questions: a file or folder, as `read_judged_questions` reads them.
    settings: of the benchmark.

  Raises:
    FileNotFoundError: one of them is not there.
    ValueError: one of them cannot be used.
  """
  load = os.getloadavg()[0]
  asked = read_judged_questions(questions)
  if problem := check_choice("answers", settings.answers, VARIANTS):
    raise ValueError(problem)
  if settings.answers == REGEX:
    for question in asked:
      where = f"{questions}: question {question.id!r}"
      check_patterns(question.answers, where)
  reranker = open_reranker(settings.rerank)
  directory = OpenedDirectory(index)
  measured, tuning = _split(len(asked), settings)
  chosen = [asked[row] for row in (*measured, *tuning)]
  logging.info("Embedding %d questions.", len(chosen))
  texts = [question.question for question in chosen]
  vectors = share(texts, lambda some: directory.embed_questions(some).tolist())
  embeddings = np.array(vectors, np.float32)
  notes: list[str] = []
  known = _known(
    chosen, directory.passages, directory.version.twins, notes, settings
  )
  num = len(measured)
  bm25_bytes = 0
  if directory.bm25 is not None:
    bm25_bytes = artifacts.directory_bytes(directory.version.bm25_path)

  def relevant(number: int, rows: Sequence[int]) -> list[bool]:
    return known.relevant(num + number, rows)

  workload = Workload(
    embeddings=np.asarray(directory.index.embeddings[:], np.float32),
    measured=Sample(embeddings[:num], texts[:num]),
    tuning=Sample(embeddings[num:], texts[num:]),
    relevant=relevant if any(known.answers) or any(known.gold) else None,
    index=directory.index,
    bm25=directory.bm25,
    bm25_bytes=bm25_bytes,
    passages=directory.passages,
    reranker=reranker,
  )
  of_measured = dataclasses.replace(
    known,
    answers=known.answers[:num],
    gold=known.gold[:num],
    own=known.own[:num],
  )
  inputs = {"index": os.fspath(index), "questions": os.fspath(questions)}
  if reranker is not None:
    inputs["reranker"] = settings.rerank.init_from
    if num < max(BATCHES):
      notes.append(
        f"A cross-encoder reads equal pairs once, and there are {num}"
        f" questions: with {max(BATCHES)} different ones at a time it would be"
        " slower."
      )
  return _run(workload, of_measured, settings, inputs, notes, load)


def benchmark_embeddings(
  embeddings: epath.PathLike,
  question_embeddings: epath.PathLike,
  settings: BenchmarkSettings,
) -> Benchmark:
  """Measures indexes of embeddings alone: recall against speed and memory.

  Args:
    embeddings: .npy of the passages, [P, R].
    question_embeddings: .npy of questions, [B, R].
    settings: of the benchmark.

  Raises:
    FileNotFoundError: one of them is not there.
    ValueError: one of them cannot be used.
  """
  load = os.getloadavg()[0]
  passages = load_embeddings(embeddings)
  questions = load_embeddings(question_embeddings)
  if passages.shape[1] != questions.shape[1]:
    raise ValueError(
      f"{embeddings} has {passages.shape[1]} numbers per passage,"
      f" {question_embeddings} {questions.shape[1]} per question. Expected the"
      " same. Take both from one encoder."
    )
  measured, tuning = _split(len(questions), settings)
  workload = Workload(
    embeddings=passages,
    measured=Sample(questions[measured]),
    tuning=Sample(questions[tuning]),
  )
  inputs = {
    "embeddings": os.fspath(embeddings),
    "question_embeddings": os.fspath(question_embeddings),
  }
  return _run(workload, None, settings, inputs, [], load)


def load_embeddings(path: epath.PathLike) -> Float[np.ndarray, "P R"]:
  """Returns the embeddings of a .npy file in float32, in memory.

  Raises:
    FileNotFoundError: it is not there.
    ValueError: it holds no embeddings.
  """
  return np.array(open_embeddings(path), np.float32, order="C")


def open_embeddings(path: epath.PathLike) -> Float[np.ndarray, "P R"]:
  """Returns the embeddings of a .npy file, memory-mapped if in float32.

  Raises:
    FileNotFoundError: it is not there.
    ValueError: it holds no embeddings.
  """
  path = epath.Path(path).expanduser()
  remedy = "Expected a .npy of numbers, [passages or questions, embedding size]"
  if not path.exists():
    raise FileNotFoundError(f"There is no {path}. {remedy}. Correct the path.")
  try:
    array: Any = np.load(os.fspath(path), mmap_mode="r", allow_pickle=False)
  except (ValueError, EOFError, OSError) as error:
    raise ValueError(
      f"{path} cannot be read ({error}). {remedy}. Save it again with np.save."
    ) from error
  good = isinstance(array, np.ndarray) and array.ndim == 2 and array.size
  if not good or not np.issubdtype(array.dtype, np.floating):
    kind = getattr(array, "dtype", type(array).__name__)
    raise ValueError(
      f"{path} holds {kind} of shape {getattr(array, 'shape', '?')}. {remedy},"
      " at least one row. Save it again with np.save."
    )
  return np.ascontiguousarray(array, np.float32)


def _known(
  questions: Sequence[JudgedQuestion],
  passages: Passages,
  twins: Twins | None,
  notes: list[str],
  settings: BenchmarkSettings,
) -> Known:
  graded, missing = gold_rows(questions, passages, twins)
  if missing:
    notes.append(
      f"{missing:,} passages that are known to be of use are not in the corpus"
      " under their id; they count as not found."
    )
  for name, values in (
    ("answers", [question.answers for question in questions]),
    ("passages of use", graded),
  ):
    without = sum(not value for value in values)
    if without:
      notes.append(
        f"{without:,} of {len(questions):,} questions have no known {name} and"
        " are left out of what needs them."
      )

  def text_of(row: int) -> str:
    passage = passages[row]
    return f"{passage.title}\n{passage.text}"

  rows = [passages.row_of(question.id) for question in questions]
  own = [-1 if row is None else row for row in rows]
  same = len(rows) - rows.count(None)
  if settings.drop_own_id:
    notes.append(
      f"{same:,} of {len(rows):,} questions have the id of a passage, which is"
      " left out of what is found for them (--drop_own_id)."
    )
  elif same:
    notes.append(
      f"{same:,} of {len(rows):,} questions have an id that a passage has too."
      " If they are the same text, as in BEIR's ArguAna and Quora, measure with"
      " --drop_own_id."
    )
  return Known(
    [question.answers for question in questions],
    graded,
    text_of,
    own=own if settings.drop_own_id else (),
    num_passages=len(passages),
    variant=settings.answers,
  )


def _split(
  num_questions: int, settings: BenchmarkSettings
) -> tuple[np.ndarray, np.ndarray]:
  """Returns which questions are measured, and which tune; rising."""
  if settings.max_questions < 1:
    raise ValueError(
      f"max_questions={settings.max_questions}; expected at least 1, for"
      " instance 1000. Raise it."
    )
  order = np.random.default_rng(_SEED).permutation(num_questions)
  half = num_questions
  if needs_tuning(settings.systems):
    half = num_questions - num_questions // 2
  most = settings.max_questions
  return np.sort(order[:half][:most]), np.sort(order[half:][:most])


def _run(
  workload: Workload,
  known: Known | None,
  settings: BenchmarkSettings,
  inputs: dict[str, str],
  notes: list[str],
  load: float,
) -> Benchmark:
  exact = ExactIndex(
    workload.embeddings, encoder_fingerprint="", passages_fingerprint=""
  )
  rows, dim = workload.embeddings.shape
  logging.info("Exact search of %d passages, to compare with.", rows)
  questions, depth = workload.measured.embeddings, min(max(INDEX_DEPTHS), rows)

  def best(some: Sequence[int]) -> list[list[int]]:
    return exact.search(questions[list(some)], depth)[0].tolist()

  truth = np.array(share(range(len(questions)), best), np.int32)
  systems = build_systems(
    settings.systems,
    workload,
    target_recall=settings.target_recall,
    tune_secs=settings.tune_secs,
    k=SPEED_K,
    notes=notes,
  )
  if jax.process_count() > 1:
    notes.append(
      f"{jax.process_count()} hosts ran this. The device index is on the"
      f" {jax.device_count()} chips of all of them, which search together;"
      " every other system was measured on the first host alone. In training,"
      " each host searches such an index for its own questions."
    )
  measured = []
  if systems:
    measured = measure(
      systems,
      truth,
      known,
      notes=notes,
      rounds=settings.rounds,
      speed_secs=settings.speed_secs,
    )
  return Benchmark(
    inputs=inputs,
    num_passages=rows,
    embedding_dim=dim,
    num_questions=len(questions),
    num_tuning=len(workload.tuning.embeddings),
    rounds=settings.rounds,
    rows=tuple(measured),
    notes=tuple(notes),
    machine=describe_machine(load),
  )
