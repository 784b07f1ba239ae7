"""Attributes the time of compiled programs to the JAX operations behind it.

In: a trace of jax.profiler, and XLA's dumps of the programs. Out: a table.
"""

import collections
from collections.abc import Callable
import gzip
import json
import os
import pathlib
import re
from typing import Any

import jax

_TOP = 25  # rows of the table
_NAMED = re.compile(r'^\s*(?:ROOT )?%?([\w.-]+) = .*op_name="([^"]+)"', re.M)


def dump_programs(folder: pathlib.Path) -> None:
  """Makes XLA dump its programs into `folder`. Call before any array exists."""
  flags = f"--xla_dump_to={folder}/hlo --xla_dump_hlo_as_text"
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"


def profile(function: Callable[[], Any], folder: pathlib.Path) -> str:
  """Returns the costs of calling the compiled `function`, as a table."""
  with jax.profiler.trace(str(folder)):
    function()
  names = _op_names(folder / "hlo")
  files = folder.glob("plugins/profile/*/*.trace.json.gz")
  newest = max(files, key=lambda path: path.stat().st_mtime)
  with gzip.open(newest) as f:
    events = [
      event
      for event in json.load(f)["traceEvents"]
      if event.get("ph") == "X" and "hlo_op" in event.get("args", {})
    ]
  secs, counts = collections.defaultdict(float), collections.Counter()
  for event, own in _own_times(events):
    op, module = event["args"]["hlo_op"], event["args"]["hlo_module"]
    what = names.get((module, op), f"{module}: {re.sub(r'[.]?[0-9]+', '', op)}")
    secs[what] += own * 1e-6
    counts[what] += 1
  total = sum(secs.values())
  lines = [f"Time in programs, over all threads: {total:.3f} s\n"]
  lines += ["| s | share | calls | operation |", "| ---: | ---: | ---: | --- |"]
  for what, own in sorted(secs.items(), key=lambda x: -x[1])[:_TOP]:
    share = f"{own / total:.1%}"
    lines.append(f"| {own:.3f} | {share} | {counts[what]} | {what} |")
  return "\n".join(lines)


def _op_names(folder: pathlib.Path) -> dict[tuple[str, str], str]:
  """Returns (program, instruction) -> name, the same for all layers and steps.

  Programs of the same name with different shapes are not distinguished.
  """
  names = {}
  for path in sorted(folder.glob("*after_optimizations.txt")):
    module = path.name.split(".")[1]
    for op, name in _NAMED.findall(path.read_text()):
      names[module, op] = re.sub(r"(layers?)_[0-9]+", r"\1_*", name)
  return names


def _own_times(events: list[Any]) -> list[tuple[Any, float]]:
  """Returns events with their own microseconds, without nested events."""
  events = sorted(events, key=lambda e: (e["tid"], e["ts"], -e["dur"]))
  own = [event["dur"] for event in events]
  open_events: list[int] = []
  for i, event in enumerate(events):
    while open_events:
      outer = events[open_events[-1]]
      same_thread = outer["tid"] == event["tid"]
      if same_thread and event["ts"] < outer["ts"] + outer["dur"]:
        own[open_events[-1]] -= event["dur"]
        break
      open_events.pop()
    open_events.append(i)
  return list(zip(events, own, strict=True))
