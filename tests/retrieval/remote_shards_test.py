"""An index whose shards are in several processes finds what a whole one finds.

Run as a program, by each of three processes, this file builds and opens indexes
in shards, and prints what its process holds and finds.
"""

import json
import pathlib
import socket
import sys
import threading
import time
import weakref

from indexes import FINGERPRINTS
from indexes import assert_equal
from indexes import exact as single
import jax
from linen import normal
import numpy as np
from processes import join_hosts
from processes import run_on_hosts
import pytest

from rag_jax import pod
from rag_jax.config import IndexConfig
from rag_jax.processes import wait_for_all
from rag_jax.retrieval import remote_shards
from rag_jax.retrieval.index import build_index
from rag_jax.retrieval.index import load_index
from rag_jax.retrieval.index import own_rows
from rag_jax.retrieval.remote_shards import RemoteShard
from rag_jax.retrieval.remote_shards import ShardServer
from rag_jax.retrieval.sharded import ShardedIndex
from rag_jax.retrieval.sharded import exact_search

P, R = 700, 8
KEY = b"0123456789abcdef"
HOST = "127.0.0.1"


def config(kind, per_shard):
  return IndexConfig(
    kind=kind, passages_per_shard=per_shard, scann_tree_passages=100,
    scann_num_leaves=4, scann_leaves_to_search=2, scann_reorder=20,
  )  # fmt: skip


def arrays():
  # Every passage twice, in shards of two processes.
  return np.concatenate([normal(P // 2, R)] * 2), normal(5, R, seed=1)


def listed(found):
  return [array.tolist() for array in found]


def looked_up(index, questions):
  rows = np.array([[0, 699], [350, 1]])
  return {
    "kind": index.kind,
    "found": listed(index.search(questions, 7)),
    "exact": listed(exact_search(index, questions, 7)),
    "rows": index.embeddings[rows].tolist(),
    "slice": index.embeddings[200:500].tolist(),
    "memory": index.memory_bytes,
  }


def main(root):
  process = join_hosts()
  root, (embeddings, questions) = pathlib.Path(root), arrays()
  said = {}
  # The last has fewer shards than there are processes.
  for kind, per_shard in [("exact", 100), ("scann", 200), ("exact", 350)]:
    settings = config(kind, per_shard)
    rows = own_rows(settings, P)
    part = embeddings[rows.start : rows.stop]
    built = build_index(part, settings, **FINGERPRINTS, num_passages=P)
    where = root / f"{kind}{per_shard}"
    built.save(where)
    # One of them alone, as in an evaluation.
    said[where.name] = looked_up(built, questions) if process else None
    opened = load_index(where, **FINGERPRINTS, spread=True)
    opened.connect()
    said[f"{where.name} opened"] = looked_up(opened, questions)
    kept = [weakref.ref(s) for s in opened.shards]
    whole = load_index(where)
    assert not whole.is_spread
    assert_equal(whole.search(questions, 7), opened.search(questions, 7))
    wait_for_all("all have searched")
    del built, opened
    wait_for_all("all have let go")
    server, end = remote_shards._SERVERS[0], time.monotonic() + 20
    while server.offered() and time.monotonic() < end:
      time.sleep(0.01)
    said[f"{where.name} left"] = [
      server.offered(), sum(ref() is not None for ref in kept)
    ]  # fmt: skip
  if process == 1:
    pod.publish("late", "value")
  said["published"] = pod.published("late", "process 1 publishes it")
  json.dump(said, sys.stdout)


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
  root = tmp_path_factory.mktemp("hosts")
  printed = run_on_hosts(
    __file__, root, count=3, cache=root / "compiled", num_devices=3
  )
  return [json.loads(text.splitlines()[-1]) for text in printed]


@pytest.mark.parametrize(("kind", "per_shard"), [
  ("exact", 100), ("scann", 200), ("exact", 350),
])  # fmt: skip
def test_what_processes_find_together_is_what_one_finds(hosts, kind, per_shard):
  embeddings, questions = arrays()
  whole = build_index(embeddings, config(kind, per_shard), **FINGERPRINTS)
  expected = looked_up(whole, questions)
  assert expected["exact"] == listed(single(embeddings).search(questions, 7))
  memory = expected.pop("memory")
  name = f"{kind}{per_shard}"
  for way in (name, f"{name} opened"):
    parts = [said[way].pop("memory") for said in hosts if said[way]]
    assert all(said[way] in (expected, None) for said in hosts)
    if len(parts) == 3:  # each process holds its share
      assert sum(parts) == memory
      assert max(parts) < memory
  assert [said[f"{name} left"] for said in hosts] == [[[], 0]] * 3


def test_a_published_value_is_waited_for(hosts):
  assert {said["published"] for said in hosts} == {"value"}


def remote(address, key, name, info=None):
  shard = RemoteShard(info)
  shard.reach(address, key, name)
  return shard


@pytest.fixture
def server():
  return ShardServer(HOST, KEY)


def test_a_shard_is_waited_for_and_let_go_after_its_last_user(server):
  embeddings, questions = arrays()
  opened = []

  def open_shard():
    opened.append(remote(server.address, KEY, "late"))

  users = [threading.Thread(target=open_shard) for _ in range(2)]
  for user in users:
    user.start()
  time.sleep(0.2)
  assert not opened
  server.offer("late", single(embeddings), 2)
  for user in users:
    user.join(20)
  assert_equal(
    ShardedIndex(opened).search(questions, 3),
    single(np.concatenate([embeddings] * 2)).search(questions, 3),
  )
  assert server.offered() == ["late"]
  opened.pop()
  time.sleep(0.2)
  assert server.offered() == ["late"]
  opened.clear()
  end = time.monotonic() + 20
  while server.offered():
    assert time.monotonic() < end
    time.sleep(0.01)


def test_threads_share_a_connection(server):
  embeddings, _ = arrays()
  server.offer("shard", single(embeddings), 1)
  shard = remote(server.address, KEY, "shard")
  found = {}

  def search(seed):
    for k in range(1, 20):
      found[seed, k] = shard.search(normal(3, R, seed=seed), k)

  threads = [threading.Thread(target=search, args=(seed,)) for seed in range(6)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(60)
  for (seed, k), rows in found.items():
    expected = single(embeddings).search(normal(3, R, seed=seed), k)
    assert_equal(rows, expected)
  assert len(found) == 6 * 19


def test_who_lacks_the_key_is_not_answered_and_delays_nobody(server):
  embeddings, _ = arrays()
  server.offer("shard", single(embeddings), 1)
  silent = socket.create_connection(server.address)
  with pytest.raises(RuntimeError, match=r"cannot be reached \(digest"):
    remote(server.address, b"another key", "shard")
  with socket.create_connection(server.address) as rude:
    rude.sendall(b"\xff" * 10_000)
  shard = remote(server.address, KEY, "shard")
  assert shard.num_passages == P
  assert shard.memory_bytes == 0
  silent.close()


def test_an_error_there_is_an_error_here_and_the_next_question_is_answered(
  server,
):
  embeddings, questions = arrays()
  server.offer("shard", single(embeddings), 1)
  shard = remote(server.address, KEY, "shard")
  with pytest.raises(RuntimeError, match="n_docs=701 passages per question"):
    shard.search(questions, P + 1)
  with pytest.raises(IndexError, match="one of the 700 rows"):
    shard.embeddings[np.array([P])]
  expected = single(embeddings).search(questions, 3)
  assert_equal(shard.search(questions, 3), expected)
  nothing = np.zeros((0, R), np.float32)
  assert [x.shape for x in shard.search(nothing, 3)] == [(0, 3), (0, 3)]


def test_a_process_that_ended_is_named():
  listener = socket.create_server((HOST, 0))
  address = listener.getsockname()
  listener.close()
  with pytest.raises(RuntimeError, match=rf"at {HOST}:{address[1]}.*refused"):
    remote(address, KEY, "shard")


def test_a_process_that_ends_later_is_named():
  listener = socket.create_server((HOST, 0))

  def answer_once():
    connection = remote_shards._connection(listener.accept()[0])
    remote_shards.deliver_challenge(connection, KEY)
    remote_shards.answer_challenge(connection, KEY)
    connection.recv_bytes()
    info = single(arrays()[0]).info
    remote_shards._send(connection, info.to_content())
    connection.recv_bytes()
    connection.close()

  thread = threading.Thread(target=answer_once)
  thread.start()
  shard = remote(listener.getsockname(), KEY, "shard")
  with pytest.raises(RuntimeError, match=r"Expected every process to run"):
    shard.search(arrays()[1], 3)
  thread.join(20)
  listener.close()


def test_another_shard_than_the_files_say_is_refused(server):
  embeddings, _ = arrays()
  server.offer("shard", single(embeddings), 2)
  info = single(embeddings).info
  assert remote(server.address, KEY, "shard", info).info == info
  with pytest.raises(RuntimeError, match="Expected all hosts to see the same"):
    remote(server.address, KEY, "shard", single(embeddings[:-1]).info)


def test_one_process_holds_all_rows():
  assert jax.process_count() == 1
  assert own_rows(config("exact", 100), P) == range(P)


if __name__ == "__main__":
  main(*sys.argv[1:])
