"""The console script: it lists the commands, and runs each as tools/ does."""

import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib

from processes import ROOT
from processes import run_tool
import pytest

import rag_jax
from rag_jax.commands import COMMANDS
from rag_jax.commands import cli


def rag_jax_command(*arguments):
  """Returns the finished process of `python -m rag_jax`."""
  return subprocess.run(
    [sys.executable, "-m", "rag_jax", *arguments],
    env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
    capture_output=True,
    encoding="utf-8",
    timeout=200,
    check=False,
  )


def run_main(monkeypatch, capsys, *arguments):
  """Returns exit code, stdout and stderr of `rag-jax`, in this process."""
  monkeypatch.setattr(sys, "argv", ["/usr/bin/rag-jax", *arguments])
  try:
    cli.main()
    code = 0
  except SystemExit as done:
    code = done.code
  return code, *capsys.readouterr()


def test_an_installation_puts_it_on_the_path():
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())
  assert project["project"]["scripts"] == {
    "rag-jax": "rag_jax.commands.cli:main"
  }
  point = importlib.metadata.EntryPoint(
    "rag-jax", "rag_jax.commands.cli:main", "console_scripts"
  )
  assert point.load() is cli.main


@pytest.mark.parametrize("flag", ["--help", "-h", "help"])
def test_help_lists_every_command_with_a_line(monkeypatch, capsys, flag):
  code, stdout, stderr = run_main(monkeypatch, capsys, flag)
  assert (code, stderr) == (0, "")
  for name in COMMANDS:
    assert re.search(rf"^  {name} +[A-Z].+\.$", stdout, re.M), name
  assert max(map(len, stdout.splitlines())) <= 80
  assert "tools/" not in stdout


def test_every_command_is_a_tool_too():
  tools = {path.stem for path in (ROOT / "tools").glob("*.py")}
  modules = {path.stem for path in (ROOT / "rag_jax/commands").glob("*.py")}
  names = {name.replace("-", "_") for name in COMMANDS}
  assert names <= tools
  others = {
    "__init__", "cli", "command", "config_flag", "model_flags", "stopping"
  }  # fmt: skip
  assert modules - names == others


def test_the_version_is_that_of_the_package(monkeypatch, capsys):
  done = run_main(monkeypatch, capsys, "--version")
  assert done == (0, f"{rag_jax.__version__}\n", "")


def test_without_a_command_the_list_is_an_error(monkeypatch, capsys):
  code, stdout, stderr = run_main(monkeypatch, capsys)
  assert (code, stdout) == (1, "")
  assert stderr.startswith("usage: rag-jax COMMAND ")


@pytest.mark.parametrize(
  ("given", "hint"),
  [
    ("trian", " Did you mean 'train'? "),
    ("mine_negative", " Did you mean 'mine-negatives'? "),
    ("build_index", " Did you mean 'build-index'? "),
    ("x\x1b[2J", " plan. rag-jax --help"),
  ],
)
def test_an_unknown_command_is_refused(monkeypatch, capsys, given, hint):
  code, stdout, stderr = run_main(monkeypatch, capsys, given)
  assert (code, stdout) == (1, "")
  assert stderr.startswith("There is no command '")
  expected = (
    "Expected one of train, ask, evaluate, compare, probe, build-index,"
  )
  assert expected in stderr
  assert hint in stderr
  assert stderr.count("\n") == 1
  assert "\x1b" not in stderr


def test_the_help_of_a_command_is_that_of_the_tool_by_another_name():
  tool, command = run_tool("search.py", "-h"), rag_jax_command("search", "-h")
  assert (command.returncode, command.stderr) == (0, "")
  lines = command.stdout.splitlines()
  assert lines[0] == (
    "usage: rag-jax search --index=INDEX [--FLAG=VALUE ...] QUESTION ... | -"
  )
  assert '  rag-jax search --index=runs/index "what does the' in command.stdout
  assert "tools/" not in command.stdout
  ours, theirs = "rag-jax search", "python tools/search.py"
  assert tool.stdout.replace(theirs, ours) == command.stdout


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (
      ["train", "--config=configs/quikstart.py", "--workdir=x"],
      r"FileNotFoundError: There is no config file configs/quikstart\.py\.",
    ),
    (
      ["train", "--config=configs/quickstart.py", "--workdir=x", "more"],
      r"ValueError: Unexpected arguments: \['more'\]\. Expected flags alone",
    ),
    (
      ["ask", "--workdir=missing", "Who?"],
      r"FileNotFoundError: No config.json in missing; expected .* Train first:"
      r" rag-jax train --config=configs/quickstart\.py",
    ),
    (
      ["search", "--index=missing", "a"],
      r"FileNotFoundError: .*: rag-jax build-index --output=DIRECTORY\.",
    ),
  ],
)
def test_what_a_user_can_mend_is_a_message(arguments, message):
  done = rag_jax_command(*arguments)
  assert (done.returncode, done.stdout) == (1, "")
  assert "Traceback" not in done.stderr
  assert re.match(message, done.stderr.splitlines()[-1]), done.stderr


def test_a_missing_flag_is_named():
  done = rag_jax_command("search", "a")
  assert done.returncode == 1
  assert "--index" in done.stderr
  assert "Traceback" not in done.stderr
