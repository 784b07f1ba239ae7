"""A disk that is full."""

import contextlib
import resource


@contextlib.contextmanager
def full_disk(num_bytes):
  """No file grows further: what a full disk does, done for real."""
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
