"""An encoder without layers and its equal with one; PyTorch's is in parity."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rag_jax.config_models import EncoderConfig
from rag_jax.models.encoders import RetrieverEncoder
from rag_jax.weights.bag_of_words import to_bert

V, D, R, BOS = 31, 6, 4, 2
E = EncoderConfig(
  num_layers=0,
  embed_dim=D,
  pooling="learned",
  projection_dim=R,
  normalize=True,
)


def random_params(seed=0):
  rng = np.random.default_rng(seed)
  shapes = {
    "token_embedding": {"embedding": (V, D)},
    "pooling": {"kernel": (D, 1), "bias": (1,)},
    "projection": {"kernel": (D, R), "bias": (R,)},
  }
  return jax.tree.map(
    lambda shape: rng.normal(size=shape).astype(np.float32),
    shapes,
    is_leaf=lambda x: isinstance(x, tuple),
  )


def slow_embedding(params, tokens):
  """Returns [R] of one row of real tokens, in float64."""
  rows = np.float64(params["token_embedding"]["embedding"])[tokens]
  logits = rows @ np.float64(params["pooling"]["kernel"][:, 0])
  weights = np.exp(logits) / np.exp(logits).sum()
  projected = (weights @ rows) @ np.float64(params["projection"]["kernel"])
  projected = projected + params["projection"]["bias"]
  return projected / np.sqrt(np.sum(projected**2))


def test_one_layer_of_bert_computes_the_bag_of_words():
  params = random_params()
  fields, bert = to_bert(E, params, first_id=BOS, max_positions=9, scale=10.0)
  assert (fields.num_layers, fields.num_heads) == (1, 1)
  assert fields.embed_dim == 2 * D + 2
  module = RetrieverEncoder(fields, dtype=jnp.float32)
  rng = np.random.default_rng(1)
  lengths = np.array([9, 1, 4])
  mask = np.arange(9) < lengths[:, None]
  tokens = np.where(mask, rng.integers(3, V, mask.shape), 1)
  tokens[:, 0] = BOS
  actual = jax.jit(module.apply)(
    {"params": bert}, jnp.asarray(tokens, jnp.int32), jnp.asarray(mask)
  )
  expected = [
    10.0 * slow_embedding(params, row[:n])
    for row, n in zip(tokens, lengths, strict=True)
  ]
  np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


def test_every_row_of_the_table_has_mean_zero_and_one_norm():
  _, bert = to_bert(E, random_params(), first_id=BOS, max_positions=9)
  table = bert["token_embedding"]["embedding"]
  np.testing.assert_allclose(table.sum(axis=1), 0, atol=1e-5)
  norms = np.linalg.norm(table, axis=1)
  np.testing.assert_allclose(norms, norms[0], rtol=1e-6)


@pytest.mark.parametrize(
  ("changes", "problem"),
  [
    ({"normalize": False}, "normalize=False, expected True: BERT's last norm"),
    ({"pooling": "max"}, "pooling='max', expected 'learned' or 'mean'"),
    ({"num_layers": 2}, "num_layers=2, expected 0"),
  ],
)
def test_what_cannot_be_written_this_way_is_named(changes, problem):
  fields = dataclasses.replace(E, **changes)
  with pytest.raises(ValueError, match="DPR cannot compute this enc") as e:
    to_bert(fields, random_params(), first_id=BOS, max_positions=9)
  assert problem in str(e.value)


@pytest.mark.parametrize("first_id", [-1, V])
def test_inputs_have_to_begin_with_a_token(first_id):
  """T5's tokenizer has none, for instance."""
  with pytest.raises(
    ValueError, match=rf"The first token of every input is {first_id}, but the"
  ):
    to_bert(E, random_params(), first_id=first_id, max_positions=9)
