"""How each command begins and ends: help, what is printed, what went wrong."""

import ast
import os
import platform
import re
import subprocess
import sys

from processes import ROOT
from processes import run_tool
import pytest

TOOLS = sorted(
  path
  for path in (ROOT / "tools").glob("*.py")
  if '__name__ == "__main__"' in path.read_text()
)
COMMANDS = ROOT / "rag_jax" / "commands"
TOOL = '''"""Does a thing.

  python tools/thing.py --input=FILE
"""
from absl import flags
from rag_jax.commands import command
INPUT = flags.DEFINE_string("input", None, "What is read.")
flags.mark_flag_as_required("input")
def main(argv):
  print("shown\\x1b]52;c;eA==\\x07\\u202e", argv[1:])
  raise ValueError(f"{INPUT.value} is \\x1b[1mbad.")
if __name__ == "__main__":
  command.run(main, arguments="[QUESTION ...]")
'''


@pytest.mark.parametrize("path", TOOLS, ids=lambda path: path.stem)
def test_every_tool_runs_by_command_and_has_an_example(path):
  text, example = path.read_text(), f"  python tools/{path.name}"
  if (COMMANDS / path.name).exists():  # what rag-jax runs too
    assert f"from rag_jax.commands.{path.stem} import run\n" in text
    text = (COMMANDS / path.name).read_text()
    example = f"  rag-jax {path.stem.replace('_', '-')} --"
  assert example in (ast.get_docstring(ast.parse(text), clean=False) or "")
  assert "command.run(" in text
  assert "app.run(" not in text


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """Returns a function that runs a small tool as a process."""
  path = tmp_path_factory.mktemp("tools") / "thing.py"
  path.write_text(TOOL)

  def run_thing(*arguments):
    return subprocess.run(
      [sys.executable, path, *arguments],
      env=os.environ | {"PYTHONPATH": str(ROOT)},
      capture_output=True,
      encoding="utf-8",
      check=False,
      timeout=100,
    )

  return run_thing


@pytest.mark.parametrize(
  "flag", ["--help", "-h", "--helpshort", "--helpfull", "--help=1"]
)
def test_help_is_no_error_and_begins_with_a_usage_line(run, flag):
  done = run(flag)
  assert (done.returncode, done.stderr) == (0, "")
  lines = done.stdout.splitlines()
  assert lines[0] == (
    "usage: python tools/thing.py --input=INPUT [--FLAG=VALUE ...]"
    " [QUESTION ...]"
  )
  assert "  python tools/thing.py --input=FILE" in lines
  assert "  --input: What is read." in lines
  assert ("--log_dir" in done.stdout) == (flag == "--helpfull")


@pytest.mark.parametrize("tool", ["search.py", "build_index.py"])
def test_flags_that_tools_share_are_in_their_help(tool):
  done = run_tool(tool, "--help")
  assert done.returncode == 0
  for name in ("stemmer", "stop_words", "k1", "b"):
    assert re.search(rf"^\s+--(\[no\])?{name}:", done.stdout, re.M), done.stdout


def test_what_a_tool_prints_cannot_control_the_terminal(run):
  done = run("--input=\x1b[2Jx", "--", "--help")
  assert done.returncode == 1
  assert done.stdout == "shown ['--help']\n"
  assert done.stderr == "ValueError: x is bad.\n"


def test_a_reader_that_has_read_enough_is_no_error(tmp_path):
  (tmp_path / "long.py").write_text(
    "from rag_jax.commands import command\n"
    "def main(argv):\n"
    "  for number in range(100_000):\n"
    "    print(number)\n"
    "command.run(main)\n"
  )
  done = subprocess.run(
    f"{sys.executable} {tmp_path}/long.py | head -1",
    shell=True,
    env=os.environ | {"PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
    check=False,
  )
  assert (done.stdout, done.stderr) == ("0\n", "")


def test_a_missing_flag_is_named(run):
  done = run()
  assert done.returncode == 1
  assert "--input" in done.stderr
  assert "Traceback" not in done.stderr


ASKS = '''"""Asks.

  python tools/asks.py QUESTION
"""
from rag_jax.commands import command
def main(argv):
  for question in command.questions(argv[1:]):
    print(ascii(question))
if __name__ == "__main__":
  command.run(main, arguments="[QUESTION ...]")
'''


@pytest.mark.parametrize(
  ("arguments", "given", "place"),
  [
    ([b"who", b"\xff\xfe?"], b"", "Question 2 of the command line"),
    ([b"a\xed\xa0\x80"], b"", "Question 1 of the command line"),
    ([b"-"], b"who\n\xe9t\xe9\n", "Line 2 of standard input"),
    ([b"-"], "who?\n".encode("utf-16-le"), "Line 1 of standard input"),
  ],
)
def test_a_question_that_is_not_utf8_is_named_by_its_place(
  tmp_path, arguments, given, place
):
  (tmp_path / "asks.py").write_text(ASKS)
  done = subprocess.run(
    [os.fsencode(sys.executable), tmp_path / "asks.py", *arguments],
    env=os.environ | {"PYTHONPATH": str(ROOT)},
    input=given,
    capture_output=True,
    check=False,
    timeout=100,
  )
  assert done.returncode == 1
  message = done.stderr.decode()
  assert message.startswith(f"ValueError: {place} holds "), message
  assert "Expected text in UTF-8" in message
  assert message.count("\n") == 1


# Takes, fills and frees what XLA does in a step, in a thread as XLA does.
_STEPS = """
import ctypes
import resource
import sys
import threading

from rag_jax.commands import command

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]

def step():
  block = libc.malloc(300_000_000)
  libc.memset(block, 1, 300_000_000)
  libc.free(block)

def faults():
  return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

if sys.argv[1] == "keep":
  command.keep_freed_memory()
counts = []
for _ in range(4):
  before = faults()
  thread = threading.Thread(target=step)
  thread.start()
  thread.join()
  counts.append(faults() - before)
print(*counts)
"""


@pytest.mark.skipif(
  platform.libc_ver()[0] != "glibc", reason="another C library"
)
def test_freed_memory_is_kept_when_asked():
  def faults(how):
    done = subprocess.run(
      [sys.executable, "-c", _STEPS, how],
      env=os.environ | {"PYTHONPATH": str(ROOT)},
      capture_output=True,
      encoding="utf-8",
      check=True,
      timeout=100,
    )
    return [int(number) for number in done.stdout.split()]

  # A page is 4 kB, or 64 kB on some machines.
  assert min(faults("as it is")) > 4_000
  assert max(faults("keep")[1:]) < 100
