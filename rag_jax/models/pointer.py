"""The pointer: copies tokens of the context, one target token after another.

With probability g the next token is drawn from the vocabulary's softmax, and
with probability 1 - g it is copied from a place of the context
(pointer-generator, See et al. 2017, https://arxiv.org/abs/1704.04368,
section 2.2):

    p(y_t) = g_t softmax(logits_t)(y_t) + (1 - g_t) sum_s pi_t(s) [c_s = y_t]

The place that is copied from is a Markov chain over the places s of the context
tokens c. It is marginalised exactly, by the forward algorithm of a hidden
Markov model. The token just read was copied from s with probability

    r_t(s) = pi_{t-1}(s) [c_s = y_{t-1}] / sum_s' pi_{t-1}(s') [c_s' = y_{t-1}]

(the "selective read" of Gu et al. 2016, https://arxiv.org/abs/1603.06393,
section 3.3). With probability l_t the copy then continues at the next place;
otherwise the attention a_t chooses a new place:

    pi_t(s) = l_t r_t(s - 1) + (1 - l_t sum_s' r_t(s' - 1)) a_t(s)

So a name of five pieces, or a number with repeated digits, is copied whole once
its first piece is found. g and l depend on the decoder's state and on the
encoder's state at the place where the copy would continue, which shows whether
the name ends there. T5 and BART have no pointer.

In: the states of the decoder and of the encoder. Out: `Copy`, which
`mix_targets` and `mix_logits` combine with the vocabulary's distribution.
"""

import dataclasses
import typing

from flax import linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from rag_jax.models.partitioning import dense_init

# Log-probability of a place that cannot be copied from; finite, so that sums of
# it are too. All sums are taken in log space: gradients stay at or below 1,
# however improbable the copies of a target are.
_NEVER = -1e9
_GOES_ON = 3.0  # initial logit of l: copies mostly have several tokens


# Not type-checked, because JAX also builds it from shapes and stacked arrays.
@typing.no_type_check
@flax.struct.dataclass
class Copy:
  """The distribution over the places that the next token is copied from."""

  tokens: Int[Array, "N S"]  # of the context
  log_places: Float[Array, "N T S"]  # log pi_t
  gate_logits: Float[Array, "N T"]  # of g_t, the probability not to copy


@typing.no_type_check
@flax.struct.dataclass
class Source:
  """The encoded context that the pointer copies from."""

  tokens: Int[Array, "N S"]
  mask: Bool[Array, "N S"]  # True on real tokens
  key: Float[Array, "N S D"]
  onward: Float[Array, "N S D"]  # features of a place for g and l


@typing.no_type_check
@flax.struct.dataclass
class PointerCache:
  """The state of the pointer between decoding steps."""

  source: Source
  log_places: Float[Array, "N W S"]  # of each beam's previous token

  def reorder(self, beams: Int[Array, "B W"]) -> "PointerCache":
    """Returns the cache whose beam w continues the old beam `beams[w]`."""
    b, w = beams.shape
    n, _, s = self.log_places.shape
    places = self.log_places.reshape(b, n // b, w, s)
    places = jnp.take_along_axis(places, beams[:, None, :, None], axis=2)
    return dataclasses.replace(self, log_places=places.reshape(n, w, s))


def _log_gates(copy: Copy) -> tuple[Float[Array, "N T"], Float[Array, "N T"]]:
  """Returns log g and log(1 - g)."""
  return (
    jax.nn.log_sigmoid(copy.gate_logits),
    jax.nn.log_sigmoid(-copy.gate_logits),
  )


def mix_targets(
  copy: Copy,
  log_probs: Float[Array, "N T"],
  target_tokens: Int[Array, "N T"],
) -> Float[Array, "N T"]:
  """Returns log p(y_t) of the mixture.

  Args:
    copy: the pointer's output.
    log_probs: log-probabilities of the targets by the vocabulary's softmax.
    target_tokens: the same targets.
  """
  same = copy.tokens[:, None, :] == target_tokens[..., None]  # N T S
  places = jnp.where(same, copy.log_places, _NEVER)
  log_write, log_copy = _log_gates(copy)
  return jnp.logaddexp(
    log_write + log_probs, log_copy + jax.nn.logsumexp(places, axis=-1)
  )


def mix_logits(
  copy: Copy, logits: Float[Array, "N T V"]
) -> Float[Array, "N T V"]:
  """Returns log p(v) of the mixture, for every token v of the vocabulary."""
  n, t, _ = copy.log_places.shape
  copied = jnp.zeros(logits.shape, jnp.float32)
  copied = copied.at[
    jnp.arange(n)[:, None, None],
    jnp.arange(t)[:, None],
    copy.tokens[:, None, :],
  ].add(jnp.exp(copy.log_places))
  log_write, log_copy = _log_gates(copy)
  log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
  return jnp.logaddexp(
    log_write[..., None] + log_probs,
    log_copy[..., None] + jnp.log(jnp.maximum(copied, 1e-30)),
  )


class Pointer(nn.Module):
  """The Markov chain over places of the context; see the module docstring.

  Params: kernels `query`, `key`, `state`, `place` and `behind` [D, D], `mode`
  [D, 2], and biases of `state` and `mode`. The logits of g and l are
  mode(gelu(state(h) + place(m_s) + behind(m_s+1))), where h is the decoder's
  state and m_s the encoder's state at the place s where the copy would
  continue.
  """

  embed_dim: int
  dtype: DTypeLike = jnp.bfloat16

  def setup(self):
    def dense(features: int, bias: bool, init: nn.initializers.Initializer):
      return nn.Dense(
        features,
        use_bias=bias,
        kernel_init=init,
        dtype=self.dtype,
      )

    square = dense_init("embed", "head_dim", std=self.embed_dim**-0.5)
    self.query = dense(self.embed_dim, False, square)
    self.key = dense(self.embed_dim, False, square)
    self.state = dense(self.embed_dim, True, square)
    self.place = dense(self.embed_dim, False, square)
    self.behind = dense(self.embed_dim, False, square)
    self.mode = nn.Dense(
      2,
      kernel_init=square,
      bias_init=lambda *_: jnp.array([0.0, _GOES_ON]),
      dtype=jnp.float32,
    )

  def source(
    self,
    tokens: Int[Array, "N S"],
    mask: Bool[Array, "N S"],
    memory: Float[Array, "N S D"],
  ) -> Source:
    """Returns the context encoded for the pointer.

    Args:
      tokens: the tokens of the context.
      mask: True on real tokens.
      memory: the encoder's states of the context.
    """
    # Only the token after a comma shows whether the number ends there.
    behind = jnp.where(mask[:, 1:, None], memory[:, 1:], 0)
    behind = jnp.pad(behind, ((0, 0), (0, 1), (0, 0)))
    onward = self.place(memory) + self.behind(behind)
    return Source(tokens, mask, self.key(memory), onward)

  def _attend(
    self, states: Float[Array, "N T D"], source: Source
  ) -> tuple[Float[Array, "N T S"], Float[Array, "N T D"]]:
    """Returns log a_t, and the decoder's part of the logits of g and l."""
    logits = jnp.einsum(
      "NTD,NSD->NTS",
      self.query(states) * self.embed_dim**-0.5,
      source.key,
      preferred_element_type=jnp.float32,
    )
    logits = jnp.where(source.mask[:, None], logits, jnp.finfo(jnp.float32).min)
    attention = jnp.maximum(jax.nn.log_softmax(logits, axis=-1), _NEVER)
    return attention, self.state(states)

  def step(
    self,
    states: Float[Array, "N T D"],
    read: Int[Array, "N T"],
    before: Float[Array, "N T S"],
    source: Source,
  ) -> Copy:
    """Returns the copy distribution of the token after each of T prefixes.

    Args:
      states: states of the decoder after the last token of each prefix.
      read: that last token.
      before: `log_places` of the step that generated it; `nothing` at the
        start.
      source: the encoded context.
    """
    return self._chain(*self._attend(states, source), read, before, source)

  def __call__(
    self,
    states: Float[Array, "N T D"],
    read: Int[Array, "N T"],
    source: Source,
  ) -> Copy:
    """Returns the copy distribution of each token of a sequence.

    Args:
      states: states of the decoder at each position.
      read: the input tokens of the decoder at each position.
      source: the encoded context.
    """

    def advance(before: Array, inputs: tuple) -> tuple[Array, Copy]:
      attention, state, token = (x[:, None] for x in inputs)
      copy = self._chain(attention, state, token, before, source)
      return copy.log_places, copy

    if self.is_initializing():  # a scan cannot create parameters
      start = nothing(source.tokens, read.shape[1])
      return self.step(states, read, start, source)
    by_step = jax.tree.map(
      lambda x: jnp.moveaxis(x, 1, 0), (*self._attend(states, source), read)
    )
    _, steps = jax.lax.scan(advance, nothing(source.tokens, 1), by_step)
    return Copy(
      tokens=source.tokens,
      log_places=jnp.moveaxis(steps.log_places[:, :, 0], 0, 1),
      gate_logits=jnp.moveaxis(steps.gate_logits[:, :, 0], 0, 1),
    )

  def tree(
    self,
    states: Float[Array, "N M D"],
    read: Int[Array, "N M"],
    depths: Int[Array, "N M"],
    seen: Bool[Array, "N M M"],
    source: Source,
  ) -> Copy:
    """Returns the same as `__call__`, for the nodes of a prefix tree.

    Args:
      states: states of the decoder at each node.
      read: the token of each node.
      depths: the number of tokens before each node.
      seen: True where node m attends to a node: to its ancestors and itself.
      source: the encoded context.
    """
    attention, state = self._attend(states, source)
    above = seen & (depths[:, None, :] == depths[..., None] - 1)
    parents = jnp.argmax(above, axis=-1)[..., None]  # unused at roots
    has_parent = (depths > 0)[..., None]

    def advance(_: Array, copy: Copy) -> Copy:
      before = jnp.take_along_axis(copy.log_places, parents, axis=1)
      before = jnp.where(has_parent, before, _NEVER)
      return self._chain(attention, state, read, before, source)

    start = nothing(source.tokens, read.shape[1])
    first = self._chain(attention, state, read, start, source)
    # After d rounds, nodes of depth d are correct.
    return jax.lax.fori_loop(0, jnp.max(depths), advance, first)

  def _chain(
    self,
    attention: Float[Array, "N T S"],
    state: Float[Array, "N T D"],
    read: Int[Array, "N T"],
    before: Float[Array, "N T S"],
    source: Source,
  ) -> Copy:
    """Returns log pi and the gate after one step of the chain."""
    same = source.tokens[:, None] == read[..., None]
    origin = jnp.where(same, before, _NEVER)
    total = jax.nn.logsumexp(origin, axis=-1, keepdims=True)
    was_copied = total > _NEVER / 2
    origin = jnp.where(was_copied, origin - total, _NEVER)  # log r
    # The copy moves from s - 1 to s.
    onward = jnp.pad(
      origin[..., :-1], ((0, 0), (0, 0), (1, 0)), constant_values=_NEVER
    )
    onward = jnp.where(source.mask[:, None], onward, _NEVER)
    probs = jnp.exp(onward)
    place = jnp.einsum("NTS,NSD->NTD", probs.astype(self.dtype), source.onward)
    mode = self.mode(jax.nn.gelu(state + place).astype(jnp.float32))
    log_on, log_off = (
      jax.nn.log_sigmoid(x) for x in (mode[..., 1:], -mode[..., 1:])
    )
    # log(1 - l m) = log((1 - l) + l (1 - m)): m is 1 unless the copy ended.
    ended = 1.0 - jnp.sum(probs, axis=-1, keepdims=True)
    has_ended = ended > 1e-6
    ended = jnp.where(
      has_ended, jnp.log(jnp.where(has_ended, ended, 1.0)), _NEVER
    )
    log_new = jnp.logaddexp(log_off, log_on + ended)
    places = jnp.logaddexp(log_on + onward, log_new + attention)
    return Copy(source.tokens, jnp.maximum(places, _NEVER), mode[..., 0])


def nothing(tokens: Int[Array, "N S"], num: int) -> Float[Array, "N T S"]:
  """Returns `log_places` before the first token of `num` sequences."""
  return jnp.full((len(tokens), num, tokens.shape[1]), _NEVER)
