"""Every field of the configs that are read: used, refused, or without effect.

In: a config.json of transformers, versions 4 and 5. Out: what its report says
about fields that nobody here knows, and about those that train otherwise there.

`tests/parity/config_fields_test.py` changes every field of transformers' own
classes, and holds what happens against these lists.
"""

from collections.abc import Iterator
from typing import Any

from rag_jax.weights.config_values import OUR_KEY
from rag_jax.weights.config_values import ConfigValues

_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")
_ALL = ("model_type", "is_encoder_decoder", "is_decoder", *_IDS)

_ENCODER = (
  *_ALL, "vocab_size", "hidden_size", "num_hidden_layers",
  "num_attention_heads", "intermediate_size", "hidden_act",
  "hidden_dropout_prob", "attention_probs_dropout_prob",
  "max_position_embeddings", "type_vocab_size", "layer_norm_eps",
  "position_embedding_type", "add_cross_attention",
)  # fmt: skip
_GENERATOR = (
  *_ALL, "vocab_size", "d_model", "decoder_start_token_id",
  "tie_word_embeddings", "prefix",
)  # fmt: skip
_BART = (
  *_GENERATOR, "max_position_embeddings", "encoder_layers", "decoder_layers",
  "encoder_attention_heads", "decoder_attention_heads", "encoder_ffn_dim",
  "decoder_ffn_dim", "activation_function", "scale_embedding", "dropout",
  "attention_dropout", "activation_dropout", "encoder_layerdrop",
  "decoder_layerdrop", "forced_eos_token_id",
)  # fmt: skip
_T5 = (
  *_GENERATOR, "num_layers", "num_decoder_layers", "num_heads", "d_kv", "d_ff",
  "feed_forward_proj", "layer_norm_epsilon", "dropout_rate",
  "relative_attention_num_buckets", "relative_attention_max_distance",
  "scale_decoder_outputs",
)  # fmt: skip

_CAUSAL = (
  "model_type", "is_encoder_decoder", *_IDS, "vocab_size",
  "tie_word_embeddings", "per_layer_config",
)  # fmt: skip
_ROPE = (
  *_CAUSAL, "hidden_size", "intermediate_size", "num_hidden_layers",
  "num_attention_heads", "num_key_value_heads", "head_dim",
  "max_position_embeddings", "original_max_position_embeddings",
  "rms_norm_eps", "attention_dropout", "rope_parameters", "rope_theta",
  "rope_scaling", "partial_rotary_factor",
)  # fmt: skip
_LLAMA = (*_ROPE, "hidden_act")
_QWEN = (
  *_LLAMA, "use_sliding_window", "sliding_window", "max_window_layers",
  "layer_types",
)  # fmt: skip
_GEMMA = (
  *_ROPE, "hidden_activation", "attention_bias", "query_pre_attn_scalar",
  "sliding_window", "layer_types", "final_logit_softcapping",
  "attn_logit_softcapping", "use_bidirectional_attention",
)  # fmt: skip
_GPT2 = (
  *_CAUSAL, "n_positions", "n_embd", "n_layer", "n_head", "n_inner",
  "activation_function", "resid_pdrop", "embd_pdrop", "attn_pdrop",
  "layer_norm_epsilon", "scale_attn_weights", "add_cross_attention",
  "scale_attn_by_inverse_layer_idx",
)  # fmt: skip

# The fields that are used, or refused with the values that cannot be. By the
# model_type; "t5_encoder" is a T5 of which only the encoder is read.
USED: dict[str, tuple[str, ...]] = {
  "bert": _ENCODER,
  "roberta": _ENCODER,
  "xlm-roberta": _ENCODER,
  "distilbert": (
    *_ALL, "vocab_size", "dim", "n_layers", "n_heads", "hidden_dim",
    "activation", "dropout", "attention_dropout", "max_position_embeddings",
  ),
  "mpnet": (*_ENCODER, "relative_attention_num_buckets"),
  "t5_encoder": (
    "model_type", "architectures", "is_decoder", *_IDS, "vocab_size",
    "d_model", "num_layers", "num_heads", "d_kv", "d_ff", "feed_forward_proj",
    "layer_norm_epsilon", "dropout_rate", "relative_attention_num_buckets",
    "relative_attention_max_distance",
  ),
  "dpr": (*_ENCODER, "projection_dim", "architectures"),
  "bart": _BART,
  "mbart": _BART,
  "pegasus": _BART,
  "t5": _T5,
  "mt5": _T5,
  "llama": (*_LLAMA, "attention_bias", "mlp_bias"),
  "qwen2": _QWEN,
  "qwen3": (*_QWEN, "attention_bias"),
  "gemma2": _GEMMA,
  "gemma3_text": (*_GEMMA, "rope_local_base_freq", "sliding_window_pattern"),
  "gpt2": _GPT2,
  "rag": (
    "model_type", "question_encoder", "generator", "architectures",
    "tie_word_embeddings", "title_sep", "doc_sep", "n_docs",
    "max_combined_length", "label_smoothing", "exclude_bos_score",
    "do_deduplication", "decoder_start_token_id", *_IDS,
  ),
}  # fmt: skip

_OF_PYTORCH = "how PyTorch computes or answers, not what"
_FRESH = "of parameters that are not trained yet"
_HEADS = "of heads for classification, which are not read"
_DECODER = "of the decoder, which an encoder does without"
_RETRIEVER = "of RagRetriever: passages and index are those of the config"
_OLD = "of versions before 4; those from 4 on pass over it"
_TEXT = "a name or a remark"

# Fields without effect, and why.
WITHOUT_EFFECT: dict[str, str] = {
  **dict.fromkeys(
    ("_name_or_path", "transformers_version", "tokenizer_class",
     "finetuning_task", "_attn_implementation_autoset", "_num_labels",
     "task_specific_params", "architectures", "transformers_weights",
     "_model_name_or_path", "unk_token_id"), _TEXT
  ),
  **dict.fromkeys(
    ("dtype", "torch_dtype", "use_cache", "output_hidden_states", "output_past",
     "output_attentions", "return_dict", "chunk_size_feed_forward",
     "torchscript", "use_bfloat16", "gradient_checkpointing", "pruned_heads",
     "tf_legacy_loss", "tie_encoder_decoder", "n_positions",
     "cross_attention_hidden_size"), _OF_PYTORCH
  ),
  **dict.fromkeys(
    ("initializer_range", "init_std", "initializer_factor"), _FRESH
  ),
  **dict.fromkeys(
    ("id2label", "label2id", "num_labels", "problem_type", "_num_labels",
     "classifier_dropout", "classif_dropout", "sep_token_id", "cls_token_id"),
    _HEADS,
  ),
  **dict.fromkeys(
    ("sentence_transformers", "sbert_ce_default_activation_function"),
    "of CrossEncoder, which maps logits to scores in the same order",
  ),
  **dict.fromkeys(
    ("retrieval_vector_size", "retrieval_batch_size", "dataset",
     "dataset_split", "index_name", "index_path", "passages_path",
     "use_dummy_dataset", "dataset_revision"), _RETRIEVER
  ),
  **dict.fromkeys(
    ("normalize_before", "normalize_embedding", "add_final_layer_norm",
     "add_bias_logits", "static_position_embeddings", "extra_pos_embeddings",
     "do_blenderbot_90_layernorm", "vocab_projection",
     "gradient_checkpointing", "tie_weights_"), _OLD
  ),
  "dense_act_fn": "follows from feed_forward_proj",
  "is_gated_act": "follows from feed_forward_proj",
  "reduce_loss": "the loss is a mean over target tokens",
  "do_marginalize": "of what RagModel returns, not of what it learns",
  "output_retrieved": "of what RagModel returns, not of what it learns",
}  # fmt: skip
# Those that some models use and these do not.
_ELSEWHERE: dict[str, dict[str, str]] = {
  **{
    name: {"tie_word_embeddings": "of its head for masked words"}
    for name in ("bert", "roberta", "xlm-roberta", "mpnet")
  },
  "distilbert": {
    "tie_word_embeddings": "of its head for masked words",
    "sinusoidal_pos_embds": _FRESH,
    "qa_dropout": _HEADS,
    "seq_classif_dropout": _HEADS,
  },
  "t5_encoder": dict.fromkeys(
    (
      "is_encoder_decoder",
      "num_decoder_layers",
      "decoder_start_token_id",
      "tie_word_embeddings",
      "scale_decoder_outputs",
      "prefix",
    ),
    _DECODER,
  ),
  "dpr": {"tie_word_embeddings": "of a head that it does not have"},
  "rag": {
    "vocab_size": "that of the generator counts",
    "prefix": "that of the generator counts",
    "is_encoder_decoder": "always",
    "forced_eos_token_id": "of generation",
  },
  "llama": {"pretraining_tp": _OF_PYTORCH},
  "gemma2": {"hidden_act": "hidden_activation counts"},
  "gemma3_text": {
    "hidden_act": "hidden_activation counts",
    "_sliding_window_pattern": "layer_types counts",
  },
  "gpt2": {
    "n_ctx": "n_positions counts",
    "reorder_and_upcast_attn": _OF_PYTORCH,
    **dict.fromkeys(
      (
        "summary_type",
        "summary_use_proj",
        "summary_activation",
        "summary_proj_to_labels",
        "summary_first_dropout",
      ),
      _HEADS,
    ),
  },
  **{
    name: {"num_hidden_layers": "encoder_layers counts"}
    for name in ("bart", "mbart", "pegasus")
  },
}

# Of generation_config.json: what the search here does not do, and the values
# that ask for nothing. They are refused rather than ignored: the tokens would
# be others than expected.
GENERATION_REFUSED: dict[str, tuple[Any, ...]] = {
  "num_beam_groups": (1,),
  "diversity_penalty": (0,),
  "penalty_alpha": (0,),
  "dola_layers": (),
  "constraints": (),
  "force_words_ids": (),
  "min_p": (),
  "top_h": (),
  "typical_p": (1,),
  "epsilon_cutoff": (0,),
  "eta_cutoff": (0,),
  "encoder_repetition_penalty": (1,),
  "encoder_no_repeat_ngram_size": (0,),
  "renormalize_logits": (False,),
  "remove_invalid_values": (False,),
  "exponential_decay_length_penalty": (),
  "suppress_tokens": ([],),
  "begin_suppress_tokens": ([],),
  "sequence_bias": (),
  "token_healing": (False,),
  "guidance_scale": (1,),
  "watermarking_config": (),
  "stop_strings": ([],),
  "max_time": (),
  "prompt_lookup_num_tokens": (),
  "assistant_early_exit": (),
  "use_mtp": (False,),
  "low_memory": (False,),
}
GENERATION_WITHOUT_EFFECT: dict[str, str] = {
  **dict.fromkeys(("_from_model_config", "transformers_version"), _TEXT),
  **dict.fromkeys(
    ("use_cache", "cache_implementation", "cache_config", "max_cache_len",
     "output_attentions", "output_hidden_states", "output_scores",
     "output_logits", "return_dict_in_generate", "return_legacy_cache",
     "compile_config", "disable_compile", "continuous_batching_config",
     "prefill_chunk_size", "trust_remote_code"), _OF_PYTORCH
  ),
  **dict.fromkeys(
    ("is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule",
     "assistant_confidence_threshold", "max_matching_ngram_size",
     "assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight",
     "speculation_type"),
    "of drafts by an assistant, which do not change what is written",
  ),
}  # fmt: skip


def field_notes(
  values: ConfigValues, generation: tuple[str, ...] = (), kind: str = ""
) -> Iterator[str]:
  """Yields what a report should say about the fields of a config.json.

  Args:
    values: of it.
    generation: names that older files hold, of settings of generation.
    kind: key of `USED`; "": the model_type.
  """
  model_type = kind or values.text("model_type", "")
  known = {
    OUR_KEY, *USED.get(model_type, ()), *WITHOUT_EFFECT, *generation,
    *_ELSEWHERE.get(model_type, ()), *GENERATION_REFUSED,
    *GENERATION_WITHOUT_EFFECT,
  }  # fmt: skip
  unknown = sorted(values.values.keys() - known)
  if unknown:
    yield (
      f"{values.origin} has fields that rag_jax does not know and passes over:"
      f" {', '.join(unknown)}"
    )
  for name in ("encoder_layerdrop", "decoder_layerdrop"):
    if values.rate(name, 0.0):
      yield (
        f"{values.origin} says {name}={values.values[name]}: transformers"
        " leaves whole layers out while training, rag_jax does not"
      )
  if model_type == "gpt2":
    rates = [values.rate(name, 0.1) for name in ("embd_pdrop", "resid_pdrop")]
    if rates[0] != rates[1]:
      yield (
        f"{values.origin} says embd_pdrop={rates[0]}: rag_jax drops out"
        f" embeddings as it does layers, at resid_pdrop={rates[1]}"
      )


def without_effect(model_type: str) -> set[str]:
  """Returns the names of fields of a model's config that change nothing."""
  elsewhere = _ELSEWHERE.get(model_type, {})
  return {*WITHOUT_EFFECT, *elsewhere} - set(USED[model_type])
