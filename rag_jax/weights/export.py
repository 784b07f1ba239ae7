"""Our parameters as a checkpoint that `transformers` loads.

In: fields, parameters and a tokenizer. Out: a directory with config.json in a
spelling that versions 4 and 5 read, safetensors and, beside them, a manifest
with the digest of every file, which transformers passes over.

A directory whose export was cut off has no config.json.
"""

from collections.abc import Mapping
import dataclasses
import json
import os
import pathlib
import shutil
from typing import Any, Literal

from jaxtyping import PyTree
import numpy as np

from rag_jax import artifacts
from rag_jax.config_models import CausalConfig
from rag_jax.config_models import EncoderConfig
from rag_jax.config_models import GeneratorConfig
from rag_jax.models.hybrid import learned_weights
from rag_jax.weights import bag_of_words
from rag_jax.weights.card import CARD
from rag_jax.weights.causal_configs import causal_config
from rag_jax.weights.causal_configs import causal_type
from rag_jax.weights.causal_tensors import causal_architecture
from rag_jax.weights.config_values import SpecialIds
from rag_jax.weights.directory import MANIFEST_FORMAT
from rag_jax.weights.directory import MANIFEST_KIND
from rag_jax.weights.directory import open_directory
from rag_jax.weights.encoder_configs import PLAIN_ENCODERS
from rag_jax.weights.encoder_configs import architecture_name
from rag_jax.weights.encoder_configs import default_pooling
from rag_jax.weights.encoder_configs import encoder_config
from rag_jax.weights.encoder_tensors import DPR_PREFIXES
from rag_jax.weights.encoder_tensors import dpr
from rag_jax.weights.encoder_tensors import plain_encoder
from rag_jax.weights.generation_settings import GENERATION_CONFIG
from rag_jax.weights.generation_settings import write_generation
from rag_jax.weights.generator_configs import generator_config
from rag_jax.weights.generator_configs import generator_type
from rag_jax.weights.generator_tensors import generator_architecture
from rag_jax.weights.load import PASSAGE_ENCODER
from rag_jax.weights.mapping import Arrays
from rag_jax.weights.mapping import put
from rag_jax.weights.pooling_modules import MODULES
from rag_jax.weights.pooling_modules import check_modules
from rag_jax.weights.pooling_modules import write_modules
from rag_jax.weights.saved import SavedModel
from rag_jax.weights.tensors import MAX_SHARD_BYTES
from rag_jax.weights.tensors import write_tensors
from rag_jax.weights.tokenizer_files import GENERATOR_TOKENIZER
from rag_jax.weights.tokenizer_files import NO_TOKENIZER
from rag_jax.weights.tokenizer_files import QUESTION_TOKENIZER
from rag_jax.weights.tokenizer_files import TokenizerFiles
from rag_jax.weights.tokenizer_files import check_tokenizer
from rag_jax.weights.tokenizer_files import copy_tokenizer

EncoderKind = Literal[
  "dpr_question", "dpr_context", "sentence_transformers", "bert", "roberta",
  "xlm-roberta", "distilbert", "mpnet", "t5_encoder",
]  # fmt: skip
RagKind = Literal["token", "sequence"]
Path = str | os.PathLike[str]

_DPR_ROLES = {"dpr_question": "question", "dpr_context": "passage"}
_RAG_NAMES = {
  "token": "RagTokenForGeneration",
  "sequence": "RagSequenceForGeneration",
}


def export_encoder(
  path: Path,
  fields: EncoderConfig,
  params: PyTree,
  *,
  kind: EncoderKind,
  tokenizer: TokenizerFiles = NO_TOKENIZER,
  max_shard_bytes: int = MAX_SHARD_BYTES,
  card: str = "",
) -> None:
  """Writes an encoder as DPR, BERT, T5 or for sentence-transformers.

  An encoder without layers becomes a DPR encoder with one that computes the
  same (bag_of_words.py), if its inputs begin with `tokenizer.ids.bos`.

  Args:
    path: directory to write; what an earlier export left there is replaced.
    fields: of the encoder. Its `score_scale` multiplies the embeddings, and
      goes into DPR's projection.
    params: of `RetrieverEncoder`.
    kind: what loads it. For sentence-transformers, `fields.family` says of
      which class its first module is.
    tokenizer: copied along.
    max_shard_bytes: of one file.
    card: the text of README.md; "": none is written.

  Raises:
    ValueError: no such model computes this encoder, or the parameters or the
      tokenizer do not fit the fields.
  """
  if kind not in PLAIN_ENCODERS:
    fields, params = _truncated(fields, params)
  modules = {}
  if kind == "sentence_transformers":
    modules = {k: x for k, x in params.items() if k == "projection"}
  config, tensors, fields = _encoder(
    fields, params, kind, tokenizer.ids, fields.score_scale
  )
  path = _start(path)
  write_tensors(path, tensors, max_shard_bytes)
  _add_tokenizer(path, tokenizer, fields.vocab_size, "encoder")
  if kind == "sentence_transformers":
    write_modules(path, fields, tokenizer.max_tokens, modules)
  _finish(path, config, card)


def export_generator(
  path: Path,
  fields: GeneratorConfig,
  params: PyTree,
  *,
  tokenizer: TokenizerFiles = NO_TOKENIZER,
  generation: Mapping[str, Any] | None = None,
  max_shard_bytes: int = MAX_SHARD_BYTES,
  card: str = "",
) -> None:
  """Writes a generator as BART, mBART, Pegasus or T5, whichever it is.

  Args:
    path: directory to write; what an earlier export left there is replaced.
    fields: of the generator.
    params: of `Generator`.
    tokenizer: copied along.
    generation: settings for generation_config.json.
    max_shard_bytes: of one file.
    card: the text of README.md; "": none is written.

  Raises:
    ValueError: no such model computes this generator, or the parameters or the
      tokenizer do not fit the fields.
  """
  config, tensors, fields = _generator(fields, params, tokenizer.ids)
  path = _start(path)
  write_tensors(path, tensors, max_shard_bytes)
  _add_tokenizer(path, tokenizer, fields.vocab_size, "generator")
  write_generation(
    path, generation or {}, tokenizer.ids, fields.decoder_start_id
  )
  _finish(path, config, card)


def export_causal(
  path: Path,
  fields: CausalConfig,
  params: PyTree,
  *,
  tokenizer: TokenizerFiles = NO_TOKENIZER,
  generation: Mapping[str, Any] | None = None,
  max_shard_bytes: int = MAX_SHARD_BYTES,
  card: str = "",
) -> None:
  """Writes a decoder-only generator as Llama, Qwen, Gemma or GPT-2.

  Arguments and errors as in `export_generator`; `params` are those of
  `CausalGenerator`.
  """
  model_type = causal_type(fields)
  config = causal_config(fields, model_type, tokenizer.ids)
  tensors = put(params, causal_architecture(fields, model_type))
  path = _start(path)
  write_tensors(path, tensors, max_shard_bytes)
  _add_tokenizer(path, tokenizer, fields.vocab_size, "generator")
  write_generation(path, generation or {}, tokenizer.ids)
  _finish(path, config, card)


def export_rag(
  path: Path,
  model: SavedModel,
  *,
  max_shard_bytes: int = MAX_SHARD_BYTES,
  card: str = "",
) -> None:
  """Writes retriever and generator as RAG-Token or RAG-Sequence.

  The passage encoder, which `RagTokenForGeneration` does not load, gets the
  folder ctx_encoder: a DPRContextEncoder to embed passages with. It is the
  question encoder if they are tied, and left out if there is none. The score
  scale goes into the question encoder.

  Args:
    path: directory to write; what an earlier export left there is replaced.
    model: with an encoder and a generator. Its `settings` say which kind of RAG
      it becomes.
    max_shard_bytes: of one file.
    card: the text of README.md; "": none is written.

  Raises:
    ValueError: no such model computes these, or the parameters or a tokenizer
      do not fit the fields.
  """
  encoder, generator = model.encoder, model.generator
  assert encoder is not None
  assert generator is not None
  params, settings = model.params, model.settings
  weights = learned_weights(params)
  if weights is not None:
    raise ValueError(
      "The model scores documents by embeddings and words (index.hybrid=True,"
      f" weights {weights.dense:.3g} and {weights.bm25:.3g}), but"
      f" {_RAG_NAMES[settings.kind]} by embeddings alone; expected a model that"
      " was trained with index.hybrid=False. Train one, or export the parts:"
      " kind 'generator' and kind 'dpr_question'."
    )
  question_config, question, encoder_fields = _encoder(
    *_truncated(encoder, params["question_encoder"]),
    "dpr_question",
    model.question_tokenizer.ids,
    model.score_scale,
  )
  generator_json, generated, generator = _generator(
    generator, params["generator"], model.generator_tokenizer.ids
  )
  path = _start(path)
  # An earlier export may have left the encoder of other passages.
  shutil.rmtree(path / PASSAGE_ENCODER, ignore_errors=True)
  tower = params.get("passage_encoder")
  if tower is None and encoder.tied:
    tower = params["question_encoder"]
  if tower is not None:
    export_encoder(
      path / PASSAGE_ENCODER,
      dataclasses.replace(model.passage_encoder or encoder, score_scale=1.0),
      tower,
      kind="dpr_context",
      tokenizer=model.question_tokenizer,
      max_shard_bytes=max_shard_bytes,
    )
  tensors = {f"rag.question_encoder.{k}": x for k, x in question.items()}
  tensors |= {f"rag.generator.{k}": x for k, x in generated.items()}
  write_tensors(path, tensors, max_shard_bytes)
  for folder, tokenizer, part in (
    (QUESTION_TOKENIZER, model.question_tokenizer, encoder_fields),
    (GENERATOR_TOKENIZER, model.generator_tokenizer, generator),
  ):
    _add_tokenizer(path, tokenizer, part.vocab_size, "embedding table", folder)
  write_generation(
    path,
    model.generation,
    model.generator_tokenizer.ids,
    generator.decoder_start_id,
  )
  said = dataclasses.asdict(settings)
  kind, prefix = said.pop("kind"), said.pop("prefix")
  config = {
    "architectures": [_RAG_NAMES[kind]],
    "model_type": "rag",
    "is_encoder_decoder": True,
    "question_encoder": question_config,
    "generator": generator_json | {"prefix": prefix},
    "retrieval_vector_size": (encoder_fields.embedding_dim),
    **said,
  }
  _finish(path, config, card)


def _encoder(
  e: EncoderConfig,
  params: PyTree,
  kind: EncoderKind,
  ids: SpecialIds,
  scale: float,
) -> tuple[dict[str, Any], Arrays, EncoderConfig]:
  """Returns config.json, the tensors and the fields that they have."""
  if e.num_layers == 0 and kind in _DPR_ROLES:
    e, params = bag_of_words.to_bert(
      e,
      params,
      first_id=ids.bos,
      max_positions=e.max_positions or 512,  # its rows are zero
      scale=scale,
    )
  elif scale != 1.0:
    e, params = _scaled(e, params, kind, scale)
  e = _sized(e, params)
  if kind in _DPR_ROLES:
    role = _DPR_ROLES[kind]
    model = dpr(e, role)
    config = encoder_config(e, model.name, ids)
    prefix = DPR_PREFIXES[role]
    tensors = put(params, model)
    return config, {prefix + k: x for k, x in tensors.items()}, e
  inner, family = e, kind
  if kind == "sentence_transformers":  # its modules say the rest
    check_modules(e)
    family = e.family
    inner = dataclasses.replace(
      e, pooling=default_pooling(family), normalize=False, projection_dim=0
    )
    params = {k: x for k, x in params.items() if k != "projection"}
  config = encoder_config(inner, architecture_name(family), ids)
  return config, put(params, plain_encoder(e, family)), e


def _truncated(
  e: EncoderConfig, params: PyTree
) -> tuple[EncoderConfig, PyTree]:
  """Returns the encoder whose projection leaves out what is cut off."""
  if not e.truncate_dim:
    return e, params
  d, n = e.embed_dim, e.truncate_dim
  projection = params.get("projection") or {
    "kernel": np.eye(d, dtype=np.float32),
    "bias": np.zeros(d, np.float32),
  }
  cut = {k: np.asarray(x)[..., :n] for k, x in projection.items()}
  fields = dataclasses.replace(e, projection_dim=n, truncate_dim=0)
  return fields, dict(params) | {"projection": cut}


def _scaled(
  e: EncoderConfig, params: PyTree, kind: str, scale: float
) -> tuple[EncoderConfig, PyTree]:
  """Returns the encoder whose projection multiplies by `scale`."""
  if kind not in _DPR_ROLES:
    raise ValueError(
      f"kind {kind!r} has no place for a score scale of {scale:g}; expected"
      " 'dpr_question', whose projection takes it, or a scale of 1. Export it"
      " as DPR."
    )
  d = e.embed_dim
  projection = params.get("projection") or {
    "kernel": np.eye(d),
    "bias": np.zeros(d),
  }
  scaled = {k: np.asarray(x) * np.float32(scale) for k, x in projection.items()}
  return (
    dataclasses.replace(e, projection_dim=e.projection_dim or d),
    dict(params) | {"projection": scaled},
  )


def _sized(e: EncoderConfig, params: PyTree) -> EncoderConfig:
  """Returns the fields with the sizes that 0 stands for."""
  sizes = {}
  for name, table, unused in (
    ("vocab_size", "token_embedding", 0),
    ("max_positions", "position_embedding", e.position_offset),
  ):
    if not getattr(e, name) and table in params:
      sizes[name] = len(params[table]["embedding"]) - unused
  return dataclasses.replace(e, **sizes)


def _generator(
  g: GeneratorConfig, params: PyTree, ids: SpecialIds
) -> tuple[dict[str, Any], Arrays, GeneratorConfig]:
  """Returns config.json, the tensors and the fields that they have."""
  model_type = generator_type(g)
  if not g.vocab_size:
    rows = len(params["token_embedding"]["embedding"])
    g = dataclasses.replace(g, vocab_size=rows)
  config = generator_config(g, model_type, ids)
  return config, put(params, generator_architecture(g, model_type)), g


def _start(path: Path) -> pathlib.Path:
  """Returns the directory, made, and without what would make it loadable."""
  if not artifacts.is_local(path):
    raise ValueError(
      f"{path} is in a bucket; expected a local directory. Export to this"
      " machine, then copy it."
    )
  path = pathlib.Path(path).expanduser()
  artifacts.start_directory(path)
  for name in ("config.json", GENERATION_CONFIG, MODULES, CARD):
    (path / name).unlink(missing_ok=True)
  return path


def _add_tokenizer(
  path: pathlib.Path,
  tokenizer: TokenizerFiles,
  vocab_size: int,
  owner: str,
  folder: str = "",
) -> None:
  if tokenizer.path:
    copy_tokenizer(tokenizer.path, path / folder)
    check_tokenizer(open_directory(path / folder), vocab_size, owner)


def _finish(path: pathlib.Path, config: Mapping[str, Any], card: str) -> None:
  if card:
    artifacts.write_atomically(path / CARD, card)
  text = json.dumps(config, indent=2, sort_keys=True) + "\n"
  artifacts.write_atomically(path / "config.json", text)
  artifacts.write_manifest(
    path,
    kind=MANIFEST_KIND,
    format=MANIFEST_FORMAT,
    content={"architectures": config["architectures"]},
  )
