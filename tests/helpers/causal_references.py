"""Tiny random decoder-only generators of transformers."""

import functools

import torch
import transformers

V = 67
_SIZES = {
  "vocab_size": V, "hidden_size": 24, "intermediate_size": 32,
  "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
  "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_GEMMA = _SIZES | {
  "head_dim": 8, "num_hidden_layers": 4, "sliding_window": 4,
  "num_key_value_heads": 1, "query_pre_attn_scalar": 20,
}  # fmt: skip
_THETA = {"rope_theta": 100.0}  # so that scaled waves turn within S
_LLAMA3 = _THETA | {
  "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0,
  "high_freq_factor": 4.0, "original_max_position_embeddings": 24,
}  # fmt: skip
_YARN = _THETA | {
  "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8,
  "beta_fast": 4.0,
}  # fmt: skip
CASES = {
  "llama": ("Llama", _SIZES),
  "llama, all heads, biases": (
    "Llama",
    _SIZES | {"num_key_value_heads": 4, "attention_bias": True,
              "mlp_bias": True, "tie_word_embeddings": True, "head_dim": 10,
              "hidden_act": "gelu", "rms_norm_eps": 1e-3},
  ),
  "llama, llama3": ("Llama", _SIZES | {"rope_parameters": _LLAMA3}),
  "llama, linear": (
    "Llama",
    _SIZES | {"rope_parameters":
              _THETA | {"rope_type": "linear", "factor": 3.0}},
  ),
  "llama, yarn": ("Llama", _SIZES | {"rope_parameters": _YARN, "head_dim": 16}),
  "qwen2, one head of keys": (
    "Qwen2", _SIZES | {"num_key_value_heads": 1, "tie_word_embeddings": True},
  ),
  "qwen3, sliding": (
    "Qwen3",
    _SIZES | {"head_dim": 8, "use_sliding_window": True, "sliding_window": 5,
              "max_window_layers": 1},
  ),
  "qwen3, yarn": (
    "Qwen3",
    _SIZES | {"head_dim": 16, "attention_bias": True, "rope_parameters":
              _YARN | {"truncate": False, "mscale": 2.0,
                       "mscale_all_dim": 0.5}},
  ),
  "gemma2": (
    "Gemma2",
    _GEMMA | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
  ),
  "gemma2, untied, no caps": (
    "Gemma2",
    _GEMMA | {"attn_logit_softcapping": None, "attention_bias": True,
              "final_logit_softcapping": None, "num_key_value_heads": 2,
              "tie_word_embeddings": False},
  ),
  "gemma3_text": (
    "Gemma3Text",
    _GEMMA | {"sliding_window_pattern": 2, "final_logit_softcapping": 4.0,
              "rope_parameters": {
      "full_attention": {"rope_type": "linear", "factor": 8.0,
                         "rope_theta": 1e5},
      "sliding_attention": {"rope_type": "default", "rope_theta": 50.0}}},
  ),
  "gpt2": (
    "GPT2",
    {"vocab_size": V, "n_positions": 20, "n_embd": 24, "n_layer": 2,
     "n_head": 4, "n_inner": 40, "bos_token_id": 1, "eos_token_id": 2},
  ),
  "gpt2, untied": (
    "GPT2",
    {"vocab_size": V, "n_positions": 20, "n_embd": 24, "n_layer": 1,
     "n_head": 2, "tie_word_embeddings": False, "scale_attn_weights": False,
     "activation_function": "relu", "bos_token_id": 1, "eos_token_id": 2},
  ),
}  # fmt: skip


@functools.cache
def reference(kind):
  name, settings = CASES[kind]
  config = getattr(transformers, f"{name}Config")(**settings)
  # Gemma's caps are not in its fast attention.
  model = transformers.AutoModelForCausalLM.from_config(
    config, attn_implementation="eager"
  ).eval()
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for name, x in model.named_parameters():
      x.normal_(0.0, 0.3, generator=generator)
      if ("norm" in name or "ln_" in name) and "gemma" not in kind:
        x += name.endswith("weight")
  return model
