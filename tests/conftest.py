"""One tiny experiment, whose runs several test files share.

What it is stands in tiny_run.py, which is read when a test asks for it: most
tests need not wait for all of rag_jax to be imported.
"""

import importlib.util
import pathlib
import sys

import pytest

_FILE = pathlib.Path(__file__).with_name("tiny_run.py")


@pytest.fixture(scope="session")
def tiny_run():
  """The module tiny_run.py."""
  spec = importlib.util.spec_from_file_location("tiny_run", _FILE)
  assert spec is not None
  assert spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  sys.modules["tiny_run"] = module
  spec.loader.exec_module(module)
  return module


@pytest.fixture(scope="session")
def tiny(tiny_run, tmp_path_factory):
  """The files of the tiny experiment, and ways to run it."""
  return tiny_run.Tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def uninterrupted(tiny):
  """A measured run, start to end, that keeps the checkpoint of every step."""
  config = tiny.config(train__checkpoint_steps=1, train__keep_checkpoints=100)
  return tiny.train(tiny.root / "uninterrupted", config, measure=True)
