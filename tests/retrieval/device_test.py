"""Search on devices against the exact one, on one device and on several."""

import re

from indexes import exact
from indexes import overlap
import jax
import jax.numpy as jnp
from linen import normal
import numpy as np
from processes import pytest_on_eight_devices
import pytest
from several_devices import SEVERAL
from several_devices import mesh_of
from several_devices import over

from rag_jax.retrieval.device import gather_embeddings
from rag_jax.retrieval.device import gather_passages
from rag_jax.retrieval.device import place_arrays
from rag_jax.retrieval.device import place_tokens
from rag_jax.retrieval.device import search_device

P, R, L = 203, 16, 5


STORAGES = pytest.mark.parametrize("storage", ["float32", "bfloat16", "int8"])
search = jax.jit(search_device, static_argnames="n_docs")


@over(2, 4, 8)
def test_the_exact_passages_are_found(count):
  embeddings, questions = normal(P, R), normal(6, R, seed=1)
  # Chunks that do not divide the rows, and more documents than a chunk has.
  arrays = place_arrays(embeddings, mesh_of(count), chunk_passages=7)
  ids, scores = search(arrays, questions, n_docs=9)
  expected, expected_scores = exact(embeddings).search(questions, 9)
  np.testing.assert_array_equal(ids, expected)
  np.testing.assert_allclose(scores, expected_scores, rtol=1e-5, atol=1e-5)


@over(2, 8)
@pytest.mark.parametrize(
  ("storage", "chunk_passages"), [("float32", 0), ("int8", 7)]
)
def test_of_equal_passages_the_smaller_ids_come_first(
  count, chunk_passages, storage
):
  # Seven passages, each many times, on all devices and in all chunks.
  embeddings = np.concatenate([normal(7, R)] * 29)
  questions = np.concatenate([normal(5, R, seed=1), np.zeros((1, R))])
  settings = {"storage": storage, "chunk_passages": chunk_passages}
  arrays = place_arrays(embeddings, mesh_of(count), **settings)
  ids, scores = search(arrays, questions, n_docs=40)
  expected, _ = exact(embeddings).search(questions.astype(np.float32), 40)
  np.testing.assert_array_equal(ids, expected)
  assert np.all(np.diff(np.asarray(scores)[:, :29]) == 0)


@over(8)
def test_equal_passages_stay_equal_where_a_matrix_product_rounds_them_apart(
  count,
):
  # For one question XLA on a CPU sums the last of these rows in another order.
  same = np.arange(0, 97, 8)
  for seed in (1, 2, 3):
    question, embeddings = normal(1, 100, seed=seed), normal(97, 100)
    embeddings[same] = embeddings[0] + question / 3
    arrays = place_arrays(embeddings, mesh_of(count))
    ids, scores = search(arrays, question, n_docs=5)
    np.testing.assert_array_equal(ids[0], same[:5])
    assert len(np.unique(scores)) == 1


@over(8)
@pytest.mark.parametrize("num_passages", [1, 9])
def test_rows_that_fill_up_are_never_found(count, num_passages):
  # Every real score is negative, that of a row of zeros would be 0.
  embeddings = -np.abs(normal(num_passages, R))
  questions = np.abs(normal(4, R, seed=1))
  questions[3] = np.nan  # of a training that diverged
  for settings in ({}, {"chunk_passages": 1}, {"recall_target": 0.9}):
    arrays = place_arrays(embeddings, mesh_of(count), **settings)
    ids, scores = search(arrays, questions, n_docs=num_passages)
    np.testing.assert_array_equal(
      np.sort(ids, axis=1), [np.arange(num_passages)] * 4
    )
    assert np.all(np.isfinite(scores[:3]))


@over(8)
@pytest.mark.parametrize("storage", ["bfloat16", "int8"])
def test_what_is_gathered_are_the_rows_themselves(count, storage):
  embeddings = normal(P, R)
  tokens = np.random.default_rng(1).integers(0, 60_000, (P, L), np.uint16)
  lengths = np.arange(P) % (L + 1)
  arrays = place_arrays(embeddings, mesh_of(count), storage=storage)
  arrays = place_tokens(arrays, tokens, lengths)
  ids = np.random.default_rng(2).integers(0, P, (4, 3), np.int32)
  found, mask = jax.jit(gather_passages)(arrays, ids)
  assert found.dtype == np.int32
  np.testing.assert_array_equal(found, tokens[ids])
  np.testing.assert_array_equal(mask, np.arange(L) < lengths[ids][..., None])
  rows = np.asarray(jax.jit(gather_embeddings)(arrays, ids))
  step = np.abs(embeddings[ids]).max(axis=-1, keepdims=True)
  allowed = {"bfloat16": 2**-8, "int8": 0.5 / 127}[storage]
  assert np.all(np.abs(rows - embeddings[ids]) <= allowed * step * 1.0001)


@over(2, 8)
def test_a_step_searches_and_gathers_while_gradients_flow_around_it(count):
  mesh = mesh_of(count)
  embeddings, inputs = normal(P, R), normal(8, 4, seed=1)
  tokens = np.arange(P * L).reshape(P, L) % 11
  lengths = np.full(P, L)
  arrays = place_tokens(place_arrays(embeddings, mesh), tokens, lengths)

  def loss(params, arrays, inputs):
    questions = inputs @ params["tower"]
    ids, _ = search_device(arrays, questions, 3)
    doc_tokens, mask = gather_passages(arrays, ids)
    docs = jnp.mean(params["table"][doc_tokens], axis=2, where=mask[..., None])
    scores = jnp.einsum("BR,BKR->BK", questions, docs)
    return -jnp.mean(jax.nn.log_softmax(scores)[:, 0])

  params = {"tower": normal(4, R, seed=2), "table": normal(11, R, seed=3)}
  ids, _ = exact(embeddings).search(inputs @ params["tower"], 3)

  def by_hand(params):
    questions = inputs @ params["tower"]
    docs = jnp.mean(params["table"][tokens[ids]], axis=2)
    scores = jnp.einsum("BR,BKR->BK", questions, docs)
    return -jnp.mean(jax.nn.log_softmax(scores)[:, 0])

  with jax.set_mesh(mesh):
    sharding = jax.NamedSharding(mesh, jax.P("data"))
    grads = jax.jit(jax.grad(loss))(
      params, arrays, jax.device_put(inputs, sharding)
    )
  expected = jax.grad(by_hand)(params)
  for name in params:
    assert np.abs(expected[name]).max() > 1e-3
    np.testing.assert_allclose(grads[name], expected[name], atol=1e-5)


@over(2, 8)
@pytest.mark.parametrize(
  ("recall_target", "chunk_passages"), [(1.0, 7), (0.9, 0)]
)
def test_only_the_winners_travel_between_devices(
  count, chunk_passages, recall_target
):
  b, k = 6, 3
  settings = {"chunk_passages": chunk_passages, "recall_target": recall_target}
  arrays = place_arrays(normal(P, R), mesh_of(count), **settings)
  questions = normal(b, R)
  program = search.lower(arrays, questions, n_docs=k).compile().as_text()
  sizes = [
    np.prod([int(n) for n in shape.split(",")])
    for line in program.splitlines()
    if re.search(r"= .*\b(all-\w+|collective-\w+|reduce-scatter)\(", line)
    for shape in re.findall(r"\w\d+\[([\d,]+)\]", line.split("metadata")[0])
  ]
  assert sizes or count == 1
  assert max(sizes, default=0) <= b * k * count < b * P // 8


@over(8)
def test_an_approximate_search_reaches_its_recall_target(count):
  embeddings, questions = normal(4000, R), normal(50, R, seed=1)
  settings = {"recall_target": 0.9, "chunk_passages": 100}
  arrays = place_arrays(embeddings, mesh_of(count), **settings)
  program = search.lower(arrays, questions, n_docs=10).as_text()
  assert "ApproxTopK" in program
  ids, _ = search(arrays, questions, n_docs=10)
  expected, _ = exact(embeddings).search(questions, 10)
  assert overlap(ids, expected) >= 0.9


@STORAGES
def test_fewer_bits_find_nearly_the_same(storage):
  embeddings, questions = normal(2000, 64), normal(50, 64, seed=1)
  arrays = place_arrays(embeddings, mesh_of(1), storage=storage)
  size = {"float32": 4, "bfloat16": 2, "int8": 1}[storage]
  assert arrays.embeddings.nbytes == 2000 * 64 * size
  ids, scores = search(arrays, questions, n_docs=10)
  expected, expected_scores = exact(embeddings).search(questions, 10)
  least = {"float32": 1.0, "bfloat16": 0.95, "int8": 0.9}[storage]
  assert overlap(ids, expected) >= least
  np.testing.assert_allclose(scores, expected_scores, rtol=0.02)


@pytest.mark.parametrize("n_docs", [0, P + 1])
def test_more_passages_than_there_are_cannot_be_asked_for(n_docs):
  arrays = place_arrays(normal(P, R), mesh_of(1))
  with pytest.raises(
    ValueError, match=f"data.n_docs={n_docs} .*expected 1 to {P}"
  ):
    search(arrays, normal(2, R), n_docs=n_docs)


def test_questions_of_another_size_are_refused():
  arrays = place_arrays(normal(P, R), mesh_of(1))
  with pytest.raises(ValueError, match=r"shape \(2, 17\), but .* 16-dim"):
    search(arrays, normal(2, R + 1), n_docs=2)


def test_tokens_of_other_passages_are_refused():
  arrays = place_arrays(normal(P, R), mesh_of(1))
  with pytest.raises(ValueError, match="tokens of 4 passages and 4 lengths"):
    place_tokens(arrays, np.zeros((4, L), int), np.zeros(4, int))


def test_gathering_without_tokens_says_how_to_bring_them():
  arrays = place_arrays(normal(P, R), mesh_of(1))
  with pytest.raises(ValueError, match=r"no tokens.*Call place_tokens"):
    gather_passages(arrays, jnp.zeros((1, 1), int))


@pytest.mark.skipif(SEVERAL, reason="this is the process that it starts")
def test_all_of_this_holds_on_two_four_and_eight_devices():
  printed = pytest_on_eight_devices(__file__, "over")
  assert re.search(r"\b1\d passed, \d+ deselected", printed), printed
