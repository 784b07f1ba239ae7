"""Runs the `main` of a command: its flags, its help, its output, its errors.

In: the `main` of a command, or of a script in tools/. Out: its exit status: 0
for --help; 1 for an error that a user can correct, with a message instead of a
stack trace. Everything that a command prints or logs goes through
rag_jax/terminal.py, so that no passage, id or question can control the
terminal. A command with the flags of `define_pod_flags` joins the other hosts
here, before its `main`.
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
import traceback
from typing import Any, TextIO, cast

from absl import app
from absl import flags

from rag_jax import terminal
from rag_jax.commands import PROGRAM
from rag_jax.commands.stopping import ending_quietly
from rag_jax.corpus.text_files import check_text

# Constants of malloc.h. All threads use one heap, since only the first heap can
# grow beyond 64 MB; nothing is allocated outside of it or given back.
_M_ARENA_MAX, _M_MMAP_MAX, _M_TRIM_THRESHOLD = -8, -4, -1
_MALLOPT = {_M_ARENA_MAX: 1, _M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: 2**31 - 1}

# Any other exception is a bug, and shows its stack trace.
_MENDABLE = (
  ValueError, TypeError, ImportError, OSError, FloatingPointError, MemoryError
)  # fmt: skip


_HELP = re.compile(r"--?(?:h|\?|help|helpshort|helpfull)(?:=\w+)?")

FIT_HYBRID = (
  "File of questions with known passages or answers, to fit the weights of"
  " hybrid search to. The weights and the best mode are stored with the index."
)

# A flag that is defined here belongs to the command that asked for it.
flags.disclaim_key_flags()


def keep_freed_memory() -> None:
  """Lets the C library keep freed memory, for the next allocation.

  On a CPU, XLA allocates the memory of a training step when the step begins and
  frees it when it ends. glibc gives so large a block back to the kernel, which
  fills its pages with zeros in the next step: up to a third of the time of a
  step of configs/quickstart.py. It has an effect on Linux with glibc only. Call
  it before other threads are started.
  """
  with contextlib.suppress(OSError, AttributeError, TypeError):
    mallopt = ctypes.CDLL(None).mallopt
    for parameter, value in _MALLOPT.items():
      mallopt(parameter, value)


def define_word_flags() -> Callable[[], dict[str, Any]]:
  """Defines the flags of BM25; returns a function for the values given."""
  flags_by_name = {
    "stemmer": flags.DEFINE_string(
      "stemmer", None, "BM25: the language whose word endings are cut off."
    ),
    "stop_words": flags.DEFINE_string(
      "stop_words",
      None,
      "BM25: words to leave out: a language (english), a file, or words between"
      " commas.",
    ),
    "k1": flags.DEFINE_float(
      "k1", None, "BM25: how much repeated words count."
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


def define_pod_flags() -> None:
  """Defines the flags with which a command runs on every host of a pod."""
  flags.DEFINE_bool(
    "distributed", False, "On every host of a pod: join the other hosts first."
  )
  flags.DEFINE_string(
    "coordinator", "", "With --distributed where JAX finds no pod itself (it"
    " does on Cloud TPU, GKE, Slurm, Open MPI): HOST:PORT of process 0.",
  )  # fmt: skip
  flags.DEFINE_integer(
    "num_processes", 0, "As --coordinator: how many processes there are."
  )
  flags.DEFINE_integer(
    "process_id", -1, "As --coordinator: the number of this process, from 0."
  )
  flags.DEFINE_integer(
    "join_secs", 300, "Seconds to wait for all hosts to join.", lower_bound=1
  )


# Flags that may differ between the hosts of a pod, besides those of absl.
_OF_A_HOST = frozenset({"process_id", "cache_dir", "join_secs"})


def _join_pod(argv: list[str]) -> None:
  """Joins the other hosts, if the command has --distributed and it is given.

  Raises:
    ValueError: there are none, or they run something else.
  """
  values = flags.FLAGS.flag_values_dict()
  if not values.get("distributed"):
    return
  from rag_jax import pod  # imports JAX, which --help does not wait for

  pod.join(
    _settings(argv),
    coordinator=values["coordinator"],
    num_processes=values["num_processes"],
    process_id=values["process_id"],
    join_secs=values["join_secs"],
  )


def _settings(argv: list[str]) -> dict[str, str]:
  """Returns, by name, what has to be equal on all hosts of a pod."""
  settings = {"the arguments": repr(argv[1:])}
  for name, value in flags.FLAGS.flag_values_dict().items():
    module = flags.FLAGS.find_module_defining_flag(name) or ""
    if name in _OF_A_HOST or module.startswith("absl"):
      continue
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
      tree = dataclasses.asdict(value)
      settings |= {
        f"--{name}.{path}": repr(leaf) for path, leaf in _leaves(tree)
      }
    else:
      settings[f"--{name}"] = repr(value)
  return settings


def _leaves(tree: dict[str, Any]) -> Iterator[tuple[str, Any]]:
  """Yields ("optimizer.peak_lr", 1e-4) of every setting."""
  for name, value in tree.items():
    if isinstance(value, dict):
      yield from ((f"{name}.{path}", leaf) for path, leaf in _leaves(value))
    else:
      yield name, value


def _end_pod(status: int, message: str) -> None:
  """Ends all processes, if this one has joined others."""
  if "rag_jax.pod" in sys.modules:
    sys.modules["rag_jax.pod"].end(status, message)


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
  # Python would stop at the first byte that is not UTF-8, without its place.
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
  interrupted: str = "Stopped.",
  agreed: tuple[type[Exception], ...] = (),
) -> None:
  """Runs `main` with the flags of the command line.

  If a command has the flag --debug, it shows the stack trace of every error.
  With --distributed an error on one host ends the command on all of them.

  Args:
    main: of the command, in the module that defines its flags.
    arguments: the arguments that are not flags, as the usage line shows them;
      "": none.
    check: checks the arguments before absl reads them.
    interrupted: the message after Ctrl-C.
    agreed: exceptions that all hosts of a pod raise together, so that none has
      to end the others. They are not handled here.
  """
  sys.stdout = cast(TextIO, terminal.PrintableStream(sys.stdout))
  terminal.clean_log()

  def checked(argv: list[str]) -> None:
    if len(argv) > 1 and not arguments:
      raise ValueError(
        f"Unexpected arguments: {argv[1:]}. Expected flags alone, such as"
        " --NAME=VALUE; --help lists them. Remove the others."
      )
    _join_pod(argv)
    main(argv)
    sys.stdout.flush()

  with ending_quietly(interrupted):
    _run(main, checked, arguments, check, agreed)


def _run(
  main: Callable[[list[str]], None],
  checked: Callable[[list[str]], None],
  arguments: str,
  check: Callable[[list[str]], None],
  agreed: tuple[type[Exception], ...],
) -> None:
  """Runs `checked`, which calls `main`; prints an error as one message."""
  try:
    given = sys.argv[1:]
    flags_alone = given[: given.index("--")] if "--" in given else given
    if any(_HELP.fullmatch(argument) for argument in flags_alone):
      print(_help(main, arguments, full="full" in "".join(flags_alone)))
      return
    check(given)
    app.run(checked)
  except BrokenPipeError:  # of `| head`, which has read enough
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what is still buffered
    sys.exit(128 + signal.SIGPIPE)
  except KeyboardInterrupt:
    _end_pod(128 + signal.SIGINT, "somebody pressed Ctrl-C.")
    raise
  except agreed:
    raise
  except Exception as error:
    message = terminal.printable(f"{type(error).__name__}: {error}")
    if "--debug" in sys.argv or not _is_mendable(error):
      if "rag_jax.pod" in sys.modules:
        traceback.print_exc()
      _end_pod(1, message)
      raise
    print(message, file=sys.stderr)
    _end_pod(1, message)
    sys.exit(1)


def _is_mendable(error: Exception) -> bool:
  """Returns whether a user can correct it, here or on another host."""
  others = sys.modules.get("rag_jax.processes")  # imports JAX: not for --help
  of_other = others is not None and isinstance(error, others.OtherProcessError)
  return of_other or isinstance(error, _MENDABLE)


def _help(
  main: Callable[[list[str]], None], arguments: str, *, full: bool
) -> str:
  """Returns the usage line, the description with examples, and the flags."""
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
  about = (module.__doc__ or "").strip()
  return "\n\n".join([f"{usage} {arguments}".strip(), about, text])
