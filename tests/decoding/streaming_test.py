"""Tokens that come one by one are those that come together."""

import dataclasses
import functools

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rag_jax.config_models import GeneratorConfig
from rag_jax.decoding import compiled
from rag_jax.decoding.logits import PrefixTrie
from rag_jax.decoding.rag import RagDecoder
from rag_jax.decoding.settings import GenerationSettings
from rag_jax.decoding.streaming import can_stream
from rag_jax.decoding.streaming import stream
from rag_jax.models.rag import build_generator

B, K, C, V, STEPS, PAD, EOS = 3, 2, 4, 11, 6, 1, 2
MODEL = build_generator(
  GeneratorConfig(num_layers=1, embed_dim=8, num_heads=2, mlp_dim=8),
  vocab_size=V,
  decoder_start_id=EOS,
  dtype=jnp.float32,
)
GREEDY = GenerationSettings(
  max_new_tokens=STEPS, eos_token_id=(EOS, 3, 4), pad_token_id=PAD
)
SAMPLING = dataclasses.replace(GREEDY, do_sample=True, num_return_sequences=2)


@functools.cache
def arguments():
  """Returns parameters, doc_scores, contexts and mask."""
  rng = np.random.default_rng(0)
  tokens = jnp.zeros((1, 2), jnp.int32)
  shapes = jax.eval_shape(
    MODEL.init, jax.random.key(0), tokens, tokens == 0, tokens
  )
  params = jax.tree.map(
    lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32),
    nn.meta.unbox(shapes)["params"],
  )
  return (
    {"generator": params},
    rng.normal(size=(B, K)).astype(np.float32),
    rng.integers(V, size=(B, K, C), dtype=np.int32),
    np.ones((B, K, C), bool),
  )


def streamed(decoder, **kwargs):
  """Returns the tokens that came, [B, R, T]."""
  return np.stack(list(stream(decoder, *arguments(), **kwargs)), axis=-1)


@pytest.mark.parametrize(
  "settings", [GREEDY, SAMPLING], ids=["greedy", "sample"]
)
@pytest.mark.parametrize("mode", ["rag_token", "fid"])
def test_the_tokens_are_those_of_the_decoder(settings, mode):
  decoder = RagDecoder(MODEL, settings, mode)
  whole = decoder(*arguments(), seed=3)
  longest = int(whole.lengths.max())
  for chunk_steps in (1, 4):
    tokens = streamed(decoder, seed=3, chunk_steps=chunk_steps)
    assert tokens.shape[-1] == longest
    np.testing.assert_array_equal(tokens, whole.tokens[..., :longest])
    assert not np.any(whole.tokens[..., longest:] != PAD)


@pytest.mark.parametrize(
  "settings", [GREEDY, SAMPLING], ids=["greedy", "sample"]
)
@pytest.mark.parametrize("mode", ["rag_token", "fid", "single"])
def test_at_the_end_stands_what_the_decoder_returns(settings, mode):
  decoder = RagDecoder(MODEL, settings, mode)
  assert can_stream(decoder)
  ends = []

  def steps():
    ends.append((yield from stream(decoder, *arguments(), seed=3)))

  assert len(list(steps())) == int(decoder(*arguments(), seed=3).lengths.max())
  expected = decoder(*arguments(), seed=3)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
    ends[0],
    expected,
  )


def test_it_decodes_no_further_than_it_is_asked(monkeypatch):
  """The first token comes before the second is computed."""
  limits = []
  advance = compiled.advance

  def counted(*args):
    limits.append(args[-1])
    return advance(*args)

  monkeypatch.setattr(compiled, "advance", counted)
  settings = dataclasses.replace(GREEDY, min_new_tokens=3)
  iterator = stream(RagDecoder(MODEL, settings), *arguments())
  assert limits == []
  next(iterator)
  assert limits == [1]
  next(iterator)
  assert limits == [1, 2]


def test_steps_are_compiled_once():
  decoder = RagDecoder(MODEL, GREEDY)
  streamed(decoder)
  before = compiled.advance._cache_size()
  streamed(decoder)
  streamed(decoder, chunk_steps=3)
  assert compiled.advance._cache_size() == before


def test_a_trie_holds_for_a_stream():
  trie = PrefixTrie.from_sequences([[5, 6, 7]], EOS)
  tokens = streamed(RagDecoder(MODEL, GREEDY, trie=trie))
  np.testing.assert_array_equal(tokens, np.tile([5, 6, 7, EOS], (B, 1, 1)))


def test_what_cannot_be_streamed_is_refused_at_once():
  beams = dataclasses.replace(GREEDY, num_beams=2)
  with pytest.raises(ValueError, match=r"num_beams=2 cannot be streamed.*=1"):
    stream(RagDecoder(MODEL, beams), *arguments())
  assert not can_stream(RagDecoder(MODEL, beams))
  for mode in ("rag_sequence", "rag_sequence_fast"):
    with pytest.raises(ValueError, match=rf"mode='{mode}' cannot be streamed"):
      stream(RagDecoder(MODEL, GREEDY, mode), *arguments())
    assert not can_stream(RagDecoder(MODEL, GREEDY, mode))
  with pytest.raises(ValueError, match="chunk_steps=0 decodes nothing"):
    stream(RagDecoder(MODEL, GREEDY), *arguments(), chunk_steps=0)
