"""A store on the disk does what the passages in memory do."""

import concurrent.futures
import json
import random

from corpora import peak_bytes
import numpy as np
import pytest

from rag_jax import artifacts
from rag_jax.corpus import id_table
from rag_jax.corpus import passages as passages_lib
from rag_jax.corpus.passage_reader import load_passages
from rag_jax.corpus.passages import Passage
from rag_jax.corpus.passages import PassageList
from rag_jax.corpus.store import PassageStore
from rag_jax.corpus.store import is_store
from rag_jax.corpus.store import write_store

P = 53  # with 10 a shard: five full ones and one of three


def passage(i):
  """One of many, with what a store could get wrong."""
  metadata = (("lang", "en"), ("nummer", f"№{i}")) if i % 7 == 0 else ()
  title = "" if i % 5 == 0 else f"Título {i}"
  return Passage(f"id-{i}", title, f'Text "{i}",\n\t\\ 東京 \ud83d', metadata)


def some(n):
  """Many passages, made when they are asked for."""
  return (Passage(f"id-{i}", f"Title {i}", f"{i} " * 200) for i in range(n))


PASSAGES = PassageList(map(passage, range(P)), "memory")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
  path = tmp_path_factory.mktemp("stores") / "store"
  write_store(path, iter(PASSAGES), passages_per_shard=10, config={"words": 9})
  return path


@pytest.fixture
def store(directory):
  return PassageStore(directory)


def test_every_row_is_that_of_the_passages_in_memory(store):
  assert len(store) == len(PASSAGES)
  rows = list(range(-P, P))
  random.Random(0).shuffle(rows)
  for row in rows:
    assert store[row] == PASSAGES[row]
  assert store[np.int64(3)] == PASSAGES[3]


def test_all_passages_come_in_their_order(store):
  assert list(store) == list(PASSAGES)
  assert list(reversed(store)) == list(reversed(PASSAGES))
  assert PASSAGES[7] in store


def test_slices_are_those_of_the_passages_in_memory(store):
  rng = random.Random(1)
  ends = [None, *range(-P - 3, P + 3)]
  for _ in range(200):
    cut = slice(
      rng.choice(ends), rng.choice(ends), rng.choice([None, 1, 3, -1])
    )
    assert store[cut] == PASSAGES[cut]


def test_get_returns_rows_in_the_order_asked_for(store):
  rows = np.random.default_rng(0).integers(-P, P, 300)
  assert store.get(rows) == tuple(PASSAGES[row] for row in rows)
  assert store.get([3, 3, 4, 5]) == tuple(PASSAGES[i] for i in (3, 3, 4, 5))
  assert store.get([]) == ()


def test_the_fingerprint_is_that_of_the_passages_in_memory(store):
  assert store.fingerprint == PASSAGES.fingerprint


def test_a_passage_is_found_by_its_id(store):
  for expected in PASSAGES:
    assert store.by_id(expected.id) == expected


def test_an_unknown_id_has_the_error_of_the_passages_in_memory(store):
  with pytest.raises(ValueError, match="has the id 'nobody'") as expected:
    PASSAGES.by_id("nobody")
  with pytest.raises(ValueError, match="has the id 'nobody'") as info:
    store.by_id("nobody")
  assert str(info.value) == str(expected.value).replace("memory", store.origin)


@pytest.mark.parametrize("row", [P, -P - 1, 10**30])
def test_a_row_that_does_not_exist_is_an_index_error(store, row):
  with pytest.raises(IndexError):
    _ = PASSAGES[row]
  with pytest.raises(IndexError, match=rf"no passage {row}.*0 to {P - 1}"):
    _ = store[row]
  with pytest.raises(IndexError, match=f"no passage {row}"):
    store.get([0, row])


def test_threads_may_share_a_store(directory):
  store = PassageStore(directory)  # with no shard opened

  def read(seed):
    rng = random.Random(seed)
    rows = [rng.randrange(P) for _ in range(200)]
    assert [store[row] for row in rows] == [PASSAGES[row] for row in rows]
    assert store.get(rows) == tuple(PASSAGES[row] for row in rows)
    return store.by_id(PASSAGES[rows[0]].id) == PASSAGES[rows[0]]

  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    assert all(pool.map(read, range(16)))


def test_a_store_that_was_moved_opens(directory, tmp_path):
  PassageStore(directory)
  write_store(tmp_path / "here", PASSAGES, passages_per_shard=10)
  moved = (tmp_path / "here").rename(tmp_path / "there")
  assert list(PassageStore(moved)) == list(PASSAGES)


def test_a_store_says_what_made_it_and_where_it_is(store, directory):
  assert store.config == {"words": 9}
  assert store.origin == str(directory)
  assert repr(store) == f"PassageStore({P} from {directory})"


def test_passages_are_loaded_from_the_directory_of_a_store(directory):
  loaded = load_passages(str(directory))
  assert isinstance(loaded, PassageStore)
  assert tuple(loaded) == tuple(PASSAGES)


def test_a_folder_with_another_manifest_is_no_store(tmp_path):
  for text in ('{"kind": "index"}', '{"name": "app"}', "[]", "no json"):
    (tmp_path / "manifest.json").write_text(text)
    assert not is_store(tmp_path)
  with pytest.raises(ValueError, match="is a folder, not a file"):
    load_passages(str(tmp_path))


@pytest.mark.parametrize("per_shard", [1, P - 1, P, P + 1])
def test_shards_of_any_size_hold_the_same_passages(per_shard, tmp_path):
  store = write_store(
    tmp_path / "s", iter(PASSAGES), passages_per_shard=per_shard
  )
  assert list(store) == list(PASSAGES)
  shards = sorted(path.name for path in (tmp_path / "s").glob("*.arrayrecord"))
  assert len(shards) == -(-P // per_shard)
  assert not list((tmp_path / "s").glob(".id*"))


def test_the_table_of_ids_is_sorted_in_parts_as_in_one(
  directory, tmp_path, monkeypatch
):
  monkeypatch.setattr(id_table, "_PART_ROWS", 9)
  monkeypatch.setattr(id_table, "_BLOCK_ROWS", 4)
  write_store(tmp_path / "s", iter(PASSAGES), passages_per_shard=10)
  for name in (id_table.HASHES, id_table.ROWS):
    assert (tmp_path / "s" / name).read_bytes() == (
      directory / name
    ).read_bytes()
  hashes = np.load(tmp_path / "s" / id_table.HASHES)
  rows = np.load(tmp_path / "s" / id_table.ROWS)
  expected = sorted((id_table.hash_id(f"id-{i}"), i) for i in range(P))
  assert list(zip(hashes.tolist(), rows.tolist(), strict=True)) == expected


def test_ids_with_the_same_hash_are_told_apart(tmp_path, monkeypatch):
  monkeypatch.setattr(id_table, "hash_id", lambda id: len(id) << 60)
  store = write_store(tmp_path / "s", iter(PASSAGES), passages_per_shard=10)
  for expected in PASSAGES:
    assert store.by_id(expected.id) == expected
  # Between the two there is one with the same hash and another id.
  twice = [*PASSAGES[10:14], Passage("id-11", "", "Again.")]
  with pytest.raises(ValueError, match=r"Rows 1 and 4 of the 5 .* 'id-11'"):
    write_store(tmp_path / "twice", twice)


@pytest.mark.parametrize("part_rows", [10, 1 << 21])
def test_an_id_twice_is_refused_with_both_rows(
  part_rows, tmp_path, monkeypatch
):
  monkeypatch.setattr(id_table, "_PART_ROWS", part_rows)
  twice = [*PASSAGES, Passage(PASSAGES[8].id, "", "Another text.")]
  with pytest.raises(
    ValueError, match=rf"Rows 8 and {P} of the {P + 1} .*'id-8'.*rename"
  ):
    write_store(tmp_path / "s", twice, passages_per_shard=10)
  # Nothing is left of it but the lock, and the next one may be written.
  assert [path.name for path in (tmp_path / "s").iterdir()] == [".lock.tmp"]
  assert len(write_store(tmp_path / "s", PASSAGES)) == P


def test_memory_does_not_grow_with_the_passages(tmp_path, monkeypatch):
  monkeypatch.setattr(id_table, "_BLOCK_ROWS", 256)
  monkeypatch.setattr(id_table, "_PART_ROWS", 256)
  monkeypatch.setattr(artifacts, "_READ_BYTES", 1 << 16)
  monkeypatch.setattr(passages_lib, "_ITER_ROWS", 256)
  n, limit = 3000, 600_000
  # What is measured can fail: all of them at once are more.
  assert peak_bytes(lambda: list(some(n))) > 5 * limit
  path = tmp_path / "s"
  writing = peak_bytes(lambda: write_store(path, some(n)))
  assert writing < limit
  store = PassageStore(path)
  assert peak_bytes(lambda: sum(1 for _ in store)) < limit
  assert peak_bytes(lambda: store[:]) > 5 * limit


def test_a_record_is_json_without_pickle(directory):
  files = json.loads((directory / "manifest.json").read_text())["files"]
  assert set(files) == {
    *(f"passages-{i:05d}.arrayrecord" for i in range(6)),
    id_table.HASHES,
    id_table.ROWS,
  }
