"""Several runs beside one another: rows of equal settings, differences.

In: workdirs of runs that have ended. Out: a row for the runs that differ only
in their seed, with the mean of each metric over seeds; the differences to one
of the rows; all of it as Markdown and as plain JSON types.
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import difflib
import functools
import math
import os
from typing import Any

from absl import logging
from etils import epath
from jaxtyping import Float
import numpy as np
from scipy import stats

from rag_jax.config import Config
from rag_jax.config_json import read_config
from rag_jax.config_rules import fields
from rag_jax.evaluation.differences import difference_interval
from rag_jax.evaluation.differences import random_signs
from rag_jax.evaluation.judged_answers import LINES
from rag_jax.evaluation.judged_answers import JudgedAnswer
from rag_jax.evaluation.judged_answers import pairs
from rag_jax.evaluation.judged_answers import read_judged
from rag_jax.evaluation.report import FINGERPRINTS
from rag_jax.evaluation.report import RESULTS_FILE
from rag_jax.evaluation.report import read_results

# Shown where the runs have them.
DEFAULT_METRICS = (
  "test/exact_match", "test/answer_recall_at_1", "test/answer_recall_at_5",
  "train/seconds",
)  # fmt: skip
EVALUATION = "evaluation"  # in a workdir: the output of rag-jax evaluate

# Settings that say where something is kept.
_NO_DIFFERENCE = ("seed", "data.token_cache")
_NEAR = 0.02  # rounding depends on how many questions are answered together
_CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EndedRun:
  """A run with its results."""

  path: str
  config: Config
  results: Mapping[str, Any]
  answers: tuple[JudgedAnswer, ...]  # to the questions of the results, or ()

  @property
  def settings(self) -> dict[str, Any]:
    """All settings by name, without those that make no difference."""
    return {
      name: value
      for name, _, value in fields(self.config)
      if name not in _NO_DIFFERENCE
    }


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Row:
  """Runs that differ only in their seed."""

  name: str
  runs: tuple[EndedRun, ...]

  def values(self, metric: str) -> list[float]:
    """Returns the metric of each run; [] unless all have it."""
    found = [run.results.get(metric) for run in self.runs]
    return [] if None in found else [float(x) for x in found if x is not None]


def read_runs(paths: Sequence[epath.PathLike]) -> list[EndedRun]:
  """Returns the runs in some workdirs.

  What `rag-jax evaluate --output=WORKDIR/evaluation` wrote is read too, if it
  is about the questions of results.json, with nearly the same exact match.

  Raises:
    FileNotFoundError: there is no such folder, it is no workdir, or the run has
      not ended.
    ValueError: a file is damaged, a folder is named twice, or the runs have
      different passages or were tested on different questions.
  """
  places = [os.path.realpath(os.path.expanduser(path)) for path in paths]
  for number, place in enumerate(places):
    if place in places[:number]:
      raise ValueError(
        f"The run {paths[number]} is given twice. Expected different runs."
        " Remove one of the two."
      )
  runs = [_read_run(path) for path in paths]
  for run in runs[1:]:
    _check_same_data(runs[0], run)
  return runs


def _read_run(path: epath.PathLike) -> EndedRun:
  folder = epath.Path(path).expanduser()
  if not folder.is_dir() or not (folder / "config.json").exists():
    problem = "no config.json in it" if folder.is_dir() else "no such folder"
    raise FileNotFoundError(
      f"{path} is not a run: there is {problem}. Expected the --workdir of"
      " rag-jax train. Correct the path."
    )
  results = read_results(folder / RESULTS_FILE)
  return EndedRun(
    path=str(path),
    config=read_config(folder / "config.json"),
    results=results,
    answers=_answers(folder, results),
  )


def _answers(
  folder: epath.Path, results: Mapping[str, Any]
) -> tuple[JudgedAnswer, ...]:
  """Returns the answers to the questions that the results are about, or ()."""
  path = folder / EVALUATION / LINES
  if not path.exists():
    return ()
  answers = tuple(read_judged(path))
  match = np.mean([x.exact_match for x in answers]) if answers else math.nan
  number, expected = (
    results.get(f"test/{name}", math.nan)
    for name in ("num_questions", "exact_match")
  )
  if len(answers) == number and abs(match - expected) <= _NEAR:
    return answers
  logging.warning(
    "%s has %d answers with an exact match of %.3f, and %s has %.0f with %.3f."
    " It is of other questions or another model, and is not used.",
    *(path, len(answers), match, RESULTS_FILE, number, expected),
  )
  return ()


def _check_same_data(first: EndedRun, other: EndedRun) -> None:
  """Raises `ValueError` if two runs had different passages or questions."""
  prints = [run.results.get(FINGERPRINTS, {}) for run in (first, other)]
  counts = {"passages": "num_passages", "questions": "test/num_questions"}
  for what, count in counts.items():
    ours, theirs = (found.get(what) for found in prints)
    numbers = [run.results.get(count) for run in (first, other)]
    if None in (ours, theirs):  # of an older rag_jax
      ours, theirs = numbers
    if ours != theirs:
      shown = " and ".join(f"{number:,.0f}" for number in numbers if number)
      raise ValueError(
        f"{first.path} and {other.path} have different {what} ({shown} of"
        " them). Expected runs on the same passages, tested on the same"
        " questions. Compare runs on the same data."
      )


def make_rows(runs: Sequence[EndedRun], names: Sequence[str] = ()) -> list[Row]:
  """Returns a row for all runs that differ only in their seed.

  Args:
    runs: one or more.
    names: of the rows, in the order of their first runs; empty: the settings
      that are not the same in all rows.

  Raises:
    ValueError: a seed occurs twice in a row, or the names do not fit.
  """
  groups: dict[str, list[EndedRun]] = {}
  for run in runs:
    groups.setdefault(repr(run.settings), []).append(run)
  for group in groups.values():
    seeds: dict[int, EndedRun] = {}
    for run in group:
      twin = seeds.setdefault(run.config.seed, run)
      if twin is not run:
        raise ValueError(
          f"{twin.path} and {run.path} have the same settings and the same"
          f" seed, {run.config.seed}. Expected another seed or another setting:"
          " a copy of a run says nothing new. Leave one out."
        )
  found = list(names) or _names(list(groups.values()))
  if len(found) != len(groups) or len(set(found)) < len(found):
    rows = "; ".join(
      ", ".join(run.path for run in group) for group in groups.values()
    )
    raise ValueError(
      f"The names {found} do not fit: expected {len(groups)} different ones, of"
      f" these runs: {rows}. Correct --names."
    )
  return [
    Row(name=name, runs=tuple(sorted(group, key=lambda run: run.config.seed)))
    for name, group in zip(found, groups.values(), strict=True)
  ]


def _names(groups: Sequence[Sequence[EndedRun]]) -> list[str]:
  if len(groups) == 1:
    return [groups[0][0].path]
  settings = [group[0].settings for group in groups]
  differ = [
    name
    for name, value in settings[0].items()
    if any(other[name] != value for other in settings)
  ]
  return [
    ", ".join(f"{name}={found[name]}" for name in differ) for found in settings
  ]


def check_metrics(rows: Sequence[Row], asked: Sequence[str]) -> None:
  """Raises `ValueError` unless a run has each of the metrics, as a number."""
  known = {
    name
    for row in rows
    for run in row.runs
    for name, value in run.results.items()
    if isinstance(value, (int, float))
  }
  for name in asked:
    if name not in known:
      close = difflib.get_close_matches(name, known, n=1)
      hint = f" Did you mean {close[0]}?" if close else ""
      raise ValueError(
        f"No run has the metric {name!r}; expected a number in {RESULTS_FILE},"
        f" such as test/exact_match.{hint} Correct --metrics."
      )


def summarise_rows(
  rows: Sequence[Row], metrics: Sequence[str]
) -> list[dict[str, Any]]:
  """Returns the name, runs, seeds and metrics of each row.

  A metric has the `values` in the order of the seeds, their `mean`, the `least`
  and the `most`; with several seeds also `low` and `high`, the 95 % interval of
  the mean over seeds (Student's t), unless all have the same value.
  """
  return [
    {
      "name": row.name,
      "runs": [run.path for run in row.runs],
      "seeds": [run.config.seed for run in row.runs],
      "metrics": {
        name: _over_seeds(values)
        for name in metrics
        if (values := row.values(name))
      },
    }
    for row in rows
  ]


def _over_seeds(values: Sequence[float]) -> dict[str, Any]:
  found = {
    "values": list(values),
    "mean": float(np.mean(values)),
    "least": min(values),
    "most": max(values),
  }
  if len(values) > 1:
    found |= _t_interval(np.array(values))
  return found


def _t_interval(values: Float[np.ndarray, "S"]) -> dict[str, float]:
  """Returns `low` and `high`; {} if all are equal, which says nothing."""
  if _equal(values):
    return {}
  error = values.std(ddof=1) / math.sqrt(len(values))
  far = stats.t.ppf((1 + _CONFIDENCE) / 2, len(values) - 1) * error
  low, high = values.mean() - far, values.mean() + far
  return {"low": float(low), "high": float(high)}


def _equal(values: Float[np.ndarray, "S"]) -> bool:
  """Whether numbers differ by no more than rounding."""
  return bool(np.ptp(values) <= 1e-12 * np.abs(values).max())


def row_differences(
  row: Row, baseline: Row, metrics: Sequence[str]
) -> dict[str, dict[str, Any]]:
  """Returns, by metric, how much more `row` has than `baseline`.

  A difference has `over`:

  - "questions": all runs of both rows have answers. Each question counts with
    its mean over the seeds of a row. The interval is a bootstrap over
    questions, and there is a `p` value, of random signs. Seeds are taken as
    they are: the interval says nothing on other seeds.
  - "seeds": two or more seeds are in both rows. The interval of their paired
    differences is Student's.
  - "runs": there are two or more runs in each row, with other seeds. Welch's
    interval.
  - "": there is no interval: too few runs, or seeds whose
    differences are all the same.

  Raises:
    ValueError: the answers are to different questions.
  """
  found = {}
  for metric in metrics:
    ours, theirs = row.values(metric), baseline.values(metric)
    if not ours or not theirs:
      continue
    questions = _over_questions(row, baseline, metric)
    found[metric] = questions or _between_seeds(row, baseline, metric)
  return found


def _over_questions(
  row: Row, baseline: Row, metric: str
) -> dict[str, Any] | None:
  """Returns the difference over questions; None if it is not possible."""
  runs = (*row.runs, *baseline.runs)
  if not all(run.answers for run in runs):
    return None
  columns = []
  for run in runs:
    # In the order of the questions of the first run.
    same = [other for _, other in pairs(runs[0].answers, run.answers)]
    values = [_of_answer(answer, metric) for answer in same]
    if None in values:
      return None
    columns.append([x for x in values if x is not None])
  number = len(row.runs)
  difference = np.mean(columns[:number], axis=0) - np.mean(
    columns[number:], axis=0
  )
  low, high = difference_interval(difference)
  return {
    "over": "questions",
    "difference": float(difference.mean()),
    "low": low,
    "high": high,
    "p": random_signs(difference),
    "number": len(difference),
  }


def _of_answer(answer: JudgedAnswer, metric: str) -> float | None:
  """Returns a metric of one answer; None: it is no mean over answers."""
  name = metric.removeprefix("test/")
  recall = name.removeprefix("answer_recall_at_")
  if name in ("exact_match", "token_f1"):
    return getattr(answer, name)
  if recall != name and recall.isdecimal():
    if int(recall) > answer.num_retrieved:
      return None
    return float(0 < answer.answer_rank <= int(recall))
  return None


def _between_seeds(row: Row, baseline: Row, metric: str) -> dict[str, Any]:
  ours, theirs = (
    dict(zip((r.config.seed for r in of.runs), of.values(metric), strict=True))
    for of in (row, baseline)
  )
  left, right = (np.array(list(of.values())) for of in (ours, theirs))
  difference = float(left.mean() - right.mean())
  both = sorted(set(ours) & set(theirs))
  if len(both) > 1 and len(both) == len(ours) == len(theirs):
    ends = _t_interval(np.array([ours[s] - theirs[s] for s in both]))
    if ends:
      return {"over": "seeds", "difference": difference, **ends,
              "number": len(both)}  # fmt: skip
  elif min(len(left), len(right)) > 1 and not (_equal(left) and _equal(right)):
    test = stats.ttest_ind(left, right, equal_var=False)
    interval = test.confidence_interval(_CONFIDENCE)
    return {"over": "runs", "difference": difference,
            "low": float(interval.low), "high": float(interval.high),
            "number": len(left) + len(right)}  # fmt: skip
  return {"over": "", "difference": difference}


def markdown(
  rows: Sequence[Mapping[str, Any]],
  metrics: Sequence[str],
  baseline: str = "",
  differences: Mapping[str, Mapping[str, Any]] | None = None,
) -> str:
  """Returns the tables of `summarise_rows` and of differences to `baseline`."""
  shown = [name for name in metrics if any(name in r["metrics"] for r in rows)]
  table = [["runs", "seeds", *shown]]
  for row in rows:
    cells = [_cell(row["metrics"].get(name)) for name in shown]
    table.append([row["name"], str(len(row["seeds"])), *cells])
  lines = [*_lines(table)]
  if any(len(row["seeds"]) > 1 for row in rows):
    lines += ["", "Mean over seeds (least to most)."]
  if differences:
    table = [["runs", "metric", "difference", "p", "over"]]
    for name, of in differences.items():
      table += [[name, *_difference(metric, d)] for metric, d in of.items()]
    lines += [
      "",
      f"Difference to {_escaped(baseline)}, with the 95 % interval:",
    ]
    lines += ["", *_lines(table)]
  return "\n".join(lines) + "\n"


def _cell(found: Mapping[str, Any] | None) -> str:
  if found is None:
    return "-"
  show = functools.partial(_show, scale=found["most"])
  if len(found["values"]) == 1:
    return show(found["mean"])
  ends = f"{show(found['least'])} to {show(found['most'])}"
  return f"{show(found['mean'])} ({ends})"


def _difference(metric: str, found: Mapping[str, Any]) -> list[str]:
  show = functools.partial(_show, scale=found["difference"], sign="+")
  size = show(found["difference"])
  if not found["over"]:
    return [metric, size, "", "no interval"]
  size += f" ({show(found['low'])} to {show(found['high'])})"
  p = f"{found['p']:.2g}" if "p" in found else ""
  return [metric, size, p, f"{found['number']} {found['over']}"]


def _show(value: float, *, scale: float, sign: str = "") -> str:
  return f"{value:{sign}{',.0f' if abs(scale) >= 100 else '.3f'}}"


def _lines(table: Sequence[Sequence[str]]) -> Iterator[str]:
  """Yields the lines of a Markdown table; the first row is its header."""
  escaped = [[*map(_escaped, row)] for row in table]
  widths = [max(map(len, column)) for column in zip(*escaped, strict=True)]
  for number, row in enumerate(escaped):
    cells = (cell.ljust(w) for cell, w in zip(row, widths, strict=True))
    yield f"| {' | '.join(cells)} |"
    if not number:
      yield f"|{'|'.join('-' * (width + 2) for width in widths)}|"


def _escaped(text: str) -> str:
  return " ".join(text.split()).replace("|", "\\|")
