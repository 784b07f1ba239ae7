"""Draws the learning curves of a run, and several runs beside one another.

In: the metrics.jsonl that a `MetricWriter` wrote, or rows of runs. Out: a PNG.
"""

from collections.abc import Mapping, Sequence
import io
import math
from typing import Any

from etils import epath
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from rag_jax import artifacts
from rag_jax import disk
from rag_jax.training.metrics import read_metrics

# Colours of Okabe and Ito, for colour-blind people and for print.
_BLUE, _ORANGE, _GREEN, _PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
_GREY = "#6B6B6B"
_MANY_POINTS = 40  # more than this are drawn without markers

_Curve = tuple[list[int], list[float]]  # steps, values


def learning_curves(
  metrics_path: epath.PathLike,
  output_path: epath.PathLike,
  title: str,
  *,
  n_docs: int = 0,  # K, to show log K beside the entropy; 0 leaves it out
) -> None:
  """Draws loss, validation metrics, entropy and staleness against the step.

  A panel says "not measured" if the run has no such metric. Steps before the
  main stage have negative numbers; it begins at 0.

  Raises:
    FileNotFoundError: there is no `metrics_path`.
    ValueError: one of its lines is not a record of metrics.
  """
  records = read_metrics(metrics_path)
  before = [r for r in records if r["stage"] != "train"]
  train = [r for r in records if r["stage"] == "train"]

  # Without pyplot, which keeps figures and a backend for the whole process.
  layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1)  # inches
  figure = Figure(figsize=(11, 7), dpi=120, layout=layout)
  canvas = FigureCanvasAgg(figure)
  # parse_math=False: a title may be a path with a dollar sign.
  figure.suptitle(title, fontsize=14, fontweight="bold", parse_math=False)
  (loss, validation), (entropy, staleness) = figure.subplots(2, 2)
  _draw_loss(loss, before, train)
  _draw_validation(validation, train)
  _draw_entropy(entropy, train, n_docs)
  _draw_staleness(staleness, train)

  png = io.BytesIO()
  canvas.print_png(png)
  write_bytes(epath.Path(output_path), png.getvalue())


def _draw_loss(
  axes: Axes,
  before: Sequence[Mapping[str, Any]],
  train: Sequence[Mapping[str, Any]],
) -> None:
  first, drawn = 0, False  # step at which what is drawn next ends
  parts = []
  for stage, color, label in (
    ("contrastive", _GREEN, "contrastive, per question"),
    ("warmup", _ORANGE, "warm-up, span infilling"),
  ):
    records = [r for r in before if r["stage"] == stage]
    last = max((r["step"] for r in records), default=0)
    steps, losses = _curve(records, f"{stage}/loss")
    drawn |= _draw(
      axes, ([first + s - last for s in steps], losses), color, label
    )
    if last:
      parts.insert(0, "warm-up" if stage == "warmup" else stage)
      axes.axvline(first, color=_GREY, linewidth=0.8, linestyle=":")
    first -= last
  drawn |= _draw(axes, _curve(train, "train/loss"), _BLUE, "training, marginal")
  _finish(axes, "Loss", "nats per token", drawn)
  if parts:
    axes.set_xlabel(f"step ({' and '.join(parts)} before 0)")


def _draw_validation(axes: Axes, train: Sequence[Mapping[str, Any]]) -> None:
  recall = _curve(train, "validation/answer_recall_at_5")
  match = _curve(train, "validation/exact_match")
  drawn = _draw(axes, recall, _GREEN, "answer recall@5")
  drawn |= _draw(axes, match, _BLUE, "exact match")
  _finish(axes, "Validation", "share of questions", drawn)
  if drawn:
    axes.set_ylim(0.0, 1.02)


def _draw_entropy(
  axes: Axes, train: Sequence[Mapping[str, Any]], n_docs: int
) -> None:
  entropy = _curve(train, "train/doc_entropy")
  drawn = _draw(axes, entropy, _PURPLE, "H(z|x)")
  if drawn and n_docs > 1:
    axes.axhline(
      math.log(n_docs),
      color=_GREY,
      linewidth=1.2,
      linestyle="--",
      label=f"log {n_docs}: all documents alike",
    )
  _finish(axes, "Entropy of p(z|x)", "nats", drawn)


def _draw_staleness(axes: Axes, train: Sequence[Mapping[str, Any]]) -> None:
  age = _curve(train, "train/index_staleness_steps")
  drawn = _draw(axes, age, _ORANGE, "since the passages were embedded")
  _finish(axes, "Staleness of the index", "steps", drawn)


def _curve(records: Sequence[Mapping[str, Any]], name: str) -> _Curve:
  """Returns the steps at which `name` was measured, and its values."""
  measured = [r for r in records if name in r]
  # Null stands for a number that was not finite, and leaves a gap in the line.
  values = [math.nan if r[name] is None else float(r[name]) for r in measured]
  return [r["step"] for r in measured], values


def _draw(axes: Axes, curve: _Curve, color: str, label: str) -> bool:
  """Draws a line; returns whether there was one."""
  steps, values = curve
  if not steps:
    return False
  marker = "o" if len(steps) <= _MANY_POINTS else None
  axes.plot(
    steps,
    values,
    color=color,
    label=label,
    linewidth=1.8,
    marker=marker,
    markersize=3.5,
  )
  return True


def _finish(axes: Axes, title: str, ylabel: str, drawn: bool) -> None:
  """Adds what surrounds the lines, or says that there are none."""
  axes.set_title(title, loc="left", fontsize=12)
  for side in ("top", "right"):
    axes.spines[side].set_visible(False)
  if not drawn:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.text(
      0.5,
      0.5,
      "not measured",
      color=_GREY,
      fontsize=12,
      ha="center",
      va="center",
      transform=axes.transAxes,
    )
    return
  axes.set_xlabel("step")
  axes.set_ylabel(ylabel)
  axes.xaxis.set_major_locator(
    MaxNLocator(nbins=7, integer=True, steps=[1, 2, 2.5, 5, 10])
  )
  axes.grid(color="#DDDDDD", linewidth=0.8)
  axes.set_axisbelow(True)
  # Both axes include 0, so that slopes are not exaggerated.
  first = axes.dataLim.xmin  # infinite if no value is finite
  axes.set_xlim(left=1.02 * min(first, 0.0) if math.isfinite(first) else 0.0)
  axes.set_ylim(bottom=0.0)  # nothing that is drawn can be below
  # Next to the title, where the legend covers no line.
  axes.legend(
    loc="lower right",
    bbox_to_anchor=(1.0, 1.0),
    ncols=2,
    borderaxespad=0.1,
    frameon=False,
    fontsize=9.5,
    handlelength=1.6,
  )


def comparison_plot(
  rows: Sequence[Mapping[str, Any]],
  metrics: Sequence[str],
  output_path: epath.PathLike,
) -> None:
  """Draws a panel per metric: a point per run, and the mean of each row.

  Args:
    rows: of `run_comparison.summarise_rows`.
    metrics: names; those that no row has are left out.
    output_path: of the PNG.
  """
  shown = [name for name in metrics if any(name in r["metrics"] for r in rows)]
  layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1)  # inches
  size = (3.0 + 2.6 * max(len(shown), 1), 1.4 + 0.4 * len(rows))
  figure = Figure(figsize=size, dpi=120, layout=layout)
  canvas = FigureCanvasAgg(figure)
  panels = figure.subplots(
    1, max(len(shown), 1), sharey=True, squeeze=False
  ).flat
  places = [*range(len(rows))]
  for axes, name in zip(panels, shown, strict=False):
    for place, row in zip(places, rows, strict=True):
      if name not in row["metrics"]:
        continue
      found = row["metrics"][name]
      values = found["values"]
      axes.plot(
        [found["least"], found["most"]], [place] * 2, color=_BLUE, linewidth=1.2
      )
      axes.plot(
        values, [place] * len(values), "o", color=_BLUE, alpha=0.5, markersize=4
      )
      axes.plot([found["mean"]], [place], "|", color=_ORANGE, markersize=16,
                markeredgewidth=2.5)  # fmt: skip
    axes.set_title(name, loc="left", fontsize=10, parse_math=False)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=4))
    axes.grid(color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
      axes.spines[side].set_visible(False)
  first = figure.axes[0]
  first.set_yticks(places, [row["name"] for row in rows], parse_math=False)
  first.set_ylim(len(rows) - 0.5, -0.5)  # the first row at the top

  png = io.BytesIO()
  canvas.print_png(png)
  write_bytes(epath.Path(output_path), png.getvalue())


def write_bytes(path: epath.Path, data: bytes) -> None:
  """Writes a file atomically."""
  path.parent.mkdir(parents=True, exist_ok=True)
  if not artifacts.is_local(path):  # an object appears when it is complete
    path.write_bytes(data)
    return
  temp = artifacts.temp_path(path)
  try:
    temp.write_bytes(data)
    disk.sync(temp)
    disk.rename(temp, path)
  finally:
    temp.unlink(missing_ok=True)
