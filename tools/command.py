"""How a tool ends when something is wrong: with a message, not a stack trace.

In: the `main` of a tool. Out: its exit status; 1 for what a user can mend.
"""

from collections.abc import Callable
import signal
import sys

from absl import app

# Anything else is a bug, and shows where.
_MENDABLE = (
  ValueError, TypeError, ImportError, OSError, FloatingPointError, MemoryError
)  # fmt: skip


def run(
  main: Callable[[list[str]], None],
  *,
  check: Callable[[list[str]], None] = lambda argv: None,
  interrupted: str = "",
) -> None:
  """Runs `main` with the flags of the command line.

  With --debug, where a tool has that flag, every error shows where it came
  from.

  Args:
    main: of the tool.
    check: of the arguments, before absl reads them.
    interrupted: what Ctrl-C prints.
  """
  try:
    check(sys.argv[1:])
    app.run(main)
  except KeyboardInterrupt:
    if interrupted:
      print(interrupted, file=sys.stderr)
    sys.exit(128 + signal.SIGINT)
  except _MENDABLE as error:
    if "--debug" in sys.argv:
      raise
    print(f"{type(error).__name__}: {error}", file=sys.stderr)
    sys.exit(1)
