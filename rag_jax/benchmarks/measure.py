"""Measures several retrieval systems on the same questions.

In: `System`s, and the known answers and passages of the questions. Out: recall,
ranking metrics and questions per second of each system.
"""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

from absl import logging
from jaxtyping import Int
import numpy as np

from rag_jax.benchmarks.systems import System
from rag_jax.evaluation.judged_questions import Known
from rag_jax.evaluation.judged_questions import Mean
from rag_jax.evaluation.judged_questions import QuestionMetrics
from rag_jax.evaluation.judged_questions import without_own
from rag_jax.processes import from_first
from rag_jax.retrieval.recall import Recall
from rag_jax.retrieval.recall import index_recall_at_k
from rag_jax.retrieval.recall import mean_recall
from rag_jax.retrieval.resources import queries_per_second

INDEX_DEPTHS = (1, 10, 100)  # of index_recall
BATCHES = (1, 256)  # questions searched for at a time, when timed
SPEED_K = 10  # passages per question, when timed
_BLOCK = 256  # questions searched for at a time, when not


@dataclasses.dataclass(slots=True, frozen=True, kw_only=True)
class Measured:
  """The measurements of one system.

  Attributes:
    index_recalls: against exact search; () for a search of words.
    metrics: by name, such as "answer_recall@5"; {} without known answers.
    speeds: batch size -> questions per second of each round.
  """

  family: str
  settings: str
  index_recalls: tuple[Recall, ...]
  metrics: Mapping[str, Mean]
  speeds: Mapping[int, tuple[float, ...]]
  build_secs: float | None
  memory_bytes: int

  def recall(self, k: int) -> Recall | None:
    """Returns index_recall@k, if it was measured."""
    return next((r for r in self.index_recalls if r.k == k), None)

  def speed(self, batch_size: int) -> float:
    """Returns questions per second, the median of all rounds."""
    return float(np.median(self.speeds[batch_size]))


def measure(
  systems: Sequence[System],
  exact_ids: Int[np.ndarray, "B K"],
  known: Known | None = None,
  *,
  notes: list[str] | None = None,
  rounds: int = 3,
  speed_secs: float = 0.3,
) -> list[Measured]:
  """Returns the measurements of each system, in their order.

  Each system is timed once per round, and every other round reverses the order:
  other load of the machine then affects all systems alike. All processes of a
  pod call it, each with the systems that it has, and the same other arguments.

  Args:
    systems: all of the same passages and questions.
    exact_ids: results of exact search, down to the depth of the deepest
      index_recall, or all passages.
    known: answers and passages of the questions; None measures only
      index_recall and speed.
    notes: receives a line on how often a question itself was found.
    rounds: of timing.
    speed_secs: of timing per system, round and batch size.

  Raises:
    ValueError: there is nothing to measure, or a number is out of range.
  """
  num_questions, most = exact_ids.shape
  if not systems or not num_questions or rounds < 1 or speed_secs <= 0:
    raise ValueError(
      f"{len(systems)} systems were to be measured with {num_questions}"
      f" questions, in {rounds} rounds of {speed_secs} s each; expected at"
      " least one of each and a time above 0. Change them."
    )
  judge = QuestionMetrics(known) if known else None
  rows = np.arange(num_questions)
  found: list[tuple[tuple[Recall, ...], dict[str, Mean]]] = []
  for number, system in enumerate(systems, start=1):
    recalls, metrics = (), {}
    deep = _search(system, rows, most)
    if system.by_embeddings:
      recalls = _index_recalls(system, rows, exact_ids, deep)
    if judge and known and len(known.own):
      # One more, since the question's own passage is removed.
      more = _search(system, rows, min(most + 1, known.num_passages))
      judged, dropped = without_own(more, known.own, most)
      metrics = judge(judged)
      if notes is not None:
        notes.append(
          f"{system.family} {system.settings}: a question's own passage was"
          f" removed from the results of {dropped:,} of {num_questions:,}"
          " questions."
        )
    elif judge:
      metrics = judge(deep)
    found.append((recalls, metrics))
    logging.info(
      "Recall of %d of %d systems: %s %s: %s", number, len(systems),
      system.family, system.settings, ", ".join(f"@{r.k} {r}" for r in recalls),
    )  # fmt: skip
  speeds = _speeds(systems, rows, min(SPEED_K, most), rounds, speed_secs)
  return [
    Measured(
      family=system.family,
      settings=system.settings,
      index_recalls=recalls,
      metrics=metrics,
      speeds={size: tuple(values) for size, values in timed.items()},
      build_secs=system.build_secs,
      memory_bytes=system.memory_bytes,
    )
    for system, (recalls, metrics), timed in zip(
      systems, found, speeds, strict=True
    )
  ]


def _index_recalls(
  system: System,
  rows: np.ndarray,
  exact_ids: np.ndarray,
  deep: np.ndarray,  # what it found when it was asked for the most
) -> tuple[Recall, ...]:
  most = exact_ids.shape[1]
  recalls = []
  # A search each: the first 10 of 100 are not what a search for 10 finds.
  for k in sorted({min(k, most) for k in INDEX_DEPTHS}):
    ids = deep if k == most else _search(system, rows, k)
    recalls.append(mean_recall(index_recall_at_k(ids, exact_ids, k), k))
  return tuple(recalls)


def _speeds(
  systems: Sequence[System],
  rows: np.ndarray,
  k: int,
  rounds: int,
  speed_secs: float,
) -> list[dict[int, list[float]]]:
  speeds: list[dict[int, list[float]]] = [
    {size: [] for size in BATCHES} for _ in systems
  ]
  for number in range(rounds):
    logging.info("Timing, round %d of %d.", number + 1, rounds)
    order = range(len(systems))
    for place in order if number % 2 == 0 else reversed(order):
      for size in BATCHES:
        system = systems[place]
        # So that all processes search equally often.
        agree = from_first if system.collective else int
        speed = queries_per_second(system, rows, k, size, speed_secs, agree)
        speeds[place][size].append(speed)
  return speeds


def _search(system: System, rows: np.ndarray, k: int) -> Any:
  return np.concatenate(
    [
      system.search(rows[i : i + _BLOCK], k)
      for i in range(0, len(rows), _BLOCK)
    ]
  )
