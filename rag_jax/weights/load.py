"""A checkpoint as fields and parameters of ours.

In: a local directory or "hf:ORG/NAME", of transformers; or a workdir or model
directory of ours. Out: what `config.EncoderConfig`, `config.GeneratorConfig`
and `config.CausalConfig` take, float32 parameters, where the tokenizer lies,
and a report.

A RAG checkpoint serves as any of its parts. Those of RAG-Token and RAG-Sequence
have the same tensors: either can be trained and decoded as the other.
"""

import dataclasses
import functools
import os
from typing import Literal

from rag_jax.weights.causal_configs import CAUSAL_TYPES
from rag_jax.weights.causal_configs import with_causal_ids
from rag_jax.weights.checkpoint_models import CausalPart
from rag_jax.weights.checkpoint_models import EncoderPart
from rag_jax.weights.checkpoint_models import GeneratorPart
from rag_jax.weights.checkpoint_models import Select
from rag_jax.weights.config_fields import field_notes
from rag_jax.weights.config_values import MAX_LENGTH
from rag_jax.weights.config_values import ConfigValues
from rag_jax.weights.config_values import unsupported
from rag_jax.weights.directory import CheckpointDirectory
from rag_jax.weights.directory import open_directory
from rag_jax.weights.encoder_configs import ENCODER_KINDS
from rag_jax.weights.encoder_configs import ENCODER_TYPES
from rag_jax.weights.generation_settings import GENERATION_NAMES
from rag_jax.weights.generation_settings import read_generation
from rag_jax.weights.generator_configs import ENCODER_DECODER
from rag_jax.weights.generator_configs import GENERATOR_TYPES
from rag_jax.weights.generator_configs import with_default_ids
from rag_jax.weights.loaded import LoadedCausal
from rag_jax.weights.loaded import LoadedEncoder
from rag_jax.weights.loaded import LoadedGenerator
from rag_jax.weights.loaded import LoadedRag
from rag_jax.weights.loaded import RagSettings
from rag_jax.weights.mapping import check
from rag_jax.weights.pooling_modules import MODULES
from rag_jax.weights.pooling_modules import read_modules
from rag_jax.weights.saved import is_ours
from rag_jax.weights.saved import read_saved
from rag_jax.weights.tensors import TensorFiles
from rag_jax.weights.tokenizer_files import GENERATOR_TOKENIZER
from rag_jax.weights.tokenizer_files import QUESTION_TOKENIZER
from rag_jax.weights.tokenizer_files import find_tokenizer

Role = Literal["question", "passage"]
Where = str | os.PathLike[str]

PASSAGE_ENCODER = "ctx_encoder"  # folder of the passage encoder in our exports

_RAG_PARTS = ("question_encoder", "ctx_encoder", "generator")
_KINDS = {
  "RagTokenForGeneration": "token",
  "RagSequenceForGeneration": "sequence",
}


def load_encoder(where: Where, role: Role = "question") -> LoadedEncoder:
  """Returns the encoder of a directory.

  Of DPR, BERT or a relative, T5, sentence-transformers or RAG.

  Args:
    where: a local directory, or "hf:ORG/NAME" of the hub; also the workdir of
      a run, or a model directory that tools/convert_hf.py wrote.
    role: which of the two, where a checkpoint holds both.

  Raises:
    FileNotFoundError: there is no checkpoint, or a part of it is missing.
    ValueError: it is damaged, of an unsupported architecture, or its parts do
      not fit together.
  """
  if is_ours(where):
    return read_saved(where).load_encoder(role)
  return _encoder(open_directory(where), role)


def load_generator(where: Where) -> LoadedGenerator:
  """Returns the generator of a BART, T5 or RAG directory.

  Raises:
    FileNotFoundError: there is no checkpoint, or a part of it is missing.
    ValueError: it is damaged, of an unsupported architecture, or its parts do
      not fit together.
  """
  if is_ours(where):
    return read_saved(where).load_generator()
  directory = open_directory(where)
  values = _config(directory)
  if values.values.get("model_type") == "rag":
    rag = _Rag(directory, values)
    rag.check("generator")
    return rag.load_generator()
  _expect(values, GENERATOR_TYPES, ENCODER_DECODER)
  part = GeneratorPart(values, TensorFiles(directory))
  check(directory.origin, {part.name: part.problems()})
  generation = read_generation(directory, with_default_ids(values))
  return part.load(find_tokenizer(directory, ""), generation)


def load_any_generator(where: Where) -> LoadedGenerator | LoadedCausal:
  """Returns the generator of a checkpoint, whichever kind it is.

  Errors as in `load_generator`.
  """
  if is_ours(where):
    saved = read_saved(where)
    is_causal = saved.causal is not None
    return saved.load_causal() if is_causal else saved.load_generator()
  is_causal = checkpoint_kind(where) in CAUSAL_TYPES
  return load_causal(where) if is_causal else load_generator(where)


def load_causal(where: Where) -> LoadedCausal:
  """Returns the decoder-only generator of a Llama, Qwen, Gemma or GPT-2.

  Raises:
    FileNotFoundError: there is no checkpoint, or a part of it is missing.
    ValueError: it is damaged, or of an unsupported architecture.
  """
  if is_ours(where):
    return read_saved(where).load_causal()
  directory = open_directory(where)
  values = _config(directory)
  _expect(values, CAUSAL_TYPES, "a decoder-only generator")
  part = CausalPart(values, TensorFiles(directory))
  check(directory.origin, {part.name: part.problems()})
  generation = read_generation(directory, with_causal_ids(values))
  return part.load(find_tokenizer(directory, ""), generation)


def load_rag(where: Where) -> LoadedRag:
  """Returns all parts of a RAG directory.

  Raises:
    FileNotFoundError: there is no checkpoint, or a part of it is missing.
    ValueError: it is damaged, of an unsupported architecture, or its parts do
      not fit together.
  """
  if is_ours(where):
    return read_saved(where).load_rag()
  directory = open_directory(where)
  values = _config(directory)
  _expect(values, ("rag",), "retriever and generator together")
  rag = _Rag(directory, values)
  rag.check(*rag.parts)
  return LoadedRag(
    question_encoder=rag.load_encoder("question"),
    passage_encoder=rag.load_encoder("passage") if rag.has_passages else None,
    generator=rag.load_generator(),
    settings=rag.settings(),
  )


def load_checkpoint(
  where: Where,
) -> LoadedRag | LoadedEncoder | LoadedGenerator | LoadedCausal:
  """Returns all that a checkpoint holds, whatever it is.

  Raises:
    FileNotFoundError: there is no checkpoint, or a part of it is missing.
    ValueError: it is damaged, of an unsupported architecture, or its parts do
      not fit together.
  """
  if is_ours(where):
    saved = read_saved(where)
    if saved.causal is not None:
      return saved.load_causal()
    if saved.generator is None:
      passages = saved.kind == "dpr_context"
      return saved.load_encoder("passage" if passages else "question")
    return saved.load_rag() if saved.encoder else saved.load_generator()
  kind = checkpoint_kind(where)
  if kind in ENCODER_KINDS:
    return load_encoder(
      where, "passage" if kind == "dpr_context" else "question"
    )
  if kind in CAUSAL_TYPES:
    return load_causal(where)
  return load_rag(where) if kind == "rag" else load_generator(where)


def has_passage_encoder(where: Where) -> bool:
  """Returns whether a checkpoint is a RAG that holds its passage encoder."""
  directory = open_directory(where)
  values = _config(directory) if directory.has("config.json") else None
  if values is None or values.values.get("model_type") != "rag":
    return False
  return _Rag(directory, values).has_passages


def checkpoint_kind(where: Where) -> str:
  """Returns what a checkpoint is: its model_type, or what is more precise.

  That is "dpr_question", "dpr_context", "t5_encoder" (saved without decoder) or
  "sentence_transformers".
  """
  directory = open_directory(where)
  if directory.has(MODULES):
    return "sentence_transformers"
  values = _config(directory)
  kind = values.text("model_type", "")
  if kind == "dpr":
    passages = values.values.get("architectures") == ["DPRContextEncoder"]
    return "dpr_context" if passages else "dpr_question"
  if kind == "t5" and values.values.get("architectures") == ["T5EncoderModel"]:
    return "t5_encoder"
  return kind


def _config(directory: CheckpointDirectory) -> ConfigValues:
  name = "config.json"
  return ConfigValues(directory.json(name), f"{directory.origin}/{name}")


def _expect(values: ConfigValues, types: tuple[str, ...], what: str) -> None:
  """Raises `ValueError` if the model is none of `types`."""
  found = values.values.get("model_type")
  if found in types:
    return
  if found in (*ENCODER_TYPES, *GENERATOR_TYPES, *CAUSAL_TYPES, "rag"):
    raise ValueError(
      f"{values.origin} describes model_type={found!r}; expected {what}, one of"
      f" {', '.join(types)}. Give another checkpoint, or load this one as what"
      " it is."
    )
  raise unsupported(values.origin, found, values.values.get("architectures"))


def _encoder(directory: CheckpointDirectory, role: Role) -> LoadedEncoder:
  modules = read_modules(directory) if directory.has(MODULES) else None
  home = modules.transformer if modules else directory
  values = _config(home)
  if values.values.get("model_type") == "rag":
    rag = _Rag(home, values)
    rag.check("question_encoder" if role == "question" else "ctx_encoder")
    return rag.load_encoder(role)
  _expect(values, ENCODER_TYPES, "an encoder")
  part = EncoderPart(values, TensorFiles(home), role, modules=modules)
  check(directory.origin, {part.name: part.problems()})
  notes = []
  other = {"question": "dpr_context", "passage": "dpr_question"}[role]
  if part.kind == other:
    notes.append(f"this {part.name} is taken as the {role} encoder")
  tokenizer = find_tokenizer(home, "") or find_tokenizer(directory, "")
  return part.load(tokenizer, notes)


class _Rag:
  """A RAG directory, of which some parts or all are read."""

  def __init__(self, directory: CheckpointDirectory, values: ConfigValues):
    self._directory, self._values = directory, values
    self._files = TensorFiles(directory)
    self._held = {
      part: any(_below(part)(name) is not None for name in self._files.names)
      for part in _RAG_PARTS
    }

  @property
  def has_passages(self) -> bool:
    """Whether there is a passage encoder."""
    return self._held["ctx_encoder"] or self._directory.has(PASSAGE_ENCODER)

  @property
  def parts(self) -> list[str]:
    """The names of all parts among the tensors."""
    return [p for p in _RAG_PARTS if p != "ctx_encoder" or self._held[p]]

  def check(self, *parts: str) -> None:
    """Raises `ValueError` if the tensors of `parts` do not fit."""
    found = {}
    for name in parts:
      if name == "ctx_encoder" and not self._held[name]:
        continue  # it has a folder of its own, or is missed when it is loaded
      part = self._part(name)
      found[part.name] = part.problems()
    if len(parts) > 1:
      unknown = [
        name
        for name in self._files.names
        if all(_below(part)(name) is None for part in _RAG_PARTS)
      ]
      found["RagModel"] = [f"unknown: {'; '.join(unknown)}"] if unknown else []
    check(self._directory.origin, found)

  def _part(self, name: str) -> EncoderPart | GeneratorPart:
    if name == "generator":
      values = self._part_values("generator", "bart", GENERATOR_TYPES)
      return GeneratorPart(values, self._files, _below(name))
    role = "question" if name == "question_encoder" else "passage"
    # The passage encoder has no config of its own: it has the same one.
    values = self._part_values("question_encoder", "dpr", ("dpr",))
    return EncoderPart(values, self._files, role, _below(name))

  def _part_values(
    self, name: str, default: str, types: tuple[str, ...]
  ) -> ConfigValues:
    part = self._values.part(name)
    outer = {
      key: self._values.values[key]
      for key in ("tie_word_embeddings",)
      if self._values.has(key)
    }
    merged = {"model_type": default} | outer | dict(part.values)
    values = ConfigValues(merged, part.origin)
    _expect(values, types, f"a {name} of RAG")
    return values

  def load_encoder(self, role: Role) -> LoadedEncoder:
    """Returns the encoder of `role`. Call `check` before."""
    directory = self._directory
    if role == "passage" and not self._held["ctx_encoder"]:
      if not self.has_passages:
        raise ValueError(
          f"{directory.origin} holds no passage encoder: transformers saves"
          " none with a RAG whose index stays as it is. Expected one for"
          " role='passage'. Give its DPR context encoder, for facebook/rag-*"
          " encoder.passage_init_from="
          "hf:facebook/dpr-ctx_encoder-multiset-base."
        )
      return _encoder(directory.folder(PASSAGE_ENCODER), role)
    name = "question_encoder" if role == "question" else "ctx_encoder"
    part = self._part(name)
    assert isinstance(part, EncoderPart)
    return part.load(find_tokenizer(directory, QUESTION_TOKENIZER))

  def load_generator(self) -> LoadedGenerator:
    """Returns the generator. Call `check` before."""
    directory = self._directory
    part = self._part("generator")
    assert isinstance(part, GeneratorPart)
    values = self._part_values("generator", "bart", GENERATOR_TYPES)
    generation = read_generation(
      directory, self._values.values, with_default_ids(values)
    )
    kind = self.settings().kind
    note = (
      f"a RAG-{kind.capitalize()} checkpoint; the other kind has the same"
      " tensors"
    )
    loaded = part.load(
      find_tokenizer(directory, GENERATOR_TOKENIZER),
      generation,
      [note, *field_notes(self._values, GENERATION_NAMES)],
    )
    return dataclasses.replace(loaded, rag=self.settings())

  def settings(self) -> RagSettings:
    """Returns what config.json says beside the parts."""
    v, default = self._values, RagSettings()
    architectures = v.values.get("architectures") or []
    kinds = [_KINDS[name] for name in architectures if name in _KINDS]
    generator = v.part("generator")
    return RagSettings(
      kind="sequence" if kinds == ["sequence"] else "token",
      n_docs=v.size("n_docs", default.n_docs, most=MAX_LENGTH),
      max_combined_length=v.size(
        "max_combined_length", default.max_combined_length, most=MAX_LENGTH
      ),
      title_sep=v.text("title_sep", default.title_sep),
      doc_sep=v.text("doc_sep", default.doc_sep),
      prefix=generator.text("prefix", default.prefix),
      do_deduplication=v.flag("do_deduplication", default.do_deduplication),
      exclude_bos_score=v.flag("exclude_bos_score", default.exclude_bos_score),
      reduce_loss=v.flag("reduce_loss", default.reduce_loss),
      label_smoothing=v.number("label_smoothing", default.label_smoothing),
    )


@functools.cache
def _below(part: str) -> Select:
  """Returns the selection of a part's tensors; RagModel has no "rag."."""

  def select(name: str) -> str | None:
    name = name.removeprefix("rag.")
    return name[len(part) + 1 :] if name.startswith(f"{part}.") else None

  return select
