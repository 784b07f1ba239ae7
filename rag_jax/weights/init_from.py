"""Loads what a run starts from: checkpoints, or another run.

In: a config with init_from, of the whole model or of a part. Out: the config
with the architecture and the settings of the checkpoints, their parameters, and
the directories of their tokenizers. brought.py says who chooses a setting.
"""

from collections.abc import Mapping
import copy
import dataclasses
import json
from typing import Any

from absl import logging
from jaxtyping import PyTree

from rag_jax.config import Config
from rag_jax.config_rules import validate
from rag_jax.corpus.tokenizer import TOKENIZER_KINDS
from rag_jax.weights.brought import Brought
from rag_jax.weights.encoder_configs import PLAIN_ENCODERS
from rag_jax.weights.encoder_configs import WORDING
from rag_jax.weights.generation_settings import typed_settings
from rag_jax.weights.load import checkpoint_kind
from rag_jax.weights.load import has_passage_encoder
from rag_jax.weights.load import load_any_generator
from rag_jax.weights.load import load_encoder
from rag_jax.weights.loaded import LoadedCausal
from rag_jax.weights.loaded import LoadedEncoder
from rag_jax.weights.loaded import LoadedGenerator
from rag_jax.weights.saved import SavedModel
from rag_jax.weights.saved import is_ours
from rag_jax.weights.saved import is_workdir
from rag_jax.weights.saved import read_saved

# Lengths in tokens, if a checkpoint has none: of DPR's passages, and of RAG's
# fine-tuning.
_QUESTION, _PASSAGE, _CONTEXT, _TARGET = 128, 256, 300, 25
_PROMPT = 512  # of a decoder-only generator

# Not part of the shape, so they can be chosen.
_RATES = ("dropout", "attention_dropout", "activation_dropout")
_CHOSEN = (*_RATES, *WORDING, "normalize", "truncate_dim")
_POOLINGS = ("cls", "mean", "max", "pooler")  # that have no parameters


@dataclasses.dataclass(frozen=True, slots=True)
class Initial:
  """Parameters and tokenizers of checkpoints; all of it may be empty.

  Attributes:
    params: by the parts of `RagModel`: "question_encoder", "passage_encoder",
      "generator". float32, on the host.
    tokenizer: directory of the generator's; "" if none was given.
    retriever_tokenizer: directory of the encoder's.
  """

  params: PyTree = dataclasses.field(default_factory=dict)
  tokenizer: str = ""
  retriever_tokenizer: str = ""


def load_initial(
  config: Config, overridden: Mapping[str, Any] | None = None
) -> tuple[Config, Initial]:
  """Reads the checkpoints that `config` names.

  Args:
    config: as a file and the command line made it.
    overridden: the settings that the command line gave, by dotted name, with
      their values in the config file. None: all settings count as chosen for
      these checkpoints, see `Brought`.

  Returns:
    A config with the architecture of the checkpoints, which describes the model
    completely; and the contents of the checkpoints.

  Raises:
    FileNotFoundError: a checkpoint is not there, or has no tokenizer.
    ValueError: it cannot be read, or does not fit the other settings.
  """
  config = copy.deepcopy(config)
  brought = Brought(config, overridden or {})
  _start_both(config)
  params = {}
  tokenizer = retriever_tokenizer = ""
  encoder, generator = config.encoder, config.generator
  if encoder.init_from:
    loaded = load_encoder(encoder.init_from, "question")
    logging.info("%s:\n%s", encoder.init_from, loaded.report)
    _check_tokenizer(config, encoder.init_from, "encoder", loaded.tokenizer)
    _bring_encoder(config, brought, loaded)
    params["question_encoder"] = loaded.params
    retriever_tokenizer = loaded.tokenizer
    if is_ours(encoder.init_from):
      _take_scores(config, read_saved(encoder.init_from))
    if not encoder.tied:
      params["passage_encoder"] = _passage_params(config, brought, loaded)
  if generator.init_from:
    loaded = load_any_generator(generator.init_from)
    logging.info("%s:\n%s", generator.init_from, loaded.report)
    _check_tokenizer(config, generator.init_from, "generator", loaded.tokenizer)
    if isinstance(loaded, LoadedCausal):
      _bring_causal(config, brought, loaded)
    else:
      _bring_generator(config, brought, loaded)
    params["generator"] = loaded.params
    tokenizer = loaded.tokenizer
  if not any(map(_is_fresh, (encoder.init_from, generator.init_from))):
    # Both parts are trained, so there is no cold start to warm up from.
    brought.bring("generator", "warmup.num_steps", 0)
  brought.finish()
  # Fails now if a position table is too short.
  return validate(config), Initial(params, tokenizer, retriever_tokenizer)


def _is_fresh(where: str) -> bool:
  """Returns whether a part has no weights from outside of rag_jax.

  A run that starts from another of our runs is trained as its config says.
  """
  return not where or is_workdir(where)


def _check_tokenizer(
  config: Config, where: str, part: str, tokenizer: str
) -> None:
  """Raises `FileNotFoundError` if loaded weights have no tokenizer.

  The ids of another tokenizer would mean other rows of the embeddings.
  """
  if tokenizer or config.tokenizer.path:
    return
  name = where.removeprefix("hf:")
  raise FileNotFoundError(
    f"{part}.init_from={where!r} has weights, but no tokenizer; looked for"
    f" {TOKENIZER_KINDS}. Expected the tokenizer that the weights were trained"
    " with: under any other, token ids mean other embeddings. Copy its files"
    " beside the weights; where the model is known by name (for instance"
    ' facebook/bart-base), this writes them: python -c "import transformers;'
    " transformers.AutoTokenizer.from_pretrained('facebook/bart-base')"
    f".save_pretrained('{name}')\". Or give their directory as tokenizer.path."
  )


def _passage_params(
  config: Config, brought: Brought, question: LoadedEncoder
) -> PyTree:
  """Returns the parameters of the passage encoder."""
  encoder = config.encoder
  where = encoder.passage_init_from or encoder.init_from
  passage = load_encoder(where, "passage")
  different = [
    f"{name}={value!r} and {passage.fields[name]!r}"
    for name, value in question.fields.items()
    if name not in (*_RATES, *WORDING) and passage.fields[name] != value
  ]
  for name in ("passage_prompt", "title_sep"):
    brought.bring("encoder", f"encoder.{name}", passage.fields[name])
  if different:
    raise ValueError(
      f"The encoders {encoder.init_from} and {where} differ in"
      f" {', '.join(different)}. Expected the same architecture; give another"
      " encoder.passage_init_from."
    )
  return passage.params


def _bring_encoder(
  config: Config, brought: Brought, loaded: LoadedEncoder
) -> None:
  """Sets the architecture and the settings of the encoder's checkpoint."""
  encoder, data = config.encoder, config.data
  part, where = "encoder", config.encoder.init_from
  for name, value in loaded.fields.items():
    if name in _CHOSEN:
      warning = "" if name in _RATES or loaded.kind in PLAIN_ENCODERS else (
        "embeddings differ from those it was trained to make"
      )  # fmt: skip
      brought.bring(part, f"{part}.{name}", value, warning)
    elif name == "pooling" and _can_pool(config, brought, loaded):
      if loaded.kind not in PLAIN_ENCODERS and encoder.pooling != value:
        brought.note(
          f"encoder.pooling={encoder.pooling!r}, not {value!r}: embeddings"
          " differ from those it was trained to make"
        )
    else:
      brought.demand(part, name, value)
  brought.bring(
    part, "encoder.score_scale", loaded.score_scale,
    "its scores are multiplied by that, so p(z|x) will differ",
  )  # fmt: skip
  if _is_fresh(where):
    return
  brought.bring(part, "encoder.learn_score_scale", False)
  limits = [x for x in (loaded.max_tokens, encoder.max_positions) if x]
  limit = min(limits, default=_PASSAGE)
  brought.bring(part, "data.question_length", min(_QUESTION, limit))
  longest = limit if loaded.max_tokens else min(_PASSAGE, limit)
  brought.bring(part, "data.passage_length", longest)
  brought.bring_lr(part, "optimizer.retriever_lr")
  brought.bring_lr(part, "warmup.retriever_lr")
  brought.bring_lr(part, "contrastive.retriever_lr")
  if loaded.max_tokens and data.passage_length > limit:
    brought.note(
      f"data.passage_length={data.passage_length}, not {limit}: it was trained"
      f" on inputs of at most {limit} tokens"
    )
  if encoder.normalize and encoder.score_scale == 1.0:
    brought.note(
      "encoder.score_scale=1.0: scores of normalised embeddings lie between -1"
      " and 1, so that p(z|x) is almost the same for all documents; 20 is what"
      " sentence-transformers trains with"
    )
  if not encoder.tied or encoder.passage_init_from or is_ours(where):
    return
  if has_passage_encoder(where):
    brought.bring(
      part, "encoder.tied", False, "its passage encoder is not used"
    )
  elif loaded.kind == "dpr_question":
    brought.note(
      f"encoder.tied=True: {where} is DPR's question encoder, and will embed"
      " passages as well; set encoder.tied=False and encoder.passage_init_from"
      " to the passage encoder"
    )


def _can_pool(config: Config, brought: Brought, loaded: LoadedEncoder) -> bool:
  """Returns whether the user chose a pooling, and the weights support it."""
  pooling = config.encoder.pooling
  able = pooling in _POOLINGS and (pooling != "pooler" or config.encoder.pooler)
  return able and brought.chosen("encoder", "encoder.pooling")


def _bring_generator(
  config: Config, brought: Brought, loaded: LoadedGenerator
) -> None:
  """Sets the architecture and the settings of the generator's checkpoint."""
  part = "generator"
  one_rate = loaded.fields["norm_kind"] == "rms"  # T5 has a single dropout rate
  rate_chosen = brought.chosen(part, "generator.dropout")
  for name, value in loaded.fields.items():
    if name in _RATES:
      if one_rate and rate_chosen:
        value = config.generator.dropout
      brought.bring(part, f"{part}.{name}", value)
    elif name == "fixed":
      brought.bring(part, f"{part}.{name}", tuple(value))
    else:
      brought.demand(part, name, value)
  brought.demand(part, "init", "normal")
  if loaded.rag is not None:
    _bring_contexts(config, brought, loaded)
  if _is_fresh(config.generator.init_from):
    return
  _bring_training(brought)
  limit = config.generator.max_positions
  if config.generator.positions != "learned":
    limit = max(_CONTEXT, _TARGET)
  length, rag = min(_CONTEXT, limit), loaded.rag
  if rag is not None:
    length = rag.max_combined_length
    brought.bring(part, "loss", f"rag_{rag.kind}")
    brought.bring(part, "label_smoothing", rag.label_smoothing)
    brought.bring(part, "data.n_docs", rag.n_docs)
    if config.hf_loss and config.loss == "rag_sequence":
      brought.bring(part, "exclude_bos_score", rag.exclude_bos_score)
  brought.bring(part, "data.context_length", length)
  target_chosen = brought.chosen(part, "data.target_length")
  brought.bring(part, "data.target_length", min(_TARGET, limit))
  generation = dict(loaded.generation)
  if target_chosen:  # data.target_length then limits answers too
    for name in ("max_length", "max_new_tokens"):
      generation.pop(name, None)
  if rag is not None and not rag.do_deduplication:
    generation["do_deduplication"] = False
  _bring_decoding(brought, generation)


def _bring_causal(
  config: Config, brought: Brought, loaded: LoadedCausal
) -> None:
  """Sets the architecture and the settings of a decoder-only checkpoint."""
  part = "generator"
  for name, value in (
    ("kind", "causal"), ("pointer", False), ("init", "normal")
  ):  # fmt: skip
    brought.demand(part, name, value)
  for name, value in loaded.fields.items():
    if name in _RATES:
      brought.bring(part, f"causal.{name}", value)
    else:
      value = tuple(value) if isinstance(value, (list, tuple)) else value
      brought.demand("causal", name, value)
  if _is_fresh(config.generator.init_from):
    return
  _bring_training(brought)
  brought.bring(
    part, "data.context_style", "prompt", "it continues a text, so it is best"
    " asked by one"
  )  # fmt: skip
  if config.data.context_style != "question_first":
    brought.bring(part, "warmup.num_steps", 0)  # which masks tokens
  brought.bring(part, "data.target_length", _TARGET)
  most = config.causal.max_positions - config.data.target_length + 1
  brought.bring(part, "data.context_length", min(_PROMPT, max(most, 8)))
  # There they count the prompt too.
  lengths = "max_length", "min_length", "max_new_tokens", "min_new_tokens"
  generation = {k: v for k, v in loaded.generation.items() if k not in lengths}
  _bring_decoding(brought, generation)


def _bring_training(brought: Brought) -> None:
  """Sets how weights are trained that can read already."""
  part = "generator"
  brought.bring_lr(part, "optimizer.peak_lr")
  brought.bring_lr(part, "warmup.peak_lr")
  for name in ("substitute_answers", "substitute_subjects"):
    brought.bring(part, f"data.{name}", 0.0)


def _bring_decoding(brought: Brought, generation: dict[str, Any]) -> None:
  """Sets how answers are written, as generation_config.json says."""
  typed, rest = typed_settings(generation)
  for name, value in typed.items():
    brought.bring("generator", f"decoding.{name}", value)
  text = json.dumps(rest, sort_keys=True) if rest else ""
  brought.bring("generator", "decoding.generation_config", text)


def _bring_contexts(
  config: Config, brought: Brought, loaded: LoadedGenerator
) -> None:
  """Sets the format of the contexts that a RAG was trained on."""
  part, other = "generator", "it was trained on other contexts"
  rag = loaded.rag
  assert rag is not None
  brought.bring(part, "data.context_style", loaded.context_style, other)
  if config.data.context_style == "rag":
    brought.bring(part, "data.context_prefix", rag.prefix, other)
    brought.bring(part, "data.title_sep", rag.title_sep, other)
    brought.bring(part, "data.doc_sep", rag.doc_sep, other)


def _start_both(config: Config) -> None:
  """Sets init_from of parts that have none to `config.init_from`."""
  where, encoder = config.init_from, config.encoder
  if not where:
    return
  if is_ours(where):
    saved = read_saved(where)
    if saved.causal is not None and saved.encoder is None:
      raise _no_rag(where, saved.kind)
    if saved.encoder is not None and not encoder.init_from:
      encoder.init_from = where
      if "passage_encoder" in saved.params:
        encoder.tied = False
    has_generator = "generator" in saved.params
  else:
    kind = checkpoint_kind(where)
    if kind != "rag":
      raise _no_rag(where, kind)
    encoder.init_from = encoder.init_from or where
    has_generator = True
  if has_generator and not config.generator.init_from:
    config.generator.init_from = where


def _no_rag(where: str, kind: str) -> ValueError:
  return ValueError(
    f"init_from={where!r} is a checkpoint of kind {kind!r}; expected retriever"
    " and generator together: the workdir of a run, a model directory or a RAG"
    " checkpoint. Set encoder.init_from or generator.init_from instead."
  )


def _take_scores(config: Config, saved: SavedModel) -> None:
  """Sets the weights of hybrid scores to those that a run has learned."""
  if config.encoder.tied and "passage_encoder" in saved.params:
    raise ValueError(
      f"encoder.init_from={config.encoder.init_from!r} holds a question encoder"
      " and a passage encoder, but encoder.tied=True would keep only the first;"
      " expected both. Set encoder.tied=False."
    )
  if saved.hybrid and config.index.hybrid:
    config.index.hybrid_dense, config.index.hybrid_bm25 = saved.hybrid
