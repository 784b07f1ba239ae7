"""Files of our own: written whole, on the disk before they count, no links.

In: a path, and what is written there. Out: after a kill or a power cut the old
file or the new one, never half; and an error with one sentence of what to do
where the disk is full or the folder belongs to somebody else.
"""

from collections.abc import Iterator
import contextlib
import errno
import os
import secrets
import stat

from etils import epath

TEMP_SUFFIX = ".tmp"  # of files that are not finished; never in a manifest

# A file system that cannot do it, or a folder that may not be opened.
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EPERM)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EROFS, errno.EACCES, errno.EPERM)


def is_local(path: epath.PathLike) -> bool:
  """Returns whether `path` is on a file system, not in a bucket (gs://)."""
  return "://" not in os.fspath(path)


def temp_path(path: epath.PathLike) -> epath.Path:
  """Returns a new name beside `path`, for a file that is not finished."""
  path = epath.Path(path)
  return path.parent / f".{path.name}.{secrets.token_hex(4)}{TEMP_SUFFIX}"


def is_unfinished(name: str) -> bool:
  """Returns whether a file of this name is no part of a finished directory."""
  return name.startswith(".") and name.endswith(TEMP_SUFFIX)


def write_atomically(path: epath.PathLike, content: str | bytes) -> None:
  """Writes a file so that it holds the old content or the new, never half.

  It is on the disk on return: a power cut does not take it back. A link in its
  place is replaced, not followed.

  Args:
    path: of the file.
    content: text is written in UTF-8.
  """
  path = epath.Path(path)
  data = content.encode() if isinstance(content, str) else content
  if not is_local(path):  # an object appears in its bucket when it is complete
    path.write_bytes(data)
    return
  temp = temp_path(path)
  try:
    # Not tempfile: its files can be read by their owner alone.
    with open(temp, "xb") as f:
      f.write(data)
      f.flush()
      os.fsync(f.fileno())
    rename(temp, path)
  finally:
    temp.unlink(missing_ok=True)


def rename(source: epath.PathLike, target: epath.PathLike) -> None:
  """Gives a file or folder its name, on the disk on return.

  What is inside has to be there before: see `sync`.
  """
  os.replace(source, target)
  sync(os.path.dirname(os.path.abspath(target)))


def sync(path: epath.PathLike) -> None:
  """Waits until the disk has a file's data, or the names in a folder."""
  try:
    file = os.open(path, os.O_RDONLY)
  except OSError as error:
    if error.errno in _NO_SYNC:
      return
    raise
  try:
    os.fsync(file)
  except OSError as error:
    if error.errno not in _NO_SYNC:
      raise
  finally:
    os.close(file)


def sync_names(directory: epath.PathLike) -> None:
  """Waits until the disk has the names of a directory and of those above."""
  path = os.path.realpath(directory)
  while True:
    sync(path)
    if os.path.dirname(path) == path or os.path.ismount(path):
      return
    path = os.path.dirname(path)


def open_own(
  path: epath.PathLike, flags: int, *, remedy: str, writes: bool = False
) -> int:
  """Returns the descriptor of a plain file; a link is not followed.

  Args:
    path: local.
    flags: of `os.open`. With O_CREAT the file is made if there is none.
    remedy: a sentence for the end of the message: what to do next.
    writes: whether the file is changed in place. Then no other name may be
      the same file (a hard link), which would change with it.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is a link, a folder, a pipe or a device.
  """
  # O_NONBLOCK: a pipe without a writer would wait for ever.
  flags |= os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
  try:
    file = os.open(path, flags, 0o666)
  except OSError as error:
    # ELOOP: a link; ENXIO: a pipe; EISDIR: a folder.
    if error.errno in (errno.ELOOP, errno.EMLINK, errno.ENXIO, errno.EISDIR):
      raise ValueError(_not_plain(path, remedy)) from error
    raise
  found = os.fstat(file)
  if not stat.S_ISREG(found.st_mode):
    os.close(file)
    raise ValueError(_not_plain(path, remedy))
  if writes and found.st_nlink > 1:
    os.close(file)
    raise ValueError(
      f"{path} has {found.st_nlink} names (hard links): writing to it would"
      f" change the others. Expected a file of its own. {remedy}"
    )
  return file


def read_own(path: epath.PathLike, *, remedy: str) -> bytes:
  """Returns what a plain file holds; a link is not followed.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is a link, a folder, a pipe or a device.
  """
  path = epath.Path(path)
  if not is_local(path):
    return path.read_bytes()
  with open(open_own(path, os.O_RDONLY, remedy=remedy), "rb") as f:
    return f.read()


def _not_plain(path: epath.PathLike, remedy: str) -> str:
  what = "no plain file"
  if os.path.islink(path):
    what = f"a link to {os.readlink(path)}"
  return f"{path} is {what}; expected a file of its own. {remedy}"


class UnwritableError(OSError):
  """A disk that is full or may not be written to, and what to do."""


@contextlib.contextmanager
def explaining(
  directory: epath.PathLike, what: str, remedy: str
) -> Iterator[None]:
  """Raises one readable error where `directory` cannot be written to.

  What is raised for other reasons passes, such as a corpus that may not be
  read.

  Args:
    directory: that is written.
    what: is written there, for instance "The search directory".
    remedy: what is kept, and how to go on.

  Raises:
    UnwritableError: the disk is full, or nothing may be written there.
  """
  try:
    yield
  except UnwritableError:
    raise
  except OSError as error:
    if error.errno in _FULL or (
      # NumPy's, of a write that was cut short.
      error.errno is None and str(error).endswith(" written")
    ):
      expected = "a disk with room for it. Free some space"
    elif error.errno in _FORBIDDEN and _is_in(error.filename, directory):
      expected = "a folder that can be written to. Change its permissions"
    else:
      raise
    made = UnwritableError(
      f"{what} cannot be written to {directory} ({error}). Expected {expected},"
      f" or choose another directory. {remedy}"
    )
    made.errno = error.errno
    raise made from error


def _is_in(name: object, directory: epath.PathLike) -> bool:
  """Returns whether an error that names this file is about `directory`."""
  if not isinstance(name, str | bytes | os.PathLike):
    return True
  # Of a folder that cannot be made, a parent may be named.
  path = os.path.abspath(os.fsdecode(name))
  root = os.path.abspath(os.path.expanduser(directory))
  return os.path.commonpath([path, root]) in (path, root)
