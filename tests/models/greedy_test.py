"""Greedy answers inside a step, against a loop that reads all again."""

import functools

from causal_models import CONFIGS
from causal_models import random_params
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_rag
from small_rag import EOS

from rag_jax.decoding.rag import RagDecoder
from rag_jax.models.causal import CausalGenerator
from rag_jax.models.causal import build_causal
from rag_jax.models.greedy import greedy_answers

STEPS = 5


def by_hand(generator, params, tokens, mask, end_ids):
  """The answers when each token reads the whole context and answer again."""
  logits = jax.jit(functools.partial(generator.apply, {"params": params}))
  rows = []
  for context, real in zip(tokens, mask, strict=True):
    answer = []
    while len(answer) < STEPS and (not answer or answer[-1] not in end_ids):
      padded = np.zeros((1, STEPS), np.int32)
      padded[0, : len(answer)] = answer
      if isinstance(generator, CausalGenerator):
        num = int(real.sum())
        padded = np.concatenate([context[real], padded[0]])[None]
        found = logits(padded, jnp.ones(padded.shape, bool))[0, num - 1 :]
      else:
        found = logits(context[None], real[None], jnp.asarray(padded))[0]
      answer.append(int(jnp.argmax(found[len(answer)])))
    rows.append([*answer, *[end_ids[0]] * (STEPS - len(answer))])
  return rows


def test_an_encoder_decoder_writes_what_is_most_likely():
  _, tokens, mask = small_rag.inputs()
  rows = tokens.reshape(-1, tokens.shape[-1]), mask.reshape(-1, mask.shape[-1])
  params = small_rag.params()["generator"]
  write = functools.partial(
    greedy_answers, small_rag.MODEL, num_steps=STEPS, end_ids=(EOS,)
  )
  found = jax.jit(write)(params, *rows)
  assert len({(row == EOS).sum() for row in np.asarray(found)}) > 1
  assert found.tolist() == by_hand(small_rag.MODEL, params, *rows, (EOS,))
  # As decoding writes, for one document.
  decoder = RagDecoder(small_rag.MODEL, small_rag.GREEDY, "single")
  alone = [x[:, :1] for x in small_rag.inputs()]
  out = decoder(small_rag.params(), *alone)
  first = found.reshape(small_rag.B, small_rag.K, -1)[:, 0]
  for row, written, length in zip(
    first, out.tokens[:, 0], out.lengths[:, 0], strict=True
  ):
    assert row[:length].tolist() == written[:length].tolist()


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "gpt2"])
@pytest.mark.parametrize("left", [True, False])
def test_a_causal_model_continues_prompts_padded_on_either_side(kind, left):
  config = CONFIGS[kind]
  generator = build_causal(config, dtype=jnp.float32)
  params = random_params(config)
  rng = np.random.default_rng(0)
  tokens = jnp.asarray(rng.integers(3, 60, (4, 7)), jnp.int32)
  mask = np.arange(7) < np.array([[7], [4], [5], [2]])
  mask = jnp.asarray(mask[:, ::-1] if left else mask)
  # The first answer would be the same with any end; these end early too.
  free = by_hand(generator, params, tokens, mask, (-1,))
  end_ids = (free[0][1], free[1][2])
  write = functools.partial(
    greedy_answers, generator, num_steps=STEPS, end_ids=end_ids
  )
  found = jax.jit(write)(params, tokens, mask)
  expected = by_hand(generator, params, tokens, mask, end_ids)
  assert found.tolist() == expected
