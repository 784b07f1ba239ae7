"""The console script `rag-jax`: finds the command and runs it."""

import ast
import difflib
import importlib
import pathlib
import sys

import rag_jax
from rag_jax import terminal
from rag_jax.commands import COMMANDS
from rag_jax.commands import PROGRAM
from rag_jax.commands.stopping import ending_quietly


def main() -> None:
  """Runs `rag-jax COMMAND ...`, as tools/COMMAND.py is run.

  Exits with 0 after --help, and with 1 if there is no such command.
  """
  name, *rest = sys.argv[1:] or [""]
  sys.argv = [f"{PROGRAM} {name}", *rest]
  if name in ("-h", "--help", "help"):
    print(_overview())
  elif name == "--version":
    print(rag_jax.__version__)
  elif name in COMMANDS:
    with ending_quietly("Stopped."):  # imports take seconds
      module = importlib.import_module(_module(name))
    module.run()
  else:
    print(_no_command(name) if name else _overview(), file=sys.stderr)
    sys.exit(1)


def _module(name: str) -> str:
  return f"rag_jax.commands.{name.replace('-', '_')}"


def _overview() -> str:
  """Returns how `rag-jax` is called, with a line for each command."""
  # The modules are read, not imported, which would take seconds.
  folder = pathlib.Path(__file__).parent
  lines = []
  for name in COMMANDS:
    path = folder / f"{name.replace('-', '_')}.py"
    about = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    lines.append(f"  {name:<15}{(about or '').splitlines()[0]}")
  return "\n".join([
    f"usage: {PROGRAM} COMMAND [--FLAG=VALUE ...] [ARGUMENT ...]",
    "",
    *lines,
    "",
    f"`{PROGRAM} COMMAND --help` shows the flags of a command and an example.",
    f"`{PROGRAM} --version` prints the version.",
  ])  # fmt: skip


def _no_command(name: str) -> str:
  """Returns the message for a command that does not exist."""
  close = difflib.get_close_matches(name.replace("_", "-"), COMMANDS, n=1)
  hint = f" Did you mean {close[0]!r}?" if close else ""
  return (
    f"There is no command {terminal.one_line(name)!r}. Expected one of"
    f" {', '.join(COMMANDS)}.{hint} {PROGRAM} --help says what each does."
  )
