"""The encoder-decoder that reads a context and generates a target.

The config chooses the architecture of BART (Lewis et al. 2019,
https://arxiv.org/abs/1910.13461) or of T5 (Raffel et al. 2020,
https://arxiv.org/abs/1910.10683). The defaults are BART's.

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

from rag_jax.config_models import GeneratorConfig
from rag_jax.models.layers import UNROLLED
from rag_jax.models.layers import LayerLoop
from rag_jax.models.layers import check_positions
from rag_jax.models.packing import Packing
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

  Params: `token_embedding` [V, D], shared by encoder, decoder and a tied
  output; `lm_head` [V, D] if the output is not tied; `encoder` and `decoder`;
  `final_logits_bias` [V], zero in BART; `copier`, if config.pointer is set.
  """

  config: GeneratorConfig  # `vocab_size` and `decoder_start_id` must be set
  dtype: DTypeLike = jnp.bfloat16
  loop: LayerLoop = UNROLLED

  def setup(self):
    c = self.config
    std = c.embed_dim**-0.5 if c.init == "copy" else INIT_STD
    table = functools.partial(nn.Embed, c.vocab_size, c.embed_dim)
    self.token_embedding = table(
      embedding_init=named(nn.initializers.normal(std), "vocab", "embed")
    )
    stack = functools.partial(Stack, dtype=self.dtype, loop=self.loop)
    self.encoder = stack(c, cross=False)
    decoder = c.frozen(
      num_layers=c.num_decoder_layers or c.num_layers,
      num_heads=c.num_decoder_heads or c.num_heads,
      mlp_dim=c.decoder_mlp_dim or c.mlp_dim,
    )
    self.decoder = stack(decoder, cross=True)
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
    """Returns the output embeddings: logits are their products with states."""
    tied = self.config.tied_output
    table = (self.token_embedding if tied else self.lm_head).embedding
    return split_table(table)

  def output_states(self, x: Float[Array, "*N D"]) -> Float[Array, "*N D"]:
    """Returns the states to multiply with `output_table`."""
    c = self.config
    return x * c.embed_dim**-0.5 if c.scale_output else x

  def output_bias(self) -> Float[Array, "V"] | None:
    """Returns the bias of the logits, or None."""
    return self.final_logits_bias if self.config.logits_bias else None

  @property
  def logits_soft_cap(self) -> float:
    """Logits x become cap * tanh(x / cap); 0.0: no cap."""
    return 0.0

  @property
  def start_id(self) -> int:
    """The decoder's first input."""
    return self.config.decoder_start_id

  def logits(
    self, x: Float[Array, "N T D"], copy: Copy | None = None
  ) -> Float[Array, "N T V"]:
    """Returns float32 logits of the decoder's states.

    With a pointer they are log-probabilities of the generate/copy mixture.
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
    packing: Packing | None = None,
  ) -> Float[Array, "N C D"]:
    """Returns the encoder's states, which the decoder attends to.

    Args:
      context_tokens: of the contexts.
      context_mask: True on real tokens.
      deterministic: whether to turn dropout off.
      packing: that the contexts fit; None: each has a row of its own.
    """
    self._check_positions(context_tokens.shape[1], "Contexts")

    def encode(
      tokens: Int[Array, "M C"],
      mask: Bool[Array, "M #C C"],
      positions: Int[Array, "*#M C"],
    ) -> Float[Array, "M C D"]:
      x = self._embed(tokens)
      return self.encoder(x, mask, positions, deterministic=deterministic)

    if packing is not None:
      return packing.encode(encode, context_tokens, context_mask)
    places = jnp.arange(context_tokens.shape[1])
    return encode(context_tokens, context_mask[:, None, :], places)

  def states(
    self,
    context_tokens: Int[Array, "N C"],
    context_mask: Bool[Array, "N C"],
    target_tokens: Int[Array, "N T"],
    deterministic: bool = True,
    packing: Packing | None = None,
  ) -> tuple[Float[Array, "N T D"], Copy | None]:
    """Returns the inputs of `logits` at each position.

    These are the decoder's states, and the pointer's output if there is one.
    Arguments as in `encode`.
    """
    memory = self.encode(context_tokens, context_mask, deterministic, packing)
    return self.decode(
      memory, context_tokens, context_mask, target_tokens, deterministic
    )

  def decode(
    self,
    memory: Float[Array, "N S D"],
    memory_tokens: Int[Array, "N S"],
    memory_mask: Bool[Array, "N S"],
    target_tokens: Int[Array, "N T"],
    deterministic: bool = True,
  ) -> tuple[Float[Array, "N T D"], Copy | None]:
    """Returns what `states` does, given the output of `encode`.

    Several contexts may be joined to a single long one, as in FiD.
    """
    inputs, given = self._decoder_inputs(target_tokens)
    states = self.decoder(
      *given, memory, memory_mask[:, None, :], deterministic=deterministic
    )
    if not self.config.pointer:
      return states, None
    source = self.copier.source(memory_tokens, memory_mask, memory)
    return states, self.copier(states, inputs, source)

  def looks(
    self,
    memory: Float[Array, "N S D"],
    memory_mask: Bool[Array, "N S"],
    target_tokens: Int[Array, "N T"],
    *,
    logits: bool = False,
  ) -> Float[Array, "N T S"]:
    """Returns how much the decoder attends to the memory before each token.

    A mean over layers and heads of `Attention.looks`.
    """
    _, given = self._decoder_inputs(target_tokens)
    mask = memory_mask[:, None, :]
    return self.decoder.looks(*given, memory, mask, logits=logits)

  def _decoder_inputs(
    self, target_tokens: Int[Array, "N T"]
  ) -> tuple[Int[Array, "N T"], tuple[Array, Array, Array]]:
    """Returns the decoder's tokens, and its first three arguments."""
    self._check_positions(target_tokens.shape[1], "Targets")
    inputs = self.shift_right(target_tokens)
    length = inputs.shape[1]
    # No padding mask: padding is at the end, so the causal mask hides it from
    # all real positions.
    causal = jnp.tril(jnp.ones((1, length, length), bool))
    return inputs, (self._embed(inputs), causal, jnp.arange(length))

  def shift_right(self, target_tokens: Int[Array, "N T"]) -> Int[Array, "N T"]:
    """Returns the decoder's input tokens for teacher forcing."""
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
    """Returns target_logits: the scores of the target token at each position.

    The decoder reads `decoder_start_id` and then the target shifted right by
    one, so position t sees only the tokens before t.
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
      memory: the output of `encode` for K documents per question.
      memory_mask: True on real tokens.
      memory_tokens: the tokens that were encoded.
      num_beams: W, beams per question.
      num_steps: T, the maximum number of tokens to decode.
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
    """Returns the same as `states`, for M nodes of a prefix tree.

    Candidates with a common prefix share its nodes.

    Args:
      tokens: the decoder's input token at each node.
      depths: the position of each node.
      seen: True where node m attends to a node: to its ancestors and itself.
      memory: the output of `encode`.
      memory_mask: True on real tokens.
      memory_tokens: the tokens that were encoded.
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
