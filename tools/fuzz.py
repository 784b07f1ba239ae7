r"""Feeds damaged files to everything that reads files, and says what fails.

  python tools/fuzz.py                          # all targets, until Ctrl-C
  python tools/fuzz.py --target=readers --seconds=60
  python tools/fuzz.py --target=hf --seed=7 --first=123 --cases=1

The targets are readers, configs, manifests, hf, html and office; see
tools/fuzz_targets.py. A failure is anything but a documented error, a case that
takes too long, or too much memory. Each is printed with the flags that repeat
it. Exits with 1 if there was one.
"""

import pathlib
import resource
import secrets
import sys
import tempfile
import time

from absl import flags
from absl import logging
import fuzz_targets

from rag_jax.commands import command

_ALL = list(fuzz_targets.TARGETS)
_TARGET = flags.DEFINE_multi_enum("target", _ALL, _ALL, "What reads.")
_SEED = flags.DEFINE_integer("seed", -1, "Of all cases; -1: a new one.")
_FIRST = flags.DEFINE_integer("first", 0, "Number of the first case.")
_CASES = flags.DEFINE_integer("cases", 0, "For each target; 0: no limit.")
_SECONDS = flags.DEFINE_float("seconds", 0.0, "In all; 0: no limit.")
_MEMORY = flags.DEFINE_integer("memory_gib", 8, "That the process may take.")

_ROUND = 200  # cases of a target before the next has its turn


def main(argv: list[str]) -> None:
  """Runs the command."""
  logging.set_verbosity(logging.ERROR)
  limit = _MEMORY.value << 30
  resource.setrlimit(resource.RLIMIT_AS, (limit << 2, limit << 2))
  seed = secrets.randbits(32) if _SEED.value < 0 else _SEED.value
  print(f"--seed={seed}", flush=True)
  start = time.monotonic()
  first, stop = _FIRST.value, _FIRST.value + (_CASES.value or sys.maxsize >> 1)
  num_cases = num_failures = 0
  while first < stop:
    cases = range(first, min(first + _ROUND, stop))
    for name in _TARGET.value:
      with tempfile.TemporaryDirectory() as work:
        for failure in fuzz_targets.fuzz(
          name, seed, cases, pathlib.Path(work) / name
        ):
          num_cases += 1
          if failure is not None:
            num_failures += 1
            print(f"\nFAILURE {failure}", flush=True)
          if 0 < _SECONDS.value < time.monotonic() - start:
            first = stop
            break
      if first == stop:
        break
    first = max(first, cases.stop)
    print(f"{num_cases:,} cases, {num_failures} failures", flush=True)
  sys.exit(1 if num_failures else 0)


if __name__ == "__main__":
  command.run(main, interrupted="Stopped.")
