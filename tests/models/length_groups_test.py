"""Groups of lengths: every context is read, in its place, with less padding."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rag_jax.models.length_groups import LengthGroups
from rag_jax.models.length_groups import _least_padding
from rag_jax.models.length_groups import choose_groups

GROUPS = LengthGroups(rows=(3, 2, 1), lengths=(2, 5, 8))


def make_contexts(lengths, width=8):
  rng = np.random.default_rng(0)
  tokens = rng.integers(1, 100, (len(lengths), width), np.int32)
  mask = np.arange(width) < np.array(lengths)[:, None]
  return jnp.asarray(tokens), jnp.asarray(mask)


@pytest.mark.parametrize(
  "lengths", [[8, 1, 5, 2, 4, 2], [2, 2, 2, 5, 5, 8], [0, 0, 0, 0, 0, 0]]
)
def test_what_each_context_gives_comes_back_in_its_place(lengths):
  tokens, mask = make_contexts(lengths)
  others = jnp.arange(12).reshape(6, 2)
  widths = []

  def read(tokens, mask, others):
    widths.append(tokens.shape)
    return jnp.sum(tokens * mask, axis=1), {"others": 2 * others}

  assert GROUPS.fit(mask)
  sums, found = jax.jit(lambda *x: GROUPS.map(read, *x))(tokens, mask, others)
  np.testing.assert_array_equal(sums, jnp.sum(tokens * mask, axis=1))
  np.testing.assert_array_equal(found["others"], 2 * others)
  assert widths == [(3, 2), (2, 5), (1, 8)]


@pytest.mark.parametrize(
  ("lengths", "fits"),
  [
    ([2, 2, 2, 5, 5, 8], True),
    ([3, 2, 2, 5, 5, 8], False),
    ([2, 2, 2, 5, 6, 8], False),
    ([3, 1, 1, 1, 4, 5], True),
    ([8, 8, 8, 8, 8, 8], False),
  ],
)
def test_contexts_fit_if_none_is_longer_than_its_place(lengths, fits):
  mask = make_contexts(lengths[::-1])[1]
  assert bool(GROUPS.fit(mask)) == fits


def test_a_context_ends_with_its_last_token_whatever_the_mask_leaves_out():
  mask = np.array(make_contexts([2, 2, 2, 5, 5, 8])[1])
  mask[0, 0] = False
  assert GROUPS.fit(jnp.asarray(mask))
  mask[1, :] = np.arange(8) == 5  # one token, far back
  assert not GROUPS.fit(jnp.asarray(mask))


@pytest.mark.parametrize("num_groups", [1, 2, 3, 5])
def test_no_other_groups_have_less_padding(num_groups):
  needed = np.sort(np.random.default_rng(num_groups).integers(5, 90, 8))
  groups = _least_padding(needed, num_groups, 100)
  each = [*(-(-needed[:-1] // 8) * 8), 100]  # what every place needs
  best = min(
    sum(
      (stop - start) * each[stop - 1]
      for start, stop in itertools.pairwise((0, *stops, 8))
    )
    for n in range(num_groups)
    for stops in itertools.combinations(range(1, 8), n)
  )
  assert groups.places.sum() == best
  assert len(groups.rows) <= num_groups
  assert groups.lengths[-1] == 100
  assert sum(groups.rows) == 8
  assert all(n % 8 == 0 for n in groups.lengths[:-1])


@pytest.mark.parametrize(
  ("num_rows", "most"), [(1, 1.0), (7, 0.9), (20, 0.8), (40, 0.75), (320, 0.7)]
)
def test_most_batches_fit_and_fewer_tokens_are_computed(num_rows, most):
  """Of passages of 100 words, about 150 tokens, beside short questions."""
  rng = np.random.default_rng(2)
  lengths = np.clip(rng.normal(150, 20, 2000), 20, 256).astype(int)
  groups = choose_groups(lengths, num_rows, 3, 256)
  others = np.clip(rng.normal(150, 20, (1000, num_rows)), 20, 256).astype(int)
  fit = np.all(np.sort(others, axis=1) <= groups.places, axis=1).mean()
  assert fit > 0.8
  mean = fit * groups.places.mean() + (1 - fit) * 256
  assert mean <= most * 256


def test_one_length_is_one_group():
  assert choose_groups(np.full(10, 64), 8, 4, 64) == LengthGroups((8,), (64,))
  assert choose_groups(np.full(10, 30), 1, 4, 64) == LengthGroups((1,), (64,))
