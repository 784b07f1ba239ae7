"""Processes that join, or cannot: all of them end, and say who is in the way.

Run as a program, this file joins a pod and does what its arguments say.
"""

import json
import os
import re
import signal
import sys
import time

from processes import ROOT
from processes import free_port
from processes import run_hosts
import pytest

from rag_jax import pod

HEARTBEAT_SECS = 10  # where a process is killed


def main(
  port, count, number, settings, act, heartbeat_secs="60", join_secs="60"
):
  if act == "other code":
    pod.code_version = lambda: {"the code of rag_jax": "0123"}
  try:
    pod.join(
      json.loads(settings),
      coordinator=f"localhost:{port}",
      num_processes=int(count),
      process_id=int(number),
      join_secs=int(join_secs),
      heartbeat_secs=int(heartbeat_secs),
    )
    sys.stdout.write("all here\n")
    if act == "fail":
      raise ValueError("the disk is full")
    if act == "die":
      os.kill(os.getpid(), signal.SIGKILL)
    if act == "wait":
      time.sleep(60)
  except ValueError as error:
    sys.stdout.write(f"{error}\n")
    pod.end(3, str(error))


def join(*acts, settings=None, heartbeat_secs=60):
  """Returns what happens to processes that do `acts`, one each."""
  port, given = free_port(), settings or [{}] * len(acts)
  return run_hosts(
    [
      (__file__, port, len(acts), number, json.dumps(given[number]), act,
       heartbeat_secs)
      for number, act in enumerate(acts)
    ]
  )  # fmt: skip


def test_processes_that_run_the_same_join_and_end():
  for status, text, _ in join("", "", settings=[{"--a": "1"}] * 2):
    assert (status, "all here" in text) == (0, True), text


def test_one_that_never_joins_ends_the_others_in_the_time_given():
  port = free_port()
  for number in (0, 1):  # the one that the others report to, and another
    command = (__file__, port, 2, number, "{}", "", 60, 3)
    [(status, text, secs)] = run_hosts([command])
    assert (status, "all here" in text) == (1, False)
    assert secs < 30
    for said in ("all of the 2 processes joined within 3 seconds",
                 f"is process {number}", f"localhost:{port}",
                 "started on all", "--join_secs"):  # fmt: skip
      assert said in text


def test_other_settings_are_named_on_every_host():
  settings = [{"--lr": "0.1", "--same": "1"}] * 2 + [{"--lr": "0.2"}]
  for status, text, _ in join("", "", "", settings=settings):
    assert status == 3
    assert "all here" not in text
    assert "Process 2 on " in text
    assert "--lr: 0.2, and in process 0 0.1" in text
    assert "--same: not given, and in process 0 1" in text


def test_other_code_is_named():
  for status, text, _ in join("", "other code"):
    assert status == 3
    assert "the code of rag_jax: 0123, and in process 0" in text
    assert "same version" in text


@pytest.mark.parametrize("failing", [0, 1])
def test_a_process_that_fails_ends_the_others_with_its_message(failing):
  acts = ["wait", "wait", "wait"]
  acts[failing] = "fail"
  for number, (status, text, secs) in enumerate(join(*acts)):
    assert secs < 40
    if number == failing:
      assert (status, "the disk is full" in text) == (3, True)
    else:
      assert status == 1
      assert f"because process {failing} on " in text
      assert "ended: the disk is full" in text


@pytest.mark.parametrize("killed", [0, 1])
def test_a_process_that_is_killed_ends_the_others(killed):
  acts = ["wait", "wait"]
  acts[killed] = "die"
  done = join(*acts, heartbeat_secs=HEARTBEAT_SECS)
  assert done[killed][0] == -signal.SIGKILL
  status, text, secs = done[1 - killed]
  assert status != 0
  assert secs < HEARTBEAT_SECS + 40
  # JAX says so. Process 0 is the one that the others report to.
  told = r"Task 1 heartbeat|heartbeats\)(.|\n)*1" if killed else "leader task"
  assert re.search(told, text), text


def train(*arguments, port):
  return [
    ROOT / "tools" / "train.py", "--distributed", "--num_processes=2",
    f"--coordinator=localhost:{port}", *arguments,
  ]  # fmt: skip


def test_a_command_refuses_hosts_with_other_configs(tiny, tmp_path):
  port = free_port()
  commands = [
    train(
      f"--config={tiny.config_file}", f"--workdir={tmp_path}/run",
      f"--process_id={number}", f"--config.optimizer.peak_lr={lr}",
      port=port,
    )
    for number, lr in enumerate((0.1, 0.2))
  ]  # fmt: skip
  for status, text, _ in run_hosts(commands):
    assert status == 1
    assert "--config.optimizer.peak_lr: 0.2, and in process 0 0.1" in text
    assert "Traceback" not in text
  assert not (tmp_path / "run").exists()


def test_distributed_without_a_pod_is_an_error(tiny, tmp_path):
  command = [
    ROOT / "tools" / "train.py", "--distributed", f"--workdir={tmp_path}/run",
    f"--config={tiny.config_file}",
  ]  # fmt: skip
  [(status, text, _)] = run_hosts([command])
  assert status == 1
  assert "found no pod" in text
  assert "--coordinator=HOST:PORT" in text


if __name__ == "__main__":
  main(*sys.argv[1:])
