"""The decoder-only generator: what must not change its logits, and its cache.

tests/parity/causal_test.py compares the logits with PyTorch's.
"""

import dataclasses
import functools
import json
import sys

from causal_models import CONFIGS
from causal_models import S
from causal_models import V
from causal_models import compiled
from causal_models import logits_of
from causal_models import model
from causal_models import random_params
from causal_models import texts
from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from processes import run_on_eight_devices
import pytest

from rag_jax.config import MeshConfig
from rag_jax.config_models import CausalConfig
from rag_jax.models import partitioning
from rag_jax.models.causal import build_causal
from rag_jax.models.rope import frequencies

KINDS = pytest.mark.parametrize("name", CONFIGS)
LENGTHS = (13, 5, 1, 9)


@functools.cache
def whole(name):
  """Returns the logits of texts that are padded after their end."""
  tokens, mask = texts(LENGTHS)
  return logits_of(*model(name), tokens, mask)


def assert_close(one, other, tolerance=2e-5):
  np.testing.assert_allclose(one, other, rtol=0, atol=tolerance)


@KINDS
def test_padding_before_a_text_changes_nothing(name):
  tokens, mask = texts(LENGTHS, left=True)
  left = logits_of(*model(name), tokens, mask)
  for row, length in enumerate(LENGTHS):
    assert_close(left[row, S - length :], whole(name)[row, :length])
  assert np.std(left) > 0.1


def start(module, steps, variables, tokens, mask):
  """Returns the cache of one prompt per question."""
  apply = functools.partial(module.apply, variables)
  memory = apply(tokens, mask, method="encode")
  memory, tokens, mask = jax.tree.map(
    lambda x: x[:, None], (memory, tokens, mask)
  )
  return apply(memory, mask, tokens, 1, steps, method="init_cache")


@KINDS
@pytest.mark.parametrize("left", [False, True])
def test_steps_with_a_cache_are_the_whole_text_at_once(name, left):
  module, params = model(name)
  tokens, _ = texts(LENGTHS)
  steps = 4
  lengths = [max(length - steps, 1) for length in LENGTHS]
  prompts = np.zeros((len(LENGTHS), max(lengths)), np.int32)
  mask = np.arange(max(lengths)) < np.array(lengths)[:, None]
  mask = mask[:, ::-1] if left else mask
  for row, length in enumerate(lengths):
    prompts[row, mask[row]] = tokens[row, :length]
  step = compiled(module, "step")
  variables = {"params": params}
  cache = jax.jit(functools.partial(start, module, steps + 1))(
    variables, prompts, mask
  )
  # At position 0, the last token of the prompt is read instead of this one.
  logits, cache = step(variables, jnp.full((len(LENGTHS), 1), V), 0, cache)
  rows = np.arange(len(LENGTHS))
  places = np.array(lengths) - 1
  seen = 0
  for i in range(steps + 1):
    for row in rows[places + i < np.array(LENGTHS)]:
      assert_close(logits[row, 0, 0], whole(name)[row, places[row] + i])
      seen += 1
    if i < steps:
      following = tokens[rows, np.minimum(places + i + 1, S - 1)]
      logits, cache = step(variables, following[:, None], i + 1, cache)
  assert seen == sum(
    min(length - start, steps + 1)
    for length, start in zip(LENGTHS, places, strict=True)
  )


@KINDS
def test_no_token_sees_a_later_one(name):
  module, params = model(name)
  tokens, mask = texts([S])
  other = tokens.copy()
  other[0, 7:] = (other[0, 7:] + 1) % V
  one, changed = (logits_of(module, params, x, mask) for x in (tokens, other))
  np.testing.assert_array_equal(one[0, :7], changed[0, :7])
  assert np.all(np.any(one[0, 7:] != changed[0, 7:], axis=-1))


def test_a_sliding_layer_sees_its_window_and_a_global_one_all():
  base = dataclasses.replace(CONFIGS["gemma2"], num_layers=1)
  tokens, mask = texts([S])
  other = tokens.copy()
  other[0, 0] = other[0, 0] % (V - 1) + 1
  for sliding, last in (((0,), 3), ((), S - 1)):
    config = dataclasses.replace(
      base, sliding_layers=sliding, sliding_window=4 if sliding else 0
    )
    module = build_causal(config, dtype=jnp.float32)
    params = random_params(config)
    one, changed = (logits_of(module, params, x, mask) for x in (tokens, other))
    differs = np.flatnonzero(np.any(one[0] != changed[0], axis=-1))
    assert differs.tolist() == list(range(last + 1))


@pytest.mark.parametrize(
  ("name", "loop"),
  [
    ("gemma3_text", {"scan": True, "remat": "full"}),
    ("llama", {"remat": "attention", "attention_rows": 1}),
  ],
)
def test_layers_in_a_loop_have_the_same_logits_and_gradients(name, loop):
  tokens, mask = map(jnp.asarray, texts(LENGTHS))
  chosen = jnp.roll(tokens, -1, axis=1)

  def value(module, params):
    logits = module.apply({"params": params}, tokens, mask)
    log_probs = jax.nn.log_softmax(logits)
    picked = jnp.take_along_axis(log_probs, chosen[..., None], axis=-1)
    return -jnp.sum(picked[..., 0] * mask)

  (module, params), (looped, _) = model(name), model(name, **loop)
  mesh = partitioning.make_mesh(MeshConfig(data=1), jax.devices()[:1])
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    expected, found = (
      jax.jit(jax.value_and_grad(functools.partial(value, m)))(params)
      for m in (module, looped)
    )
  for one, other in zip(
    jax.tree.leaves(expected), jax.tree.leaves(found), strict=True
  ):
    np.testing.assert_allclose(
      other, one, rtol=1e-4, atol=1e-4 * float(jnp.max(jnp.abs(one)))
    )


def test_padding_has_no_gradient():
  module, params = model("llama")
  tokens, mask = map(jnp.asarray, texts((5, 9)))

  def total(table):
    changed = params | {"token_embedding": {"embedding": table}}
    logits = module.apply({"params": changed}, tokens, mask)
    return jnp.sum(jnp.sin(logits) * mask[..., None])

  grad = jax.jit(jax.grad(total))(params["token_embedding"]["embedding"])
  np.testing.assert_array_equal(grad[0], 0)  # the token of padding
  assert np.any(grad[int(tokens[0, 0])])


@pytest.mark.parametrize("name", ["gemma3_text", "gpt2"])
def test_bfloat16_is_close_and_its_logits_are_float32(name):
  module, params = model(name, dtype=jnp.bfloat16)
  tokens, mask = texts(LENGTHS)
  logits = logits_of(module, params, tokens, mask)
  assert logits.dtype == np.float32
  error = np.abs(logits - whole(name))[mask]
  assert 0 < np.mean(error) < 0.05 * np.std(whole(name))


@KINDS
def test_every_dimension_of_a_matrix_has_a_name_with_a_rule(name):
  module, _ = model(name)
  tokens, mask = texts([2], width=2)
  boxed = jax.eval_shape(module.init, jax.random.key(0), tokens, mask)
  rules = dict(partitioning.AXIS_RULES)
  leaves = jax.tree_util.tree_leaves_with_path(
    boxed["params"], is_leaf=lambda x: isinstance(x, nn.meta.AxisMetadata)
  )
  for path, leaf in leaves:
    if path[-1].key in ("kernel", "embedding"):
      assert len(leaf.names) == leaf.unbox().ndim
      assert set(leaf.names) <= set(rules), path
    else:
      assert path[-1].key in ("bias", "scale"), path


def test_frequencies_fall_as_their_scaling_says():
  plain = frequencies(CONFIGS["llama"], local=False)
  assert plain[0] == 1
  assert np.all(np.diff(plain) < 0)
  scaled = dataclasses.replace(
    CONFIGS["llama"], rope_scaling="linear", rope_factor=4.0
  )
  np.testing.assert_allclose(frequencies(scaled, local=True), plain / 4)
  for scaling in ("llama3", "yarn"):  # the first stays, the last is divided
    config = dataclasses.replace(
      CONFIGS["llama"], head_dim=64, rope_scaling=scaling, rope_factor=4.0
    )
    plain = frequencies(
      dataclasses.replace(config, rope_scaling="none"), local=False
    )
    ratio = frequencies(config, local=False) / plain
    np.testing.assert_allclose(ratio[[0, -1]], [1, 0.25], rtol=1e-6)
    assert np.all(np.diff(ratio) <= 1e-6)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"num_kv_heads": 3}, "num_heads=4 must be a multiple of num_kv_heads=3"),
    ({"head_dim": 5}, "head_dim=5 must be even"),
    ({"vocab_size": 0}, "vocab_size=0 must be set"),
    ({"sliding_layers": (0,)}, "sliding_window=0 must be set if"),
    (
      {"sliding_window": 4},
      "sliding_window=4 must be set if layers slide, and",
    ),
    ({"sliding_layers": (1, 0), "sliding_window": 2}, r"\(1, 0\) must rise"),
    ({"sliding_layers": (2,), "sliding_window": 2}, "below num_layers=2"),
    ({"relative_buckets": 8}, "relative_buckets=8 must be 0"),
    ({"norm": "post"}, "norm='post' must be 'pre'"),
    ({"rope_scaling": "yarn", "rope_theta": 1.0}, "rope_theta=1.0 must be abo"),
    (
      {"rope_scaling": "llama3", "rope_low_freq_factor": 4.0},
      "rope_high_freq_factor=4.0 must be above rope_low_freq_factor=4.0",
    ),
  ],
)
def test_fields_that_do_not_fit_are_named(changes, message):
  config = dataclasses.replace(CONFIGS["llama"], **changes)
  with pytest.raises(ValueError, match=f"No decoder-only .*{message}.*Correct"):
    build_causal(config, dtype=jnp.float32)


def test_texts_longer_than_the_learned_positions_are_refused():
  module, params = model("gpt2")
  tokens, mask = map(jnp.asarray, texts([41], width=41))
  with pytest.raises(
    ValueError, match=r"Texts of 41 tokens .* 40 learned posi"
  ):
    module.apply({"params": params}, tokens, mask)
  tokens, mask = map(jnp.asarray, texts([30], width=30))
  with pytest.raises(ValueError, match="Texts of 41 tokens"):
    start(module, 12, {"params": params}, tokens, mask)
  start(module, 11, {"params": params}, tokens, mask)


# Data x fsdp x tensor. Two heads of keys and values divide by two, one does not
# by four.
MESHES = {"llama": ("1x1x1", "2x2x2"), "gemma3_text": ("1x1x1", "1x2x4")}


def on_mesh(name, shape):
  """Returns logits and a step's on a mesh, as JSON can hold them."""
  data, fsdp, tensor = map(int, shape.split("x"))
  mesh = partitioning.make_mesh(
    MeshConfig(data=data, fsdp=fsdp, tensor=tensor),
    jax.devices()[: data * fsdp * tensor],
  )
  module, params = model(name)
  tokens, mask = texts((13, 5, 1, 9, 2, 8, 7, 13))
  boxed = jax.eval_shape(module.init, jax.random.key(0), tokens, mask)
  layout = partitioning.shardings(boxed["params"], mesh)
  params = jax.device_put(params, layout)
  split = partitioning.batch_sharding(mesh)
  tokens, mask = jax.device_put((tokens, mask), split)

  def run(params, tokens, mask):
    variables = {"params": params}
    logits = module.apply(variables, tokens, mask)
    cache = start(module, 2, variables, tokens, mask)
    step = functools.partial(module.apply, variables, method="step")
    first, cache = step(tokens[:, :1], 0, cache)
    second, _ = step(jnp.argmax(first[:, :, 0], axis=-1), 1, cache)
    return jnp.where(mask[..., None], logits, 0), first, second

  with jax.set_mesh(mesh):
    found = jax.jit(run)(params, tokens, mask)
  key = params["layer_0"]["self_attention"]["key"]["kernel"]
  return {
    "logits": [np.asarray(x).tolist() for x in found],
    "key": [key.shape, key.addressable_shards[0].data.shape],
  }


@pytest.fixture(scope="module")
def meshes():
  return json.loads(run_on_eight_devices(__file__))


@pytest.mark.parametrize("name", MESHES)
def test_logits_are_the_same_on_eight_devices(meshes, name):
  one, other = (meshes[f"{name} {x}"]["logits"] for x in MESHES[name])
  for a, b in zip(one, other, strict=True):
    assert_close(np.array(b), np.array(a))


def test_keys_are_split_by_heads_or_else_within_them(meshes):
  assert meshes["llama 2x2x2"]["key"] == [[24, 2, 6], [12, 1, 6]]
  assert meshes["gemma3_text 1x2x4"]["key"] == [[24, 1, 8], [12, 1, 2]]


def test_fields_of_a_model_cannot_change():
  module, _ = model("llama")
  assert isinstance(module.config, CausalConfig)
  with pytest.raises(dataclasses.FrozenInstanceError):
    module.config.num_layers = 5


if __name__ == "__main__":
  json.dump(
    {f"{name} {shape}": on_mesh(name, shape)
     for name, shapes in MESHES.items() for shape in shapes},
    sys.stdout,
  )  # fmt: skip
