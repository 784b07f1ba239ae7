"""A whole run is the same on one, two, four and eight devices.

Run as a program, this file trains a tiny experiment (warm-up, main stage,
validation, answers) on several meshes of simulated devices, and prints what it
saw as JSON; the tests compare.
"""

import json
import pathlib
import sys
import tempfile

import jax
import numpy as np
from processes import run_on_eight_devices
import pytest

from rag_jax.api.configs import load_config
from rag_jax.data.experiment import open_experiment
from rag_jax.data.questions import load_questions
from rag_jax.decoding.answerer import Answerer
from rag_jax.evaluation.evaluate import Evaluator
from rag_jax.processes import to_host
from rag_jax.training import loop
from rag_jax.training.checkpoint import Checkpointer
from rag_jax.training.metrics import read_metrics
from rag_jax.training.workdir import open_workdir

STEPS, WARMUP_STEPS = 20, 4
# What differs from the tiny experiment, and the meshes: data, fsdp, tensor.
KINDS = {
  "RAG-Token, an index on the host, batches in two parts of three lengths": (
    {"train.accumulate": 2, "train.length_groups": 3},
    [(1, 1, 1), (2, 2, 1), (1, 2, 4)],
  ),
  "RAG-Sequence, words searched too, a generator with adapters": (
    {"loss": "rag_sequence", "index.hybrid": True, "decoding.num_beams": 2,
     "train.pack_contexts": True, "lora.rank": 3},
    [(1, 1, 1), (4, 2, 1)],
  ),
  "RAG-Token, searched in the step": (
    {"index.kind": "device", "index.refresh_rows": 8,
     "data.substitute_answers": 0.0, "train.length_groups": 2},
    [(1, 1, 1), (1, 1, 2), (2, 2, 2)],
  ),
}  # fmt: skip
PAIRS = [
  (kind, mesh) for kind, (_, meshes) in KINDS.items() for mesh in meshes[1:]
]
BOTH = pytest.mark.parametrize(("kind", "mesh"), PAIRS, ids=str)


def make_config(file, kind, mesh):
  config = load_config(file)
  config.train.num_steps = STEPS
  config.train.validate_steps = config.train.checkpoint_steps = 10
  config.train.keep_checkpoints = 100
  config.train.compute_dtype = "float32"
  config.generator.vocab_size = 601  # no mesh divides it
  # Adam makes a whole step of a gradient that is nothing but rounding, in which
  # the sums of meshes differ; with a larger eps the step is as small as it.
  config.optimizer.eps = 1e-3
  config.mesh.data, config.mesh.fsdp, config.mesh.tensor = mesh
  for name, value in KINDS[kind][0].items():
    section, _, field = name.rpartition(".")
    setattr(getattr(config, section) if section else config, field, value)
  return config


def run(file, kind, mesh, root):
  """Returns what is seen of a run, as JSON can hold it."""
  config = make_config(file, kind, mesh)
  devices = jax.devices()[: int(np.prod(mesh))]
  with open_workdir(root, config) as workdir:
    experiment = open_experiment(
      config, tokenizer_path=workdir.tokenizer, devices=devices
    )
    evaluator = Evaluator(experiment, Answerer(experiment))
    validation = load_questions(config.data.questions, "validation")
    answers, documents, states = [], [], []

    def validate(params, index):
      records = evaluator.records(params, index, validation)
      answers.append(
        [[r.prediction, np.asarray(r.retrieved_ids).tolist()] for r in records]
      )
      states.append(jax.tree.map(to_host, params))
      return {"validation/exact_match": 0.0}

    save = Checkpointer.save

    def note(checkpoints, step, state, extra, *args):
      documents.append([step, np.asarray(extra["doc_ids"]).tolist()])
      save(checkpoints, step, state, extra, *args)

    Checkpointer.save = note
    try:
      train_set = load_questions(config.data.questions, "train")
      loop.train(experiment, train_set, workdir, validate)
    finally:
      Checkpointer.save = save
    return {
      "metrics": [dict(r) for r in read_metrics(workdir.metrics)],
      "answers": answers,
      "documents": documents,
      "params": {
        jax.tree_util.keystr(path): np.asarray(x).tolist()
        for path, x in jax.tree_util.tree_leaves_with_path(states[-1])
      },
    }


@pytest.fixture(scope="module")
def results(tiny):
  return json.loads(run_on_eight_devices(__file__, tiny.config_file))


def both(results, kind, mesh, name):
  """What is seen on one device, and on the mesh."""
  runs = results[kind]
  return runs[str(KINDS[kind][1][0])][name], runs[str(mesh)][name]


@BOTH
def test_every_step_has_the_same_loss_and_gradient(kind, mesh, results):
  one, other = both(results, kind, mesh, "metrics")
  compared = 0
  for a, b in zip(one, other, strict=True):
    assert (a["stage"], a["step"]) == (b["stage"], b["step"])
    for name in a:
      if name.endswith(("loss", "entropy", "grad_norm")):
        assert a[name] == pytest.approx(b[name], rel=1e-4), (a["step"], name)
        compared += 1
  assert compared >= 3 * STEPS + 2 * WARMUP_STEPS


@BOTH
def test_the_same_documents_are_retrieved(kind, mesh, results):
  one, other = both(results, kind, mesh, "documents")
  assert one == other
  assert [step for step, _ in one] == [WARMUP_STEPS + 10, WARMUP_STEPS + STEPS]
  if "in the step" not in kind:
    assert np.shape(one[-1][1]) == (8, 2)


@BOTH
def test_validation_answers_alike_from_the_same_documents(kind, mesh, results):
  one, other = both(results, kind, mesh, "answers")
  assert one == other
  assert len(one) >= 2
  assert len({tuple(documents) for _, documents in one[-1]}) > 4


@BOTH
def test_the_parameters_are_the_same_at_the_end(kind, mesh, results):
  one, other = both(results, kind, mesh, "params")
  assert set(one) == set(other)
  for name, x in one.items():
    np.testing.assert_allclose(other[name], x, atol=1e-4, err_msg=name)


if __name__ == "__main__":
  with tempfile.TemporaryDirectory() as folder:
    found = {
      kind: {
        str(mesh): run(
          sys.argv[1], kind, mesh, pathlib.Path(folder) / f"{i}{mesh}"
        )
        for mesh in meshes
      }
      for i, (kind, (_, meshes)) in enumerate(KINDS.items())
    }
  json.dump(found, sys.stdout)
