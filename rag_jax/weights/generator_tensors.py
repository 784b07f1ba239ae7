"""The tensors of BART, its relatives and T5, for a generator's fields.

In: a `GeneratorConfig` whose sizes are known. Out: the rules of its parameters,
under the names of ...ForConditionalGeneration.
"""

from collections.abc import Callable, Iterator
import re

from rag_jax.config_models import GeneratorConfig
from rag_jax.weights.encoder_tensors import T5_BIAS
from rag_jax.weights.encoder_tensors import TIED
from rag_jax.weights.encoder_tensors import attention
from rag_jax.weights.encoder_tensors import dense
from rag_jax.weights.encoder_tensors import norm
from rag_jax.weights.encoder_tensors import old_spelling
from rag_jax.weights.encoder_tensors import t5_copy
from rag_jax.weights.encoder_tensors import t5_layer
from rag_jax.weights.encoder_tensors import table
from rag_jax.weights.generator_configs import architecture_name
from rag_jax.weights.mapping import Architecture
from rag_jax.weights.mapping import Redundant
from rag_jax.weights.mapping import Rule


def generator_architecture(g: GeneratorConfig, model_type: str) -> Architecture:
  """Returns the tensors of `model_type` with these fields."""
  name = architecture_name(model_type)
  if model_type in ("t5", "mt5"):
    return Architecture(name, tuple(_t5(g)), tuple(_t5_redundant(g)))
  return Architecture(name, tuple(_bart(g)), tuple(_bart_redundant(g)))


def generator_names(names: list[str], model_type: str) -> Callable[[str], str]:
  """Returns the renaming: a BartModel saved alone has no "model." before."""
  inside = model_type in ("t5", "mt5") or any(
    name.startswith("model.") for name in names
  )

  def rename(name: str) -> str:
    outside = ("final_logits_bias", "lm_head.weight")
    return old_spelling(name if inside or name in outside else f"model.{name}")

  return rename


def shared_table(model_type: str) -> str:
  """Returns the name of the embedding table."""
  return (
    "shared.weight" if model_type in ("t5", "mt5") else "model.shared.weight"
  )


def _bart(g: GeneratorConfig) -> Iterator[Rule]:
  d = g.embed_dim
  yield table("token_embedding", "model.shared", g.vocab_size, d)
  for stack in ("encoder", "decoder"):
    decoder = stack == "decoder"
    theirs = f"model.{stack}"
    yield table(
      f"{stack}/position_embedding",
      f"{theirs}.embed_positions",
      g.max_positions + g.position_offset,
      d,
    )
    if g.embedding_norm:
      yield from norm(
        f"{stack}/embedding_norm", f"{theirs}.layernorm_embedding", d
      )
    layers = g.num_decoder_layers if decoder else 0
    for i in range(layers or g.num_layers):
      yield from _bart_layer(
        f"{stack}/layer_{i}", f"{theirs}.layers.{i}", g, decoder
      )
    if g.norm == "pre":
      yield from norm(f"{stack}/final_norm", f"{theirs}.layer_norm", d)
  bias = (g.vocab_size,)
  yield Rule(
    "final_logits_bias", "final_logits_bias", bias, (1, *bias), optional=True
  )
  if not g.tied_output:
    yield table("lm_head", "lm_head", g.vocab_size, d)


def _bart_layer(
  ours: str, theirs: str, g: GeneratorConfig, decoder: bool
) -> Iterator[Rule]:
  parts = ("q_proj", "k_proj", "v_proj", "out_proj")
  heads = (g.num_decoder_heads if decoder else 0) or g.num_heads
  wide = (g.decoder_mlp_dim if decoder else 0) or g.mlp_dim
  attentions = {"self_attention": "self_attn"}
  if decoder:
    attentions["cross_attention"] = "encoder_attn"
  for mine, their in attentions.items():
    yield from attention(f"{ours}/{mine}", f"{theirs}.{their}", parts, g, heads)
    yield from norm(
      f"{ours}/{mine}_norm", f"{theirs}.{their}_layer_norm", g.embed_dim
    )
  yield from dense(f"{ours}/mlp/up", f"{theirs}.fc1", (g.embed_dim,), (wide,))
  yield from dense(f"{ours}/mlp/down", f"{theirs}.fc2", (wide,), (g.embed_dim,))
  yield from norm(f"{ours}/mlp_norm", f"{theirs}.final_layer_norm", g.embed_dim)


def _bart_redundant(g: GeneratorConfig) -> Iterator[Redundant]:
  for stack in ("encoder", "decoder"):
    yield Redundant(
      f"model.{stack}.embed_tokens.weight",
      TIED,
      kind="copy",
      of="model.shared.weight",
      # With tie_word_embeddings=false, BART would miss them.
      written=not g.tied_output,
    )
    yield Redundant(rf"model\.{stack}\.version", "a number of an old fairseq")
  if g.tied_output:
    yield Redundant(
      "lm_head.weight", TIED, kind="copy", of="model.shared.weight"
    )


def _t5(g: GeneratorConfig) -> Iterator[Rule]:
  d = g.embed_dim
  yield table("token_embedding", "shared", g.vocab_size, d)
  for stack in ("encoder", "decoder"):
    decoder = stack == "decoder"
    shape = (g.relative_buckets, g.num_heads)
    yield Rule(
      f"{stack}/relative_bias",
      f"{T5_BIAS.format(stack)}.weight",
      shape,
      shape,
    )
    layers = g.num_decoder_layers if decoder else 0
    for i in range(layers or g.num_layers):
      yield from t5_layer(
        f"{stack}/layer_{i}", f"{stack}.block.{i}.layer", g, decoder
      )
    yield from norm(
      f"{stack}/final_norm", f"{stack}.final_layer_norm", d, use_bias=False
    )
  if not g.tied_output:
    yield table("lm_head", "lm_head", g.vocab_size, d)


def _t5_redundant(g: GeneratorConfig) -> Iterator[Redundant]:
  for stack in ("encoder", "decoder"):
    yield t5_copy(stack)
  if g.tied_output:
    yield Redundant(
      "lm_head.weight",
      TIED,
      kind="copy",
      of="shared.weight",
      # Version 4 needs it where the config says that nothing is tied, which is
      # how it is told not to scale.
      written=not g.scale_output,
    )
  cross = "decoder.block.0.layer.1.EncDecAttention"
  yield Redundant(
    re.escape(f"{cross}.relative_attention_bias.weight"),
    "an old T5 saved it, none reads it",
  )
