"""Dropout stands where it stands in PyTorch, with the rates of the checkpoint.

Both sides multiply by 1 - rate in place of dropping: what then comes out is
equal only if every dropout has its place and its rate.
"""

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from rag_jax.config_models import EncoderConfig
from rag_jax.config_models import GeneratorConfig
from rag_jax.models.rag import build_encoder
from rag_jax.models.rag import build_generator
from rag_jax.weights.load import load_encoder
from rag_jax.weights.load import load_generator

pytestmark = pytest.mark.parity

V, D = 41, 16
_BART = {
  "vocab_size": V,
  "d_model": D,
  "encoder_layers": 2,
  "decoder_layers": 1,
  "encoder_attention_heads": 2,
  "decoder_attention_heads": 4,
  "encoder_ffn_dim": 24,
  "decoder_ffn_dim": 20,
  "max_position_embeddings": 16,
  "dropout": 0.1,
  "attention_dropout": 0.3,
  "activation_dropout": 0.45,
}
_T5 = {
  "vocab_size": V,
  "d_model": D,
  "d_kv": 8,
  "d_ff": 24,
  "num_layers": 2,
  "num_heads": 2,
  "dropout_rate": 0.2,
  "decoder_start_token_id": 0,
}
GENERATORS = {
  "Bart": _BART,
  "MBart": _BART | {"decoder_start_token_id": 2},
  "Pegasus": _BART,
  "T5": _T5,
  "MT5": _T5 | {"feed_forward_proj": "gated-gelu"},
}


@pytest.fixture
def scaled_dropout(monkeypatch):
  """Multiplies by 1 - rate where something would be dropped."""

  def scale(x, p=0.5, training=True, inplace=False):
    return x * (1 - p) if training else x

  def call(self, x, deterministic=None, rng=None):
    return x if deterministic else x * (1 - self.rate)

  monkeypatch.setattr(torch.nn.functional, "dropout", scale)
  monkeypatch.setattr(nn.Dropout, "__call__", call)


def randomize(model):
  """Gives every parameter a value that is neither 0 nor 1."""
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for name, x in model.named_parameters():
      x.normal_(0.0, 0.3, generator=generator)
      if "orm" in name:
        x += name.endswith("weight")


def ragged(lengths, width, pad):
  rng = np.random.default_rng(0)
  mask = np.arange(width) < np.array(lengths)[:, None]
  return np.where(mask, rng.integers(5, V, size=mask.shape), pad), mask


@pytest.mark.parametrize("name", GENERATORS)
def test_a_generator_drops_where_pytorch_does(name, tmp_path, scaled_dropout):
  config = getattr(transformers, f"{name}Config")(**GENERATORS[name])
  config._attn_implementation = "eager"  # the others drop in one kernel
  model = getattr(transformers, f"{name}ForConditionalGeneration")(config)
  randomize(model)
  model.train()
  model.save_pretrained(tmp_path)
  tokens, mask = ragged((7, 4), 7, config.pad_token_id)
  targets, _ = ragged((5, 5), 5, config.pad_token_id)
  start = np.full((2, 1), config.decoder_start_token_id)
  with torch.no_grad():
    expected = model(
      input_ids=torch.tensor(tokens),
      attention_mask=torch.tensor(mask, dtype=torch.long),
      decoder_input_ids=torch.tensor(
        np.concatenate([start, targets[:, :-1]], axis=1)
      ),
    ).logits.numpy()
  loaded = load_generator(tmp_path)
  generator = build_generator(
    GeneratorConfig(**loaded.fields),
    vocab_size=V,
    decoder_start_id=-1,
    dtype=np.dtype("float32"),
  )
  params = {"params": jax.tree.map(jnp.asarray, loaded.params)}
  inputs = jax.tree.map(jnp.asarray, (tokens, mask, targets))
  got = generator.apply(params, *inputs, deterministic=False)
  np.testing.assert_allclose(got, expected, rtol=2e-4, atol=2e-4)
  still = generator.apply(params, *inputs)
  assert np.max(np.abs(still - expected)) > 1e-2


def test_an_encoder_drops_where_pytorch_does(tmp_path, scaled_dropout):
  config = transformers.DPRConfig(
    vocab_size=V,
    hidden_size=D,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=16,
    hidden_dropout_prob=0.15,
    attention_probs_dropout_prob=0.35,
  )
  config._attn_implementation = "eager"
  model = transformers.DPRQuestionEncoder(config)
  randomize(model)
  model.train()
  model.save_pretrained(tmp_path)
  tokens, mask = ragged((7, 4), 7, 0)
  with torch.no_grad():
    expected = model(
      torch.tensor(tokens), torch.tensor(mask, dtype=torch.long)
    )[0].numpy()
  loaded = load_encoder(tmp_path)
  encoder = build_encoder(
    EncoderConfig(**loaded.fields),
    vocab_size=V,
    max_positions=16,
    dtype=np.dtype("float32"),
  )
  params = {"params": jax.tree.map(jnp.asarray, loaded.params)}
  inputs = jax.tree.map(jnp.asarray, (tokens, mask))
  got = encoder.apply(params, *inputs, deterministic=False)
  np.testing.assert_allclose(got, expected, rtol=2e-4, atol=2e-4)
  still = encoder.apply(params, *inputs)
  assert np.max(np.abs(still - expected)) > 1e-2
