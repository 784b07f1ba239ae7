"""A whole run in a bucket, through the clients that reach a real one."""

import json
import signal

from buckets import served_bucket
from etils import epath
import pytest

import rag_jax
from rag_jax.training.checkpoint import Checkpointer

BEST, LAST = 13, 16  # of the checkpoints


@pytest.fixture(scope="module")
def attempts(tiny, tmp_path_factory):
  """Attempts at a run: SIGTERM ends the first; the third one measures."""
  with served_bucket(tmp_path_factory.mktemp("server")) as address:
    path = epath.Path(address) / "runs" / "stopped"
    config = tiny.config(train__keep_checkpoints=1)
    # Each attempt validates once before its first step, to compile it.
    matches = iter((0.0, 0.3, 0.0, 0.1, 0.4, 0.2))

    def validate(*_):
      return {"validation/exact_match": next(matches)}

    yield [
      tiny.train(path, config, validate=validate, stop_at=("train", 5)),
      tiny.train(path, config, validate=validate),
      tiny.train(path, config, measure=True),
    ]


def test_a_stopped_run_goes_on_bit_for_bit(attempts, uninterrupted, tiny_run):
  stopped, run, _ = attempts
  assert stopped.stopped.signum == signal.SIGTERM
  assert run.stopped is None
  for step in (BEST, LAST):
    tiny_run.assert_bit_equal(run.state(step), uninterrupted.state(step))

  def losses(metrics):
    return [(m["step"], m[f"{m['stage']}/loss"]) for m in metrics]

  assert losses(run.metrics) == losses(uninterrupted.metrics)


def test_the_best_checkpoint_is_kept_beside_the_last(attempts):
  assert attempts[-1].steps == [BEST, LAST]


def test_the_best_model_answers_from_the_bucket_and_is_exported(
  attempts, tiny, tiny_run, tmp_path
):
  run = attempts[-1]
  pipeline = rag_jax.RagPipeline.load(run.path)
  params = tiny_run.flat({"params": pipeline.params})
  best = run.state(BEST)
  tiny_run.assert_bit_equal(params, {name: best[name] for name in params})
  question = tiny.split("test")[0].question
  assert len(pipeline.answer(question)[0].docs) == 2
  assert json.loads((run.path / "results.json").read_text())["step"] == BEST
  for name in ("learning_curves.png", "tensorboard/train"):
    assert (run.path / name).exists()
  rag_jax.export(run.path, tmp_path / "exported", kind="generator")
  assert (tmp_path / "exported" / "config.json").exists()


def test_a_damaged_checkpoint_is_set_aside(attempts):
  folder = attempts[-1].path / "checkpoints"
  extra = folder / str(LAST) / "extra" / "metadata"
  extra.write_bytes(extra.read_bytes() + b" ")
  checkpoints = Checkpointer(folder, keep_last=1)
  assert checkpoints.newest_whole() == BEST
  assert checkpoints.steps() == [BEST]
  assert (folder / f"{LAST}.damaged" / "manifest.json").exists()
