"""Fusion in the decoder: one target given all documents of a question."""

import dataclasses
import functools

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rag_jax import losses
from rag_jax.config import Config
from rag_jax.config_models import EncoderConfig
from rag_jax.config_models import GeneratorConfig
from rag_jax.losses import RetrieverLoss
from rag_jax.models.batch import RagBatch
from rag_jax.models.packing import Packing
from rag_jax.models.rag import build_model
from rag_jax.training import objectives

B, K, C, T, Q, L, V = 2, 3, 5, 4, 3, 4, 13
SIZES = {"embed_dim": 8, "num_heads": 2, "mlp_dim": 8}
TARGET_MASK = np.array([[1, 1, 1, 1], [1, 1, 0, 0]], bool)
MODELS = {}
FIELDS = pytest.mark.parametrize("fields", [
  {}, {"pointer": True},
  {"positions": "none", "relative_buckets": 8, "relative_shared": True},
], ids=str)  # fmt: skip
KEY = jax.random.key(0)
NO_FIELDS = {}


def make_batch():
  rng = np.random.default_rng(0)

  def tokens(*shape):
    return rng.integers(V, size=shape, dtype=np.int32)

  def mask(*shape):
    lengths = rng.integers(2, shape[-1] + 1, size=(*shape[:-1], 1))
    return np.arange(shape[-1]) < lengths

  return RagBatch(
    context_tokens=tokens(B, K, C), context_mask=mask(B, K, C),
    target_tokens=tokens(B, T), target_mask=TARGET_MASK,
    question_tokens=tokens(B, Q), question_mask=mask(B, Q),
    doc_tokens=tokens(B, K, L), doc_mask=mask(B, K, L),
  )  # fmt: skip


BATCH = jax.tree.map(jnp.asarray, make_batch())


def model_and_params(fields):
  name = str(fields)
  if name not in MODELS:
    config = Config()
    config.encoder = EncoderConfig(**SIZES, tied=False)
    config.generator = GeneratorConfig(
      **SIZES, num_layers=1, max_positions=8, **fields
    )
    model = build_model(config, vocab_size=V, decoder_start_id=2)
    shapes = jax.eval_shape(model.init, KEY, BATCH)
    rng = np.random.default_rng(1)
    params = jax.tree.map(
      lambda x: jnp.asarray(0.5 * rng.normal(size=x.shape), jnp.float32),
      nn.meta.unbox(shapes)["params"],
    )
    MODELS[name] = model, params
  return MODELS[name]


def read(fields, batch, method="joined_log_probs", **settings):
  model, params = model_and_params(fields)
  apply = functools.partial(
    model.apply, {"params": params}, method=method, **settings
  )
  return jax.jit(apply)(batch)


def docs(*chosen):
  names = ("context_tokens", "context_mask", "doc_tokens", "doc_mask")
  return dataclasses.replace(
    BATCH, **{name: getattr(BATCH, name)[:, list(chosen)] for name in names}
  )


@FIELDS
def test_with_one_document_it_is_the_generator_given_that_document(fields):
  joined = read(fields, docs(1))
  alone = read(fields, docs(1), "target_log_probs")
  for name in ("doc_scores", "log_probs", "mean"):
    found, expected = getattr(joined, name), getattr(alone, name)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@FIELDS
def test_it_scores_a_target_as_decoding_does(fields):
  model, params = model_and_params(fields)
  batch = BATCH
  variables = {"params": params["generator"]}
  generator = model.generator
  memory = model.apply(
    {"params": params},
    batch.context_tokens, batch.context_mask, method="encode",
  )  # fmt: skip
  expected = generator.apply(
    variables,
    batch.target_tokens[:, None],
    memory.reshape(B, 1, -1, memory.shape[-1]),
    batch.context_mask.reshape(B, 1, -1),
    batch.context_tokens.reshape(B, 1, -1),
    method="score",
  )  # B W K T
  found = read(fields, batch)
  assert found.log_probs.shape == (B, 1, T)
  np.testing.assert_allclose(
    found.log_probs[:, 0], expected[:, 0, 0], rtol=1e-4, atol=1e-5
  )


# A pointer also compares the tokens before, across the border of documents.
@pytest.mark.parametrize("fields", FIELDS.args[1][::2], ids=str)
def test_a_document_that_is_left_out_is_not_read(fields):
  found = read(fields, BATCH, leave_out=True).log_probs
  assert found.shape == (B, K, T)
  for doc in range(K):
    others = [k for k in range(K) if k != doc]
    expected = read(fields, docs(*others)).log_probs[:, 0]
    np.testing.assert_allclose(found[:, doc], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", losses.ATTENTION_LOSSES)
def test_what_is_looked_at_goes_with_its_document(kind):
  settings = {"method": "attention_scores", "kind": kind}
  expected = read(NO_FIELDS, BATCH, **settings)
  found = read(NO_FIELDS, docs(2, 0, 1), **settings)
  np.testing.assert_allclose(found, expected[:, [2, 0, 1]], rtol=1e-4)
  packed = read(
    NO_FIELDS, BATCH, **settings, context_layout=Packing(rows=2, length=20)
  )
  np.testing.assert_allclose(packed, expected, rtol=1e-4)
  # Padding and another target after the end are not looked at.
  changed = dataclasses.replace(
    BATCH,
    context_tokens=jnp.where(BATCH.context_mask, BATCH.context_tokens, 1),
    target_tokens=jnp.where(TARGET_MASK, BATCH.target_tokens, 1),
  )
  found = read(NO_FIELDS, changed, **settings)
  np.testing.assert_allclose(found, expected, rtol=1e-4)
  empty = dataclasses.replace(
    BATCH, context_mask=BATCH.context_mask.at[:, 1].set(False)
  )
  np.testing.assert_array_equal(read(NO_FIELDS, empty, **settings)[:, 1], 0)


def test_the_order_of_documents_does_not_matter():
  expected = read(NO_FIELDS, BATCH).log_probs
  found = read(NO_FIELDS, docs(2, 0, 1)).log_probs
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_chunks_and_packing_change_nothing():
  whole = read(NO_FIELDS, BATCH)
  packing = Packing(rows=2, length=20)
  assert packing.fit(BATCH.context_mask.reshape(B * K, -1))
  parts = read(NO_FIELDS, BATCH, vocab_chunk=4, context_layout=packing)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
    parts, whole,
  )  # fmt: skip


def gradient(loss_fn, **settings):
  """Returns the loss, its metrics and its gradient."""
  model, params = model_and_params(NO_FIELDS)
  fn = functools.partial(loss_fn, model=model, **settings)
  (loss, metrics), grads = jax.jit(jax.value_and_grad(fn, has_aux=True))(
    params, BATCH, KEY
  )
  return loss, metrics, grads


def assert_same(found, expected):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5),
    found, expected,
  )  # fmt: skip


def largest(tree):
  return max(float(jnp.abs(x).max()) for x in jax.tree.leaves(tree))


def test_the_reader_alone_has_no_gradient_of_the_retriever():
  loss, metrics, grads = gradient(objectives.fid_loss)
  nll = -jnp.sum(read(NO_FIELDS, BATCH).log_probs[:, 0], where=TARGET_MASK)
  np.testing.assert_allclose(loss, nll / TARGET_MASK.sum(), rtol=1e-5)
  assert metrics["train/loss"] == loss
  assert largest(grads["generator"]) > 1e-3
  assert not largest([v for k, v in grads.items() if k != "generator"])


@pytest.mark.parametrize(
  "kind", [k for k in losses.RETRIEVER_LOSSES if k not in losses.REWARD_LOSSES]
)
def test_each_part_of_fid_learns_from_its_own_loss(kind):
  retriever = RetrieverLoss(kind=kind, temperature=2.0, weight=0.5)
  reader, _, of_reader = gradient(objectives.fid_loss)
  loss, metrics, grads = gradient(objectives.fid_loss, retriever=retriever)
  assert_same(grads["generator"], of_reader["generator"])
  given, attention = read(NO_FIELDS, BATCH, "target_log_probs"), None
  if kind == "loop":
    given = read(NO_FIELDS, BATCH, leave_out=True)
  if kind in losses.ATTENTION_LOSSES:
    attention = read(NO_FIELDS, BATCH, "attention_scores", kind=kind)
  each = retriever(
    given.doc_scores, given.log_probs, jnp.asarray(TARGET_MASK), attention
  )
  mean = each.mean()
  if kind.startswith("emdr2"):
    mean = each.sum() / TARGET_MASK.sum()
  np.testing.assert_allclose(metrics["train/retriever_loss"], mean, rtol=1e-4)
  np.testing.assert_allclose(loss, reader + 0.5 * mean, rtol=1e-4)
  assert largest(grads["question_encoder"]) > 1e-5


@pytest.mark.parametrize(("kind", "nll_fn"), [
  ("emdr2", losses.marginal_sequence_nll),
  ("emdr2_token", losses.marginal_token_nll),
])  # fmt: skip
def test_rag_is_its_generators_part_and_emdr2(kind, nll_fn):
  _, _, expected = gradient(objectives.marginal_loss, nll_fn=nll_fn)
  retriever = RetrieverLoss(kind=kind)
  _, metrics, found = gradient(
    objectives.marginal_loss,
    nll_fn=nll_fn,
    constant_scores=True,
    retriever=retriever,
  )
  assert_same(found, expected)
  np.testing.assert_allclose(
    metrics["train/retriever_loss"], metrics["train/loss"], rtol=1e-5
  )


def test_a_retriever_that_does_not_learn_has_no_gradient():
  nll_fn = losses.marginal_token_nll
  _, _, expected = gradient(objectives.marginal_loss, nll_fn=nll_fn)
  _, _, found = gradient(
    objectives.marginal_loss, nll_fn=nll_fn, constant_scores=True
  )
  assert_same(found["generator"], expected["generator"])
  assert not largest([v for k, v in found.items() if k != "generator"])
