"""The directory of a live index: what is kept, and what is refused."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest

from rag_jax import artifacts
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
