"""A directory that one process builds at a time, with nothing else in it.

In: the directory that a module is going to fill. Out: the same, made, locked,
and known to hold at most what an interrupted build left there.
"""

from collections.abc import Callable, Iterator
import contextlib
import fcntl
import os

from absl import logging
from etils import epath

from rag_jax import disk
from rag_jax.artifacts import MANIFEST
from rag_jax.artifacts import check_no_links
from rag_jax.artifacts import is_local

# Ends like a file that is not finished: no part of any manifest.
_LOCK = ".lock.tmp"
_REMEDY = "What is finished is kept: the same call goes on from there."


@contextlib.contextmanager
def building(
  directory: epath.PathLike,
  *,
  kind: str,
  own: Callable[[str], bool],
  wait: bool = False,
) -> Iterator[epath.Path]:
  """Yields `directory`, which nobody else builds until the `with` ends.

  Args:
    directory: local; made if there is none.
    kind: what is built, for messages.
    own: whether a file of this name is one that the build writes.
    wait: until somebody else who builds there ends, however that is.

  Raises:
    ValueError: it is in a bucket or a link, somebody else builds there and
      `wait` is False, or it holds files of others.
    UnwritableError: the disk is full, or nothing may be written there: before
      or while it is built.
  """
  directory = epath.Path(directory)
  if not is_local(directory):
    raise ValueError(
      f"The {kind} cannot be built in {directory}, a bucket: its files are"
      " appended to and mapped into memory. Expected a local directory. Build"
      " it on a disk, and copy it to the bucket when it is complete."
    )
  with disk.explaining(directory, f"The {kind}", _REMEDY):
    directory.mkdir(parents=True, exist_ok=True)
  with lock(directory, kind=kind, wait=wait):
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
    check_no_links(directory, "Remove it, or choose another directory.")
    yield directory


@contextlib.contextmanager
def lock(
  directory: epath.PathLike,
  *,
  kind: str,
  wait: bool = False,
  remedy: str = _REMEDY,
) -> Iterator[None]:
  """Keeps others from writing in `directory`, which exists, until it ends.

  The lock is released when the process dies, however it does; the lock file
  that stays behind means nothing.

  Args:
    directory: local.
    kind: what is written, for messages.
    wait: until nobody else writes.
    remedy: what is kept when the disk is full, and how to go on.

  Raises:
    ValueError: somebody else writes there, unless it waits for that; or the
      lock file is a link.
    UnwritableError: the disk is full, or nothing may be written there: now, or
      before the `with` ends.
  """
  directory = epath.Path(directory)
  with disk.explaining(directory, f"The {kind}", remedy):
    file = disk.open_own(
      directory / _LOCK,
      os.O_RDWR | os.O_CREAT,
      remedy="Remove it, or choose another directory.",
    )
    try:
      _take(file, directory, kind, wait)
      yield
    finally:
      os.close(file)  # which releases it


def _take(file: int, directory: epath.Path, kind: str, wait: bool) -> None:
  """Raises `ValueError` if somebody else holds the lock, or waits for it."""
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    if wait:
      logging.info("Waiting for another process that builds %s.", directory)
      fcntl.flock(file, fcntl.LOCK_EX)
      return
    raise ValueError(
      f"Somebody else is building a {kind} in {directory} right now. Expected"
      " one writer in a directory at a time. Wait until that one ends (the"
      " tools do with --wait), stop it, or choose another directory."
    ) from None
  except OSError as error:  # some network file systems
    logging.warning(
      "The file system of %s has no locks (%s): make sure that nobody else"
      " writes there.",
      directory,
      error,
    )
