"""Runs that several test files share: a tiny one, and one that has learned.

They are defined in tiny_run.py and learned_run.py, which are imported when a
test asks for them, so that other tests do not wait for all of rag_jax.
"""

import importlib.util
import pathlib
import sys

import pytest


def _read(name):
  """Returns the module `name` beside this file."""
  file = pathlib.Path(__file__).with_name(f"{name}.py")
  spec = importlib.util.spec_from_file_location(name, file)
  assert spec is not None
  assert spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  sys.modules[name] = module
  spec.loader.exec_module(module)
  return module


@pytest.fixture(scope="session")
def tiny_run():
  """The module tiny_run.py."""
  return _read("tiny_run")


@pytest.fixture(scope="session")
def tiny(tiny_run, tmp_path_factory):
  """The files of the tiny experiment, and ways to run it."""
  return tiny_run.Tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def uninterrupted(tiny):
  """A measured run, start to end, that keeps the checkpoint of every step."""
  config = tiny.config(train__checkpoint_steps=1, train__keep_checkpoints=100)
  return tiny.train(tiny.root / "uninterrupted", config, measure=True)


@pytest.fixture(scope="session")
def learned_run():
  """The module learned_run.py."""
  return _read("learned_run")


@pytest.fixture(scope="session")
def learned(learned_run, tmp_path_factory):
  """A run that answers for countries that it was not trained on."""
  return learned_run.train_run(tmp_path_factory.mktemp("learned"))
