"""Rows that are embedded again against a loop over them, on several devices."""

import dataclasses
import re

import jax
import jax.numpy as jnp
from linen import normal
import numpy as np
from processes import pytest_on_eight_devices
import pytest
from several_devices import SEVERAL
from several_devices import mesh_of
from several_devices import over

from rag_jax.retrieval.device import abstract_arrays
from rag_jax.retrieval.device import gather_embeddings
from rag_jax.retrieval.device import place_arrays
from rag_jax.retrieval.device import place_tokens
from rag_jax.retrieval.device_refresh import due_rows
from rag_jax.retrieval.device_refresh import own_passages
from rag_jax.retrieval.device_refresh import refresh_period
from rag_jax.retrieval.device_refresh import refresh_rows
from rag_jax.retrieval.device_refresh import staleness
from rag_jax.retrieval.device_refresh import with_norms

P, R, L = 203, 16, 5
STORAGES = pytest.mark.parametrize("storage", ["float32", "bfloat16", "int8"])
TOKENS = np.random.default_rng(1).integers(0, 60_000, (P, L), np.uint16)
LENGTHS = 1 + np.arange(P) % L
TABLE = np.random.default_rng(2).normal(size=(1000, R)).astype(np.float32)


def place(count, **settings):
  arrays = place_arrays(normal(P, R), mesh_of(count), **settings)
  return place_tokens(arrays, TOKENS, LENGTHS)


def encode(tokens, mask, step):
  """Stands for a passage encoder whose parameters are the step."""
  found = jnp.asarray(TABLE)[tokens % len(TABLE)]  # M L R
  return jnp.sum(found * mask[..., None], axis=1) + step


def encode_by_hand(row, step):
  ids = TOKENS[row, : LENGTHS[row]].astype(int)
  return TABLE[ids % len(TABLE)].sum(axis=0) + np.float32(step)


def one_step(arrays, step, num_rows):
  """Embeds the rows of `step` with its parameters, as a train step does."""
  rows = due_rows(arrays, step, num_rows)
  embeddings = encode(*own_passages(arrays, rows), step)
  return refresh_rows(arrays, rows, embeddings, step)


run_step = jax.jit(one_step, static_argnums=2, donate_argnums=0)


@over(1, 2, 4, 8)
@pytest.mark.parametrize("num_rows", [1, 7, 40, P, 3 * P])
def test_every_row_is_embedded_once_per_period_on_any_devices(count, num_rows):
  arrays = place(count, chunk_passages=10)
  period = refresh_period(P, num_rows)
  assert period == max(1, -(-P // num_rows))
  rows_of = jax.jit(due_rows, static_argnums=2)
  total, shards = len(arrays.embedded_at), []
  for step in range(2 * period):
    rows = rows_of(arrays, step, num_rows)
    shards += [
      (d, np.asarray(s.data)) for d, s in enumerate(rows.addressable_shards)
    ]
    real = np.asarray(rows)
    real = real[real < total]
    by_hand = [row for row in range(P) if row % period == step % period]
    assert sorted(real.tolist()) == by_hand
  # A device is given rows that it holds, and not many more than the others.
  held = total // count
  for device, rows in shards:
    assert len(rows) == -(-held // period)
    assert set(rows[rows < total] // held) <= {device}


@over(1, 2, 8)
@STORAGES
def test_steps_write_what_a_loop_over_the_rows_writes(count, storage):
  num_rows, steps = 60, 6  # more than one period
  period = refresh_period(P, num_rows)
  embeddings = normal(P, R)
  embedded_at = np.zeros(P, int)
  arrays = place(count, storage=storage)
  for step in range(1, steps + 1):
    arrays = run_step(arrays, step, num_rows)
    for row in range(P):
      if row % period == step % period:
        embeddings[row] = encode_by_hand(row, step)
        embedded_at[row] = step
  np.testing.assert_array_equal(arrays.embedded_at[:P], embedded_at)
  assert sorted(set(embedded_at)) == [3, 4, 5, 6]
  expected = place_arrays(embeddings, mesh_of(count), storage=storage)
  assert arrays.embeddings.dtype == expected.embeddings.dtype
  assert arrays.embeddings.sharding == expected.embeddings.sharding
  ids = np.arange(P)[None]
  got, wanted = (
    np.asarray(jax.jit(gather_embeddings)(a, ids)) for a in (arrays, expected)
  )
  # The encoder sums in another order than the loop: a unit in the last place
  # of what is stored.
  unit = {"float32": 1e-6, "bfloat16": 2**-8, "int8": 1 / 127}[storage]
  allowed = unit * np.abs(embeddings).max(axis=-1, keepdims=True)
  assert np.all(np.abs(got[0] - wanted[0]) <= 1.001 * allowed)
  assert np.mean(got == wanted) > 0.5


@over(1, 8)
def test_rows_that_fill_up_are_left_alone(count):
  arrays = place_arrays(normal(9, R), mesh_of(count), chunk_passages=1)
  arrays = place_tokens(arrays, TOKENS[:9], LENGTHS[:9])
  for step in (1, 2, 3):
    arrays = run_step(arrays, step, 4)
  assert np.all(np.asarray(arrays.embedded_at[:9]) > 0)
  assert not np.any(arrays.embedded_at[9:])
  assert not np.any(arrays.embeddings[9:])


@over(2, 8)
def test_a_row_that_its_device_does_not_hold_is_dropped(count):
  arrays = place_arrays(normal(P, R), mesh_of(count))
  before = np.asarray(arrays.embeddings)
  # One place a device, all of which name the last device's last passage.
  rows = np.full(count, P - 1, np.int32)
  after = jax.jit(refresh_rows)(arrays, rows, np.ones((count, R)), 5)
  # Of 203 rows over 8 devices of 26, passage 202 lies on the last.
  expected = before.copy()
  expected[P - 1] = 1
  np.testing.assert_array_equal(after.embeddings, expected)


@over(1, 8)
def test_staleness_is_the_age_of_each_row_averaged(count):
  arrays = place(count)
  age_of = jax.jit(staleness)
  embedded_at = np.zeros(P, int)
  for step in range(1, 9):
    arrays = run_step(arrays, step, 60)
    embedded_at[np.arange(P) % 4 == step % 4] = step
    mean, most = age_of(arrays, step)
    np.testing.assert_allclose(mean, np.mean(step - embedded_at), rtol=1e-6)
    assert most == np.max(step - embedded_at)
  assert most == 3


@over(2, 8)
def test_no_row_travels_and_none_is_copied(count):
  arrays = place(count, storage="int8")
  size = arrays.embeddings.nbytes + arrays.scales.nbytes
  lowered = run_step.lower(arrays, 1, 60).compile()
  program = lowered.as_text()
  moves = r"= .*\b(all-\w+|collective-\w+|reduce-scatter)\("
  assert not re.findall(moves, program)
  # Each device writes into its own part, which was donated.
  assert lowered.memory_analysis().alias_size_in_bytes >= size // count
  assert lowered.memory_analysis().temp_size_in_bytes < 60 * 1000
  run_step(arrays, 1, 60)
  assert arrays.embeddings.is_deleted()


@STORAGES
def test_norms_stay_those_of_the_rows(storage):
  arrays = run_step(place(1, storage=storage), 1, 60)
  ids = np.arange(P)[None]
  rows = np.float64(jax.jit(gather_embeddings)(arrays, ids)[0])
  np.testing.assert_allclose(
    arrays.norms[:P], np.linalg.norm(rows, axis=1), rtol=1e-5
  )
  # Those of a checkpoint, which has none, are made again.
  again = with_norms(dataclasses.replace(arrays, norms=None))
  np.testing.assert_allclose(again.norms, arrays.norms, rtol=1e-6)
  assert again.norms.sharding == arrays.norms.sharding
  assert with_norms(arrays) is arrays


def test_no_gradient_flows_through_what_is_written():
  arrays = place(1)

  def total(scale):
    step = jnp.int32(1)
    rows = due_rows(arrays, step, 60)
    fresh = refresh_rows(arrays, rows, scale * jnp.ones((len(rows), R)), step)
    return jnp.sum(fresh.embeddings)

  assert jax.grad(total)(2.0) == 0.0


@STORAGES
def test_abstract_arrays_are_what_is_placed(storage):
  settings = {"storage": storage, "chunk_passages": 7, "recall_target": 0.9}
  mesh = mesh_of(8 if SEVERAL else 1)
  placed = place_arrays(normal(P, R), mesh, **settings)
  abstract = abstract_arrays(P, R, mesh, **settings)
  assert jax.tree.structure(placed) == jax.tree.structure(abstract)
  for x, y in zip(
    jax.tree.leaves(placed), jax.tree.leaves(abstract), strict=True
  ):
    assert (x.shape, x.dtype, x.sharding) == (y.shape, y.dtype, y.sharding)


def test_the_step_that_embedded_the_rows_is_kept():
  arrays = place_arrays(normal(P, R), mesh_of(1), step=30)
  assert staleness(arrays, jnp.int32(37)) == (7.0, 7)


def test_no_rows_to_embed_again_are_refused():
  with pytest.raises(
    ValueError, match=r"num_rows=0 passages .* Set index\.ref"
  ):
    due_rows(place(1), jnp.int32(1), 0)


def test_embedding_again_without_tokens_says_how_to_bring_them():
  arrays = place_arrays(normal(P, R), mesh_of(1))
  with pytest.raises(ValueError, match=r"no tokens.*Call place_tokens"):
    own_passages(arrays, jnp.zeros(1, int))


@pytest.mark.skipif(SEVERAL, reason="this is the process that it starts")
def test_all_of_this_holds_on_two_four_and_eight_devices():
  printed = pytest_on_eight_devices(__file__, "over")
  assert re.search(r"\b3\d passed, \d+ deselected", printed), printed
