"""How a tool begins and ends: its help, what it prints, what went wrong.

In: the `main` of a tool. Out: its exit status; 0 for --help, 1 for what a user
can mend, with a message instead of a stack trace.

Everything that a tool prints or logs goes through rag_jax/terminal.py, so that
no passage, id or question can control the terminal.
"""

from collections.abc import Callable
import os
import pathlib
import re
import signal
import sys
from typing import TextIO, cast

from absl import app
from absl import flags

from rag_jax import terminal

# Anything else is a bug, and shows where.
_MENDABLE = (ValueError, TypeError, ImportError, OSError, FloatingPointError)

_HELP = re.compile(r"--?(?:h|\?|help|helpshort|helpfull)(?:=true)?")

# Before libraries are imported: what they say of PyTorch, and of TensorFlow's
# and XLA's start, is for nobody who uses a tool.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


def run(
  main: Callable[[list[str]], None],
  *,
  arguments: str = "",
  check: Callable[[list[str]], None] = lambda argv: None,
  interrupted: str = "",
) -> None:
  """Runs `main` with the flags of the command line.

  With --debug, where a tool has that flag, every error shows where it came
  from.

  Args:
    main: of the tool.
    arguments: what the tool takes beside flags, as its usage line shows it.
    check: of the arguments, before absl reads them.
    interrupted: what Ctrl-C prints.
  """
  sys.stdout = cast(TextIO, terminal.PrintableStream(sys.stdout))
  terminal.clean_log()
  try:
    given = sys.argv[1:]
    flags_alone = given[: given.index("--")] if "--" in given else given
    if any(_HELP.fullmatch(argument) for argument in flags_alone):
      print(_help(arguments, full="full" in "".join(flags_alone)))
      return
    check(given)
    app.run(main)
  except KeyboardInterrupt:
    if interrupted:
      print(interrupted, file=sys.stderr)
    sys.exit(128 + signal.SIGINT)
  except _MENDABLE as error:
    if "--debug" in sys.argv:
      raise
    message = f"{type(error).__name__}: {error}"
    print(terminal.printable(message), file=sys.stderr)
    sys.exit(1)


def _help(arguments: str, *, full: bool) -> str:
  """Returns the usage line, what the tool does with examples, its flags."""
  known = flags.FLAGS
  required = [
    f"--{flag.name}={flag.name.upper()}"
    for flag in known.get_key_flags_for_module(sys.argv[0])
    if any("other than None" in v.message for v in flag.validators)
  ]
  name = pathlib.Path(sys.argv[0]).name
  usage = ["usage: python", f"tools/{name}", *required, "[--FLAG=VALUE ...]"]
  text = known.get_help() if full else known.main_module_help()
  about = (sys.modules["__main__"].__doc__ or "").strip()
  return "\n\n".join([" ".join([*usage, arguments]).strip(), about, text])
