"""Several hosts stop together and go on as if they had not.

Run as a program, by each of two processes, this file trains a tiny model to its
end, then once more with a stop that one host is asked for, and prints digests
of everything that the checkpoints hold. On the host, words are searched too,
and each host holds some shards of the index. In the step, `tensor` goes over
both hosts: they load the same rows of each batch; and it does not divide the
vocabulary.
"""

import hashlib
import importlib.util
import json
import pathlib
import signal
import sys

import jax
import numpy as np
from processes import join_hosts
from processes import run_on_hosts
import pytest

from rag_jax.data.experiment import open_experiment
from rag_jax.data.questions import load_questions
from rag_jax.processes import to_host
from rag_jax.training import loop
from rag_jax.training.checkpoint import Checkpointer
from rag_jax.training.interrupt import StoppedEarlyError
from rag_jax.training.metrics import MetricWriter
from rag_jax.training.workdir import open_workdir

KINDS = {
  "on the host": {
    "mesh.data": 2, "mesh.fsdp": 2, "index.hybrid": True,
    "index.passages_per_shard": 12,
  },
  "in the step": {
    "mesh.tensor": 4, "generator.vocab_size": 601, "index.kind": "device",
    "index.refresh_rows": 12, "data.substitute_answers": 0.0,
  },
}  # fmt: skip
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


class Runs:
  """Runs of one kind, which share what they compile."""

  def __init__(self, config, root, host):
    self._config, self._root, self._host = config, root, host
    self._experiment = open_experiment(config)
    self._questions = load_questions(config.data.questions, "train")
    self._compiled = {}
    loop.compile_update = self._compile_once(loop.compile_update)
    Checkpointer.save = self._note(Checkpointer.save)
    MetricWriter.write = self._stop(MetricWriter.write)

  def _compile_once(self, compile_update):
    def once(*args):
      if not self._compiled:
        self._compiled["update"] = compile_update(*args)
      return self._compiled["update"]

    return once

  def _note(self, save):
    def note(checkpoints, step, state, extra, *args):
      leaves = jax.tree_util.tree_leaves_with_path(state)
      found = {jax.tree_util.keystr(p): digest(x) for p, x in leaves}
      self.saved[step] = found | {"documents": extra["doc_ids"]}
      save(checkpoints, step, state, extra, *args)

    return note

  def _stop(self, write):
    def write_and_stop(writer, step, stage, values):
      write(writer, step, stage, values)
      if (step, self._host) == (STOP, self.stop_on):
        signal.raise_signal(signal.SIGTERM)

    return write_and_stop

  def train(self, name, checkpoint_steps, stop_on):
    """Returns what was saved at each step, and which signal ended the run."""
    self.saved, self.stop_on = {}, stop_on
    self._config.train.checkpoint_steps = checkpoint_steps
    with open_workdir(
      self._root / name, self._config, process_index=self._host
    ) as workdir:
      try:
        loop.train(self._experiment, self._questions, workdir, lambda *_: {})
      except StoppedEarlyError as stopped:
        return self.saved, stopped.signum
    return self.saved, 0

  def shared(self):
    """Returns the shards of indexes that were saved by the second host."""
    return self._root.glob("whole/**/shards/00001")


def main(config_file, root, kind):
  host = join_hosts()
  runs = Runs(make_config(config_file, kind), pathlib.Path(root), host)
  found = [
    runs.train("whole", 1, -1),
    # The last host: not the one that writes.
    runs.train("stopped", 0, 1),
    runs.train("stopped", 0, -1),
  ]
  if kind == "on the host":
    assert list(runs.shared())
  json.dump(found, sys.stdout)


@pytest.fixture(scope="module", params=KINDS)
def runs(request, tiny, tmp_path_factory):
  """What each of two hosts saw in the three runs of a kind."""
  root = tmp_path_factory.mktemp("hosts")
  printed = run_on_hosts(
    __file__,
    *(tiny.config_file, root, request.param),
    count=2,
    cache=root / "compiled",
  )
  # Gloo prints there too.
  return [json.loads(text.splitlines()[-1]) for text in printed]


def test_all_hosts_stop_at_one_step_when_one_is_asked(runs):
  for _, (saved, signum), _ in runs:
    assert signum == signal.SIGTERM
    assert list(saved) == [str(STOP + 2)]


def test_a_stop_saves_what_an_undisturbed_run_has_at_that_step(runs):
  for (whole, _), (stopped, _), (rest, signum) in runs:
    assert not signum
    assert list(rest) == [str(STEPS)] == [max(whole, key=int)]
    for step, state in (stopped | rest).items():
      assert state == whole[step], step


def test_a_checkpoint_holds_the_documents_of_all_hosts(runs):
  (one, _), (two, _) = (host[0] for host in runs)
  assert len(one) == STEPS
  for step in one:
    documents = one[step]["documents"]
    assert documents == two[step]["documents"]
    if np.size(documents):  # the step itself searches in the other kind
      assert np.shape(documents) == (8, 2)
      assert np.min(documents) >= 0
      assert len(np.unique(documents, axis=0)) > 4


def test_what_is_saved_moves_with_every_step(runs):
  name = ".params['generator']['token_embedding']['embedding']"
  tables = [state[name] for state in runs[0][0][0].values()]
  assert len(set(tables)) == len(tables) == STEPS


if __name__ == "__main__":
  main(*sys.argv[1:])
