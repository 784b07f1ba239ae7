"""Training is the same however the devices are arranged.

Run as a program, this file trains a small model on eight simulated devices
and prints what it saw as JSON; the tests compare. Eight devices must be asked
for before JAX starts, so it is a process of its own.
"""

import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from processes import run_on_eight_devices
import pytest

from rag_jax import losses
from rag_jax.config import Config
from rag_jax.config import MeshConfig
from rag_jax.config import OptimizerConfig
from rag_jax.config_models import EncoderConfig
from rag_jax.config_models import GeneratorConfig
from rag_jax.models import partitioning
from rag_jax.models.batch import ContrastiveBatch
from rag_jax.models.batch import RagBatch
from rag_jax.models.rag import build_model
from rag_jax.training import step
from rag_jax.training.contrastive import contrastive_loss
from rag_jax.training.objectives import marginal_loss
from rag_jax.training.optimizer import make_optimizer
from rag_jax.training.state import init_params
from rag_jax.training.state import make_state
from rag_jax.training.step import compile_update

ONE = "1x1x1"  # data x fsdp x tensor
MESHES = [ONE, "8x1x1", "2x4x1", "2x2x2", "1x1x8"]
# Without dropout; then also with layers in a loop, recomputation, attention in
# parts, and gradients in two parts.
STEADY, LOOPED = "1x1x1 steady", "2x2x1 looped"
# The retriever learns from answers that are written in the step.
REWARDED = {
  kind: [f"{ONE} {kind}", f"2x2x2 {kind}"]
  for kind in ("reward", "reward_sampled")
}
OTHERS = pytest.mark.parametrize("mesh", MESHES[1:])
STEPS = 3

B, K, C, T, Q, L, D, F = 8, 2, 6, 4, 3, 4, 16, 32
V, ENCODER_V = 21, 24  # only one is a multiple of `tensor`


def make_model(kind):
  config = Config()
  if kind == "looped":
    config.train.scan_layers, config.train.remat = True, "attention"
    config.train.attention_rows = 1
  config.encoder = EncoderConfig(
    embed_dim=D,
    num_heads=8,
    mlp_dim=F,
    projection_dim=D,
    dropout=0.0 if kind else 0.3,
  )
  config.generator = GeneratorConfig(
    num_layers=2,
    embed_dim=D,
    num_heads=8,
    mlp_dim=F,
    max_positions=8,
    relative_buckets=8,
  )
  return build_model(
    config,
    vocab_size=V,
    retriever_vocab_size=ENCODER_V,
    decoder_start_id=2,
  )


def make_batch():
  rng = np.random.default_rng(0)

  def tokens(*shape):
    return rng.integers(V, size=shape, dtype=np.int32)

  return RagBatch(
    context_tokens=tokens(B, K, C),
    context_mask=np.arange(C) < rng.integers(2, C + 1, size=(B, K, 1)),
    target_tokens=tokens(B, T),
    target_mask=np.arange(T) < rng.integers(1, T + 1, size=(B, 1)),
    question_tokens=tokens(B, Q),
    question_mask=np.ones((B, Q), bool),
    doc_tokens=tokens(B, K, L),
    doc_mask=np.ones((B, K, L), bool),
    accepted_tokens=tokens(B, 6, T),
  )


def contrast(mesh):
  """In-batch contrast: its negatives lie on other devices."""
  rng = np.random.default_rng(1)
  questions, passages = rng.normal(size=(2, B, D)).astype(np.float32)
  split = partitioning.batch_sharding(mesh)
  nll_fn = jax.jit(
    losses.in_batch_contrastive_nll,
    in_shardings=(split, split),
    out_shardings=partitioning.replicated(mesh),
  )
  return np.asarray(nll_fn(questions, passages)).tolist()


def contrastive(mesh, chunk):
  """The loss of the contrastive stage and its gradient, with dropout."""
  rng = np.random.default_rng(2)
  model, rows, num = make_model(""), 4 * B, 2

  def tokens(*shape):
    return rng.integers(V, size=shape, dtype=np.int32), np.ones(shape, bool)

  batch = ContrastiveBatch(
    *tokens(rows, Q), *tokens(rows, num, L),
    rng.random((rows, rows * num)) < 0.8,
  )  # fmt: skip
  arrays = jax.tree.map(jnp.asarray, make_batch())
  params, layout = init_params(
    lambda key: model.init(key, arrays)["params"], jax.random.key(0), mesh
  )
  loss_fn = functools.partial(contrastive_loss, model=model, chunk=chunk)

  def on_mesh(params, batch, key):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return jax.value_and_grad(loss_fn, has_aux=True)(params, batch, key)

  (_, metrics), grads = jax.jit(
    on_mesh,
    in_shardings=(
      layout,
      partitioning.batch_sharding(mesh),
      partitioning.replicated(mesh),
    ),
  )(params, batch, jax.random.key(1))
  return {
    "metrics": {name: float(x) for name, x in metrics.items()},
    "grads": flat(grads),
  }


def train(name):
  """Returns what happens on the mesh called `name`, as JSON can hold it."""
  shape, _, kind = name.partition(" ")
  data, fsdp, tensor = map(int, shape.split("x"))
  mesh = partitioning.make_mesh(
    MeshConfig(data=data, fsdp=fsdp, tensor=tensor),
    jax.devices()[: data * fsdp * tensor],
  )
  model, batch = make_model(kind), make_batch()
  arrays = jax.tree.map(jnp.asarray, batch)
  params, layout = init_params(
    lambda key: model.init(key, arrays)["params"], jax.random.key(0), mesh
  )
  born = flat(params)
  # Fresh kernels are so small that hardly any gradient passes them.
  params["generator"] = jax.tree.map(
    lambda x: 5 * x if x.ndim > 1 else x, params["generator"]
  )
  # Where the gradient is zero but for rounding, as that of the biases of keys
  # is, Adam would divide noise by noise: its eps stands above the noise.
  config = OptimizerConfig(
    peak_lr=0.03,
    retriever_lr=0.03,
    schedule="constant",
    warmup_steps=0,
    eps=1e-2,
    clip_norm=1.0,
  )
  optimizer = make_optimizer(config, params, STEPS)
  state, state_layout = make_state(params, layout, optimizer, mesh)
  before = flat(state.params)
  shards = {
    path: [list(x.shape), list(x.addressable_shards[0].data.shape)]
    for path, x in leaves({"params": params, "opt_state": state.opt_state})
  }
  update = compile_update(
    functools.partial(
      marginal_loss,
      model=model,
      nll_fn=losses.marginal_token_nll,
      retriever=losses.RetrieverLoss(kind=kind, end_ids=(2,), ignored_ids=(2,))
      if kind in REWARDED
      else None,
      constant_scores=kind in REWARDED,
    ),
    optimizer,
    state_layout,
    mesh,
    "train",
    functools.partial(step.update, accumulate=2 if kind == "looped" else 1),
  )
  history = []
  for _ in range(STEPS):
    state, metrics = update(state, batch, jax.random.key(1))
    history.append({k: float(v) for k, v in metrics.items()})
  return {
    "born": born,
    "before": before,
    "metrics": history,
    "shards": shards,
    "trained": flat(state.params),
    "contrast": contrast(mesh),
    "contrastive": {c: contrastive(mesh, c) for c in (() if kind else (0, 16))},
  }


def leaves(tree):
  for path, x in jax.tree_util.tree_leaves_with_path(tree):
    yield "/".join(str(getattr(k, "key", k)) for k in path), x


def flat(params):
  return {path: np.asarray(x).tolist() for path, x in leaves(params)}


@pytest.fixture(scope="module")
def results():
  return json.loads(run_on_eight_devices(__file__))


def assert_same(one, other, *, rtol, atol):
  assert set(one) == set(other)
  for path, x in one.items():
    np.testing.assert_allclose(
      other[path], x, rtol=rtol, atol=atol, err_msg=path
    )


@OTHERS
def test_parameters_are_born_equal(mesh, results):
  assert_same(results[ONE]["born"], results[mesh]["born"], rtol=1e-6, atol=1e-8)


@OTHERS
def test_loss_and_gradient_norm_of_each_step_are_the_same(mesh, results):
  assert len(results[mesh]["metrics"]) == STEPS
  for one, other in zip(
    results[ONE]["metrics"], results[mesh]["metrics"], strict=True
  ):
    assert set(one) == {
      "train/loss", "train/doc_entropy", "train/grad_norm", "train/padding"
    }  # fmt: skip
    assert_same(one, other, rtol=1e-5, atol=0)


def test_loops_recomputation_and_parts_of_a_batch_change_nothing(results):
  one, other = results[STEADY], results[LOOPED]
  for before, after in zip(one["metrics"], other["metrics"], strict=True):
    assert_same(before, after, rtol=1e-5, atol=0)
  assert_same(one["trained"], other["trained"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", REWARDED)
def test_rewards_are_the_same(kind, results):
  one, other = (results[name] for name in REWARDED[kind])
  rewards = [metrics["train/reward"] for metrics in one["metrics"]]
  assert max(rewards) > 0.01
  for before, after in zip(one["metrics"], other["metrics"], strict=True):
    assert_same(before, after, rtol=1e-5, atol=0)
  assert_same(one["trained"], other["trained"], rtol=0, atol=1e-6)
  name = "question_encoder/token_embedding/embedding"
  assert not np.array_equal(one["trained"][name], one["before"][name])


@OTHERS
def test_updated_parameters_are_the_same(mesh, results):
  assert_same(
    results[ONE]["trained"], results[mesh]["trained"], rtol=0, atol=1e-6
  )


def test_three_updates_moved_every_matrix(results):
  one = results[ONE]
  for path, x in one["before"].items():
    if path.endswith(("kernel", "embedding")):
      move = np.max(np.abs(np.subtract(one["trained"][path], x)))
      assert move > 1e-4, path


@OTHERS
def test_contrast_sees_the_passages_of_all_devices(mesh, results):
  np.testing.assert_allclose(
    results[mesh]["contrast"], results[ONE]["contrast"], rtol=1e-5
  )


@OTHERS
@pytest.mark.parametrize("chunk", ["0", "16"])
def test_the_contrastive_stage_is_that_of_one_device(mesh, chunk, results):
  one = results[ONE]["contrastive"][chunk]
  other = results[mesh]["contrastive"][chunk]
  assert one["metrics"]["contrastive/negatives"] > 32  # those of all devices
  assert_same(one["metrics"], other["metrics"], rtol=1e-5, atol=0)
  assert_same(one["grads"], other["grads"], rtol=0, atol=1e-6)
  largest = max(np.max(np.abs(x)) for x in one["grads"].values())
  assert largest > 1e-2


@pytest.mark.parametrize("mesh", MESHES)
def test_parameters_and_moments_are_split_over_fsdp_and_tensor(mesh, results):
  _, fsdp, tensor = map(int, mesh.split("x"))
  layer = "generator/decoder/layer_0/"
  expected = {
    "generator/token_embedding/embedding": [V, D // fsdp // tensor],
    "generator/final_logits_bias": [V],
    "question_encoder/token_embedding/embedding": [
      ENCODER_V // tensor,
      D // fsdp,
    ],
    layer + "mlp/up/kernel": [D // fsdp, F // tensor],
    layer + "mlp/down/kernel": [F // tensor, D // fsdp],
    layer + "mlp/up/bias": [F],
    layer + "self_attention/query/kernel": [D // fsdp, 8 // tensor, D // 8],
    layer + "cross_attention/out/kernel": [8 // tensor, D // 8, D // fsdp],
  }
  for name, shard in expected.items():
    copies = [
      actual
      for path, (_, actual) in results[mesh]["shards"].items()
      if path.endswith(name)
    ]
    assert copies == [shard] * 3, name  # the parameter and Adam's two moments


@OTHERS
def test_a_device_holds_its_share_of_the_parameters(mesh, results):
  _, fsdp, tensor = map(int, mesh.split("x"))
  shards = results[mesh]["shards"].values()
  whole, held = (
    sum(map(np.prod, sizes)) for sizes in zip(*shards, strict=True)
  )
  assert held <= whole if fsdp * tensor == 1 else held < 0.6 * whole


if __name__ == "__main__":
  json.dump(
    {
      name: train(name)
      for names in (MESHES, [STEADY, LOOPED], *REWARDED.values())
      for name in names
    },
    sys.stdout,
  )
