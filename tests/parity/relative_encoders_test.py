"""Encoders with relative positions, MPNet and T5's, against PyTorch.

Rows are longer than the distances that have a bucket each, and than the largest
distance that has one. The tensors are those of weights_encoders_test.py.
"""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from transformers.models.mpnet.modeling_mpnet import MPNetEncoder

from rag_jax.config_models import EncoderConfig
from rag_jax.models.attention import relative_bucket
from rag_jax.models.encoders import RetrieverEncoder
from rag_jax.models.layers import LayerLoop
from rag_jax.weights.config_values import SpecialIds
from rag_jax.weights.export import TokenizerFiles
from rag_jax.weights.export import export_encoder
from rag_jax.weights.load import checkpoint_kind
from rag_jax.weights.load import load_encoder

pytestmark = pytest.mark.parity

V, LONGEST = 51, 150
LENGTHS = (LONGEST, 140, 60, 17, 1)
CLASSES = {
  "mpnet": (
    transformers.MPNetModel,
    transformers.MPNetConfig(
      vocab_size=V, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
      intermediate_size=24, max_position_embeddings=LONGEST + 2,
    ),
  ),
  "t5_encoder": (
    transformers.T5EncoderModel,
    transformers.T5Config(
      vocab_size=V, d_model=16, d_kv=6, num_layers=3, num_heads=2, d_ff=24,
    ),
  ),
  "gated": (
    transformers.T5EncoderModel,
    transformers.T5Config(
      vocab_size=V, d_model=16, d_kv=8, num_layers=2, num_heads=4, d_ff=24,
      feed_forward_proj="gated-silu", relative_attention_num_buckets=16,
      relative_attention_max_distance=40,
    ),
  ),
}  # fmt: skip
KINDS = pytest.mark.parametrize("kind", list(CLASSES))
LOOPS = {
  "unrolled": LayerLoop(),
  "scanned": LayerLoop(scan=True, remat="dots", attention_rows=2),
  "computed_again": LayerLoop(remat="full"),
}


@functools.cache
def reference(kind):
  model_class, config = CLASSES[kind]
  model = model_class(config).eval()
  generator = torch.Generator().manual_seed(1)
  with torch.no_grad():
    for name, x in model.named_parameters():
      x.normal_(0.0, 0.3, generator=generator)
      if name.lower().endswith(("layernorm.weight", "layer_norm.weight")):
        x += 1
      if "relative_attention_bias" in name:
        x *= 5  # or it would hardly matter
  return model


@functools.cache
def inputs(pad):
  mask = np.arange(LONGEST) < np.array(LENGTHS)[:, None]
  tokens = np.random.default_rng(0).integers(3, V, size=mask.shape)
  return np.where(mask, tokens, pad), mask


def states(model):
  """Returns PyTorch's, [N, L, D]."""
  # transformers takes the padding token out of some configs that it saves.
  tokens, mask = map(torch.tensor, inputs(model.config.pad_token_id or 0))
  return model(tokens, attention_mask=mask.long()).last_hidden_state


def mean(x, mask):
  real = torch.tensor(mask)[:, :, None]
  return (real * x).sum(1) / real.sum(1)


def embedder(loaded, loop=LOOPS["unrolled"], **changes):
  """Returns the function of parameters, tokens and mask."""
  fields = EncoderConfig(**loaded.fields | changes)
  module = RetrieverEncoder(fields, dtype=jnp.float32, loop=loop)
  return lambda params, *args: module.apply({"params": params}, *args)


def our_inputs(loaded):
  tokens, mask = inputs(loaded.special_ids.pad)
  return jnp.asarray(tokens, jnp.int32), jnp.asarray(mask)


@pytest.fixture
def saved(kind, tmp_path):
  reference(kind).save_pretrained(tmp_path / "theirs")
  return tmp_path / "theirs"


@KINDS
@pytest.mark.parametrize("loop", LOOPS)
def test_long_rows_and_their_gradients_are_those_of_pytorch(kind, saved, loop):
  """The loss is a fixed mixture of the pooled states."""
  loaded = load_encoder(saved)
  args = our_inputs(loaded)
  embed = embedder(loaded, LOOPS[loop], pooling="mean")
  model = reference(kind)
  model.zero_grad()
  expected = mean(states(model), np.asarray(args[1]))
  mixture = np.random.default_rng(1).normal(size=expected.shape)
  mixture = mixture.astype(np.float32)
  (expected * torch.tensor(mixture)).sum().backward()

  @jax.jit
  def run(params):
    embeddings = embed(params, *args)
    return jnp.sum(embeddings * mixture), embeddings

  grads, embeddings = jax.grad(run, has_aux=True)(loaded.params)
  theirs = expected.detach().numpy()
  assert np.std(theirs) > 0.1
  np.testing.assert_allclose(embeddings, theirs, rtol=1e-5, atol=1e-5)
  gradients = {
    name: x.grad.numpy()
    for name, x in model.named_parameters()
    if "relative_attention_bias" in name
  }
  ((_, wanted),) = gradients.items()
  # Every bucket that a row of this length has: far ones too, on both sides.
  assert np.count_nonzero(np.abs(wanted).max(1) > 1e-6) >= len(wanted) - 1
  np.testing.assert_allclose(
    grads["relative_bias"], wanted, rtol=1e-3, atol=1e-4
  )


@KINDS
def test_an_export_computes_the_same_in_pytorch(kind, saved, tmp_path):
  loaded = load_encoder(saved)
  fields = EncoderConfig(**loaded.fields)
  path = tmp_path / "ours"
  export_encoder(
    path,
    fields,
    loaded.params,
    kind=loaded.kind,
    tokenizer=TokenizerFiles(ids=loaded.special_ids),
  )
  assert checkpoint_kind(path) == loaded.kind == fields.family
  model, info = CLASSES[kind][0].from_pretrained(path, output_loading_info=True)
  assert not any(info.values()), info
  with torch.no_grad():
    torch.testing.assert_close(
      states(model.eval()), states(reference(kind)), rtol=1e-5, atol=1e-5
    )


def test_the_buckets_of_mpnet_are_those_of_t5():
  offsets = np.arange(-300, 301)
  theirs = MPNetEncoder.relative_position_bucket(torch.tensor(offsets))
  np.testing.assert_array_equal(
    relative_bucket(jnp.asarray(offsets), 32), theirs.numpy()
  )


@pytest.mark.parametrize("kind", ["gated"])
def test_a_gtr_directory_in_and_out(kind, saved, tmp_path):
  """As published: Transformer, mean, a dense layer without bias, Normalize."""
  torch.manual_seed(0)
  layer = torch.nn.Linear(16, 12, bias=False)
  names = ("0_Transformer", "1_Pooling", "2_Dense", "3_Normalize")
  path = tmp_path / "gtr"
  path.mkdir()
  saved.rename(path / names[0])
  for name in names[1:]:
    (path / name).mkdir()
  modules = [
    {
      "idx": i,
      "path": name,
      "type": f"sentence_transformers.models.{name[2:]}",
    }
    for i, name in enumerate(names)
  ]
  (path / "modules.json").write_text(json.dumps(modules))
  (path / "1_Pooling/config.json").write_text(
    json.dumps({
      "word_embedding_dimension": 16, "pooling_mode_cls_token": False,
      "pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": False,
    })
  )  # fmt: skip
  (path / "2_Dense/config.json").write_text(
    json.dumps({
      "in_features": 16, "out_features": 12, "bias": False,
      "activation_function": "torch.nn.modules.linear.Identity",
    })
  )  # fmt: skip
  weight = layer.weight.detach().numpy()
  safetensors.numpy.save_file(
    {"linear.weight": weight}, path / "2_Dense/model.safetensors"
  )
  loaded = load_encoder(path)
  assert loaded.kind == checkpoint_kind(path) == "sentence_transformers"
  args = our_inputs(loaded)
  with torch.no_grad():
    pooled = mean(states(reference(kind)), np.asarray(args[1]))
    expected = torch.nn.functional.normalize(layer(pooled), dim=1)

  def embeddings(loaded):
    return jax.jit(embedder(loaded))(loaded.params, *args)

  np.testing.assert_allclose(embeddings(loaded), expected, rtol=1e-5, atol=1e-5)
  ours = tmp_path / "ours"
  export_encoder(
    ours,
    EncoderConfig(**loaded.fields),
    loaded.params,
    kind="sentence_transformers",
  )
  again = load_encoder(ours)
  assert (again.fields, again.max_tokens) == (loaded.fields, 0)
  np.testing.assert_array_equal(embeddings(again), embeddings(loaded))
  model, info = transformers.T5EncoderModel.from_pretrained(
    ours, output_loading_info=True
  )
  assert not any(info.values()), info
  with torch.no_grad():
    assert torch.equal(states(model.eval()), states(reference(kind)))


def test_the_encoder_of_a_whole_t5_is_read(tmp_path):
  config = dataclasses.replace(CLASSES["t5_encoder"][1], num_decoder_layers=1)
  torch.manual_seed(0)
  model = transformers.T5ForConditionalGeneration(config).eval()
  model.save_pretrained(tmp_path)
  assert checkpoint_kind(tmp_path) == "t5"  # which is a generator
  loaded = load_encoder(tmp_path)
  why = {why for _, why in loaded.report.ignored}
  assert "an encoder does without the decoder" in why
  assert not [n for n in loaded.report.notes if "does not know" in n]
  args = our_inputs(loaded)
  with torch.no_grad():
    expected = mean(states(model.get_encoder()), np.asarray(args[1]))
  got = jax.jit(embedder(loaded))(loaded.params, *args)
  np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_what_is_written_has_the_ids_of_its_tokenizer(tmp_path):
  """Positions of MPNet begin after padding, whose id is a constant there."""
  loaded = EncoderConfig(
    family="mpnet", vocab_size=V, max_positions=9, position_offset=2,
    num_layers=1, embed_dim=8, num_heads=2, mlp_dim=8, relative_buckets=32,
    pooling="cls",
  )  # fmt: skip
  with pytest.raises(ValueError, match=r"padding token's id, 0, but encoder"):
    export_encoder(
      tmp_path / "out",
      loaded,
      {},
      kind="mpnet",
      tokenizer=TokenizerFiles(ids=SpecialIds(pad=0)),
    )
