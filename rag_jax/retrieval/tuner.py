"""Finds the fastest ScaNN index that reaches a recall.

In: passage embeddings, question embeddings, a target recall. Out: the index,
its settings, and a table of all settings that were tried. ScaNN is built a few
times; on each build all settings are swept that need no new build.
"""

from collections.abc import Callable
import dataclasses
import math
import time
from typing import Any

from absl import logging
from jaxtyping import Float, Int, Shaped
import numpy as np

from rag_jax.config import IndexConfig
from rag_jax.retrieval import scann
from rag_jax.retrieval.index import build_index
from rag_jax.retrieval.recall import Recall
from rag_jax.retrieval.recall import index_recall_at_k
from rag_jax.retrieval.recall import mean_recall
from rag_jax.retrieval.resources import num_cpus
from rag_jax.retrieval.resources import queries_per_second
from rag_jax.retrieval.sharded import exact_search

_REORDER_FACTORS = (32, 16, 8, 4, 2, 1)  # k times this many are scored again
_BISECT_TO = 0.1  # relative accuracy of the number of leaves to search
_FINALISTS = 3  # per build; they are timed again, together with the best so far
_COLUMNS = (
  "num_leaves", "leaves_to_search", "reorder", "reorder_dtype",
  "pca_dims", "dims_per_block", "anisotropic_threshold", "soar_lambda",
  "soar_overretrieve",
)  # fmt: skip


@dataclasses.dataclass(slots=True, frozen=True, kw_only=True)
class TunerSettings:
  """How long the tuner runs, and which settings it tries."""

  # No build starts that would exceed this, if it took as long as the last one.
  # The first build is always made. So is a search that scores all passages, if
  # nothing else reaches the target.
  budget_secs: float = 600.0
  batch_size: int = 256  # questions per search, when speed is measured
  speed_secs: float = 0.1  # how long each setting is timed
  repeats: int = 5  # how often the fastest settings are timed again
  seed: int = 0  # draws the questions that are held out
  # The share of the questions that measure the final choice. Of the others,
  # which decide, two thirds tune and a third checks the fastest settings.
  held_out: float = 0.5
  # Values to try in place of those of the config, one after the other.
  pca_shares: tuple[float, ...] = (0.5, 0.4, 0.67, 0.0)  # of the dimensions
  soar_lambdas: tuple[float, ...] = (1.5, 0.5, 0.0)
  reorder_dtypes: tuple[str, ...] = ("int8", "bfloat16", "float32")
  dims_per_block: tuple[int, ...] = (4, 1, 2)
  anisotropic_thresholds: tuple[float, ...] = (0.0, 0.1, 0.2)


@dataclasses.dataclass(slots=True, kw_only=True)
class Trial:
  """One combination of settings and its measurements."""

  settings: dict[str, Any]  # as in `ScannIndex.settings`
  recall: Recall  # on the tuning questions
  checked: Recall | None = None  # on the check questions, if fast enough
  queries_per_second: float  # the best of all measurements
  memory_bytes: int
  build_secs: float  # of the build, which several trials share

  def reaches(self, target_recall: float) -> bool:
    """Returns whether the recall reaches the target with confidence.

    The low end of the interval has to reach it, and the mean on the check
    questions. Among many settings near the target, those whose mean alone
    reaches it may just be lucky with the tuning questions.
    """
    if self.checked is not None and self.checked.mean < target_recall:
      return False
    return self.recall.mean == 1.0 or self.recall.low >= target_recall


@dataclasses.dataclass(slots=True, frozen=True, kw_only=True)
class TunerResult:
  """The chosen settings, their recall, and all other trials."""

  target_recall: float
  k: int
  batch_size: int
  trials: tuple[Trial, ...]
  chosen: Trial  # the fastest that reaches the target, else the best recall
  held_out: Recall  # of the chosen settings, on the held-out questions
  num_tuning: int  # number of questions that decided
  index: scann.ScannIndex  # the index with the chosen settings
  config: IndexConfig  # the config that builds it
  held_out_questions: np.ndarray  # [B, R], to certify the index with

  @property
  def reached(self) -> bool:
    """Whether the target was reached, on the held-out questions as well."""
    good = self.chosen.reaches(self.target_recall)
    return good and self.held_out.mean >= self.target_recall

  @property
  def frontier(self) -> tuple[Trial, ...]:
    """The Pareto frontier of recall and speed, fastest first.

    It includes the chosen trial.
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
      "bytes per passage",
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


def tune(
  embeddings: Shaped[np.ndarray, "..."],
  sample_questions: Float[np.ndarray, "B R"],
  *,
  target_recall: float,
  k: int,
  config: IndexConfig,
  settings: TunerSettings | None = None,
) -> TunerResult:
  """Finds the fastest ScaNN settings that reach an index_recall_at_k.

  It starts with the settings of `config`, changes them one after the other, and
  keeps each change that is faster: principal components, leaves, SOAR, the type
  and the codes of the embeddings. Some questions decide, the others measure the
  choice (`TunerSettings.held_out`). The resulting index has no fingerprints.

  Args:
    embeddings: [P, R], row = passage id; they are not copied.
    sample_questions: embeddings of questions like those to be asked.
    target_recall: the recall to reach, above 0, at most 1.
    k: the number of passages that are read per question.
    config: the settings to start from.
    settings: how long to run, and what to try.

  Raises:
    ValueError: ScaNN is not installed, there are fewer than three questions,
      they do not fit the passages, or a number is out of range.
  """
  scann.check_import()
  settings = settings or TunerSettings()
  _check(target_recall, k, len(embeddings), len(sample_questions))
  start = dataclasses.replace(
    config,
    kind="scann",
    scann_tree_passages=0,
    scann_num_leaves=config.scann_num_leaves or math.isqrt(len(embeddings)),
    scann_leaves_to_search=0,
  )
  every = dataclasses.replace(start, scann_tree_passages=len(embeddings) + 1)

  def build(chosen: IndexConfig) -> scann.ScannIndex:
    index = build_index(
      embeddings, chosen, encoder_fingerprint="", passages_fingerprint=""
    )
    assert isinstance(index, scann.ScannIndex)
    return index

  began = time.perf_counter()
  index = build(start)
  search = _Search(index, sample_questions, target_recall, k, settings)
  took = search.sweep(index)

  def attempt(best: IndexConfig, **changes: Any) -> IndexConfig:
    """Returns the changed config if its index is better; if not, `best`."""
    nonlocal took
    used = time.perf_counter() - began
    if used + took > settings.budget_secs:
      if took < math.inf:  # the first time
        logging.info("The tuner ends: it has used %.0f s of its budget.", used)
      took = math.inf
      return best
    changed = dataclasses.replace(best, **changes)
    if not changed.scann_soar_lambda:
      changed.scann_soar_overretrieve = 0.0
    before = search.best
    took = search.sweep(build(changed))
    return best if search.best is before else changed

  _improve(start, settings, attempt, *embeddings.shape)
  if index.settings["num_leaves"] and (
    not search.reached
    or time.perf_counter() - began + took <= settings.budget_secs
  ):
    search.sweep(build(every))
  return search.result(config)


class _Search:
  """All trials so far, and the best one with its index."""

  def __init__(
    self,
    index: scann.ScannIndex,
    questions: np.ndarray,
    target_recall: float,
    k: int,
    settings: TunerSettings,
  ):
    self._target, self._k, self._settings = target_recall, k, settings
    order = np.random.default_rng(settings.seed).permutation(len(questions))
    truth, _ = exact_search(index, questions, k)
    deciding = len(order) - max(int(settings.held_out * len(order)), 1)
    tuning_and_check, held_out = np.split(order, [deciding])
    tuning, check = np.split(
      tuning_and_check, [max(round(deciding * 2 / 3), 1)]
    )
    self._num_tuning = len(tuning) + len(check)
    self._questions, self._truth = questions[tuning], truth[tuning]
    self._check = questions[check], truth[check]
    self._held_out = questions[held_out], truth[held_out]
    self.trials: list[Trial] = []
    self.best: Trial | None = None
    self._best_index = index

  @property
  def reached(self) -> bool:
    """Whether the best trial reaches the target."""
    return self.best is not None and self.best.reaches(self._target)

  def sweep(self, index: scann.ScannIndex) -> float:
    """Tries search settings on one build; returns the seconds of both."""
    start = time.perf_counter()
    build_secs = index.build_cost.secs if index.build_cost else 0.0
    tried: list[tuple[Trial, scann.ScannIndex]] = []

    def measure(leaves: int, reorder: int) -> bool:
      searched = index
      if index.settings["num_leaves"]:
        searched = index.with_search_settings(
          leaves_to_search=leaves, reorder=reorder
        )
      trial = Trial(
        settings=searched.settings,
        recall=self._recall(searched, self._questions, self._truth),
        queries_per_second=self._speed(searched),
        memory_bytes=searched.memory_bytes,
        build_secs=build_secs,
      )
      tried.append((trial, searched))
      return trial.reaches(self._target)

    self._sweep_settings(index, measure)
    self.trials += [trial for trial, _ in tried]
    self._update_best(tried)
    assert self.best is not None, "each sweep tries something"
    secs = build_secs + time.perf_counter() - start
    logging.info(
      "Tuner: %d settings tried, %.1f s for the last build %s. Best: recall %s,"
      " %.0f questions/s, %s.",
      *(len(self.trials), secs, index.settings, self.best.recall),
      *(self.best.queries_per_second, self.best.settings),
    )
    return secs

  def result(self, config: IndexConfig) -> TunerResult:
    """Returns the best trial, measured on the held-out questions."""
    assert self.best is not None, "call sweep first"
    index = self._best_index
    questions, truth = self._held_out
    return TunerResult(
      target_recall=self._target,
      k=self._k,
      batch_size=self._settings.batch_size,
      trials=tuple(self.trials),
      chosen=self.best,
      held_out=self._recall(index, questions, truth),
      num_tuning=self._num_tuning,
      index=index,
      config=_config_of(index, config),
      held_out_questions=questions,
    )

  def _sweep_settings(
    self, index: scann.ScannIndex, measure: Callable[[int, int], bool]
  ) -> None:
    """Finds the fewest leaves that reach the target, per reordering depth."""
    leaves = index.settings["num_leaves"]
    if not leaves:
      measure(0, 0)
      return
    fewest = 1
    for factor in _REORDER_FACTORS:
      reorder = min(factor * self._k, index.num_passages)
      good = fewest
      while not measure(good, reorder):
        if good == leaves:
          return  # with less reordering the recall is no better
        good = min(2 * good, leaves)
      bad = max(good // 2, fewest - 1)
      while good - bad > max(1, _BISECT_TO * good):
        middle = (bad + good) // 2
        if measure(middle, reorder):
          good = middle
        else:
          bad = middle
      fewest = good

  def _update_best(self, tried: list[tuple[Trial, scann.ScannIndex]]) -> None:
    """Sets `best` to the fastest trial that reaches the target.

    The best so far and the new trials are timed again in turn, because the
    machine may have been busy before. The best of all measurements counts.
    """

    def key(entry: tuple[Trial, scann.ScannIndex]) -> tuple[bool, float]:
      return _rank(entry[0], self._target)

    entries = sorted(tried, key=key, reverse=True)
    passed = 0
    for trial, index in entries:
      if not trial.reaches(self._target) or passed == _FINALISTS:
        break
      trial.checked = self._recall(index, *self._check)
      passed += trial.reaches(self._target)
    entries = sorted(entries, key=key, reverse=True)[:_FINALISTS]
    if self.best is not None:
      entries.append((self.best, self._best_index))
    for _ in range(self._settings.repeats):
      for trial, index in entries:
        trial.queries_per_second = max(
          trial.queries_per_second, self._speed(index)
        )
    self.best, self._best_index = max(entries, key=key)

  def _recall(
    self,
    index: scann.ScannIndex,
    questions: np.ndarray,
    truth: Int[np.ndarray, "B K"],
  ) -> Recall:
    size = self._settings.batch_size
    found = [
      index.search(questions[i : i + size], self._k)[0]
      for i in range(0, len(questions), size)
    ]
    recalls = index_recall_at_k(np.concatenate(found), truth, self._k)
    return mean_recall(recalls, self._k)

  def _speed(self, index: scann.ScannIndex) -> float:
    size, secs = self._settings.batch_size, self._settings.speed_secs
    return queries_per_second(index, self._questions, self._k, size, secs)


def _improve(
  start: IndexConfig,
  settings: TunerSettings,
  attempt: Callable[..., IndexConfig],
  num_passages: int,
  embedding_dim: int,
) -> None:
  """Changes one setting at a time and keeps every change that is better.

  Args:
    start: the first config, which was tried already.
    settings: the values to try.
    attempt: (config, changes) -> the changed config if it is better; if not,
      the same config.
    num_passages: P.
    embedding_dim: R.
  """
  best = start
  for share in settings.pca_shares:
    pca_dims = int(share * embedding_dim)
    if pca_dims != start.scann_pca_dims:
      best = attempt(best, scann_pca_dims=pca_dims)
  before = best
  for factor in (2.0, 0.5):
    leaves = start.scann_num_leaves
    while 1 <= int(leaves * factor) <= num_passages:
      leaves = int(leaves * factor)
      changed = attempt(best, scann_num_leaves=leaves)
      if changed is best:
        break
      best = changed
    if best is not before:
      break  # more leaves were better, so fewer are not
  for name, values in (
    ("scann_soar_lambda", settings.soar_lambdas),
    ("scann_reorder_dtype", settings.reorder_dtypes),
    ("scann_dims_per_block", settings.dims_per_block),
    ("scann_anisotropic_threshold", settings.anisotropic_thresholds),
  ):
    tried = getattr(best, name)
    for value in values:
      if value != tried:
        best = attempt(best, **{name: value})


def _check(
  target_recall: float, k: int, num_passages: int, num_questions: int
) -> None:
  """Raises `ValueError` if an argument of `tune` is out of range."""
  if not 0.0 < target_recall <= 1.0:
    raise ValueError(
      f"target_recall={target_recall}; expected a number above 0, at most 1,"
      " such as 0.95: the share of the exact top k to find. Change it."
    )
  if num_questions < 3:
    raise ValueError(
      f"The sample to tune with has {num_questions} questions; expected at"
      " least 3, better 1000, because half of them are held out. Pass more."
    )
  if not 1 <= k <= num_passages:
    raise ValueError(
      f"k={k} passages per question; expected 1 to {num_passages}, the number"
      " of passages. Change k."
    )


def _rank(trial: Trial, target_recall: float) -> tuple[bool, float]:
  """Returns a sort key that is larger for the better of two trials."""
  reaches = trial.reaches(target_recall)
  return reaches, trial.queries_per_second if reaches else trial.recall.mean


def _config_of(index: scann.ScannIndex, config: IndexConfig) -> IndexConfig:
  """Returns the config that builds an index with the settings of `index`."""
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
