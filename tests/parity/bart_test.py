"""The generator against PyTorch's BART, with the same weights.

The reference: transformers' `BartForConditionalGeneration`, tiny and random.
"""

import functools

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from rag_jax.config_models import GeneratorConfig
from rag_jax.losses import token_log_probs
from rag_jax.models.generator import Generator

pytestmark = pytest.mark.parity

LAYERS, D, N, F, V, POSITIONS = 2, 32, 4, 64, 101, 16
BOS, PAD, EOS = 0, 1, 2  # BART's ids; decoding starts with EOS
CONTEXT_LENGTHS = (9, 1, 5, 8)  # real tokens a row
C = max(CONTEXT_LENGTHS)
# As many rows, of which one is full and the others ragged.
TARGET_LENGTHS = {1: (1, 1, 1, 1), 2: (2, 1, 2, 1), 3: (3, 1, 2, 3)}
TARGET_LENGTHS[7] = (7, 1, 4, 6)

SCALES = pytest.mark.parametrize("scale", [False, True], ids=["plain", "scale"])
LENGTHS = pytest.mark.parametrize("length", list(TARGET_LENGTHS))


def randomize(model):
  """Gives every parameter a value that is neither 0 nor 1."""
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for name, x in model.named_parameters():
      x.normal_(0.0, 0.2, generator=generator)
      if "layer_norm" in name or "layernorm" in name:
        x += name.endswith("weight")
    model.final_logits_bias.normal_(0.0, 1.0, generator=generator)


def dense(tensors, name, *shape):
  """Returns kernel and bias; PyTorch stores kernels [out, in]."""
  kernel = tensors[name + ".weight"].T
  return {
    "kernel": kernel.reshape(*shape) if shape else kernel,
    "bias": tensors[name + ".bias"],
  }


def norm(tensors, name):
  return {"scale": tensors[name + ".weight"], "bias": tensors[name + ".bias"]}


def attention(tensors, name):
  heads = (N, D // N)
  params = {
    ours: dense(tensors, f"{name}.{theirs}", D, *heads)
    for ours, theirs in (
      ("query", "q_proj"),
      ("key", "k_proj"),
      ("value", "v_proj"),
    )
  }
  for part in params.values():
    part["bias"] = part["bias"].reshape(heads)
  return params | {"out": dense(tensors, name + ".out_proj", *heads, D)}


def layer(tensors, name, cross):
  params = {
    "self_attention": attention(tensors, name + ".self_attn"),
    "self_attention_norm": norm(tensors, name + ".self_attn_layer_norm"),
    "mlp": {
      "up": dense(tensors, name + ".fc1"),
      "down": dense(tensors, name + ".fc2"),
    },
    "mlp_norm": norm(tensors, name + ".final_layer_norm"),
  }
  if cross:
    params["cross_attention"] = attention(tensors, name + ".encoder_attn")
    params["cross_attention_norm"] = norm(
      tensors, name + ".encoder_attn_layer_norm"
    )
  return params


def stack(tensors, name, cross):
  return {
    "position_embedding": {
      "embedding": tensors[name + ".embed_positions.weight"]
    },
    "embedding_norm": norm(tensors, name + ".layernorm_embedding"),
  } | {
    f"layer_{i}": layer(tensors, f"{name}.layers.{i}", cross)
    for i in range(LAYERS)
  }


def to_params(tensors):
  """Returns the generator's tree of BART's tensors, or of their gradients."""
  return {
    "token_embedding": {"embedding": tensors["model.shared.weight"]},
    "encoder": stack(tensors, "model.encoder", cross=False),
    "decoder": stack(tensors, "model.decoder", cross=True),
    "final_logits_bias": tensors["final_logits_bias"][0],
  }


class Bart:
  """The same network twice."""

  def __init__(self, scale):
    config = transformers.BartConfig(
      vocab_size=V,
      d_model=D,
      encoder_layers=LAYERS,
      decoder_layers=LAYERS,
      encoder_attention_heads=N,
      decoder_attention_heads=N,
      encoder_ffn_dim=F,
      decoder_ffn_dim=F,
      max_position_embeddings=POSITIONS,
      activation_function="gelu",
      scale_embedding=scale,
      dropout=0.0,
      attention_dropout=0.0,
      activation_dropout=0.0,
      pad_token_id=PAD,
      bos_token_id=BOS,
      eos_token_id=EOS,
      decoder_start_token_id=EOS,
      forced_eos_token_id=None,
    )
    self.torch = transformers.BartForConditionalGeneration(config).eval()
    randomize(self.torch)
    # A buffer, which BART keeps at zero: here it differs, and has a gradient.
    self.torch.final_logits_bias.requires_grad_(True)
    config = GeneratorConfig(
      vocab_size=V,
      num_layers=LAYERS,
      embed_dim=D,
      num_heads=N,
      mlp_dim=F,
      max_positions=POSITIONS,
      decoder_start_id=EOS,
      scale_embedding=scale,
    )
    self.generator = Generator(config, dtype=jnp.float32)
    self.params = to_params(self._numpy(lambda x: x.detach()))

  def _tensors(self):
    named = dict(self.torch.named_parameters())
    return named | {"final_logits_bias": self.torch.final_logits_bias}

  def _numpy(self, part):
    return {k: part(x).numpy().copy() for k, x in self._tensors().items()}

  def torch_logits(self, context, mask, target):
    """Returns PyTorch's logits [N, T, V], with a graph behind them."""
    # What BART calls decoder_input_ids is our target_tokens shifted right
    # behind the start token: ours shifts inside, BART only does for `labels`.
    start = np.full((len(target), 1), EOS)
    inputs = np.concatenate([start, target[:, :-1]], axis=1)
    return self.torch(
      input_ids=torch.tensor(context),
      attention_mask=torch.tensor(mask).long(),
      decoder_input_ids=torch.tensor(inputs),
      use_cache=False,
    ).logits

  def torch_gradients(self, nll):
    """Returns the gradient of a scalar, in the tree of our parameters."""
    self.torch.zero_grad()
    self.torch.final_logits_bias.grad = None
    nll.backward()
    return to_params(self._numpy(lambda x: x.grad))


@functools.cache
def bart(scale):
  return Bart(scale)


@pytest.fixture
def model(scale):
  return bart(scale)


def ragged(rng, lengths):
  """Returns tokens and their mask; the rest of each row is padding."""
  mask = np.arange(max(lengths)) < np.array(lengths)[:, None]
  tokens = rng.integers(EOS + 1, V, size=mask.shape)
  return np.where(mask, tokens, PAD), mask


def inputs(length):
  """Returns context, context mask, target and target mask."""
  rng = np.random.default_rng(length)
  return *ragged(rng, CONTEXT_LENGTHS), *ragged(rng, TARGET_LENGTHS[length])


def ids(tokens):
  return jnp.asarray(tokens, jnp.int32)


def test_the_mapping_fills_the_whole_tree():
  generator = bart(False).generator
  tokens = jnp.zeros((1, 2), jnp.int32)
  shapes = jax.eval_shape(
    generator.init, jax.random.key(0), tokens, tokens == 0, tokens
  )
  assert jax.tree.map(np.shape, bart(False).params) == jax.tree.map(
    np.shape, nn.meta.unbox(shapes)["params"]
  )


@SCALES
@LENGTHS
def test_logits_are_those_of_bart(model, length):
  context, mask, target, _ = inputs(length)
  expected = model.torch_logits(context, mask, target).detach().numpy()
  logits = jax.jit(model.generator.apply)(
    {"params": model.params}, ids(context), jnp.asarray(mask), ids(target)
  )
  assert np.std(expected) > 0.5  # or closeness would mean little
  np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)


@SCALES
def test_one_token_at_a_time_gives_the_logits_of_bart(model):
  """The first steps are those of shorter targets: they have seen no more."""
  context, mask, target, _ = inputs(7)
  expected = model.torch_logits(context, mask, target).detach().numpy()
  variables = {"params": model.params}
  memory = jax.jit(functools.partial(model.generator.apply, method="encode"))(
    variables, ids(context), jnp.asarray(mask)
  )
  init_cache = functools.partial(
    model.generator.apply, method="init_cache", num_beams=1, num_steps=8
  )
  cache = jax.jit(init_cache)(
    variables,
    memory[:, None],
    jnp.asarray(mask)[:, None],
    ids(context)[:, None],
  )
  step = jax.jit(functools.partial(model.generator.apply, method="step"))
  tokens = np.full((len(target), 1), EOS)
  for t in range(7):
    logits, cache = step(variables, ids(tokens), jnp.asarray(t), cache)
    np.testing.assert_allclose(
      logits[:, 0, 0], expected[:, t], rtol=1e-5, atol=1e-5
    )
    tokens = target[:, t : t + 1]


@SCALES
def test_gradients_are_those_of_bart(model):
  """Of the summed negative log-likelihood, for every parameter."""
  context, mask, target, target_mask = inputs(7)
  nll = torch.nn.functional.cross_entropy(
    model.torch_logits(context, mask, target).flatten(0, 1),
    torch.tensor(target).flatten(),
    ignore_index=PAD,
    reduction="sum",
  )
  expected = model.torch_gradients(nll)

  def loss(params):
    logits = model.generator.apply(
      {"params": params}, ids(context), jnp.asarray(mask), ids(target)
    )
    log_probs = token_log_probs(logits[:, None], ids(target))[:, 0]
    return -jnp.sum(log_probs, where=target_mask)

  value, grads = jax.jit(jax.value_and_grad(loss))(model.params)
  np.testing.assert_allclose(value, nll.item(), rtol=1e-5)
  shared = expected["token_embedding"]["embedding"]
  kernel = expected["decoder"]["layer_0"]["self_attention"]["query"]["kernel"]
  for gradient in (shared, kernel):
    assert np.abs(gradient).max() > 0.1

  # Relative to the largest of each parameter. The absolute tolerance is for
  # biases of keys alone: softmax does not see them, their gradient is noise.
  def compare(path, ours, theirs):
    np.testing.assert_allclose(
      ours,
      theirs,
      rtol=0,
      atol=1e-4 * np.abs(theirs).max() + 1e-5,
      err_msg=jax.tree_util.keystr(path),
    )

  jax.tree_util.tree_map_with_path(compare, grads, expected)
