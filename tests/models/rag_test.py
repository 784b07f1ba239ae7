"""Retriever and generator together: what reaches what, and in which order."""

import math

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rag_jax.config import Config
from rag_jax.config_models import EncoderConfig
from rag_jax.config_models import GeneratorConfig
from rag_jax.losses import rag_sequence_nll
from rag_jax.losses import rag_token_nll
from rag_jax.losses import token_log_probs
from rag_jax.models import rag
from rag_jax.models.batch import RagBatch

B, K, C, T, Q, L, V, D = 2, 3, 5, 4, 3, 4, 13, 8


def make_config():
  config = Config()
  config.encoder = EncoderConfig(
    embed_dim=D, num_heads=2, mlp_dim=8, tied=False, score_scale=2.0
  )
  config.generator = GeneratorConfig(
    num_layers=1, embed_dim=D, num_heads=2, mlp_dim=8, max_positions=8
  )
  return config


def make_model(config):
  return rag.build_model(config, vocab_size=V, decoder_start_id=2)


def make_batch():
  rng = np.random.default_rng(0)

  def tokens(*shape):
    return rng.integers(V, size=shape, dtype=np.int32)

  def mask(*shape):
    lengths = rng.integers(2, shape[-1] + 1, size=(*shape[:-1], 1))
    return np.arange(shape[-1]) < lengths

  return {
    "context_tokens": tokens(B, K, C),
    "context_mask": mask(B, K, C),
    "target_tokens": tokens(B, T),
    "question_tokens": tokens(B, Q),
    "question_mask": mask(B, Q),
    "doc_tokens": tokens(B, K, L),
    "doc_mask": mask(B, K, L),
  }


def as_batch(arrays):
  return RagBatch(target_mask=None, **arrays)


def random_params(model, batch):
  def init(key, batch):
    return nn.meta.unbox(model.init(key, as_batch(batch)))["params"]

  rng = np.random.default_rng(1)
  return jax.tree.map(
    lambda x: 0.5 * rng.normal(size=x.shape).astype(np.float32),
    jax.eval_shape(init, jax.random.key(0), batch),
  )


MODEL, BATCH = make_model(make_config()), make_batch()
DOC_NAMES = ("context_tokens", "context_mask", "doc_tokens", "doc_mask")
TARGET_MASK = np.array([[1, 1, 1, 1], [1, 1, 0, 0]], bool)


@jax.jit
def forward(params, batch):
  return MODEL.apply({"params": params}, as_batch(batch))


@jax.jit
def embed_docs(params, tokens, mask):
  embeddings = MODEL.apply(
    {"params": params},
    tokens.reshape(B * K, L),
    mask.reshape(B * K, L),
    method="embed_passages",
  )
  return embeddings.reshape(B, K, D)


@jax.jit
def gradients(params, batch):
  """Returns the gradient of RAG-Token's loss."""

  def loss(params):
    out = MODEL.apply({"params": params}, as_batch(batch))
    return rag_token_nll(
      out.doc_scores,
      out.target_logits,
      batch["target_tokens"],
      jnp.asarray(TARGET_MASK),
    ).sum()

  return jax.grad(loss)(params)


@jax.jit
def score_gradients(params, batch):
  """Returns the gradient of doc_scores, all that towers do to the loss."""

  def total(params):
    return MODEL.apply({"params": params}, as_batch(batch)).doc_scores.sum()

  return jax.grad(total)(params)


@pytest.fixture(scope="module")
def params():
  return random_params(MODEL, BATCH)


@pytest.fixture(scope="module")
def given_embeddings(params):
  """The batch with embeddings in place of the tokens of documents."""
  embeddings = embed_docs(params, BATCH["doc_tokens"], BATCH["doc_mask"])
  batch = dict(BATCH, doc_embeddings=np.asarray(embeddings))
  del batch["doc_tokens"], batch["doc_mask"]
  return batch


def pooled(tower, tokens, mask):
  """Learned pooling of token embeddings, one token at a time."""
  table, pooling = tower["token_embedding"]["embedding"], tower["pooling"]
  words = [table[t] for t in tokens[mask]]
  weights = [
    math.exp((w @ pooling["kernel"] + pooling["bias"]).item()) for w in words
  ]
  return sum(w * x for w, x in zip(weights, words, strict=True)) / sum(weights)


def test_doc_scores_are_scaled_inner_products_of_the_two_towers(params):
  doc_scores = forward(params, BATCH).doc_scores
  for b in range(B):
    question = pooled(
      params["question_encoder"],
      BATCH["question_tokens"][b],
      BATCH["question_mask"][b],
    )
    for k in range(K):
      doc = pooled(
        params["passage_encoder"],
        BATCH["doc_tokens"][b, k],
        BATCH["doc_mask"][b, k],
      )
      np.testing.assert_allclose(
        doc_scores[b, k], 2.0 * (question @ doc), atol=1e-5
      )


def test_logits_are_those_of_the_generator_with_each_context(params):
  target_logits = forward(params, BATCH).target_logits
  generator = jax.jit(MODEL.generator.apply)
  for b in range(B):
    for k in range(K):
      expected = generator(
        {"params": params["generator"]},
        BATCH["context_tokens"][b, k][None],
        BATCH["context_mask"][b, k][None],
        BATCH["target_tokens"][b][None],
      )[0]
      np.testing.assert_allclose(target_logits[b, k], expected, atol=1e-5)


@pytest.mark.parametrize("nll_fn", [rag_token_nll, rag_sequence_nll])
def test_documents_in_any_order_give_the_same_likelihood(nll_fn, params):
  shuffled = BATCH | {name: BATCH[name][:, [2, 0, 1]] for name in DOC_NAMES}

  def nll(batch):
    out = forward(params, batch)
    return jax.jit(nll_fn)(
      out.doc_scores, out.target_logits, BATCH["target_tokens"], TARGET_MASK
    )

  np.testing.assert_allclose(nll(shuffled), nll(BATCH), rtol=1e-5)


def test_embeddings_of_documents_stand_for_their_tokens(
  params, given_embeddings
):
  expected = forward(params, BATCH)
  out = forward(params, given_embeddings)
  np.testing.assert_allclose(out.doc_scores, expected.doc_scores, rtol=1e-5)
  np.testing.assert_allclose(
    out.target_logits, expected.target_logits, rtol=1e-5
  )


def test_closed_book_reads_one_context_whose_score_is_zero(params):
  one = {
    name: BATCH[name][:, :1] for name in ("context_tokens", "context_mask")
  }
  one["target_tokens"] = BATCH["target_tokens"]
  out = forward(params, one)
  np.testing.assert_array_equal(out.doc_scores, np.zeros((B, 1)))
  np.testing.assert_allclose(
    out.target_logits,
    forward(params, BATCH).target_logits[:, :1],
    atol=1e-5,
  )
  assert set(random_params(MODEL, one)) == {"generator"}


def test_the_loss_reaches_both_towers_and_the_generator(params):
  grads = gradients(params, BATCH)
  assert set(grads) == {"question_encoder", "passage_encoder", "generator"}
  softmax_ignores = ("key/bias", "pooling/bias")  # a constant in all logits
  for path, grad in jax.tree_util.tree_leaves_with_path(grads):
    name = "/".join(key.key for key in path)
    if not name.endswith(softmax_ignores):
      assert np.max(np.abs(grad)) > 1e-5, name


def test_given_embeddings_keep_the_loss_from_the_passage_tower(
  params, given_embeddings
):
  grads = score_gradients(params, given_embeddings)
  expected = score_gradients(params, BATCH)
  assert not any(map(np.any, jax.tree.leaves(grads["passage_encoder"])))
  assert any(map(np.any, jax.tree.leaves(expected["passage_encoder"])))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
    grads["question_encoder"],
    expected["question_encoder"],
  )


def test_tied_towers_are_one_tower():
  config = make_config()
  config.encoder.tied = True
  model = make_model(config)
  params = random_params(model, BATCH)
  assert set(params) == {"question_encoder", "generator"}
  tokens, mask = BATCH["question_tokens"], BATCH["question_mask"]
  questions, passages = (
    jax.jit(lambda *args, m=method: model.apply(*args, method=m))(
      {"params": params}, tokens, mask
    )
    for method in ("embed_questions", "embed_passages")
  )
  np.testing.assert_allclose(questions, 2.0 * passages, rtol=1e-6)


def test_a_learned_score_scale_starts_at_the_setting_and_stays_positive():
  config = make_config()
  config.encoder.learn_score_scale = True
  model = make_model(config)

  @jax.jit
  def init(key, batch):
    params = nn.meta.unbox(model.init(key, as_batch(batch)))["params"]
    return params["log_score_scale"]

  log_scale = init(jax.random.key(0), BATCH)
  np.testing.assert_allclose(log_scale, math.log(2.0), rtol=1e-6)

  params = random_params(model, BATCH)
  tokens, mask = BATCH["question_tokens"], BATCH["question_mask"]
  for log_scale in (-1.5, 0.7):
    params["log_score_scale"] = np.float32(log_scale)
    embedding = jax.jit(
      lambda *args: model.apply(*args, method="embed_questions")
    )({"params": params}, tokens, mask)
    for b in range(B):
      plain = pooled(params["question_encoder"], tokens[b], mask[b])
      np.testing.assert_allclose(
        embedding[b], math.exp(log_scale) * plain, atol=1e-5
      )


def test_scores_as_large_as_those_of_dpr_keep_their_differences():
  rng = np.random.default_rng(2)
  questions = rng.normal(size=(B, 768))
  docs = questions[:, None] * 0.1 + 0.01 * rng.normal(size=(B, K, 768))
  questions, docs = questions.astype(np.float32), docs.astype(np.float32)
  expected = [
    [math.fsum(questions[b] * docs[b, k].astype(float)) for k in range(K)]
    for b in range(B)
  ]
  assert np.min(expected) > 60
  np.testing.assert_allclose(
    jax.jit(rag.score_docs)(questions, docs), expected, rtol=2e-6
  )


def test_what_the_model_encodes_is_what_its_generator_reads(params):
  @jax.jit
  def decode(params, context_tokens, context_mask, target_tokens):
    memory = MODEL.apply(
      {"params": params}, context_tokens, context_mask, method="encode"
    )
    return MODEL.generator.apply(
      {"params": params["generator"]},
      target_tokens[:, None],
      memory,
      context_mask,
      context_tokens,
      method="score",
    )[:, 0]  # B K T

  log_probs = decode(
    params,
    BATCH["context_tokens"],
    BATCH["context_mask"],
    BATCH["target_tokens"],
  )
  expected = token_log_probs(
    forward(params, BATCH).target_logits,
    jnp.asarray(BATCH["target_tokens"]),
  )
  np.testing.assert_allclose(log_probs, expected, atol=1e-5)
