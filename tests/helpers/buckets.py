"""A bucket, gs://, that lies in memory."""

import contextlib
from typing import ClassVar

import fsspec
from fsspec.implementations.memory import MemoryFileSystem


class _Bucket(MemoryFileSystem):
  protocol = "gs"
  store: ClassVar[dict] = {}
  pseudo_dirs: ClassVar[list] = [""]

  @classmethod
  def _strip_protocol(cls, path):
    return super()._strip_protocol(path.removeprefix("gs://"))


@contextlib.contextmanager
def bucket(name="bucket"):
  """Yields the address of an empty bucket."""
  before = fsspec.registry.get("gs")
  fsspec.register_implementation("gs", _Bucket, clobber=True)
  _Bucket.store.clear()
  _Bucket.pseudo_dirs[:] = ["", f"/{name}"]
  try:
    yield f"gs://{name}"
  finally:
    if before is not None:
      fsspec.register_implementation("gs", before, clobber=True)
