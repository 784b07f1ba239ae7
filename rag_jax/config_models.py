"""The settings of the models: retriever, generators, and their adapters.

`GeneratorConfig` is BART, T5 and their relatives (models/generator.py),
`CausalConfig` Llama, Qwen, Gemma and GPT-2 (models/causal.py), `EncoderConfig`
the retriever (models/encoders.py), `LoraConfig` models/lora.py. Fields are as
in config.py.
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


@dataclasses.dataclass(slots=True, kw_only=True, unsafe_hash=True)
class EncoderConfig(Settings):
  """The retriever: question and passage towers, and how they are compared.

  With `init_from`, the fields of the architecture (up to `projection_dim`) are
  read from the checkpoint.
  """

  # Weights to start from: a directory or "hf:ORG/NAME" of a DPR, BERT,
  # RoBERTa, MPNet, T5, sentence-transformers or RAG checkpoint. "" starts
  # fresh.
  init_from: str = ""
  passage_init_from: str = ""  # of the passage tower; "": as init_from
  # What an export calls this encoder, beside DPR; the other fields say what it
  # computes.
  family: str = choice(
    "bert", "roberta", "xlm-roberta", "distilbert", "mpnet", "t5_encoder"
  )
  vocab_size: int = 0  # rows of the embedding table; 0: the tokenizer's ids
  positions: str = choice("learned", "none")  # absolute ones
  # Rows of the position table, without the offset; 0: the longest input.
  max_positions: int = 0
  # RoBERTa's position 0 is row 2 of the table: its padding token's id, and 1.
  position_offset: int = number(0, least=0)
  num_layers: int = number(0, least=0, most=1000)  # 0: pooled embeddings
  embed_dim: int = number(128, least=1)  # D
  num_heads: int = number(4, least=1)
  head_dim: int = number(0, least=0)  # H; 0: embed_dim / num_heads
  mlp_dim: int = number(512, least=1)
  activation: str = choice(*ACTIVATIONS)
  # This and those up to `scale_attention` are as in the generator, but layers
  # share the table of relative positions, as in MPNet and T5.
  gated: bool = False
  embedding_norm: bool = True
  norm: str = choice("post", "pre")
  norm_kind: str = choice("layer", "rms")
  norm_eps: float = 1e-12  # BERT's
  use_bias: bool = True
  relative_buckets: int = 0
  relative_max_distance: int = number(128, least=1)
  scale_attention: bool = True
  num_token_types: int = 0  # BERT has 2; every token gets the first
  pooler: bool = False  # whether there is BERT's pooler: tanh(dense(CLS))
  pooling: str = choice("learned", "cls", "mean", "max", "pooler")
  normalize: bool = False  # divide embeddings by their L2 norm
  projection_dim: int = 0  # R; 0 = no projection, R = D
  projection_bias: bool = True
  projection_activation: str = choice("none", "tanh", "relu", "gelu", "silu")
  # Keep only the first so many numbers of an embedding, before `normalize`:
  # Matryoshka representations (arXiv:2205.13147). 0: all.
  truncate_dim: int = number(0, least=0)
  # Texts that stand before every question and passage, as "query: ".
  question_prompt: str = ""
  passage_prompt: str = ""
  # Between a passage's title and text; "": the end token, as in DPR.
  title_sep: str = ""
  tied: bool = True  # one tower embeds questions and passages
  train_passage_encoder: bool = True  # False: passages keep their embeddings
  # doc_scores = scale * inner product [checkpoint] 1
  score_scale: float = number(
    1.0, above=0, why="makes every document score 0; use 1.0."
  )
  learn_score_scale: bool = False
  # Of layer outputs and embeddings [checkpoint]
  dropout: float = number(0.0, below=1)
  # Of attention weights [checkpoint]
  attention_dropout: float = number(0.0, below=1)
  # Between the layers of the MLP [checkpoint]
  activation_dropout: float = number(0.0, below=1)

  @property
  def embedding_dim(self) -> int:
    """R: how many numbers an embedding has."""
    return self.truncate_dim or self.projection_dim or self.embed_dim


# Kernels that can have an adapter, by the names that lora.targets may use.
LORA_GROUPS = {
  "attention": ("query", "key", "value", "out"),
  "mlp": ("gate", "up", "down"),
}


@dataclasses.dataclass(slots=True, kw_only=True, unsafe_hash=True)
class LoraConfig(Settings):
  """Low-rank adapters (LoRA) that train in place of the kernels they change.

  All other parameters of a model with adapters stay as they are: they have no
  gradient and no optimizer state. The model of a run has the adapters
  multiplied in, so that it is served and exported like any other.
  """

  rank: int = 0  # inner dimension of an adapter, often 4 to 64; 0: none
  alpha: float = number(16.0, above=0)  # an adapter counts alpha / rank
  # Kernels: "generator/NAME" or "encoder/NAME", where NAME is "attention" or
  # "mlp", or one of query, key, value, out, gate, up, down.
  targets: tuple[str, ...] = ("generator/attention", "generator/mlp")


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
