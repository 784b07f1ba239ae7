"""Files are written whole and nowhere else; a full disk is called that."""

import errno
import os

from disks import PowerLoss
from disks import full_disk
import numpy as np
import pytest

from rag_jax import disk

REMEDY = "Remove it."


def test_a_file_has_the_old_content_or_the_new_and_the_new_stays(tmp_path):
  file = tmp_path / "root" / "f.txt"
  file.parent.mkdir()
  disk.write_atomically(file, "old")
  for names_survive in (True, False):
    seen = []

    def cut(write, seen=seen, names_survive=names_survive):
      there = tmp_path / f"{names_survive} {len(seen)}"
      write(there)
      seen.append((there / "f.txt").read_text())

    with PowerLoss(file.parent, cut, names_survive=names_survive) as power:
      disk.write_atomically(file, "new")
      power.write(tmp_path / f"end {names_survive}")
    assert set(seen) <= {"old", "new"}
    assert (tmp_path / f"end {names_survive}" / "f.txt").read_text() == "new"
    disk.write_atomically(file, b"old")
  assert os.listdir(file.parent) == ["f.txt"]


def test_without_syncing_a_power_cut_loses_what_was_written(tmp_path):
  """The oracle of the other tests notices what it is for."""
  root = tmp_path / "root"
  root.mkdir()
  with PowerLoss(root, lambda write: None, names_survive=True) as power:
    (root / ".f.tmp").write_text("new")
    os.replace(root / ".f.tmp", root / "f")
    power.write(tmp_path / "empty")
    with open(root / "g", "w") as f:
      f.write("new")
      f.flush()
      os.fsync(f.fileno())
  assert (tmp_path / "empty" / "f").read_text() == ""
  with PowerLoss(root, lambda write: None, names_survive=False) as power:
    disk.sync(root / "f")
    os.replace(root / "f", root / "h")
    power.write(tmp_path / "unnamed")
    disk.sync(root)
    power.write(tmp_path / "named")
  assert sorted(os.listdir(tmp_path / "unnamed")) == ["f", "g"]
  assert sorted(os.listdir(tmp_path / "named")) == ["g", "h"]


def test_a_link_is_replaced_and_not_followed(tmp_path):
  (tmp_path / "theirs").write_text("years of work")
  (tmp_path / "f").symlink_to("theirs")
  disk.write_atomically(tmp_path / "f", "new")
  assert (tmp_path / "theirs").read_text() == "years of work"
  assert (tmp_path / "f").read_text() == "new"
  assert not (tmp_path / "f").is_symlink()


@pytest.mark.parametrize("target", ["theirs", "nowhere"])
def test_no_file_is_opened_through_a_link(tmp_path, target):
  (tmp_path / "theirs").write_text("years of work")
  (tmp_path / "f").symlink_to(target)
  for flags in (os.O_RDONLY, os.O_RDWR | os.O_CREAT):
    with pytest.raises(ValueError, match=f"f is a link to {target}; .*Remove"):
      disk.open_own(tmp_path / "f", flags, remedy=REMEDY)
  with pytest.raises(ValueError, match="is a link to"):
    disk.read_own(tmp_path / "f", remedy=REMEDY)
  assert not (tmp_path / "nowhere").exists()


def test_a_pipe_and_a_folder_are_no_files_and_nobody_waits(tmp_path):
  os.mkfifo(tmp_path / "pipe")
  (tmp_path / "folder").mkdir()
  for name in ("pipe", "folder"):
    for flags in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR | os.O_CREAT):
      with pytest.raises(ValueError, match=f"{name} is no plain file; expect"):
        disk.open_own(tmp_path / name, flags, remedy=REMEDY)


def test_a_file_with_two_names_is_read_but_not_changed(tmp_path):
  (tmp_path / "f").write_text("x")
  os.link(tmp_path / "f", tmp_path / "g")
  assert disk.read_own(tmp_path / "g", remedy=REMEDY) == b"x"
  with pytest.raises(ValueError, match=r"g has 2 names \(hard links\).*Remove"):
    disk.open_own(tmp_path / "g", os.O_RDWR, remedy=REMEDY, writes=True)


def test_a_missing_file_is_missing(tmp_path):
  with pytest.raises(FileNotFoundError):
    disk.read_own(tmp_path / "f", remedy=REMEDY)


def write_array(path):
  np.save(path / "x.npy", np.zeros(1000))


@pytest.mark.parametrize(
  "write",
  [
    lambda path: (path / "f").write_bytes(bytes(1000)),
    lambda path: disk.write_atomically(path / "f", "x" * 1000),
    write_array,
  ],
)
def test_a_full_disk_is_called_that_once(tmp_path, write):
  def explained():
    return disk.explaining(tmp_path, "The thing", "What is there is kept.")

  with (
    full_disk(100),
    pytest.raises(disk.UnwritableError) as error,
    explained(),
    explained(),
  ):
    write(tmp_path)
  message = str(error.value)
  assert message.startswith(f"The thing cannot be written to {tmp_path} (")
  assert message.count("Expected") == 1
  assert message.endswith("Free some space, or choose another directory."
                          " What is there is kept.")  # fmt: skip


def test_what_cannot_be_read_elsewhere_is_not_blamed_on_the_output(tmp_path):
  for error in (
    PermissionError(errno.EACCES, "denied", "/corpus/secret.txt"),
    FileNotFoundError(errno.ENOENT, "missing", str(tmp_path / "f")),
    OSError("another"),
  ):
    with (
      pytest.raises(OSError, match=str(error.args[-1])) as found,
      disk.explaining(tmp_path / "out", "The thing", REMEDY),
    ):
      raise error
    assert found.value is error


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EPERM])
def test_a_folder_that_may_not_be_written_to_is_called_that(tmp_path, number):
  with (
    pytest.raises(disk.UnwritableError, match=r"Change its permissions, or ch"),
    disk.explaining(tmp_path / "out", "The thing", REMEDY),
  ):
    raise OSError(number, "no", str(tmp_path / "out" / "f"))


def test_the_state_of_a_folder_changes_with_each_of_its_files(tmp_path):
  (tmp_path / "a").mkdir()
  (tmp_path / "a" / "b.txt").write_text("x")
  (tmp_path / "broken").symlink_to("nowhere")
  [before] = disk.file_states(tmp_path)
  assert before.startswith("a/b.txt 1 ")
  assert disk.file_states(tmp_path / "a" / "b.txt")[0].startswith(". 1 ")
  (tmp_path / "a" / "b.txt").write_text("xy")
  assert disk.file_states(tmp_path) != [before]
