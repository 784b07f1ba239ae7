"""Models of our own shapes, as torch computes them after an export.

A retriever without layers is a DPR encoder with one, and a generator like T5
whose tied output is not scaled is a T5: both are re-expressions, not the same
tensors, so torch's numbers are compared with ours.
"""

import dataclasses
import functools

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from rag_jax.config_models import EncoderConfig
from rag_jax.config_models import GeneratorConfig
from rag_jax.models.batch import RagBatch
from rag_jax.models.encoders import RetrieverEncoder
from rag_jax.models.generator import Generator
from rag_jax.models.rag import RagModel
from rag_jax.weights.config_values import SpecialIds
from rag_jax.weights.export import TokenizerFiles
from rag_jax.weights.export import export_encoder
from rag_jax.weights.export import export_rag
from rag_jax.weights.loaded import RagSettings
from rag_jax.weights.saved import SavedModel

pytestmark = pytest.mark.parity

V, D, PAD, BOS, EOS = 50, 12, 1, 0, 2
IDS = SpecialIds(pad=PAD, bos=BOS, eos=EOS)
LENGTHS = (9, 1, 5, 8)  # real tokens a row


def inputs():
  """Returns ragged tokens that begin with <s>, and their mask."""
  mask = np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None]
  tokens = np.random.default_rng(0).integers(3, V, size=mask.shape)
  tokens[:, 0] = BOS
  return np.where(mask, tokens, PAD), mask


def random_params(module, *args):
  """Returns parameters as a trained model may have them: none is zero."""
  shapes = jax.eval_shape(module.init, jax.random.key(0), *args)
  rng = np.random.default_rng(1)
  return jax.tree.map(
    lambda x: jnp.asarray(rng.normal(0.2, 0.6, size=x.shape), jnp.float32),
    nn.meta.unbox(shapes)["params"],
  )


def bag(pooling, projection_dim):
  """Returns fields, module and parameters of a retriever without layers."""
  e = EncoderConfig(
    num_layers=0,
    embed_dim=D,
    pooling=pooling,
    projection_dim=projection_dim,
    normalize=True,
  )
  module = RetrieverEncoder(e.frozen(vocab_size=V), dtype=jnp.float32)
  tokens = jnp.zeros((1, 2), jnp.int32)
  return e, module, random_params(module, tokens, tokens == 0)


@functools.cache
def expected(pooling, projection_dim):
  _, module, params = bag(pooling, projection_dim)
  tokens, mask = inputs()
  return np.asarray(
    jax.jit(module.apply)(
      {"params": params}, jnp.asarray(tokens, jnp.int32), jnp.asarray(mask)
    )
  )


def torch_embeddings(model):
  tokens, mask = inputs()
  with torch.no_grad():
    return model(
      torch.tensor(tokens), attention_mask=torch.tensor(mask).long()
    ).pooler_output.numpy()


@pytest.mark.parametrize(
  ("pooling", "projection_dim", "scale"),
  [
    ("learned", 7, 10.0),
    ("learned", 0, 1.0),
    ("mean", 40, 3.7),
    ("mean", D, 1),
  ],
)
def test_a_bag_of_words_is_a_dpr_encoder_of_one_layer(
  pooling, projection_dim, scale, tmp_path
):
  e, _, params = bag(pooling, projection_dim)
  export_encoder(
    tmp_path,
    dataclasses.replace(e, score_scale=float(scale)),
    params,
    kind="dpr_question",
    tokenizer=TokenizerFiles(ids=IDS),
  )
  model, info = transformers.DPRQuestionEncoder.from_pretrained(
    tmp_path, output_loading_info=True
  )
  assert not any(info.values()), info
  ours, theirs = (
    expected(pooling, projection_dim),
    torch_embeddings(model.eval()),
  )
  assert ours.std(axis=0).mean() > 0.05  # the rows differ, or it would be easy
  np.testing.assert_allclose(theirs / scale, ours, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_the_size_of_the_embeddings_does_not_matter(size, tmp_path):
  """The norms' epsilon and the first token's row stay small beside them."""
  e, _, params = bag("learned", 7)
  params["token_embedding"]["embedding"] *= size
  params["pooling"]["kernel"] /= size
  params["projection"]["bias"] *= size
  export_encoder(
    tmp_path,
    e,
    params,
    kind="dpr_context",
    tokenizer=TokenizerFiles(ids=IDS),
  )
  model = transformers.DPRContextEncoder.from_pretrained(tmp_path).eval()
  np.testing.assert_allclose(
    torch_embeddings(model), expected("learned", 7), rtol=0, atol=1e-5
  )


def generator():
  """Returns fields and module of a T5 whose tied output is not scaled."""
  g = GeneratorConfig(
    num_layers=1,
    embed_dim=16,
    num_heads=2,
    mlp_dim=24,
    activation="gelu",
    norm="pre",
    norm_kind="rms",
    norm_eps=1e-6,
    use_bias=False,
    embedding_norm=False,
    positions="none",
    position_offset=0,
    relative_buckets=8,
    relative_max_distance=12,
    relative_shared=True,
    scale_attention=False,
    logits_bias=False,
  )
  module = g.frozen(vocab_size=V, decoder_start_id=EOS, dropout=0.0)
  return g, Generator(module, dtype=jnp.float32)


def test_a_rag_trained_here_gives_the_same_numbers_in_torch(tmp_path):
  """Scores with a learned scale, and logits."""
  e, encoder, _ = bag("learned", 7)
  g, g_module = generator()
  module = RagModel(
    question_encoder=encoder,
    passage_encoder=None,
    generator=g_module,
    learn_score_scale=True,
  )
  rng = np.random.default_rng(2)
  questions, mask = inputs()
  b, k = len(questions), 3
  context = rng.integers(3, V, (b, k, 10))
  target = rng.integers(3, V, (b, 4))
  docs = rng.normal(size=(b, k, 7)).astype(np.float32)
  ours = RagBatch(
    context_tokens=jnp.asarray(context, jnp.int32),
    context_mask=jnp.ones(context.shape, bool),
    target_tokens=jnp.asarray(target, jnp.int32),
    target_mask=jnp.ones(target.shape, bool),
    question_tokens=jnp.asarray(questions, jnp.int32),
    question_mask=jnp.asarray(mask),
    doc_embeddings=jnp.asarray(docs),
  )
  passages = {
    "doc_tokens": jnp.zeros((b, k, 2), jnp.int32),
    "doc_mask": jnp.ones((b, k, 2), bool),
  }
  params = random_params(module, ours.replace(**passages))
  params["log_score_scale"] = jnp.float32(1.3)
  outputs = jax.jit(module.apply)({"params": params}, ours)

  tokenizer = TokenizerFiles(ids=IDS)
  export_rag(
    tmp_path,
    SavedModel(
      origin="",
      params=params,
      kind="rag_token",
      encoder=e,
      generator=g,
      settings=RagSettings(n_docs=k),
      question_tokenizer=tokenizer,
      generator_tokenizer=tokenizer,
    ),
  )
  model, info = transformers.RagTokenForGeneration.from_pretrained(
    tmp_path, output_loading_info=True
  )
  assert not any(info.values()), info
  model = model.eval()
  shifted = np.concatenate([np.full((b, 1), EOS), target[:, :-1]], axis=1)
  with torch.no_grad():
    embedding = model.rag.question_encoder(
      torch.tensor(questions), attention_mask=torch.tensor(mask).long()
    )[0]
    scores = torch.einsum("br,bkr->bk", embedding, torch.tensor(docs))
    theirs = model(
      context_input_ids=torch.tensor(context.reshape(b * k, -1)),
      context_attention_mask=torch.ones(b * k, context.shape[-1]).long(),
      decoder_input_ids=torch.tensor(shifted),
      doc_scores=scores,
      n_docs=k,
      use_cache=False,
    )
  for got, want in (
    (scores, outputs.doc_scores),
    (theirs.logits.reshape(outputs.target_logits.shape), outputs.target_logits),
  ):
    assert np.std(want) > 0.1
    np.testing.assert_allclose(
      got.numpy(), want, rtol=0, atol=1e-5 * np.abs(want).max()
    )
