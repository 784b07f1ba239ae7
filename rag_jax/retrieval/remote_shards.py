"""The shards of an index, each in the memory of one of several hosts.

In: the shards that this process has built or loaded. Out: shards of other
processes, which send questions there, and get what was found.

Each process answers for its shards in threads, over connections of its own,
while its devices train: no program of the devices takes part, and no process
waits until another one asks. A connection per shard and process stays open as
long as that process uses the shard; after the last one the shard is let go.

The processes know each other by a key that process 0 draws. Messages are JSON
and arrays, never pickles.
"""

from collections.abc import Mapping, Sequence
import json
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection
from multiprocessing.connection import answer_challenge
from multiprocessing.connection import deliver_challenge
import secrets
import socket
import threading
from typing import Any

from absl import logging
import jax
from jaxtyping import Float, Int
import numpy as np

from rag_jax import pod
from rag_jax.retrieval.embeddings import Rows
from rag_jax.retrieval.exact import search_exactly
from rag_jax.retrieval.index_core import Found
from rag_jax.retrieval.index_core import Index
from rag_jax.retrieval.index_core import IndexInfo

_KEY = "shards/key"
_FIRST_BYTES = 4096  # at most, in the first message: the name of a shard
_LOST = (EOFError, OSError, AuthenticationError)


def owned_shards(num_shards: int, process: int | None = None) -> range:
  """Returns the numbers of the shards that this, or another, process has."""
  process = jax.process_index() if process is None else process
  ends = (num_shards * (process + i) // jax.process_count() for i in range(2))
  return range(*ends)


def share_shards(shards: Sequence[Index], name: str) -> None:
  """Lets each process search the shards that it has, for all processes.

  All processes call it, for the same indexes in the same order. It returns when
  all of them have.

  Args:
    shards: of an index: those that `owned_shards` names, and `RemoteShard`s.
    name: identifies the weights and passages of the index.
  """
  with _LOCK:
    _CALLS[name] = _CALLS.get(name, 0) + 1
    name = f"{name}/{_CALLS[name]}"
    server = _own_server()
  own = owned_shards(len(shards))
  for number in own:
    server.offer(f"{name}/{number}", shards[number], jax.process_count() - 1)
  for process in range(jax.process_count()):
    if process == jax.process_index():
      continue
    address = pod.published(
      f"shards/address/{process}", f"process {process} searches its shards"
    )
    host, _, port = address.rpartition(":")
    for number in owned_shards(len(shards), process):
      shard = shards[number]
      assert isinstance(shard, RemoteShard)
      shard.reach((host, int(port)), server.key, f"{name}/{number}")
  logging.info(
    "This process holds and searches %d of the %d shards of the index, %d of %d"
    " passages.",
    *(len(own), len(shards)),
    sum(shards[number].num_passages for number in own),
    sum(shard.num_passages for shard in shards),
  )


class ShardServer:
  """Answers for the shards of this process; threads do all the work."""

  def __init__(self, host: str, key: bytes):
    """Listens at a free port of the address `host`, for who has the key."""
    self.key = key
    self._offered: dict[str, list[Any]] = {}  # name -> [shard, users to come]
    self._change = threading.Condition()
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    self._socket = socket.create_server((host, 0), family=family, backlog=256)
    self.address: tuple[str, int] = self._socket.getsockname()[:2]
    threading.Thread(target=self._accept, name="shards", daemon=True).start()

  def offer(self, name: str, shard: Index, num_users: int) -> None:
    """Answers for a shard until so many others have asked, and are done."""
    if num_users:
      with self._change:
        self._offered[name] = [shard, num_users]
        self._change.notify_all()

  def offered(self) -> list[str]:
    """Returns the names of the shards that others use or will use."""
    with self._change:
      return sorted(self._offered)

  def _accept(self) -> None:
    while True:
      accepted, _ = self._socket.accept()
      threading.Thread(
        target=self._answer, args=(_connection(accepted),), daemon=True
      ).start()

  def _answer(self, connection: Connection) -> None:
    """Answers one process about one shard, until it closes the connection."""
    with connection:
      try:
        deliver_challenge(connection, self.key)
        answer_challenge(connection, self.key)
        name = connection.recv_bytes(_FIRST_BYTES).decode()
      except _LOST:
        return  # not a process of this program
      with self._change:
        self._change.wait_for(lambda: name in self._offered)
        shard = self._offered[name][0]
      try:
        _send(connection, shard.info.to_content())
        while True:
          _reply(connection, shard)
      except _LOST:
        pass
      finally:
        del shard
        with self._change:
          self._offered[name][1] -= 1
          if not self._offered[name][1]:
            del self._offered[name]


class _Link:
  """A connection to the process that has a shard.

  Shard and rows have it, but not each other: who lets go of both closes it.
  """

  def __init__(self):
    self._lock = threading.Lock()
    self._connection: Connection | None = None
    self.peer = "process that has not been reached yet"

  def open(self, address: tuple[str, int], key: bytes, name: str) -> Any:
    """Returns the description of the shard; see `RemoteShard.reach`."""
    self.peer = f"process at {address[0]}:{address[1]}"
    try:
      connection = _connection(socket.create_connection(address))
      answer_challenge(connection, key)
      deliver_challenge(connection, key)
      connection.send_bytes(name.encode())
      content = json.loads(connection.recv_bytes())
    except _LOST as error:
      raise self._lost(error) from error
    self._connection = connection
    return content

  def ask(self, what: str, array: np.ndarray, n_docs: int = 0) -> list[Any]:
    """Returns the arrays of the reply.

    Raises:
      RuntimeError: the process ended, or could not answer.
    """
    assert self._connection is not None, "call reach first"
    try:
      with self._lock:
        _send(self._connection, {"what": what, "n_docs": n_docs}, [array])
        header, arrays = _receive(self._connection)
    except _LOST as error:
      raise self._lost(error) from error
    if "error" in header:
      raise RuntimeError(
        f"The {self.peer} could not answer for its shard of the index:"
        f" {header['error']}. See its log."
      )
    return arrays

  def _lost(self, error: BaseException) -> RuntimeError:
    return RuntimeError(
      f"The {self.peer}, which has a shard of the index, cannot be reached"
      f" ({error or type(error).__name__}). Expected every process to run until"
      " the end, and the hosts of a pod to reach each other at all ports. Look"
      " into its log, and at the firewall."
    )


class RemoteShard(Index):
  """A shard that another process holds; see `Index`.

  It takes no memory here.
  """

  def __init__(self, info: IndexInfo | None = None):
    """Takes its description, if that is known before `reach`."""
    self._link = _Link()
    if info is not None:
      self._describe(info)

  def _describe(self, info: IndexInfo) -> None:
    super().__init__(info, _RemoteRows(info, self._link), 0)

  def reach(self, address: tuple[str, int], key: bytes, name: str) -> None:
    """Waits until the process at `address` offers the shard `name`.

    Raises:
      RuntimeError: that process cannot be reached, or has another shard.
    """
    content = self._link.open(address, key, name)
    peer = self._link.peer
    info = IndexInfo.from_content(content, peer, [content["kind"]])
    if not hasattr(self, "info"):
      self._describe(info)
    elif _brief(self.info) != _brief(info):
      raise RuntimeError(
        f"The {peer} has another shard of the index ({_brief(info)}) than the"
        f" one described here ({_brief(self.info)}). Expected all hosts to see"
        " the same files. Mount the same disk on all of them."
      )

  def search(
    self, question_embeddings: Float[np.ndarray, "B R"], n_docs: int
  ) -> Found:
    """Returns what the other process finds; see `Index.search`."""
    ids, scores = self._link.ask("search", question_embeddings, n_docs)
    return ids, scores

  def exact_search(
    self, question_embeddings: Float[np.ndarray, "B R"], n_docs: int
  ) -> Found:
    """Returns what exact search finds there."""
    ids, scores = self._link.ask("exact", question_embeddings, n_docs)
    return ids, scores


def _brief(info: IndexInfo) -> str:
  return (
    f"{info.num_passages} passages x {info.embedding_dim}, {info.kind},"
    f" {info.identity}"
  )


class _RemoteRows(Rows):
  """The embeddings of a shard, of which rows are fetched when needed."""

  def __init__(self, info: IndexInfo, link: _Link):
    shape = info.num_passages, info.embedding_dim
    super().__init__(shape, 4 * shape[0] * shape[1])
    self._link = link

  def _take(self, numbers: Int[np.ndarray, "*N"]) -> np.ndarray:
    return self._link.ask("rows", numbers)[0]


def _reply(connection: Connection, shard: Index) -> None:
  """Answers one question about `shard`."""
  header, (array,) = _receive(connection)
  try:
    found = _look_up(shard, header["what"], array, header["n_docs"])
  except Exception as error:  # of any kind: who asked must not wait forever
    logging.exception("Another process could not be answered.")
    _send(connection, {"error": str(error) or type(error).__name__})
    return
  _send(connection, {}, found)


def _look_up(
  shard: Index, what: str, array: np.ndarray, n_docs: int
) -> Sequence[np.ndarray]:
  if what == "rows":
    return [shard.embeddings[array]]
  if what == "search":
    return shard.search(array, n_docs)
  return search_exactly(shard, array, n_docs)


def _send(
  connection: Connection,
  header: Mapping[str, Any],
  arrays: Sequence[np.ndarray] = (),
) -> None:
  shapes = [[array.dtype.str, array.shape] for array in arrays]
  connection.send_bytes(json.dumps({**header, "arrays": shapes}).encode())
  for array in arrays:
    connection.send_bytes(np.ascontiguousarray(array).tobytes())


def _receive(connection: Connection) -> tuple[dict[str, Any], list[Any]]:
  header = json.loads(connection.recv_bytes())
  arrays = [
    np.frombuffer(connection.recv_bytes(), dtype).reshape(shape)
    for dtype, shape in header["arrays"]
  ]
  return header, arrays


def _connection(connected: socket.socket) -> Connection:
  """Returns a connection that sends each message at once."""
  connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
  return Connection(connected.detach())


_LOCK = threading.Lock()
_CALLS: dict[str, int] = {}  # of `share_shards`, by name
_SERVERS: list[ShardServer] = []  # that of this process, once it is needed


def _own_server() -> ShardServer:
  """Returns the server of this process, which all others can find."""
  if not _SERVERS:
    if jax.process_index() == 0:
      pod.publish(_KEY, secrets.token_hex(32))
    key = pod.published(_KEY, "process 0 searches its shards")
    server = ShardServer(pod.own_address(), bytes.fromhex(key))
    host, port = server.address
    pod.publish(f"shards/address/{jax.process_index()}", f"{host}:{port}")
    _SERVERS.append(server)
  return _SERVERS[0]
