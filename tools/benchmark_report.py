"""What benchmark_hf.py measures of a case, and how that is printed."""

from collections.abc import Callable
import statistics
import sys
import time
from typing import Any

_COLUMNS = (
  "case", "size", "ours (s)", "Hugging Face (s)", "ratio", "compile (s)", "same"
)  # fmt: skip


def log(message: str) -> None:
  """Prints how far it is, apart from the results."""
  print(message, file=sys.stderr, flush=True)


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
  """Returns how many seconds `function` took, and what it returned."""
  start = time.perf_counter()
  result = function()
  return time.perf_counter() - start, result


def measure(case: Any, repetitions: int) -> dict[str, Any]:
  """Returns the numbers of one case: medians in seconds, and each run."""
  first, our_result = timed(case.ours)
  warm_up, their_result = timed(case.theirs)
  case.check(our_result, their_result)
  log(f"  first runs: ours {first:.2f} s, Hugging Face {warm_up:.2f} s")
  ours, theirs, same = [], [], []
  for _ in range(repetitions):
    secs, our_result = timed(case.ours)
    hf_secs, their_result = timed(case.theirs)
    ours.append(secs)
    theirs.append(hf_secs)
    same.append(case.same(our_result, their_result))
    log(f"  ours {secs:.3f} s, Hugging Face {hf_secs:.3f} s, {same[-1]:.2g}")
  our_secs, hf_secs = statistics.median(ours), statistics.median(theirs)
  return {
    "ours_secs": our_secs,
    "hf_secs": hf_secs,
    "ratio": hf_secs / our_secs,
    # The first run, less what a run takes.
    "compile_secs": max(first - our_secs, 0.0),
    "same": statistics.median(same),
    "same_is": case.same_is,
    "ours_runs": ours,
    "hf_runs": theirs,
    "note": case.note,
  }


def table(rows: list[dict[str, Any]]) -> str:
  """Returns the rows in Markdown, and what they mean."""
  lines = [_COLUMNS, ("---",) * 2 + ("---:",) * 5]
  meanings: dict[str, list[str]] = {}
  for row in rows:
    share = row["same_is"].startswith("share")
    lines.append((
      row["case"], row["size"], f"{row['ours_secs']:.3g}",
      f"{row['hf_secs']:.3g}", f"{row['ratio']:.2f}",
      f"{row['compile_secs']:.1f}",
      f"{row['same']:.1%}" if share else f"{row['same']:.0e}",
    ))  # fmt: skip
    meanings.setdefault(row["same_is"], []).append(row["case"])
  text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
  text += "\nMedians; ratio is Hugging Face by ours; same is the\n\n"
  for meaning, cases in meanings.items():
    text += f"- {meaning}: {', '.join(dict.fromkeys(cases))}\n"
  for note in dict.fromkeys(row["note"] for row in rows if row["note"]):
    text += f"\n{note}\n"
  return text
