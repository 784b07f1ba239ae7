"""Embeddings do not depend on blocks; a snapshot is not what is trained."""

import functools
import os
import subprocess
import sys

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rag_jax.config import Config
from rag_jax.config import IndexConfig
from rag_jax.config import MeshConfig
from rag_jax.models.partitioning import make_mesh
from rag_jax.models.rag import build_model
from rag_jax.retrieval import retriever as retriever_lib
from rag_jax.retrieval.exact import ExactIndex
from rag_jax.retrieval.retriever import Embedder
from rag_jax.retrieval.retriever import IndexBuilder
from rag_jax.retrieval.retriever import RetrieverSnapshots
from rag_jax.retrieval.retriever import fingerprint
from rag_jax.retrieval.retriever import padded_length

P, L, R, V = 11, 9, 16, 50  # R is D: there is no projection


def tokens_of(rows):
  """Tokens and mask of passages, of any number; each row has its own."""
  rows = np.asarray(rows)
  tokens = (rows[:, None] * 7 + np.arange(L) * 3) % V
  mask = np.arange(L) < 2 + rows[:, None] % (L - 1)
  return tokens.astype(np.int32), mask


def make_model(**encoder):
  config = Config()
  config.encoder.embed_dim, config.encoder.mlp_dim = R, 32
  for name, value in encoder.items():
    setattr(config.encoder, name, value)
  model = build_model(config, vocab_size=V, decoder_start_id=2)
  tokens, mask = map(jnp.asarray, tokens_of(range(2)))
  params = {"generator": {"bias": jnp.ones(3)}}
  for seed, method in enumerate(("embed_passages", "embed_questions")):
    init = jax.jit(functools.partial(model.init, method=method))
    boxed = init(jax.random.key(seed), tokens, mask)
    params |= nn.meta.unbox(boxed["params"])
  return model, params


@pytest.fixture(scope="module")
def untied():
  return make_model(tied=False, score_scale=3.0)


@pytest.fixture(scope="module")
def embedder(untied):
  model, _ = untied
  return Embedder(model, 4)


@functools.cache
def snapshots():
  return RetrieverSnapshots(make_mesh(MeshConfig(data=1)))


def retriever_of(params):
  return snapshots().take(params)


@pytest.mark.parametrize("block", [1, 4, P, 64])
def test_embeddings_in_blocks_are_those_of_all_at_once(untied, block):
  model, params = untied
  got = Embedder(model, block).passages(retriever_of(params), tokens_of, P)
  assert got.shape == (P, R)
  assert got.dtype == np.float32
  expected = model.apply(
    {"params": params},
    *map(jnp.asarray, tokens_of(range(P))),
    method="embed_passages",
  )
  np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_passages_of_like_length_share_a_block_without_the_padding_of_others():
  shapes = []

  class Lengths(nn.Module):
    def embed_passages(self, tokens, mask):
      shapes.append(tokens.shape)
      pair = jnp.stack([tokens[:, 0], mask.sum(axis=1)], axis=1)
      return pair.astype(jnp.float32)

    def embed_questions(self, tokens, mask):
      raise NotImplementedError

  lengths = np.array([3, 90, 17, 40, 8, 64, 128, 1, 33])

  def passage_tokens(rows):
    mask = np.arange(128) < lengths[rows][:, None]
    return np.where(mask, rows[:, None], 0).astype(np.int32), mask

  got = Embedder(Lengths(), 2).rows({}, passage_tokens, np.arange(9))
  np.testing.assert_array_equal(got[:, 0], np.arange(9))
  np.testing.assert_array_equal(got[:, 1], lengths)
  # In pairs by length, each of whose widths is traced once.
  assert shapes == [(2, 8), (2, 24), (2, 40), (2, 96), (2, 128)]


@pytest.mark.parametrize("longest", [5, 256, 300])
def test_padded_lengths_are_few_and_close(longest):
  padded = {n: padded_length(n, longest) for n in range(1, longest + 1)}
  assert all(n <= to <= longest for n, to in padded.items())
  assert all(to - n < max(8, n / 8) for n, to in padded.items())
  assert len(set(padded.values())) <= 8 + 8 * 3


def test_questions_and_passages_have_towers_of_their_own(untied, embedder):
  model, params = untied
  retriever = retriever_of(params)
  tokens, mask = tokens_of(range(P))
  questions = embedder.questions(retriever, tokens, mask)
  expected = model.apply(
    {"params": params},
    jnp.asarray(tokens),
    jnp.asarray(mask),
    method="embed_questions",
  )
  np.testing.assert_allclose(questions, expected, rtol=1e-5, atol=1e-6)
  passages = embedder.passages(retriever, tokens_of, P)
  assert np.abs(questions - passages).max() > 0.1


def test_tied_towers_differ_by_the_score_scale_alone():
  model, params = make_model(score_scale=3.0)
  embedder = Embedder(model, P)
  retriever = retriever_of(params)
  questions = embedder.questions(retriever, *tokens_of(range(P)))
  passages = embedder.passages(retriever, tokens_of, P)
  np.testing.assert_allclose(questions, 3.0 * passages, rtol=1e-5, atol=1e-6)


def test_padding_does_not_change_an_embedding(untied, embedder):
  _, params = untied
  tokens, mask = tokens_of(range(P))
  other = np.where(mask, tokens, (tokens + 1) % V).astype(np.int32)
  np.testing.assert_allclose(
    embedder.questions(retriever_of(params), tokens, mask),
    embedder.questions(retriever_of(params), other, mask),
    rtol=1e-6,
  )


def test_the_parameters_that_are_given_embed(untied, embedder):
  _, params = untied
  before = embedder.passages(retriever_of(params), tokens_of, P)
  doubled = jax.tree.map(lambda x: 2 * x, params)
  after = embedder.passages(retriever_of(doubled), tokens_of, P)
  assert np.abs(before - after).max() > 0.1


def test_a_snapshot_holds_all_but_the_generator(untied):
  _, params = untied
  snapshot = retriever_of(params)
  assert set(snapshot) == {"question_encoder", "passage_encoder"}
  assert "generator" in params
  jax.tree.map(
    np.testing.assert_array_equal,
    snapshot,
    {k: v for k, v in params.items() if k != "generator"},
  )


def test_a_learned_score_scale_is_part_of_the_snapshot():
  model, params = make_model(learn_score_scale=True, score_scale=2.0)
  snapshot = retriever_of(params)
  assert set(snapshot) == {"question_encoder", "log_score_scale"}
  embedder = Embedder(model, P)
  scaled = snapshot | {"log_score_scale": jnp.log(6.0)}
  np.testing.assert_allclose(
    embedder.questions(scaled, *tokens_of(range(P))),
    3 * embedder.questions(snapshot, *tokens_of(range(P))),
    rtol=1e-5,
  )


def test_a_snapshot_outlives_the_parameters_that_the_next_step_takes(
  untied, embedder
):
  _, params = untied
  params = jax.tree.map(jnp.copy, params)  # these are given away below
  expected = jax.tree.map(np.array, params)
  embeddings = embedder.passages(retriever_of(params), tokens_of, P)
  snapshot = retriever_of(params)
  step = jax.jit(
    lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0
  )
  jax.block_until_ready(step(params))
  assert all(x.is_deleted() for x in jax.tree.leaves(params))
  for name, tree in snapshot.items():
    jax.tree.map(np.testing.assert_array_equal, tree, expected[name])
  np.testing.assert_array_equal(
    embedder.passages(snapshot, tokens_of, P), embeddings
  )


def test_a_copy_for_questions_leaves_out_the_passage_encoder_and_is_logged(
  untied, embedder, monkeypatch
):
  _, params = untied
  lines = []
  monkeypatch.setattr(
    retriever_lib.logging, "info", lambda text, *args: lines.append(text % args)
  )
  copies = RetrieverSnapshots(make_mesh(MeshConfig(data=1)))
  for _ in range(2):
    whole = copies.take(params)
    part = copies.take(params, embeds_passages=False)
  assert whole.keys() - part.keys() == {"passage_encoder"}
  tokens, mask = tokens_of(range(3))
  np.testing.assert_array_equal(
    embedder.questions(part, tokens, mask),
    embedder.questions(whole, tokens, mask),
  )
  assert len(lines) == 2  # once each
  for line, copy in zip(lines, (whole, part), strict=True):
    size = sum(x.nbytes for x in jax.tree.leaves(copy)) / 2**20
    assert f"takes {size:.1f} MiB" in line


SHARDED = """
import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

from rag_jax.config import MeshConfig
from rag_jax.models.partitioning import make_mesh
from rag_jax.retrieval.retriever import RetrieverSnapshots

assert len(jax.devices()) == 4
mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2))
kernel = np.arange(32.0, dtype=np.float32).reshape(4, 8)
params = {
  "question_encoder": {
    "kernel": jax.device_put(
      kernel, NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))
    ),
    "bias": jax.device_put(
      kernel[0], NamedSharding(mesh, PartitionSpec())
    ),
  },
  "generator": {},
}
assert params["question_encoder"]["kernel"].addressable_data(0).shape == (2, 4)
tower = RetrieverSnapshots(mesh).take(params)["question_encoder"]
for name, expected in (("kernel", kernel), ("bias", kernel[0])):
  np.testing.assert_array_equal(tower[name], expected)
  assert len(tower[name].devices()) == 1, tower[name].devices()
print("whole")
"""


def test_a_snapshot_of_sharded_parameters_is_whole_on_one_device():
  printed = subprocess.run(
    [sys.executable, "-c", SHARDED],
    check=True,
    capture_output=True,
    text=True,
    env=os.environ
    | {
      "JAX_PLATFORMS": "cpu",
      "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
      "PYTHONPATH": os.pathsep.join(sys.path),
    },
  ).stdout
  assert printed == "whole\n"


def test_the_fingerprint_changes_with_any_weight_of_the_passage_tower(untied):
  _, params = untied
  params = retriever_of(params)
  tower = params["passage_encoder"]
  leaves, structure = jax.tree.flatten(tower)
  fingerprints = {fingerprint(params)}
  for i, leaf in enumerate(leaves):
    last = (-1,) * leaf.ndim
    changed = np.array(leaf)
    changed[last] = np.nextafter(changed[last], np.float32(10))
    tower = structure.unflatten([*leaves[:i], changed, *leaves[i + 1 :]])
    fingerprints.add(fingerprint(params | {"passage_encoder": tower}))
  assert len(fingerprints) == len(leaves) + 1


def test_the_question_tower_may_learn_while_the_index_stays(untied):
  _, params = untied
  params = retriever_of(params)
  moved = jax.tree.map(lambda x: x + 1, params["question_encoder"])
  assert fingerprint(params) == fingerprint(
    params | {"question_encoder": moved}
  )


def test_equal_weights_have_one_fingerprint_wherever_they_are(untied):
  _, params = untied
  host = jax.tree.map(np.array, params)
  backwards = dict(reversed(host.items()))
  assert list(backwards) != list(host)
  assert fingerprint(params) == fingerprint(host) == fingerprint(backwards)


def test_a_built_index_holds_every_passage_and_where_it_is_from(
  untied, embedder
):
  _, params = untied
  builder = IndexBuilder(
    embedder, tokens_of, P, "3c4d", IndexConfig(kind="exact")
  )
  retriever = retriever_of(params)
  index = builder.build(retriever)
  assert index.kind == "exact"
  assert (index.num_passages, index.embedding_dim) == (P, R)
  assert index.encoder_fingerprint == fingerprint(retriever)
  assert index.passages_fingerprint == "3c4d"
  embeddings = embedder.passages(retriever, tokens_of, P)
  np.testing.assert_array_equal(index.embeddings, embeddings)
  questions = embedder.questions(retriever, *tokens_of(range(3)))
  ids, _ = index.search(questions, 2)
  best = np.argsort(-questions @ embeddings.T, axis=1)[:, :2]
  np.testing.assert_array_equal(ids, best)


def test_an_index_that_finds_too_little_is_refused_when_it_is_built(
  untied, embedder, monkeypatch
):
  class Worst(ExactIndex):
    def search(self, question_embeddings, n_docs):
      return super().search(-question_embeddings, n_docs)

  def build_worst(embeddings, config, *, num_passages, **fingerprints):
    assert not num_passages  # not spread over processes
    return Worst(embeddings, **fingerprints)

  monkeypatch.setattr(retriever_lib, "build_index", build_worst)
  retriever = retriever_of(untied[1])
  config = IndexConfig(kind="exact", min_recall=0.9)
  builder = IndexBuilder(embedder, tokens_of, P, "3c4d", config, 1)
  with pytest.raises(ValueError, match=r"finds too little.*min_recall=0\.9"):
    builder.build(retriever)
  config.min_recall = 0.0
  index = builder.build(retriever)
  assert index.certificate is None  # nobody asked
  config.min_recall = 0.9
  with pytest.raises(ValueError, match="finds too little"):
    builder.check(index)
  assert index.certificate.recall(1).mean < 0.9
