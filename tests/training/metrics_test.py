"""Metrics on disk across kills and resumed runs, and the progress line."""

import contextlib
import json
import math
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from rag_jax import artifacts
from rag_jax.training import metrics as metrics_lib
from rag_jax.training.metrics import MetricWriter
from rag_jax.training.metrics import Progress
from rag_jax.training.metrics import peak_memory_bytes
from rag_jax.training.metrics import read_metrics


class Clock:
  """Seconds that pass when a test says so."""

  now = 1000.0

  def __call__(self):
    """Returns the time."""
    return self.now


@pytest.fixture
def clock():
  return Clock()


def write_some(workdir, lines):
  with MetricWriter(workdir) as writer:
    for stage, step in lines:
      writer.write(step, stage, {f"{stage}/loss": step / 10})


def stages_and_steps(workdir):
  records = read_metrics(workdir / "metrics.jsonl")
  return [(r["stage"], r["step"]) for r in records]


def tensorboard_events(folder):
  """Returns the events of all files of a folder."""
  events = []
  for path in sorted(folder.iterdir()):
    data, start = path.read_bytes(), 0
    while start < len(data):  # length, its CRC, the event, its CRC
      length = int.from_bytes(data[start : start + 8], "little")
      events.append(Event.FromString(data[start + 12 : start + 12 + length]))
      start += length + 16
  return events


def tensorboard_scalars(folder):
  return [
    (value.tag, event.step, value.simple_value)
    for event in tensorboard_events(folder)
    for value in event.summary.value
  ]


def test_a_line_holds_step_stage_time_and_metrics(tmp_path, clock):
  workdir = tmp_path / "runs" / "first"  # made where it is missing
  with MetricWriter(workdir, clock=clock) as writer:
    clock.now += 2.5
    writer.write(3, "train", {"train/loss": 1.5})
    line = (workdir / "metrics.jsonl").read_text()  # before it is closed
  record = {"step": 3, "stage": "train", "time_secs": 2.5, "train/loss": 1.5}
  assert line.endswith("\n")
  line = json.loads(line)
  assert re.fullmatch(r"[0-9a-f]{16}", line.pop("digest"))
  assert line == record
  assert read_metrics(workdir / "metrics.jsonl") == [record]


def test_scalars_of_arrays_are_written_as_numbers(tmp_path):
  with MetricWriter(tmp_path) as writer:
    writer.write(
      1, "train", {"a": np.float32(0.5), "b": jnp.asarray(2), "c": np.array(3)}
    )
  (record,) = read_metrics(tmp_path / "metrics.jsonl")
  assert {name: record[name] for name in "abc"} == {"a": 0.5, "b": 2, "c": 3}


def test_what_is_not_finite_is_null(tmp_path):
  with MetricWriter(tmp_path) as writer:
    writer.write(1, "train", {"a": math.nan, "b": math.inf, "c": -math.inf})

  def refuse(constant):
    raise AssertionError(f"{constant} is not JSON")

  text = (tmp_path / "metrics.jsonl").read_text()
  record = json.loads(text, parse_constant=refuse)
  assert [record[name] for name in "abc"] == [None, None, None]
  scalars = tensorboard_scalars(tmp_path / "tensorboard" / "train")
  assert [(tag, step) for tag, step, _ in scalars] == [("a", 1)]
  assert math.isnan(scalars[0][2])


def test_tensorboard_gets_the_same_numbers(tmp_path):
  with MetricWriter(tmp_path) as writer:
    writer.write(10, "warmup", {"warmup/loss": 4.0})
    writer.write(1, "train", {"train/loss": 2.0, "train/doc_entropy": 0.5})
    writer.write(2, "train", {"train/loss": 1.0})
  tensorboard = tmp_path / "tensorboard"
  assert tensorboard_scalars(tensorboard / "warmup") == [
    ("warmup/loss", 10, 4.0)
  ]
  assert tensorboard_scalars(tensorboard / "train") == [
    ("train/loss", 1, 2.0),
    ("train/doc_entropy", 1, 0.5),
    ("train/loss", 2, 1.0),
  ]


def test_other_processes_write_nothing(tmp_path):
  with MetricWriter(tmp_path / "run", enabled=False) as writer:
    writer.truncate_after("train", 3)
    writer.write(1, "train", {"train/loss": 2.0})
  assert not (tmp_path / "run").exists()


def test_a_resumed_run_has_every_step_once(tmp_path):
  lines = [("warmup", 10), ("warmup", 20), ("train", 10), ("train", 20)]
  write_some(tmp_path, [*lines, ("train", 30), ("train", 40)])
  with MetricWriter(tmp_path) as writer:
    writer.truncate_after("train", 20)
    assert stages_and_steps(tmp_path) == lines
    for step in (30, 40):
      writer.write(step, "train", {"train/loss": 0.0})
  assert stages_and_steps(tmp_path) == [*lines, ("train", 30), ("train", 40)]
  assert read_metrics(tmp_path / "metrics.jsonl")[-1]["train/loss"] == 0.0
  assert [p.name for p in tmp_path.iterdir() if p.name.endswith("tmp")] == []


@pytest.mark.parametrize(
  ("stage", "step", "expected"),
  [
    ("warmup", 0, []),
    ("warmup", 10, [("warmup", 10)]),
    # What resumes at step 0 measures step 0 again.
    ("train", 0, [("warmup", 10), ("warmup", 20)]),
    ("train", 99, [("warmup", 10), ("warmup", 20), ("train", 0), ("train", 5)]),
  ],
)
def test_resuming_forgets_what_came_after(tmp_path, stage, step, expected):
  write_some(
    tmp_path, [("warmup", 10), ("warmup", 20), ("train", 0), ("train", 5)]
  )
  with MetricWriter(tmp_path) as writer:
    writer.truncate_after(stage, step)
  assert stages_and_steps(tmp_path) == expected


def test_tensorboard_forgets_the_steps_that_are_measured_again(tmp_path):
  write_some(tmp_path, [("train", 10), ("train", 20), ("train", 30)])
  before = len(tensorboard_events(tmp_path / "tensorboard" / "train"))
  with MetricWriter(tmp_path) as writer:
    writer.truncate_after("train", 20)
    writer.write(30, "train", {"train/loss": 0.0})
  events = tensorboard_events(tmp_path / "tensorboard" / "train")
  assert before == 4  # one says which version of the format follows
  starts = [e.step for e in events if e.HasField("session_log")]
  assert starts == [21]
  assert not (tmp_path / "tensorboard" / "warmup").exists()


def test_time_goes_on_where_the_last_attempt_stopped(tmp_path, clock):
  with MetricWriter(tmp_path, clock=clock) as writer:
    clock.now += 60
    writer.write(10, "train", {})
    clock.now += 60
    writer.write(20, "train", {})
  clock.now += 9999  # until somebody noticed
  with MetricWriter(tmp_path, clock=clock) as writer:
    writer.truncate_after("train", 10)
    clock.now += 5
    writer.write(20, "train", {})
  times = [r["time_secs"] for r in read_metrics(tmp_path / "metrics.jsonl")]
  assert times == [60, 65]


@pytest.mark.parametrize("tail", ['{"step": 3, "sta', "{", "\0\0\0", "\xff"])
def test_a_line_that_was_cut_off_is_removed(tmp_path, tail):
  write_some(tmp_path, [("train", 1), ("train", 2)])
  path = tmp_path / "metrics.jsonl"
  whole = path.read_bytes()
  path.write_bytes(whole + tail.encode("latin-1"))
  assert stages_and_steps(tmp_path) == [("train", 1), ("train", 2)]
  write_some(tmp_path, [("train", 3)])
  assert path.read_bytes().startswith(whole)
  assert stages_and_steps(tmp_path)[2:] == [("train", 3)]


_WRITE_UNTIL_KILLED = """
import os, signal, sys
from rag_jax.training.metrics import MetricWriter
writer = MetricWriter(sys.argv[1])
writer.write(1, "train", {"train/loss": 1.0})
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_was_written_outlives_a_kill(tmp_path):
  command = [sys.executable, "-c", _WRITE_UNTIL_KILLED, str(tmp_path)]
  killed = subprocess.run(command, timeout=60, check=False)
  assert killed.returncode == -signal.SIGKILL
  assert stages_and_steps(tmp_path) == [("train", 1)]


def test_in_a_bucket_the_file_is_replaced(tmp_path, monkeypatch, clock):
  write_some(tmp_path, [("train", 1), ("train", 2)])
  monkeypatch.setattr(artifacts, "is_local", lambda path: False)
  with MetricWriter(tmp_path, clock=clock) as writer:
    writer.truncate_after("train", 1)
    for step, num_lines in ((2, 1), (3, 3), (4, 3)):  # every 10 seconds
      clock.now += 6
      writer.write(step, "train", {})
      assert len(stages_and_steps(tmp_path)) == num_lines
  assert stages_and_steps(tmp_path) == [("train", s) for s in (1, 2, 3, 4)]


def test_without_a_client_of_the_bucket_there_is_still_the_file(
  tmp_path, monkeypatch, caplog
):
  def no_client(**_):
    raise ImportError("google-cloud-storage must be installed")

  monkeypatch.setattr("tensorboardX.SummaryWriter", no_client)
  with caplog.at_level("WARNING"):
    write_some(tmp_path, [("train", 1), ("train", 2)])
  assert stages_and_steps(tmp_path) == [("train", 1), ("train", 2)]
  (warning,) = caplog.records  # one, not one a line
  assert "google-cloud-storage must be installed" in warning.getMessage()


@pytest.mark.parametrize(
  "line",
  [
    "oops",
    "[1]",
    '{"step": 1.5, "stage": "train", "time_secs": 0.0}',
    '{"step": 1, "stage": "test", "time_secs": 0.0}',
    '{"step": 1, "stage": "train", "time_secs": null}',
    '{"step": 1, "stage": "train", "time_secs": 0.0, "loss": "low"}',
  ],
)
def test_a_bad_line_in_the_middle_is_named(tmp_path, line):
  path = tmp_path / "metrics.jsonl"
  good = '{"step": 1, "stage": "train", "time_secs": 0.0}\n'
  path.write_text(good + line + "\n" + good)
  message = (
    r"metrics\.jsonl, line 2: .* is no record .* delete it from that line"
  )
  with pytest.raises(ValueError, match=message):
    read_metrics(path)
  with pytest.raises(ValueError, match=message):
    MetricWriter(tmp_path)
  assert path.read_text() == good + line + "\n" + good  # nothing was lost


def test_every_flipped_bit_of_a_line_is_noticed(tmp_path):
  write_some(tmp_path, [("warmup", 1), ("train", 2), ("train", 3)])
  path = tmp_path / "metrics.jsonl"
  whole, expected = path.read_bytes(), read_metrics(path)
  for place in range(len(whole) - 1):
    for bit in (1, 4, 32):
      data = bytearray(whole)
      data[place] ^= bit
      path.write_bytes(data)
      try:
        records = read_metrics(path)
      except ValueError:
        continue
      assert records == expected, place  # white space


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_line_that_is_missing_or_moved_is_noticed(tmp_path, lost):
  write_some(tmp_path, [("train", step) for step in range(4)])
  path = tmp_path / "metrics.jsonl"
  lines = path.read_text().splitlines(keepends=True)
  for damaged in (
    lines[:lost] + lines[lost + 1 :],
    [*lines[:lost], lines[lost + 1], lines[lost], *lines[lost + 2 :]],
    lines[: lost + 1] + lines[lost:],  # twice
  ):
    path.write_text("".join(damaged))
    with pytest.raises(ValueError, match=r"line \d was damaged.*or a line bef"):
      read_metrics(path)
  # What the message says to do: the lines before are whole.
  path.write_text("".join(lines[:lost]))
  assert [r["step"] for r in read_metrics(path)] == list(range(lost))


def test_lines_of_before_there_were_digests_are_read_and_get_them(
  tmp_path, caplog
):
  old = '{"step": 1, "stage": "train", "time_secs": 0.5}\n'
  path = tmp_path / "metrics.jsonl"
  path.write_text(old)
  write_some(tmp_path, [("train", 2)])
  assert "metrics.jsonl have no digests: an older version" in caplog.text
  caplog.clear()
  assert [r["step"] for r in read_metrics(path)] == [1, 2]
  assert not caplog.records
  path.write_text(path.read_text() + old)  # one of each is no old file
  with pytest.raises(ValueError, match="line 3 was damaged"):
    read_metrics(path)


def test_metrics_that_are_gone_are_warned_of(tmp_path, caplog):
  with MetricWriter(tmp_path) as writer:
    (tmp_path / "metrics.jsonl").unlink()
    writer.truncate_after("train", 20)
  assert "no" in caplog.text
  assert "of the steps before 20" in caplog.text


@pytest.mark.parametrize("make", [os.symlink, os.link])
def test_another_file_is_never_written_to_by_the_name_of_this_one(
  tmp_path, make
):
  write_some(tmp_path / "theirs", [("train", 1)])
  theirs = tmp_path / "theirs" / "metrics.jsonl"
  before = theirs.read_bytes()
  (tmp_path / "run").mkdir()
  make(theirs, tmp_path / "run" / "metrics.jsonl")
  with pytest.raises(ValueError, match=r"metrics\.jsonl .*xpected a file of"):
    MetricWriter(tmp_path / "run")
  assert theirs.read_bytes() == before


def test_missing_metrics_are_reported(tmp_path):
  with pytest.raises(FileNotFoundError, match="no metrics were written yet"):
    read_metrics(tmp_path / "metrics.jsonl")


def test_an_unknown_stage_is_refused(tmp_path):
  message = "stage='test' is not one of .*'contrastive', 'train'"
  with MetricWriter(tmp_path) as writer:
    with pytest.raises(ValueError, match=message):
      writer.write(1, "test", {})
    with pytest.raises(ValueError, match=message):
      writer.truncate_after("test", 1)
  with pytest.raises(ValueError, match=message):
    Progress(1).line(1, 2, "test", {})


@pytest.mark.parametrize(
  ("name", "value", "message"),
  [
    ("step", 1.0, "A metric is called 'step'.* Give it another name"),
    ("time_secs", 1.0, "A metric is called 'time_secs'"),
    ("train/loss", np.ones(2), r"'train/loss' has shape \(2,\); expected one"),
  ],
)
def test_a_metric_that_no_line_can_hold_is_refused(
  tmp_path, name, value, message
):
  with MetricWriter(tmp_path) as writer:
    with pytest.raises(ValueError, match=message):
      writer.write(1, "train", {name: value})
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_the_line_is_as_the_readme_shows_it(clock):
  progress = Progress(32, first_step=100, clock=clock)
  clock.now += 4.0  # 20 steps of 32 questions: 160 a second
  line = progress.line(
    120,
    1000,
    "train",
    {
      "train/loss": np.float32(1.2341),
      "train/doc_entropy": 0.83,
      "validation/exact_match": 0.512,
      "validation/answer_recall_at_5": 0.96,
    },
  )
  # 880 steps at 5 a second: 176 seconds.
  assert line == (
    "train   120/1000  loss 1.234 nats/token  EM 0.51  recall@5 0.96"
    "  H(z|x) 0.83  160 q/s  2:56 left"
  )


def test_what_was_not_measured_is_a_dash(clock):
  line = Progress(8, clock=clock).line(0, 50, "warmup", {})
  assert line == (
    "warmup  0/50  loss - nats/token  EM -  recall@5 -  H(z|x) -  - p/s  - left"
  )


def test_the_last_validation_is_shown_until_the_next(clock):
  progress = Progress(8, clock=clock)
  assert "EM -" in progress.line(1, 9, "train", {})
  progress.line(2, 9, "train", {"validation/exact_match": 0.25})
  assert "EM 0.25" in progress.line(3, 9, "train", {"train/loss": 1.0})
  assert "loss - " in progress.line(4, 9, "train", {})  # that of a step is not
  progress.line(5, 9, "train", {"validation/exact_match": 0.75})
  assert "EM 0.75" in progress.line(6, 9, "train", {})


@pytest.mark.parametrize("loss", [math.nan, 12.3456, 99999.9, -1e30])
def test_the_longest_line_fits_110_columns(clock, loss):
  progress = Progress(2**16, clock=clock)
  clock.now += 0.08
  metrics = {
    "train/loss": loss,
    "validation/exact_match": 1.0,
    "validation/answer_recall_at_5": 1.0,
    "train/doc_entropy": 4.61,
  }
  line = progress.line(1, 10**6, "train", metrics)
  assert line.endswith("819200 q/s  22:13:20 left")
  assert len(line) <= 110


def test_large_numbers_lose_their_decimals(clock):
  progress = Progress(1, clock=clock)
  for loss, text in ((1.2345, "1.234"), (123.456, "123.46"), (1e30, "1e+30")):
    line = progress.line(0, 2, "train", {"train/loss": loss})
    assert f"  loss {text} nats/token  " in line


def test_the_time_left_is_read_at_a_glance(clock):
  for secs, text in ((59.6, "1:00"), (3600, "1:00:00"), (270_000, "3d03h")):
    progress = Progress(1, clock=clock)
    clock.now += secs
    assert progress.line(1, 2, "train", {}).endswith(f"  {text} left")
    assert progress.line(2, 2, "train", {}).endswith("  0:00 left")


def test_time_in_a_pause_does_not_count(clock):
  progress = Progress(10, clock=clock)
  with progress.paused():
    clock.now += 500  # compiling
    with progress.paused():
      clock.now += 500
  clock.now += 2
  assert progress.questions_per_sec(4) == pytest.approx(20.0)
  with contextlib.suppress(KeyError), progress.paused():
    clock.now += 500
    raise KeyError  # the clock goes on all the same
  clock.now += 2
  assert progress.questions_per_sec(8) == pytest.approx(20.0)


def test_speed_is_that_of_the_last_few_lines(clock):
  progress = Progress(10, window=3, clock=clock)
  assert math.isnan(progress.questions_per_sec(0))
  clock.now += 100.0  # a slow first step
  assert progress.questions_per_sec(1) == pytest.approx(0.1)
  for step in range(2, 5):
    clock.now += 0.5
    speed = progress.questions_per_sec(step)
    assert progress.questions_per_sec(step) == speed  # asking changes nothing
  assert speed == pytest.approx(20.0)


def test_peak_memory_is_in_bytes_and_never_falls(monkeypatch):
  before = peak_memory_bytes()
  block = np.ones(2**27, np.uint8)  # 128 MiB, touched
  after = peak_memory_bytes()
  assert max(before, block.nbytes) <= after < 2**40
  monkeypatch.setattr(sys, "platform", "darwin")
  assert metrics_lib.peak_memory_bytes() == pytest.approx(after / 1024, rel=0.2)


_FILLS_THE_DISK = """
import sys
from disks import full_disk
from rag_jax.training.metrics import MetricWriter
writer = MetricWriter(sys.argv[1])
writer.write(1, "train", {"train/loss": 1.0})
with full_disk(2000):
  try:
    for step in range(2, 400):
      writer.write(step, "train", {"train/loss": 1.0})
  except OSError as error:
    print("write", error.strerror)
  try:
    writer.close()
  except OSError as error:
    print("close", error.strerror)
"""


def test_a_full_disk_is_an_error_of_write_and_close_and_nothing_else(tmp_path):
  here = pathlib.Path(__file__)
  done = subprocess.run(
    [sys.executable, "-c", _FILLS_THE_DISK, tmp_path / "run"],
    env=os.environ
    | {
      "PYTHONPATH": os.pathsep.join(
        map(str, (here.parents[2], here.parents[1] / "helpers"))
      )
    },
    capture_output=True,
    text=True,
    check=False,
    timeout=100,
  )
  assert done.returncode == 0
  assert done.stderr == ""
  assert done.stdout == "write File too large\nclose File too large\n"


def test_other_errors_of_a_thread_are_still_shown(tmp_path, monkeypatch):
  shown = []
  monkeypatch.setattr(threading, "excepthook", shown.append)
  writer = MetricWriter(tmp_path)
  writer.write(1, "train", {"train/loss": 1.0})

  def fail():
    raise OSError("of another thread")

  thread = threading.Thread(target=fail)
  thread.start()
  thread.join()
  writer.close()
  assert [str(args.exc_value) for args in shown] == ["of another thread"]
