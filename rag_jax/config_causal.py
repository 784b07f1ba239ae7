"""The settings of a decoder-only generator: Llama, Qwen, Gemma, GPT-2.

In: what a checkpoint says, or a caller. Out: a `CausalConfig`, which
models/causal.py computes. Fields are as in config.py.
"""

# No `from __future__ import annotations` here, as in config.py.

import dataclasses

from rag_jax.config import TransformerConfig
from rag_jax.settings import choice
from rag_jax.settings import number


@dataclasses.dataclass(slots=True, kw_only=True, unsafe_hash=True)
class CausalConfig(TransformerConfig):
  """A decoder-only generator. Defaults are Llama's choices.

  Of the fields of `TransformerConfig`, `use_bias` is that of the MLP alone.
  Norms are always before the blocks (`norm`), and there are no relative
  positions.
  """

  vocab_size: int = 0  # rows of the embedding table; must be set
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
