"""How a tool begins and ends: its help, what it prints, what went wrong.

In: the `main` of a tool. Out: its exit status; 0 for --help, 1 for what a user
can mend, with a message instead of a stack trace.

Everything that a tool prints or logs goes through rag_jax/terminal.py, so that
no passage, id or question can control the terminal.
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import ctypes
import dataclasses
import os
import pathlib
import re
import signal
import sys
from typing import TextIO, cast

from absl import app
from absl import flags

from rag_jax import terminal
from rag_jax.corpus.records import check_text
from rag_jax.retrieval.bm25 import Bm25Settings
from rag_jax.retrieval.bm25 import check_settings
from rag_jax.retrieval.bm25 import read_stop_words

# Numbers of malloc.h. One heap for all threads, since only the first of them
# grows by more than 64 MB; nothing outside of it, nothing given back.
_M_ARENA_MAX, _M_MMAP_MAX, _M_TRIM_THRESHOLD = -8, -4, -1
_MALLOPT = {_M_ARENA_MAX: 1, _M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: 2**31 - 1}

# Anything else is a bug, and shows where.
_MENDABLE = (
  ValueError, TypeError, ImportError, OSError, FloatingPointError, MemoryError
)  # fmt: skip


_HELP = re.compile(r"--?(?:h|\?|help|helpshort|helpfull)(?:=true)?")

# Before libraries are imported: what TensorFlow and XLA say of their start is
# for nobody who uses a tool.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


FIT_HYBRID = (
  "Questions with known passages or answers, to weigh embeddings and words with"
  " in hybrid search; the weights, and which mode is best, are kept."
)

# The flags defined here are those of the tools that ask for them.
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


def define_word_flags() -> Callable[[Bm25Settings], Bm25Settings]:
  """Defines the flags of BM25; returns what puts those given into settings."""
  given = {
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

  def settings(defaults: Bm25Settings) -> Bm25Settings:
    values = {k: f.value for k, f in given.items() if f.value is not None}
    if "stop_words" in values:
      values["stop_words"] = read_stop_words(values["stop_words"])
    return check_settings(dataclasses.replace(defaults, **values))

  return settings


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
