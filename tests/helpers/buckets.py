"""A bucket, gs://, that lies in memory."""

import contextlib
from typing import ClassVar

import fsspec
from fsspec.implementations.memory import MemoryFileSystem


class _Bucket(MemoryFileSystem):
  protocol = ("gs", "gcs")
  store: ClassVar[dict] = {}
  pseudo_dirs: ClassVar[list] = [""]

  @classmethod
  def _strip_protocol(cls, path):
    return super()._strip_protocol(
      path.removeprefix("gs://").removeprefix("gcs://")
    )


@contextlib.contextmanager
def bucket(name="bucket"):
  """Yields the address of an empty bucket."""
  before = {alias: fsspec.registry.get(alias) for alias in _Bucket.protocol}
  for alias in _Bucket.protocol:  # epath uses the second
    fsspec.register_implementation(alias, _Bucket, clobber=True)
  _Bucket.store.clear()
  _Bucket.pseudo_dirs[:] = ["", f"/{name}"]
  try:
    yield f"gs://{name}"
  finally:
    for alias, implementation in before.items():
      if implementation is not None:
        fsspec.register_implementation(alias, implementation, clobber=True)
