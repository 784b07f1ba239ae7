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
from rag_jax.training.objectives import fid_loss
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


def opened(name, path):
  """Returns PyTorch's model, ours, its parameters, and a batch for both."""
  model_class, config = MODELS[name]
  torch.manual_seed(0)
  model = model_class._from_config(config, attn_implementation="eager").eval()
  model.save_pretrained(path)
  loaded = load_generator(path)
  rng = np.random.default_rng(0)
  tokens = rng.integers(3, 100, (B, K, C)).astype(np.int32)
  mask = np.arange(C) < rng.integers(2, C + 1, (B, K, 1))
  targets = rng.integers(3, 100, (B, T)).astype(np.int32)
  target_mask = np.arange(T) < np.array([[4], [2]])
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
  return model, rag, params, batch


def their_output(model, batch, **settings):
  """Runs PyTorch's decoder over the joined states of all documents."""
  tokens, mask, targets, target_mask = (
    torch.tensor(np.asarray(x))
    for x in (
      batch.context_tokens, batch.context_mask,
      batch.target_tokens, batch.target_mask,
    )
  )  # fmt: skip
  states = model.get_encoder()(
    input_ids=tokens.reshape(B * K, C),
    attention_mask=mask.reshape(B * K, C).long(),
  ).last_hidden_state
  return model(
    encoder_outputs=BaseModelOutput(
      last_hidden_state=states.reshape(B, K * C, -1)
    ),
    attention_mask=mask.reshape(B, K * C).long(),
    labels=torch.where(target_mask, targets, -100).long(),
    use_cache=False,
    **settings,
  )


@pytest.mark.parametrize("name", list(MODELS))
def test_loss_and_gradient_are_those_of_joined_states(name, tmp_path):
  model, rag, params, batch = opened(name, tmp_path)
  expected = their_output(model, batch).loss
  expected.backward()
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


@pytest.mark.parametrize("name", list(MODELS))
def test_the_scores_of_attention_are_those_of_their_papers(name, tmp_path):
  model, rag, params, batch = opened(name, tmp_path)
  values = []

  def keep(module, args, output):
    values.append(output.detach())

  decoder = model.get_decoder()
  layers = decoder.layers if name == "bart" else decoder.block
  for layer in layers:
    attention = (
      layer.encoder_attn.v_proj
      if name == "bart"
      else layer.layer[1].EncDecAttention.v
    )
    attention.register_forward_hook(keep)
  with torch.no_grad():
    out = their_output(model, batch, output_attentions=True)
  mask = np.asarray(batch.context_mask)
  adist, dkrr = np.zeros((B, K)), np.zeros((B, K))
  for weights, value in zip(out.cross_attentions, values, strict=True):
    heads = weights.shape[1]
    # B N T K C, and the norms of the values, B N 1 K C
    weights = weights.numpy().reshape(B, heads, T, K, C)
    norms = np.linalg.norm(
      value.numpy().reshape(B, K, C, heads, -1), axis=-1
    ).transpose(0, 3, 1, 2)[:, :, None]
    for b in range(B):
      length = int(batch.target_mask[b].sum())
      of_tokens = (weights * norms)[b, :, :length].sum(axis=-1)
      adist[b] += of_tokens.mean(axis=(0, 1)) / len(layers)
      # The logarithm is the logit but for a constant of the question.
      logits = np.log(np.where(mask[b], weights[b, :, 0], 1.0))
      each = logits.sum(axis=-1) / mask[b].sum(axis=-1)
      dkrr[b] += each.mean(axis=0) / len(layers)

  def ours(kind):
    return rag.apply({"params": params}, batch, kind, method="attention_scores")

  np.testing.assert_allclose(ours("adist"), adist, rtol=1e-5)
  found = ours("dkrr")
  np.testing.assert_allclose(
    found - found[:, :1], dkrr - dkrr[:, :1], rtol=1e-4, atol=1e-5
  )
