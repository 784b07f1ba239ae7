"""A run whose loss explodes stops, and keeps what it had learned before."""

import json
import math
import shutil

import numpy as np
import pytest

from rag_jax import artifacts
from rag_jax.training.checkpoint import Checkpointer
from rag_jax.training.divergence import is_too_high

VOCAB = 600  # 10 log(600) is 64


@pytest.mark.parametrize(
  ("loss", "lowest", "expected"),
  [
    (math.nan, 4.0, True),
    (math.inf, math.inf, True),
    (8e6, 4.4, True),
    (65.0, 4.4, True),
    (63.0, 0.001, False),  # a whole batch that surprises
    (500.0, math.inf, False),  # the first loss of a run
    (600.0, 500.0, False),  # noise on it
    (5001.0, 500.0, True),
    (1e9, 9e8, False),  # label smoothing over logits that are shut off
  ],
)
def test_a_loss_is_too_high_for_the_vocabulary_and_for_the_run(
  loss, lowest, expected
):
  assert is_too_high(loss, lowest, VOCAB) == expected


def exploding(after):
  """Returns `spoil` of a run whose parameters are useless from `after` on."""

  def spoil(step, metrics):
    if step <= after or "train/loss" not in metrics:
      return metrics
    return metrics | {"train/loss": np.float32(8e6 * step)}

  return spoil


@pytest.fixture(scope="module")
def settings():
  """Of a run that saves every step."""
  return {
    "train__checkpoint_steps": 1,
    "train__keep_checkpoints": 1,
    "train__validate_steps": 0,
  }


@pytest.fixture(scope="module")
def exploded(tiny, settings):
  """A run whose update of step 5 of the main stage was far too large."""
  run, path = tiny.config(**settings), tiny.root / "exploded"
  with pytest.raises(FloatingPointError) as caught:
    tiny.train(path, run, spoil=exploding(5))
  return path, str(caught.value)


def test_a_loss_that_explodes_ends_the_run(exploded):
  _, message = exploded
  assert message.startswith("train/loss is 4.8e+07, after ")
  assert " before, at step 6 of train: the run diverged. Expected" in message


def test_what_the_loss_exploded_after_is_neither_offered_nor_alone(exploded):
  path, message = exploded
  # The loss of checkpoint 9 is that of the parameters before: a good one.
  assert Checkpointer(path / "checkpoints", keep_last=1).steps() == [8, 9]
  assert message.endswith("from before the loss rose: --resume_from=8.")


def test_the_same_command_again_stops_at_once(exploded, tiny, settings):
  path, _ = exploded
  with pytest.raises(
    FloatingPointError, match=r"at step 6 of train.*--resume_from=8\.$"
  ):
    tiny.train(path, tiny.config(**settings), spoil=exploding(5))


def test_a_run_between_whose_logs_the_loss_explodes_saves_nothing_more(
  tiny, tmp_path
):
  config = tiny.config(
    train__log_steps=100, train__validate_steps=0, train__checkpoint_steps=2
  )
  with pytest.raises(
    FloatingPointError, match=r"at step 6 of train.*--resume_from=6\.$"
  ):
    tiny.train(tmp_path / "run", config, spoil=exploding(4))


def set_loss(folder, loss):
  """Makes a checkpoint one that an older version saved at such a loss."""
  path = folder / artifacts.MANIFEST
  manifest = json.loads(path.read_text())
  manifest["content"]["loss"] = loss
  path.write_text(json.dumps(artifacts.with_digest(manifest)))


@pytest.fixture
def old(exploded, tmp_path):
  """The folder of a run of an older version, with checkpoints 8 and 9."""
  path = tmp_path / "old"
  shutil.copytree(exploded[0], path)
  set_loss(path / "checkpoints" / "9", 8e7)
  return path


@pytest.mark.parametrize("resume_from", [None, 9])
def test_a_checkpoint_of_a_diverged_run_is_refused_by_name(
  old, tiny, settings, resume_from
):
  before = sorted(p.name for p in (old / "checkpoints").iterdir())
  with pytest.raises(
    ValueError,
    match=r"checkpoint of step 9 was saved after the run had diverged: its loss"
    r" is 8\.0e\+07 nats per token\. .* Go back .*--resume_from=8\.$",
  ):
    tiny.train(old, tiny.config(**settings), resume_from=resume_from)
  assert sorted(p.name for p in (old / "checkpoints").iterdir()) == before


def test_a_checkpoint_that_was_set_aside_is_named_if_it_is_the_only_good_one(
  old, tiny, settings
):
  saved = old / "checkpoints"
  shutil.move(saved / "8", saved / "8.left")
  with pytest.raises(ValueError, match="step 9 was saved after") as caught:
    tiny.train(old, tiny.config(**settings))
  assert str(caught.value).endswith(
    f"Rename {saved}/8.left, which is from before that, to {saved}/8, and run"
    " the command with --resume_from=8."
  )
  shutil.move(saved / "8.left", saved / "8")
  slower = tiny.config(**settings, optimizer__peak_lr=1e-3)
  run = tiny.train(old, slower, resume_from=8)
  assert run.steps[-1] == 16


def test_without_a_good_checkpoint_another_workdir_is_advised(
  old, tiny, settings
):
  shutil.rmtree(old / "checkpoints" / "8")
  with pytest.raises(ValueError, match=r"Start in another --workdir"):
    tiny.train(old, tiny.config(**settings))
