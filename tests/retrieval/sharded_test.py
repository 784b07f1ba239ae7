"""Many searchers against one, and what is left of a build that was cut off."""

import shutil
import threading
import time
import tracemalloc

from indexes import FINGERPRINTS
from indexes import assert_equal
from indexes import content_of
from indexes import edit_manifest
from indexes import exact as single
from linen import normal
import numpy as np
import pytest

from rag_jax import artifacts
from rag_jax.config import IndexConfig
from rag_jax.retrieval import exact
from rag_jax.retrieval import sharded
from rag_jax.retrieval.embeddings import EmbeddingFile
from rag_jax.retrieval.embeddings import open_embeddings
from rag_jax.retrieval.index import Index
from rag_jax.retrieval.index import build_index
from rag_jax.retrieval.index import build_index_directory
from rag_jax.retrieval.index import load_index
from rag_jax.retrieval.sharded import ShardedIndex
from rag_jax.retrieval.sharded import shard_bounds

P, R, PER_SHARD = 100, 8, 30
ARRAYS = ("embeddings.npy", "scales.npy")  # ScaNN has files of its own
KINDS = pytest.mark.parametrize("kind", ["exact", "scann"])


def config(kind="exact", **settings):
  return IndexConfig(kind=kind, passages_per_shard=PER_SHARD, **settings)


def test_shards_follow_one_another_and_are_of_nearly_one_size():
  for num_passages in range(1, 40):
    for per_shard in range(num_passages + 3):
      bounds = shard_bounds(num_passages, per_shard)
      assert [i for a, b in bounds for i in range(a, b)] == list(
        range(num_passages)
      )
      sizes = [b - a for a, b in bounds]
      assert max(sizes) - min(sizes) <= 1
      assert max(sizes) <= (per_shard or num_passages)
      assert len(sizes) == -(-num_passages // (per_shard or num_passages))


@pytest.mark.parametrize("n_docs", [1, 7, 60, P])
def test_exact_shards_find_what_one_index_finds_bit_for_bit(n_docs):
  # Every passage twice, in different shards, and a question that ties them all.
  embeddings = np.concatenate([normal(P // 2, R)] * 2)
  questions = np.concatenate([normal(9, R, seed=1), np.zeros((1, R))])
  questions = questions.astype(np.float32)
  index = build_index(embeddings, config(), **FINGERPRINTS)
  assert isinstance(index, ShardedIndex)
  assert len(index.shards) == 4
  assert_equal(
    index.search(questions, n_docs),
    single(embeddings).search(questions, n_docs),
  )


@KINDS
def test_a_directory_finds_the_same_wherever_it_was_moved_to(kind, tmp_path):
  embeddings, questions = normal(P, R), normal(5, R, seed=1)
  file = tmp_path / "all.npy"
  np.save(file, embeddings)
  mapped = np.load(file, mmap_mode="r")
  build_index_directory(
    tmp_path / "built", mapped, config(kind), **FINGERPRINTS
  )
  (tmp_path / "built").rename(tmp_path / "moved")
  index = load_index(tmp_path / "moved", **FINGERPRINTS)
  assert isinstance(index, Index)
  assert [s.kind for s in index.shards] == [kind] * 4
  assert (index.num_passages, index.embedding_dim) == (P, R)
  np.testing.assert_array_equal(index.embeddings[:], embeddings)
  assert_equal(
    index.search(questions, 6), single(embeddings).search(questions, 6)
  )
  # The reference for measuring recall reads the shards' rows where they lie.
  assert_equal(
    index.search(questions, 6), single(index.embeddings).search(questions, 6)
  )
  index.save(tmp_path / "moved")  # over itself
  again = load_index(tmp_path / "moved")
  assert_equal(index.search(questions, 6), again.search(questions, 6))


@KINDS
@pytest.mark.parametrize("storage", ["float32", "bfloat16", "int8"])
def test_embeddings_that_lie_in_the_directory_are_not_stored_again(
  kind, storage, tmp_path
):
  path, questions = tmp_path / "built", normal(5, R, seed=1)
  path.mkdir()
  EmbeddingFile(path, P, R, storage).write(0, normal(P, R))
  embeddings = open_embeddings(path)
  build_index_directory(path, embeddings, config(kind), **FINGERPRINTS)
  arrays = {"embeddings.npy"} | ({"scales.npy"} if storage == "int8" else set())
  stored = {p.name for p in path.rglob("*") if p.name in ARRAYS}
  assert stored == arrays
  assert len([p for p in path.rglob("*.npy") if p.name in ARRAYS]) == len(
    arrays
  )
  path.rename(tmp_path / "moved")
  index = load_index(tmp_path / "moved")
  expected = single(embeddings[:]).search(questions, 6)
  assert_equal(index.search(questions, 6), expected)
  np.testing.assert_array_equal(index.embeddings[:], embeddings[:])
  index.save(tmp_path / "moved")  # over itself
  index.save(tmp_path / "other")  # where there are no such files
  for folder in ("moved", "other"):
    again = load_index(tmp_path / folder)
    assert_equal(again.search(questions, 6), expected)
  assert len(list((tmp_path / "other").rglob("embeddings.npy"))) == 4


def test_a_shard_of_rows_that_are_not_there_is_refused(tmp_path):
  EmbeddingFile(tmp_path, P, R, "float32").write(0, normal(P, R))
  build_index_directory(
    tmp_path, open_embeddings(tmp_path), config(), **FINGERPRINTS
  )
  part = tmp_path / "shards" / "00003" / "part.json"
  for text in ('{"rows": [75, 101]}', '{"rows": [5, 5]}', "{}", "75"):
    part.write_text(text)
    with pytest.raises(ValueError, match=r"part.json says .* of the 100 rows"):
      open_embeddings(part.parent)
  with pytest.raises(ValueError, match=r"part.json"):
    load_index(tmp_path)


def test_few_passages_are_one_index(tmp_path):
  few = config()
  few.passages_per_shard = P
  assert build_index(normal(P, R), few, **FINGERPRINTS).kind == "exact"
  build_index_directory(tmp_path, normal(P, R), few, **FINGERPRINTS)
  assert load_index(tmp_path).kind == "exact"


def test_shards_are_searched_at_the_same_time():
  meeting = threading.Barrier(2, timeout=10)

  class Waiting:
    def __init__(self, index):
      self.__dict__ |= vars(index)
      self.search_inner = index.search

    def search(self, questions, n_docs):
      meeting.wait()  # breaks if the other shard is not being searched
      return self.search_inner(questions, n_docs)

  halves = [Waiting(single(normal(50, R, seed=s))) for s in (0, 1)]
  index = ShardedIndex(halves)
  index._threads = sharded.futures.ThreadPoolExecutor(2)  # on one core too
  questions = normal(3, R, seed=2)
  both = np.concatenate([normal(50, R), normal(50, R, seed=1)])
  assert_equal(index.search(questions, 4), single(both).search(questions, 4))


def test_only_one_shard_is_in_memory_while_building(tmp_path, monkeypatch):
  monkeypatch.setattr(artifacts, "_READ_BYTES", 1 << 12)
  file = tmp_path / "all.npy"
  np.save(file, normal(8000, 64).astype(np.float64))  # has to be converted
  embeddings = np.load(file, mmap_mode="r")
  shard_bytes = 500 * 64 * 4  # of 16 shards
  tracemalloc.start()
  try:
    sharded.build_directory(tmp_path / "i", embeddings, 500, single, inputs={})
    peak = tracemalloc.get_traced_memory()[1]
  finally:
    tracemalloc.stop()
  assert shard_bytes < peak < 2 * shard_bytes


class CutOffError(Exception):
  """As if the process was killed."""


def build_cut_off_after(num_shards, path, embeddings, monkeypatch, **settings):
  """Builds until the next shard would be saved, and returns the times."""
  save, left = exact.ExactIndex.save, [num_shards]

  def save_some(self, folder):
    if not left[0]:
      (folder / "embeddings.npy").write_bytes(b"half")
      raise CutOffError
    left[0] -= 1
    save(self, folder)

  with monkeypatch.context() as patch:
    patch.setattr(exact.ExactIndex, "save", save_some)
    with pytest.raises(CutOffError):
      build_index_directory(
        path, embeddings, config(**settings), **FINGERPRINTS
      )
  return times(path)


def times(path):
  return {
    f.parent.name: f.stat().st_mtime_ns
    for f in sorted(path.glob("shards/*/manifest.json"))
  }


def contents(path):
  return {
    f.relative_to(path): f.read_bytes()
    for f in sorted(path.rglob("*"))
    if f.is_file()
  }


def test_a_build_that_was_cut_off_goes_on_where_it_stopped(
  tmp_path, monkeypatch
):
  embeddings = normal(P, R)
  first = build_cut_off_after(2, tmp_path / "cut", embeddings, monkeypatch)
  assert list(first) == ["00000", "00001"]
  with pytest.raises(FileNotFoundError, match="cut off before its end"):
    load_index(tmp_path / "cut")
  build_index_directory(tmp_path / "cut", embeddings, config(), **FINGERPRINTS)
  assert times(tmp_path / "cut").items() > first.items()
  build_index_directory(
    tmp_path / "whole", embeddings, config(), **FINGERPRINTS
  )
  assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


@pytest.mark.parametrize("change", ["row", "damage", "weights", "size"])
def test_a_shard_that_does_not_fit_is_built_again(
  change, tmp_path, monkeypatch
):
  path, embeddings, prints, new = tmp_path / "i", normal(P, R), {}, config()
  first = build_cut_off_after(3, path, embeddings, monkeypatch)
  stale = {"00001"}
  if change == "row":
    embeddings[30, 2] += 1
  elif change == "damage":
    (path / "shards/00001/embeddings.npy").write_bytes(b"damaged")
  elif change == "weights":
    prints, stale = {"encoder_fingerprint": "ffff"}, set(first)
  else:
    new.passages_per_shard, stale = 20, set(first)
  time.sleep(0.01)
  build_index_directory(path, embeddings, new, **(FINGERPRINTS | prints))
  now = times(path)
  assert {name for name in first if now[name] != first[name]} == stale
  index = load_index(path, **(FINGERPRINTS | prints))
  questions = normal(4, R, seed=1)
  assert_equal(
    index.search(questions, 5), single(embeddings).search(questions, 5)
  )


def test_other_settings_of_scann_build_every_shard_again(tmp_path):
  embeddings = normal(P, R)
  build_index_directory(tmp_path, embeddings, config("scann"), **FINGERPRINTS)
  first = times(tmp_path)
  new = config("scann", scann_tree_passages=20, scann_num_leaves=2)
  build_index_directory(tmp_path, embeddings, new, **FINGERPRINTS)
  now = times(tmp_path)
  assert all(now[name] != first[name] for name in first)
  assert load_index(tmp_path).shards[0].settings["num_leaves"] == 2


def test_a_smaller_build_leaves_no_shard_of_a_larger_one(tmp_path):
  build_index_directory(tmp_path, normal(P, R), config(), **FINGERPRINTS)
  build_index(normal(40, R), config(), **FINGERPRINTS).save(tmp_path)
  assert list(times(tmp_path)) == ["00000", "00001"]
  # What `save` wrote was built of nothing that a later build could know.
  before = times(tmp_path)
  build_index_directory(tmp_path, normal(P, R)[:40], config(), **FINGERPRINTS)
  assert all(times(tmp_path)[name] != before[name] for name in before)


def test_a_missing_or_damaged_shard_is_named(tmp_path):
  build_index_directory(tmp_path, normal(P, R), config(), **FINGERPRINTS)
  file = tmp_path / "shards/00002/embeddings.npy"
  data = bytearray(file.read_bytes())
  data[-3] ^= 1
  file.write_bytes(data)
  with pytest.raises(ValueError, match=r"shards/00002/emb.*content changed"):
    load_index(tmp_path)
  shutil.rmtree(file.parent)
  with pytest.raises(ValueError, match=r"shards/00002/.* is missing"):
    load_index(tmp_path)


def test_shards_that_do_not_add_up_are_refused(tmp_path):
  build_index_directory(tmp_path, normal(P, R), config(), **FINGERPRINTS)
  shards = content_of(tmp_path)["settings"]["shards"]
  for wrong in (None, [], shards[:-1], [{"kind": "annoy"}]):
    edit_manifest(tmp_path, settings={"shards": wrong})
    with pytest.raises(ValueError, match=r"'sharded', but its shards.*Build"):
      load_index(tmp_path)


def test_passages_that_are_not_finite_are_refused_before_any_shard(tmp_path):
  embeddings = normal(P, R)
  embeddings[99, 0] = np.nan
  with pytest.raises(ValueError, match=r"1 of 100 passages hold NaN.*rows 99"):
    build_index_directory(tmp_path / "i", embeddings, config(), **FINGERPRINTS)
  assert not (tmp_path / "i").exists()
