"""The processes of a pod join, compare what they run, and end together.

In: on every host, the same command. Out: one program of several processes; or,
in all of them, an error that says which process of which host is in the way.
This is the one place that calls `jax.distributed.initialize`.

Nobody waits forever:

- A process that never joins ends the others after `join_secs`.
- Processes that run another config, command line or code end with an error.
- A process that ends with an error ends the others within `POLL_SECS` and
  `GRACE_SECS`, and they print its message.
- A process that is killed, or whose host dies, ends the others after
  `heartbeat_secs`; JAX prints its number, and the log says which host that is.
"""

from collections.abc import Mapping
import contextlib
import hashlib
from importlib import metadata
import json
import os
import pathlib
import platform
import socket
import sys
import threading
import time
from typing import Any, NoReturn

from absl import logging
import jax
from jax._src import distributed  # no public module has the key-value store

JOIN_SECS = 300  # until every process has joined
HEARTBEAT_SECS = 100  # without a sign of life, until a process counts as dead
POLL_SECS = 2.0  # between two looks at whether another process failed
GRACE_SECS = 4.0  # in which a process that fails too can print its own error

# Packages whose version has to be the same on all hosts.
_USED = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
_COMPARE_SECS = 120  # for every process to say what it runs
_WAIT_SECS = 60  # between two lines of the log about what is waited for
_SHOWN = 5  # differing settings in a message
_FOLDER = "rag_jax"  # in the store
_FAILED, _HOSTS, _SETTINGS, _PUBLISHED = (
  f"{_FOLDER}/{name}/" for name in ("failed", "hosts", "settings", "published")
)
_JOINED: list[int] = []  # the number of this process, once it has joined


def join(
  settings: Mapping[str, str],
  *,
  coordinator: str = "",
  num_processes: int = 0,
  process_id: int = -1,
  join_secs: int = JOIN_SECS,
  heartbeat_secs: int = HEARTBEAT_SECS,
) -> None:
  """Joins the other processes, and checks that all run the same.

  Call it before JAX uses a device. The process ends if some do not join.

  Args:
    settings: what has to be equal in all processes, by name. The version of the
      code is compared too.
    coordinator: address and port of process 0, as "10.0.0.2:8482". "", 0 and -1
      for the next two: JAX finds them, on Cloud TPU, Slurm and others.
    num_processes: of the pod.
    process_id: the number of this process.
    join_secs: how long to wait for the others.
    heartbeat_secs: after this time without a sign of life a process is dead.

  Raises:
    ValueError: JAX found no pod; or the processes run different settings or
      code.
  """
  over = threading.Event()
  # JAX would abort the process, without saying what to do.
  threading.Thread(
    target=_give_up, args=(over, join_secs), name="join", daemon=True
  ).start()
  try:
    jax.distributed.initialize(
      coordinator or None,
      num_processes or None,
      None if process_id < 0 else process_id,
      initialization_timeout=join_secs + 60,
      heartbeat_timeout_seconds=heartbeat_secs,
    )
  except ValueError as error:
    raise ValueError(
      f"--distributed found no pod to join ({error}). Expected to run on every"
      " host of one that JAX knows: Cloud TPU, GKE, Slurm or Open MPI."
      " Elsewhere give --coordinator=HOST:PORT, --num_processes and"
      " --process_id."
    ) from error
  finally:
    over.set()
  _JOINED.append(jax.process_index())
  _store().key_value_set(_HOSTS + str(_JOINED[0]), socket.gethostname())
  threading.Thread(target=_watch, name="pod", daemon=True).start()
  check_same(dict(settings) | code_version())
  logging.info(
    "%d processes have joined: %s.",
    jax.process_count(),
    ", ".join(f"{number} on {host}" for number, host in _hosts().items()),
  )


def joined() -> bool:
  """Returns whether this process has joined others by `join`."""
  return bool(_JOINED)


def code_version() -> dict[str, str]:
  """Returns, by name, what identifies the code that this process runs."""
  digest = hashlib.sha256()
  root = pathlib.Path(__file__).parent
  for path in sorted(root.rglob("*.py")):
    digest.update(f"{path.relative_to(root)}\0".encode())
    digest.update(path.read_bytes())
  versions = {
    f"the version of {name}": metadata.version(name) for name in _USED
  }
  return {
    "the code of rag_jax": digest.hexdigest()[:12],
    "the version of Python": platform.python_version(),
  } | versions


def publish(name: str, value: str) -> None:
  """Shows `value` to all processes, under a name that is not taken yet.

  Threads may call this and `published`, because no device takes part.
  """
  _store().key_value_set(f"{_PUBLISHED}{name}", value)


def published(name: str, what: str) -> str:
  """Returns what a process has published under `name`; waits for it.

  There is no limit: a process that ends or dies ends this one too.

  Args:
    name: as the other process gave it.
    what: what that process does until then, for the log.
  """
  while True:
    try:
      wait = _WAIT_SECS * 1000
      return _store().blocking_key_value_get(f"{_PUBLISHED}{name}", wait)
    except jax.errors.JaxRuntimeError as error:
      if "DEADLINE_EXCEEDED" not in str(error):
        raise
      logging.info("Still waiting until %s.", what)


def own_address() -> str:
  """Returns the IP address at which the other processes reach this one.

  It is the one of the network on which this process reaches process 0.
  """
  coordinator = distributed.global_state.coordinator_address
  assert coordinator, "join first"
  host, _, port = coordinator.rpartition(":")
  found = socket.getaddrinfo(
    host.strip("[]"), int(port), type=socket.SOCK_DGRAM
  )
  family, kind, protocol, _, address = found[0]
  with socket.socket(family, kind, protocol) as probe:
    probe.connect(address)  # sends nothing
    return probe.getsockname()[0]


def check_same(settings: Mapping[str, str]) -> None:
  """Raises `ValueError` in all processes unless all have the same `settings`.

  All processes that joined call it, once.

  Raises:
    ValueError: some differ. The message names them and up to five settings.
    RuntimeError: some process did not say what it runs.
  """
  store, mine = _store(), json.dumps(dict(settings), sort_keys=True)
  digest = hashlib.sha256(mine.encode()).hexdigest()
  store.key_value_set(f"{_FOLDER}/digests/{_JOINED[0]}", digest)
  store.key_value_set(_SETTINGS + str(_JOINED[0]), mine)
  try:
    store.wait_at_barrier(f"{_FOLDER} settings", _COMPARE_SECS * 1000)
  except jax.errors.JaxRuntimeError as error:
    raise RuntimeError(
      f"Not every process said what it runs within {_COMPARE_SECS} seconds of"
      " joining. Expected the same command on every host. Look into the logs of"
      f" the processes that are named here: {error}"
    ) from error
  digests = _read(f"{_FOLDER}/digests/")
  other = [number for number in digests if digests[number] != digests[0]]
  if not other:
    return
  first = json.loads(store.blocking_key_value_get(f"{_SETTINGS}0", 60_000))
  hosts = _hosts()
  number = other[0]
  theirs = json.loads(
    store.blocking_key_value_get(f"{_SETTINGS}{number}", 60_000)
  )
  names = [
    name
    for name in sorted(first.keys() | theirs.keys())
    if first.get(name) != theirs.get(name)
  ]
  lines = [
    f"{name}: {theirs.get(name, 'not given')}, and in process 0"
    f" {first.get(name, 'not given')}"
    for name in names[:_SHOWN]
  ]
  more = len(names) - _SHOWN
  lines += [f"and {more} more"] if more > 0 else []
  rest = f" (as do the processes {other[1:]})" if other[1:] else ""
  raise ValueError(
    f"Process {number} on {hosts[number]} runs something else than process 0 on"
    f" {hosts[0]}{rest}:\n  " + "\n  ".join(lines) + "\nExpected the same"
    " command, config and code on every host. Start the same on all of them,"
    " with the same version of rag_jax."
  )


def end(status: int, why: str) -> None:
  """Ends this process, and the others, which print `why`.

  Does nothing in a process that has not joined others: it ends as usual.

  Args:
    status: the exit status.
    why: the message of the error.
  """
  if not _JOINED:
    return
  # It fails if process 0 has ended, and the store with it.
  with contextlib.suppress(jax.errors.JaxRuntimeError):
    _store().key_value_set(_FAILED + str(_JOINED[0]), why)
  if not _JOINED[0]:  # the store lives as long as process 0
    time.sleep(2 * POLL_SECS + GRACE_SECS)
  _exit(status)


def _exit(status: int) -> NoReturn:
  """Ends the process at once; Python's exit would wait for the others."""
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(status)


def _give_up(over: threading.Event, join_secs: int) -> None:
  """Ends the process if the others have not joined after `join_secs`."""
  if over.wait(join_secs):
    return
  state = distributed.global_state
  count = getattr(state, "num_processes", None) or "unknown"
  address = getattr(state, "coordinator_address", None) or "unknown"
  sys.stderr.write(
    f"RuntimeError: Not all of the {count} processes joined within"
    f" {join_secs} seconds. This is process {getattr(state, 'process_id', '?')}"
    f" on {socket.gethostname()}; process 0 is expected at {address}. Expected"
    " the same command to run on every host. Check that it was started on all"
    " of them, that none has ended with an error, and that the firewall lets"
    " them reach that address. If hosts start slowly, raise --join_secs.\n"
  )
  _exit(1)


def _watch() -> None:
  """Ends this process after another one has failed."""
  while True:
    time.sleep(POLL_SECS)
    try:
      failed = _read(_FAILED)
    except jax.errors.JaxRuntimeError:
      return  # process 0 is dead or done; JAX ends this process if need be
    others = [number for number in failed if number != _JOINED[0]]
    if not others:
      continue
    time.sleep(GRACE_SECS)
    if _JOINED[0] in failed:
      return  # it ends by itself
    host = _hosts().get(others[0], "an unknown host")
    sys.stderr.write(
      f"This process ends because process {others[0]} on {host} ended:"
      f" {failed[others[0]]}\n"
    )
    if not _JOINED[0]:
      time.sleep(POLL_SECS + GRACE_SECS)  # the others read the store too
    _exit(1)


def _store() -> Any:
  """Returns the key-value store of the processes, which process 0 keeps."""
  return distributed.global_state.client


def _read(folder: str) -> dict[int, str]:
  """Returns the values in a folder of the store, by process."""
  found = _store().key_value_dir_get(folder)
  values = {int(key.rpartition("/")[2]): value for key, value in found}
  return dict(sorted(values.items()))


def _hosts() -> dict[int, str]:
  return _read(_HOSTS)
