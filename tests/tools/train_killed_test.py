"""The command that trains, as a process: stopped, killed, and left to end."""

import collections
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[2]

Result = collections.namedtuple("Result", ["code", "stdout", "stderr"])


def wait_for(process, workdir, step):
  """Returns once `step` of the main stage is in the metrics."""
  deadline = time.monotonic() + 300
  while time.monotonic() < deadline:
    assert process.poll() is None, process.communicate()
    if (workdir / "metrics.jsonl").exists():
      *lines, _ = (workdir / "metrics.jsonl").read_text().split("\n")
      for record in map(json.loads, lines):
        if record["stage"] == "train" and record["step"] >= step:
          return
    time.sleep(0.005)
  process.kill()
  raise AssertionError(f"step {step} took too long")


@pytest.fixture(scope="module")
def killed(tiny, uninterrupted):
  """The workdir of the run, and the results of its three processes."""
  workdir = tiny.root / "killed"
  arguments = [
    sys.executable,
    ROOT / "tools" / "train.py",
    f"--config={tiny.config_file}",
    f"--workdir={workdir}",
    # What is watched may differ; so often, it takes a while to be killed in.
    "--config.train.validate_steps=1",
    "--config.train.checkpoint_steps=5",
    "--config.eval.batch_size=1",
  ]
  results = []
  for kill, step in ((signal.SIGTERM, 2), (signal.SIGKILL, 7), (0, 0)):
    with subprocess.Popen(
      arguments,
      cwd=ROOT,
      env=os.environ | tiny.environment | {"PYTHONPATH": str(ROOT)},
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    ) as process:
      if kill:
        wait_for(process, workdir, step)
        process.send_signal(kill)
      stdout, stderr = process.communicate(timeout=300)
    results.append(Result(process.returncode, stdout, stderr))
  return workdir, *results


def test_sigterm_saves_and_says_how_to_go_on(killed):
  _, stopped, _, _ = killed
  assert stopped.code == 128 + signal.SIGTERM
  assert "Traceback" not in stopped.stderr
  assert re.search(
    r"\nStopped by SIGTERM and saved at step \d+\. Run the same command again"
    r" to continue from there\.\n$",
    stopped.stderr,
  )
  assert not stopped.stdout


def test_the_same_command_goes_on_from_what_was_saved(killed):
  _, stopped, dead, last = killed
  step = int(re.search(r"saved at step (\d+)", stopped.stderr)[1])
  assert f"Resuming from the checkpoint of step {step}." in dead.stderr
  assert dead.code == -signal.SIGKILL
  # Of step 5 of the main stage, or 10 if the kill came late; or the one before,
  # if it came while that of step 5 was being written.
  assert re.search(
    rf"Resuming from the checkpoint of step ({step}|9|14)\.", last.stderr
  )
  assert last.code == 0


def test_a_killed_run_ends_as_one_that_was_not(killed, uninterrupted):
  workdir, *_ = killed
  name = "model/params.safetensors"
  ours = (workdir / name).read_bytes()
  assert ours == (uninterrupted.path / name).read_bytes()
  steps = {uninterrupted.results["step"], results_of(workdir)["step"]}
  assert steps == {16}  # no validation found more than the last
  index = "index/embeddings.npy"
  ours = (workdir / index).read_bytes()
  assert ours == (uninterrupted.path / index).read_bytes()


def results_of(workdir):
  return json.loads((workdir / "results.json").read_text())


def test_a_killed_run_measures_each_step_once(killed, uninterrupted):
  workdir, *_ = killed

  def losses(path):
    records = map(json.loads, (path / "metrics.jsonl").read_text().splitlines())
    return [
      (r["stage"], r["step"], r[f"{r['stage']}/loss"], r["time_secs"])
      for r in records
    ]

  ours = losses(workdir)
  theirs = losses(uninterrupted.path)
  assert [r[:3] for r in ours] == [r[:3] for r in theirs]
  times = [r[3] for r in ours]
  assert times == sorted(times)


def test_a_run_that_ends_prints_its_results_and_what_to_do_next(killed):
  workdir, *_, last = killed
  assert last.stdout.startswith("test: 10 questions\n")
  assert "\nexact match       0.000   95% interval" in last.stdout
  assert last.stdout.endswith(f"\nAsk it: rag-jax ask --workdir={workdir}\n")
  assert results_of(workdir)["test/num_questions"] == 10
