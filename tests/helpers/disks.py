"""A disk that is full, and one whose power is cut."""

import contextlib
import os
import pathlib
import resource
import stat

import pytest


@contextlib.contextmanager
def full_disk(num_bytes):
  """No file grows further: what a full disk does, done for real."""
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


class PowerLoss:
  """What is on the disk of a machine whose power is cut, at any moment.

  Names and data that were not synced are lost: a file has what it had at its
  last fsync, a folder the names of its last fsync. With `names_survive` they
  come to the disk at once, before the data, as on many a file system.

  It watches `os.fsync` and the renames: each is a moment at which the power may
  be cut, and `at_moment` is called before it with a function that writes what
  there would be into a new folder.
  """

  def __init__(self, root, at_moment, *, names_survive):
    self._root = pathlib.Path(os.path.realpath(root))
    self._at_moment, self._names_survive = at_moment, names_survive
    self._data = {}  # of each file, by its number, as of its last fsync
    self._names = {}  # of each folder, by its number, as of its last fsync
    self._kept = []  # open, so that no number is given twice
    self._busy = False
    self.moments = 0

  def __enter__(self):
    self._patch = pytest.MonkeyPatch()
    for name in ("fsync", "replace", "rename"):
      self._patch.setattr(os, name, self._watched(getattr(os, name), name))
    for folder, _, files in os.walk(self._root):  # what was there is there
      self._sync(folder)
      for file in files:
        self._sync(os.path.join(folder, file))
    return self

  def __exit__(self, *_):
    self._patch.undo()
    for file in self._kept:
      os.close(file)

  def _watched(self, real, name):
    def watched(first, *rest, **kwargs):
      if self._busy:
        return real(first, *rest, **kwargs)
      self._busy = True
      try:
        self.moments += 1
        self._at_moment(self.write)
        result = real(first, *rest, **kwargs)
        if name == "fsync":
          path = pathlib.Path(os.readlink(f"/proc/self/fd/{first}"))
          if path.is_relative_to(self._root):
            self._sync(f"/proc/self/fd/{first}")
        return result
      finally:
        self._busy = False

    return watched

  def _sync(self, path):
    found = os.stat(path)
    if found.st_ino not in self._data and found.st_ino not in self._names:
      self._kept.append(os.open(path, os.O_RDONLY))
    if stat.S_ISDIR(found.st_mode):
      self._names[found.st_ino] = self._list(path)
    else:
      self._data[found.st_ino] = pathlib.Path(path).read_bytes()

  def _list(self, path):
    names = {}
    for name in os.listdir(path):
      there = os.path.join(path, name)
      found = os.lstat(there)
      if found.st_ino not in self._data and found.st_ino not in self._names:
        self._kept.append(os.open(there, os.O_RDONLY))
      names[name] = (found.st_ino, stat.S_ISDIR(found.st_mode))
    return names

  def write(self, target):
    """Writes what the disk would have, if the power were cut now."""
    target.mkdir()
    if self._names_survive:
      for folder, folders, files in os.walk(self._root):
        to = target / os.path.relpath(folder, self._root)
        for name in folders:
          (to / name).mkdir()
        for name in files:
          number = os.stat(os.path.join(folder, name)).st_ino
          (to / name).write_bytes(self._data.get(number, b""))
    else:
      self._write_names(os.stat(self._root).st_ino, target)

  def _write_names(self, number, target):
    for name, (inside, is_folder) in self._names.get(number, {}).items():
      if is_folder:
        (target / name).mkdir()
        self._write_names(inside, target / name)
      else:
        (target / name).write_bytes(self._data.get(inside, b""))
