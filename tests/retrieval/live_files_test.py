"""The directory of a live index: what is kept, and what is refused."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest

from rag_jax import artifacts
from rag_jax.retrieval import live_files
from rag_jax.retrieval.exact import ExactIndex
from rag_jax.retrieval.live import LiveIndex

P, R = 60, 8
PRINTS = {"encoder_fingerprint": "1a2b", "passages_fingerprint": "3c4d"}


def normal(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def base(seed=0):
  return ExactIndex(normal(P, R, seed=seed), **PRINTS)


@pytest.fixture
def live(tmp_path):
  return LiveIndex.create(tmp_path / "live", base(), rebuild_share=9.0)


def found(index):
  """Returns all passages, as a search finds them and as they are."""
  ids, scores = index.search(normal(3, R, seed=7), index.version.num_live)
  return ids.tolist(), scores.tolist(), index.version.embeddings[:].tolist()


def test_who_holds_a_version_goes_on_reading_it_when_it_is_removed(live):
  reader = LiveIndex(live._path)
  old = found(reader)
  live.delete(np.arange(20))
  live.rebuild(lambda rows, path: ExactIndex(rows[:], **PRINTS).save(path))
  live.prune(keep=1)
  names = {p.name for p in live._path.iterdir()}
  assert names == {"CURRENT", ".lock.tmp", "v000003", "b000002"}
  assert found(reader) == old
  assert reader.reload()
  assert not reader.reload()
  assert reader.version.num_live == P - 20
  assert found(reader) == found(live)


def test_versions_are_removed_only_when_asked(live):
  for _ in range(3):
    live.upsert(normal(1, R))
  assert len(list(live._path.glob("v*"))) == 4
  live.prune(keep=2)
  names = sorted(p.name for p in live._path.glob("*0*"))
  assert names == ["b000001", "v000003", "v000004"]
  assert LiveIndex(live._path).version.num_passages == P + 3


# Dies before its nth change of the disk, for every n, as kill -9 would.
KILLED = r"""
import os, pathlib, signal, sys
import numpy as np
from rag_jax.config import IndexConfig
from rag_jax.retrieval.exact import ExactIndex
from rag_jax.retrieval.index import build_index_directory
from rag_jax.retrieval.live import LiveIndex

path = sys.argv[1]
prints = {"encoder_fingerprint": "1a2b", "passages_fingerprint": "3c4d"}
rng = np.random.default_rng(0)
table = rng.normal(size=(20, 4)).astype(np.float32)
LiveIndex.create(path, ExactIndex(table, **prints), rebuild_share=9.0)
question = rng.normal(size=(1, 4)).astype(np.float32)

def build(rows, folder):
  config = IndexConfig(kind="exact")
  build_index_directory(folder, rows, config, **prints)

updates = {
  "upsert": lambda index: index.upsert(table[:3] + 1, np.array([1, 2, 20])),
  "delete": lambda index: index.delete(np.array([5, 6])),
  "rebuild": lambda index: index.rebuild(build),
  "prune": lambda index: index.prune(keep=1),
}
WRITES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate"}

def die_before(n):
  left = [n]
  def hook(event, args):
    writes = event in WRITES or event == "open" and (
      isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR))
    if writes and str(args[0]).startswith(path):
      left[0] -= 1
      if left[0] < 0:
        os.kill(os.getpid(), signal.SIGKILL)
  sys.addaudithook(hook)

def state():
  index = LiveIndex(path)
  ids, scores = index.search(question, index.version.num_live)
  return ids.tobytes(), scores.tobytes(), index.version.embeddings[:].tobytes()

for name, update in updates.items():
  before, n, finished = state(), 0, False
  after = None
  while not finished:
    child = os.fork()
    if not child:
      index = LiveIndex(path, rebuild_share=9.0)
      die_before(n)
      update(index)
      os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status == 0 or os.WTERMSIG(status) == signal.SIGKILL, status
    finished = status == 0
    now = state()
    if now != before:  # the old version or the new one, nothing else
      assert after in (None, now), (name, n)
      after = now
    else:
      assert after is None or before == after, (name, n)
    n += 1
  assert (after is None) == (name in ("rebuild", "prune")), name
  print(name, n - 1)
print(sorted(p.name for p in pathlib.Path(path).iterdir()))
"""


def test_a_writer_that_is_killed_anywhere_leaves_the_old_version(tmp_path):
  printed = subprocess.run(
    [sys.executable, "-W", "ignore", "-c", KILLED, str(tmp_path / "live")],
    check=True,
    capture_output=True,
    text=True,
    env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
  ).stdout.splitlines()
  kills = dict(line.split() for line in printed[:-1])
  assert list(kills) == ["upsert", "delete", "rebuild", "prune"]
  assert all(int(n) >= 7 for n in kills.values()), kills
  assert re.fullmatch(
    r"\['\.lock\.tmp', 'CURRENT', 'b\d+', 'v\d+'\]", printed[-1]
  )


def test_a_live_index_is_not_created_over_another(live):
  with pytest.raises(ValueError, match=r"is a live index in .* already"):
    LiveIndex.create(live._path, base())


def test_where_there_is_no_live_index_it_says_so(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"no CURRENT.*LiveIndex.create"):
    LiveIndex(tmp_path)


def test_a_bucket_is_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(artifacts, "is_local", lambda path: False)
  with pytest.raises(ValueError, match="is in a bucket; expected a directory"):
    LiveIndex(tmp_path)


def test_no_version_can_be_kept_is_refused(live):
  with pytest.raises(ValueError, match="keep=0 versions; expected at least 1"):
    live.prune(keep=0)


@pytest.mark.parametrize("name", ["../v000001", "b000001", "v1", ""])
def test_a_name_that_is_no_version_is_refused(live, name):
  (live._path / "CURRENT").write_text(name)
  with pytest.raises(
    ValueError, match=f"names '{re.escape(name)}'; expected a"
  ):
    LiveIndex(live._path)


def test_a_damaged_version_is_refused_and_the_open_one_stays(live):
  reader = LiveIndex(live._path)
  old = found(reader)
  live.upsert(normal(1, R))
  file = live._path / "v000002" / "delta.npy"
  data = bytearray(file.read_bytes())
  data[-2] ^= 1
  file.write_bytes(data)
  with pytest.raises(ValueError, match=r"delta.npy.*content changed.*Restore"):
    reader.reload()
  assert found(reader) == old


def test_a_base_that_is_gone_or_another_is_refused(live):
  base(seed=1).save(live._path / "b000001")
  with pytest.raises(ValueError, match=r"b000001 is not the base that v000001"):
    LiveIndex(live._path)
  (live._path / "b000001").rename(live._path / "elsewhere")
  with pytest.raises(FileNotFoundError, match=r"needs the base 'b000001'"):
    LiveIndex(live._path)


def test_every_bit_of_what_says_which_version_is_in_use_matters(live):
  live.upsert(normal(1, R))
  file = live._path / "CURRENT"
  whole = file.read_bytes()
  for bit in range(8 * len(whole)):
    data = bytearray(whole)
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)
    with pytest.raises((ValueError, FileNotFoundError), match="CURRENT"):
      LiveIndex(live._path)
  for damaged in (whole[:7] + b"\n", whole[:7], b"", b"\xff" + whole):
    file.write_bytes(damaged)
    with pytest.raises(ValueError, match="CURRENT"):
      LiveIndex(live._path)


def test_an_index_of_before_there_were_digests_is_opened(
  live, monkeypatch, caplog
):
  monkeypatch.setattr(live_files, "MARK", {})
  live.upsert(normal(1, R))
  (live._path / "CURRENT").write_text("v000002\n")
  assert LiveIndex(live._path).version.name == "v000002"
  assert "CURRENT has no digest of v000002: an older version" in caplog.text
  monkeypatch.undo()
  live.upsert(normal(1, R))
  assert re.fullmatch(
    r"v000003 [0-9a-f]{64}\n", (live._path / "CURRENT").read_text()
  )


@pytest.mark.parametrize("keep", [1, 2])
def test_set_back_by_mistake_later_versions_are_kept(live, keep, caplog):
  for _ in range(2):
    live.upsert(normal(1, R))
  now = (live._path / "CURRENT").read_bytes()
  live_files.switch(live._path, "v000001")
  reader = LiveIndex(live._path)
  assert reader.version.name == "v000001"
  assert "holds v000002, v000003, later than v000001" in caplog.text
  reader.prune(keep=keep)
  (live._path / "CURRENT").write_bytes(now)
  assert LiveIndex(live._path).version.num_passages == P + 2


def test_without_the_file_that_names_a_version_nothing_is_written(live):
  live.upsert(normal(1, R))
  (live._path / "CURRENT").unlink()
  kept = sorted(os.listdir(live._path))
  with pytest.raises(ValueError, match=r"v000001, v000002 of a live index"):
    LiveIndex.create(live._path, base())
  with pytest.raises(FileNotFoundError, match="no CURRENT"):
    live.delete(np.array([1]))
  assert sorted(os.listdir(live._path)) == kept


def test_a_link_in_the_place_of_the_name_is_refused(live, tmp_path):
  (live._path / "CURRENT").rename(tmp_path / "CURRENT")
  (live._path / "CURRENT").symlink_to(tmp_path / "CURRENT")
  with pytest.raises(ValueError, match=r"CURRENT is a link to"):
    LiveIndex(live._path)
