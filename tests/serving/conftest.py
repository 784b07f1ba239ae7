"""A trained run to ask, and copies of it to damage."""

import json
import shutil

import jax
from jax.experimental.compilation_cache import compilation_cache
import pytest

from rag_jax.serving.pipeline import RagPipeline

PARTS = ("config.json", "tokenizer", "model", "index")  # of what is served


@pytest.fixture(scope="module")
def compile_once(learned):
  """Keeps what is compiled, since every pipeline compiles its own."""
  settings = {
    "jax_compilation_cache_dir": str(learned.workdir / ".jax_cache"),
    "jax_persistent_cache_min_compile_time_secs": 0.0,
  }
  before = {name: jax.config.values[name] for name in settings}
  for name, value in settings.items():
    jax.config.update(name, value)
  # Whether there is a cache is asked once, at the first compilation.
  compilation_cache.reset_cache()
  yield
  for name, value in before.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def pipeline(learned, compile_once):
  return RagPipeline.load(learned.workdir)


@pytest.fixture
def run(learned, compile_once, tmp_path):
  """A copy of the run, to be damaged."""
  copy = tmp_path / "run"
  copy.mkdir()
  for part in PARTS:
    path = learned.workdir / part
    (shutil.copytree if path.is_dir() else shutil.copy)(path, copy / part)
  return copy


@pytest.fixture
def write_jsonl(tmp_path):
  """Returns a function (name, records) -> the file that holds them."""

  def write(name, records):
    path = tmp_path / name
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path

  return write


@pytest.fixture
def change_config(run):
  """Returns a function that changes settings of the copied run on purpose."""

  def change(section, **values):
    config = json.loads((run / "config.json").read_text())
    config[section] |= values
    config.pop("sha256", None)
    (run / "config.json").write_text(json.dumps(config))

  return change
