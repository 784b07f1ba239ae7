"""A file for a test of a reader, and the passages that are tokenised."""

import json

import pytest

from rag_jax.corpus import token_store


@pytest.fixture
def write(tmp_path):
  """Writes text, bytes, or rows as lines of JSON; returns the path."""

  def write_file(data, name="file.jsonl"):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(data, list | tuple):
      data = "".join(json.dumps(row) + "\n" for row in data)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return str(path)

  return write_file


@pytest.fixture
def asked(monkeypatch):
  """The passages that are tokenised from now on."""
  asked = []
  tokenize = token_store.tokenize_rows
  monkeypatch.setattr(
    token_store,
    "tokenize_rows",
    lambda block, *args: asked.extend(block) or tokenize(block, *args),
  )
  return asked
