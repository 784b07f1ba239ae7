"""The two weights of p(z|x) against a loop over documents."""

import math

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rag_jax import losses
from rag_jax.config import Config
from rag_jax.config_models import EncoderConfig
from rag_jax.config_models import GeneratorConfig
from rag_jax.losses_hf import HF_NLL_FNS
from rag_jax.models.batch import RagBatch
from rag_jax.models.hybrid import learned_weights
from rag_jax.models.rag import build_model
from rag_jax.training import objectives

B, K, C, T, Q, L, V, D = 3, 4, 6, 3, 3, 4, 17, 8
A_START, B_START = 0.7, 0.2


def make_model(hybrid=True):
  config = Config()
  config.encoder = EncoderConfig(embed_dim=D, num_heads=2, mlp_dim=8)
  config.generator = GeneratorConfig(
    num_layers=1, embed_dim=D, num_heads=2, mlp_dim=8, max_positions=8
  )
  config.index.hybrid = hybrid
  config.index.hybrid_dense = A_START
  config.index.hybrid_bm25 = B_START
  return build_model(config, vocab_size=V, decoder_start_id=2)


def make_batch():
  rng = np.random.default_rng(0)

  def tokens(*shape):
    return rng.integers(V, size=shape, dtype=np.int32)

  return RagBatch(
    context_tokens=tokens(B, K, C),
    context_mask=np.ones((B, K, C), bool),
    target_tokens=tokens(B, T),
    target_mask=np.arange(T) < np.array([[3], [1], [2]]),
    question_tokens=tokens(B, Q),
    question_mask=np.ones((B, Q), bool),
    doc_tokens=tokens(B, K, L),
    doc_mask=np.ones((B, K, L), bool),
    bm25_scores=rng.uniform(0, 20, size=(B, K)).astype(np.float32),
  )


MODEL, BATCH = make_model(), jax.tree.map(jnp.asarray, make_batch())


@pytest.fixture(scope="module")
def params():
  shapes = jax.eval_shape(
    lambda key: nn.meta.unbox(MODEL.init(key, BATCH))["params"],
    jax.random.key(0),
  )
  rng = np.random.default_rng(1)
  params = jax.tree.map(
    lambda x: rng.normal(size=x.shape).astype(np.float32), shapes
  )
  params["hybrid"] = {
    "log_dense": np.float32(math.log(A_START)),
    "log_bm25": np.float32(math.log(B_START)),
  }
  return jax.tree.map(jnp.asarray, params)


@jax.jit
def parts(params):
  """Returns inner products and log p(y_t | x, z, y_<t), of the model."""
  alone = {k: v for k, v in params.items() if k != "hybrid"}
  out = make_model(hybrid=False).apply(
    {"params": alone},
    BATCH.replace(bm25_scores=None),
    method="target_log_probs",
  )
  return out.doc_scores, out.log_probs


def slow_nll(a, b, dense, log_probs):
  """-log sum_z softmax(a * dense + b * bm25) p(y|x, z), a target token."""
  total = 0.0
  for i in range(B):
    scores = [
      math.exp(a * float(dense[i, k]) + b * float(BATCH.bm25_scores[i, k]))
      for k in range(K)
    ]
    likelihood = 0.0
    for k in range(K):
      log_p = sum(
        float(log_probs[i, k, t]) for t in range(T) if BATCH.target_mask[i, t]
      )
      likelihood += scores[k] / sum(scores) * math.exp(log_p)
    total -= math.log(likelihood)
  # A Python number: a float32 of JAX would leave no digits to differences.
  return total / int(BATCH.target_mask.sum())


def slow_gradients(a, b, dense, log_probs, step=1e-5):
  """The derivatives by a and by b, as central differences in float64."""
  return [
    (
      slow_nll(a + da, b + db, dense, log_probs)
      - slow_nll(a - da, b - db, dense, log_probs)
    )
    / (2 * step)
    for da, db in ((step, 0.0), (0.0, step))
  ]


def test_loss_and_gradients_are_those_of_a_loop_over_documents(params):
  dense, log_probs = parts(params)

  @jax.jit
  def loss(weights):
    return objectives.marginal_loss(
      params | {"hybrid": weights},
      BATCH,
      jax.random.key(0),
      model=MODEL,
      nll_fn=losses.MARGINAL_NLL_FNS["rag_sequence"],
    )

  (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(
    params["hybrid"]
  )
  by_a, by_b = slow_gradients(A_START, B_START, dense, log_probs)
  assert min(abs(by_a), abs(by_b)) > 1e-3
  np.testing.assert_allclose(
    value, slow_nll(A_START, B_START, dense, log_probs), rtol=1e-5
  )
  # d/d log a = a d/da
  np.testing.assert_allclose(grads["log_dense"], A_START * by_a, rtol=1e-3)
  np.testing.assert_allclose(grads["log_bm25"], B_START * by_b, rtol=1e-3)
  np.testing.assert_allclose(metrics["train/hybrid_dense"], A_START, rtol=1e-6)
  np.testing.assert_allclose(metrics["train/hybrid_bm25"], B_START, rtol=1e-6)


def test_the_loss_of_hugging_face_trains_the_weights_too(params):
  @jax.jit
  def loss(weights):
    return objectives.hf_loss(
      params | {"hybrid": weights},
      BATCH,
      jax.random.key(0),
      model=MODEL,
      nll_fn=HF_NLL_FNS["rag_token"],
    )[0]

  grads = jax.grad(loss)(params["hybrid"])
  assert min(abs(grads["log_dense"]), abs(grads["log_bm25"])) > 1e-4


def test_the_weights_start_as_the_config_says_and_are_whole_everywhere():
  boxed = jax.eval_shape(
    lambda key: MODEL.init(key, BATCH)["params"], jax.random.key(0)
  )
  specs = nn.get_partition_spec(boxed)["hybrid"]
  assert set(specs) == {"log_dense", "log_bm25"}
  assert all(tuple(spec) == () for spec in specs.values())

  @jax.jit
  def start(key):
    return nn.meta.unbox(MODEL.init(key, BATCH))["params"]["hybrid"]

  weights = learned_weights({"hybrid": start(jax.random.key(0))})
  np.testing.assert_allclose(weights, [A_START, B_START], rtol=1e-6)


def test_a_model_of_embeddings_alone_has_no_weights():
  model = make_model(hybrid=False)
  batch = BATCH.replace(bm25_scores=None)
  shapes = jax.eval_shape(
    lambda key: model.init(key, batch)["params"], jax.random.key(0)
  )
  assert set(shapes) == {"question_encoder", "generator"}
  assert learned_weights(shapes) is None


def test_bm25_scores_alone_order_documents_where_embeddings_are_alike(params):
  same = jnp.ones((B, K, D))

  @jax.jit
  def scores(embeddings):
    batch = BATCH.replace(
      doc_tokens=None, doc_mask=None, doc_embeddings=embeddings
    )
    return MODEL.apply({"params": params}, batch).doc_scores

  got = jnp.asarray(scores(same))
  np.testing.assert_allclose(
    got - got[:, :1],
    B_START * (BATCH.bm25_scores - BATCH.bm25_scores[:, :1]),
    atol=1e-4,
  )
