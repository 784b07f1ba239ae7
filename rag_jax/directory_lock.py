"""Locks a directory for one process that builds in it.

In: the directory that a module is going to fill. Out: the same directory, made,
locked, and checked to hold at most what an interrupted build left there.
"""

from collections.abc import Callable, Iterator
import contextlib
import datetime
import json
import os
import socket
from typing import Any

from absl import logging
from etils import epath
import filelock

from rag_jax import disk
from rag_jax.artifacts import MANIFEST
from rag_jax.artifacts import check_no_links
from rag_jax.artifacts import is_local

# The name is that of an unfinished file, so it is in no manifest.
_LOCK = ".lock.tmp"
_REMEDY = "What is finished is kept: the same call continues from there."


@contextlib.contextmanager
def building(
  directory: epath.PathLike,
  *,
  kind: str,
  own: Callable[[str], bool],
  wait: bool = False,
) -> Iterator[epath.Path]:
  """Yields `directory`, in which nobody else builds until the `with` ends.

  Args:
    directory: local; made if it does not exist.
    kind: what is built, for messages.
    own: returns whether the build writes a file of this name.
    wait: until another process that builds there ends, also by a failure.

  Raises:
    ValueError: it is in a bucket, or a link; another process builds there and
      `wait` is False; or it holds other files.
    UnwritableError: the disk is full, or nothing may be written there, at the
      start or during the `with`.
  """
  directory = epath.Path(directory)
  if not is_local(directory):
    raise ValueError(
      f"The {kind} cannot be built in {directory}, a bucket: its files are"
      " appended to and mapped into memory. Expected a local directory. Build"
      " it on a disk, and copy it to the bucket when it is complete."
    )
  with disk.explaining(directory, f"The {kind}", _REMEDY):
    try:
      directory.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, FileNotFoundError) as error:
      raise ValueError(
        f"The {kind} cannot be built in {directory}: it, or a part of its path,"
        f" is a file or can have no folders ({error}). Expected a folder, or a"
        " place where one can be made. Choose another."
      ) from error
  _check_foreign(directory, kind, own)  # before the lock leaves its file there
  with lock(directory, kind=kind, wait=wait):
    _check_foreign(directory, kind, own)
    check_no_links(directory, "Remove it, or choose another directory.")
    yield directory


def _check_foreign(
  directory: epath.Path, kind: str, own: Callable[[str], bool]
) -> None:
  """Raises `ValueError` if there are files that the build does not write."""
  foreign = [
    name
    for name in sorted(os.listdir(directory))
    if name not in (_LOCK, MANIFEST) and not own(name)
  ]
  if foreign:
    raise ValueError(
      f"{directory} holds other files than the {kind} that is to be built"
      f" there: {foreign[:5]}{' ...' if len(foreign) > 5 else ''}. Expected"
      " an empty directory, or what an interrupted build left. Choose"
      " another directory, or move the files."
    )


@contextlib.contextmanager
def lock(
  directory: epath.PathLike,
  *,
  kind: str,
  wait: bool = False,
  remedy: str = _REMEDY,
) -> Iterator[None]:
  """Keeps other processes from writing to `directory` until the `with` ends.

  Args:
    directory: local; it exists.
    kind: what is written, for messages.
    wait: until no other process writes there.
    remedy: what is kept when the disk is full, and how to continue.

  Raises:
    ValueError: another process writes there and `wait` is False; or the lock
      file is a link.
    UnwritableError: the disk is full, or nothing may be written there, at the
      start or during the `with`.
  """
  directory = epath.Path(directory)
  with disk.explaining(directory, f"The {kind}", remedy):
    taken = take_lock(
      directory / _LOCK,
      busy=f"Somebody else is building a {kind} in {directory} right now",
      expected="one writer in a directory at a time. Wait until that one ends"
      " (the tools do with --wait), stop it, or choose another directory.",
      remedy="Remove it, or choose another directory.",
      wait=wait,
    )
    try:
      yield
    finally:
      release_lock(taken)


def take_lock(
  path: epath.PathLike,
  *,
  busy: str,
  expected: str,
  remedy: str,
  wait: bool = False,
) -> filelock.BaseFileLock:
  """Returns a lock, which this process holds until it calls `release_lock`.

  When the process dies, the lock is released. The lock file always stays: if it
  were removed, a process that waits for it and one that makes it anew would
  both get a lock. It says who took the lock, until it is released. A file
  system without locks is used with a warning.

  Args:
    path: of the lock file, local. Made if it does not exist.
    busy: begin of the message if another process holds the lock.
    expected: end of that message: what was expected, and what to do.
    remedy: what to do if the lock file is a link.
    wait: until the lock is free.

  Raises:
    ValueError: another process holds the lock and `wait` is False; or the lock
      file is a link, or no plain file.
  """
  taken = filelock.FileLock(path, thread_local=False, preserve_lock_file=True)
  # filelock refuses links, but would lock a pipe or a file with two names.
  file = disk.open_own(path, os.O_RDWR | os.O_CREAT, remedy=remedy, writes=True)
  with open(file, "r+", encoding="utf-8", errors="replace") as note:
    try:
      taken.acquire(blocking=False)
    except filelock.Timeout:
      who = _holder(note.read(4096))
      if not wait:
        raise ValueError(f"{busy}: {who}. Expected {expected}") from None
      logging.info("%s. Waiting for another process: %s.", busy, who)
      taken.acquire()
    except OSError as error:  # some network file systems
      logging.warning(
        "The file system of %s has no locks (%s): make sure that nobody else"
        " writes there.",
        *(os.path.dirname(path), error),
      )
      return taken
    since = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    note.seek(0)
    note.truncate()
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": since}
    json.dump(holder, note)
  return taken


def release_lock(taken: filelock.BaseFileLock) -> None:
  """Releases a lock of `take_lock`; its file no longer says who held it."""
  if taken.is_locked:
    with contextlib.suppress(OSError):
      os.truncate(taken.lock_file, 0)
  taken.release()


def _holder(text: str) -> str:
  """Returns the holder that a lock file names."""
  try:
    holder: dict[str, Any] = json.loads(text)
    return (
      f"pid {holder['pid']} on host {holder['host']}, since {holder['since']}"
    )
  except (ValueError, KeyError, TypeError):
    return "one that has only just started"  # and has not written who it is
