"""The retriever's encoder against PyTorch's BERT, with the same weights.

The reference: transformers' `BertModel`, tiny and random.
"""

import functools

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from rag_jax.config_models import EncoderConfig
from rag_jax.models.encoders import RetrieverEncoder

pytestmark = pytest.mark.parity

LAYERS, D, N, F, V, POSITIONS = 2, 32, 4, 64, 101, 12
PAD, CLS = 0, 3
LENGTHS = (9, 1, 5, 8)  # real tokens a row


def randomize(model):
  """Gives every parameter a value that is neither 0 nor 1."""
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for name, x in model.named_parameters():
      # Embeddings are as small as BERT's: an epsilon of the norm then shows.
      std = 0.02 if "embeddings.weight" in name else 0.2
      x.normal_(0.0, std, generator=generator)
      if name.endswith("LayerNorm.weight"):
        x += 1


def dense(tensors, name, *shape):
  """Returns kernel and bias; PyTorch stores kernels [out, in]."""
  kernel = tensors[name + ".weight"].T
  return {
    "kernel": kernel.reshape(*shape) if shape else kernel,
    "bias": tensors[name + ".bias"],
  }


def norm(tensors, name):
  return {"scale": tensors[name + ".weight"], "bias": tensors[name + ".bias"]}


def layer(tensors, name):
  heads = (N, D // N)
  attention = {
    part: dense(tensors, f"{name}.attention.self.{part}", D, *heads)
    for part in ("query", "key", "value")
  }
  for part in attention.values():
    part["bias"] = part["bias"].reshape(heads)
  out = dense(tensors, name + ".attention.output.dense", *heads, D)
  return {
    "self_attention": attention | {"out": out},
    "self_attention_norm": norm(tensors, name + ".attention.output.LayerNorm"),
    "mlp": {
      "up": dense(tensors, name + ".intermediate.dense"),
      "down": dense(tensors, name + ".output.dense"),
    },
    "mlp_norm": norm(tensors, name + ".output.LayerNorm"),
  }


def to_params(tensors):
  """Returns the encoder's tree of BERT's tensors."""
  # Our encoder has no segments: it adds nothing where BERT adds row 0 of its
  # token types to every token. With that row in the position table, which is
  # added to every token too, the sum is the same.
  positions = tensors["embeddings.position_embeddings.weight"]
  segment = tensors["embeddings.token_type_embeddings.weight"][0]
  return {
    "token_embedding": {
      "embedding": tensors["embeddings.word_embeddings.weight"]
    },
    "position_embedding": {"embedding": positions + segment},
    "embedding_norm": norm(tensors, "embeddings.LayerNorm"),
  } | {
    f"layer_{i}": layer(tensors, f"encoder.layer.{i}") for i in range(LAYERS)
  }


@functools.cache
def bert():
  """Returns PyTorch's model and our parameters."""
  config = transformers.BertConfig(
    vocab_size=V,
    hidden_size=D,
    num_hidden_layers=LAYERS,
    num_attention_heads=N,
    intermediate_size=F,
    max_position_embeddings=POSITIONS,
    hidden_act="gelu",  # the exact one
    layer_norm_eps=1e-12,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    pad_token_id=PAD,
  )
  model = transformers.BertModel(config, add_pooling_layer=False).eval()
  randomize(model)
  tensors = {k: x.detach().numpy() for k, x in model.named_parameters()}
  return model, to_params(tensors)


def encoder(pooling):
  config = EncoderConfig(
    vocab_size=V,
    num_layers=LAYERS,
    embed_dim=D,
    num_heads=N,
    mlp_dim=F,
    max_positions=POSITIONS,
    pooling=pooling,
  )
  return RetrieverEncoder(config, dtype=jnp.float32)


def inputs():
  """Returns ragged tokens and their mask."""
  mask = np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None]
  tokens = np.random.default_rng(0).integers(CLS + 1, V, size=mask.shape)
  tokens[:, 0] = CLS
  return np.where(mask, tokens, PAD), mask


def torch_states(tokens, mask):
  """Returns PyTorch's last hidden states [N, L, D], with a graph."""
  model, _ = bert()
  return model(
    input_ids=torch.tensor(tokens), attention_mask=torch.tensor(mask).long()
  ).last_hidden_state


def torch_pooled(states, mask, pooling):
  """Returns [N, D]: the first state, or the mean of the real ones."""
  if pooling == "cls":
    return states[:, 0]
  weights = torch.tensor(mask).float()[:, :, None]
  return (weights * states).sum(1) / weights.sum(1)


POOLINGS = pytest.mark.parametrize("pooling", ["cls", "mean"])


@POOLINGS
def test_the_mapping_fills_the_whole_tree(pooling):
  tokens = jnp.zeros((1, 2), jnp.int32)
  shapes = jax.eval_shape(
    encoder(pooling).init, jax.random.key(0), tokens, tokens == 0
  )
  assert jax.tree.map(np.shape, bert()[1]) == jax.tree.map(
    np.shape, nn.meta.unbox(shapes)["params"]
  )


@POOLINGS
def test_embeddings_are_those_of_bert(pooling):
  tokens, mask = inputs()
  states = torch_states(tokens, mask).detach()
  expected = torch_pooled(states, mask, pooling).numpy()
  embedding = jax.jit(encoder(pooling).apply)(
    {"params": bert()[1]}, jnp.asarray(tokens, jnp.int32), jnp.asarray(mask)
  )
  assert np.std(expected) > 0.5  # or closeness would mean little
  np.testing.assert_allclose(embedding, expected, rtol=1e-5, atol=1e-5)


def test_gradients_are_those_of_bert():
  """Of the mean's inner product with a fixed vector, as in doc_scores."""
  tokens, mask = inputs()
  model, params = bert()
  direction = np.random.default_rng(1).normal(size=(len(LENGTHS), D))
  direction = direction.astype(np.float32)
  pooled = torch_pooled(torch_states(tokens, mask), mask, "mean")
  tables = ("embeddings.word_embeddings", "embeddings.position_embeddings")
  kernel = "encoder.layer.0.attention.self.query"
  words, positions, query = torch.autograd.grad(
    (torch.tensor(direction) * pooled).sum(),
    [model.get_parameter(name + ".weight") for name in (*tables, kernel)],
  )

  def score(params):
    embedding = encoder("mean").apply(
      {"params": params}, jnp.asarray(tokens, jnp.int32), jnp.asarray(mask)
    )
    return jnp.sum(direction * embedding)

  grads = jax.jit(jax.grad(score))(params)
  heads = grads["layer_0"]["self_attention"]["query"]["kernel"]
  for ours, theirs in (
    (grads["token_embedding"]["embedding"], words),
    # The segment's row, added to a position, leaves its gradient as it is.
    (grads["position_embedding"]["embedding"], positions),
    (heads.reshape(D, D), query.T),
  ):
    largest = theirs.abs().max().item()
    assert largest > 0.1
    np.testing.assert_allclose(
      ours, theirs.numpy(), rtol=0, atol=1e-4 * largest
    )
