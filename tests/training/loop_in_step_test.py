"""A run whose steps search and embed themselves, stopped and resumed or not."""

import itertools

import numpy as np
import pytest

from rag_jax.corpus.passage_reader import load_passages

# Of 40 passages 12 in a step: every one has its turn in 4 steps.
SETTINGS = {
  "index__kind": "device",
  "index__refresh_rows": 12,
  "index__device_storage": "int8",
  "data__substitute_answers": 0.0,
  "train__keep_checkpoints": 100,
}


@pytest.fixture(scope="module")
def whole(tiny):
  """A measured run, start to end, that keeps the checkpoint of every step."""
  config = tiny.config(**SETTINGS, train__checkpoint_steps=1)
  return tiny.train(tiny.root / "in_step", config, measure=True)


def of_train(run):
  return [r for r in run.metrics if r["stage"] == "train"]


def test_the_loss_falls(whole):
  losses = [r["train/loss"] for r in of_train(whole)]
  assert losses[-1] < 0.8 * losses[0]
  for record in of_train(whole):
    assert 2 / 16 <= record["train/distinct_docs"] <= 1
    assert record["train/contexts_cut"] == 0


def test_staleness_is_that_of_rows_embedded_in_turn(whole):
  embedded_at = np.zeros(40)
  for record in of_train(whole):
    step = record["step"]
    embedded_at[np.arange(40) % 4 == step % 4] = step
    age = step - embedded_at
    assert record["train/index_staleness_steps"] == pytest.approx(age.mean())
    assert record["train/index_staleness_max_steps"] == age.max()
  assert age.max() == 3
  np.testing.assert_array_equal(
    whole.state()["index/arrays/embedded_at"][:40], embedded_at
  )


def test_a_row_is_what_the_parameters_of_its_step_embed(whole):
  experiment = whole.experiment
  state = whole.state()
  stored = state["index/arrays/embeddings"][:40].astype(np.float32)
  stored *= state["index/arrays/scales"][:40, None]
  steps = state["index/arrays/embedded_at"][:40]
  assert sorted(set(steps)) == [9, 10, 11, 12]
  for step in set(steps):
    params = nested(whole.state(4 + int(step)))
    rows = np.flatnonzero(steps == step)
    expected = experiment.embedder.rows(
      {name: params[name] for name in params if name != "generator"},
      experiment.context.passages,
      rows,
    )
    allowed = 0.51 / 127 * np.abs(expected).max(axis=1, keepdims=True)
    assert np.all(np.abs(stored[rows] - expected) <= allowed)


def nested(state):
  """Parameters as a tree, from arrays by path."""
  tree = {}
  for path, x in state.items():
    top, _, rest = path.partition("/")
    if top == "params":
      *folders, name = rest.split("/")
      at = tree
      for folder in folders:
        at = at.setdefault(folder, {})
      at[name] = x
  return tree


def test_a_run_that_was_stopped_and_resumed_is_one_that_was_not(
  tiny, whole, tiny_run
):
  config = tiny.config(**SETTINGS, train__checkpoint_steps=5)
  path = tiny.root / "in_step_stopped"
  for stop in (("warmup", 4), ("train", 1), ("train", 7), None):
    run = tiny.train(path, config, stop_at=stop)
    assert (run.stopped is None) == (stop is None)
  assert run.steps == [4, 5, 7, 9, 11, 14, 16]
  for step in run.steps:
    tiny_run.assert_bit_equal(run.state(step), whole.state(step))
  assert "index/arrays/embedded_at" in run.state(5)
  assert not any("tokens" in name for name in run.state())


def test_validation_searches_the_rows_as_they_are_then(tiny):
  seen = []
  passages = len(load_passages(str(tiny.passages)))

  def validate(params, index):
    embeddings = np.asarray(index.embeddings[:])
    found, scores = index.search(embeddings, 1)
    seen.append((embeddings, found[:, 0], scores[:, 0]))
    return {"validation/exact_match": 0.0}

  config = tiny.config(**SETTINGS)
  tiny.train(tiny.root / "in_step_seen", config, validate=validate)
  assert len(seen) == 5
  for embeddings, found, scores in seen:
    assert embeddings.shape == (passages, 16)
    products = embeddings.astype(np.float64) @ embeddings.T
    np.testing.assert_allclose(scores, products.max(axis=1), rtol=1e-6)
    np.testing.assert_allclose(
      products[np.arange(passages), found], scores, rtol=1e-6
    )
  for (before, *_), (after, *_) in itertools.pairwise(seen[1:]):
    # In the three steps in between, 30 of the 40 were embedded again.
    assert np.sum(np.any(before != after, axis=1)) == 30


def test_what_a_run_leaves_is_an_index_of_its_last_parameters(whole):
  assert whole.results["test/index_recall_at_5"] == 1.0
  assert (whole.path / "index" / "manifest.json").exists()
  assert not (whole.path / "indexes").exists()
