"""A step that searches, against the same by hand, on one device and on eight.

Run as a program, this file trains on eight simulated devices, arranged in
several ways, and prints what it saw as JSON.
"""

import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from processes import run_on_eight_devices
import pytest

from rag_jax import losses
from rag_jax.config import Config
from rag_jax.config import MeshConfig
from rag_jax.config import OptimizerConfig
from rag_jax.config_models import EncoderConfig
from rag_jax.config_models import GeneratorConfig
from rag_jax.data.step_batches import QuestionBatch
from rag_jax.models import partitioning
from rag_jax.models.batch import RagBatch
from rag_jax.models.rag import build_model
from rag_jax.retrieval.device import place_arrays
from rag_jax.retrieval.device import place_tokens
from rag_jax.training.objectives import marginal_loss
from rag_jax.training.optimizer import make_optimizer
from rag_jax.training.search_in_step import DOC_IDS
from rag_jax.training.search_in_step import InStep
from rag_jax.training.search_in_step import StepIndex
from rag_jax.training.state import init_params
from rag_jax.training.state import make_state
from rag_jax.training.step import compile_update
from rag_jax.training.step import update

ONE = "1x1x1"  # data x fsdp x tensor
MESHES = [ONE, "8x1x1", "2x2x2"]
STEPS = 5

B, K, C, T, Q, L, V, D, P, BOS, PAD = 8, 3, 12, 4, 4, 6, 24, 16, 45, 0, 1
RNG = np.random.default_rng(0)
# Without a start token, of which the retriever has one. The generator has other
# ids, and fewer of them.
PASSAGES = RNG.integers(3, V, (P, L - 1), np.uint16)
LENGTHS = RNG.integers(1, L, P)
BODIES = RNG.integers(3, V, (P, L + 2), np.int32)
BODY_LENGTHS = RNG.integers(1, L + 3, P)


def make_model():
  config = Config()
  config.encoder = EncoderConfig(
    embed_dim=D, num_heads=8, mlp_dim=16, tied=False
  )
  config.generator = GeneratorConfig(
    num_layers=1, embed_dim=D, num_heads=8, mlp_dim=16, max_positions=16
  )
  return build_model(config, vocab_size=V, decoder_start_id=2)


MODEL = make_model()


def make_questions():
  rng = np.random.default_rng(1)
  head_mask = np.arange(C) < rng.integers(2, C, (B, 1))
  return QuestionBatch(
    question_tokens=rng.integers(V, size=(B, Q), dtype=np.int32),
    question_mask=np.ones((B, Q), bool),
    head_tokens=np.where(
      head_mask, rng.integers(3, V, (B, C), np.int32), np.int32(PAD)
    ),
    head_mask=head_mask,
    target_tokens=rng.integers(V, size=(B, T), dtype=np.int32),
    target_mask=np.arange(T) < rng.integers(1, T + 1, (B, 1)),
  )


def batch_by_hand(questions, ids):
  """The batch of documents `ids`, one token after the other."""
  docs = np.full((B, K, L), 9, np.int32)  # what padding holds does not matter
  doc_mask = np.zeros((B, K, L), bool)
  contexts = np.full((B, K, C), PAD, np.int32)
  context_mask = np.zeros((B, K, C), bool)
  for b, k in np.ndindex(B, K):
    row = ids[b, k]
    doc = [BOS, *PASSAGES[row, : LENGTHS[row]].tolist()]
    docs[b, k, : len(doc)] = doc
    doc_mask[b, k, : len(doc)] = True
    head = questions.head_tokens[b][questions.head_mask[b]].tolist()
    row = [*head, *BODIES[row, : BODY_LENGTHS[row]].tolist()][:C]
    contexts[b, k, : len(row)] = row
    context_mask[b, k, : len(row)] = True
  return RagBatch(
    context_tokens=contexts,
    context_mask=context_mask,
    target_tokens=questions.target_tokens,
    target_mask=questions.target_mask,
    question_tokens=questions.question_tokens,
    question_mask=questions.question_mask,
    doc_tokens=docs,
    doc_mask=doc_mask,
  )


@functools.partial(jax.jit, static_argnames="method")
def embed(params, tokens, mask, method):
  return MODEL.apply({"params": params}, tokens, mask, method=method)


def embed_rows(params, rows):
  """Embeddings of passages, as the tower reads them."""
  start = np.full((len(rows), 1), BOS, np.int32)
  tokens = np.concatenate([start, PASSAGES[rows].astype(np.int32)], axis=1)
  mask = np.arange(L) < 1 + LENGTHS[rows, None]
  return np.asarray(embed(params, tokens, mask, "embed_passages"))


class Training:
  """The compiled update of a mesh, and a state before its first step."""

  def __init__(self, name=ONE):
    data, fsdp, tensor = map(int, name.split("x"))
    self.mesh = partitioning.make_mesh(
      MeshConfig(data=data, fsdp=fsdp, tensor=tensor),
      jax.devices()[: data * fsdp * tensor],
    )
    self.questions = make_questions()
    example = jax.tree.map(
      jnp.asarray, batch_by_hand(self.questions, np.zeros((B, K), int))
    )
    params, layout = init_params(
      lambda key: MODEL.init(key, example)["params"],
      jax.random.key(0),
      self.mesh,
    )
    # Fresh kernels are so small that all passages would be about alike.
    params = jax.tree.map(lambda x: 5 * x if x.ndim > 1 else x, params)
    self.loss_fn = functools.partial(
      marginal_loss, model=MODEL, nll_fn=losses.marginal_token_nll
    )
    config = OptimizerConfig(
      peak_lr=0.03,
      retriever_lr=0.03,
      schedule="constant",
      warmup_steps=0,
      eps=1e-2,  # above the noise of a gradient that is zero
    )
    self.optimizer = make_optimizer(config, params, STEPS)
    self.state, layout = make_state(params, layout, self.optimizer, self.mesh)
    # Somewhere else than where the passages are: the first steps find others.
    embeddings = np.random.default_rng(3).normal(size=(P, D))
    self.first = np.float32(embeddings)
    arrays = place_arrays(self.first, self.mesh, chunk_passages=2)
    generator = place_tokens(arrays, BODIES, BODY_LENGTHS)
    index = StepIndex(
      place_tokens(arrays, PASSAGES, LENGTHS),
      generator.tokens,
      generator.lengths,
    )
    self.state = self.state.replace(index=index)
    self.in_step = InStep(
      model=MODEL, n_docs=K, refresh_rows=20, bos_id=BOS
    )  # 45 passages in 3 turns
    self.update = compile_update(
      self.loss_fn,
      self.optimizer,
      layout.replace(index=jax.tree.map(lambda x: x.sharding, index)),
      self.mesh,
      "train",
      self.in_step.update,
    )

  def step(self, state):
    """Returns the state after one update, and its metrics."""
    return self.update(state, self.questions, jax.random.key(1))


@pytest.fixture(scope="module")
def training():
  return Training()


def test_a_step_is_a_search_an_update_and_an_embedding_by_hand(training):
  index = training.first.copy()
  embedded_at = np.zeros(P, int)
  # A copy, because the state is donated to the step.
  state = jax.tree.map(jnp.copy, training.state)
  alone = jax.tree.map(jnp.copy, training.state.replace(index=None))
  plain = jax.jit(
    functools.partial(
      update,
      loss_fn=training.loss_fn,
      optimizer=training.optimizer,
      stage="train",
    )
  )
  questions = training.questions
  found = []
  for step in range(1, STEPS + 1):
    asked = embed(
      alone.params,
      questions.question_tokens,
      questions.question_mask,
      "embed_questions",
    )
    ids = np.argsort(-(np.asarray(asked) @ index.T), axis=1)[:, :K]
    found.append(ids)
    by_hand = batch_by_hand(questions, ids)
    alone, expected = plain(alone, by_hand, jax.random.key(1))
    rows = np.flatnonzero(np.arange(P) % 3 == step % 3)
    index[rows] = embed_rows(alone.params, rows)
    embedded_at[rows] = step

    state, metrics = training.step(state)
    for name, value in expected.items():
      np.testing.assert_allclose(metrics[name], value, rtol=1e-4, err_msg=name)
    arrays = state.index.arrays
    np.testing.assert_allclose(arrays.embeddings[:P], index, atol=1e-4)
    np.testing.assert_array_equal(arrays.embedded_at[:P], embedded_at)
    age = step - embedded_at
    np.testing.assert_allclose(
      metrics["train/index_staleness_steps"], age.mean(), rtol=1e-6
    )
    assert metrics["train/index_staleness_max_steps"] == age.max()
    np.testing.assert_allclose(
      metrics["train/distinct_docs"], len(np.unique(ids)) / ids.size, rtol=1e-6
    )
    sizes = questions.head_mask.sum(axis=1)[:, None] + BODY_LENGTHS[ids]
    assert metrics["train/contexts_cut"] == np.mean(sizes > C)
    assert 0 < np.mean(sizes > C) < 1
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4),
    state.params,
    alone.params,
  )
  # What is embedded again is found otherwise.
  assert np.any(np.sort(found[0]) != np.sort(found[-1]))


def test_the_index_is_written_where_it_lies(training):
  state = jax.tree.map(jnp.copy, training.state)
  held = state.index.arrays
  training.step(state)
  assert held.embeddings.is_deleted()
  assert held.tokens.is_deleted()


def train(name):
  """Returns what happens on the mesh called `name`, as JSON can hold it."""
  training = Training(name)
  state, history = training.state, []
  for _ in range(STEPS):
    state, metrics = training.step(state)
    metrics.pop(DOC_IDS)
    history.append({k: float(v) for k, v in metrics.items()})
  arrays = state.index.arrays
  return {
    "metrics": history,
    "params": {
      jax.tree_util.keystr(path): np.asarray(x).tolist()
      for path, x in jax.tree_util.tree_leaves_with_path(state.params)
    },
    "embeddings": np.asarray(arrays.embeddings)[:P].tolist(),
    "embedded_at": np.asarray(arrays.embedded_at)[:P].tolist(),
    "held": [s.data.shape[0] for s in arrays.embeddings.addressable_shards],
  }


@pytest.fixture(scope="module")
def results():
  return json.loads(run_on_eight_devices(__file__))


@pytest.mark.parametrize("mesh", MESHES[1:])
def test_steps_are_the_same_however_the_devices_are_arranged(mesh, results):
  one, other = results[ONE], results[mesh]
  assert len(set(other["held"])) == 1
  assert len(other["held"]) == 8
  assert other["held"][0] < one["held"][0] / 4
  for a, b in zip(one["metrics"], other["metrics"], strict=True):
    assert a == pytest.approx(b, rel=1e-4)
  assert one["embedded_at"] == other["embedded_at"]
  np.testing.assert_allclose(one["embeddings"], other["embeddings"], atol=1e-4)
  for name, x in one["params"].items():
    np.testing.assert_allclose(other["params"][name], x, atol=1e-5)


if __name__ == "__main__":
  json.dump({name: train(name) for name in MESHES}, sys.stdout)
