"""Reads small corpora that tests write, checks messages, measures memory."""

import tracemalloc

import pytest

from rag_jax.corpus.documents import read_documents
from rag_jax.corpus.report import BadRecords


def read(path, action="fail", **kwargs):
  """Returns the documents of a corpus, and the report."""
  bad = BadRecords(action)
  return list(read_documents(path, bad_records=bad, **kwargs)), bad.report


def assert_fails(call, *parts, error=ValueError):
  """Checks that `call` raises, and that the message has all parts in order."""
  with pytest.raises(error) as info:
    call()
  message = str(info.value)
  for part in parts:
    assert part in message
    message = message[message.index(part) :]


def peak_bytes(work):
  """Returns the most memory that Python held during `work`."""
  tracemalloc.start()
  try:
    work()
    return tracemalloc.get_traced_memory()[1]
  finally:
    tracemalloc.stop()
