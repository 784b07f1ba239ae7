"""The encoder-decoder that reads a context and writes a target.

BART's architecture (Lewis et al. 2019, https://arxiv.org/abs/1910.13461) or
T5's (Raffel et al. 2020, https://arxiv.org/abs/1910.10683): the fields say
which. The defaults are BART's.

In: context tokens [N, C] and target tokens [N, T], N = B*K.
Out: target_logits [N, T, V].
"""

import dataclasses
import functools

from flax import linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from rag_jax.config import GeneratorConfig
from rag_jax.models.layers import check_positions
from rag_jax.models.partitioning import INIT_STD
from rag_jax.models.partitioning import constrain
from rag_jax.models.partitioning import dense_init
from rag_jax.models.partitioning import named
from rag_jax.models.partitioning import split_table
from rag_jax.models.pointer import Copy
from rag_jax.models.pointer import Pointer
from rag_jax.models.pointer import PointerCache
from rag_jax.models.pointer import mix_logits
from rag_jax.models.pointer import nothing
from rag_jax.models.stack import DecoderCache
from rag_jax.models.stack import Stack


class Generator(nn.Module):
  """A bidirectional encoder and a causal decoder with shared embeddings.

  Params: `token_embedding` [V, D], shared by encoder, decoder and, if tied, the
  output; `lm_head` [V, D] otherwise; `encoder` and `decoder`;
  `final_logits_bias` [V], which BART holds at zero; `pointer`, if it copies.
  """

  config: GeneratorConfig  # with its `vocab_size` and `decoder_start_id`
  dtype: DTypeLike = jnp.bfloat16

  def setup(self):
    c = self.config
    std = c.embed_dim**-0.5 if c.init == "copy" else INIT_STD
    table = functools.partial(nn.Embed, c.vocab_size, c.embed_dim)
    self.token_embedding = table(
      embedding_init=named(nn.initializers.normal(std), "vocab", "embed")
    )
    self.encoder = Stack(c, cross=False, dtype=self.dtype)
    decoder = c.frozen(
      num_layers=c.num_decoder_layers or c.num_layers,
      num_heads=c.num_decoder_heads or c.num_heads,
      mlp_dim=c.decoder_mlp_dim or c.mlp_dim,
    )
    self.decoder = Stack(decoder, cross=True, dtype=self.dtype)
    if not c.tied_output:
      self.lm_head = table(embedding_init=dense_init("vocab", "embed"))
    if c.logits_bias:
      self.final_logits_bias = self.param(
        "final_logits_bias",
        named(nn.initializers.zeros, "vocab"),
        (c.vocab_size,),
      )
    if c.pointer:
      self.copier = Pointer(c.embed_dim, dtype=self.dtype)

  def _check_positions(self, length: int, what: str) -> None:
    c = self.config
    learned = c.positions == "learned"
    check_positions(length, c.max_positions if learned else 0, what)

  def _embed(self, tokens: Int[Array, "N T"]) -> Float[Array, "N T D"]:
    table = split_table(self.token_embedding.embedding)
    x = jnp.take(table, tokens, axis=0).astype(self.dtype)
    c = self.config
    return x * c.embed_dim**0.5 if c.scale_embedding else x

  def output_table(self) -> Float[Array, "V D"]:
    """Returns the vectors whose inner products with the states are logits."""
    tied = self.config.tied_output
    table = (self.token_embedding if tied else self.lm_head).embedding
    return split_table(table)

  def output_states(self, x: Float[Array, "*N D"]) -> Float[Array, "*N D"]:
    """Returns the states that `output_table` is compared with."""
    c = self.config
    return x * c.embed_dim**-0.5 if c.scale_output else x

  def output_bias(self) -> Float[Array, "V"] | None:
    """Returns what is added to the logits, if anything is."""
    return self.final_logits_bias if self.config.logits_bias else None

  def logits(
    self, x: Float[Array, "N T D"], copy: Copy | None = None
  ) -> Float[Array, "N T V"]:
    """Returns float32 logits of the decoder's states.

    With a pointer they are log-probabilities, of what is written or copied.
    """
    logits = jnp.einsum(
      "NTD,VD->NTV",
      self.output_states(x),
      self.output_table().astype(self.dtype),
      preferred_element_type=jnp.float32,
    )
    bias = self.output_bias()
    if bias is not None:
      logits = logits + bias.astype(jnp.float32)
    if copy is not None:
      logits = mix_logits(copy, logits)
    return constrain(logits, "batch", "length", "vocab")

  def encode(
    self,
    context_tokens: Int[Array, "N C"],
    context_mask: Bool[Array, "N C"],
    deterministic: bool = True,
  ) -> Float[Array, "N C D"]:
    """Returns what the decoder looks at."""
    self._check_positions(context_tokens.shape[1], "Contexts")
    return self.encoder(
      self._embed(context_tokens),
      context_mask[:, None, :],
      jnp.arange(context_tokens.shape[1]),
      deterministic=deterministic,
    )

  def states(
    self,
    context_tokens: Int[Array, "N C"],
    context_mask: Bool[Array, "N C"],
    target_tokens: Int[Array, "N T"],
    deterministic: bool = True,
  ) -> tuple[Float[Array, "N T D"], Copy | None]:
    """Returns what the logits at each position are computed from.

    The states of the decoder, and what the pointer says, if there is one.
    """
    self._check_positions(target_tokens.shape[1], "Targets")
    memory = self.encode(context_tokens, context_mask, deterministic)
    inputs = self.shift_right(target_tokens)
    length = inputs.shape[1]
    # No mask of padding: it stands at the end, where causal positions that
    # count never look.
    causal = jnp.tril(jnp.ones((1, length, length), bool))
    states = self.decoder(
      self._embed(inputs),
      causal,
      jnp.arange(length),
      memory,
      context_mask[:, None, :],
      deterministic=deterministic,
    )
    if not self.config.pointer:
      return states, None
    source = self.copier.source(context_tokens, context_mask, memory)
    return states, self.copier(states, inputs, source)

  def shift_right(self, target_tokens: Int[Array, "N T"]) -> Int[Array, "N T"]:
    """Returns what the decoder reads to predict the target."""
    return jnp.pad(
      target_tokens[:, :-1], ((0, 0), (1, 0)),
      constant_values=self.config.decoder_start_id,
    )  # fmt: skip

  def __call__(
    self,
    context_tokens: Int[Array, "N C"],
    context_mask: Bool[Array, "N C"],
    target_tokens: Int[Array, "N T"],
    deterministic: bool = True,
  ) -> Float[Array, "N T V"]:
    """Returns target_logits: at each position, scores of the token there.

    The decoder reads the target shifted right by one behind
    `decoder_start_id`, so position t has seen the tokens before t alone.
    """
    return self.logits(
      *self.states(context_tokens, context_mask, target_tokens, deterministic)
    )

  def init_cache(
    self,
    memory: Float[Array, "B K S D"],
    memory_mask: Bool[Array, "B K S"],
    memory_tokens: Int[Array, "B K S"],
    num_beams: int,
    num_steps: int,
  ) -> DecoderCache:
    """Returns the cache before the first of `num_steps` tokens.

    Args:
      memory: what `encode` returned for K documents a question.
      memory_mask: True on real tokens.
      memory_tokens: what was encoded.
      num_beams: W, of each question.
      num_steps: T, as many tokens can be decoded.
    """
    cache = self.decoder.init_cache(memory, memory_mask, num_beams, num_steps)
    if not self.config.pointer:
      return cache
    b, k, s, d = memory.shape
    source = self.copier.source(
      memory_tokens.reshape(b * k, s),
      memory_mask.reshape(b * k, s),
      memory.reshape(b * k, s, d),
    )
    pointer = PointerCache(source, nothing(source.tokens, num_beams))
    return dataclasses.replace(cache, pointer=pointer)

  def step(
    self,
    tokens: Int[Array, "B W"],
    position: Int[Array, ""],
    cache: DecoderCache,
  ) -> tuple[Float[Array, "B W K V"], DecoderCache]:
    """Returns the logits after reading the tokens at `position`."""
    b, w = tokens.shape
    before, copy = cache.pointer, None
    x, cache = self.decoder.step(self._embed(tokens), position, cache)
    if self.config.pointer:
      assert before is not None
      k = len(x) // b
      read = jnp.repeat(tokens, k, axis=0)
      copy = self.copier.step(x, read, before.log_places, before.source)
      before = dataclasses.replace(before, log_places=copy.log_places)
      cache = dataclasses.replace(cache, pointer=before)
    logits = self.logits(x, copy)  # B*K W V
    return jnp.swapaxes(logits.reshape(b, -1, w, logits.shape[-1]), 1, 2), cache

  def tree_states(
    self,
    tokens: Int[Array, "B M"],
    depths: Int[Array, "B M"],
    seen: Bool[Array, "B M M"],
    memory: Float[Array, "B K S D"],
    memory_mask: Bool[Array, "B K S"],
    memory_tokens: Int[Array, "B K S"],
  ) -> tuple[Float[Array, "BK M D"], Copy | None]:
    """Returns what `states` does, of M nodes of a tree of prefixes.

    Candidates that begin alike share the nodes of what they share.

    Args:
      tokens: what the decoder reads at each node.
      depths: its position.
      seen: True where node m looks at a node: at its ancestors and itself.
      memory: what `encode` returned.
      memory_mask: True on real tokens.
      memory_tokens: what was encoded.
    """
    b, k, s, d = memory.shape
    memory, mask = memory.reshape(b * k, s, d), memory_mask.reshape(b * k, s)
    tokens, seen, depths = (
      jnp.repeat(x, k, axis=0) for x in (tokens, seen, depths)
    )
    states = self.decoder(
      self._embed(tokens), seen, depths, memory, mask[:, None]
    )
    if not self.config.pointer:
      return states, None
    source = self.copier.source(memory_tokens.reshape(b * k, s), mask, memory)
    return states, self.copier.tree(states, tokens, depths, seen, source)

  def score(
    self,
    target_tokens: Int[Array, "B W T"],
    memory: Float[Array, "B K S D"],
    memory_mask: Bool[Array, "B K S"],
    memory_tokens: Int[Array, "B K S"],
  ) -> Float[Array, "B W K T"]:
    """Returns log p(y_t | x, z, y_<t) of W candidates under K documents."""
    b, w, t = target_tokens.shape
    inputs = self.shift_right(target_tokens.reshape(b * w, t))
    causal = jnp.tril(jnp.ones((t, t), bool))
    same = jnp.eye(w, dtype=bool)
    seen = (same[:, None, :, None] & causal[:, None]).reshape(w * t, w * t)
    states, copy = self.tree_states(
      inputs.reshape(b, w * t),
      jnp.tile(jnp.arange(t), (b, w)),
      jnp.broadcast_to(seen, (b, w * t, w * t)),
      memory,
      memory_mask,
      memory_tokens,
    )  # B*K W*T D
    logits = self.logits(states, copy)
    logits = logits.reshape(b, -1, w, t, logits.shape[-1])
    indices = target_tokens[:, None, ..., None]
    chosen = jnp.take_along_axis(logits, indices, axis=-1)[..., 0]
    log_probs = chosen - jax.nn.logsumexp(logits, axis=-1)
    return jnp.swapaxes(log_probs, 1, 2)
