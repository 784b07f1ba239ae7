"""One update by hand, the losses by hand, and thirty updates that learn."""

import dataclasses
import functools

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rag_jax import losses
from rag_jax import losses_hf
from rag_jax.config import Config
from rag_jax.config import MeshConfig
from rag_jax.config import OptimizerConfig
from rag_jax.config_models import EncoderConfig
from rag_jax.config_models import GeneratorConfig
from rag_jax.models import partitioning
from rag_jax.models.batch import RagBatch
from rag_jax.models.length_groups import LengthGroups
from rag_jax.models.packing import Packing
from rag_jax.models.rag import build_model
from rag_jax.training import objectives
from rag_jax.training import step as step_lib
from rag_jax.training.optimizer import make_optimizer
from rag_jax.training.state import TrainState
from rag_jax.training.state import init_params
from rag_jax.training.state import make_state

B, K, C, T, Q, L, V, D = 4, 2, 6, 4, 3, 4, 17, 8


def make_model(dropout):
  config = Config()
  config.encoder = EncoderConfig(
    embed_dim=D, num_heads=2, mlp_dim=8, dropout=dropout
  )
  config.generator = GeneratorConfig(
    num_layers=1,
    embed_dim=D,
    num_heads=2,
    mlp_dim=8,
    max_positions=8,
  )
  return build_model(config, vocab_size=V, decoder_start_id=2)


def make_batch(n_docs=K):
  rng = np.random.default_rng(0)

  def tokens(*shape):
    return rng.integers(V, size=shape, dtype=np.int32)

  return RagBatch(
    context_tokens=tokens(B, n_docs, C),
    context_mask=np.ones((B, n_docs, C), bool),
    target_tokens=tokens(B, T),
    target_mask=np.arange(T) < np.array([[4], [3], [1], [2]]),
    question_tokens=tokens(B, Q),
    question_mask=np.ones((B, Q), bool),
    doc_tokens=tokens(B, n_docs, L),
    doc_mask=np.ones((B, n_docs, L), bool),
  )


def closed_book(batch):
  return batch.replace(
    question_tokens=None, question_mask=None, doc_tokens=None, doc_mask=None
  )


# Trivial pieces, for what `update` does itself.


def quadratic_loss(params, batch, dropout_key):
  """Half the squared distance, to a point that the key draws."""
  del batch
  point = jax.random.normal(dropout_key, params["x"].shape)
  loss = 0.5 * jnp.sum((params["x"] - point) ** 2)
  return loss, {"toy/loss": loss}


SGD = optax.sgd(0.25)
UPDATE = jax.jit(
  functools.partial(
    step_lib.update, loss_fn=quadratic_loss, optimizer=SGD, stage="toy"
  )
)


def toy_state(step=0):
  params = {"x": jnp.array([1.0, -2.0, 4.0])}
  return TrainState(
    step=jnp.int32(step), params=params, opt_state=SGD.init(params)
  )


def test_an_update_follows_the_gradient_and_counts_one_step():
  key = jax.random.key(5)
  state, metrics = UPDATE(toy_state(7), make_batch(), key)
  x = np.array([1.0, -2.0, 4.0])
  point = jax.random.normal(jax.random.fold_in(key, 7), (3,))
  np.testing.assert_allclose(state.params["x"], x - 0.25 * (x - point))
  assert state.step == 8
  assert set(metrics) == {"toy/loss", "toy/grad_norm", "toy/padding"}
  np.testing.assert_allclose(
    metrics["toy/grad_norm"], np.linalg.norm(x - point), rtol=1e-6
  )
  np.testing.assert_allclose(
    metrics["toy/loss"], 0.5 * np.sum((x - point) ** 2), rtol=1e-6
  )


def test_randomness_is_a_function_of_key_and_step():
  def loss(step, seed):
    _, metrics = UPDATE(toy_state(step), make_batch(), jax.random.key(seed))
    return float(metrics["toy/loss"])

  assert loss(3, 0) == loss(3, 0)  # what restoring a checkpoint relies on
  assert len({loss(0, 0), loss(1, 0), loss(2, 0), loss(0, 1)}) == 4


def test_the_model_is_traced_where_its_constraints_have_a_mesh():
  mesh = partitioning.make_mesh(MeshConfig(data=1))
  seen = []

  def spy(params, batch, dropout_key):
    seen.append(jax.sharding.get_abstract_mesh().axis_names)
    return quadratic_loss(params, batch, dropout_key)

  layout = jax.tree.map(lambda _: partitioning.replicated(mesh), toy_state())
  update = step_lib.compile_update(spy, SGD, layout, mesh, "toy")
  state, _ = update(toy_state(), make_batch(), jax.random.key(0))
  assert state.step == 1
  assert seen == [("data", "fsdp", "tensor")]


# The model, without dropout.

MODEL = make_model(dropout=0.0)


@pytest.fixture(scope="module")
def params():
  def init(key, batch):
    return nn.meta.unbox(MODEL.init(key, batch))["params"]

  shapes = jax.eval_shape(init, jax.random.key(0), make_batch())
  rng = np.random.default_rng(1)
  return jax.tree.map(
    lambda x: 0.3 * rng.normal(size=x.shape).astype(np.float32), shapes
  )


def nll_per_question(out, batch, nll_fn):
  return nll_fn(
    out.doc_scores, out.target_logits, batch.target_tokens, batch.target_mask
  )


def test_the_marginal_loss_is_nats_a_target_token(params):
  batch = make_batch()

  @jax.jit
  def run(params, batch):
    out = MODEL.apply({"params": params}, batch)
    results = {}
    for name, nll_fn in losses.NLL_FNS.items():
      nll = nll_per_question(out, batch, nll_fn)
      results[name] = (
        nll,
        objectives.marginal_loss(
          params,
          batch,
          jax.random.key(0),
          model=MODEL,
          nll_fn=losses.MARGINAL_NLL_FNS[name],
          vocab_chunk=5,
        ),
      )
    return out.doc_scores, results

  doc_scores, results = run(params, batch)
  prior = np.exp(doc_scores) / np.exp(doc_scores).sum(axis=1, keepdims=True)
  entropy = np.mean([-sum(p * np.log(p)) for p in prior])
  assert 0 < entropy < np.log(K)
  for nll, (loss, metrics) in results.values():
    np.testing.assert_allclose(loss, np.sum(nll) / 10, rtol=1e-5)
    assert set(metrics) == {"train/loss", "train/doc_entropy"}
    np.testing.assert_allclose(metrics["train/loss"], loss)
    np.testing.assert_allclose(metrics["train/doc_entropy"], entropy, rtol=1e-4)


def test_the_warm_up_adds_infilling_and_contrast(params):
  batch = make_batch(n_docs=1)

  def cloze(params, batch, weight):
    return objectives.cloze_loss(
      params,
      batch,
      jax.random.key(0),
      model=MODEL,
      contrastive_weight=weight,
    )

  @jax.jit
  def run(params, batch):
    variables = {"params": params}
    out = MODEL.apply(variables, closed_book(batch))
    infilling = nll_per_question(out, batch, losses.rag_token_nll)
    contrast = losses.in_batch_contrastive_nll(
      MODEL.apply(
        variables,
        batch.question_tokens,
        batch.question_mask,
        method="embed_questions",
      ),
      MODEL.apply(
        variables,
        batch.doc_tokens[:, 0],
        batch.doc_mask[:, 0],
        method="embed_passages",
      ),
    )
    loss, metrics = cloze(params, batch, 0.5)
    grads = {
      weight: jax.grad(cloze, has_aux=True)(params, batch, weight)[0]
      for weight in (0.0, 0.5)
    }
    return loss, metrics, jnp.sum(infilling) / 10, jnp.mean(contrast), grads

  loss, metrics, infilling, contrast, grads = run(params, batch)
  assert set(metrics) == {"warmup/loss", "warmup/contrastive_loss"}
  np.testing.assert_allclose(metrics["warmup/loss"], infilling, rtol=1e-5)
  np.testing.assert_allclose(
    metrics["warmup/contrastive_loss"], contrast, rtol=1e-5
  )
  np.testing.assert_allclose(loss, infilling + 0.5 * contrast, rtol=1e-5)
  # The contrast is all that moves the retriever, and does not move the rest.
  assert np.any(grads[0.5]["question_encoder"]["token_embedding"]["embedding"])
  assert not any(map(np.any, jax.tree.leaves(grads[0.0]["question_encoder"])))
  for weight in (0.0, 0.5):
    assert np.any(grads[weight]["generator"]["token_embedding"]["embedding"])
  jax.tree.map(
    np.testing.assert_allclose,
    grads[0.0]["generator"],
    grads[0.5]["generator"],
  )


@pytest.mark.parametrize("hf", [False, True])
def test_the_parts_of_a_batch_add_up_to_the_whole(params, hf):
  """Gradients and metrics, though the parts have 7 and 3 target tokens."""
  if hf:
    nll_fn = losses_hf.HF_NLL_FNS["rag_sequence"]
    loss_fn = functools.partial(objectives.hf_loss, model=MODEL, nll_fn=nll_fn)
  else:
    loss_fn = functools.partial(
      objectives.marginal_loss, model=MODEL, nll_fn=losses.marginal_token_nll
    )

  @functools.partial(jax.jit, static_argnames="accumulate")
  def moved(params, batch, accumulate):
    state = TrainState(
      step=jnp.int32(0), params=params, opt_state=SGD.init(params)
    )
    state, metrics = step_lib.update(
      state,
      batch,
      jax.random.key(0),
      loss_fn=loss_fn,
      optimizer=SGD,
      stage="train",
      accumulate=accumulate,
    )
    return state.params, metrics

  whole, metrics = moved(params, make_batch(), 1)
  for num_parts in (2, 4):
    parts, summed = moved(params, make_batch(), num_parts)
    jax.tree.map(
      functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6),
      parts,
      whole,
    )
    assert set(summed) == set(metrics)
    for name, value in metrics.items():
      np.testing.assert_allclose(summed[name], value, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
  ("lengths", "accumulate", "ungrouped"),
  [
    ([[6, 2], [3, 3], [1, 4], [2, 3]], 1, 0.0),
    ([[6, 6], [6, 6], [1, 4], [2, 3]], 1, 1.0),
    ([[6, 2], [3, 3], [6, 6], [6, 3]], 2, 0.5),
  ],
)
def test_groups_of_lengths_and_packed_rows_change_nothing(
  params, lengths, accumulate, ungrouped, packed
):
  """Whether the contexts of a batch, or of its parts, fit them or not."""
  mask = np.arange(C) < np.array(lengths)[..., None]
  batch = dataclasses.replace(make_batch(), context_mask=mask)
  half = LengthGroups((2, 1, 1), (3, 4, 6)), Packing(3, 6)
  whole = LengthGroups((4, 2, 2), (3, 4, 6)), Packing(5, 6)
  layout = (half if accumulate == 2 else whole)[packed]

  @functools.partial(jax.jit, static_argnames="layout")
  def moved(params, batch, layout):
    return step_lib.update(
      TrainState(jnp.int32(0), params, SGD.init(params)),
      batch,
      jax.random.key(0),
      loss_fn=functools.partial(
        objectives.marginal_loss, model=MODEL, nll_fn=losses.marginal_token_nll
      ),
      optimizer=SGD,
      stage="train",
      accumulate=accumulate,
      context_layout=layout,
    )

  alone, expected = moved(params, batch, None)
  state, metrics = moved(params, batch, layout)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6),
    state.params,
    alone.params,
  )
  assert metrics.pop("train/ungrouped") == ungrouped
  # Tokens: of contexts, targets, questions, and passages.
  saved = (1 - ungrouped) * (B * K * C - accumulate * layout.num_tokens)
  size = B * (K * C + T + Q + K * L)
  real = (1 - expected["train/padding"]) * size
  expected["train/padding"] = 1 - real / (size - saved)
  for name, value in expected.items():
    np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)


def test_every_part_of_a_batch_has_its_own_dropout(params):
  model = make_model(dropout=0.5)
  keys = []

  def spy(params, batch, key):
    data = jax.random.key_data(key)
    jax.debug.callback(lambda data: keys.append(data.tolist()), data)
    return objectives.marginal_loss(
      params, batch, key, model=model, nll_fn=losses.marginal_token_nll
    )

  state = TrainState(
    step=jnp.int32(0), params=params, opt_state=SGD.init(params)
  )
  run = functools.partial(
    step_lib.update, loss_fn=spy, optimizer=SGD, stage="train", accumulate=4
  )
  jax.block_until_ready(jax.jit(run)(state, make_batch(), jax.random.key(0)))
  jax.effects_barrier()
  assert len({tuple(key) for key in keys}) == 4


@pytest.mark.parametrize(
  ("loss_fn", "name"),
  [
    (
      functools.partial(
        objectives.marginal_loss,
        model=MODEL,
        nll_fn=losses.marginal_token_nll,
      ),
      "train/loss",
    ),
    (
      functools.partial(
        objectives.cloze_loss, model=MODEL, contrastive_weight=1.0
      ),
      "warmup/loss",
    ),
  ],
)
def test_closed_book_has_no_retriever_to_report_on(loss_fn, name, params):
  loss, metrics = jax.eval_shape(
    loss_fn,
    {"generator": params["generator"]},
    closed_book(make_batch(n_docs=1)),
    jax.random.key(0),
  )
  assert loss.shape == ()
  assert set(metrics) == {name}


# The model with dropout, trained.


class Training:
  """A compiled update of the whole model on one batch."""

  def __init__(self):
    model, self.batch = make_model(dropout=0.1), make_batch()
    self._mesh = partitioning.make_mesh(MeshConfig(data=1))
    self._params, self._layout = init_params(
      lambda key: model.init(key, self._arrays())["params"],
      jax.random.key(0),
      self._mesh,
    )
    config = OptimizerConfig(
      peak_lr=0.02, retriever_lr=0.02, schedule="constant", warmup_steps=0
    )
    self._optimizer = make_optimizer(config, self._params, 30)
    _, layout = self._new()
    self._update = step_lib.compile_update(
      functools.partial(
        objectives.marginal_loss,
        model=model,
        nll_fn=losses.marginal_token_nll,
      ),
      self._optimizer,
      layout,
      self._mesh,
      "train",
    )

  def _arrays(self):
    return jax.tree.map(jnp.asarray, self.batch)

  def _new(self):
    # Copies, because the state is donated to the update.
    params = jax.tree.map(jnp.copy, self._params)
    return make_state(params, self._layout, self._optimizer, self._mesh)

  def run(self, num_steps, seed=1, first_step=0):
    """Returns the state after `num_steps`, and the metrics of each."""
    state = self._new()[0].replace(step=jnp.int32(first_step))
    history = []
    for _ in range(num_steps):
      state, metrics = self._update(state, self.batch, jax.random.key(seed))
      history.append({k: float(v) for k, v in metrics.items()})
    return state, history


@pytest.fixture(scope="module")
def training():
  # The program runs 40 times and is large: compiling it is what takes long.
  jax.config.update("jax_disable_most_optimizations", True)
  yield Training()
  jax.config.update("jax_disable_most_optimizations", False)


def test_thirty_updates_learn_one_batch(training):
  state, metrics = training.run(30)
  assert state.step == 30
  loss = [m["train/loss"] for m in metrics]
  assert loss[0] > 0.9 * np.log(V)
  assert np.mean(loss[-5:]) < 0.5 * loss[0]
  assert np.mean(loss[10:20]) < np.mean(loss[:10])


def test_training_twice_gives_the_same_bits(training):
  (one, metrics_one), (two, metrics_two) = training.run(3), training.run(3)
  assert metrics_one == metrics_two
  jax.tree.map(np.testing.assert_array_equal, one, two)


def test_dropout_differs_between_steps_and_comes_back_with_the_step(training):
  def entropy(seed, step):
    _, metrics = training.run(1, seed=seed, first_step=step)
    return metrics[0]["train/doc_entropy"]

  assert entropy(1, 4) == entropy(1, 4)
  # The same parameters and batch: what differs is what the towers dropped.
  assert len({entropy(seed, step) for seed in (1, 2) for step in (0, 4)}) == 4
