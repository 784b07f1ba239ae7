"""One run in a folder at a time, and only of the experiment it was made for."""

import json
import logging
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys

from etils import epath
import pytest

from rag_jax import artifacts
from rag_jax.config import Config
from rag_jax.config_json import from_json
from rag_jax.config_json import to_json
from rag_jax.training.workdir import open_workdir

HOLDER = """
import sys
from rag_jax.config import Config
from rag_jax.training.workdir import open_workdir
workdir = open_workdir(sys.argv[1], Config())
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def path(tmp_path):
  return tmp_path / "runs" / "first"


@pytest.fixture
def holder(path):
  """Another process that holds the lock of `path`."""
  process = subprocess.Popen(
    [sys.executable, "-c", HOLDER, path],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )
  with process:
    assert process.stdout is not None
    assert process.stdout.readline() == "locked\n"
    yield process
    process.kill()


def changed(**settings):
  """A config with `section__name=value` changed."""
  config = Config()
  for name, value in settings.items():
    section, _, field = name.rpartition("__")
    setattr(getattr(config, section) if section else config, field, value)
  return config


def test_a_new_folder_is_made_with_the_config_in_it(path):
  with open_workdir(path, changed(seed=5)) as workdir:
    assert workdir.path == epath.Path(path)
    assert from_json(workdir.config_path.read_text()) == changed(seed=5)
  assert sorted(os.listdir(path)) == [".lock", "config.json"]


def test_every_path_lies_in_the_folder(path):
  with open_workdir(path, Config()) as workdir:
    names = [
      "checkpoints", "indexes", "tokenizer", "tokens", "metrics", "config_path",
    ]  # fmt: skip
    places = {getattr(workdir, name) for name in names}
  assert len(places) == len(names)
  assert {place.parent for place in places} == {workdir.path}


def test_the_home_folder_can_be_written_as_a_tilde(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  with open_workdir("~/run", Config()) as workdir:
    assert workdir.path == epath.Path(tmp_path / "run")


def test_the_same_experiment_resumes_in_its_folder(path):
  open_workdir(path, Config()).close()
  (path / "checkpoints" / "10").mkdir(parents=True)
  with open_workdir(path, Config()) as workdir:
    assert workdir.checkpoints.exists()


def test_a_run_of_before_there_was_a_setting_resumes(path):
  open_workdir(path, Config()).close()
  (path / "checkpoints" / "10").mkdir(parents=True)
  old = json.loads((path / "config.json").read_text())
  del old["data"]["token_cache"], old["sha256"]
  (path / "config.json").write_text(json.dumps(old))
  with open_workdir(path, Config()) as workdir:
    assert workdir.checkpoints.exists()


@pytest.mark.parametrize(
  "settings",
  [
    {"train__log_steps": 1, "train__validate_steps": 7},
    {"train__checkpoint_steps": 3, "train__keep_checkpoints": 9},
    {"eval__batch_size": 8, "eval__num_validation": 5, "eval__num_test": 3},
    {"mesh__data": 2, "mesh__fsdp": 4, "index__embed_batch_size": 64},
    {"data__token_cache": "elsewhere"},
  ],
)
def test_settings_that_change_no_parameter_may_differ(path, settings, caplog):
  open_workdir(path, Config()).close()
  with (
    caplog.at_level(logging.INFO, logger="absl"),
    open_workdir(path, changed(**settings)) as workdir,
  ):
    assert from_json(workdir.config_path.read_text()) == changed(**settings)
  for name in settings:  # what changed is logged
    assert f"{name.replace('__', '.')}: " in caplog.text


def test_other_settings_are_refused_with_both_values(path):
  open_workdir(path, Config()).close()
  (path / "checkpoints" / "10").mkdir(parents=True)
  before = (path / "config.json").read_text()
  other = changed(
    seed=3, optimizer__peak_lr=1e-3, train__log_steps=1, loss="rag_sequence"
  )
  with pytest.raises(ValueError, match="belongs to another exper") as error:
    open_workdir(path, other)
  message = str(error.value)
  assert f"--workdir={path} " in message
  assert "\n  seed: 0 -> 3\n" in message
  assert "\n  loss: 'rag_token' -> 'rag_sequence'\n" in message
  assert "\n  optimizer.peak_lr: 3e-05 -> 0.001\n" in message
  assert "train.log_steps: " not in message
  assert "Choose another --workdir, or restore the old values" in message
  assert "These may differ: data.token_cache, index.embed_batch_size" in message
  assert (path / "config.json").read_text() == before
  open_workdir(path, Config()).close()  # the refusal released the lock


@pytest.mark.parametrize("learned", ["model", "checkpoints/10"])
def test_settings_may_be_corrected_until_something_was_learned(
  path, learned, caplog
):
  open_workdir(path, Config()).close()
  (path / "tokenizer").mkdir()
  with caplog.at_level(logging.INFO, logger="absl"):
    open_workdir(path, changed(seed=3)).close()
  assert f"{path} has no checkpoint: it is used with the new" in caplog.text
  assert from_json((path / "config.json").read_text()) == changed(seed=3)
  assert not (path / "tokenizer").exists()  # it was trained on other texts
  (path / learned).mkdir(parents=True)
  with pytest.raises(ValueError, match="seed: 3 -> 4"):
    open_workdir(path, changed(seed=4))


def test_the_tokenizer_is_kept_while_the_settings_stay(path):
  open_workdir(path, Config()).close()
  (path / "tokenizer").mkdir()
  open_workdir(path, changed(train__log_steps=1)).close()
  assert (path / "tokenizer").exists()


def test_a_run_with_a_constant_schedule_may_become_longer(path):
  old = changed(optimizer__schedule="constant")
  new = changed(optimizer__schedule="constant", train__num_steps=2000)
  open_workdir(path, old).close()
  open_workdir(path, new).close()


@pytest.mark.parametrize(
  "settings",
  [
    {"optimizer__schedule": "linear"},
    {"optimizer__schedule": "cosine"},
    # The warm-up is cut to the number of steps.
    {"optimizer__schedule": "constant", "optimizer__warmup_steps": 1000},
  ],
)
def test_a_schedule_that_depends_on_the_last_step_keeps_it(path, settings):
  open_workdir(path, changed(**settings)).close()
  (path / "checkpoints" / "10").mkdir(parents=True)
  with pytest.raises(ValueError, match=r"train\.num_steps: 1000 -> 2000"):
    open_workdir(path, changed(**settings, train__num_steps=2000))


def test_a_config_that_was_cut_off_is_named(path):
  open_workdir(path, Config()).close()
  text = to_json(Config())
  for damaged in (
    b"",
    text[: len(text) // 2].encode(),
    b"\xff" + text.encode(),
  ):
    (path / "config.json").write_bytes(damaged)
    with pytest.raises(
      ValueError, match=r"first/config\.json is not JSON .*another workdir"
    ):
      open_workdir(path, Config())
  assert (path / "config.json").read_bytes() == damaged  # it is not replaced


def test_an_edited_config_is_refused_unless_its_digest_is_removed(path, caplog):
  open_workdir(path, Config()).close()
  text = (path / "config.json").read_text()
  text = text.replace('"score_scale": 1.0', '"score_scale": 2.0')
  (path / "config.json").write_text(text)
  with pytest.raises(
    ValueError, match=r'config\.json was damaged.*remove the line "sha256"'
  ):
    open_workdir(path, changed(encoder__score_scale=2.0))
  lines = [line for line in text.splitlines() if '"sha256"' not in line]
  (path / "config.json").write_text("\n".join(lines))
  open_workdir(path, changed(encoder__score_scale=2.0)).close()
  assert "config.json has no digest: it was edited" in caplog.text
  assert "sha256" in json.loads((path / "config.json").read_text())


@pytest.mark.parametrize(
  "name",
  [".lock", "config.json", "metrics.jsonl", "results.json", "model",
   "checkpoints", "tensorboard/train", "index/scann", "tokenizer/merges.txt"],
)  # fmt: skip
@pytest.mark.parametrize("there", [True, False])
def test_nothing_is_written_to_where_a_link_leads(path, tmp_path, name, there):
  theirs = tmp_path / "theirs"
  if there:
    theirs.write_text("years of work")
  (path / name).parent.mkdir(parents=True)
  (path / name).symlink_to(theirs)
  with pytest.raises(ValueError, match=rf"{name} in .* is a link to .*Remove"):
    open_workdir(path, Config())
  assert theirs.exists() == there
  assert not there or theirs.read_text() == "years of work"


def test_a_lock_with_another_name_is_not_written_to(path, tmp_path):
  (tmp_path / "theirs").write_text("years of work")
  path.mkdir(parents=True)
  os.link(tmp_path / "theirs", path / ".lock")
  with pytest.raises(ValueError, match=r"\.lock has 2 names.*Remove it"):
    open_workdir(path, Config())
  assert (tmp_path / "theirs").read_text() == "years of work"


def test_a_lock_that_is_a_pipe_is_refused(path):
  path.mkdir(parents=True)
  os.mkfifo(path / ".lock")
  with pytest.raises(ValueError, match=r"\.lock in .* is a pipe"):
    open_workdir(path, Config())


def test_links_of_others_may_lie_in_a_workdir(path, tmp_path):
  path.mkdir(parents=True)
  (path / "notes").symlink_to(tmp_path)
  open_workdir(path, Config()).close()


def test_checkpoints_without_a_config_are_refused(path):
  (path / "checkpoints" / "10").mkdir(parents=True)
  with pytest.raises(
    ValueError, match=r"has checkpoints but no config\.json.*another --workdir"
  ):
    open_workdir(path, Config())
  assert not (path / "config.json").exists()


def test_other_files_without_a_config_are_accepted(path):
  (path / "checkpoints").mkdir(parents=True)
  (path / "notes.txt").write_text("mine")
  open_workdir(path, Config()).close()
  assert (path / "notes.txt").read_text() == "mine"


def test_a_file_is_no_workdir(path):
  path.parent.mkdir()
  path.write_text("")
  for name in (path, path / "below"):
    with pytest.raises(
      ValueError,
      match=rf"--workdir={name} is not a folder: .*another --workdir, or move",
    ):
      open_workdir(name, Config())


def test_an_empty_path_is_refused():
  with pytest.raises(ValueError, match="--workdir is empty; expected a folder"):
    open_workdir("", Config())


def test_a_folder_that_cannot_be_made_is_refused():
  # Nobody can make a folder there, not even root.
  with pytest.raises(
    ValueError, match=r"--workdir=/proc/no/run cannot be written to \(\[Errno"
  ):
    open_workdir("/proc/no/run", Config())


def test_a_folder_that_cannot_be_written_to_is_refused():
  with pytest.raises(
    ValueError,
    match=r"--workdir=/proc/self cannot be written to .*change its permissions",
  ):
    open_workdir("/proc/self", Config())


def test_a_full_disk_is_found_before_anything_is_written(path, monkeypatch):
  def full(self, text):
    raise OSError(28, "No space left on device")

  path.mkdir(parents=True)
  monkeypatch.setattr(type(epath.Path(path)), "write_text", full)
  with pytest.raises(ValueError, match="No space left on device"):
    open_workdir(path, Config())
  assert os.listdir(path) == []


def test_a_second_run_is_refused_with_who_holds_the_lock(path, holder):
  with pytest.raises(ValueError, match="is in use by another run") as error:
    open_workdir(path, Config())
  message = str(error.value)
  assert f"--workdir={path} " in message
  assert f"pid {holder.pid} on host {socket.gethostname()}, since " in message
  assert re.search(r"since \d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]", message)
  assert "choose another --workdir" in message
  # As it was: the second run left no trace.
  assert sorted(os.listdir(path)) == [".lock", "config.json"]
  assert json.loads((path / ".lock").read_text())["pid"] == holder.pid


def test_kill_9_frees_the_lock(path, holder):
  holder.send_signal(signal.SIGKILL)
  assert holder.wait() == -signal.SIGKILL
  with open_workdir(path, Config()):
    assert json.loads((path / ".lock").read_text())["pid"] == os.getpid()


def test_two_runs_in_one_process_are_refused_until_the_first_closes(path):
  first = open_workdir(path, Config())
  with pytest.raises(ValueError, match=f"in use by .* pid {os.getpid()} "):
    open_workdir(path, Config())
  first.close()
  first.close()  # does nothing
  open_workdir(path, Config()).close()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": 3}', "\xff"])
def test_a_lock_without_a_name_in_it_is_refused_all_the_same(path, content):
  with open_workdir(path, Config()):
    (path / ".lock").write_text(content, "latin-1")
    with pytest.raises(ValueError, match="one that has only just started"):
      open_workdir(path, Config())


def test_a_shorter_text_in_the_lock_file_leaves_nothing_of_the_longer(path):
  path.mkdir(parents=True)
  (path / ".lock").write_text("x" * 1000)
  with open_workdir(path, Config()):
    assert json.loads((path / ".lock").read_text())["pid"] == os.getpid()


def test_other_processes_of_a_run_only_compare(path):
  with open_workdir(path, Config()):
    open_workdir(path, Config(), process_index=1).close()
    with pytest.raises(ValueError, match="seed: 0 -> 1"):
      open_workdir(path, changed(seed=1), process_index=1)


def test_other_processes_of_a_run_write_nothing(path):
  open_workdir(path, Config(), process_index=1).close()
  assert os.listdir(path) == []


def test_a_file_system_without_locks_is_used_with_a_warning(
  path, monkeypatch, caplog
):
  def no_locks(file, operation):
    raise OSError(37, "No locks available")

  monkeypatch.setattr("fcntl.flock", no_locks)
  open_workdir(path, Config()).close()
  assert "has no locks ([Errno 37] No locks available)" in caplog.text


def test_a_bucket_has_no_lock_and_the_log_says_so(path, monkeypatch, caplog):
  # A bucket is stood in for by a folder: everything else is the same there.
  monkeypatch.setattr(artifacts, "is_local", lambda path: False)
  with (
    caplog.at_level(logging.INFO, logger="absl"),
    open_workdir(path, Config()),
    open_workdir(path, Config()),
  ):
    assert "is in a bucket, which has no locks" in caplog.text
    assert os.listdir(path) == ["config.json"]


def test_the_config_is_replaced_in_one_piece(path, monkeypatch):
  open_workdir(path, Config()).close()
  before = (path / "config.json").read_text()

  def killed(source, target):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(artifacts.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
      open_workdir(path, changed(train__log_steps=1))
  assert (path / "config.json").read_text() == before
  open_workdir(path, Config()).close()  # the lock was released


def test_nothing_is_left_of_the_probe(path):
  open_workdir(path, Config()).close()
  assert not [p for p in pathlib.Path(path).iterdir() if "probe" in p.name]


def fail(path, error, *, begins=False):
  """A run that ends in `error`."""
  with open_workdir(path, Config()) as workdir:
    (workdir.tokenizer / "x").mkdir(parents=True)
    if begins:
      workdir.begin()
    raise error("as it was")


@pytest.mark.parametrize("error", [ValueError, FileNotFoundError, TypeError])
def test_a_run_that_is_refused_before_it_began_leaves_nothing(tmp_path, error):
  with pytest.raises(error, match="as it was"):
    fail(tmp_path / "runs" / "first", error)
  assert list(tmp_path.iterdir()) == []


def test_what_others_made_or_can_be_gone_on_with_stays(tmp_path):
  (tmp_path / "there").mkdir()
  (tmp_path / "runs").mkdir()
  for name, error, begins in (
    ("there", ValueError, False),
    ("a", KeyboardInterrupt, False),
    ("b", ValueError, True),
    ("runs/c", ValueError, False),
  ):
    with pytest.raises(error, match="as it was"):
      fail(tmp_path / name, error, begins=begins)
  names = {path.name for path in tmp_path.iterdir()}
  assert names == {"there", "runs", "a", "b"}
  assert not (tmp_path / "runs/c").exists()
  assert (tmp_path / "b/config.json").exists()
