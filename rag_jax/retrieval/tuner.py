"""The fastest ScaNN index that finds enough.

In: passage embeddings, embeddings of questions, a recall to reach. Out: the
index, its settings, and all that were tried for it, as a table. ScaNN is built
a few times; what can change without a build is swept on each.
"""

from collections.abc import Callable, Iterator
import dataclasses
import math
import time

from absl import logging
from jaxtyping import Float, Int, Shaped
import numpy as np

from rag_jax.config import IndexConfig
from rag_jax.retrieval import scann
from rag_jax.retrieval.certificate import exact_search
from rag_jax.retrieval.cost import queries_per_second
from rag_jax.retrieval.index import build_index
from rag_jax.retrieval.recall import Recall
from rag_jax.retrieval.recall import index_recall_at_k
from rag_jax.retrieval.recall import mean_recall
from rag_jax.retrieval.trials import Trial
from rag_jax.retrieval.trials import TunerResult
from rag_jax.retrieval.trials import config_of
from rag_jax.retrieval.trials import rank

_REORDER_FACTORS = (32, 16, 8, 4, 2, 1)  # candidates scored again, times k
_BISECT_TO = 0.1  # leaves to search are found this exactly, of their number
_FINALISTS = 3  # of each build, timed again beside the best so far


@dataclasses.dataclass(slots=True, frozen=True, kw_only=True)
class TunerSettings:
  """How long and how carefully is searched for the settings."""

  # No build is begun that would end later, if it took as long as the last. The
  # first is always made, and the search of all passages where nothing reaches
  # the target.
  budget_secs: float = 600.0
  batch_size: int = 256  # questions searched at once, when speed is measured
  speed_secs: float = 0.1  # for which each setting is timed
  repeats: int = 5  # times that the fastest are timed again
  seed: int = 0  # of which questions are held out
  # Of the questions, those that say what the choice is worth. The others
  # decide: two thirds tune, a third checks what came out first.
  held_out: float = 0.5
  # What is tried in place of the values of the config, one after the other.
  pca_shares: tuple[float, ...] = (0.5, 0.4, 0.67, 0.0)  # of the dimensions
  soar_lambdas: tuple[float, ...] = (1.5, 0.5, 0.0)
  reorder_dtypes: tuple[str, ...] = ("int8", "bfloat16", "float32")
  dims_per_block: tuple[int, ...] = (4, 1, 2)
  anisotropic_thresholds: tuple[float, ...] = (0.0, 0.1, 0.2)


def tune(
  embeddings: Shaped[np.ndarray, "..."],
  sample_questions: Float[np.ndarray, "B R"],
  *,
  target_recall: float,
  k: int,
  config: IndexConfig,
  settings: TunerSettings | None = None,
  encoder_fingerprint: str = "",
  passages_fingerprint: str = "",
) -> TunerResult:
  """Finds the fastest ScaNN settings whose index_recall_at_k is enough.

  Starts with the settings of `config` and changes one after the other, keeping
  what is faster: principal components, leaves, SOAR, the type and the codes of
  what is scored. Some questions decide, the others say what the choice is
  worth (`TunerSettings.held_out`).

  Args:
    embeddings: [P, R], row = passage id; kept, not copied.
    sample_questions: embeddings of questions like those to be asked.
    target_recall: to be reached, above 0, at most 1.
    k: passages that are read for a question.
    config: what the search starts from.
    settings: of this search.
    encoder_fingerprint: of the weights that embedded the passages.
    passages_fingerprint: of the passages.

  Raises:
    ValueError: ScaNN is not installed, there are fewer than three questions,
      or they do not fit the passages; or a number is out of range.
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
      embeddings,
      chosen,
      encoder_fingerprint=encoder_fingerprint,
      passages_fingerprint=passages_fingerprint,
    )
    assert isinstance(index, scann.ScannIndex)
    return index

  began = time.perf_counter()
  index = build(start)
  search = _Search(index, sample_questions, target_recall, k, settings)
  took = search.sweep(index)
  for changed in _changes(start, search, settings):
    used = time.perf_counter() - began
    if used + took > settings.budget_secs:
      logging.info("The tuner ends: %.0f s of its budget are used.", used)
      break
    before = time.perf_counter()
    search.sweep(build(changed))
    took = time.perf_counter() - before
  if index.settings["num_leaves"] and (
    not search.reached
    or time.perf_counter() - began + took <= settings.budget_secs
  ):
    search.sweep(build(every))
  return search.result(config)


def retune(
  index: scann.ScannIndex,
  sample_questions: Float[np.ndarray, "B R"],
  *,
  target_recall: float,
  k: int,
  settings: TunerSettings | None = None,
) -> TunerResult:
  """Finds the fastest search of `index` that finds enough; nothing is built.

  Arguments and errors as in `tune`. The `index` of the result shares all that
  is large with the one given. If no search reaches the target, the result is
  the one that finds most, and says so (`reached`).
  """
  if (
    not isinstance(index, scann.ScannIndex) or not index.settings["num_leaves"]
  ):
    raise ValueError(
      f"An index of kind {index.kind!r} with the settings {index.settings} was"
      " to be tuned again; expected kind 'scann' with num_leaves above 0, since"
      " only a search of leaves can look into fewer. Build one with"
      " index.scann_tree_passages=0, or leave this one as it is."
    )
  _check(target_recall, k, index.num_passages, len(sample_questions))
  search = _Search(
    index, sample_questions, target_recall, k, settings or TunerSettings()
  )
  search.sweep(index)
  return search.result(IndexConfig())


class _Search:
  """The trials so far, and the best of them with its index."""

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
    truth = exact_search(index, questions, k)
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
    self.num_passages = index.num_passages
    self.embedding_dim = index.embedding_dim

  @property
  def reached(self) -> bool:
    """Whether the best trial reaches the target."""
    return self.best is not None and self.best.reaches(self._target)

  def sweep(self, index: scann.ScannIndex) -> float:
    """Tries searches of one build; returns the seconds of build and sweep."""
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

    self._try_all(index, measure)
    self.trials += [trial for trial, _ in tried]
    self._contest(tried)
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
    """Returns the best trial and what its index finds of the held out."""
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
      config=config_of(index, config),
      held_out_questions=questions,
    )

  def _try_all(
    self, index: scann.ScannIndex, measure: Callable[[int, int], bool]
  ) -> None:
    """Measures, for each depth of reordering, the fewest leaves that do."""
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
          return  # scoring fewer again finds no more
        good = min(2 * good, leaves)
      bad = max(good // 2, fewest - 1)
      while good - bad > max(1, _BISECT_TO * good):
        middle = (bad + good) // 2
        if measure(middle, reorder):
          good = middle
        else:
          bad = middle
      fewest = good

  def _contest(self, tried: list[tuple[Trial, scann.ScannIndex]]) -> None:
    """Makes the fastest that reaches the target the best one.

    The best so far is timed again beside the new ones, in turn: the machine
    may have been busy when it was timed. Of all times the best counts.
    """

    def key(entry: tuple[Trial, scann.ScannIndex]) -> tuple[bool, float]:
      return rank(entry[0], self._target)

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


def _changes(
  start: IndexConfig, search: _Search, settings: TunerSettings
) -> Iterator[IndexConfig]:
  """Yields configs that differ from the best so far in one thing each.

  The caller sweeps each before it asks for the next.
  """
  best = start
  for share in settings.pca_shares:
    pca_dims = int(share * search.embedding_dim)
    if pca_dims == start.scann_pca_dims:
      continue
    before = search.best
    changed = dataclasses.replace(best, scann_pca_dims=pca_dims)
    yield changed
    if search.best is not before:
      best = changed
  decided = best
  leaves = start.scann_num_leaves
  for factor in (2.0, 0.5):
    while 1 <= int(leaves * factor) <= search.num_passages:
      leaves = int(leaves * factor)
      before = search.best
      changed = dataclasses.replace(best, scann_num_leaves=leaves)
      yield changed
      if search.best is before:
        break
      best = changed
    if best is not decided:
      break  # twice as many were better: half as many are not
    leaves = start.scann_num_leaves
  for name, values in (
    ("scann_soar_lambda", settings.soar_lambdas),
    ("scann_reorder_dtype", settings.reorder_dtypes),
    ("scann_dims_per_block", settings.dims_per_block),
    ("scann_anisotropic_threshold", settings.anisotropic_thresholds),
  ):
    tried = getattr(best, name)
    for value in values:
      if value == tried:
        continue
      before = search.best
      changed = dataclasses.replace(best, **{name: value})
      if not changed.scann_soar_lambda:
        changed.scann_soar_overretrieve = 0.0
      yield changed
      if search.best is not before:
        best = changed


def _check(
  target_recall: float, k: int, num_passages: int, num_questions: int
) -> None:
  """Raises `ValueError` if there is nothing to tune, or nothing that can be."""
  if not 0.0 < target_recall <= 1.0:
    raise ValueError(
      f"target_recall={target_recall}; expected a number above 0, at most 1,"
      " such as 0.95: the share of the exact top k to be found. Change it."
    )
  if num_questions < 3:
    raise ValueError(
      f"The sample to tune with has {num_questions} questions; expected at"
      " least 3, better 1000: half of them are held out. Pass more."
    )
  if not 1 <= k <= num_passages:
    raise ValueError(
      f"k={k} passages a question; expected 1 to {num_passages}, the passages"
      " that there are. Change k."
    )
