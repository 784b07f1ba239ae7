"""The tensors of Llama, Qwen, Gemma and GPT-2, for a generator's fields.

In: a `CausalConfig` whose sizes are known. Out: the rules of its parameters,
under the names of ...ForCausalLM and GPT2LMHeadModel.
"""

from collections.abc import Callable, Iterator
import math

from rag_jax.config_models import CausalConfig
from rag_jax.weights.causal_configs import architecture_name
from rag_jax.weights.encoder_tensors import dense
from rag_jax.weights.encoder_tensors import norm
from rag_jax.weights.encoder_tensors import table
from rag_jax.weights.mapping import Architecture
from rag_jax.weights.mapping import Redundant
from rag_jax.weights.mapping import Rule


def causal_architecture(c: CausalConfig, model_type: str) -> Architecture:
  """Returns the tensors of `model_type` with these fields."""
  gpt2 = model_type == "gpt2"
  rules = list(_gpt2(c) if gpt2 else _rope_model(c))
  embeddings = rules[0].theirs
  redundant = [
    Redundant(
      r".*\.attn\.(masked_)?bias" if gpt2 else r".*rotary_emb\.inv_freq",
      "constants that older versions saved",
    )
  ]
  if c.tied_output:
    redundant.append(
      Redundant(
        "lm_head.weight",
        "the embedding table again",
        kind="copy",
        of=embeddings,
      )
    )
  else:
    rules.append(table("lm_head", "lm_head", c.vocab_size, c.embed_dim))
  return Architecture(
    architecture_name(model_type), tuple(rules), tuple(redundant)
  )


def causal_names(names: list[str], model_type: str) -> Callable[[str], str]:
  """Returns the renaming: a model without its head has no prefix."""
  prefix = "transformer." if model_type == "gpt2" else "model."
  inside = any(name.startswith(prefix) for name in names)

  def rename(name: str) -> str:
    return name if inside or name == "lm_head.weight" else prefix + name

  return rename


def _rope_model(c: CausalConfig) -> Iterator[Rule]:
  yield table(
    "token_embedding", "model.embed_tokens", c.vocab_size, c.embed_dim
  )
  for i in range(c.num_layers):
    yield from _rope_layer(f"layer_{i}", f"model.layers.{i}", c)
  yield from norm("final_norm", "model.norm", c.embed_dim, use_bias=False)


def _rope_layer(ours: str, theirs: str, c: CausalConfig) -> Iterator[Rule]:
  d, h = c.embed_dim, c.head_size
  mine, their = f"{ours}/self_attention", f"{theirs}.self_attn"
  for part, heads in (
    ("query", c.num_heads), ("key", c.kv_heads), ("value", c.kv_heads)
  ):  # fmt: skip
    yield from dense(
      f"{mine}/{part}", f"{their}.{part[0]}_proj", (d,), (heads, h), c.qkv_bias
    )
  yield from dense(
    f"{mine}/out", f"{their}.o_proj", (c.num_heads, h), (d,), c.out_bias
  )
  if c.qk_norm:
    for part in ("query", "key"):
      yield from norm(
        f"{mine}/{part}_norm", f"{their}.{part[0]}_norm", h, use_bias=False
      )
  for part, inputs, outputs in (
    ("gate", d, c.mlp_dim), ("up", d, c.mlp_dim), ("down", c.mlp_dim, d)
  ):  # fmt: skip
    yield from dense(
      *(f"{ours}/mlp/{part}", f"{theirs}.mlp.{part}_proj"),
      *((inputs,), (outputs,)),
      use_bias=c.use_bias,
    )
  norms = {
    "self_attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
  }
  if c.post_norms:
    norms |= {
      "self_attention_post_norm": "post_attention_layernorm",
      "mlp_norm": "pre_feedforward_layernorm",
      "mlp_post_norm": "post_feedforward_layernorm",
    }
  for mine, their in norms.items():
    yield from norm(f"{ours}/{mine}", f"{theirs}.{their}", d, use_bias=False)


def _gpt2(c: CausalConfig) -> Iterator[Rule]:
  d = c.embed_dim
  yield table("token_embedding", "transformer.wte", c.vocab_size, d)
  yield table("position_embedding", "transformer.wpe", c.max_positions, d)
  heads = c.num_heads, c.head_size
  for i in range(c.num_layers):
    ours, theirs = f"layer_{i}", f"transformer.h.{i}"
    for number, part in enumerate(("query", "key", "value")):
      yield from _conv1d(
        *(f"{ours}/self_attention/{part}", f"{theirs}.attn.c_attn"),
        *((d,), heads),
        part=(number, 3),
      )
    for mine, their, inputs, outputs in (
      ("self_attention/out", "attn.c_proj", heads, (d,)),
      ("mlp/up", "mlp.c_fc", (d,), (c.mlp_dim,)),
      ("mlp/down", "mlp.c_proj", (c.mlp_dim,), (d,)),
    ):
      yield from _conv1d(f"{ours}/{mine}", f"{theirs}.{their}", inputs, outputs)
    yield from norm(f"{ours}/self_attention_norm", f"{theirs}.ln_1", d)
    yield from norm(f"{ours}/mlp_norm", f"{theirs}.ln_2", d)
  yield from norm("final_norm", "transformer.ln_f", d)


def _conv1d(
  ours: str,
  theirs: str,
  inputs: tuple[int, ...],
  outputs: tuple[int, ...],
  part: tuple[int, int] = (0, 1),
) -> Iterator[Rule]:
  """Yields kernel and bias of GPT-2's dense layer, which is not transposed."""
  columns = math.prod(outputs) * part[1]
  yield Rule(
    *(f"{ours}/kernel", f"{theirs}.weight", (*inputs, *outputs)),
    (math.prod(inputs), columns),
    part=part,
  )
  yield Rule(f"{ours}/bias", f"{theirs}.bias", outputs, (columns,), part=part)
