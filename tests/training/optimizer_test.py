"""Learning rates against a loop, and what does not move."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rag_jax.config import OptimizerConfig
from rag_jax.training import optimizer as optimizer_lib


def make_params():
  rng = np.random.default_rng(0)

  def array(*shape):
    return rng.normal(size=shape).astype(np.float32) + 3.0

  attention = {
    "query": {"kernel": array(4, 2, 2), "bias": array(2, 2)},
    "relative_bias": array(8, 2),
  }
  return {
    "question_encoder": {"token_embedding": {"embedding": array(5, 4)}},
    "log_score_scale": np.float32(0.5),
    "generator": {
      "encoder": {"layer_0": {"self_attention": attention}},
      "encoder_norm": {"scale": array(4), "bias": array(4)},
      "final_logits_bias": array(5),
    },
  }


MATRICES = {
  "question_encoder/token_embedding/embedding",
  "generator/encoder/layer_0/self_attention/query/kernel",
}


def flat(tree):
  return {
    "/".join(key.key for key in path): np.asarray(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def moves(config, grads=None, freeze=(), num_updates=1):
  """Returns by path how the first updates, of equal gradient, change params."""
  params = make_params()
  grads = jax.tree.map(np.ones_like, params) if grads is None else grads
  optimizer = optimizer_lib.make_optimizer(config, params, 10, freeze)

  @jax.jit
  def run(params, grads):
    state = optimizer.init(params)
    for _ in range(num_updates):
      updates, state = optimizer.update(grads, state, params)
      params = optax.apply_updates(params, updates)
    return params

  before, after = flat(params), flat(run(params, grads))
  return {path: after[path] - before[path] for path in before}


def constant(**fields):
  """A config whose learning rate is at its peak from the start."""
  return OptimizerConfig(schedule="constant", warmup_steps=0, **fields)


def sgd(lr=0.1, **fields):
  """A config with which AdamW moves by -lr * gradient."""
  return constant(
    **({"peak_lr": lr * 1e6, "retriever_lr": lr * 1e6} | fields),
    b1=0.0,
    b2=0.0,
    eps=1e6,
  )


def learning_rates(num_steps, peak=2.0, **fields):
  """Returns the learning rate of steps 0 to `num_steps`, that one included."""
  schedule = optimizer_lib.schedule(OptimizerConfig(**fields), peak, num_steps)
  return np.asarray(jax.jit(jax.vmap(schedule))(jnp.arange(num_steps + 1)))


def lr_by_hand(step, num_steps, warmup, kind, end_ratio):
  if step < warmup:
    return 2.0 * (step + 1) / (warmup + 1)
  progress = (step - warmup) / (num_steps - warmup)
  if kind == "constant":
    return 2.0
  if kind == "linear":
    return 2.0 * (1 - progress * (1 - end_ratio))
  cosine = 0.5 * (1 + np.cos(np.pi * progress))
  return 2.0 * (end_ratio + (1 - end_ratio) * cosine)


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 4])
def test_the_learning_rate_rises_to_its_peak_and_decays_to_its_end(
  kind, warmup
):
  rates = learning_rates(
    12, schedule=kind, warmup_steps=warmup, end_lr_ratio=0.25
  )
  expected = [lr_by_hand(s, 12, warmup, kind, 0.25) for s in range(13)]
  np.testing.assert_allclose(rates, expected, rtol=1e-5)
  assert rates[0] > 0.0  # the first step moves
  np.testing.assert_allclose(rates[warmup], rates.max())
  np.testing.assert_allclose(rates[warmup], 2.0, rtol=1e-6)
  end = 2.0 if kind == "constant" else 0.5
  np.testing.assert_allclose(rates[12], end, rtol=1e-5)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_the_last_step_still_moves_when_the_end_is_zero(kind):
  rates = learning_rates(8, schedule=kind, warmup_steps=2, end_lr_ratio=0.0)
  assert rates[7] > 0.0
  np.testing.assert_allclose(rates[8], 0.0, atol=1e-7)


@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_a_run_shorter_than_its_warmup_peaks_at_its_last_step(num_steps):
  rates = learning_rates(num_steps, schedule="linear", warmup_steps=500)
  expected = 2.0 * np.arange(1, num_steps + 1) / num_steps
  np.testing.assert_allclose(rates[:-1], expected, rtol=1e-6)


def test_retriever_and_generator_have_their_own_learning_rates():
  for path, move in moves(sgd(peak_lr=1e5, retriever_lr=3e5)).items():
    expected = -0.1 if path.startswith("generator/") else -0.3
    np.testing.assert_allclose(move, expected, rtol=1e-4, err_msg=path)


def test_the_weights_of_both_scores_have_a_learning_rate_of_their_own():
  params = {"hybrid": {"log_bm25": jnp.float32(1.0)}} | {
    name: jnp.float32(1.0) for name in ("question_encoder", "generator")
  }
  config = constant(peak_lr=0.1, retriever_lr=0.2, hybrid_lr=0.4)

  def update(freeze):
    optimizer = optimizer_lib.make_optimizer(config, params, 10, freeze)
    state = jax.jit(optimizer.init)(params)
    return flat(jax.jit(optimizer.update)(params, state, params)[0])

  moved = update(())
  np.testing.assert_allclose(moved["hybrid/log_bm25"], -0.4, rtol=1e-5)
  np.testing.assert_allclose(moved["question_encoder"], -0.2, rtol=1e-5)
  assert update(("hybrid",))["hybrid/log_bm25"] == 0


def test_updates_are_those_of_adamw():
  config = constant(
    peak_lr=0.1, retriever_lr=0.2, b1=0.8, b2=0.9, eps=0.1, weight_decay=0.3
  )
  grads = jax.tree.map(lambda x: 0.5 * x, make_params())
  result = moves(config, grads, num_updates=2)
  for path, start in flat(make_params()).items():
    lr = 0.1 if path.startswith("generator/") else 0.2
    decay = 0.3 if path in MATRICES else 0.0
    grad, x, mean, square = 0.5 * start, start.copy(), 0.0, 0.0
    for step in (1, 2):
      mean = 0.8 * mean + 0.2 * grad
      square = 0.9 * square + 0.1 * grad**2
      root = np.sqrt(square / (1 - 0.9**step))
      x = x - lr * (mean / (1 - 0.8**step) / (root + 0.1) + decay * x)
    np.testing.assert_allclose(
      result[path], x - start, rtol=1e-4, atol=1e-6, err_msg=path
    )


def test_weight_decay_falls_on_matrices_alone():
  """Biases of attention have two dimensions and are still no matrices."""
  config = constant(peak_lr=0.1, retriever_lr=0.1, weight_decay=0.5)
  still = jax.tree.map(np.zeros_like, make_params())
  before = flat(make_params())
  decayed = set()
  for path, move in moves(config, still).items():
    if np.any(move):
      decayed.add(path)
      np.testing.assert_allclose(move, -0.05 * before[path], rtol=1e-4)
  assert decayed == MATRICES


FROZEN = [
  ("question_encoder",),
  ("generator/encoder",),
  ("generator/encoder/",),
  ("generator/final_logits_bias", "log_score_scale"),
  ("generator", "question_encoder", "log_score_scale"),
  (),
]


@pytest.mark.parametrize("freeze", FROZEN, ids=str)
def test_frozen_parameters_stay_bit_for_bit_and_the_others_move(freeze):
  config = constant(peak_lr=0.1, retriever_lr=0.1, weight_decay=0.5)
  prefixes = [f.rstrip("/") for f in freeze]
  for path, move in moves(config, freeze=freeze, num_updates=2).items():
    below = any(path == f or path.startswith(f + "/") for f in prefixes)
    assert np.all(move == 0.0) if below else np.all(move != 0.0), path


def test_frozen_parameters_have_no_moments():
  params = make_params()
  freeze = ("question_encoder", "generator/encoder")
  optimizer = optimizer_lib.make_optimizer(
    OptimizerConfig(), params, 10, freeze
  )
  state = jax.eval_shape(optimizer.init, params)
  frozen = {x.shape for x in jax.tree.leaves(params["question_encoder"])}
  frozen |= {x.shape for x in jax.tree.leaves(params["generator"]["encoder"])}
  assert not frozen & {x.shape for x in jax.tree.leaves(state)}


@pytest.mark.parametrize(
  "prefix", ["generator/enc", "decoder", "query", "generator/encoder/layer_1"]
)
def test_freezing_what_is_not_there_says_what_is(prefix):
  with pytest.raises(
    ValueError,
    match=re.escape(
      f"optimizer.freeze names {prefix!r}, but no parameter has that path."
      " Top-level names are ['generator', 'log_score_scale',"
      " 'question_encoder']; a full path looks like"
      " 'question_encoder/token_embedding/embedding'."
    ),
  ):
    optimizer_lib.make_optimizer(
      OptimizerConfig(), make_params(), 10, ("generator", prefix)
    )


def test_a_parameter_is_the_generators_the_retrievers_or_frozen():
  labels = optimizer_lib.parameter_labels(
    make_params(), ("generator/encoder_norm",)
  )
  assert jax.tree.leaves(labels["question_encoder"]) == ["retriever"]
  assert labels["log_score_scale"] == "retriever"
  generator = labels["generator"]
  assert set(jax.tree.leaves(generator["encoder"])) == {"generator"}
  assert set(jax.tree.leaves(generator["encoder_norm"])) == {"frozen"}
  assert generator["final_logits_bias"] == "generator"


def global_norm(arrays):
  return np.sqrt(sum(np.sum(np.square(a)) for a in arrays))


@pytest.mark.parametrize("freeze", [(), ("question_encoder",)], ids=str)
def test_the_gradient_is_clipped_by_the_norm_of_all_that_trains(freeze):
  before = flat(make_params())
  result = moves(sgd(lr=1.0, clip_norm=0.7), make_params(), freeze)
  trains = {
    path: grad
    for path, grad in before.items()
    if not path.startswith(tuple(freeze) or "-")
  }
  norm = global_norm(trains.values())
  assert norm > 7.0
  for path, grad in trains.items():
    np.testing.assert_allclose(
      result[path], -grad * 0.7 / norm, rtol=1e-2, atol=1e-5, err_msg=path
    )
  np.testing.assert_allclose(global_norm(result.values()), 0.7, rtol=1e-4)


@pytest.mark.parametrize("clip_norm", [0.0, 1e3])
def test_a_gradient_below_the_bound_and_one_without_are_not_clipped(clip_norm):
  before = flat(make_params())
  result = moves(sgd(lr=0.01, clip_norm=clip_norm), make_params())
  for path, grad in before.items():
    np.testing.assert_allclose(result[path], -0.01 * grad, rtol=1e-3)


def test_shapes_of_parameters_are_enough_to_make_the_optimizer():
  params = make_params()
  shapes = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, params))
  states = [
    jax.eval_shape(
      optimizer_lib.make_optimizer(OptimizerConfig(), tree, 10).init, params
    )
    for tree in (params, shapes)
  ]
  assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])


def test_adafactor_keeps_a_mean_per_row_and_column_of_a_matrix():
  params = {"generator": {"kernel": np.ones((256, 192), np.float32)}}
  optimizer = optimizer_lib.make_optimizer(
    constant(kind="adafactor"), params, 10
  )
  state = jax.eval_shape(optimizer.init, params)
  sizes = [x.size for x in jax.tree.leaves(state)]
  assert sum(sizes) < 256 + 192 + 10


def test_an_update_of_adafactor_is_about_the_learning_rate():
  rng = np.random.default_rng(1)
  params = make_params()
  grads = jax.tree.map(
    lambda x: rng.normal(size=np.shape(x)).astype(np.float32), params
  )
  config = constant(kind="adafactor", peak_lr=0.1, retriever_lr=0.01)
  for path, move in moves(config, grads, ("log_score_scale",)).items():
    lr = 0.1 if path.startswith("generator") else 0.01
    expected = 0 if path == "log_score_scale" else lr
    size = np.sqrt(np.mean(move**2))
    np.testing.assert_allclose(size, expected, rtol=0.05, err_msg=path)


def test_adafactor_decays_matrices_as_adamw_does():
  grads = jax.tree.map(np.zeros_like, make_params())
  decay = {"peak_lr": 0.1, "retriever_lr": 0.1, "weight_decay": 0.5}
  adamw = moves(constant(**decay), grads)
  adafactor = moves(constant(kind="adafactor", **decay), grads)
  assert any(map(np.any, adamw.values()))
  for path, move in adamw.items():
    np.testing.assert_allclose(adafactor[path], move, rtol=1e-6, err_msg=path)


def test_the_first_moment_may_be_of_bfloat16():
  params = make_params()
  configs = constant(), constant(momentum_dtype="bfloat16")
  sizes = []
  for config in configs:
    optimizer = optimizer_lib.make_optimizer(config, params, 10)
    state = jax.eval_shape(optimizer.init, params)
    moments = [x for x in jax.tree.leaves(state) if x.dtype != jnp.int32]
    sizes.append(sum(x.size * x.dtype.itemsize for x in moments))
  number = sum(np.size(x) for x in jax.tree.leaves(params))
  assert sizes == [8 * number, 6 * number]
  one, other = (moves(config, num_updates=3) for config in configs)
  for path, move in one.items():
    np.testing.assert_allclose(other[path], move, rtol=1e-2, err_msg=path)
