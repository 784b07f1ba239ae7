"""One builds in a directory at a time, and only where nothing else lies."""

import os
import threading
import time

import pytest

from rag_jax import artifacts
from rag_jax.directory_lock import building
from rag_jax.directory_lock import lock


def build(path):
  return building(path, kind="thing", own=lambda name: name.endswith(".part"))


def test_the_directory_is_made_and_no_lock_gets_into_its_manifest(tmp_path):
  with build(tmp_path / "a" / "b") as path:
    (path / "1.part").write_text("x")
    artifacts.write_manifest(path, kind="thing", format=1, content={})
  manifest = (path / artifacts.MANIFEST).read_text()
  assert "1.part" in manifest
  assert "lock" not in manifest


def test_a_second_one_is_refused_until_the_first_ends(tmp_path):
  with build(tmp_path):
    with (
      pytest.raises(
        ValueError,
        match=rf"building a thing .*: pid {os.getpid()} .*Wait until",
      ),
      build(tmp_path),
    ):
      pytest.fail("two build at once")
    # One that was refused does not release the lock of the other.
    with pytest.raises(ValueError, match="else is building"):
      build(tmp_path).__enter__()
  with build(tmp_path):
    pass


def test_the_file_of_a_released_lock_does_not_say_who_held_it(tmp_path):
  with build(tmp_path):
    assert str(os.getpid()) in (tmp_path / ".lock.tmp").read_text()
  assert (tmp_path / ".lock.tmp").read_text() == ""
  with build(tmp_path):
    assert str(os.getpid()) in (tmp_path / ".lock.tmp").read_text()


def test_a_refused_folder_of_others_is_left_as_it_was(tmp_path):
  (tmp_path / "mine.txt").write_text("x")
  with pytest.raises(ValueError, match=r"other files .*mine\.txt"):
    build(tmp_path).__enter__()
  assert os.listdir(tmp_path) == ["mine.txt"]


@pytest.mark.parametrize("name", ["file", "file/below", "/proc/thing"])
def test_where_no_folder_can_be_is_said(name, tmp_path):
  (tmp_path / "file").write_text("x")
  with pytest.raises(ValueError, match=r"thing cannot be built .*Choose ano"):
    build(tmp_path / name).__enter__()


def test_one_that_waits_builds_when_the_other_ends(tmp_path, caplog):
  order = []

  def second():
    with building(tmp_path, kind="thing", own=lambda name: True, wait=True):
      order.append("second")

  with caplog.at_level("INFO"), build(tmp_path):
    thread = threading.Thread(target=second)
    thread.start()
    while "Waiting for another process" not in caplog.text:
      time.sleep(0.01)
    order.append("first")
  thread.join()
  assert order == ["first", "second"]


def test_a_lock_with_another_name_is_not_written_to(tmp_path):
  (tmp_path / "theirs").write_text("years of work")
  (tmp_path / "built").mkdir()
  os.link(tmp_path / "theirs", tmp_path / "built" / ".lock.tmp")
  with (
    pytest.raises(ValueError, match=r"has 2 names .*Remove it"),
    build(tmp_path / "built"),
  ):
    pytest.fail("wrote to the file of others")
  assert (tmp_path / "theirs").read_text() == "years of work"


def test_who_waits_for_the_lock_gets_it_when_the_other_ends(tmp_path):
  order = []

  def second():
    with lock(tmp_path, kind="thing", wait=True):
      order.append("second")

  thread = threading.Thread(target=second)
  with build(tmp_path):
    thread.start()
    thread.join(0.2)
    assert thread.is_alive()
    order.append("first")
  thread.join(10)
  assert order == ["first", "second"]


def test_the_lock_is_released_by_an_error(tmp_path):
  with pytest.raises(KeyError), build(tmp_path):
    raise KeyError
  with build(tmp_path):
    pass


def test_what_an_interrupted_build_left_may_lie_there(tmp_path):
  for name in ("1.part", artifacts.MANIFEST):
    (tmp_path / name).write_text("x")
  with build(tmp_path) as path:
    assert (path / "1.part").exists()


def test_files_of_others_are_named_and_left_alone(tmp_path):
  for i in range(7):
    (tmp_path / f"{i}.txt").write_text("years of work")
  with (
    pytest.raises(ValueError, match=r"other files .*'0.txt'.* \.\.\..*Choose"),
    build(tmp_path),
  ):
    pytest.fail("built among files of others")
  assert len(list(tmp_path.glob("*.txt"))) == 7


def test_a_bucket_is_refused():
  with (
    pytest.raises(ValueError, match=r"gs://b/x, a bucket.*Build it on a disk"),
    build("gs://b/x"),
  ):
    pytest.fail("built in a bucket")


def test_a_file_system_without_locks_is_warned_about(
  tmp_path, monkeypatch, caplog
):
  def no_locks(file, how):
    raise OSError(95, "Operation not supported")

  monkeypatch.setattr("fcntl.flock", no_locks)
  with build(tmp_path) as path:
    assert path == tmp_path
  assert "has no locks ([Errno 95]" in caplog.text
