"""Ctrl-C ends every command with one line and exit status 130."""

import os
import signal
import subprocess
import sys
import time

from processes import ROOT
import pytest

from rag_jax.commands.stopping import ending_quietly

# What a command has open when Ctrl-C comes, and what runs when it ends.
TOOL = '''
import atexit, signal, sys, time
from rag_jax.commands import command

def wait(what, secs):
  print(what, flush=True)
  until = time.monotonic() + secs
  while time.monotonic() < until:
    time.sleep(0.01)

def main(argv):
  """Waits."""
  atexit.register(wait, "exit", float(sys.argv[2]))
  try:
    wait("main", 60)
  finally:
    wait("close", float(sys.argv[1]))

# As in a terminal; started in the background, Python ignores Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
command.run(main, arguments="SECS SECS")
'''


@pytest.mark.parametrize(
  ("secs", "signal_at", "printed"),
  [
    ((0, 0), ["main"], ["main", "close", "exit"]),
    ((60, 0), ["main", "close"], ["main", "close"]),
    ((0, 60), ["main", "exit"], ["main", "close", "exit"]),
    ((60, 60), ["main", "close", "close"], ["main", "close"]),
  ],
)
def test_ctrl_c_ends_with_one_line_however_often_it_comes(
  tmp_path, secs, signal_at, printed
):
  (tmp_path / "tool.py").write_text(TOOL)
  output = tmp_path / "output"
  with (
    output.open("w") as out,
    subprocess.Popen(
      [sys.executable, tmp_path / "tool.py", *map(str, secs)],
      env=os.environ | {"PYTHONPATH": str(ROOT)},
      stdout=out,
      stderr=subprocess.PIPE,
      text=True,
    ) as process,
  ):
    for moment in signal_at:
      until = time.monotonic() + 100
      while moment not in output.read_text() and time.monotonic() < until:
        time.sleep(0.01)
      process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
  assert (process.returncode, errors) == (130, "Stopped.\n")
  assert output.read_text().split() == printed


def test_a_handler_that_is_set_already_stays():
  came = []
  before = signal.signal(signal.SIGINT, lambda *_: came.append(1))
  try:
    with ending_quietly("Stopped."):
      signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)
  finally:
    signal.signal(signal.SIGINT, before)
  assert came == [1, 1]


def test_ctrl_c_while_the_line_is_written_does_not_repeat_it():
  program = """
import os, signal
from rag_jax.commands.stopping import ending_quietly

write = os.write

def write_and_interrupt(*args):
  written = write(*args)
  signal.raise_signal(signal.SIGINT)
  return written

signal.signal(signal.SIGINT, signal.default_int_handler)
os.write = write_and_interrupt
with ending_quietly("Stopped."):
  try:
    signal.raise_signal(signal.SIGINT)
  finally:
    signal.raise_signal(signal.SIGINT)
"""
  done = subprocess.run(
    [sys.executable, "-c", program],
    env=os.environ | {"PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
    timeout=60,
    check=False,
  )
  assert (done.returncode, done.stderr) == (130, "Stopped.\n")
