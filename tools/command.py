"""How a tool ends when something is wrong: with a message, not a stack trace.

In: the `main` of a tool. Out: its exit status; 1 for what a user can mend.
"""

from collections.abc import Callable, Iterator, Sequence
import signal
import sys

from absl import app

from rag_jax.corpus.records import check_text

# Anything else is a bug, and shows where.
_MENDABLE = (
  ValueError, TypeError, ImportError, OSError, FloatingPointError, MemoryError
)  # fmt: skip


def questions(arguments: Sequence[str]) -> Iterator[str]:
  """Yields the questions of a command line; of standard input if it is "-".

  Raises:
    ValueError: one of them is not UTF-8.
  """
  if list(arguments) != ["-"]:
    for number, argument in enumerate(arguments, start=1):
      check_text(argument, f"Question {number} of the command line")
      yield argument
    return
  # By hand: Python ends at the first byte that is no UTF-8, without a place.
  for number, raw in enumerate(sys.stdin.buffer, start=1):
    text = raw.decode(
      "utf-8-sig" if number == 1 else "utf-8", "surrogateescape"
    )
    if text.strip():
      check_text(text, f"Line {number} of standard input")
      yield text.strip()


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
