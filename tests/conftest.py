"""How tests compile, and the runs that several files share.

The runs are defined in tiny_run.py and learned_run.py, which are imported when
a test asks for them, so that other tests do not wait for all of rag_jax.
"""

import gc
import importlib.util
import os
import pathlib
import sys

import filelock
import pytest

# Nearly all programs of the tests run once, on a few numbers: compiling them is
# most of the time. What costs is kept for other files, and for the next run.
_COMPILATION = {
  "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
  "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
}


# Folders and files (without _test.py) that train, build or compile for long.
# All others are `-m fast`.
_SLOW = (
  "benchmarks/growth", "benchmarks/systems", "commands/", "corpus/documents",
  "corpus/reading", "corpus/splitting", "corpus/token_keep",
  "corpus/token_store", "corpus/tokenized", "corpus/tokenized_joining",
  "corpus/tokenizer", "corpus/tokenizer_kinds", "data/contrastive",
  "data/experiment",
  "data/experiment_store", "data/pipeline", "data/step_batches",
  "decoding/answerer", "decoding/candidates", "decoding/logits",
  "decoding/rag", "decoding/ranking", "decoding/search", "decoding/streaming",
  "evaluation/evaluate", "evaluation/results", "models/attention",
  "models/beams", "models/build_model", "models/causal", "models/encoders",
  "models/flops", "models/generator", "models/meshes",
  "models/partitioning_devices",
  "models/pointer", "models/rag", "old_files", "parity/", "pod_configs",
  "public_api", "quickstart", "readme",
  "retrieval/device", "retrieval/device_index", "retrieval/device_refresh",
  "retrieval/embedding_job", "retrieval/hybrid", "retrieval/one_pass",
  "retrieval/postings",
  "retrieval/retriever", "retrieval/scann", "retrieval/sharded",
  "retrieval/tuner", "search/build", "search/damage", "search/directory",
  "search/update", "serving/damage", "serving/pipeline", "serving/refusals",
  "tools/", "training/checkpoint", "training/checkpoint_damage",
  "training/compiled", "training/contrastive", "training/devices",
  "training/hosts",
  "training/hybrid", "training/loop", "training/loop_in_step",
  "training/loop_resume", "training/meshes", "training/processes",
  "training/search_in_step", "training/stages", "training/state",
  "training/step", "weights/causal", "weights/convert", "weights/hostile",
  "weights/init_from", "weights/load",
)  # fmt: skip


def pytest_collection_modifyitems(items):
  """Marks what is worth a run after each change (`pytest -m fast`)."""
  here = pathlib.Path(__file__).parent
  for item in items:
    name = item.path.relative_to(here).as_posix().removesuffix("_test.py")
    if name not in _SLOW and f"{name.partition('/')[0]}/" not in _SLOW:
      item.add_marker("fast")


def pytest_configure(config):
  """Makes every test, and every process that it starts, compile quickly."""
  for name, value in _COMPILATION.items():
    os.environ.setdefault(name, value)
  worker = os.environ.get("PYTEST_XDIST_WORKER")
  kept = "JAX_COMPILATION_CACHE_DIR"
  cache = getattr(config, "cache", None)  # -p no:cacheprovider has none
  # A directory per worker: JAX does not lock the files that it writes.
  if cache and (worker or kept not in os.environ):
    os.environ[kept] = str(cache.mkdir(f"jax_{worker or 'main'}"))


# Each compiled program maps about ten regions of memory. Linux allows a process
# 65,530 of them: beyond, JAX crashes.
_MOST_REGIONS = 20_000


@pytest.fixture(scope="module", autouse=True)
def _programs_are_let_go():
  """Frees the programs of the files before, if they are many."""
  yield
  regions = pathlib.Path("/proc/self/maps")
  if "jax" not in sys.modules or not regions.exists():
    return
  if len(regions.read_bytes().splitlines()) > _MOST_REGIONS:
    sys.modules["jax"].clear_caches()
    gc.collect()


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
  """A run that answers for countries that it was not trained on.

  The workers of pytest-xdist share it: the first that needs it trains it.
  """
  root = tmp_path_factory.getbasetemp()
  if "PYTEST_XDIST_WORKER" in os.environ:
    root = root.parent
  with filelock.FileLock(root / "learned.lock"):
    return learned_run.open_run(root / "learned")
