"""The search by one product in bfloat16, against sorting all scores.

It is that of accelerators; here a CPU runs it.
"""

import re

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

from rag_jax.retrieval import device
from rag_jax.retrieval.device import RARELY
from rag_jax.retrieval.device import gather_embeddings
from rag_jax.retrieval.device import place_arrays
from rag_jax.retrieval.one_pass import error_per_norm
from rag_jax.retrieval.one_pass import one_pass_scores
from rag_jax.retrieval.one_pass import row_norms

P, R, K = 803, 32, 5  # on 8 devices, more rows each than K and spares
STORAGES = pytest.mark.parametrize("storage", ["float32", "bfloat16", "int8"])
STORED = pytest.mark.parametrize(
  ("storage", "chunk_passages"),
  [("float32", 0), ("bfloat16", 37), ("int8", 37)],
)
STATIC = ("n_docs", "one_pass")
search = jax.jit(device._search, static_argnames=STATIC)


def find(arrays, questions, n_docs=K):
  """Returns ids and scores of one pass, and what each device searched again."""
  return map(np.asarray, search(arrays, questions, n_docs, True))


def best(arrays, questions, n_docs=K):
  """Returns the ids of the largest float64 inner products; the smaller first.

  Of the embeddings as they are stored.
  """
  ids = np.arange(arrays.num_passages)[None]
  stored = np.float64(jax.jit(gather_embeddings)(arrays, ids)[0])
  scores = np.float64(questions) @ stored.T
  return np.argsort(-scores, axis=1, kind="stable")[:, :n_docs]


def whole_numbers(num_passages=P, seed=0):
  """Passages and questions with exact scores, most of which are nearly equal.

  All three types store the passages exactly, and float32 adds their products
  exactly. bfloat16 rounds all numbers of a question to 3072, so that one pass
  finds all passages equal.
  """
  rng = np.random.default_rng(seed)
  embeddings = np.tile(rng.integers(60, 120, R), (num_passages, 1))
  changes = np.repeat([[1, -1]], (R - 2) // 2, axis=0).reshape(1, -1)
  changes = np.tile(changes, (num_passages, 1))
  embeddings[:, 2:] += rng.permuted(changes, axis=1)
  embeddings[:, 0] = 127  # so that 1 is the scale of int8
  questions = 3072 + rng.integers(-7, 8, (6, R))
  return np.float32(embeddings), np.float32(questions)


@over(2, 8)
@STORED
def test_random_passages_are_found_in_one_pass(count, storage, chunk_passages):
  arrays = place_arrays(
    normal(P, R), mesh_of(count), storage=storage, chunk_passages=chunk_passages
  )
  questions = normal(9, R, seed=1)
  ids, scores, repeated = find(arrays, questions)
  np.testing.assert_array_equal(ids, best(arrays, questions))
  expected = search(arrays, questions, K, False)[1]
  np.testing.assert_allclose(scores, expected, rtol=1e-6)
  assert repeated.shape == (count,)
  assert not np.any(repeated)


@over(2, 8)
@STORED
def test_passages_that_bfloat16_cannot_tell_apart_are_searched_again(
  count, storage, chunk_passages
):
  embeddings, questions = whole_numbers()
  arrays = place_arrays(
    embeddings, mesh_of(count), storage=storage, chunk_passages=chunk_passages
  )
  expected = best(arrays, questions)
  rough = np.asarray(one_pass_scores(jnp.array(questions), embeddings))
  # One pass alone would be wrong, even with the spares of one device.
  kept = np.argsort(-rough, axis=1)[:, : K + device._SPARE_ONE_PASS]
  assert overlap(kept, expected) < 0.5
  ids, scores, repeated = find(arrays, questions)
  np.testing.assert_array_equal(ids, expected)
  exact = np.einsum("BR,BKR->BK", questions, embeddings[expected])
  np.testing.assert_array_equal(scores, exact)
  assert np.all(repeated == len(questions))


@over(2, 8)
@STORED
@pytest.mark.parametrize("n_docs", [3, 40])
def test_of_equal_passages_the_smaller_ids_come_first(
  count, storage, chunk_passages, n_docs
):
  # Each passage 29 times, all over the devices and chunks.
  embeddings = np.concatenate([normal(28, R)] * 29)
  arrays = place_arrays(
    embeddings, mesh_of(count), storage=storage, chunk_passages=chunk_passages
  )
  questions = np.concatenate([normal(5, R, seed=1), np.zeros((1, R))])
  ids, scores, repeated = find(arrays, questions, n_docs)
  np.testing.assert_array_equal(ids, best(arrays, questions, n_docs))
  assert np.all(np.diff(scores[:, : min(29, n_docs)]) == 0)
  # For the zeros all passages are equal, for most questions 29 are.
  assert np.all((repeated >= 1) & (repeated < 6))


@over(2, 8)
def test_equal_passages_stay_equal_where_only_one_device_searches_again(count):
  own = 100  # rows of a device
  same = {5, 30, own + 7, *range(count * own - 60, count * own)}
  same = np.array(sorted(x for x in same if x < count * own))
  for seed in range(3):
    question = normal(1, 100, seed=seed)
    embeddings = normal(count * own, 100, seed=10 + seed)
    embeddings[same] = embeddings[0] + question[0]
    arrays = place_arrays(embeddings, mesh_of(count))
    ids, scores, repeated = find(arrays, question)
    np.testing.assert_array_equal(ids[0], same[:K])
    assert len(np.unique(scores[0])) == 1
    assert repeated[-1] == 1
    assert not np.any(repeated[:-1])


@over(8)
def test_only_the_devices_that_may_hold_the_best_search_again(count):
  embeddings, questions = whole_numbers(count * 100)
  embeddings[100:] = -embeddings[100:]
  arrays = place_arrays(embeddings, mesh_of(count))
  ids, _, repeated = find(arrays, questions)
  np.testing.assert_array_equal(ids, best(arrays, questions))
  assert repeated[0] == len(questions)
  assert not np.any(repeated[1:])


@over(8)
@pytest.mark.parametrize("at_a_time", [1, 4, 100])
def test_only_the_questions_that_need_it_are_searched_again(
  count, at_a_time, monkeypatch
):
  monkeypatch.setattr(device, "_REPEAT", at_a_time)
  embeddings, close = whole_numbers()
  # Half of the passages are near, for some questions, and the others are not.
  embeddings[::2] = 20 * normal(len(embeddings[::2]), R)
  arrays = place_arrays(embeddings, mesh_of(count))
  questions = 500 * normal(11, R, seed=1)
  questions[:, 0] = -5000
  questions[1::2] = close[:5]
  run = jax.jit(lambda *a: device._search(*a, K, True))
  ids, _, repeated = map(np.asarray, run(arrays, questions))
  np.testing.assert_array_equal(ids, best(arrays, questions))
  assert np.all(repeated == 5)


@over(8)
@STORED
def test_numbers_at_the_limits_give_what_full_precision_gives(
  count, storage, chunk_passages
):
  embeddings, questions = normal(P, R), normal(12, R, seed=1)
  embeddings[7] *= 1e6  # of a large norm, and near no question
  embeddings[11:60] *= 1e-25
  embeddings[60:70] = 0
  questions[:8] *= np.float32([1e-42, 1e-35, 1e-20, 1e20, 1e29, 1e30, 1, 1])[
    :, None
  ]
  questions[6] = 0
  questions[7] = np.finfo(np.float32).max
  questions[8, 3] = np.nan
  questions[9, :2] = np.inf, -np.inf
  arrays = place_arrays(
    embeddings, mesh_of(count), storage=storage, chunk_passages=chunk_passages
  )
  ids, scores, _ = find(arrays, questions)
  expected = search(arrays, questions, K, False)
  sure = np.delete(np.arange(12), [7, 8, 9])
  np.testing.assert_array_equal(ids[sure], np.asarray(expected[0])[sure])
  np.testing.assert_allclose(
    scores[sure], np.asarray(expected[1])[sure], rtol=1e-6
  )
  assert np.all((ids >= 0) & (ids < P))


def test_a_passage_of_a_large_norm_does_not_spoil_the_proof():
  embeddings = normal(P, R)
  embeddings[7] *= 1e6
  arrays = place_arrays(embeddings, mesh_of(1))
  questions = normal(9, R, seed=1)
  ids, _, repeated = find(arrays, questions)
  np.testing.assert_array_equal(ids, best(arrays, questions))
  assert not np.any(repeated)


@over(8)
@pytest.mark.parametrize("num_passages", [1, 9, 300])
def test_rows_that_fill_up_are_never_found(count, num_passages):
  # Every real score is negative, that of a row of zeros would be 0.
  embeddings = -np.abs(normal(num_passages, R))
  questions = np.abs(normal(4, R, seed=1))
  questions[3] = np.nan  # of a training that diverged
  n_docs = min(num_passages, 60)
  for settings in ({}, {"chunk_passages": 1}, {"recall_target": 0.9}):
    arrays = place_arrays(embeddings, mesh_of(count), **settings)
    ids, scores, _ = find(arrays, questions, n_docs)
    if "recall_target" not in settings:
      np.testing.assert_array_equal(
        ids[:3], best(arrays, questions[:3], n_docs)
      )
    assert np.all(np.isfinite(scores[:3]))
    assert np.all((ids >= 0) & (ids < num_passages))
    assert all(len(set(row)) == n_docs for row in ids)


@STORAGES
@pytest.mark.parametrize("dim", [1, 32, 768])
def test_no_score_is_further_off_than_the_bound(storage, dim):
  arrays = place_arrays(worst_rows(dim, storage), mesh_of(1), storage=storage)
  stored, scales = np.asarray(arrays.embeddings), arrays.scales
  rows = np.float64(stored) * (1 if scales is None else scales[:, None])
  questions = worst_questions(dim)
  exact = np.float64(questions) @ rows.T
  found = np.float64(one_pass_scores(jnp.array(questions), stored))
  if scales is not None:
    found *= np.asarray(scales)
  error = error_per_norm(jnp.array(questions), stored.dtype)
  bounds = np.outer(error, arrays.norms)
  off = np.abs(found - exact)
  assert np.all(off <= bounds)
  assert np.max(off / bounds) > 0.5  # it says something


def worst_questions(dim):
  """Half way between two bfloat16 numbers, nearly; and random ones."""
  halves = 1 + 2.0**-7 * np.random.default_rng(0).integers(0, 128, (5, dim))
  halves = (halves + 2.0**-8 - 2.0**-20).astype(np.float32)
  halves[0] = 1 + 2.0**-8 - 2.0**-20
  return np.concatenate([halves, -halves, normal(20, dim)])


def worst_rows(dim, storage):
  """Rows whose products with such questions are all too small, or too large."""
  rows = np.ones((9, dim), np.float32)
  if storage == "float32":
    rows += 2.0**-8 - 2.0**-20
  rows[1] *= -1
  rows[2:] = normal(7, dim)
  return rows


def test_the_norms_are_those_of_the_rows_as_stored():
  for storage in device.STORAGES:
    arrays = place_arrays(normal(50, R), mesh_of(1), storage=storage)
    rows = np.asarray(
      jax.jit(gather_embeddings)(arrays, np.arange(50)[None])[0]
    )
    np.testing.assert_allclose(
      arrays.norms, np.linalg.norm(np.float64(rows), axis=1), rtol=1e-5
    )
    again = row_norms(arrays.embeddings, arrays.scales, jnp)
    np.testing.assert_allclose(arrays.norms, again, rtol=1e-6)


@pytest.mark.parametrize("recall_target", [1.0, 0.9])
@STORAGES
def test_there_is_one_product_unless_something_is_searched_again(
  storage, recall_target
):
  arrays = place_arrays(
    normal(P, R),
    mesh_of(1),
    storage=storage,
    recall_target=recall_target,
    chunk_passages=100,
  )
  traced = search.trace(arrays, normal(6, R), K, True)
  once, again = [], []
  for rarely, *product in products(traced.jaxpr.jaxpr):
    (again if rarely else once).append(product)
  assert once == [["bfloat16", "bfloat16", None]]
  highest = (jax.lax.Precision.HIGHEST,) * 2
  # An approximate search does not search again.
  assert again == [["float32", "float32", highest]] * (recall_target == 1)
  assert (f"{RARELY}/cond" in traced.lower().as_text(debug_info=True)) == (
    recall_target == 1
  )


def products(jaxpr, rarely=False):
  """Yields for each whether it only runs if a question is searched again.

  And the types of both operands, and the precision.
  """
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "dot_general":
      types = (str(x.aval.dtype) for x in eqn.invars)
      yield rarely, *types, eqn.params["precision"]
    for inner in jax.tree.leaves(
      list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
    ):
      inner = getattr(inner, "jaxpr", inner)
      if hasattr(inner, "eqns"):
        yield from products(inner, rarely or eqn.primitive.name == "while")


def test_an_approximate_search_in_one_pass_reaches_its_recall_target():
  embeddings, questions = normal(4000, R), normal(50, R, seed=1)
  settings = {"recall_target": 0.9, "chunk_passages": 1000}
  arrays = place_arrays(embeddings, mesh_of(1), **settings)
  ids, scores, repeated = find(arrays, questions, 10)
  assert overlap(ids, best(arrays, questions, 10)) >= 0.9
  exact = np.einsum("BR,BKR->BK", questions, embeddings[ids])
  np.testing.assert_allclose(scores, exact, rtol=1e-5)
  assert not np.any(repeated)


@over(2, 8)
def test_gradients_flow_around_it(count):
  arrays = place_arrays(normal(P, R), mesh_of(count))

  def total(questions):
    ids, _, _ = device._search(arrays, questions, K, True)
    docs = gather_embeddings(arrays, ids)
    return jnp.sum(jnp.einsum("BR,BKR->BK", questions, docs))

  questions = normal(4, R, seed=1)
  rows = normal(P, R)[best(arrays, questions)]
  np.testing.assert_allclose(
    jax.jit(jax.grad(total))(questions), rows.sum(axis=1), rtol=1e-5
  )


def test_a_cpu_multiplies_in_float32():
  arrays = place_arrays(normal(P, R), mesh_of(1), storage="bfloat16")
  traced = jax.jit(device.search_device, static_argnums=2).trace(
    arrays, jnp.array(normal(2, R)), K
  )
  highest = (jax.lax.Precision.HIGHEST,) * 2
  assert [*products(traced.jaxpr.jaxpr)] == [
    (False, "float32", "float32", highest)
  ]


@pytest.mark.skipif(SEVERAL, reason="this is the process that it starts")
def test_all_of_this_holds_on_two_and_eight_devices():
  printed = pytest_on_eight_devices(__file__, "over")
  assert re.search(r"\b\d\d passed, \d+ deselected", printed), printed
