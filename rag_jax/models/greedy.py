"""Greedy answers inside a compiled step, from which a reward is computed.

In: a generator and contexts [N, C]. Out: the most likely token after each
other, [N, T]. decoding/ has all other ways to write, and its settings.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PyTree

from rag_jax.models.causal import CausalGenerator
from rag_jax.models.generator import Generator


def greedy_answers(
  generator: Generator | CausalGenerator,
  params: PyTree,
  context_tokens: Int[Array, "N C"],
  context_mask: Bool[Array, "N C"],
  *,
  num_steps: int,
  end_ids: tuple[int, ...],
) -> Int[Array, "N T"]:
  """Returns the tokens of greedy answers, the end token included.

  Args:
    generator: unbound.
    params: of the generator.
    context_tokens: one context per answer.
    context_mask: True on real tokens.
    num_steps: T, the most tokens of an answer.
    end_ids: tokens that end an answer; the first of them fills what follows.
  """
  run: Any = functools.partial(generator.apply, {"params": params})
  memory = run(context_tokens, context_mask, method="encode")
  alone = [x[:, None] for x in (context_mask, context_tokens)]  # K = 1
  memory = jax.tree.map(lambda x: x[:, None], memory)
  cache = run(memory, *alone, 1, num_steps, method="init_cache")
  n = len(context_tokens)
  ends = jnp.array(end_ids, jnp.int32)

  def going(state: tuple[Array, Array, Array, PyTree]) -> Array:
    position, _, ended, _ = state
    return (position < num_steps) & ~jnp.all(ended)

  def write(state: tuple[Array, Array, Array, PyTree]) -> Any:
    position, written, ended, cache = state
    last = written[:, position]  # the start token is at 0
    logits, cache = run(last[:, None], position, cache, method="step")
    token = jnp.argmax(logits[:, 0, 0], axis=-1).astype(jnp.int32)
    token = jnp.where(ended, ends[0], token)
    written = written.at[:, position + 1].set(token)
    return position + 1, written, ended | jnp.isin(token, ends), cache

  written = jnp.full((n, num_steps + 1), ends[0])
  written = written.at[:, 0].set(generator.start_id)
  start = jnp.int32(0), written, jnp.zeros(n, bool), cache
  return jax.lax.while_loop(going, write, start)[1][:, 1:]
