"""Checkpoints that were damaged or cut off are found before they are used."""

import errno
import json
import logging
import os
import pathlib
import signal
import subprocess
import sys

from disks import full_disk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rag_jax import artifacts
from rag_jax.training.checkpoint import Checkpointer

EXTRA = {"position": 7}


def make_state(seed=0):
  rng = np.random.default_rng(seed)
  kernel = jnp.asarray(rng.normal(size=(64, 64)), jnp.float32)
  return {"step": jnp.int32(seed), "params": {"kernel": kernel}}


def abstract(state):
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
    state,
  )


def assert_bit_equal(got, expected):
  assert jax.tree.structure(got) == jax.tree.structure(expected)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.fixture
def directory(tmp_path):
  return tmp_path / "checkpoints"


@pytest.fixture
def three(directory):
  """Steps 10, 20 and 30, whose states differ."""
  checkpointer = Checkpointer(directory, keep_last=3)
  for step in (10, 20, 30):
    checkpointer.save(step, make_state(step), EXTRA | {"position": step})
  checkpointer.close()
  return Checkpointer(directory, keep_last=3)


def files_of(directory, step):
  """The files of a step, the largest first."""
  found = pathlib.Path(directory, str(step)).rglob("*")
  found = [p for p in found if p.is_file() and p.name != "manifest.json"]
  return sorted(found, key=lambda p: -p.stat().st_size)


def flip(path):
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)


def cut(path):
  path.write_bytes(path.read_bytes()[:-1])


def test_a_flipped_bit_is_named_with_the_step_to_resume_from(three, directory):
  largest = files_of(directory, 30)[0]
  flip(largest)
  name = largest.relative_to(directory / "30")
  with pytest.raises(ValueError) as error:  # noqa: PT011
    three.restore(abstract(make_state()))
  message = str(error.value)
  assert f"The checkpoint of step 30 cannot be used: {name} in" in message
  assert "changed since it was written" in message
  assert f"Delete {directory}/30 to resume from step 20" in message
  with pytest.raises(ValueError, match=f"{name}.*resume from step 20"):
    three.read_extra(30)


def test_following_the_message_resumes_from_the_step_before(three, directory):
  flip(files_of(directory, 30)[0])
  flip(files_of(directory, 20)[0])
  with pytest.raises(ValueError, match=f"Delete {directory}/30 .* step 10"):
    three.restore(abstract(make_state()))
  for step in ("30", "20"):
    subprocess.run(["rm", "-r", directory / step], check=True)
  state, extra = three.restore(abstract(make_state()))
  assert_bit_equal(state, make_state(10))
  assert extra["position"] == 10
  three.save(20, make_state(20), EXTRA)  # and training goes on
  assert three.steps() == [10, 20]


def test_if_no_other_checkpoint_is_whole_the_message_says_so(three, directory):
  for step in (10, 20, 30):
    flip(files_of(directory, step)[0])
  with pytest.raises(ValueError, match="No earlier checkpoint is whole"):
    three.restore(abstract(make_state()))


def test_every_file_that_is_missing_is_named(three, directory):
  for path in files_of(directory, 30):
    data = path.read_bytes()
    path.unlink()
    name = path.relative_to(directory / "30")
    with pytest.raises(ValueError, match=f"{name} is missing .*step 20"):
      three.restore(abstract(make_state()))
    path.write_bytes(data)
  three.restore(abstract(make_state()))


def test_every_file_that_is_cut_off_is_named(three, directory):
  for path in files_of(directory, 30):
    data = path.read_bytes()
    if not data:
      continue  # orbax's commit marks are empty
    cut(path)
    name = path.relative_to(directory / "30")
    with pytest.raises(ValueError, match=f"{name} in .* cut off: .*step 20"):
      three.restore(abstract(make_state()))
    path.write_bytes(data)
  three.restore(abstract(make_state()))


def test_a_damaged_manifest_is_named_and_does_not_stop_others(three, directory):
  (directory / "30" / "manifest.json").write_bytes(b'{"kind": "check')
  with pytest.raises(ValueError, match=r"manifest.json is not JSON .*step 20"):
    three.restore(abstract(make_state()))
  assert three.best_step() is None
  three.save(40, make_state(40), EXTRA, 0.5)
  assert three.best_step() == 40


def test_a_newer_format_asks_for_an_upgrade(three, directory):
  manifest = directory / "30" / "manifest.json"
  content = json.loads(manifest.read_text()) | {"format": 99}
  del content["sha256"]  # as of a manifest of before
  manifest.write_text(json.dumps(content))
  with pytest.raises(ValueError, match=r"has format 99.* Upgrade rag_jax"):
    three.restore(abstract(make_state()))


def test_a_renamed_folder_is_found_out(three, directory):
  (directory / "30").rename(directory / "31")
  with pytest.raises(ValueError, match=r"31 holds step 30: .*renamed.*step 20"):
    three.restore(abstract(make_state()))


def test_steps_without_a_manifest_are_ignored_with_a_warning(
  three, directory, caplog
):
  (directory / "30" / "manifest.json").unlink()
  (directory / "40").mkdir()  # orbax alone would resume from it
  (directory / "notes").mkdir()
  assert three.latest_step() == 20
  three.latest_step()
  assert caplog.text.count("step 30 in") == caplog.text.count("step 40 in") == 1
  assert "has no manifest.json, so its save was cut off" in caplog.text
  state, _ = three.restore(abstract(make_state()))
  assert_bit_equal(state, make_state(20))


def test_a_step_that_was_cut_off_can_be_saved_again(three, directory):
  (directory / "30" / "manifest.json").unlink()
  three.save(30, make_state(31), EXTRA)
  state, _ = three.restore(abstract(make_state()))
  assert_bit_equal(state, make_state(31))
  assert three.steps() == [10, 20, 30]


def test_what_was_cut_off_goes_with_the_old_checkpoints(three, directory):
  (directory / "30" / "manifest.json").unlink()
  (directory / "50").mkdir()
  three.save(40, make_state(40), EXTRA)
  three.close()
  assert sorted(os.listdir(directory)) == ["10", "20", "40", "50"]


KILLED = """
import os, signal, sys
import jax.numpy as jnp
from rag_jax import artifacts
from rag_jax.training.checkpoint import Checkpointer
directory, event, part = sys.argv[1:]
checkpointer = Checkpointer(directory, keep_last=1)
checkpointer.save(1, {"x": jnp.full(1000, 1.0)}, {"position": 1})
checkpointer.wait()
def hook(name, args):
  if name == event and part in str(args[0]):
    os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
checkpointer.save(2, {"x": jnp.full(1000, 2.0)}, {"position": 2})
checkpointer.close()
"""


@pytest.mark.parametrize(
  ("event", "part", "survivor"),
  [
    ("open", "/2/extra/metadata", 1),  # while orbax writes
    ("open", "/2/.manifest.json", 1),  # orbax is done, the manifest is not
    ("shutil.rmtree", "/1", 2),  # while the old one is removed
  ],
)
def test_kill_9_leaves_a_checkpoint_to_resume_from(
  directory, event, part, survivor
):
  done = subprocess.run(
    [sys.executable, "-c", KILLED, directory, event, str(directory) + part],
    check=False,
  )
  assert done.returncode == -signal.SIGKILL
  assert sorted(os.listdir(directory)) == ["1", "2"]
  checkpointer = Checkpointer(directory, keep_last=1)
  assert checkpointer.steps() == [survivor]
  target = abstract({"x": jnp.ones(1000)})
  state, extra = checkpointer.restore(target)
  assert extra == {"position": survivor}
  assert np.all(np.asarray(state["x"]) == survivor)
  checkpointer.save(3, {"x": jnp.full(1000, 3.0)}, {})
  checkpointer.close()
  assert sorted(os.listdir(directory)) == ["3"]


def test_the_newest_whole_checkpoint_is_found_and_others_are_set_aside(
  three, directory, caplog
):
  flip(files_of(directory, 30)[0])
  cut(files_of(directory, 20)[0])
  assert three.newest_whole() == 10
  assert three.steps() == [10]
  for step, word in ((30, "was damaged"), (20, "was cut off")):
    assert f"The checkpoint of step {step} cannot be used: " in caplog.text
    assert word in caplog.text
    assert (directory / f"{step}.damaged" / "manifest.json").exists()
  assert "goes on from step 10, which is whole" in caplog.text
  state, extra = three.restore(abstract(make_state()), 10)
  assert_bit_equal(state, make_state(10))
  assert extra["position"] == 10
  three.save(20, make_state(20), EXTRA)
  three.save(30, make_state(30), EXTRA)
  three.close()
  flip(files_of(directory, 30)[0])  # once more
  assert Checkpointer(directory, keep_last=3).newest_whole() == 20
  assert (directory / "30.damaged1").exists()


def test_where_none_is_whole_nothing_is_set_aside(three, directory):
  for step in (10, 20, 30):
    flip(files_of(directory, step)[0])
  with pytest.raises(ValueError, match=r"step 30 .*No earlier checkpoint is"):
    three.newest_whole()
  assert three.steps() == [10, 20, 30]


def test_a_newer_format_is_no_damage(three, directory):
  manifest = directory / "30" / "manifest.json"
  content = json.loads(manifest.read_text()) | {"format": 99}
  del content["sha256"]
  manifest.write_text(json.dumps(content))
  with pytest.raises(ValueError, match=r"has format 99.* Upgrade rag_jax"):
    three.newest_whole()
  assert three.steps() == [10, 20, 30]


def test_the_best_whole_checkpoint_is_that_of_the_next_metric(directory):
  checkpointer = Checkpointer(directory, keep_last=4)
  for step, metric in ((1, 0.3), (2, 0.9), (3, 0.5), (4, None)):
    checkpointer.save(step, make_state(step), EXTRA, metric)
  assert checkpointer.best_whole() == 2
  flip(files_of(directory, 2)[0])
  assert Checkpointer(directory, keep_last=4).best_whole() == 3


def test_what_else_is_wrong_counts_too(three):
  wrong = {30: "Its index is gone."}
  assert three.newest_whole(lambda step, extra: wrong.get(step, "")) == 20


def as_folder(manifest):
  manifest.unlink()
  manifest.mkdir()


def with_metric(value):
  def edit(manifest):
    text = manifest.read_text()
    assert '"metric": 0.5' in text
    manifest.write_text(text.replace('"metric": 0.5', f'"metric": {value}'))

  return edit


@pytest.mark.parametrize("best", [1, 2])
@pytest.mark.parametrize(
  "damage",
  [
    as_folder,
    lambda path: path.write_bytes(path.read_bytes()[:-9]),
    lambda path: path.write_bytes(b"\xff\x00garbage"),
    lambda path: path.write_bytes(b""),
    lambda path: path.write_text("[" * 200_000),
    lambda path: path.write_text('{"format": 99}'),
    lambda path: path.write_text(path.read_text().replace("0.5", "0.50001")),
    with_metric('"5"'),
    with_metric("4.5"),
    with_metric("[0.5]"),
    with_metric("1" + 400 * "0"),
  ],
)
def test_a_damaged_manifest_neither_ends_a_run_nor_loses_the_best(
  directory, caplog, damage, best
):
  checkpointer = Checkpointer(directory, keep_last=3)
  metrics = {1: 0.4, 2: 0.3, 3: 0.2, 3 - best: 0.9, best: 0.5}
  for step in (1, 2, 3):
    checkpointer.save(step, make_state(step), EXTRA, metrics[step])
  checkpointer.close()
  damage(directory / str(best) / "manifest.json")
  checkpointer = Checkpointer(directory, keep_last=1)
  checkpointer.save(4, make_state(4), EXTRA, 0.3)
  assert checkpointer.steps() == [1, 2, 4]  # one is best, one could have been
  assert checkpointer.metric(best) is None
  text = f"The manifest of the checkpoint of step {best} is damaged"
  assert caplog.text.count(text) == 1
  reopened = Checkpointer(directory, keep_last=1)
  assert reopened.newest_whole() == 4
  assert reopened.best_whole() == reopened.best_step() == 3 - best
  with pytest.raises(ValueError, match=f"of step {best} cannot be used"):
    reopened.read_extra(best)


@pytest.mark.parametrize("bit", range(8))
def test_a_flipped_bit_of_the_format_is_damage(three, directory, bit):
  manifest = directory / "30" / "manifest.json"
  data = bytearray(manifest.read_bytes())
  data[data.index(b'"format": 1') + 10] ^= 1 << bit
  manifest.write_bytes(data)
  assert three.newest_whole() == 20


@pytest.mark.parametrize("value", ["5", True, [0.5], 10**400, {}])
def test_a_metric_that_another_program_signed_is_checked(directory, value):
  checkpointer = Checkpointer(directory, keep_last=3)
  for step in (10, 20):
    extra = EXTRA | {"index_versions": [step]}
    checkpointer.save(step, make_state(step), extra, 0.5, 2.0)
  checkpointer.wait()
  manifest = directory / "20" / "manifest.json"
  signed = json.loads(manifest.read_text())
  signed["content"] |= {"metric": value, "loss": value}
  manifest.write_text(json.dumps(artifacts.with_digest(signed)))
  assert checkpointer.metric(20) is None
  assert checkpointer.loss(20) is None
  assert checkpointer.best_step() == 10
  checkpointer.set_aside_after(10)
  assert checkpointer.left() == [(20, "20.left", None, [20])]
  checkpointer.save(30, make_state(30), EXTRA)
  assert checkpointer.newest_whole() == 30


def test_a_save_reads_no_other_checkpoint(three, directory):
  for path in files_of(directory, 20):
    path.write_bytes(b"")
  three.save(40, make_state(40), EXTRA)
  assert three.steps() == [20, 30, 40]


def test_going_back_sets_later_checkpoints_aside(three, directory):
  with pytest.raises(FileNotFoundError, match=r"Choose one of \[10, 20, 30\]"):
    three.set_aside_after(15)
  three.set_aside_after(10)
  assert three.steps() == [10]
  assert {p.name for p in directory.iterdir()} == {"10", "20.left", "30.left"}


def test_without_a_metric_the_calmest_checkpoint_is_kept(directory):
  checkpointer = Checkpointer(directory, keep_last=2)
  for step, loss in ((1, 5.0), (2, 3.0), (3, 40.0), (4, 900.0), (5, 1e4)):
    checkpointer.save(step, make_state(step), EXTRA, None, loss)
  assert checkpointer.steps() == [2, 4, 5]
  checkpointer.save(6, make_state(6), EXTRA, 0.5, 2.0)
  assert checkpointer.steps() == [5, 6]  # a metric says which is best


# Of threads in orbax, which ends before they do.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_is_one_message_and_leaves_what_was_saved(three, directory):
  def save_whole():
    three.save(40, make_state(40), EXTRA)
    three.wait()

  with (
    full_disk(2000),
    pytest.raises(
      OSError,
      match=rf"The checkpoint {directory}/40 could not be saved: .* Make room"
      r".* resumes from the previous checkpoint\.$",
    ) as error,
  ):
    save_whole()
  assert "Traceback" not in str(error.value)
  assert len(str(error.value).splitlines()) == 1
  again = Checkpointer(directory, keep_last=3)
  assert again.newest_whole() == 30
  again.save(40, make_state(40), EXTRA)
  assert again.steps() == [20, 30, 40]


_FILLS_THE_DISK = """
import gc
import sys
from absl import logging  # as in a command
import jax.numpy as jnp
from disks import full_disk
from rag_jax import artifacts
from rag_jax.training.checkpoint import Checkpointer
saved = Checkpointer(sys.argv[1], keep_last=1)
state = {str(i): jnp.arange(900.0) + i for i in range(50)}
with full_disk(2000):
  try:
    saved.save(1, state, {})
    saved.close()
  except OSError as error:
    print(error)
gc.collect()
"""


def test_a_full_disk_shows_no_stack_traces_of_orbax(tmp_path):
  done = subprocess.run(
    [sys.executable, "-c", _FILLS_THE_DISK, tmp_path],
    env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    capture_output=True,
    text=True,
    check=False,
    timeout=200,
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout.count("could not be saved:") == 1
  assert done.stderr == ""


@pytest.mark.parametrize(
  ("error", "shown"),
  [
    (OSError(errno.ENOSPC, "No space left on device"), False),
    (ValueError("X: Failed to write: Disk quota exceeded [28]"), False),
    (OSError(errno.EIO, "Input/output error"), True),
    (KeyError("a bug"), True),
  ],
)
def test_of_tasks_that_failed_unseen_only_a_full_disk_is_silent(
  directory, caplog, error, shown
):
  Checkpointer(directory, keep_last=1)
  text = "Task exception was never retrieved"
  logging.getLogger("asyncio").error(text, exc_info=error)
  assert (text in caplog.text) == shown
