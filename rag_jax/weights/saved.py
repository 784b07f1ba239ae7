"""Models in our own format, read like checkpoints of transformers.

In: the workdir of a run that has ended, or a model directory that
rag-jax convert-hf wrote. Out: a `SavedModel`, whose parts are those of a
checkpoint of transformers: a run can start from either, and either can answer
questions.
"""

import dataclasses
import os
from typing import Any, Literal

from etils import epath
import flax.traverse_util
from jaxtyping import PyTree
import numpy as np

from rag_jax.config import Config
from rag_jax.config_json import read_config
from rag_jax.config_models import CausalConfig
from rag_jax.config_models import EncoderConfig
from rag_jax.config_models import GeneratorConfig
from rag_jax.corpus.tokenizer import load_tokenizer
from rag_jax.models.hybrid import learned_weights
from rag_jax.weights.causal_configs import explicit_causal
from rag_jax.weights.config_values import SpecialIds
from rag_jax.weights.encoder_configs import ENCODER_FIELDS
from rag_jax.weights.encoder_configs import ENCODER_KINDS
from rag_jax.weights.generation_settings import exported_settings
from rag_jax.weights.generation_settings import settings_of
from rag_jax.weights.generator_configs import ENCODER_DECODER
from rag_jax.weights.generator_configs import explicit
from rag_jax.weights.hub import HUB_PREFIX
from rag_jax.weights.loaded import LoadedCausal
from rag_jax.weights.loaded import LoadedEncoder
from rag_jax.weights.loaded import LoadedGenerator
from rag_jax.weights.loaded import LoadedRag
from rag_jax.weights.loaded import RagSettings
from rag_jax.weights.mapping import Mapped
from rag_jax.weights.model_files import load_model
from rag_jax.weights.model_files import read_content
from rag_jax.weights.report import Report
from rag_jax.weights.tokenizer_files import GENERATOR_TOKENIZER
from rag_jax.weights.tokenizer_files import NO_TOKENIZER
from rag_jax.weights.tokenizer_files import QUESTION_TOKENIZER
from rag_jax.weights.tokenizer_files import TokenizerFiles

Where = str | os.PathLike[str]

_RETRIEVER = "retriever"  # folder in a run's tokenizer, where there are two
_RAG_LOSSES = ("rag_token", "rag_sequence")
_TOKENIZER = "tokenizer"  # of a model directory that is one encoder
_REMEDY = "Convert the checkpoint again: rag-jax convert-hf."


@dataclasses.dataclass(slots=True)
class SavedModel:
  """A model of ours, with what an export needs beside the parameters."""

  origin: str
  params: PyTree
  kind: str  # of convert.KINDS: what it came as, or was trained as
  encoder: EncoderConfig | None = None
  passage_encoder: EncoderConfig | None = None  # None: as `encoder`
  generator: GeneratorConfig | None = None
  causal: CausalConfig | None = None  # a generator without encoder
  settings: RagSettings = dataclasses.field(default_factory=RagSettings)
  question_tokenizer: TokenizerFiles = NO_TOKENIZER
  generator_tokenizer: TokenizerFiles = NO_TOKENIZER
  generation: dict[str, Any] = dataclasses.field(default_factory=dict)
  max_tokens: int = 0
  context_style: str = "rag"  # what the generator was trained to read
  content_from: str = ""  # the checkpoint that it was converted from

  @property
  def score_scale(self) -> float:
    """What multiplies the embeddings of questions."""
    return score_scale(self.encoder or EncoderConfig(), self.params)

  @property
  def hybrid(self) -> tuple[float, float] | None:
    """The learned weights of embeddings and of words, if there are any."""
    weights = learned_weights(self.params)
    if weights is None:
      return None
    return float(weights.dense), float(weights.bm25)

  def load_encoder(self, role: Literal["question", "passage"]) -> LoadedEncoder:
    """Returns the encoder of `role`.

    Raises:
      ValueError: there is none.
    """
    if self.encoder is None:
      raise self._lacks("an encoder")
    encoder, params = self.encoder, self.params["question_encoder"]
    if role == "passage":
      if not self.has_passages:
        raise self._lacks("a passage encoder")
      encoder = self.passage_encoder or encoder
      params = self.params.get("passage_encoder", params)
    kind = self.kind
    if kind not in ENCODER_KINDS:  # a part of a model
      kind = {"question": "dpr_question", "passage": "dpr_context"}[role]
    fields = {name: getattr(encoder, name) for name in ENCODER_FIELDS}
    for name, table, unused in (
      ("vocab_size", "token_embedding", 0),
      ("max_positions", "position_embedding", encoder.position_offset),
    ):
      if not fields[name] and table in params:
        fields[name] = len(params[table]["embedding"]) - unused
    return LoadedEncoder(
      kind=kind,
      fields=fields,
      params=_on_host(params),
      tokenizer=self.question_tokenizer.path,
      special_ids=self.question_tokenizer.ids,
      max_tokens=self.max_tokens,
      report=_report(params),
      score_scale=self.score_scale if role == "question" else 1.0,
    )

  @property
  def has_passages(self) -> bool:
    """Whether there is a passage encoder, maybe the one of questions."""
    tied = self.encoder is not None and self.encoder.tied
    return tied or "passage_encoder" in self.params

  def load_generator(self) -> LoadedGenerator:
    """Returns the generator.

    Raises:
      ValueError: there is none.
    """
    if self.generator is None:
      raise self._lacks(ENCODER_DECODER)
    params = self.params["generator"]
    fields = explicit(self.generator)
    fields["position_init"] = self.generator.position_init
    rows = len(params["token_embedding"]["embedding"])
    fields["vocab_size"] = fields["vocab_size"] or rows
    if fields["decoder_start_id"] < 0:  # the end token of its own tokenizer
      fields["decoder_start_id"] = self.generator_tokenizer.ids.eos
    return LoadedGenerator(
      fields=fields,
      params=_on_host(params),
      tokenizer=self.generator_tokenizer.path,
      special_ids=self.generator_tokenizer.ids,
      generation=self.generation,
      report=_report(params),
      rag=self.settings if self.encoder is not None else None,
      context_style=self.context_style,
    )

  def load_rag(self) -> LoadedRag:
    """Returns retriever and generator.

    Raises:
      ValueError: one of them is missing.
    """
    return LoadedRag(
      question_encoder=self.load_encoder("question"),
      passage_encoder=(
        self.load_encoder("passage") if self.has_passages else None
      ),
      generator=self.load_generator(),
      settings=self.settings,
    )

  def load_causal(self) -> LoadedCausal:
    """Returns the decoder-only generator.

    Raises:
      ValueError: there is none.
    """
    if self.causal is None:
      raise self._lacks("a decoder-only generator")
    params = self.params["generator"]
    fields = explicit_causal(self.causal)
    rows = len(params["token_embedding"]["embedding"])
    fields["vocab_size"] = fields["vocab_size"] or rows
    return LoadedCausal(
      fields=fields,
      params=_on_host(params),
      tokenizer=self.generator_tokenizer.path,
      special_ids=self.generator_tokenizer.ids,
      generation=self.generation,
      report=_report(params),
    )

  def _lacks(self, what: str) -> ValueError:
    return ValueError(
      f"{self.origin} holds a model of kind {self.kind!r}, without {what};"
      " expected one that has it. Give another directory."
    )


def score_scale(e: EncoderConfig, params: PyTree) -> float:
  """Returns what multiplies the question embeddings of a `RagModel`."""
  if "log_score_scale" in params:
    return float(np.exp(np.float64(params["log_score_scale"])))
  return e.score_scale


def is_ours(where: Where) -> bool:
  """Returns whether `where` is a model directory or a workdir of ours."""
  where = os.fspath(where)
  if where.startswith(HUB_PREFIX):
    return False
  path = epath.Path(where).expanduser()
  return (path / "params.safetensors").exists() or is_workdir(path)


def is_workdir(path: Where) -> bool:
  """Returns whether `path` is the workdir of a run that has ended."""
  path = epath.Path(path).expanduser()
  return (path / "config.json").exists() and (path / "model").is_dir()


def origin_of(where: Where) -> str:
  """Returns the checkpoint that a model was converted from, or `where`.

  Raises:
    ValueError: a model directory is damaged.
  """
  if not is_ours(where) or is_workdir(where):
    return os.fspath(where)
  path = epath.Path(where).expanduser()
  return str(read_content(path, _REMEDY).get("from") or os.fspath(where))


def read_saved(where: Where) -> SavedModel:
  """Returns the model in a workdir or a model directory.

  Raises:
    FileNotFoundError: there is no model.
    ValueError: it is damaged.
  """
  path = epath.Path(where).expanduser()
  if is_workdir(path):
    return _read_workdir(path)
  if is_ours(path):
    return _read_directory(path)
  raise FileNotFoundError(
    f"There is no model in {path}; expected the workdir of a training run"
    " that has ended, or what an import wrote. Train first:"
    " rag-jax train."
  )


def _read_workdir(path: epath.Path) -> SavedModel:
  """Returns what a run has trained."""
  params, content = load_model(path / "model")
  config = read_config(path / "config.json", content.get("config"))
  tokenizer = _tokenizer_of_run(path / _TOKENIZER)
  retriever = path / _TOKENIZER / _RETRIEVER
  data, causal = config.data, config.generator.kind == "causal"
  return SavedModel(
    origin=str(path),
    params=params,
    kind=_kind(config),
    encoder=config.encoder if data.n_docs else None,
    passage_encoder=None,
    generator=None if causal else config.generator,
    causal=config.causal if causal else None,
    settings=RagSettings(
      kind="sequence" if config.loss == "rag_sequence" else "token",
      n_docs=max(data.n_docs, 1),
      max_combined_length=data.context_length,
      title_sep=data.title_sep,
      doc_sep=data.doc_sep,
      prefix=data.context_prefix,
      do_deduplication=settings_of(config).get("do_deduplication", True),
      exclude_bos_score=config.exclude_bos_score,
    ),
    question_tokenizer=(
      _tokenizer_of_run(retriever) if retriever.exists() else tokenizer
    ),
    generator_tokenizer=tokenizer,
    generation=exported_settings(config),
    max_tokens=max(data.question_length, data.passage_length),
    context_style=data.context_style,
  )


def _kind(config: Config) -> str:
  """Returns the class of transformers that a trained model is closest to.

  There is none for FiD, for all documents in one context, and for RAG with a
  decoder-only generator: there, the generator is a plain one.
  """
  if config.generator.kind == "causal":
    return "causal"
  is_rag = config.data.n_docs and config.loss in _RAG_LOSSES
  return config.loss if is_rag else "generator"


def _tokenizer_of_run(path: epath.Path) -> TokenizerFiles:
  tokenizer = load_tokenizer(path, ours=True)
  bos = tokenizer.bos_id
  ids = SpecialIds(
    tokenizer.pad_id, -1 if bos is None else bos, tokenizer.eos_id
  )
  return TokenizerFiles(os.fspath(path), ids)


def _read_directory(path: epath.Path) -> SavedModel:
  """Returns what `convert.import_checkpoint` wrote."""
  params, content = load_model(path, _REMEDY)
  if "kind" not in content:
    raise ValueError(
      f"{path} is the model of a training run, without its config; expected a"
      f" workdir. Give the workdir, {path.parent}."
    )

  def tokenizer(part: str, *folders: str) -> TokenizerFiles:
    ids = SpecialIds(**content.get(f"{part}_ids", {}))
    found = [path / name for name in folders if (path / name).exists()]
    return TokenizerFiles(os.fspath(found[0]) if found else "", ids)

  def encoder(name: str) -> EncoderConfig | None:
    tied = content.get("tied", True)
    return (
      EncoderConfig(**content[name], tied=tied) if name in content else None
    )

  return SavedModel(
    origin=str(path),
    params=params,
    kind=content["kind"],
    encoder=encoder("encoder"),
    passage_encoder=encoder("passage_encoder"),
    generator=(
      GeneratorConfig(
        **content["generator"]
        | {"fixed": tuple(content["generator"].get("fixed", ()))}
      )
      if "generator" in content
      else None
    ),
    causal=(
      CausalConfig(
        **content["causal"]
        | {"sliding_layers": tuple(content["causal"]["sliding_layers"])}
      )
      if "causal" in content
      else None
    ),
    settings=RagSettings(**content.get("settings", {})),
    question_tokenizer=tokenizer("encoder", QUESTION_TOKENIZER, _TOKENIZER),
    generator_tokenizer=tokenizer("generator", GENERATOR_TOKENIZER),
    generation=content.get("generation", {}),
    max_tokens=content.get("max_tokens", 0),
    content_from=content.get("from", ""),
  )


def _on_host(params: PyTree) -> PyTree:
  flat = flax.traverse_util.flatten_dict(params, sep="/")
  arrays = {path: np.asarray(x) for path, x in flat.items()}
  return flax.traverse_util.unflatten_dict(arrays, sep="/")


def _report(params: PyTree) -> Report:
  """Returns a report in which each array keeps its name."""
  flat = flax.traverse_util.flatten_dict(params, sep="/")
  shapes = {path: tuple(np.shape(x)) for path, x in sorted(flat.items())}
  return Report(
    tuple(Mapped(path, path, shape, shape) for path, shape in shapes.items()),
    (),
  )
