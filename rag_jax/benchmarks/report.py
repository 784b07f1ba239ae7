"""Reports a retrieval benchmark: tables, JSON, a picture and an HTML page.

In: the measurements. Out: Markdown to print; results.json, recall_speed.png and
report.html in a directory. The page is self-contained.
"""

import base64
from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import io
import json
from typing import Any

from etils import epath
import jinja2
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
import numpy as np

from rag_jax import artifacts
from rag_jax.benchmarks.measure import BATCHES
from rag_jax.benchmarks.measure import INDEX_DEPTHS
from rag_jax.benchmarks.measure import SPEED_K
from rag_jax.benchmarks.measure import Measured
from rag_jax.evaluation.judged_questions import Mean
from rag_jax.retrieval.recall import Recall

RESULTS, PICTURE, PAGE = "results.json", "recall_speed.png", "report.html"
FORMAT = 1  # of results.json; raise when a field changes its meaning

# Colours of Okabe and Ito, except the last two, for colour-blind people.
_COLOURS = (
  "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000",
  "#8C6D31", "#6B6B6B",
)  # fmt: skip
_MARKERS = "osD^vP*Xh"
_TICKS = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 1.0)
_NEAR_ONE = 5e-4  # the scale of recall would be infinite this far above 1
# Whatever is put into it is escaped.
_PAGE = jinja2.Environment(autoescape=True).from_string("""\
<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">
<title>Retrieval benchmark</title><style>
body{font:15px/1.5 sans-serif;margin:2em auto;max-width:75em;padding:0 1em}
table{border-collapse:collapse;margin:1em 0}
td,th{border-bottom:1px solid #ddd;padding:.2em .7em;text-align:right}
td:nth-child(-n+2),th:nth-child(-n+2){text-align:left}img{max-width:100%}
</style></head><body><h1>Retrieval benchmark</h1>
{% for text in paragraphs %}<p>{{ text }}</p>{% endfor %}
<h2>Recall against speed</h2>
<img alt="Recall against speed" src="data:image/png;base64,{{ image }}">
{% for title, cells in tables if cells %}
{% if title %}<h2>{{ title }}</h2>{% endif %}<table>
<tr>{% for cell in cells[0] %}<th>{{ cell }}</th>{% endfor %}</tr>
{% for line in cells[1:] %}
<tr>{% for cell in line %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>{% endfor %}
<ul>{% for note in notes %}<li>{{ note }}</li>{% endfor %}</ul>
</body></html>
""")


@dataclasses.dataclass(slots=True, frozen=True, kw_only=True)
class Benchmark:
  """All measurements of one run, and their conditions.

  Attributes:
    inputs: name -> file or directory that was measured.
    num_tuning: questions used only to tune systems.
    notes: on systems that were left out or tuned.
    machine: see machine.py.
  """

  inputs: Mapping[str, str]
  num_passages: int
  embedding_dim: int
  num_questions: int
  num_tuning: int
  rounds: int
  rows: tuple[Measured, ...]
  notes: tuple[str, ...]
  machine: Mapping[str, Any]

  def to_json(self) -> str:
    """Returns everything as JSON."""
    content = {"format": FORMAT} | dataclasses.asdict(self)
    return json.dumps(content, indent=2, allow_nan=False) + "\n"

  @classmethod
  def from_json(cls, text: str, origin: str = RESULTS) -> "Benchmark":
    """Returns the benchmark that `to_json` wrote.

    Raises:
      ValueError: it is not JSON, or not a benchmark; names `origin`.
    """
    try:
      content = json.loads(text)
      if content.pop("format") != FORMAT:
        raise ValueError(f"its format is not {FORMAT}")
      content["notes"] = tuple(content["notes"])
      content["rows"] = tuple(_row(row) for row in content["rows"])
      return cls(**content)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
      raise ValueError(
        f"{origin} holds no benchmark of retrieval that this version of rag_jax"
        f" can read ({type(error).__name__}: {error}); expected a file that"
        " tools/benchmark_retrieval.py wrote. It was edited, cut off, or comes"
        " from another version: measure again."
      ) from error

  def summary(self) -> str:
    """Returns inputs and machine, in a few lines."""
    inputs = ", ".join(f"{name} {value}" for name, value in self.inputs.items())
    tuned = f"; {self.num_tuning:,} others to tune" if self.num_tuning else ""
    load = " to ".join(f"{value:.1f}" for value in self.machine["load"])
    versions = ", ".join(
      f"{name} {version}" for name, version in self.machine["versions"].items()
    )
    return (
      f"{self.num_passages:,} passages x {self.embedding_dim},"
      f" {self.num_questions:,} questions{tuned}. {inputs}.\n\n"
      f"{self.machine['cpu']}, {self.machine['num_cpus']} CPUs, all used by"
      f" each system; load of the machine {load} from start to end (this run's"
      f" own included). {versions}.\n\n"
      f"questions/s: median of {self.rounds} rounds, {SPEED_K} passages per"
      " question, without embedding the question. build: without embedding the"
      " passages."
    )

  def speed_table(self) -> str:
    """Returns index_recall, speed and memory as Markdown."""
    return _markdown(_speed_cells(self))

  def question_table(self) -> str:
    """Returns answer and ranking metrics as Markdown; "" if there are none."""
    cells = _question_cells(self)
    return _markdown(cells) if cells else ""

  def markdown(self) -> str:
    """Returns summary, notes and tables as Markdown."""
    notes = "".join(f"- {note}\n" for note in self.notes)
    parts = [self.summary(), self.speed_table(), self.question_table(), notes]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def pareto(rows: Sequence[Measured], k: int, batch_size: int) -> list[Measured]:
  """Returns the Pareto front of recall and speed, fastest system first.

  Systems without an index_recall@k are left out.
  """
  known = [(row, recall) for row in rows if (recall := row.recall(k))]
  known.sort(key=lambda pair: (-pair[0].speed(batch_size), -pair[1].mean))
  best, front = -1.0, []
  for row, recall in known:
    if recall.mean > best:
      front.append(row)
      best = recall.mean
  return front


def write_benchmark(directory: epath.PathLike, benchmark: Benchmark) -> None:
  """Writes the picture, the page and, last, results.json."""
  directory = epath.Path(directory).expanduser()
  directory.mkdir(parents=True, exist_ok=True)
  png = picture(benchmark)
  (directory / PICTURE).write_bytes(png)
  artifacts.write_atomically(directory / PAGE, page(benchmark, png))
  artifacts.write_atomically(directory / RESULTS, benchmark.to_json())


def page(benchmark: Benchmark, png: bytes) -> str:
  """Returns one HTML page that needs no other file."""
  return _PAGE.render(
    paragraphs=benchmark.summary().split("\n\n"),
    image=base64.b64encode(png).decode("ascii"),
    tables=[
      ("", _speed_cells(benchmark)),
      ("Questions", _question_cells(benchmark)),
    ],
    notes=benchmark.notes,
  )


def picture(benchmark: Benchmark) -> bytes:
  """Returns a PNG: index_recall against questions/s, and against memory."""
  k = min(SPEED_K, benchmark.num_passages)
  batch = max(BATCHES)
  rows = [row for row in benchmark.rows if row.recall(k)]
  layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1)  # inches
  figure = Figure(figsize=(13, 6), dpi=110, layout=layout)
  canvas = FigureCanvasAgg(figure)  # no pyplot: see plots.py
  speed, memory = figure.subplots(1, 2)
  if rows:
    _draw_speed(speed, rows, k, batch, benchmark)
    _draw_memory(memory, rows, k, benchmark)
    handles, labels = speed.get_legend_handles_labels()
    figure.legend(
      handles, labels, loc="outside lower center", ncols=5, frameon=False
    )
  else:
    for axes in (speed, memory):
      axes.text(0.5, 0.5, "no search of embeddings was measured", ha="center")
      axes.set_axis_off()
  png = io.BytesIO()
  canvas.print_png(png)
  return png.getvalue()


def _draw_speed(
  axes: Axes,
  rows: Sequence[Measured],
  k: int,
  batch: int,
  benchmark: Benchmark,
) -> None:
  front = pareto(rows, k, batch)
  axes.plot(
    [_mean_recall(row, k) for row in front],
    [row.speed(batch) for row in front],
    color="#BBBBBB",
    linewidth=7,
    solid_capstyle="round",
    label="nothing is better in both",
    zorder=1,
  )
  for number, (family, members) in enumerate(_families(rows, k)):
    recalls = [row.recall(k) for row in members]
    means = np.array([r.mean for r in recalls if r])
    low = means - np.array([r.low for r in recalls if r])
    high = np.array([r.high for r in recalls if r]) - means
    axes.errorbar(
      means,
      [row.speed(batch) for row in members],
      xerr=np.maximum([low, high], 0),
      label=family,
      linestyle="none",
      color=_COLOURS[number % len(_COLOURS)],
      marker=_MARKERS[number % len(_MARKERS)],
      markersize=12 if family.endswith("tuned") else 6,
      elinewidth=0.8,
      zorder=2,
    )
    # A line through the family's best: its builds differ in size.
    best = pareto(members, k, batch)
    axes.plot(
      [_mean_recall(row, k) for row in best],
      [row.speed(batch) for row in best],
      color=_COLOURS[number % len(_COLOURS)],
      linewidth=1.5,
    )
  axes.set_yscale("log")
  axes.set_ylabel(f"questions/s, {batch} at a time")
  size = f"{benchmark.num_passages:,} x {benchmark.embedding_dim}"
  _finish(axes, rows, k, f"Speed, {size}, {benchmark.machine['num_cpus']} CPUs")


def _draw_memory(
  axes: Axes, rows: Sequence[Measured], k: int, benchmark: Benchmark
) -> None:
  for number, (_, members) in enumerate(_families(rows, k)):
    axes.plot(
      [_mean_recall(row, k) for row in members],
      [row.memory_bytes / benchmark.num_passages for row in members],
      color=_COLOURS[number % len(_COLOURS)],
      marker=_MARKERS[number % len(_MARKERS)],
      linestyle="none",
    )
  axes.set_ylim(bottom=0)
  axes.set_ylabel("bytes per passage")
  _finish(axes, rows, k, "Memory")


def _finish(axes: Axes, rows: Sequence[Measured], k: int, title: str) -> None:
  """Stretches the axis near a recall of 1, where indexes differ."""
  axes.set_xscale(
    "function",
    functions=(
      lambda x: -np.log10(np.maximum(1 + _NEAR_ONE - x, _NEAR_ONE / 2)),
      lambda y: 1 + _NEAR_ONE - 10.0 ** -np.asarray(y),
    ),
  )
  least = min(_mean_recall(row, k) for row in rows)
  start = max((tick for tick in _TICKS if tick <= least), default=0.0)
  start = min(start, 0.9)
  ticks = [tick for tick in _TICKS if tick >= start]
  axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
  axes.minorticks_off()
  axes.set_xlim(start, 1 + _NEAR_ONE / 4)
  axes.set_xlabel(f"index_recall@{k}")
  axes.set_title(title, loc="left")
  axes.grid(color="#DDDDDD", linewidth=0.8)
  axes.set_axisbelow(True)


def _families(
  rows: Sequence[Measured], k: int
) -> Iterator[tuple[str, list[Measured]]]:
  """Yields the systems of each family by rising recall."""
  for family in dict.fromkeys(row.family for row in rows):
    members = [row for row in rows if row.family == family]
    yield family, sorted(members, key=lambda row: _mean_recall(row, k))


def _mean_recall(row: Measured, k: int) -> float:
  recall = row.recall(k)
  assert recall is not None, "only systems with a recall are drawn"
  return recall.mean


def _speed_cells(benchmark: Benchmark) -> list[list[str]]:
  depths = sorted({min(k, benchmark.num_passages) for k in INDEX_DEPTHS})
  head = ["system", "settings"]
  head += [f"index_recall@{k} (95% interval)" for k in depths]
  head += [f"questions/s, {size} at a time" for size in BATCHES]
  cells = [[*head, "bytes per passage", "build (s)"]]
  for row in benchmark.rows:
    recalls = [row.recall(k) for k in depths]
    cells.append(
      [
        row.family,
        row.settings,
        *(str(recall) if recall else "-" for recall in recalls),
        *(f"{row.speed(size):,.0f}" for size in BATCHES),
        f"{row.memory_bytes / benchmark.num_passages:,.0f}",
        "-" if row.build_secs is None else f"{row.build_secs:,.1f}",
      ]
    )
  return cells


def _question_cells(benchmark: Benchmark) -> list[list[str]]:
  names = list(benchmark.rows[0].metrics)
  if not names:
    return []
  cells = [["system", "settings", *names]]
  for row in benchmark.rows:
    values = [str(row.metrics[name]) for name in names]
    cells.append([row.family, row.settings, *values])
  return cells


def _markdown(cells: Sequence[Sequence[str]]) -> str:
  head, *rest = cells
  lines = [head, ["---", "---", *["---:"] * (len(head) - 2)], *rest]
  return "".join(
    f"| {' | '.join(cell.replace('|', '/') for cell in line)} |\n"
    for line in lines
  )


def _row(content: dict[str, Any]) -> Measured:
  """Returns a row as JSON has it."""
  return Measured(
    **content
    | {
      "index_recalls": tuple(Recall(**r) for r in content["index_recalls"]),
      "metrics": {n: Mean(**m) for n, m in content["metrics"].items()},
      "speeds": {int(n): tuple(v) for n, v in content["speeds"].items()},
    }
  )
