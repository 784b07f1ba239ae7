"""The settings of the generators: an encoder-decoder, or a decoder alone.

`GeneratorConfig` is BART, T5 and their relatives (models/generator.py),
`CausalConfig` Llama, Qwen, Gemma and GPT-2 (models/causal.py). Fields are as in
config.py.
"""

# No `from __future__ import annotations` here, as in config.py.

import dataclasses

from rag_jax.settings import Settings
from rag_jax.settings import choice
from rag_jax.settings import number

# "gelu" is exact, "gelu_new" its approximation by tanh.
ACTIVATIONS = ("gelu", "gelu_new", "relu", "silu", "tanh")


@dataclasses.dataclass(slots=True, kw_only=True, unsafe_hash=True)
class TransformerConfig(Settings):
  """What all layers of a transformer have in common. Defaults are BART's."""

  embed_dim: int = number(128, least=1)  # D
  num_heads: int = number(4, least=1)
  head_dim: int = 0  # H; 0: embed_dim / num_heads
  mlp_dim: int = number(256, least=1)
  activation: str = choice(*ACTIVATIONS)
  gated: bool = False  # T5 v1.1: the MLP's activation multiplies
  norm: str = choice("post", "pre")  # after or before the block
  norm_kind: str = choice("layer", "rms")
  norm_eps: float = 1e-5
  use_bias: bool = True  # of dense layers
  relative_buckets: int = 0  # T5's relative positions; 0: none
  # Larger distances share the last bucket.
  relative_max_distance: int = number(128, least=1)
  scale_attention: bool = True  # divide its logits by sqrt(H); T5 does not
  # Of layer outputs and embeddings [checkpoint].
  dropout: float = number(0.0, below=1)
  # Of attention weights [checkpoint].
  attention_dropout: float = number(0.0, below=1)
  # Between the layers of the MLP [checkpoint].
  activation_dropout: float = number(0.0, below=1)

  @property
  def head_size(self) -> int:
    """H, also if `head_dim` is 0."""
    return self.head_dim or self.embed_dim // self.num_heads


@dataclasses.dataclass(slots=True, kw_only=True, unsafe_hash=True)
class GeneratorConfig(TransformerConfig):
  """The encoder-decoder that writes the answer. Defaults are BART's choices.

  With `init_from`, the architecture is read from the checkpoint. `init` and
  `position_init` are for a fresh generator. If `kind` is "causal", the section
  `causal` describes a decoder-only generator, and of the fields here only
  `kind`, `init_from` and `fixed` are used.
  """

  kind: str = choice("encoder_decoder", "causal")
  # Weights to start from: a directory or "hf:ORG/NAME" of a BART, T5, RAG,
  # Llama, Qwen, Gemma or GPT-2 checkpoint. "" starts fresh.
  init_from: str = ""
  vocab_size: int = 0  # rows of the embedding table; 0: the tokenizer's ids
  num_layers: int = number(2, least=0, most=1000)  # in the encoder
  num_decoder_layers: int = number(0, least=0, most=1000)  # 0: as many
  num_decoder_heads: int = 0  # 0: as many
  decoder_mlp_dim: int = 0  # 0: as wide
  embedding_norm: bool = True  # BART's layernorm_embedding
  scale_embedding: bool = False  # multiply embeddings by sqrt(D)
  positions: str = choice("learned", "none")  # absolute ones
  position_offset: int = 2  # BART's position 0 is row 2 of the table
  # Rows of the table, without the offset.
  max_positions: int = number(1024, least=1)
  position_init: str = choice("normal", "sinusoid")
  # True, as in T5: all layers of the encoder share one table, and those of the
  # decoder another. False: one table per layer, in the encoder only.
  relative_shared: bool = False
  tied_output: bool = True  # logits are inner products with the embeddings
  scale_output: bool = False  # divide the tied output by sqrt(D), as T5 v1.0
  logits_bias: bool = True  # BART's final_logits_bias
  # The token that decoding starts with; -1: the end token.
  decoder_start_id: int = number(-1, least=-1)
  # A pointer over the context: the next token is generated, or copied from the
  # context (models/pointer.py). Hugging Face has no such model.
  pointer: bool = False
  # "copy": attention starts as an induction head, so that a generator trained
  # from scratch quotes its documents from the first steps on.
  init: str = choice("normal", "copy")
  # Parameters below "generator/" that are not trained, because the original has
  # constants there: the bias of BART, the sinusoids of Pegasus [checkpoint]. ()
  # trains all.
  fixed: tuple[str, ...] = ("final_logits_bias",)


@dataclasses.dataclass(slots=True, kw_only=True, unsafe_hash=True)
class CausalConfig(TransformerConfig):
  """A decoder-only generator. Defaults are Llama's choices.

  Of the fields of `TransformerConfig`, `use_bias` is that of the MLP alone.
  Norms are always before the blocks (`norm`), and there are no relative
  positions.
  """

  vocab_size: int = 0  # rows of the embedding table; 0: the tokenizer's ids
  num_layers: int = number(2, least=0, most=1000)
  # Heads of keys and values, each for as many heads of queries; 1 is
  # multi-query attention (arXiv:1911.02150), between are groups
  # (arXiv:2305.13245). 0: num_heads.
  num_kv_heads: int = 0
  activation: str = choice("silu", "gelu", "gelu_new", "relu", "tanh")
  gated: bool = True
  norm: str = choice("pre")
  # "rms_plus_one" multiplies by 1 + its scale, as in Gemma.
  norm_kind: str = choice("rms", "rms_plus_one", "layer")
  norm_eps: float = 1e-6
  # Norms of what attention and MLP put out, too, before it is added: Gemma.
  post_norms: bool = False
  use_bias: bool = False  # of the MLP
  qkv_bias: bool = False  # of queries, keys and values
  out_bias: bool = False  # of the output of attention
  qk_norm: bool = False  # RMS norm of each query and key, before RoPE
  # Attention logits are divided by its root; 0: head_dim.
  query_pre_attn_scalar: int = 0
  # Attention logits x become cap * tanh(x / cap); 0.0: no cap.
  attention_soft_cap: float = 0.0
  logits_soft_cap: float = 0.0  # the same, of the logits of tokens
  # A token of a sliding layer sees this many: itself and those before. 0: all.
  sliding_window: int = 0
  sliding_layers: tuple[int, ...] = ()  # which layers slide, from 0
  positions: str = choice("rope", "learned")
  # Rows of the learned table; with RoPE, the longest input it is meant for.
  max_positions: int = number(2048, least=1)
  rope_theta: float = number(10_000.0, above=0)
  # Of sliding layers, without scaling, as in Gemma 3; 0.0: as all others.
  rope_local_theta: float = 0.0
  # How frequencies are lowered for longer inputs (models/rope.py). The fields
  # below are of these scalings.
  rope_scaling: str = choice("none", "linear", "llama3", "yarn")
  rope_factor: float = number(1.0, above=0)
  # Longest input before the scaling.
  rope_original_positions: int = number(2048, least=1)
  rope_low_freq_factor: float = number(1.0, above=0)  # llama3
  rope_high_freq_factor: float = number(4.0, above=0)  # llama3
  rope_beta_fast: float = number(32.0, above=0)  # yarn
  rope_beta_slow: float = number(1.0, above=0)  # yarn
  rope_truncate: bool = True  # yarn: its range of dimensions is whole numbers
  rope_attention_factor: float = 1.0  # yarn: of cosines and sines
  scale_embedding: bool = False  # multiply embeddings by sqrt(D)
  tied_output: bool = True  # logits are inner products with the embeddings

  @property
  def kv_heads(self) -> int:
    """Heads of keys and values, also if `num_kv_heads` is 0."""
    return self.num_kv_heads or self.num_heads


def check_causal(c: CausalConfig) -> CausalConfig:
  """Returns `c` if a model can have these fields together.

  Raises:
    ValueError: names each rule that is broken.
  """
  rope, low, high = (
    c.positions == "rope", c.rope_low_freq_factor, c.rope_high_freq_factor
  )  # fmt: skip
  sliding = c.sliding_layers
  rules = {
    f"vocab_size={c.vocab_size} must be set": c.vocab_size > 0,
    f"num_heads={c.num_heads} must be a multiple of num_kv_heads={c.kv_heads}":
      not c.num_heads % c.kv_heads,
    f"head_dim={c.head_size} must be even and above 0 for RoPE":
      c.head_size > 0 and not (rope and c.head_size % 2),
    f"sliding_layers={sliding} must rise from 0 to below num_layers="
    f"{c.num_layers}": all(a < b for a, b in zip(
      (-1, *sliding), (*sliding, c.num_layers), strict=True)),
    f"sliding_window={c.sliding_window} must be set if layers slide, and only"
    " then": bool(sliding) == (c.sliding_window > 0),
    f"rope_high_freq_factor={high} must be above rope_low_freq_factor={low}":
      c.rope_scaling != "llama3" or high > low,
    f"rope_theta={c.rope_theta} must be above 1 for YaRN":
      c.rope_scaling != "yarn" or c.rope_theta > 1,
    f"norm={c.norm!r} must be 'pre'": c.norm == "pre",
    f"relative_buckets={c.relative_buckets} must be 0": not c.relative_buckets,
  }  # fmt: skip
  broken = [rule for rule, holds in rules.items() if not holds]
  if broken:
    raise ValueError(
      f"No decoder-only generator has these fields: {'; '.join(broken)}."
      " Expected sizes that fit together. Correct them, or copy the checkpoint"
      " that they are from again."
    )
  return c
