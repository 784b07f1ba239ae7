"""What a run logs, keeps and leaves alone."""

import shutil
import time

import numpy as np
import pytest

from rag_jax.retrieval.retriever import IndexBuilder


def of_train(run):
  """The lines of the main stage."""
  return [r for r in run.metrics if r["stage"] == "train"]


def part(state, *names):
  """The parameters below any of `names`."""
  prefixes = tuple(f"params/{name}/" for name in names)
  return {k: v for k, v in state.items() if k.startswith(prefixes)}


def test_staleness_is_the_age_of_the_index_in_use(uninterrupted):
  staleness = [
    r["train/index_staleness_steps"] for r in of_train(uninterrupted)
  ]
  # Those built at 4 and 8 come into use after the steps 6 and 10.
  assert staleness == [1, 2, 3, 4, 5, 6, 3, 4, 5, 6, 3, 4]


def test_every_line_says_how_the_run_goes(uninterrupted):
  for record in of_train(uninterrupted):
    assert record["train/data_wait_secs"] >= 0
    assert 0 <= record["train/doc_entropy"] <= np.log(2) + 1e-6  # of two docs
    assert 2 / 16 <= record["train/distinct_docs"] <= 1
    assert record["train/grad_norm"] > 0
  for record in uninterrupted.metrics[:4]:
    assert record["stage"] == "warmup"
    assert record["warmup/contrastive_loss"] > 0
    assert record["warmup/data_wait_secs"] >= 0


def test_the_loss_falls(uninterrupted):
  losses = [r["train/loss"] for r in of_train(uninterrupted)]
  assert losses[-1] < 0.8 * losses[0]


def test_validation_is_logged_when_it_is_due(uninterrupted):
  validated = {
    r["step"]: r["validation/num_questions"]
    for r in of_train(uninterrupted)
    if "validation/exact_match" in r
  }
  assert validated == {3: 10, 6: 10, 9: 10, 12: 10}


def test_validation_sees_the_parameters_and_the_index_of_its_step(
  tiny, uninterrupted, tiny_run
):
  seen = []

  def validate(params, index):
    seen.append((tiny_run.flat({"params": params}), index.encoder_fingerprint))
    return tiny_run.find_nothing()

  tiny.train(tiny.root / "validated", tiny.config(), validate=validate)
  # Once before the first step: that compiles it, outside the clock.
  for (params, _), step in zip(seen, (4, 7, 10, 13, 16), strict=True):
    tiny_run.assert_bit_equal(
      params, part(uninterrupted.state(step), *parts(params))
    )
  indexes = [fingerprint for _, fingerprint in seen]
  # Steps 0, 3 and 6 have the first index, 9 that of step 4, 12 that of 8.
  assert len(set(indexes)) == 3
  assert indexes[0] == indexes[1] == indexes[2]


def parts(params):
  return {name.split("/")[1] for name in params}


def test_how_long_an_index_takes_changes_nothing(
  tiny, uninterrupted, tiny_run, monkeypatch
):
  build = IndexBuilder.build

  def build_slowly(self, retriever_params, **where):
    time.sleep(0.4)  # longer than the steps until the swap
    return build(self, retriever_params, **where)

  monkeypatch.setattr(IndexBuilder, "build", build_slowly)
  slow = tiny.train(tiny.root / "slow", tiny.config())
  tiny_run.assert_bit_equal(slow.state(), uninterrupted.state())


def test_only_the_indexes_of_kept_checkpoints_are_kept(tiny):
  # Of the run that was slow, or here if this test runs alone.
  run = tiny.train(tiny.root / "slow", tiny.config())
  assert run.steps == [13, 16]
  needed = {v for step in run.steps for v in run.extra(step)["index_versions"]}
  kept = {int(path.name) for path in (run.path / "indexes").iterdir()}
  assert kept == needed == {4, 8, 12}


def test_a_loss_that_is_not_finite_ends_the_run_with_good_checkpoints(
  tiny, tmp_path
):
  def spoil(step, metrics):
    return metrics | {"train/loss": np.float32(np.nan)} if step > 4 else metrics

  config = tiny.config(
    train__log_steps=100, train__validate_steps=0, train__checkpoint_steps=2
  )
  with pytest.raises(
    FloatingPointError,
    match=r"train/loss is not finite at step 6 of train: the run diverged\..*"
    r" Lower optimizer\.peak_lr or optimizer\.retriever_lr, or set"
    r" optimizer\.clip_norm, and go back to a checkpoint from before the loss"
    r" rose: --resume_from=6\.$",
  ):
    tiny.train(tmp_path / "run", config, spoil=spoil)


@pytest.fixture(scope="module")
def frozen_passages(tiny):
  """A run whose passages keep their embeddings."""
  config = tiny.config(
    warmup__num_steps=0,
    train__num_steps=6,
    encoder__tied=False,
    encoder__train_passage_encoder=False,
  )
  return tiny.train(tiny.root / "frozen", config, measure=True)


def test_a_frozen_passage_tower_stays_and_the_question_tower_learns(
  frozen_passages, tiny_run
):
  first, last = frozen_passages.first_state(), frozen_passages.state(6)
  frozen = part(last, "passage_encoder")
  assert frozen
  # Weight decay has to leave it alone, too.
  assert frozen_passages.config.optimizer.weight_decay > 0
  tiny_run.assert_bit_equal(part(first, "passage_encoder"), frozen)
  for name, x in part(first, "question_encoder", "generator").items():
    assert x.ndim < 2 or not np.array_equal(x, last[name]), name


def test_the_index_of_frozen_passages_is_never_built_again(frozen_passages):
  assert [p.name for p in (frozen_passages.path / "indexes").iterdir()] == ["0"]
  for record in of_train(frozen_passages):
    assert record["train/index_staleness_steps"] == 0


def index_config(tiny, frozen_passages, **changes):
  return tiny.config(
    warmup__num_steps=0,
    train__num_steps=6,
    encoder__tied=False,
    encoder__train_passage_encoder=False,
    index__path=str(frozen_passages.path / "index"),
    **changes,
  )


def test_an_index_that_was_built_before_gives_the_same_run(
  tiny, frozen_passages, tiny_run
):
  config = index_config(tiny, frozen_passages)
  path = tiny.root / "given_index"
  given = tiny.train(path, config, stop_at=("train", 4))
  assert given.stopped is not None
  given = tiny.train(path, config, measure=True)
  tiny_run.assert_bit_equal(given.state(6), frozen_passages.state(6))
  assert not (path / "indexes").exists()
  assert not (path / "index").exists()
  assert given.results["test/index_recall_at_5"] == 1.0


def test_an_index_of_other_weights_is_refused_before_the_warm_up(
  tiny, frozen_passages, tmp_path
):
  config = index_config(tiny, frozen_passages, seed=1)
  config.warmup.num_steps = 4
  with pytest.raises(
    ValueError, match=r"The index at .*/frozen/index was built by other weights"
  ):
    tiny.train(tmp_path / "run", config)
  assert not (tmp_path / "run" / "metrics.jsonl").read_text()


def test_an_index_of_other_passages_is_refused(tiny, frozen_passages, tmp_path):
  passages = tmp_path / "passages.jsonl"
  shutil.copy(tiny.passages, passages)
  passages.write_text(passages.read_text().replace("The river", "A river"))
  config = index_config(tiny, frozen_passages, data__passages=str(passages))
  # The tokenizer is that of the old passages, so that the weights are equal.
  config.tokenizer.path = str(frozen_passages.path / "tokenizer")
  with pytest.raises(ValueError, match="was built of other passages"):
    tiny.train(tmp_path / "run", config)


@pytest.fixture(scope="module")
def frozen_generator(tiny):
  """RAG-Sequence with two towers and a generator that stays."""
  config = tiny.config(
    loss="rag_sequence",
    warmup__num_steps=0,
    train__num_steps=5,
    encoder__tied=False,
    encoder__normalize=True,
    encoder__learn_score_scale=True,
    optimizer__freeze=("generator",),
  )
  return tiny.train(tiny.root / "frozen_generator", config)


def test_a_frozen_generator_stays_bit_equal(frozen_generator, tiny_run):
  first = part(frozen_generator.first_state(), "generator")
  assert first
  last = part(frozen_generator.state(5), "generator")
  tiny_run.assert_bit_equal(first, last)


def test_rag_sequence_trains_both_towers_and_the_scale(frozen_generator):
  first, last = frozen_generator.first_state(), frozen_generator.state(5)
  for name, x in first.items():
    if not name.startswith("params/generator/"):
      assert not np.array_equal(x, last[name]), name
  tops = {name.split("/")[1] for name in first}
  assert tops == {
    "question_encoder", "passage_encoder", "log_score_scale", "generator",
  }  # fmt: skip
