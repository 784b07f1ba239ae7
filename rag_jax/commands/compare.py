r"""Compares runs that have ended, in a table and a plot.

  rag-jax compare --output=runs/comparison runs/lr1_seed0 runs/lr1_seed1 \
      runs/lr2_seed0 runs/lr2_seed1

Each argument is the --workdir of a run. Runs that differ only in their seed are
one row: the mean of each metric over seeds, the least and the most. The name of
a row is what differs between the settings, or is given by --names. Columns are
exact match, answer recall at 1 and 5 and the seconds of training, and
--metrics, names in results.json such as test/token_f1.

Then come the differences to the first row, or to --baseline, with a 95 %
interval: over questions, if each run has a folder `evaluation`, else over
seeds. This makes one:

  rag-jax evaluate --workdir=runs/lr1_seed0 --output=runs/lr1_seed0/evaluation

Prints Markdown. --output is a folder for comparison.md, comparison.json and
comparison.png. All runs have to have the same passages and test questions.
"""

import json
import os

from absl import flags
from etils import epath

from rag_jax.artifacts import write_atomically
from rag_jax.commands import command
from rag_jax.evaluation.plots import comparison_plot
from rag_jax.evaluation.run_comparison import DEFAULT_METRICS
from rag_jax.evaluation.run_comparison import Row
from rag_jax.evaluation.run_comparison import check_metrics
from rag_jax.evaluation.run_comparison import make_rows
from rag_jax.evaluation.run_comparison import markdown
from rag_jax.evaluation.run_comparison import read_runs
from rag_jax.evaluation.run_comparison import row_differences
from rag_jax.evaluation.run_comparison import summarise_rows

_METRICS = flags.DEFINE_list(
  "metrics", [], "More columns: names in results.json, with commas between."
)
_NAMES = flags.DEFINE_list(
  "names", [], "Of the rows, in the order of their first runs."
)
_BASELINE = flags.DEFINE_string(
  "baseline", "", "Name of the row to compare with; '': the first."
)
_OUTPUT = flags.DEFINE_string(
  "output", "", "Folder for the table, the plot and JSON; '': none is written."
)
flags.DEFINE_bool("debug", False, "Show where an error came from.")

_NAME = "comparison"  # of the files


def _baseline(rows: list[Row]) -> Row:
  """Returns the row that others are compared with."""
  wanted = _BASELINE.value or rows[0].name
  for row in rows:
    if row.name == wanted:
      return row
  raise ValueError(
    f"--baseline={wanted} is not the name of a row. Expected one of"
    f" {[row.name for row in rows]}. Correct it."
  )


def main(argv: list[str]) -> None:
  """Runs the command."""
  if len(argv) < 2:
    raise ValueError(
      "There are no runs to compare. Expected the workdirs of one or more, such"
      " as runs/first runs/second. Give them as arguments."
    )
  output = epath.Path(os.path.expanduser(_OUTPUT.value or ""))
  if _OUTPUT.value and output.exists() and not output.is_dir():
    raise ValueError(
      f"--output={output} is a file; expected a folder to write. Choose"
      " another."
    )
  rows = make_rows(read_runs(argv[1:]), _NAMES.value or [])
  asked = _METRICS.value or []
  check_metrics(rows, asked)
  metrics = list(dict.fromkeys([*DEFAULT_METRICS, *asked]))
  baseline = _baseline(rows)
  differences = {
    row.name: row_differences(row, baseline, metrics)
    for row in rows
    if row is not baseline
  }
  found = summarise_rows(rows, metrics)
  text = markdown(found, metrics, baseline.name, differences)
  print(text, end="")
  if not _OUTPUT.value:
    return
  output.mkdir(parents=True, exist_ok=True)
  content = {"rows": found, "baseline": baseline.name}
  content["differences"] = differences
  write_atomically(
    output / f"{_NAME}.json", json.dumps(content, indent=2) + "\n"
  )
  write_atomically(output / f"{_NAME}.md", text)
  comparison_plot(found, metrics, output / f"{_NAME}.png")
  print(f"\nIn {output}: {_NAME}.md, {_NAME}.json, {_NAME}.png")


def run() -> None:
  """Runs `main`."""
  command.run(main, arguments="WORKDIR ...")
