"""Systems of retrieval, measured side by side on the same questions.

In: `System`s, and what is known of the questions. Out: of each its recalls, how
high it ranks what is of use, and questions a second.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import math
from typing import Any

from absl import logging
from jaxtyping import Float, Int
import numpy as np

from rag_jax.evaluation import gold
from rag_jax.evaluation.benchmark_systems import System
from rag_jax.evaluation.retrieval import contains_answer
from rag_jax.retrieval.cost import queries_per_second
from rag_jax.retrieval.intervals import mean_interval
from rag_jax.retrieval.recall import Recall
from rag_jax.retrieval.recall import index_recall_at_k
from rag_jax.retrieval.recall import mean_recall

INDEX_DEPTHS = (1, 10, 100)  # of index_recall
DEPTHS = (1, 5, 20, 100)  # of answer_recall and gold_recall
BATCHES = (1, 256)  # questions searched for at a time, when timed
SPEED_K = 10  # passages a question, when timed
_BLOCK = 256  # questions searched for at a time, when not


@dataclasses.dataclass(slots=True, frozen=True, kw_only=True)
class Mean:
  """Of one number a question, with its 95% interval."""

  mean: float
  low: float
  high: float

  def __str__(self) -> str:
    """Returns the numbers as a table shows them."""
    return f"{self.mean:.3f} ({self.low:.3f} to {self.high:.3f})"


@dataclasses.dataclass(slots=True, frozen=True, kw_only=True)
class Measured:
  """What was measured of one system.

  Attributes:
    index_recalls: against exact search; () for a search of words.
    metrics: by name, such as "answer_recall@5"; {} without known answers.
    speeds: questions a second of each round, by questions at a time.
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
    """Returns questions a second, the median of all rounds."""
    return float(np.median(self.speeds[batch_size]))


@dataclasses.dataclass(slots=True, frozen=True)
class Known:
  """What is known of the questions that are measured.

  Attributes:
    answers: of each; () where they are not known.
    gold: row of a passage -> grade, of each; {} where it is not known.
    text_of: of a passage, by its row: title and text.
  """

  answers: Sequence[Sequence[str]]
  gold: Sequence[Mapping[int, int]]
  text_of: Callable[[int], str]

  def relevant(self, number: int, rows: Sequence[int]) -> list[bool]:
    """Returns which passages are of use for a question.

    Those with a grade above 0; if none are known, those with an answer.
    """
    grades = self.gold[number]
    if any(grade > 0 for grade in grades.values()):
      return [grades.get(row, 0) > 0 for row in rows]
    answers = self.answers[number]
    return [contains_answer(self.text_of(row), answers) for row in rows]


class QuestionMetrics:
  """Judges rankings of the same questions, one system after the other.

  Whether a passage holds an answer of a question is found out once.
  """

  def __init__(self, known: Known):
    self._known = known
    self._with_answers = [i for i, a in enumerate(known.answers) if a]
    self._with_gold = [
      i
      for i, grades in enumerate(known.gold)
      if max(grades.values(), default=0) > 0
    ]
    self._text_of = functools.lru_cache(maxsize=4096)(known.text_of)
    self._seen: dict[tuple[int, int], bool] = {}

  def __call__(self, ids: Int[np.ndarray, "B K"]) -> dict[str, Mean]:
    """Returns the means over the questions that can be judged.

    Args:
      ids: best first, -1 where nothing was found.
    """
    depths = sorted({min(k, ids.shape[1]) for k in DEPTHS})
    values: dict[str, np.ndarray] = {}
    if self._with_answers:
      first = np.array([self._first(i, ids[i]) for i in self._with_answers])
      for k in depths:
        values[f"answer_recall@{k}"] = (first < k).astype(np.float64)
    if self._with_gold:
      ranked = ids[self._with_gold]
      grades = [self._known.gold[i] for i in self._with_gold]
      for k in depths:
        values[f"gold_recall@{k}"] = gold.recall_at_k(ranked, grades, k)
      values["MRR@10"] = gold.mrr_at_10(ranked, grades)
      values["nDCG@10"] = gold.ndcg_at_10(ranked, grades)
    return {name: _mean(numbers) for name, numbers in values.items()}

  def _first(self, number: int, rows: Int[np.ndarray, "K"]) -> float:
    """Returns the place of the first passage with an answer, from 0."""
    for place, row in enumerate(rows.tolist()):
      if row >= 0 and self._holds(number, row):
        return float(place)
    return math.inf

  def _holds(self, number: int, row: int) -> bool:
    key = (number, row)
    if key not in self._seen:
      self._seen[key] = contains_answer(
        self._text_of(row), self._known.answers[number]
      )
    return self._seen[key]


def measure(
  systems: Sequence[System],
  exact_ids: Int[np.ndarray, "B K"],
  known: Known | None = None,
  *,
  rounds: int = 3,
  speed_secs: float = 0.3,
) -> list[Measured]:
  """Returns what was measured of each system, in their order.

  Each system is timed once a round, and the next round goes through them the
  other way round: what else the machine does then hits all alike.

  Args:
    systems: all of the same passages and questions.
    exact_ids: what exact search finds, for as many as the deepest index_recall
      or all passages.
    known: of the questions; None: index_recall and speed are all.
    rounds: of timing.
    speed_secs: for which each system is timed in a round, at each batch size.

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
    if judge:
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
        speed = queries_per_second(systems[place], rows, k, size, speed_secs)
        speeds[place][size].append(speed)
  return speeds


def _search(system: System, rows: np.ndarray, k: int) -> Any:
  return np.concatenate(
    [
      system.search(rows[i : i + _BLOCK], k)
      for i in range(0, len(rows), _BLOCK)
    ]
  )


def _mean(values: Float[np.ndarray, "B"]) -> Mean:
  low, high = mean_interval(values)
  return Mean(mean=float(np.mean(values)), low=low, high=high)
