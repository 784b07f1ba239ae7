"""What is interrupted, damaged or written twice is refused; nothing is lost."""

import json
import os
import signal
import subprocess
import sys

from disks import full_disk
import pytest

from rag_jax.corpus.passage_reader import load_passages
from rag_jax.corpus.passages import Passage
from rag_jax.corpus.store import PassageStore
from rag_jax.corpus.store import write_store

P = 25
SHARD = "passages-00001.arrayrecord"


def passages(n=P):
  """Texts that do not shrink much when they are compressed."""
  for i in range(n):
    yield Passage(f"id-{i}", "", os.urandom(200).hex())


@pytest.fixture
def directory(tmp_path):
  write_store(tmp_path / "store", passages(), passages_per_shard=10)
  return tmp_path / "store"


def refused(directory, match, error=ValueError):
  """Opening the store says what is wrong, and what to do."""
  with pytest.raises(error, match=match) as info:
    PassageStore(directory)
  assert "write it again" in str(info.value)


FILES = [SHARD, "id_hashes.npy", "id_rows.npy"]


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(directory, name):
  (directory / name).unlink()
  refused(directory, f"{name} is missing")


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_was_cut_off_is_named(directory, name):
  size = (directory / name).stat().st_size
  os.truncate(directory / name, size // 2)
  refused(directory, rf"{name}.*was cut off: it has {size // 2} bytes")


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_is_noticed(directory, name):
  data = bytearray((directory / name).read_bytes())
  data[len(data) // 2] ^= 1
  (directory / name).write_bytes(data)
  refused(directory, f"{name}.*damaged")


def test_a_store_without_manifest_was_cut_off(directory):
  (directory / "manifest.json").unlink()
  refused(directory, "no manifest.json", FileNotFoundError)
  # Not taken for a folder of texts either.
  with pytest.raises(FileNotFoundError, match="no passages was built there"):
    load_passages(str(directory))


@pytest.mark.parametrize(
  ("key", "value"), [("num_passages", "25"), ("fingerprint", None)]
)
def test_a_manifest_of_other_content_is_refused(directory, key, value):
  manifest = json.loads((directory / "manifest.json").read_text())
  del manifest["sha256"]  # as of a manifest of before
  manifest["content"][key] = value
  (directory / "manifest.json").write_text(json.dumps(manifest))
  refused(directory, f"says {key}=.*; expected")


@pytest.mark.parametrize("kind", ["missing", "cut", "flipped", "other"])
def test_a_shard_that_changes_while_the_store_is_open_is_an_error(
  directory, kind
):
  # Not by open_store: the check of its type reads a passage, any one.
  store = PassageStore(directory)
  path = directory / SHARD
  data = bytearray(path.read_bytes())
  path.unlink()
  if kind == "cut":
    path.write_bytes(data[:1000])
  elif kind == "flipped":
    for i in range(100, len(data), 100):
      data[i] ^= 1
    path.write_bytes(data)
  elif kind == "other":
    path.write_bytes((directory / "passages-00002.arrayrecord").read_bytes())
  assert store[3].id == "id-3"
  with pytest.raises(
    ValueError, match=rf"{SHARD} in .*cannot be read at record .*has changed"
  ) as info:
    list(store)
  assert "write it again" in str(info.value)


def test_a_bucket_is_refused_for_writing_and_for_reading():
  with pytest.raises(ValueError, match=r"gs://b/s, a bucket.*Build it on a"):
    write_store("gs://b/s", passages())
  with pytest.raises(ValueError, match=r"gs://b/s.*from a bucket.*Copy it"):
    PassageStore("gs://b/s")


def test_no_passages_are_no_store(tmp_path):
  with pytest.raises(
    ValueError, match=r"no passages to write to .*Is the corp"
  ):
    write_store(tmp_path / "s", [])
  refused(tmp_path / "s", "no manifest.json", FileNotFoundError)


def test_settings_are_checked_before_anything_is_written(tmp_path):
  def never():
    raise AssertionError
    yield

  with pytest.raises(ValueError, match=r"passages_per_shard=0.*at least 1"):
    write_store(tmp_path / "s", never(), passages_per_shard=0)
  with pytest.raises(TypeError, match=r"config.*JSON values.*Convert"):
    write_store(tmp_path / "s", never(), config={"path": object()})
  assert not (tmp_path / "s").exists()


def test_a_complete_store_is_not_written_over(directory):
  before = PassageStore(directory)[:]
  with pytest.raises(ValueError, match=r"holds a complete store.*choose ano"):
    write_store(directory, passages(3))
  assert PassageStore(directory)[:] == before


def test_a_directory_with_files_of_others_is_left_alone(tmp_path):
  (tmp_path / "thesis.txt").write_text("years of work")
  with pytest.raises(ValueError, match=r"other files .*thesis.txt.*Choose"):
    write_store(tmp_path, passages())
  assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_of_two_writers_one_is_refused_and_the_other_finishes(tmp_path):
  expected = list(passages())

  def first():
    yield from expected[:15]
    with pytest.raises(ValueError, match=r"else is building .*Wait until"):
      write_store(tmp_path / "s", passages(3))
    yield from expected[15:]

  store = write_store(tmp_path / "s", first(), passages_per_shard=10)
  assert list(store) == expected
  assert list(PassageStore(tmp_path / "s")) == expected


# One file of texts, or so many ids that their file is the largest.
@pytest.mark.parametrize(("n", "per_shard"), [(5000, 5000), (20_000, 1000)])
def test_a_full_disk_is_said_and_leaves_no_half_store(tmp_path, n, per_shard):
  texts = (Passage(f"id-{i}", "", "x" * 99) for i in range(n))
  with (
    full_disk(150_000),
    pytest.raises(OSError, match=r"cannot be written .*too large.*Free some"),
  ):
    write_store(tmp_path / "s", texts, passages_per_shard=per_shard)
  assert os.listdir(tmp_path / "s") == [".lock.tmp"]
  refused(tmp_path / "s", "no manifest.json", FileNotFoundError)
  assert len(write_store(tmp_path / "s", passages(5))) == 5


def test_an_error_of_the_reader_of_the_passages_stays_its_own(tmp_path):
  def broken():
    yield from passages(3)
    raise OSError("the source is gone")

  with pytest.raises(OSError, match=r"^the source is gone$"):
    write_store(tmp_path / "s", broken())
  assert os.listdir(tmp_path / "s") == [".lock.tmp"]


KILLED = """
import os, signal, sys
from rag_jax.corpus.passages import Passage
from rag_jax.corpus.store import write_store

def passages():
  for i in range(25):
    if i == 17:
      os.kill(os.getpid(), signal.SIGKILL)
    yield Passage(f"id-{i}", "", "A text.")

write_store(sys.argv[1], passages(), passages_per_shard=10)
"""


def test_a_writer_that_was_killed_is_noticed_and_can_begin_again(tmp_path):
  killed = subprocess.run(
    [sys.executable, "-c", KILLED, tmp_path / "s"], check=False
  )
  assert killed.returncode == -signal.SIGKILL
  assert (tmp_path / "s" / SHARD).exists()
  refused(tmp_path / "s", "no manifest.json", FileNotFoundError)
  expected = list(passages(5))
  assert list(write_store(tmp_path / "s", expected)) == expected
  # What the first left behind is gone, the second shard for instance.
  assert list(PassageStore(tmp_path / "s")) == expected
  assert not (tmp_path / "s" / SHARD).exists()
