"""All chips of all hosts embed the passages, and find what one would.

Run as a program, by each of two processes with two devices, this file embeds
the passages of the tiny experiment in every way, and prints what it found.
"""

import importlib.util
import json
import pathlib
import sys

import jax
import numpy as np
from processes import join_hosts
from processes import run_on_hosts
import pytest

from rag_jax.data.experiment import open_experiment
from rag_jax.processes import wait_for_all
from rag_jax.retrieval import retriever
from rag_jax.retrieval.retriever import RetrieverSnapshots
from rag_jax.retrieval.shared_embedding import PREFIX
from rag_jax.retrieval.shared_embedding import remove_shared
from rag_jax.training import search_in_step
from rag_jax.training.stages import stage_optimizer
from rag_jax.training.state import init_params
from rag_jax.training.state import make_state

BLOCK = 6  # of 40 passages: 7 blocks, of which process 0 embeds 4
IN_STEP = {"index.kind": "device", "index.refresh_rows": 12,
           "data.substitute_answers": 0.0}  # fmt: skip


def open_tiny(file, **changes):
  spec = importlib.util.spec_from_file_location("experiment", file)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = module.get_config()
  config.mesh.data, config.mesh.fsdp = 2, 2
  config.index.embed_batch_size = 4
  for name, value in changes.items():
    section, field = name.split(".")
    setattr(getattr(config, section), field, value)
  return open_experiment(config)


def first_state(experiment):
  key = jax.random.key(0)
  params, layout = init_params(experiment.init, key, experiment.mesh)
  optimizer = stage_optimizer(experiment.config, "train", params)
  return make_state(params, layout, optimizer, experiment.mesh)


def on_hosts(file, root):
  """Returns whether the shared rows are those of one process alone."""
  retriever._SORTED_PASSAGES = BLOCK
  experiment = open_tiny(file)
  params = first_state(experiment)[0].params
  params = RetrieverSnapshots(experiment.mesh).take(params)
  embedder = experiment.embedder
  embedded = []
  rows = embedder.rows

  def counted(params, tokens, ids, *args, **more):
    embedded.append(len(ids))
    return rows(params, tokens, ids, *args, **more)

  embedder.rows = counted
  alone = experiment.index_builder.build(params).embeddings
  embedded.clear()
  build = experiment.index_builder.build
  index = build(params, directory=root, devices=jax.local_devices())
  shared = sum(embedded)
  again = build(params, directory=root)  # finds what is embedded already
  found = {
    "equal": np.array_equal(index.embeddings, alone),
    "equal again": np.array_equal(again.embeddings, alone),
    "shared": shared,
    "again": sum(embedded) - shared,
    "folders": sum(p.name.startswith(PREFIX) for p in root.iterdir()),
  }
  wait_for_all("read")
  if not jax.process_index():
    remove_shared(root)
    found["left"] = len(list(root.iterdir()))
  return found | in_step(file, alone)


def in_step(file, alone):
  """Returns how far the rows in the devices' memory are from `alone`."""
  experiment = open_tiny(file, **IN_STEP)
  state, layout = first_state(experiment)
  inner = search_in_step.open_in_step(experiment)
  state, _ = search_in_step.place_index(experiment, state, layout, inner)
  found = search_in_step.searched(experiment, state, None)
  embeddings = np.asarray(found.embeddings[:])
  shards = state.index.arrays.embeddings.addressable_shards
  return {
    "error": float(np.abs(embeddings - alone).max()),
    "scale": float(np.abs(alone).max()),
    "held": [shard.data.shape[0] for shard in shards],
  }


@pytest.fixture(scope="module")
def found(tiny, tmp_path_factory):
  root = tmp_path_factory.mktemp("embedding")
  (root / "shared").mkdir()
  printed = run_on_hosts(
    __file__,
    *(tiny.config_file, root / "shared"),
    count=2,
    cache=root / "compiled",
  )
  return [json.loads(text.splitlines()[-1]) for text in printed]


def test_each_host_embeds_its_share_of_the_rows_of_one(found):
  assert [host["shared"] for host in found] == [4 * BLOCK - 2, 3 * BLOCK]
  for host in found:
    assert host["equal"]
    assert host["equal again"]
    assert host["again"] == 0
    assert host["folders"] == 1
  assert found[0]["left"] == 0


def test_each_device_embeds_the_rows_that_it_holds(found):
  for host in found:
    assert host["held"] == [10, 10]
    assert host["error"] <= 1e-5 * host["scale"]
    assert host["scale"] > 0.01


if __name__ == "__main__":
  join_hosts()
  json.dump(on_hosts(sys.argv[1], pathlib.Path(sys.argv[2])), sys.stdout)
