"""How a command begins and ends: its help, what it prints, what went wrong.

In: the `main` of a command, or of a script in tools/. Out: its exit status; 0
for --help, 1 for what a user can mend, with a message instead of a stack trace.

Everything that a command prints or logs goes through rag_jax/terminal.py, so
that no passage, id or question can control the terminal.
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import ctypes
import pathlib
import re
import signal
import sys
from typing import Any, TextIO, cast

from absl import app
from absl import flags

from rag_jax import terminal
from rag_jax.commands import COMMANDS
from rag_jax.commands import PROGRAM
from rag_jax.corpus.text_files import check_text

# Numbers of malloc.h. One heap for all threads, since only the first of them
# grows by more than 64 MB; nothing outside of it, nothing given back.
_M_ARENA_MAX, _M_MMAP_MAX, _M_TRIM_THRESHOLD = -8, -4, -1
_MALLOPT = {_M_ARENA_MAX: 1, _M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: 2**31 - 1}

# Anything else is a bug, and shows where.
_MENDABLE = (
  ValueError, TypeError, ImportError, OSError, FloatingPointError, MemoryError
)  # fmt: skip


_HELP = re.compile(r"--?(?:h|\?|help|helpshort|helpfull)(?:=true)?")

# What messages and examples call the commands.
_TOOL = re.compile(
  "(?:python )?tools/"
  f"({'|'.join(name.replace('-', '_') for name in COMMANDS)})\\.py"
)

FIT_HYBRID = (
  "Questions with known passages or answers, to weigh embeddings and words with"
  " in hybrid search; the weights, and which mode is best, are kept."
)

# The flags defined here are those of the commands that ask for them.
flags.disclaim_key_flags()


def keep_freed_memory() -> None:
  """Lets the C library keep what is freed, for what is allocated next.

  XLA takes the memory of a training step on a CPU when the step begins and
  frees it when it ends. glibc gives so large a part back to the kernel, which
  fills it with zeros, page by page, in the next step: up to a third of the
  time of a step of configs/quickstart.py. Without effect outside of Linux with
  glibc. Call it before other threads are started.
  """
  with contextlib.suppress(OSError, AttributeError, TypeError):
    mallopt = ctypes.CDLL(None).mallopt
    for parameter, value in _MALLOPT.items():
      mallopt(parameter, value)


def define_word_flags() -> Callable[[], dict[str, Any]]:
  """Defines the flags of BM25; returns what gives the values of those given."""
  flags_by_name = {
    "stemmer": flags.DEFINE_string(
      "stemmer", None, "BM25: the language whose word endings are cut off."
    ),
    "stop_words": flags.DEFINE_string(
      "stop_words",
      None,
      "BM25 leaves out those of a language (english), a file, or some between"
      " commas.",
    ),
    "k1": flags.DEFINE_float(
      "k1", None, "BM25: how much a word counts that is there again."
    ),
    "b": flags.DEFINE_float(
      "b", None, "BM25: how much long passages are marked down, 0 to 1."
    ),
  }
  return lambda: {
    name: flag.value
    for name, flag in flags_by_name.items()
    if flag.value is not None
  }


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
    text = raw.decode("utf-8", "surrogateescape").removeprefix("\ufeff")
    if text.strip():
      check_text(text, f"Line {number} of standard input")
      yield text.strip()


def as_called(text: str) -> str:
  """Returns `text` with the commands named as this one was called.

  "python tools/train.py" is "rag-jax train" for who called `rag-jax`.
  """
  if not sys.argv[0].startswith(f"{PROGRAM} "):
    return text
  return _TOOL.sub(lambda m: f"{PROGRAM} {m[1].replace('_', '-')}", text)


def run(
  main: Callable[[list[str]], None],
  *,
  arguments: str = "",
  check: Callable[[list[str]], None] = lambda argv: None,
  interrupted: str = "",
) -> None:
  """Runs `main` with the flags of the command line.

  With --debug, where a command has that flag, every error shows where it came
  from.

  Args:
    main: of the command, in the module that defines its flags.
    arguments: what the command takes beside flags, as its usage line shows it;
      "": nothing.
    check: of the arguments, before absl reads them.
    interrupted: what Ctrl-C prints.
  """
  sys.stdout = cast(TextIO, terminal.PrintableStream(sys.stdout))
  terminal.clean_log()

  def checked(argv: list[str]) -> None:
    if len(argv) > 1 and not arguments:
      raise ValueError(
        f"Unexpected arguments: {argv[1:]}. Expected flags alone, such as"
        " --NAME=VALUE; --help lists them. Remove the rest."
      )
    main(argv)

  try:
    given = sys.argv[1:]
    flags_alone = given[: given.index("--")] if "--" in given else given
    if any(_HELP.fullmatch(argument) for argument in flags_alone):
      print(_help(main, arguments, full="full" in "".join(flags_alone)))
      return
    check(given)
    app.run(checked)
  except KeyboardInterrupt:
    if interrupted:
      print(interrupted, file=sys.stderr)
    sys.exit(128 + signal.SIGINT)
  except _MENDABLE as error:
    if "--debug" in sys.argv:
      raise
    message = as_called(f"{type(error).__name__}: {error}")
    print(terminal.printable(message), file=sys.stderr)
    sys.exit(1)


def _help(
  main: Callable[[list[str]], None], arguments: str, *, full: bool
) -> str:
  """Returns the usage line, what the command does with examples, its flags."""
  known, module = flags.FLAGS, sys.modules[main.__module__]
  # absl knows the flags of a script by its path.
  owner = sys.argv[0] if main.__module__ == "__main__" else main.__module__
  required = [
    f"--{flag.name}={flag.name.upper()}"
    for flag in known.get_key_flags_for_module(owner)
    if any("other than None" in v.message for v in flag.validators)
  ]
  called = f"python tools/{pathlib.Path(sys.argv[0]).name}"
  if sys.argv[0].startswith(f"{PROGRAM} "):
    called = sys.argv[0]
  usage = " ".join(["usage:", called, *required, "[--FLAG=VALUE ...]"])
  text = known.get_help() if full else known.module_help(owner)
  text = text.replace(f"{owner}:", f"{called}:", 1)
  about = as_called((module.__doc__ or "").strip())
  return "\n\n".join([f"{usage} {arguments}".strip(), about, text])
