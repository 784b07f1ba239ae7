"""A run that was stopped and resumed is one that was not, to the last bit."""

import dataclasses
import gc
import json
import re
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rag_jax.config import MeshConfig
from rag_jax.corpus.passages import PassageList
from rag_jax.models.partitioning import make_mesh
from rag_jax.training.checkpoint import Checkpointer
from rag_jax.training.divergence import DivergenceCheck
from rag_jax.training.loop import train
from rag_jax.training.stages import Stage
from rag_jax.training.state import TrainState
from rag_jax.training.workdir import Workdir
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
    " same command again to continue from there."
  )


@EVERY_STOP
def test_what_a_stop_saves_is_the_state_of_an_uninterrupted_run(
  where, attempts, uninterrupted, tiny_run
):
  step = name_of(STOPS[where])
  tiny_run.assert_bit_equal(attempts[-1].state(step), uninterrupted.state(step))


def test_a_restored_state_takes_the_place_of_the_fresh_one(
  tiny, tmp_path, monkeypatch
):
  config = tiny.config(train__checkpoint_steps=5)
  tiny.train(tmp_path / "run", config, stop_at=("train", 5))
  restore, found = Checkpointer.restore, []

  def watched(checkpoints, abstract, step=None):
    gc.collect()
    mine = [x for x in jax.live_arrays() if id(x) not in before]
    shapes = {x.shape for x in jax.tree.leaves(abstract) if x.ndim > 1}
    found.append(sum(x.nbytes for x in mine if x.shape in shapes))
    return restore(checkpoints, abstract, step)

  monkeypatch.setattr(Checkpointer, "restore", watched)
  gc.collect()
  before = {id(x) for x in jax.live_arrays()}
  tiny.train(tmp_path / "run", config, stop_at=("train", 7))
  assert found == [0]


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
  ledgers = [
    sum(v for name, v in record.items() if name.startswith("ledger/"))
    for record in attempts[-1].metrics
  ]
  assert ledgers == sorted(ledgers)


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
    r"steps=5, after 4 of the stages before\..*Set train\.num_steps to 12 or"
    r" more, or start in another --workdir\.",
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
  changed = PassageList(
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


def flip(file):
  content = bytearray(file.read_bytes())
  content[-1] ^= 1
  file.write_bytes(content)


def test_a_run_goes_on_from_the_newest_checkpoint_that_is_whole(
  copy, tiny, uninterrupted, tiny_run, caplog
):
  # The index of version 8 is needed by the checkpoints from step 12 on.
  assert copy.extra(16)["index_versions"] == [8, 12]
  flip(copy.path / "indexes" / "8" / "embeddings.npy")
  state = copy.path / "checkpoints" / "11" / "state"
  flip(max(state.rglob("*"), key=lambda f: f.is_file() and f.stat().st_size))
  tiny.train(copy.path, copy.config)
  log = caplog.text
  assert (
    "The checkpoint of step 16 cannot be used: It needs an index that" in log
  )
  assert re.search(r"step 11 cannot be used: .* was damaged: its content", log)
  assert re.search(r"is now .*/11\.damaged\. The run goes on from step 10", log)
  # Nothing is lost, and nothing of it is used.
  kept = {path.name for path in (copy.path / "checkpoints").iterdir()}
  assert {f"{step}.damaged" for step in range(11, 17)} < kept
  tiny_run.assert_bit_equal(copy.state(), uninterrupted.state())


def test_a_damaged_older_checkpoint_stops_neither_a_run_nor_its_saves(
  tiny, uninterrupted, tiny_run, tmp_path
):
  path = tmp_path / "run"
  settings = {"train__checkpoint_steps": 2, "train__keep_checkpoints": 100}
  tiny.train(path, tiny.config(**settings), stop_at=("train", 6))
  for file in (path / "checkpoints" / "8").rglob("*"):
    if file.is_file():
      file.write_bytes(b"")
  run = tiny.train(path, tiny.config(**settings))
  tiny_run.assert_bit_equal(run.state(), uninterrupted.state())


# The loss of step 9 is that of the parameters in checkpoint 12.
AFTER_8 = r"--resume_from=10, or to an earlier one: 2, 4, 6, 7, 8\.$"


@pytest.fixture
def diverged(tiny, tmp_path):
  """The folder of a run that diverged after step 8 of its main stage."""

  def spoil(step, metrics):
    return metrics | {"train/loss": np.float32(np.inf)} if step > 8 else metrics

  config = tiny.config(train__checkpoint_steps=2, train__keep_checkpoints=100)
  with pytest.raises(FloatingPointError, match=AFTER_8):
    tiny.train(tmp_path / "run", config, spoil=spoil)
  return tmp_path / "run"


def test_a_run_that_diverged_goes_back_and_learns_slower(
  diverged, tiny, caplog
):
  settings = {
    "train__checkpoint_steps": 2, "train__keep_checkpoints": 100,
    "optimizer__peak_lr": 1e-3,
  }  # fmt: skip
  slower = tiny.config(**settings)
  caplog.set_level("INFO")
  with pytest.raises(ValueError, match=r"(?s)peak_lr: .*--resume_from=STEP"):
    tiny.train(diverged, slower)
  run = tiny.train(diverged, slower, resume_from=8)
  kept = {path.name for path in (diverged / "checkpoints").iterdir()}
  assert {"10.left", "12.left"} < kept
  assert "after --resume_from=8, is now" in caplog.text
  assert run.extra(12)["config"]["optimizer"]["peak_lr"] == 1e-3
  assert run.extra(8)["config"]["optimizer"]["peak_lr"] == 1e-2
  steps = [r["step"] for r in run.metrics if r["stage"] == "train"]
  assert steps == list(range(1, 13))
  # A job that is started again with the same command goes on where it was.
  end = run.state()
  caplog.clear()
  tiny.train(diverged, slower, resume_from=8)
  assert "The checkpoint of step 16 was made after --resume_from" in caplog.text
  assert run.state()["step"] == end["step"]
  # And so does one without the flag: the folder is that of the new config.
  tiny.train(diverged, slower)


def test_a_run_cannot_go_back_to_what_is_not_there_or_to_another_model(
  diverged, tiny
):
  with pytest.raises(FileNotFoundError, match=r"step 9 .*one of \[2, 4, 6, "):
    tiny.train(diverged, tiny.config(), resume_from=9)
  before = (diverged / "config.json").read_bytes()
  slower = tiny.config(optimizer__peak_lr=1e-3)
  for step in (9, -1):
    with pytest.raises(
      FileNotFoundError, match=rf"step {step} .*one of \[2, 4"
    ):
      tiny.train(diverged, slower, resume_from=step)
    assert (diverged / "config.json").read_bytes() == before
  with pytest.raises(ValueError, match=r"(?s)another experiment.*embed_dim"):
    tiny.train(diverged, tiny.config(encoder__embed_dim=32), resume_from=8)


@pytest.mark.parametrize(
  ("value", "message"),
  [
    (np.nan, "parameters/generator/lm is not finite at step 2 of train"),
    (-3e7, r"parameters/generator/lm has a value of 3\.0e\+07 at step 2"),
    (1e3, ""),
  ],
)
def test_parameters_that_ran_away_are_not_saved(value, message, tmp_path):
  mesh = make_mesh(MeshConfig(data=1))
  saved = Checkpointer(tmp_path, keep_last=1)
  params = {"generator": {"lm": jnp.array([0.0, value])}}
  state = TrainState(jnp.int32(2), params, {"count": jnp.int32(2)})
  stage = Stage("train", 4, 8, 0, lambda *_: None, lambda *_: None)
  check = DivergenceCheck(
    saved, Workdir(tmp_path), mesh, vocab_size=600, warmup_steps=0
  )
  if not message:
    check.check_state(state, stage, 2)
    return
  with pytest.raises(FloatingPointError, match=message + r".*starts afresh\."):
    check.check_state(state, stage, 2)


def test_what_is_cut_is_counted_once_however_often_a_run_is_stopped(tiny):
  short = {
    "data__context_length": 16,
    "train__validate_steps": 0,
    "train__num_steps": 6,
  }
  whole = tiny.train(tiny.root / "cut", tiny.config(**short))
  for stop in (("warmup", 2), ("train", 3), ("train", 4), None):
    stopped = tiny.train(
      tiny.root / "cut_stopped", tiny.config(**short), stop_at=stop
    )
  assert stopped.clock.cut == whole.clock.cut
  assert whole.clock.cut["contexts_cut"] > 20
