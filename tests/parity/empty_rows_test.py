"""A question or document without one real token: what comes of it.

The reference is transformers as it computes by default. Attention that has
nothing to look at adds nothing, so that the width of the padding changes
nothing; T5, which has an attention of its own there, adds the mean of the
padding.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from rag_jax.config_models import EncoderConfig
from rag_jax.config_models import GeneratorConfig
from rag_jax.losses import doc_log_prior
from rag_jax.models.encoders import RetrieverEncoder
from rag_jax.models.rag import build_encoder
from rag_jax.models.rag import build_generator
from rag_jax.weights.load import load_encoder
from rag_jax.weights.load import load_generator

pytestmark = pytest.mark.parity

V, D = 41, 16
GENERATORS = {
  "Bart": {
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 16,
  },
  "T5": {
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 2,
    "decoder_start_token_id": 0,
  },
}


def rows(pad, width=6):
  """Returns tokens and mask: nothing, three tokens, all."""
  mask = np.arange(width) < np.array([0, 3, width])[:, None]
  tokens = np.random.default_rng(0).integers(5, V, size=mask.shape)
  return np.where(mask, tokens, pad).astype(np.int32), mask


def save(model, path):
  """Saves a model whose parameters are all random."""
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for name, x in model.named_parameters():
      x.normal_(0.0, 0.3, generator=generator)
      if "orm" in name:
        x += name.endswith("weight")
  model.eval()
  model.save_pretrained(path)


@pytest.mark.parametrize("projection_dim", [0, 5])
def test_an_empty_question_is_embedded_as_by_dpr(tmp_path, projection_dim):
  model = transformers.DPRQuestionEncoder(
    transformers.DPRConfig(
      vocab_size=V,
      hidden_size=D,
      num_hidden_layers=2,
      num_attention_heads=2,
      intermediate_size=24,
      max_position_embeddings=16,
      projection_dim=projection_dim,
    )
  )
  save(model, tmp_path)
  loaded = load_encoder(tmp_path)
  encoder = build_encoder(
    EncoderConfig(**loaded.fields),
    vocab_size=V,
    max_positions=16,
    dtype=np.dtype("float32"),
  )
  for width in (6, 9):
    tokens, mask = rows(0, width)
    with torch.no_grad():
      told = model(torch.tensor(tokens), torch.tensor(mask, dtype=torch.long))
      inferred = model(torch.tensor(tokens))
    inputs = jnp.asarray(tokens), jnp.asarray(mask)
    got = encoder.apply({"params": loaded.params}, *inputs)
    for expected in (told[0].numpy(), inferred[0].numpy()):
      np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    first = got[0] if width == 6 else first
    # The width of the padding changes nothing.
    np.testing.assert_allclose(got[0], first, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", GENERATORS)
def test_an_empty_document_is_read_as_by_transformers(name, tmp_path):
  config = getattr(transformers, f"{name}Config")(
    vocab_size=V, d_model=D, **GENERATORS[name]
  )
  model = getattr(transformers, f"{name}ForConditionalGeneration")(config)
  save(model, tmp_path)
  tokens, mask = rows(config.pad_token_id)
  targets = np.random.default_rng(1).integers(5, V, (3, 4)).astype(np.int32)
  start = np.full((3, 1), config.decoder_start_token_id, np.int32)
  read = np.concatenate([start, targets[:, :-1]], axis=1)
  with torch.no_grad():
    expected = model(
      input_ids=torch.tensor(tokens),
      attention_mask=torch.tensor(mask, dtype=torch.long),
      decoder_input_ids=torch.tensor(read),
    ).logits.numpy()
  loaded = load_generator(tmp_path)
  generator = build_generator(
    GeneratorConfig(**loaded.fields),
    vocab_size=V,
    decoder_start_id=-1,
    dtype=np.dtype("float32"),
  )
  params = {"params": jax.tree.map(jnp.asarray, loaded.params)}
  tokens, mask, read = map(jnp.asarray, (tokens, mask, read))
  got = generator.apply(params, tokens, mask, jnp.asarray(targets))
  np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
  # The step of decoding does the same, token after token.
  memory = generator.apply(params, tokens, mask, method="encode")[:, None]
  cache = generator.apply(
    params,
    memory,
    mask[:, None],
    tokens[:, None],
    1,
    read.shape[1],
    method="init_cache",
  )
  for t in range(read.shape[1]):
    logits, cache = generator.apply(
      params, read[:, t : t + 1], jnp.asarray(t), cache, method="step"
    )
    np.testing.assert_allclose(
      logits[:, 0, 0], expected[:, t], rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("pooling", ["mean", "max", "learned"])
@pytest.mark.parametrize("normalize", [True, False])
def test_an_empty_row_is_no_evidence_where_states_are_pooled(
  pooling, normalize
):
  config = EncoderConfig(
    vocab_size=V,
    num_layers=1,
    embed_dim=8,
    num_heads=2,
    mlp_dim=12,
    max_positions=9,
    pooling=pooling,
    normalize=normalize,
  )
  encoder = RetrieverEncoder(config, dtype=np.dtype("float32"))
  tokens, mask = map(jnp.asarray, rows(0))
  got, _ = encoder.init_with_output(jax.random.key(0), tokens, mask)
  assert np.all(np.isfinite(got))
  # As sentence-transformers pools: a sum over nothing. It scores 0 with all.
  np.testing.assert_array_equal(got[0], np.zeros(8))
  prior = doc_log_prior(got[:1] @ got.T)
  np.testing.assert_allclose(prior, np.log(np.full((1, 3), 1 / 3)), rtol=1e-6)
