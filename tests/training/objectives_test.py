"""Whole runs with other objectives than the marginal likelihood."""

import json

import numpy as np
import pytest
import safetensors.numpy

from rag_jax.api.runs import train

STEPS = {
  "warmup__num_steps": 0, "train__num_steps": 6, "train__validate_steps": 6,
  "train__checkpoint_steps": 6,
}  # fmt: skip


@pytest.fixture
def trained(tiny, tmp_path):
  def train(name, **changes):
    config = tiny.config(**STEPS | changes)
    return tiny.train(tmp_path / name, config, measure=True)

  return train


def logged(run, name):
  return [r[name] for r in run.metrics if name in r]


def changed(run, part):
  """Whether parameters below `part` have moved between two checkpoints."""
  before, after = run.state(3), run.state(6)
  names = [n for n in after if n.startswith(f"params/{part}/")]
  assert names
  return any(not np.array_equal(before[n], after[n]) for n in names)


@pytest.mark.parametrize(("kind", "settings"), [
  ("loop", {}), ("pdist", {"train__pack_contexts": True}), ("adist", {}),
  ("dkrr", {"train__pack_contexts": True}),
])  # fmt: skip
def test_fid_trains_both_parts_and_answers_from_all_documents(
  trained, kind, settings
):
  run = trained(
    "fid", loss="fid", retriever_loss=kind, train__checkpoint_steps=3,
    **settings,
  )  # fmt: skip
  losses = logged(run, "train/loss")
  assert len(losses) == 6
  assert losses[-1] < losses[0]
  own = logged(run, "train/retriever_loss")
  assert len(own) == 6
  assert np.all(np.isfinite(own))
  assert np.all(np.array(own) >= 0)  # a divergence
  assert logged(run, "validation/num_questions") == [10]
  assert np.all(np.isfinite(logged(run, "train/doc_utility")))
  assert changed(run, "generator")
  assert changed(run, "question_encoder")


@pytest.mark.parametrize(("kind", "settings"), [
  ("reward", {"data__substitute_answers": 0.5}),
  ("reward_sampled", {"reward": "em", "loss": "fid"}),
])  # fmt: skip
def test_rewards_train_the_retriever_beside_the_generators_loss(
  trained, kind, settings
):
  run = trained(
    "rewards", retriever_loss=kind, train__checkpoint_steps=3, **settings
  )
  rewards = np.array(logged(run, "train/reward"))
  assert len(rewards) == 6
  assert np.all((rewards >= 0) & (rewards <= 1))
  own = np.array(logged(run, "train/retriever_loss"))
  if kind == "reward":
    np.testing.assert_allclose(own, 1 - rewards, rtol=1e-5)
  else:
    assert np.all(own >= 0)
  assert changed(run, "generator")


def test_right_answers_are_rewarded(learned, learned_run, tmp_path):
  config = learned_run.make_config(learned.passages.parent)
  config.init_from = str(learned.workdir)
  config.retriever_loss, config.reward = "reward", "em"
  config.data.substitute_answers = 0.0
  config.train.num_steps, config.train.log_steps = 3, 1
  config.optimizer.warmup_steps = 0
  train(config, tmp_path / "run")
  lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
  logged = map(json.loads, lines)
  rewards = [r["train/reward"] for r in logged if "train/reward" in r]
  assert len(rewards) == 3
  assert min(rewards) > 0.7  # the model has been trained on these questions
  before, after = (
    safetensors.numpy.load_file(run / "model" / "params.safetensors")
    for run in (learned.workdir, tmp_path / "run")
  )
  moved = [n for n in after if not np.array_equal(before[n], after[n])]
  assert any(n.startswith("question_encoder") for n in moved)


def test_a_reader_alone_leaves_the_retriever_as_it_is(trained):
  run = trained(
    "alone", loss="fid", retriever_loss="none", train__checkpoint_steps=3
  )
  assert not logged(run, "train/retriever_loss")
  assert changed(run, "generator")
  # Not even by weight decay.
  assert not changed(run, "question_encoder")


def test_emdr2_beside_a_rag_generator_is_rag(trained):
  expected = trained("rag", loss="rag_sequence")
  found = trained("emdr2", loss="rag_sequence", retriever_loss="emdr2")
  np.testing.assert_allclose(
    logged(found, "train/loss"), logged(expected, "train/loss"), rtol=1e-3
  )
  np.testing.assert_allclose(
    logged(found, "train/retriever_loss"),
    logged(found, "train/loss"),
    rtol=1e-5,
  )
