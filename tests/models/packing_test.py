"""Contexts in packed rows, or in groups of lengths, are read as if alone."""

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rag_jax.config import Config
from rag_jax.config_models import EncoderConfig
from rag_jax.config_models import GeneratorConfig
from rag_jax.models.batch import RagBatch
from rag_jax.models.length_groups import LengthGroups
from rag_jax.models.packing import Packing
from rag_jax.models.packing import _num_rows
from rag_jax.models.packing import choose_packing
from rag_jax.models.rag import build_model

C = 8


def make_contexts(lengths):
  rng = np.random.default_rng(0)
  tokens = rng.integers(1, 100, (len(lengths), C), np.int32)
  mask = np.arange(C) < np.array(lengths)[:, None]
  return jnp.asarray(tokens), jnp.asarray(mask)


def spy(seen):
  def encode(tokens, mask, positions):
    seen.update(tokens=tokens, mask=mask, positions=positions)
    return tokens[..., None].astype(jnp.float32)

  return encode


def test_contexts_share_rows_and_come_back_in_their_places():
  tokens, mask = make_contexts([3, 8, 1, 4, 0, 2])
  seen = {}
  packing = Packing(rows=3, length=C)
  assert packing.fit(mask)
  states = packing.encode(spy(seen), tokens, mask)
  np.testing.assert_array_equal(states[..., 0], tokens * mask)
  # The longest first, each into the first row with room.
  np.testing.assert_array_equal(
    seen["tokens"],
    [
      tokens[1],
      [*tokens[3, :4], *tokens[0, :3], *tokens[2, :1]],
      [*tokens[5, :2], 0, 0, 0, 0, 0, 0],
    ],
  )
  np.testing.assert_array_equal(
    seen["positions"],
    [range(8), [0, 1, 2, 3, 0, 1, 2, 0], [0, 1, 0, 0, 0, 0, 0, 0]],
  )
  whose = np.array([[1] * 8, [3, 3, 3, 3, 0, 0, 0, 2], [5, 5] + [-1] * 6])
  same = (whose[:, :, None] == whose[:, None]) & (whose >= 0)[:, None]
  np.testing.assert_array_equal(seen["mask"], same)


def test_a_token_that_the_mask_leaves_out_is_in_its_place_and_not_read():
  tokens, mask = make_contexts([4, 3])
  mask = mask.at[0, 1].set(False)
  seen = {}
  Packing(rows=1, length=C).encode(spy(seen), tokens, mask)
  np.testing.assert_array_equal(seen["positions"], [[0, 1, 2, 3, 0, 1, 2, 0]])
  assert not seen["mask"][0, :, 1].any()
  assert seen["mask"][0, 0, [0, 2, 3]].all()


def test_contexts_fit_if_first_fit_decreasing_needs_no_more_rows():
  rng = np.random.default_rng(0)
  for trial in range(60):
    lengths = rng.integers(0, C + 1, 7)
    [needed] = _num_rows(lengths[None], C).tolist()
    # Each row but one is more than half full, or nothing would be in it.
    assert -(-lengths.sum() // C) <= max(needed, 1) <= len(lengths), trial
    mask = make_contexts(lengths)[1]
    for rows in range(1, 8):
      assert bool(Packing(rows, C).fit(mask)) == (rows >= needed), lengths


@pytest.mark.parametrize(
  "fields",
  [
    {},
    {"pointer": True},
    {"positions": "none", "relative_buckets": 8, "gated": True},
    {"positions": "none", "relative_buckets": 8, "relative_shared": True,
     "norm": "pre", "norm_kind": "rms", "scale_attention": False},
  ],
  ids=str,
)  # fmt: skip
@pytest.mark.parametrize(
  "layout",
  [Packing(3, 8), Packing(1, 24), LengthGroups((3, 2, 1), (2, 5, 8))],
  ids=str,
)
def test_losses_and_gradients_are_those_of_rows_of_their_own(fields, layout):
  config = Config()
  sizes = {"num_layers": 2, "embed_dim": 8, "num_heads": 2, "mlp_dim": 8}
  config.encoder = EncoderConfig(**sizes)
  config.generator = GeneratorConfig(**sizes, max_positions=8, **fields)
  model = build_model(config, vocab_size=100, decoder_start_id=2)
  tokens, mask = make_contexts([2, 5, 1, 8, 2, 4])
  batch = RagBatch(
    context_tokens=tokens.reshape(2, 3, 8),
    context_mask=mask.reshape(2, 3, 8),
    target_tokens=tokens.reshape(2, 3, 8)[:, 1, :4],  # some can be copied
    target_mask=jnp.ones((2, 4), bool),
  )
  params = nn.meta.unbox(model.init(jax.random.key(0), batch))["params"]
  params = jax.tree.map(lambda x: x + 0.3 * jnp.sin(jnp.arange(x.size)).reshape(
    x.shape), params)  # fmt: skip

  @jax.jit(static_argnames="layout")
  def read(params, layout):
    out = model.apply(
      {"params": params}, batch, context_layout=layout,
      method="target_log_probs",
    )  # fmt: skip
    return jnp.mean(out.log_probs * jnp.arange(1, 5)), out

  assert layout.fit(mask)
  found = jax.grad(read, has_aux=True)(params, layout)
  expected = jax.grad(read, has_aux=True)(params, None)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
    found,
    expected,
  )


def test_rows_may_be_longer_than_contexts():
  tokens, mask = make_contexts([5, 5, 4, 2, 5, 6])  # no two fit into 8
  seen = {}
  packing = Packing(rows=2, length=16)
  assert packing.fit(mask)
  states = packing.encode(spy(seen), tokens, mask)
  np.testing.assert_array_equal(states[..., 0], tokens * mask)
  assert seen["mask"].shape == (2, 16, 16)
  assert seen["positions"].max() == 5
  assert not Packing(rows=1, length=24).fit(mask)


@pytest.mark.parametrize("dim", [4, 768])
@pytest.mark.parametrize("num_rows", [1, 5, 20])
def test_the_packing_of_least_arithmetic_is_chosen(num_rows, dim):
  lengths = np.random.default_rng(1).integers(20, 50, 400)
  packing = choose_packing(lengths, num_rows, 64, dim)
  batches = np.random.default_rng(2).choice(lengths, (300, num_rows))

  def mean(rows, length):
    fit = np.mean(_num_rows(batches, length) <= rows)
    cost = rows * length * (24 * dim**2 + 4 * length * dim)
    whole = num_rows * 64 * (24 * dim**2 + 4 * 64 * dim)
    return fit * cost + (1 - fit) * whole

  found = packing or Packing(num_rows, 64)
  least = min(
    mean(rows, 64 * times) for times in range(1, 5)
    for rows in range(1, num_rows + 1)
  )  # fmt: skip
  assert mean(found.rows, found.length) <= 1.03 * least
  if num_rows == 1:
    assert packing is None
  elif num_rows == 20:
    # Of wide encoders attention counts little: longer rows have less padding.
    assert (found.length > 64) == (dim == 768)


def test_contexts_of_full_length_are_not_packed():
  assert choose_packing(np.full(100, 64), 20, 64, 768) is None
