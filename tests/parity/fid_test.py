"""Fusion in the decoder against PyTorch: BART and T5 with joined states.

The reference joins the states as FiD's authors do (Izacard and Grave 2021,
https://arxiv.org/abs/2007.01282), and lets transformers decode.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.modeling_outputs import BaseModelOutput

from rag_jax.config_models import EncoderConfig
from rag_jax.config_models import GeneratorConfig
from rag_jax.models.batch import RagBatch
from rag_jax.models.encoders import RetrieverEncoder
from rag_jax.models.rag import RagModel
from rag_jax.models.rag import build_generator
from rag_jax.training.step import fid_loss
from rag_jax.weights.load import load_generator

pytestmark = pytest.mark.parity

B, K, C, T = 2, 3, 6, 4
BART = transformers.BartConfig(
  vocab_size=101, d_model=32, encoder_layers=2, decoder_layers=2,
  encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48,
  decoder_ffn_dim=48, max_position_embeddings=16, dropout=0.0,
)  # fmt: skip
T5 = transformers.T5Config(
  vocab_size=101, d_model=32, d_kv=8, d_ff=48, num_layers=3, num_heads=4,
  num_decoder_layers=2, relative_attention_num_buckets=8,
  relative_attention_max_distance=12, decoder_start_token_id=0,
  dropout_rate=0.0,
)  # fmt: skip
MODELS = {
  "bart": (transformers.BartForConditionalGeneration, BART),
  "t5": (transformers.T5ForConditionalGeneration, T5),
}


def their_loss(model, tokens, mask, targets, target_mask):
  """The mean cross-entropy of a target token, with a graph behind it."""
  encoder = model.get_encoder()
  states = encoder(
    input_ids=torch.tensor(tokens).reshape(B * K, C),
    attention_mask=torch.tensor(mask).reshape(B * K, C).long(),
  ).last_hidden_state
  return model(
    encoder_outputs=BaseModelOutput(
      last_hidden_state=states.reshape(B, K * C, -1)
    ),
    attention_mask=torch.tensor(mask).reshape(B, K * C).long(),
    labels=torch.tensor(np.where(target_mask, targets, -100)).long(),
    use_cache=False,
  ).loss


@pytest.mark.parametrize("name", list(MODELS))
def test_loss_and_gradient_are_those_of_joined_states(name, tmp_path):
  model_class, config = MODELS[name]
  torch.manual_seed(0)
  model = model_class(config).eval()
  model.save_pretrained(tmp_path)
  loaded = load_generator(tmp_path)
  rng = np.random.default_rng(0)
  tokens = rng.integers(3, 100, (B, K, C)).astype(np.int32)
  mask = np.arange(C) < rng.integers(2, C + 1, (B, K, 1))
  targets = rng.integers(3, 100, (B, T)).astype(np.int32)
  target_mask = np.arange(T) < np.array([[4], [2]])
  expected = their_loss(model, tokens, mask, targets, target_mask)
  expected.backward()

  encoder = EncoderConfig(embed_dim=8, num_heads=2, mlp_dim=8, vocab_size=9)
  rag = RagModel(
    question_encoder=RetrieverEncoder(
      encoder.frozen(max_positions=8), dtype=jnp.float32
    ),
    passage_encoder=None,
    generator=build_generator(
      GeneratorConfig(**loaded.fields),
      vocab_size=0,
      decoder_start_id=0,
      dtype=jnp.float32,
    ),
  )
  batch = RagBatch(
    context_tokens=jnp.asarray(tokens),
    context_mask=jnp.asarray(mask),
    target_tokens=jnp.asarray(targets),
    target_mask=jnp.asarray(target_mask),
  )
  params = {"generator": jax.tree.map(jnp.asarray, loaded.params)}
  (loss, _), grads = jax.jit(
    jax.value_and_grad(
      lambda p: fid_loss(p, batch, jax.random.key(0), model=rag), has_aux=True
    )
  )(params)
  np.testing.assert_allclose(loss, expected.item(), rtol=1e-5)
  found = grads["generator"]["token_embedding"]["embedding"]
  theirs = model.get_input_embeddings().weight.grad.numpy()
  np.testing.assert_allclose(
    found, theirs, rtol=1e-4, atol=1e-5 * np.abs(theirs).max()
  )
