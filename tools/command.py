"""How a tool ends when something is wrong: with a message, not a stack trace.

In: the `main` of a tool. Out: its exit status; 1 for what a user can mend.
"""

from collections.abc import Callable
import signal
import sys

from absl import app

# Anything else is a bug, and shows where.
_MENDABLE = (ValueError, TypeError, ImportError, OSError)


def run(main: Callable[[list[str]], None]) -> None:
  """Runs `main` with the flags of the command line."""
  try:
    app.run(main)
  except KeyboardInterrupt:
    sys.exit(128 + signal.SIGINT)
  except _MENDABLE as error:
    print(f"{type(error).__name__}: {error}", file=sys.stderr)
    sys.exit(1)
