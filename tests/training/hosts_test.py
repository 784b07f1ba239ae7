"""Several hosts stop together and go on as if they had not.

Run as a program, by each of two processes, this file trains a tiny model to its
end, then once more with a stop that one host is asked for, and prints digests
of everything that the checkpoints hold. Each kind of search keeps something
else; with `tensor` over both hosts, they hold the same rows of each batch.
"""

import hashlib
import importlib.util
import json
import pathlib
import signal
import sys

import numpy as np
from processes import join_hosts
from processes import run_on_hosts
import pytest

from rag_jax.data.experiment import open_experiment
from rag_jax.data.questions import load_questions
from rag_jax.processes import to_host
from rag_jax.training.checkpoint import Checkpointer
from rag_jax.training.interrupt import StoppedEarlyError
from rag_jax.training.loop import train
from rag_jax.training.metrics import MetricWriter
from rag_jax.training.workdir import open_workdir

KINDS = {
  "host": {"mesh.data": 2, "mesh.fsdp": 2},
  "in the step": {
    "mesh.data": 2, "mesh.fsdp": 2, "index.kind": "device",
    "index.refresh_rows": 12, "data.substitute_answers": 0.0,
  },
  "hybrid": {"mesh.data": 4, "index.hybrid": True},
  "tensor": {"mesh.tensor": 4},
}  # fmt: skip
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)
STEPS = 6
STOP = 2  # step in which one host is asked to stop; it is heard two later


def make_config(file, kind):
  spec = importlib.util.spec_from_file_location("experiment", file)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = module.get_config()
  config.warmup.num_steps = 0
  config.train.num_steps = STEPS
  config.train.validate_steps = 0
  config.train.keep_checkpoints = 100
  config.index.refresh_steps, config.index.swap_steps = 2, 1
  for name, value in KINDS[kind].items():
    section, field = name.split(".")
    setattr(getattr(config, section), field, value)
  return config


def digest(array):
  array = np.ascontiguousarray(to_host(array))
  return hashlib.sha256(array.tobytes()).hexdigest()[:12]


def run(experiment, workdir, stop_on):
  """Trains; returns what was saved at each step, and why it ended."""
  import jax

  saved, save, write = {}, Checkpointer.save, MetricWriter.write

  def note(self, step, state, extra, *args):
    leaves = jax.tree_util.tree_leaves_with_path(state)
    saved[step] = {jax.tree_util.keystr(p): digest(x) for p, x in leaves}
    saved[step]["documents"] = extra["doc_ids"]
    save(self, step, state, extra, *args)

  def write_and_stop(self, step, stage, values):
    write(self, step, stage, values)
    if (stage, step, jax.process_index()) == ("train", STOP, stop_on):
      signal.raise_signal(signal.SIGTERM)

  questions = load_questions(experiment.config.data.questions, "train")
  stopped = 0
  try:
    Checkpointer.save, MetricWriter.write = note, write_and_stop
    train(experiment, questions, workdir, lambda *_: {})
  except StoppedEarlyError as error:
    stopped = error.signum
  finally:
    Checkpointer.save, MetricWriter.write = save, write
  return saved, stopped


def main(config_file, root, *kinds):
  host = join_hosts()
  found = {}
  for kind in kinds:
    config = make_config(config_file, kind)

    def attempt(name, every, stop_on, config=config, kind=kind):
      config.train.checkpoint_steps = every
      path = pathlib.Path(root) / kind / name
      with open_workdir(path, config, process_index=host) as workdir:
        experiment = open_experiment(config, tokenizer_path=workdir.tokenizer)
        return run(experiment, workdir, stop_on)

    found[kind] = [
      attempt("whole", 1, -1),
      # The last host: not the one that writes.
      attempt("stopped", 0, 1),
      attempt("stopped", 0, -1),
    ]
  json.dump(found, sys.stdout)


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
  """What each of two hosts saw."""
  root = tmp_path_factory.mktemp("hosts")
  printed = run_on_hosts(
    __file__,
    *(tiny.config_file, root, *KINDS),
    count=2,
    cache=root / "compiled",
  )
  # Gloo prints there too.
  return [json.loads(text.splitlines()[-1]) for text in printed]


@EVERY_KIND
def test_all_hosts_stop_at_one_step_when_one_is_asked(kind, runs):
  for host in runs:
    saved, signum = host[kind][1]
    assert signum == signal.SIGTERM
    assert list(saved) == [str(STOP + 2)]


@EVERY_KIND
def test_a_stop_saves_what_an_undisturbed_run_has_at_that_step(kind, runs):
  for host in runs:
    (whole, _), (stopped, _), (rest, signum) = host[kind]
    assert not signum
    assert list(rest) == [str(STEPS)] == [max(whole, key=int)]
    for step, state in (stopped | rest).items():
      assert state == whole[step], (kind, step)


@EVERY_KIND
def test_a_checkpoint_holds_the_documents_of_all_hosts(kind, runs):
  for step in runs[0][kind][0][0]:
    one, two = (host[kind][0][0][step]["documents"] for host in runs)
    assert one == two
    if kind != "in the step":
      assert np.shape(one) == (8, 2)
      assert np.min(one) >= 0
      assert len(np.unique(one, axis=0)) > 4


@EVERY_KIND
def test_what_is_saved_moves_with_every_step(kind, runs):
  states = runs[0][kind][0][0].values()
  tables = [
    state[".params['generator']['token_embedding']['embedding']"]
    for state in states
  ]
  assert len(set(tables)) == len(tables) == STEPS


if __name__ == "__main__":
  main(*sys.argv[1:])
