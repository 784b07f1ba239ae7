"""The decoder-only generator: one model whose fields make it a known one.

Llama (arXiv:2302.13971), Qwen 2 and 3 (arXiv:2407.10671, arXiv:2505.09388),
Gemma 2 and 3 (arXiv:2408.00118, arXiv:2503.19786) or GPT-2, as a `CausalConfig`
says. In: tokens [N, S], padded on either side. Out: logits [N, S, V], float32.
"""

import functools
import typing

from flax import linen as nn
import flax.struct
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from rag_jax.config_generators import CausalConfig
from rag_jax.config_generators import check_causal
from rag_jax.models.causal_layers import CausalLayer
from rag_jax.models.causal_layers import KeysValues
from rag_jax.models.layers import UNROLLED
from rag_jax.models.layers import LayerLoop
from rag_jax.models.layers import check_positions
from rag_jax.models.layers import make_norm
from rag_jax.models.partitioning import constrain
from rag_jax.models.partitioning import dense_init
from rag_jax.models.partitioning import split_table
from rag_jax.models.rope import rotation


# Not type-checked, because JAX also builds it from shapes and stacked arrays.
@typing.no_type_check
@flax.struct.dataclass
class CausalCache:
  """What was read so far: S places, of which the first are filled."""

  layers: tuple[KeysValues, ...]
  mask: Bool[Array, "N S"]  # True on real tokens
  positions: Int[Array, "N S"]
  filled: Int[Array, ""]  # places


class CausalGenerator(nn.Module):
  """A decoder that reads its own output.

  Params: `token_embedding` [V, D]; `position_embedding` [positions, D] if they
  are learned; `layer_0` etc.; `final_norm`; `lm_head` [V, D] if the output is
  not tied.

  Positions count real tokens, so padding, also before a text, changes nothing.
  """

  config: CausalConfig
  dtype: DTypeLike = jnp.bfloat16
  loop: LayerLoop = UNROLLED

  def setup(self):
    c = self.config
    table = functools.partial(
      nn.Embed, c.vocab_size, c.embed_dim,
      embedding_init=dense_init("vocab", "embed"),
    )  # fmt: skip
    self.token_embedding = table()
    if c.positions == "learned":
      self.position_embedding = nn.Embed(
        c.max_positions,
        c.embed_dim,
        embedding_init=dense_init("position", "embed"),
      )
    self.layers = [
      CausalLayer(c, dtype=self.dtype, name=f"layer_{i}")
      for i in range(c.num_layers)
    ]
    self.final_norm = make_norm(c, dtype=self.dtype)
    if not c.tied_output:
      self.lm_head = table()
    self.drop = nn.Dropout(c.dropout)

  def _check_positions(self, length: int) -> None:
    learned = self.config.positions == "learned"
    check_positions(
      length, self.config.max_positions if learned else 0, "Texts"
    )

  @property
  def _kinds(self) -> tuple[bool, ...]:
    """The kinds of layers that there are: global (False), sliding (True)."""
    slide = self.config.sliding_layers
    kinds = {i in slide for i in range(self.config.num_layers)}
    return tuple(sorted(kinds or {False}))

  def _kind_of(self, layer: int) -> int:
    return self._kinds.index(layer in self.config.sliding_layers)

  def _embed(
    self,
    tokens: Int[Array, "N T"],
    positions: Int[Array, "N T"],
    deterministic: bool,
  ) -> Float[Array, "N T D"]:
    c = self.config
    table = split_table(jnp.asarray(self.token_embedding.embedding))
    x = jnp.take(table, tokens, axis=0).astype(self.dtype)
    if c.scale_embedding:
      x *= c.embed_dim**0.5
    if c.positions == "learned":
      x += self.position_embedding(positions).astype(self.dtype)
    x = self.drop(x, deterministic=deterministic)
    return constrain(x, "batch", "length", "embed")

  def _seen(
    self,
    positions: Int[Array, "N T"],
    first: int | Int[Array, ""],
    key_positions: Int[Array, "N S"],
    key_mask: Bool[Array, "N S"],
  ) -> Bool[Array, "kinds N T S"]:
    """Returns which places each token sees, for each kind of layers.

    Args:
      positions: of the tokens.
      first: the place of the first of them.
      key_positions: of what is at the places.
      key_mask: True where that is a real token.
    """
    t, s = positions.shape[1], key_mask.shape[1]
    causal = jnp.arange(s) <= first + jnp.arange(t)[:, None]  # T S
    seen = key_mask[:, None] & causal
    near = positions[..., None] - key_positions[:, None]
    near = near < self.config.sliding_window
    return jnp.stack([seen & near if kind else seen for kind in self._kinds])

  def _rotations(
    self, positions: Int[Array, "N T"]
  ) -> Float[Array, "kinds 2 N T half"] | None:
    """Returns how RoPE rotates, for each kind; None if there is no RoPE."""
    if self.config.positions != "rope":
      return None
    return jnp.stack(
      [rotation(self.config, positions, local=kind) for kind in self._kinds]
    )

  def states(
    self,
    tokens: Int[Array, "N S"],
    mask: Bool[Array, "N S"],
    deterministic: bool = True,
  ) -> Float[Array, "N S D"]:
    """Returns the inputs of `logits` at each place."""
    self._check_positions(tokens.shape[1])
    positions = _positions(mask)
    x = self.loop.run(
      self.layers,
      self._embed(tokens, positions, deterministic),
      self._seen(positions, 0, positions, mask),
      self._rotations(positions),
      deterministic=deterministic,
      each=[self._kind_of(i) for i in range(len(self.layers))],
    )
    return self.final_norm(x)

  def logits(self, x: Float[Array, "N T D"]) -> Float[Array, "N T V"]:
    """Returns float32 logits of the token after each state."""
    c = self.config
    table = (self.token_embedding if c.tied_output else self.lm_head).embedding
    logits = jnp.einsum(
      "NTD,VD->NTV",
      x,
      split_table(jnp.asarray(table)).astype(self.dtype),
      preferred_element_type=jnp.float32,
    )
    if c.logits_soft_cap:
      logits = c.logits_soft_cap * jnp.tanh(logits / c.logits_soft_cap)
    return constrain(logits, "batch", "length", "vocab")

  def __call__(
    self,
    tokens: Int[Array, "N S"],
    mask: Bool[Array, "N S"],
    deterministic: bool = True,
  ) -> Float[Array, "N S V"]:
    """Returns the logits of the token after each of `tokens`.

    Args:
      tokens: rows padded before or after their text.
      mask: True on real tokens. Logits at padding mean nothing.
      deterministic: whether to turn dropout off.

    Raises:
      ValueError: rows are longer than a learned table of positions.
    """
    return self.logits(self.states(tokens, mask, deterministic))

  def prefill(
    self,
    tokens: Int[Array, "N S"],
    mask: Bool[Array, "N S"],
    num_steps: int,
  ) -> tuple[Float[Array, "N V"], CausalCache]:
    """Reads prompts; returns the logits of the token after each.

    Args:
      tokens: rows padded before or after their text.
      mask: True on real tokens; at least one per row.
      num_steps: the most tokens that `step` will read. JAX would overwrite the
        last one, without a word, with tokens beyond.

    Raises:
      ValueError: prompts and steps exceed a learned table of positions.
    """
    n, s = tokens.shape
    self._check_positions(s + num_steps)
    positions = _positions(mask)
    empty = CausalCache(
      tuple(layer.init_cache(n, s + num_steps) for layer in self.layers),
      jnp.zeros((n, s + num_steps), bool),
      jnp.zeros((n, s + num_steps), jnp.int32),
      jnp.zeros((), jnp.int32),
    )
    x, cache = self._read(tokens, mask, positions, empty)
    last = s - 1 - jnp.argmax(mask[:, ::-1], axis=1)  # N
    x = jnp.take_along_axis(x, last[:, None, None], axis=1)
    return self.logits(x)[:, 0], cache

  def step(
    self, tokens: Int[Array, "N"], cache: CausalCache
  ) -> tuple[Float[Array, "N V"], CausalCache]:
    """Reads one more token per row; returns the logits of the next."""
    position = jnp.sum(cache.mask, axis=1, dtype=jnp.int32)
    x, cache = self._read(
      tokens[:, None],
      jnp.ones((len(tokens), 1), bool),
      position[:, None],
      cache,
    )
    return self.logits(x)[:, 0], cache

  def _read(
    self,
    tokens: Int[Array, "N T"],
    mask: Bool[Array, "N T"],
    positions: Int[Array, "N T"],
    cache: CausalCache,
  ) -> tuple[Float[Array, "N T D"], CausalCache]:
    """Returns the states of T new tokens, and the cache with them."""
    first = cache.filled

    def write(
      old: Int[Array, "N S"] | Bool[Array, "N S"],
      new: Int[Array, "N T"] | Bool[Array, "N T"],
    ) -> Int[Array, "N S"] | Bool[Array, "N S"]:
      return old.at[:, first + jnp.arange(new.shape[1])].set(new)

    key_mask = write(cache.mask, mask)
    key_positions = write(cache.positions, positions)
    seen = self._seen(positions, first, key_positions, key_mask)
    rotations = self._rotations(positions)
    x = self._embed(tokens, positions, True)
    caches = []
    for i, (layer, of_layer) in enumerate(
      zip(self.layers, cache.layers, strict=True)
    ):
      kind = self._kind_of(i)
      turned = None if rotations is None else rotations[kind]
      x, of_layer = layer.step(x, seen[kind], turned, first, of_layer)
      caches.append(of_layer)
    filled = first + tokens.shape[1]
    return (
      self.final_norm(x),
      CausalCache(tuple(caches), key_mask, key_positions, filled),
    )


def _positions(mask: Bool[Array, "N S"]) -> Int[Array, "N S"]:
  """Returns the number of real tokens before each place."""
  return jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)


def build_causal(
  config: CausalConfig, *, dtype: DTypeLike, loop: LayerLoop = UNROLLED
) -> CausalGenerator:
  """Returns the generator that `config` describes.

  Raises:
    ValueError: its fields do not fit together.
  """
  return CausalGenerator(check_causal(config).frozen(), dtype=dtype, loop=loop)
