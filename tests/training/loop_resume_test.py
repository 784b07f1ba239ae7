"""A run that was stopped and resumed is one that was not, to the last bit."""

import dataclasses
import json
import shutil
import signal

import numpy as np
import pytest

from rag_jax.corpus.passages import Passages
from rag_jax.training.loop import train
from rag_jax.training.workdir import open_workdir
from rag_jax.weights.model_files import save_model

# The index is built at the steps 4 and 8 and swapped in at 6 and 10.
STOPS = {
  "in the warm-up": ("warmup", 2),
  "at the end of the warm-up": ("warmup", 4),
  "where a build starts": ("train", 4),
  "while a build waits for its swap": ("train", 5),
  "right before a swap": ("train", 6),
  "after a swap": ("train", 11),
}
EVERY_STOP = pytest.mark.parametrize("where", STOPS)


def name_of(stop):
  """The name of the checkpoint at a stage's step."""
  stage, step = stop
  return step if stage == "warmup" else 4 + step


@pytest.fixture(scope="module")
def attempts(tiny):
  """The attempts at one run, each of which is stopped, but for the last."""
  path = tiny.root / "stopped"
  config = tiny.config(train__checkpoint_steps=5, train__keep_checkpoints=100)
  stops = [*STOPS.values(), None]
  return [tiny.train(path, config, stop_at=stop) for stop in stops]


@EVERY_STOP
def test_a_signal_stops_the_run_where_it_arrives(where, attempts):
  stopped = attempts[list(STOPS).index(where)].stopped
  assert stopped.signum == signal.SIGTERM
  assert str(stopped) == (
    f"Stopped by SIGTERM and saved at step {name_of(STOPS[where])}. Run the"
    " same command again to go on from there."
  )


@EVERY_STOP
def test_what_a_stop_saves_is_the_state_of_an_uninterrupted_run(
  where, attempts, uninterrupted, tiny_run
):
  step = name_of(STOPS[where])
  tiny_run.assert_bit_equal(attempts[-1].state(step), uninterrupted.state(step))


def test_the_end_is_that_of_an_uninterrupted_run(
  attempts, uninterrupted, tiny_run
):
  assert attempts[-1].stopped is None
  end = attempts[-1].state()
  tiny_run.assert_bit_equal(end, uninterrupted.state())
  # It is all there, and it has moved.
  assert {name.split("/")[0] for name in end} == {"step", "params", "opt_state"}
  assert end["step"] == tiny_run.STEPS
  for name, x in attempts[-1].first_state().items():
    assert x.ndim < 2 or not np.array_equal(x, end[name]), name


def test_a_checkpoint_names_the_indexes_that_a_resumed_run_needs(attempts):
  versions = {
    where: attempts[-1].extra(name_of(stop))["index_versions"]
    for where, stop in STOPS.items()
  }
  assert versions == {
    "in the warm-up": [],
    "at the end of the warm-up": [],
    "where a build starts": [0, 4],
    "while a build waits for its swap": [0, 4],
    "right before a swap": [0, 4],
    "after a swap": [8],
  }


def test_a_checkpoint_holds_data_position_config_and_fingerprints(attempts):
  run = attempts[-1]
  extra = run.extra(name_of(("train", 5)))
  assert (extra["stage"], extra["stage_step"]) == ("train", 5)
  assert np.shape(extra["doc_ids"]) == (8, 2)  # of the batch of step 5
  # JSON has lists where the config has tuples.
  config = json.loads(json.dumps(dataclasses.asdict(run.config)))
  assert extra["config"] == config
  assert extra["identity"]["passages"] == run.experiment.passages.fingerprint


def test_metrics_have_each_step_once_and_the_same_numbers(
  attempts, uninterrupted, tiny_run
):
  def numbers(run):
    return [
      {
        name: value
        for name, value in record.items()
        if not name.startswith("validation/")
        and not name.endswith(("_secs", "questions_per_second"))
      }
      for record in run.metrics
    ]

  resumed = numbers(attempts[-1])
  assert [(r["stage"], r["step"]) for r in resumed] == [
    *(("warmup", step) for step in range(1, tiny_run.WARMUP_STEPS + 1)),
    *(("train", step) for step in range(1, tiny_run.STEPS + 1)),
  ]
  assert resumed == numbers(uninterrupted)


def test_the_clock_goes_on_over_all_attempts(attempts):
  times = [record["time_secs"] for record in attempts[-1].metrics]
  assert times == sorted(times)
  clocks = [
    attempts[-1].extra(name_of(stop))["clock"]["train_secs"]
    for stop in STOPS.values()
  ]
  assert clocks == sorted(clocks)
  assert 0 < clocks[-1] < attempts[-1].clock.train_secs
  clock = attempts[-1].clock
  assert 0 < clock.question_secs < clock.train_secs


def test_a_finished_run_is_not_trained_again(attempts, tiny):
  run = attempts[-1]
  before = (run.path / "metrics.jsonl").read_bytes()

  def validate(params, index):
    raise AssertionError("there is nothing to validate")

  again = tiny.train(run.path, run.config, validate=validate)
  assert 0 < again.clock.train_secs <= run.clock.train_secs
  assert (run.path / "metrics.jsonl").read_bytes() == before


def test_a_run_that_is_made_longer_is_one_that_always_was(
  tiny, uninterrupted, tiny_run
):
  path = tiny.root / "longer"
  tiny.train(path, tiny.config(train__num_steps=5))
  longer = tiny.train(path, tiny.config())
  tiny_run.assert_bit_equal(longer.state(), uninterrupted.state())


def finished(tiny, run, path):
  """A copy of a finished run with its model, as `finish` leaves it."""
  shutil.copytree(run.path, path)
  save_model(path / "model", {"x": np.zeros(1, np.float32)}, {"step": 16})


def test_a_finished_run_goes_on_with_a_new_schedule(
  tiny, uninterrupted, tiny_run, tmp_path
):
  path = tmp_path / "run"
  finished(tiny, uninterrupted, path)
  still = {
    "optimizer__peak_lr": 0.0,
    "optimizer__retriever_lr": 0.0,
    "optimizer__schedule": "cosine",
    "optimizer__clip_norm": 1.0,
    "train__num_steps": 14,
    "train__keep_checkpoints": 100,
  }
  run = tiny.train(path, tiny.config(**still))
  before, after = run.state(16), run.state(18)
  for name, x in before.items():
    if name.startswith("params/"):  # the new rates are those that count
      assert x.tobytes() == after[name].tobytes(), name
  # AdamW's moments go on from where they were.
  moments = [name for name in after if "/nu/" in name]
  assert moments
  assert any(not np.array_equal(before[n], after[n]) for n in moments)
  counts = [int(x) for name, x in after.items() if name.endswith("count")]
  assert set(counts) == {14}
  assert [r["step"] for r in run.metrics if r["stage"] == "train"] == list(
    range(1, 15)
  )


@pytest.mark.parametrize(
  "changes",
  [
    {"optimizer__schedule": "cosine"},  # not longer
    {"train__num_steps": 20, "seed": 1},
    {"train__num_steps": 20, "optimizer__freeze": ("generator",)},
  ],
)
def test_what_else_changes_is_another_experiment(
  tiny, uninterrupted, tmp_path, changes
):
  path = tmp_path / "run"
  finished(tiny, uninterrupted, path)
  with pytest.raises(
    ValueError, match=r"another experiment[^$]*of a run that has ended"
  ):
    tiny.train(path, tiny.config(**changes))


def test_a_run_cannot_be_made_shorter_than_it_is(tiny, copy):
  with pytest.raises(
    ValueError,
    match=r"The checkpoint of step 16 is beyond the end of the run: train\.num_"
    r"steps=5, after 4 of the warm-up\..*Set train\.num_steps to 12 or more, or"
    r" start in another --workdir\.",
  ):
    tiny.train(copy.path, tiny.config(train__num_steps=5))


@pytest.fixture
def copy(uninterrupted, tmp_path):
  """A finished run that a test may damage."""
  path = tmp_path / "copy"
  shutil.copytree(uninterrupted.path, path)
  return dataclasses.replace(uninterrupted, path=path)


def resume(run, questions, experiment=None):
  """Tries to resume `run`."""
  with open_workdir(run.path, run.config) as workdir:
    train(experiment or run.experiment, questions, workdir, lambda *_: {})


def test_passages_that_changed_since_are_refused(copy, tiny):
  passages = copy.experiment.passages
  changed = Passages(
    [dataclasses.replace(passages[0], text="Other."), *passages[1:]],
    origin="changed",
  )
  with pytest.raises(
    ValueError,
    match=r"The checkpoint of step 16 was made with other passages: what the"
    r" config names has changed since\. Put the old files back, or start in"
    r" another --workdir\.",
  ):
    resume(
      copy,
      tiny.split("train"),
      dataclasses.replace(copy.experiment, passages=changed),
    )


def test_questions_that_changed_since_are_refused(copy, tiny):
  with pytest.raises(ValueError, match="made with other questions: what the"):
    resume(copy, tiny.split("train")[::-1])


def test_an_index_that_was_damaged_is_named_with_the_way_out(copy, tiny):
  assert copy.extra(16)["index_versions"] == [8, 12]
  file = copy.path / "indexes" / "8" / "embeddings.npy"
  content = bytearray(file.read_bytes())
  content[-1] ^= 1
  file.write_bytes(content)
  with pytest.raises(
    ValueError,
    match=r"(?s)cannot go on from its checkpoint of step 16, which needs an"
    r" index that cannot be used: embeddings\.npy in .*/indexes/8 was damaged"
    r".*Delete the folder 16 of the checkpoints to go on from an earlier one",
  ):
    resume(copy, tiny.split("train"))


def test_the_way_out_of_a_damage_ends_with_the_same_parameters(
  copy, tiny, uninterrupted, tiny_run
):
  for step in range(11, 17):  # those after step 6, where a swap was due
    shutil.rmtree(copy.path / "checkpoints" / str(step))
  tiny.train(copy.path, copy.config)
  tiny_run.assert_bit_equal(copy.state(), uninterrupted.state())
