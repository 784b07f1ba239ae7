"""What the tuner tried, which of it nothing else beats, and what it chose.

In: settings of ScaNN, each with what was measured of it. Out: the frontier of
recall against speed, as a table.
"""

import dataclasses
from typing import Any

import numpy as np

from rag_jax.config import IndexConfig
from rag_jax.retrieval import scann
from rag_jax.retrieval.cost import num_cpus
from rag_jax.retrieval.recall import Recall

_COLUMNS = (
  "num_leaves", "leaves_to_search", "reorder", "reorder_dtype",
  "pca_dims", "dims_per_block", "anisotropic_threshold", "soar_lambda",
  "soar_overretrieve",
)  # fmt: skip


@dataclasses.dataclass(slots=True, kw_only=True)
class Trial:
  """One setting, and what was measured of it."""

  settings: dict[str, Any]  # as in `ScannIndex.settings`
  recall: Recall  # on the questions that are tuned on
  checked: Recall | None = None  # on a few others, if it was fast enough
  queries_per_second: float  # the best of all times that it was timed
  memory_bytes: int
  build_secs: float  # of the build that it shares with others

  def reaches(self, target_recall: float) -> bool:
    """Returns whether its recall is surely not below the target.

    The low end of the interval counts, and the mean on other questions: of
    many settings near the target, the fastest by their mean alone are those
    that were lucky with these questions.
    """
    if self.checked is not None and self.checked.mean < target_recall:
      return False
    return self.recall.mean == 1.0 or self.recall.low >= target_recall


@dataclasses.dataclass(slots=True, frozen=True, kw_only=True)
class TunerResult:
  """What was chosen, what it finds, and what else was tried."""

  target_recall: float
  k: int
  batch_size: int
  trials: tuple[Trial, ...]
  chosen: Trial  # the fastest that reaches the target; if none, the best recall
  held_out: Recall  # of the chosen one, on questions that nothing was tuned on
  num_tuning: int  # questions that decided
  index: scann.ScannIndex  # the chosen one, built
  config: IndexConfig  # that builds it
  held_out_questions: np.ndarray  # [B, R], to certify the index with

  @property
  def reached(self) -> bool:
    """Whether the target was reached, also on the held-out questions."""
    good = self.chosen.reaches(self.target_recall)
    return good and self.held_out.mean >= self.target_recall

  @property
  def frontier(self) -> tuple[Trial, ...]:
    """The trials that none beats both in recall and in speed, fastest first.

    And the chosen one.
    """
    best, frontier = -1.0, []
    for trial in sorted(
      self.trials, key=lambda t: (-t.queries_per_second, -t.recall.mean)
    ):
      if trial.recall.mean > best or trial is self.chosen:
        frontier.append(trial)
        best = max(best, trial.recall.mean)
    return tuple(frontier)

  def table(self) -> str:
    """Returns the frontier and the choice as Markdown."""
    names = [name.replace("_", " ") for name in _COLUMNS]
    head = [
      f"index_recall@{self.k} (95% interval)",
      "questions/s",
      "bytes a passage",
      *names,
      f"reaches {self.target_recall:g}",
    ]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for trial in self.frontier:
      each = trial.memory_bytes / self.index.num_passages
      reaches = "yes" if trial.reaches(self.target_recall) else "no"
      if trial.checked is not None and reaches == "no":
        reaches += f": {trial.checked.mean:.4f} when checked"
      cells = [
        str(trial.recall),
        f"{trial.queries_per_second:,.0f}",
        f"{each:,.0f}",
        *(f"{trial.settings[name] or '-'}" for name in _COLUMNS),
        reaches + (", chosen" if trial is self.chosen else ""),
      ]
      lines.append(f"| {' | '.join(cells)} |")
    verdict = "reached" if self.reached else "NOT reached"
    return (
      "\n".join(lines)
      + f"\n\n{len(self.trials)} settings were tried on {self.num_tuning:,}"
      f" questions, {self.batch_size} at a time, {num_cpus()} CPUs. The chosen"
      f" one on {len(self.held_out_questions):,} others: index_recall@{self.k}"
      f" {self.held_out}; {self.target_recall:g} is {verdict}.\n"
    )


def rank(trial: Trial, target_recall: float) -> tuple[bool, float]:
  """Returns what is larger for the better of two trials."""
  reaches = trial.reaches(target_recall)
  return reaches, trial.queries_per_second if reaches else trial.recall.mean


def config_of(index: scann.ScannIndex, config: IndexConfig) -> IndexConfig:
  """Returns `config` with the settings of `index`."""
  changes: dict[str, Any] = {
    f"scann_{name}": index.settings[name] for name in _COLUMNS
  }
  tree = min(config.scann_tree_passages, index.num_passages)
  if not index.settings["num_leaves"]:
    changes = {}
    tree = max(config.scann_tree_passages, index.num_passages + 1)
  return dataclasses.replace(
    config, kind="scann", scann_tree_passages=tree, **changes
  )
