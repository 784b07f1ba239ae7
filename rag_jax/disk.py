"""Writes and reads files safely: atomically, synced, and never through links.

In: a path, and what to write there. Out: after a kill or a power cut the old
file or the new one, never half of one; and an error that says what to do if the
disk is full or the folder may not be written to.
"""

from collections.abc import Iterator
import contextlib
import difflib
import errno
import os
import secrets
import stat

from etils import epath
import fsspec.config

# The client of a bucket asks each time what a folder holds. It would otherwise
# remember, and not see what another host has written or removed since.
fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False

TEMP_SUFFIX = ".tmp"  # of files that are not finished; never in a manifest

# The file system cannot sync, or the folder may not be opened.
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EPERM)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EROFS, errno.EACCES, errno.EPERM)

_SHOWN_NAMES = 8  # of the names in a folder


def is_local(path: epath.PathLike) -> bool:
  """Returns whether `path` is on a file system, not in a bucket (gs://)."""
  return "://" not in os.fspath(path)


def instead_of(path: epath.PathLike) -> str:
  """Returns a hint for a path that does not exist: similar or other names."""
  path = epath.Path(path)
  if not is_local(path):
    return "Correct the path."
  missing = path.name
  folder = path.parent
  while not folder.is_dir() and folder != folder.parent:
    missing, folder = folder.name, folder.parent
  names = sorted(
    f"{p.name}{'/' * p.is_dir()}"
    for p in folder.iterdir()
    if not p.name.startswith(".")
  )
  close = difflib.get_close_matches(missing, names, n=1, cutoff=0.5)
  if close:
    return f"Did you mean {os.fspath(folder / close[0])!r}?"
  shown = ", ".join(names[:_SHOWN_NAMES])
  more = ", ..." if len(names) > _SHOWN_NAMES else ""
  return f"{folder} holds {shown or 'nothing'}{more}."


def file_states(path: epath.PathLike) -> list[str]:
  """Returns a line per file with its name, size and time of change.

  Args:
    path: a file, or a folder whose files are listed at any depth; local.
  """
  files = [os.fspath(path)]
  if os.path.isdir(path):
    files = [
      os.path.join(folder, name)
      for folder, _, names in os.walk(path)
      for name in names
    ]
    files = [file for file in files if os.path.isfile(file)]  # no broken links
  lines = []
  for file in sorted(files):
    found, name = os.stat(file), os.path.relpath(file, path)
    lines.append(f"{name} {found.st_size} {found.st_mtime_ns}")
  return lines


def temp_path(path: epath.PathLike) -> epath.Path:
  """Returns a new name beside `path`, for an unfinished file."""
  path = epath.Path(path)
  return path.parent / f".{path.name}.{secrets.token_hex(4)}{TEMP_SUFFIX}"


def is_unfinished(name: str) -> bool:
  """Returns whether this is the name of an unfinished file."""
  return name.startswith(".") and name.endswith(TEMP_SUFFIX)


def write_atomically(path: epath.PathLike, content: str | bytes) -> None:
  """Writes a file so that it holds the old content or the new, never half.

  The file is on the disk on return, so a power cut does not undo it. A link at
  `path` is replaced, not followed. Text is written as UTF-8.
  """
  path = epath.Path(path)
  data = content.encode() if isinstance(content, str) else content
  if not is_local(path):  # a bucket shows complete objects only
    path.write_bytes(data)
    return
  temp = temp_path(path)
  try:
    # Not tempfile: only the owner could read its files.
    with open(temp, "xb") as f:
      f.write(data)
      f.flush()
      os.fsync(f.fileno())
    rename(temp, path)
  finally:
    temp.unlink(missing_ok=True)


def rename(source: epath.PathLike, target: epath.PathLike) -> None:
  """Renames a file or folder; the name is on the disk on return.

  The content has to be synced before.
  """
  os.replace(source, target)
  sync(os.path.dirname(os.path.abspath(target)))


def sync(path: epath.PathLike) -> None:
  """Waits until a file's data, or the names in a folder, are on the disk."""
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
  """Waits until the names of a directory and its parents are on the disk."""
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
    flags: of `os.open`. With O_CREAT the file is made if it does not exist.
    remedy: the end of the message: what to do next.
    writes: whether the file is changed in place. Then a file with another name
      (a hard link) is refused, since it would change under that name too.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is a link, a folder, a pipe or a device.
  """
  # O_NONBLOCK: opening a pipe would wait for a writer.
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
  """Returns the content of a plain file; errors as in `open_own`."""
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


def is_full(error: object) -> bool:
  """Returns whether an error says that a disk or a quota is full."""
  if isinstance(error, OSError) and error.errno is not None:
    return error.errno in _FULL
  # Libraries raise other types, with the words of the system.
  return any(os.strerror(number) in str(error) for number in _FULL)


class UnwritableError(OSError):
  """The disk is full or may not be written to; the message says what to do."""


@contextlib.contextmanager
def explaining(
  directory: epath.PathLike, what: str, remedy: str
) -> Iterator[None]:
  """Raises one readable error if `directory` cannot be written to.

  Errors for other reasons pass, such as a corpus that may not be read.

  Args:
    directory: to write to.
    what: what is written there, for instance "The search directory".
    remedy: what is kept, and how to continue.

  Raises:
    UnwritableError: the disk is full, or nothing may be written there.
  """
  try:
    yield
  except UnwritableError:
    raise
  except OSError as error:
    if is_full(error) or (
      # NumPy raises this for a write that was cut short.
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
  """Returns whether an error about the file `name` is about `directory`."""
  if not isinstance(name, str | bytes | os.PathLike):
    return True
  # The error about a folder that cannot be made may name a parent.
  path = os.path.abspath(os.fsdecode(name))
  root = os.path.abspath(os.path.expanduser(directory))
  return os.path.commonpath([path, root]) in (path, root)
