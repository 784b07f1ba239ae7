"""Several processes train as one does.

Two processes of two devices each, joined over localhost, against one process
of four devices: the same mesh, so the same run.
"""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy

_SCRIPT = """
import importlib.util
import sys

import jax

config_file, workdir, process, count, port = sys.argv[1:]
process, count = int(process), int(count)
jax.config.update("jax_num_cpu_devices", 4 // count)
if count > 1:
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  jax.distributed.initialize(
    coordinator_address=f"localhost:{port}",
    num_processes=count,
    process_id=process,
  )

from rag_jax.data.experiment import open_experiment
from rag_jax.data.questions import load_questions
from rag_jax.decoding.answerer import Answerer
from rag_jax.evaluation.evaluate import Evaluator
from rag_jax.evaluation.results import finish
from rag_jax.retrieval import retriever
from rag_jax.training.loop import train
from rag_jax.training.workdir import open_workdir

retriever._SORTED_PASSAGES = 8  # 5 blocks, which the processes share
spec = importlib.util.spec_from_file_location("experiment", config_file)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
config = module.get_config()
config.mesh.data, config.mesh.fsdp = 2, 2
config.index.embed_batch_size = 16
config.eval.batch_size = 4
config.train.log_steps = 1
# Adam makes a whole step of a gradient that is nothing but rounding, in which
# the processes' sums differ; with a larger eps the step is as small as it.
config.optimizer.eps = 1e-3
with open_workdir(workdir, config, process_index=process) as run:
  experiment = open_experiment(config, tokenizer_path=run.tokenizer)
  train_set, validation, test = (
    load_questions(config.data.questions, split)
    for split in ("train", "validation", "test")
  )
  evaluator = Evaluator(experiment, Answerer(experiment))
  clock = train(experiment, train_set, run, evaluator.validator(validation))
  finish(experiment, run, test, evaluator, clock)
"""


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
  """The workdirs of one process, and of two together."""
  root = tmp_path_factory.mktemp("processes")
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = str(free.getsockname()[1])
  environment = {
    k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS",)
  } | {"JAX_PLATFORMS": "cpu"}
  workdirs = []
  for count in (1, 2):
    workdirs.append(root / str(count))
    processes = [
      subprocess.Popen(
        [
          sys.executable,
          "-c",
          _SCRIPT,
          str(tiny.config_file),
          str(workdirs[-1]),
          str(process),
          str(count),
          port,
        ],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
      )
      for process in range(count)
    ]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    for process, error in zip(processes, errors, strict=True):
      assert process.returncode == 0, error[-3000:]
  return workdirs


def metrics(workdir):
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


def test_every_step_has_the_same_loss_and_gradient(runs):
  one, two = map(metrics, runs)
  assert [(r["stage"], r["step"]) for r in one] == [
    (r["stage"], r["step"]) for r in two
  ]
  compared = 0
  for a, b in zip(one, two, strict=True):
    for name in a:
      if name.endswith(("/loss", "contrastive_loss", "entropy", "grad_norm")):
        assert a[name] == pytest.approx(b[name], rel=2e-5), (a["step"], name)
        compared += 1
  assert compared > 30


def test_the_model_and_the_answers_are_the_same(runs):
  one, two = (
    safetensors.numpy.load_file(run / "model" / "params.safetensors")
    for run in runs
  )
  assert set(one) == set(two)
  for name in one:
    np.testing.assert_allclose(one[name], two[name], atol=1e-4, err_msg=name)
  results = [json.loads((run / "results.json").read_text()) for run in runs]
  asked = [name for name in results[0] if name.startswith("test/")]
  for name in [*asked, "cut", "num_passages"]:
    if name != "test/questions_per_second":
      assert results[0][name] == results[1][name], name
  assert len(asked) > 5
  assert not list(runs[1].glob("indexes/.embedding*"))


def test_validation_finds_the_same(runs):
  one, two = map(metrics, runs)
  compared = 0
  for a, b in zip(one, two, strict=True):
    for name in a:
      if name.startswith("validation/") and "per_second" not in name:
        assert a[name] == b[name], (a["step"], name)
        compared += 1
  assert compared > 20
