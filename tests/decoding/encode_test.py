"""Contexts encoded by length are those encoded at one length."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_rag import CONFIG

from rag_jax.decoding import compiled
from rag_jax.models.rag import build_generator

V, C = 13, 80
MODEL = build_generator(
  CONFIG.frozen(max_positions=C, num_layers=2),
  vocab_size=V,
  decoder_start_id=2,
  dtype=jnp.float32,
)


@pytest.fixture(scope="module")
def params():
  tokens = jnp.zeros((1, 2), jnp.int32)
  init = jax.jit(MODEL.init)(jax.random.key(0), tokens, tokens == 0, tokens)
  return jax.tree.map(lambda x: 5 * x, init["params"])


@pytest.mark.parametrize(("b", "k"), [(8, 5), (17, 1), (3, 6)])
@pytest.mark.parametrize("longest", [C, 30])
def test_states_of_tokens_are_the_same_and_those_of_padding_are_zero(
  params, b, k, longest
):
  rng = np.random.default_rng(b)
  lengths = rng.integers(0, longest, (b, k, 1), endpoint=True)
  mask = np.arange(C) < lengths
  tokens = rng.integers(3, V, (b, k, C), np.int32)
  widths = []

  def count(*args):
    widths.append(args[3].shape)
    return encode_rows(*args)

  encode_rows = compiled._encode_rows
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(compiled, "_encode_rows", count)
    memory = compiled.encode(MODEL, params, tokens, mask)
  whole = compiled.encode(MODEL, params, jnp.asarray(tokens), jnp.asarray(mask))
  np.testing.assert_allclose(
    memory.states * mask[..., None],
    whole.states * mask[..., None],
    rtol=1e-4,
    atol=1e-4,
  )
  assert memory.states.shape == whole.states.shape
  np.testing.assert_array_equal(memory.mask, mask)
  np.testing.assert_array_equal(memory.tokens, tokens)
  assert len(widths) == 4
  assert len({rows for rows, _ in widths}) == 1
  assert all(width % 10 == 0 for _, width in widths)
  assert max(width for _, width in widths) <= -(-lengths.max() // 10) * 10


def test_a_few_or_short_contexts_are_encoded_at_once(params, monkeypatch):
  monkeypatch.setattr(compiled, "_encode_by_length", None)
  for shape in ((3, 5, C), (8, 5, 64)):
    tokens = np.full(shape, 5, np.int32)
    memory = compiled.encode(MODEL, params, tokens, tokens > 0)
    assert memory.states.shape == (*shape, CONFIG.embed_dim)
