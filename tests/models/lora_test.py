"""Adapters: what they compute, which kernels have one, and how they end."""

import functools

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rag_jax.config import Config
from rag_jax.config_models import CausalConfig
from rag_jax.config_models import LoraConfig
from rag_jax.config_rules import validate
from rag_jax.data.experiment import example_batch
from rag_jax.data.experiment import init_model
from rag_jax.models import lora
from rag_jax.models.layers import LayerLoop
from rag_jax.models.rag import build_model

V = 50
EVERYWHERE = (
  "generator/attention", "generator/mlp", "encoder/attention", "encoder/mlp"
)  # fmt: skip


def small_config(kind="encoder_decoder", **changes):
  config = Config()
  config.lora = LoraConfig(rank=2, alpha=3.0, targets=EVERYWHERE)
  config.train.compute_dtype = "float32"
  config.data.n_docs = 3
  config.data.context_length = config.data.passage_length = 12
  config.data.question_length = config.data.target_length = 8
  e, g = config.encoder, config.generator
  e.num_layers, e.embed_dim, e.mlp_dim, e.num_heads = 2, 16, 24, 2
  e.max_positions, e.tied = 32, False
  g.kind, g.num_layers, g.embed_dim, g.mlp_dim = kind, 2, 16, 24
  g.num_heads, g.gated, g.max_positions = 2, True, 32
  if kind == "causal":
    config.causal = CausalConfig(
      num_layers=2, embed_dim=16, mlp_dim=24, num_heads=4, num_kv_heads=2
    )
  for name, value in changes.items():
    section, _, field = name.rpartition("__")
    setattr(getattr(config, section) if section else config, field, value)
  return config


def make(config, loop=None):
  sizes = {"vocab_size": V, "retriever_vocab_size": V, "decoder_start_id": 2}
  model = build_model(config, **sizes)
  if loop:
    model = model.clone(generator=model.generator.clone(loop=loop))
  params = nn.meta.unbox(init_model(config, model, jax.random.key(0)))
  return model, params


def noisy(params):
  """Returns parameters whose adapters and kernels are all random."""
  rng = np.random.default_rng(0)

  def fill(path, x):
    if path[-1].key == lora.SCALE:
      return x
    return jnp.asarray(rng.normal(0, 0.3, x.shape), jnp.float32)

  return jax.tree_util.tree_map_with_path(fill, params)


def batch_of(config):
  rng = np.random.default_rng(1)
  return jax.tree.map(
    lambda x: (
      jnp.asarray(rng.integers(3, V, x.shape), jnp.int32)
      if x.dtype == np.int32
      else jnp.asarray(x)
    ),
    example_batch(config),
  )


KINDS = pytest.mark.parametrize("kind", ["encoder_decoder", "causal"])


def test_a_layer_computes_what_a_loop_does():
  rng = np.random.default_rng(0)

  def normal(*shape):
    return rng.normal(size=shape).astype(np.float32)

  x, kernel, bias = normal(2, 5, 3, 4), normal(3, 4, 6), normal(6)
  down, up = normal(3, 4, 2), normal(2, 6)
  layer = lora.DenseGeneral(6, axis=(-2, -1), dtype=jnp.float32)
  params = {"kernel": kernel, "bias": bias}
  adapter = {"lora_a": down, "lora_b": up, "lora_scale": np.float32(1.5)}
  expected = np.zeros((2, 5, 6))
  for b in range(2):
    for t in range(5):
      row = x[b, t].reshape(-1)
      expected[b, t] = row @ kernel.reshape(12, 6) + bias
      expected[b, t] += 1.5 * (row @ down.reshape(12, 2)) @ up
  found = layer.apply({"params": params | adapter}, x)
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
  # As Flax alone, to the bit, where there is no adapter.
  plain = nn.DenseGeneral(6, axis=(-2, -1), dtype=jnp.float32)
  np.testing.assert_array_equal(
    layer.apply({"params": params}, x), plain.apply({"params": params}, x)
  )


@KINDS
@pytest.mark.parametrize(
  "loop", [None, LayerLoop(scan=True, remat="dots")], ids=["layers", "scan"]
)
def test_merging_changes_no_score_and_no_logit(kind, loop):
  config = small_config(kind)
  model, params = make(config, loop)
  params, batch = noisy(params), batch_of(config)
  merged = lora.merged(params)
  assert not any(map(lora.is_adapter, lora.by_path(merged)))
  base = lora.without_adapters(params)
  found, expected, without = (
    model.apply({"params": p}, batch) for p in (params, merged, base)
  )
  for name in ("doc_scores", "target_logits"):
    one, other, plain = (getattr(x, name) for x in (found, expected, without))
    largest = np.abs(other).max()
    np.testing.assert_allclose(one, other, atol=2e-5 * largest)
    assert np.abs(plain - other).max() > 1e-2 * largest


@KINDS
def test_a_model_starts_unchanged(kind):
  config = small_config(kind)
  model, params = make(config)
  batch = batch_of(config)
  plain = small_config(kind)
  plain.lora = LoraConfig()
  _, fresh = make(plain)
  found = model.apply({"params": params}, batch)
  expected = model.apply({"params": fresh}, batch)
  jax.tree.map(np.testing.assert_array_equal, found, expected)
  jax.tree.map(np.testing.assert_array_equal, lora.merged(params), fresh)


@KINDS
def test_the_gradient_is_that_of_the_merged_kernel(kind):
  config = small_config(kind)
  model, params = make(config)
  params, batch = noisy(params), batch_of(config)
  params = jax.tree.map(lambda x: 0.3 * x, params)

  def loss(params, through):
    out = model.apply({"params": through(params)}, batch)
    return jnp.mean(out.doc_scores**2) + jnp.mean(out.target_logits**2)

  one = lora.by_path(
    jax.grad(functools.partial(loss, through=lambda p: p))(params)
  )
  other = lora.by_path(
    jax.grad(functools.partial(loss, through=lora.merged))(params)
  )
  for path in filter(lora.trains_in_adapter, one):
    largest = np.abs(other[path]).max()
    assert largest > 0, path
    np.testing.assert_allclose(
      one[path], other[path], atol=2e-4 * largest, err_msg=path
    )


@pytest.mark.parametrize(
  ("targets", "kernels"),
  [
    (("generator/query",), 6),  # 2 encoder, 2 decoder, 2 cross layers
    (("generator/attention", "generator/query"), 24),
    (("generator/mlp",), 12),
    (("encoder/mlp", "generator/gate"), 12),  # two towers without a gate
    (EVERYWHERE, 60),
  ],
)
def test_targets_name_kernels(targets, kernels):
  config = small_config(lora=LoraConfig(rank=1, targets=targets))
  _, params = make(config)
  paths = [p for p in lora.by_path(params) if p.endswith(lora.DOWN)]
  assert len(paths) == kernels
  parts = {path.split("/")[0] for path in paths}
  named = {target.split("/")[0] for target in targets}
  assert ("generator" in parts) == ("generator" in named)
  assert ("passage_encoder" in parts) == ("encoder" in named)


def test_a_tower_that_does_not_train_gets_no_adapter():
  config = small_config(encoder__train_passage_encoder=False)
  _, params = make(config)
  parts = lora.adapted_parts(lora.by_path(params))
  assert parts == {"generator", "question_encoder"}


def test_sizes_are_split_like_the_kernels():
  config = small_config()
  model = build_model(
    config, vocab_size=V, retriever_vocab_size=V, decoder_start_id=2
  )
  params = init_model(config, model, jax.random.key(0))
  layer = params["generator"]["decoder"]["layer_0"]["self_attention"]
  assert layer["query"][lora.DOWN].names == ("embed", "rank")
  assert layer["query"][lora.UP].names == ("rank", "heads", "head_dim")
  assert layer["out"][lora.DOWN].names == ("heads", "head_dim", "rank")
  assert layer["out"][lora.UP].names == ("rank", "embed")
  np.testing.assert_allclose(nn.meta.unbox(layer["out"][lora.SCALE]), 1.5)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (
      {"targets": ("generator/gate",)},
      "lora.targets names 'generator/gate', but no kernel .* Expected some of"
      " encoder/down, .*generator/value",
    ),
    ({"rank": 16}, "lora.rank=16 is not below 16, the smaller size of"),
  ],
)
def test_what_matches_nothing_is_refused(changes, message):
  settings = {"rank": 2, "targets": ("generator/attention",)} | changes
  config = small_config(generator__gated=False, lora=LoraConfig(**settings))
  with pytest.raises(ValueError, match=message):
    make(config)


@pytest.mark.parametrize(
  ("lora_settings", "changes", "message"),
  [
    ({"targets": ("generator/qeury",)}, {},
     "lora.targets='generator/qeury' is not one of .* 'generator/query'"),
    ({"targets": ("attention",)}, {}, "lora.targets='attention' is not one of"),
    ({"targets": ()}, {}, "lora.targets=.. names no kernels. Name some"),
    ({"alpha": 0.0}, {}, "lora.alpha=0.0 must be above 0"),
    ({"rank": -1}, {}, "lora.rank=-1 must be at least 0"),
    ({}, {"encoder__num_layers": 0}, "encoder.num_layers=0 has none"),
    ({}, {"retriever_loss": "none"}, "loss='none' with data.n_docs=3 trains"),
    ({}, {"data__n_docs": 0}, "with data.n_docs=0 trains no retriever"),
  ],
)  # fmt: skip
def test_settings_that_nothing_can_be_done_with(
  lora_settings, changes, message
):
  config = small_config(**changes)
  config.lora = LoraConfig(
    **{"rank": 2, "targets": ("encoder/query",)} | lora_settings
  )
  with pytest.raises(ValueError, match=message):
    validate(config)
  config.lora.rank = 0
  if "alpha" not in lora_settings:
    validate(config)
