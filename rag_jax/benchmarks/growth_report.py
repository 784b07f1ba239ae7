"""Reports the cost of an index as the corpus grows.

In: a `Growth`. Out: a table, a picture, JSON.
"""

from collections.abc import Callable, Sequence
import dataclasses
import io
import json

from etils import epath
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from rag_jax import artifacts
from rag_jax.benchmarks.growth import BATCHES
from rag_jax.benchmarks.growth import Grown
from rag_jax.benchmarks.growth import Growth
from rag_jax.benchmarks.growth import K

# Colours of Okabe and Ito, for colour-blind people and for print.
_COLOURS = ("#000000", "#0072B2", "#56B4E9", "#D55E00")
_MARKERS = ("o", "s", "D", "^")


def growth_table(growth: Growth) -> str:
  """Returns all measurements as Markdown."""
  head = ["passages", "system", "settings", f"index_recall@{K} (95% interval)"]
  head += ["ms, 1 at a time", f"questions/s, {BATCHES[1]} at a time"]
  head += ["build (s)", "peak of the build", "searched in (MB)"]
  lines = [head, ["---:", "---", "---", *["---:"] * 6]]
  for row in growth.rows:
    peak = "-"
    if row.peak_bytes is not None:
      times = row.peak_bytes / row.embeddings_bytes
      peak = f"{row.peak_bytes / 1e6:,.0f} MB ({times:.2f} x)"
    lines.append(
      [
        f"{row.num_passages:,}",
        row.system,
        row.settings,
        str(row.recall),
        f"{1e3 / row.speeds[BATCHES[0]]:,.2f}",
        f"{row.speeds[BATCHES[1]]:,.0f}",
        f"{row.build_secs:,.1f}",
        peak,
        f"{row.memory_bytes / 1e6:,.0f}",
      ]
    )
  table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
  machine = growth.machine
  packages = ", ".join(f"{n} {v}" for n, v in machine["versions"].items())
  load = " to ".join(f"{value:.1f}" for value in machine["load"])
  notes = "".join(f"\n- {note}" for note in growth.notes)
  return (
    f"Embeddings of {growth.embedding_dim} numbers from"
    f" {', '.join(growth.inputs)}; each search is tuned to index_recall@{K} of"
    f" {growth.target_recall:g} (low end of its interval) on half of the"
    f" questions, {growth.num_questions:,} others are measured.\n\n{table}\n"
    "Peak: peak memory of the process during the build, mapped files included,"
    " less its memory before; x: times the size of the embeddings.\n"
    f"{machine['cpu']}, {machine['num_cpus']} CPUs; load {load}."
    f" {packages}.\n{notes}"
  )


def growth_figure(growth: Growth) -> bytes:
  """Returns a PNG of build time, memory and latency by number of passages."""
  layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1)  # inches
  figure = Figure(figsize=(11, 7), dpi=120, layout=layout)
  canvas = FigureCanvasAgg(figure)  # no pyplot: it keeps figures
  (build, peak), (latency, speed) = figure.subplots(2, 2)
  rows = growth.rows
  _draw(build, rows, "Building", "s", lambda r: r.build_secs)
  _draw(
    peak,
    rows,
    "Peak memory of the build",
    "times the embeddings",
    lambda r: (
      None if r.peak_bytes is None else r.peak_bytes / r.embeddings_bytes
    ),
  )
  one, many = BATCHES
  _draw(latency, rows, "One question", "ms", lambda r: 1e3 / r.speeds[one])
  title = f"{many} questions at a time"
  _draw(speed, rows, title, "questions/s", lambda r: r.speeds[many])
  for axes in (build, latency, speed):
    axes.set_yscale("log")
  peak.set_ylim(bottom=0)
  peak.axhline(1.5, color="#6B6B6B", linewidth=0.8, linestyle="--")
  build.legend(frameon=False)
  figure.suptitle(
    f"{growth.embedding_dim} numbers per embedding, index_recall@{K} tuned to"
    f" {growth.target_recall:g}, {growth.machine['num_cpus']} CPUs"
  )
  png = io.BytesIO()
  canvas.print_png(png)
  return png.getvalue()


def write_growth(path: epath.PathLike, growth: Growth) -> None:
  """Writes growth.png, growth.md and, last, growth.json into `path`."""
  path = epath.Path(path).expanduser()
  path.mkdir(parents=True, exist_ok=True)
  content = json.dumps(dataclasses.asdict(growth), indent=2)
  (path / "growth.png").write_bytes(growth_figure(growth))
  artifacts.write_atomically(path / "growth.md", growth_table(growth))
  artifacts.write_atomically(path / "growth.json", content + "\n")


def _draw(
  axes: Axes,
  rows: Sequence[Grown],
  title: str,
  unit: str,
  value: Callable[[Grown], float | None],
) -> None:
  """Draws a line for each system, against the number of passages."""
  for number, system in enumerate(dict.fromkeys(row.system for row in rows)):
    points = [
      (row.num_passages, measured)
      for row in rows
      if row.system == system and (measured := value(row)) is not None
    ]
    axes.plot(
      [x for x, _ in points],
      [y for _, y in points],
      label=system,
      color=_COLOURS[number % len(_COLOURS)],
      marker=_MARKERS[number % len(_MARKERS)],
    )
  axes.set_xscale("log")
  axes.set_xlabel("passages")
  axes.set_ylabel(unit)
  axes.set_title(title, loc="left")
  axes.grid(color="#DDDDDD", linewidth=0.8)
  for side in ("top", "right"):
    axes.spines[side].set_visible(False)
