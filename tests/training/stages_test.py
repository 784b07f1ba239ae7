"""What each stage of a run minimises, on which batches, and what it moves."""

import dataclasses

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rag_jax.data.experiment import example_batch
from rag_jax.data.experiment import open_experiment
from rag_jax.losses import marginal_sequence_nll
from rag_jax.losses import marginal_token_nll
from rag_jax.losses_hf import hf_rag_sequence_nll
from rag_jax.models.rag import RagLogProbs
from rag_jax.models.rag import RagModel
from rag_jax.retrieval.exact import ExactIndex
from rag_jax.training.stages import TRAIN
from rag_jax.training.stages import WARMUP
from rag_jax.training.stages import make_stages
from rag_jax.training.stages import special_ids
from rag_jax.training.stages import stage_optimizer


class FixedModel(RagModel):
  """Says the same of every batch."""

  @staticmethod
  def out():
    """Returns what it says."""
    rng = np.random.default_rng(0)
    log_probs = jnp.asarray(-rng.random(size=(1, 2, 8)), jnp.float32)
    return RagLogProbs(
      jnp.asarray(rng.normal(size=(1, 2)), jnp.float32), log_probs, log_probs
    )

  def apply(self, variables, *args, **kwargs):
    """Returns what it always says."""
    return self.out()


def stages_of(tiny, **changes):
  experiment, _, _ = tiny.open(tiny.config(**changes))
  return experiment, make_stages(experiment, tiny.split("train"))


@pytest.fixture(scope="module")
def index():
  """An index of 40 passages that no encoder made."""
  rng = np.random.default_rng(0)
  return ExactIndex(
    rng.normal(size=(40, 16)).astype(np.float32),
    encoder_fingerprint="1a2b",
    passages_fingerprint="3c4d",
  )


@pytest.fixture(scope="module")
def params(tiny):
  experiment, _, _ = tiny.open(tiny.config())
  boxed = jax.eval_shape(experiment.init, jax.random.key(0))
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), jnp.float32), boxed
  )


def retriever(params):
  return {k: v for k, v in params.items() if k != "generator"}


def test_the_warm_up_comes_first_and_steps_of_the_run_go_on(tiny):
  _, (warmup, train) = stages_of(tiny, warmup__batch_size=4)
  assert (warmup.name, warmup.num_steps, warmup.first_step) == (WARMUP, 4, 0)
  assert (train.name, train.num_steps, train.first_step) == (TRAIN, 12, 4)
  assert (warmup.batch_size, train.batch_size) == (4, 8)


def test_a_warm_up_of_no_steps_is_left_out(tiny):
  _, (train,) = stages_of(tiny, warmup__num_steps=0)
  assert (train.name, train.first_step) == (TRAIN, 0)


def test_batches_of_the_warm_up_need_no_index(tiny):
  _, (warmup, _) = stages_of(tiny)
  first = warmup.prepare(0, None, None, None)
  assert first.doc_ids.shape == (0, 0)  # nothing that a checkpoint must keep
  assert first.batch.context_tokens.shape == (8, 1, 40)
  again = warmup.prepare(0, None, None, None)
  jax.tree.map(np.testing.assert_array_equal, first.batch, again.batch)
  other = warmup.prepare(1, None, None, None)
  assert np.any(first.batch.target_tokens != other.batch.target_tokens)


def test_batches_of_the_main_stage_are_what_was_retrieved(tiny, params, index):
  _, (_, train) = stages_of(tiny)
  found = train.prepare(3, retriever(params), index)
  assert found.doc_ids.shape == (8, 2)
  # What a checkpoint keeps gives the same batch without a search.
  again = train.prepare(3, retriever(params), index, found.doc_ids)
  jax.tree.map(np.testing.assert_array_equal, found.batch, again.batch)
  assert found.batch.doc_embeddings is None
  assert found.batch.doc_tokens.shape == (8, 2, 24)


def test_frozen_passages_come_with_their_embeddings(tiny, params, index):
  _, (_, train) = stages_of(
    tiny, encoder__tied=False, encoder__train_passage_encoder=False
  )
  found = train.prepare(3, retriever(params), index)
  assert found.batch.doc_tokens is None
  np.testing.assert_array_equal(
    found.batch.doc_embeddings, index.embeddings[found.doc_ids]
  )


@pytest.mark.parametrize(
  ("name", "nll_fn"),
  [
    ("rag_token", marginal_token_nll),
    ("rag_sequence", marginal_sequence_nll),
  ],
)
def test_the_config_chooses_the_marginal_likelihood(name, nll_fn, tiny):
  experiment, _, _ = tiny.open(tiny.config(loss=name))
  given = experiment.model
  model = FixedModel(given.question_encoder, None, given.generator)
  experiment = dataclasses.replace(experiment, model=model)
  batch = jax.tree.map(jnp.asarray, example_batch(experiment.config))
  loss_fn = make_stages(experiment, tiny.split("train"))[-1].loss_fn
  loss, metrics = loss_fn({}, batch, jax.random.key(0))
  out = FixedModel.out()
  nll = nll_fn(out.doc_scores, out.log_probs, batch.target_mask)
  np.testing.assert_allclose(loss, nll[0] / 8, rtol=1e-6)  # nats a token
  assert metrics["train/loss"] == loss


def test_the_loss_of_hugging_face_is_a_choice(tiny):
  config = tiny.config(loss="rag_sequence", hf_loss=True, label_smoothing=0.1)
  experiment, _, _ = tiny.open(config)
  batch = jax.tree.map(jnp.asarray, example_batch(experiment.config))
  params = nn.meta.unbox(experiment.init(jax.random.key(0)))
  loss_fn = make_stages(experiment, tiny.split("train"))[-1].loss_fn
  loss, _ = jax.jit(loss_fn)(params, batch, jax.random.key(0))
  out = jax.jit(experiment.model.apply)({"params": params}, batch)
  nll = hf_rag_sequence_nll(
    out.doc_scores,
    out.target_logits,
    batch.target_tokens,
    batch.target_mask,
    label_smoothing=0.1,
  )
  np.testing.assert_allclose(loss, nll[0] / 8, rtol=1e-5)


def test_a_batch_of_more_questions_than_there_are_is_refused(tiny):
  with pytest.raises(
    ValueError,
    match=r"train\.batch_size=41 is larger than the training split"
    r" \(40 questions\); lower it or bring more questions",
  ):
    stages_of(tiny, train__batch_size=41)


def test_a_warm_up_batch_of_more_passages_than_there_are_is_refused(tiny):
  with pytest.raises(
    ValueError,
    match=r"warmup\.batch_size=41 is more than there are passages \(40\)",
  ):
    stages_of(tiny, warmup__batch_size=41)


# The optimizer, on parameters that are easy to check.

ONES = {
  name: {"kernel": jnp.ones((2, 2))}
  for name in ("generator", "question_encoder", "passage_encoder")
}


def first_update(config, stage):
  """How far each part moves where every gradient is 1."""
  optimizer = stage_optimizer(config, stage, ONES)
  updates, _ = optimizer.update(ONES, optimizer.init(ONES), ONES)
  return {k: -float(v["kernel"][0, 0]) for k, v in updates.items()}


def test_each_stage_has_its_own_learning_rates(tiny):
  config = tiny.config(
    optimizer__weight_decay=0.0,
    optimizer__peak_lr=0.3,
    optimizer__retriever_lr=0.6,
    optimizer__warmup_steps=2,
    warmup__peak_lr=0.04,
    warmup__retriever_lr=0.08,
    warmup__warmup_steps=3,
  )
  # Adam's first step is the learning rate, here one step up the rise.
  expected = {
    TRAIN: {"generator": 0.1, "question_encoder": 0.2, "passage_encoder": 0.2},
    WARMUP: {
      "generator": 0.01,
      "question_encoder": 0.02,
      "passage_encoder": 0.02,
    },
  }
  for stage, moves in expected.items():
    assert first_update(config, stage) == pytest.approx(moves, rel=1e-4)


@pytest.mark.parametrize("stage", [WARMUP, TRAIN])
def test_what_the_config_freezes_stays_in_both_stages(tiny, stage):
  moves = first_update(tiny.config(optimizer__freeze=("generator",)), stage)
  assert moves["generator"] == 0
  assert moves["question_encoder"] > 0


@pytest.mark.parametrize(
  ("stage", "path", "stays"),
  # In the warm-up passages have no embeddings yet that they could keep, unless
  # their index was built before.
  [(WARMUP, "", False), (WARMUP, "index", True), (TRAIN, "", True)],
)
def test_passages_keep_the_embeddings_of_their_index(tiny, stage, path, stays):
  config = tiny.config(
    encoder__tied=False,
    encoder__train_passage_encoder=False,
    index__path=path,
  )
  moves = first_update(config, stage)
  assert (moves["passage_encoder"] == 0) == stays
  assert moves["question_encoder"] > 0


def test_a_prefix_that_names_no_parameter_is_refused(tiny):
  config = tiny.config(optimizer__freeze=("generatr",))
  with pytest.raises(
    ValueError, match=r"optimizer\.freeze names 'generatr', but no parameter"
  ):
    stage_optimizer(config, TRAIN, ONES)


@pytest.mark.parametrize("exclude", [True, False])
def test_hf_loss_leaves_the_begin_token_out_if_it_shall(tiny, exclude):
  experiment, stages = stages_of(
    tiny, hf_loss=True, loss="rag_sequence", exclude_bos_score=exclude
  )
  nll_fn = stages[-1].loss_fn.keywords["nll_fn"]
  rng = np.random.default_rng(0)
  bos = experiment.tokenizer.bos_id
  tokens = jnp.asarray([[bos, 7, 2], [bos, 8, 9]], jnp.int32)
  arrays = (
    jnp.asarray(rng.normal(size=(2, 2)), jnp.float32),
    jnp.asarray(rng.normal(size=(2, 2, 3, 12)), jnp.float32),
    tokens,
    jnp.ones((2, 3), bool),
  )
  got = nll_fn(*arrays, 0.1)
  for other in (True, False):
    expected = hf_rag_sequence_nll(
      *arrays, 0.1, excluded_bos=bos if other else None
    )
    assert np.allclose(got, expected) == (other == exclude)


def test_what_stands_before_every_answer_is_not_rewarded(tiny):
  experiment = open_experiment(tiny.config())
  context = experiment.context
  plain = special_ids(context)
  tokenizer = context.tokenizer
  assert {tokenizer.eos_id, tokenizer.pad_id} <= set(plain.ignored_ids)
  first = tokenizer.encode(["a"])[0][0]
  assert first not in plain.ignored_ids
  context._target_start = (first,)  # as of a checkpoint that begins targets
  assert first in special_ids(context).ignored_ids
  assert special_ids(context).end_ids == plain.end_ids
