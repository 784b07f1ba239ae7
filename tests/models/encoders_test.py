"""What a tower pools, against loops, and what does not change an embedding."""

import functools
import math

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rag_jax.config_models import EncoderConfig
from rag_jax.config_models import TransformerConfig
from rag_jax.models import layers
from rag_jax.models.encoders import RetrieverEncoder

V, D, L = 11, 8, 5
POOLINGS = pytest.mark.parametrize("pooling", ["cls", "mean", "learned"])
TOKENS = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 0, 0], [5, 0, 0, 0, 0]], np.int32)
MASK = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]], bool)


def make_encoder(dtype=jnp.float32, **fields):
  sizes = {
    "vocab_size": V,
    "embed_dim": D,
    "num_heads": 2,
    "mlp_dim": 12,
    "max_positions": L,
    "pooling": "mean",
  }
  return RetrieverEncoder(EncoderConfig(**(sizes | fields)), dtype=dtype)


@functools.cache
def tower(**fields):
  """A compiled tower: (parameters none of which is 0 or 1, embed)."""
  encoder = make_encoder(**fields)
  variables = jax.eval_shape(encoder.init, jax.random.key(0), TOKENS, MASK)
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: rng.normal(size=x.shape).astype(np.float32),
    nn.meta.unbox(variables)["params"],
  )
  embed = jax.jit(lambda p, *args: encoder.apply({"params": p}, *args))
  init = jax.jit(lambda *args: nn.meta.unbox(encoder.init(*args))["params"])
  return params, embed, init


def embed(tokens=TOKENS, mask=MASK, **fields):
  params, run, _ = tower(**fields)
  return np.asarray(run(params, tokens, mask))


@POOLINGS
def test_a_bag_of_words_is_pooled_token_embeddings(pooling):
  params, _, _ = tower(pooling=pooling)
  table = params["token_embedding"]["embedding"]
  for row, result in enumerate(embed(pooling=pooling)):
    words = [table[t] for t in TOKENS[row][MASK[row]]]
    weights = [1.0] * len(words)
    if pooling == "cls":
      weights[1:] = [0.0] * (len(words) - 1)
    if pooling == "learned":
      kernel, bias = params["pooling"]["kernel"], params["pooling"]["bias"]
      weights = [math.exp((w @ kernel + bias).item()) for w in words]
    expected = np.zeros(D)
    for weight, word in zip(weights, words, strict=True):
      expected += weight / sum(weights) * word
    np.testing.assert_allclose(result, expected, atol=1e-5)


def test_learned_pooling_starts_as_the_mean():
  _, learned, init = tower(pooling="learned")
  params = init(jax.random.key(0), TOKENS, MASK)
  _, mean, _ = tower(pooling="mean")
  words = {"token_embedding": params["token_embedding"]}
  np.testing.assert_allclose(
    learned(params, TOKENS, MASK), mean(words, TOKENS, MASK), atol=1e-6
  )


@POOLINGS
@pytest.mark.parametrize("num_layers", [0, 1])
def test_the_token_ids_of_padding_do_not_matter(pooling, num_layers):
  other = np.where(MASK, TOKENS, 7)
  assert np.any(other != TOKENS)
  fields = {"pooling": pooling, "num_layers": num_layers}
  np.testing.assert_array_equal(embed(other, **fields), embed(**fields))


@pytest.mark.parametrize("num_layers", [0, 1])
def test_the_amount_of_padding_does_not_matter(num_layers):
  fields = {"pooling": "learned", "num_layers": num_layers}
  np.testing.assert_allclose(
    embed(TOKENS[1:, :3], MASK[1:, :3], **fields),
    embed(**fields)[1:],
    atol=1e-5,
  )


def test_rows_longer_than_the_positions_are_refused():
  tokens, mask = np.ones((1, L + 1), np.int32), np.ones((1, L + 1), bool)
  params, run, _ = tower(num_layers=1)
  with pytest.raises(ValueError, match=r"Questions or passages of 6 tokens"):
    run(params, tokens, mask)
  assert embed(tokens, mask).shape == (1, D)  # a bag of words has no positions


def test_without_layers_the_order_of_words_does_not_matter():
  for pooling in ("mean", "learned"):
    np.testing.assert_allclose(
      embed(TOKENS[:1, ::-1].copy(), MASK[:1], pooling=pooling),
      embed(TOKENS[:1], MASK[:1], pooling=pooling),
      atol=1e-5,
    )


def test_with_a_layer_the_order_of_words_matters():
  before = embed(num_layers=1)[:1]
  swapped = TOKENS.copy()
  swapped[0] = TOKENS[0, ::-1]
  assert np.max(np.abs(embed(swapped, num_layers=1)[:1] - before)) > 1e-2


def test_with_layers_it_is_bert():
  """Token and position embeddings, a norm with BERT's epsilon, post-norm."""
  params, _, _ = tower(num_layers=1, pooling="cls")
  x = params["token_embedding"]["embedding"][TOKENS]
  x = x + params["position_embedding"]["embedding"][:L]
  x = x - x.mean(axis=-1, keepdims=True)
  x = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-12)
  norm = params["embedding_norm"]
  x = x * norm["scale"] + norm["bias"]
  config = TransformerConfig(
    embed_dim=D, num_heads=2, mlp_dim=12, norm_eps=1e-12
  )
  layer = layers.TransformerLayer(config, dtype=jnp.float32)
  expected = jax.jit(layer.apply)(
    {"params": params["layer_0"]}, x, MASK[:, None]
  )[:, 0]
  np.testing.assert_allclose(
    embed(num_layers=1, pooling="cls"), expected, atol=1e-4
  )


def test_a_row_of_padding_alone_is_finite():
  mask = np.zeros_like(MASK)
  for num_layers in (0, 1):
    assert np.all(np.isfinite(embed(TOKENS, mask, num_layers=num_layers)))


def test_normalized_embeddings_point_the_same_way_at_length_one():
  plain, unit = embed(), embed(normalize=True)
  norms = np.linalg.norm(plain, axis=1, keepdims=True)
  assert np.max(np.abs(norms - 1.0)) > 0.1
  np.testing.assert_allclose(unit * norms, plain, rtol=1e-5)
  np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1.0, rtol=1e-5)


def test_an_embedding_of_zero_has_a_finite_gradient_when_normalized():
  params, run, _ = tower(normalize=True)
  zeros = jax.tree.map(np.zeros_like, params)
  grads = jax.jit(jax.grad(lambda p, *args: run(p, *args).sum()))(
    zeros, TOKENS, MASK
  )
  assert np.all(np.isfinite(grads["token_embedding"]["embedding"]))


def test_a_projection_of_equal_size_starts_as_the_identity():
  _, projected, init = tower(projection_dim=D)
  params = init(jax.random.key(0), TOKENS, MASK)
  _, plain, _ = tower()
  words = {"token_embedding": params["token_embedding"]}
  np.testing.assert_allclose(
    projected(params, TOKENS, MASK), plain(words, TOKENS, MASK), atol=1e-6
  )


def test_a_projection_is_a_matrix_and_a_bias_after_pooling():
  params, _, _ = tower(projection_dim=3)
  projection = params["projection"]
  table = params["token_embedding"]["embedding"]
  pooled = np.stack(
    [
      table[tokens[mask]].mean(axis=0)
      for tokens, mask in zip(TOKENS, MASK, strict=True)
    ]
  )
  np.testing.assert_allclose(
    embed(projection_dim=3),
    pooled @ projection["kernel"] + projection["bias"],
    atol=1e-5,
  )


def test_a_bag_of_words_has_no_positions_and_no_norm():
  assert set(tower()[0]) == {"token_embedding"}
  assert set(tower(num_layers=1)[0]) == {
    "token_embedding",
    "position_embedding",
    "embedding_norm",
    "layer_0",
  }


@pytest.mark.parametrize(("num_layers", "std"), [(0, D**-0.5), (1, 0.02)])
def test_fresh_token_embeddings_have_the_size_their_use_asks_for(
  num_layers, std
):
  _, _, init = tower(num_layers=num_layers)
  table = jax.jit(lambda *args: init(*args)["token_embedding"]["embedding"])(
    jax.random.key(0), TOKENS, MASK
  )
  np.testing.assert_allclose(np.std(table), std, rtol=0.2)


def test_embeddings_are_float32_and_close_when_computed_in_bfloat16():
  params, low, _ = tower(num_layers=1, dtype=jnp.bfloat16)
  result = low(params, TOKENS, MASK)
  assert result.dtype == jnp.float32
  expected = embed(num_layers=1)
  assert np.any(result != expected)
  np.testing.assert_allclose(result, expected, atol=0.2)


def test_dropout_changes_with_its_key_alone():
  encoder = make_encoder(dropout=0.5)
  params, _, _ = tower()

  @jax.jit
  def run(seed, tokens, mask):
    rngs = {"dropout": jax.random.key(seed)}
    return encoder.apply({"params": params}, tokens, mask, False, rngs=rngs)

  first = run(0, TOKENS, MASK)
  np.testing.assert_array_equal(run(0, TOKENS, MASK), first)
  assert np.any(run(1, TOKENS, MASK) != first)


def test_a_tower_of_the_size_of_bert_base_has_its_parameters():
  """109,482,240 with the pooler (768 * 769) and token types (2 * 768)."""
  encoder = make_encoder(
    vocab_size=30_522,
    num_layers=12,
    embed_dim=768,
    num_heads=12,
    mlp_dim=3072,
    max_positions=512,
  )
  variables = jax.eval_shape(
    encoder.init, jax.random.key(0), TOKENS[:1], MASK[:1]
  )
  embeddings = 30_522 * 768 + 512 * 768 + 2 * 768
  attention = 4 * (768 * 768 + 768)
  mlp = 768 * 3072 + 3072 + 3072 * 768 + 768
  norms = 2 * 2 * 768
  expected = embeddings + 12 * (attention + mlp + norms)
  assert expected == 109_482_240 - 768 * 769 - 2 * 768
  assert sum(x.size for x in jax.tree.leaves(variables)) == expected
