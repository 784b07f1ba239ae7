"""Whole models, from one format to the other: what tools/convert_hf.py does.

In: a checkpoint of transformers, to become a model directory of ours; or a
model directory or the workdir of a run, to become a checkpoint. Out: the
directory, and a report of its tensors.
"""

import dataclasses
import os
import pathlib
from typing import Any

from jaxtyping import PyTree

from rag_jax.config import EncoderConfig
from rag_jax.config import GeneratorConfig
from rag_jax.config_json import read_config
from rag_jax.corpus.tokenizer import load_tokenizer
from rag_jax.weights.config_values import SpecialIds
from rag_jax.weights.export import TokenizerFiles
from rag_jax.weights.export import export_encoder
from rag_jax.weights.export import export_generator
from rag_jax.weights.export import export_rag
from rag_jax.weights.export import score_scale
from rag_jax.weights.load import GENERATOR_TOKENIZER
from rag_jax.weights.load import QUESTION_TOKENIZER
from rag_jax.weights.load import Where
from rag_jax.weights.load import checkpoint_kind
from rag_jax.weights.load import load_encoder
from rag_jax.weights.load import load_generator
from rag_jax.weights.load import load_rag
from rag_jax.weights.loaded import LoadedEncoder
from rag_jax.weights.loaded import LoadedGenerator
from rag_jax.weights.loaded import RagSettings
from rag_jax.weights.model_files import load_model
from rag_jax.weights.model_files import save_model
from rag_jax.weights.report import Report
from rag_jax.weights.tensors import MAX_SHARD_BYTES
from rag_jax.weights.tokenizer_files import copy_tokenizer

ENCODER_KINDS = (
  "dpr_question", "dpr_context", "bert", "sentence_transformers"
)  # fmt: skip
KINDS = ("rag_token", "rag_sequence", "generator", *ENCODER_KINDS)

_RETRIEVER = "retriever"  # folder in a run's tokenizer, where there are two
_REMEDY = "Convert the checkpoint again: python tools/convert_hf.py."


@dataclasses.dataclass(slots=True)
class _Model:
  """A model of ours, with what an export needs beside the parameters."""

  params: PyTree
  kind: str  # of KINDS: what it came as, or was trained as
  encoder: EncoderConfig | None
  passage_encoder: EncoderConfig | None
  generator: GeneratorConfig | None
  settings: RagSettings
  question_tokenizer: TokenizerFiles
  generator_tokenizer: TokenizerFiles
  generation: dict[str, Any]
  max_tokens: int = 0


def import_checkpoint(where: Where, output: Where) -> Report:
  """Writes a checkpoint of transformers as a model directory of ours.

  Args:
    where: a local directory, or "hf:ORG/NAME".
    output: the directory to write: parameters, tokenizers and a manifest.

  Raises:
    FileNotFoundError: there is no checkpoint, or a part of it is missing.
    ValueError: it is damaged or of an unsupported architecture.
  """
  kind = checkpoint_kind(where)
  parts: dict[str, LoadedEncoder | LoadedGenerator]
  content: dict[str, Any] = {}
  if kind == "rag":
    rag = load_rag(where)
    parts = {"encoder": rag.question_encoder, "generator": rag.generator}
    content["settings"] = dataclasses.asdict(rag.settings)
    content["kind"] = f"rag_{rag.settings.kind}"
    content["tied"] = rag.tied
    if rag.passage_encoder is not None and not rag.tied:
      content["passage_encoder"] = rag.passage_encoder.fields
    params, report = rag.params, rag.report
  elif kind in ENCODER_KINDS:
    role = "passage" if kind == "dpr_context" else "question"
    encoder = load_encoder(where, role)
    parts = {"encoder": encoder}
    content["kind"] = encoder.kind
    params, report = {"question_encoder": encoder.params}, encoder.report
  else:
    generator = load_generator(where)
    parts = {"generator": generator}
    content["kind"] = "generator"
    params, report = {"generator": generator.params}, generator.report
  folders = {"encoder": QUESTION_TOKENIZER, "generator": GENERATOR_TOKENIZER}
  output = pathlib.Path(output)
  for name, part in parts.items():
    content[name] = part.fields
    content[f"{name}_ids"] = dataclasses.asdict(part.special_ids)
    if part.tokenizer:
      copy_tokenizer(pathlib.Path(part.tokenizer), output / folders[name])
    if isinstance(part, LoadedGenerator):
      content["generation"] = part.generation
    else:
      content["max_tokens"] = part.max_tokens
  save_model(output, params, content)
  return report


def is_ours(path: Where) -> bool:
  """Returns whether `path` is a model directory or a workdir of ours."""
  path = pathlib.Path(path)
  return (path / "params.safetensors").exists() or _is_workdir(path)


def check_output(source: Where, output: Where, *, overwrite: bool) -> None:
  """Raises `ValueError` if writing `output` would destroy something."""
  if os.path.realpath(source) == os.path.realpath(output):
    raise ValueError(
      f"Input and output are the same directory, {output}; expected two. Choose"
      " another output."
    )
  path = pathlib.Path(output)
  if path.exists() and not path.is_dir():
    raise ValueError(
      f"The output {output} is a file; expected a directory to write. Choose"
      " another."
    )
  if path.exists() and any(path.iterdir()) and not overwrite:
    raise ValueError(
      f"The output {output} is not empty; expected a new directory. Choose"
      " another, or replace what it holds with --overwrite."
    )


def export_model(
  source: Where,
  output: Where,
  kind: str = "",
  max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Report:
  """Writes a model of ours as a checkpoint, and reads it back to check it.

  Args:
    source: a model directory, or the workdir of a run that has ended.
    output: the directory to write.
    kind: one of `KINDS`; "": what the model came as, or was trained as.
    max_shard_bytes: of one file.

  Raises:
    FileNotFoundError: there is no model.
    ValueError: it is damaged, or transformers has no class for it.
  """
  path = pathlib.Path(source)
  if _is_workdir(path):
    model = _read_workdir(path)
  elif is_ours(path):
    model = _read_model(path)
  else:
    raise FileNotFoundError(
      f"There is no model in {path}; expected the workdir of a training run"
      " that has ended, or what an import wrote. Train first: python"
      " tools/train.py."
    )
  kind = kind or model.kind
  _check_kind(kind, model, path)
  if kind == "generator":
    assert model.generator is not None
    export_generator(
      output,
      model.generator,
      model.params["generator"],
      tokenizer=model.generator_tokenizer,
      generation=model.generation,
      max_shard_bytes=max_shard_bytes,
    )
    return load_generator(output).report
  assert model.encoder is not None
  if kind in ENCODER_KINDS:
    passages = kind == "dpr_context"
    question = model.params["question_encoder"]
    params = model.params.get("passage_encoder", question)
    export_encoder(
      output,
      (passages and model.passage_encoder) or model.encoder,
      params if passages else question,
      kind=kind,
      tokenizer=model.question_tokenizer,
      score_scale=1.0 if passages else score_scale(model.encoder, model.params),
      max_tokens=model.max_tokens,
      max_shard_bytes=max_shard_bytes,
    )
    return load_encoder(output, "passage" if passages else "question").report
  assert model.generator is not None
  export_rag(
    output,
    model.encoder,
    model.generator,
    model.params,
    settings=dataclasses.replace(
      model.settings, kind=kind.removeprefix("rag_")
    ),
    question_tokenizer=model.question_tokenizer,
    generator_tokenizer=model.generator_tokenizer,
    passage_encoder=model.passage_encoder,
    generation=model.generation,
    max_shard_bytes=max_shard_bytes,
  )
  return load_rag(output).report


def _check_kind(kind: str, model: _Model, path: pathlib.Path) -> None:
  possible = []
  if model.encoder and model.generator:
    possible += KINDS[:2]
  if model.generator:
    possible.append("generator")
  if model.encoder:
    possible += ENCODER_KINDS
  if kind not in possible:
    raise ValueError(
      f"{path} cannot be exported as kind {kind!r}; expected one of"
      f" {', '.join(possible)}. Choose one of them, or leave it away for"
      f" {model.kind}."
    )


def _is_workdir(path: pathlib.Path) -> bool:
  return (path / "config.json").exists() and (path / "model").is_dir()


def _read_workdir(path: pathlib.Path) -> _Model:
  """Returns what a run has trained."""
  params, content = load_model(path / "model")
  config = read_config(path / "config.json", content.get("settings"))
  tokenizer = _tokenizer_of_run(path / "tokenizer")
  retriever = path / "tokenizer" / _RETRIEVER
  data = config.data
  return _Model(
    params=params,
    kind=config.loss if data.n_docs else "generator",
    encoder=config.encoder if data.n_docs else None,
    passage_encoder=None,
    generator=config.generator,
    settings=RagSettings(
      n_docs=max(data.n_docs, 1),
      max_combined_length=data.context_length,
      title_sep=data.title_sep,
      doc_sep=data.doc_sep,
      prefix=data.context_prefix,
    ),
    question_tokenizer=(
      _tokenizer_of_run(retriever) if retriever.exists() else tokenizer
    ),
    generator_tokenizer=tokenizer,
    generation={
      "do_sample": False,
      # Theirs counts the token that the decoder starts with.
      "max_length": data.target_length + 1,
      "num_beams": 1,
    },
    max_tokens=max(data.question_length, data.passage_length),
  )


def _tokenizer_of_run(path: pathlib.Path) -> TokenizerFiles:
  tokenizer = load_tokenizer(path, ours=True)
  bos = tokenizer.bos_id
  ids = SpecialIds(
    tokenizer.pad_id, -1 if bos is None else bos, tokenizer.eos_id
  )
  return TokenizerFiles(os.fspath(path), ids)


def _read_model(path: pathlib.Path) -> _Model:
  """Returns what `import_checkpoint` wrote."""
  params, content = load_model(path, _REMEDY)
  if "kind" not in content:
    raise ValueError(
      f"{path} is the model of a training run, without its config; expected a"
      f" workdir. Give the workdir, {path.parent}."
    )

  def tokenizer(part: str, folder: str) -> TokenizerFiles:
    ids = SpecialIds(**content.get(f"{part}_ids", {}))
    files = path / folder
    return TokenizerFiles(os.fspath(files) if files.exists() else "", ids)

  def encoder(name: str) -> EncoderConfig | None:
    tied = content.get("tied", True)
    return (
      EncoderConfig(**content[name], tied=tied) if name in content else None
    )

  return _Model(
    params=params,
    kind=content["kind"],
    encoder=encoder("encoder"),
    passage_encoder=encoder("passage_encoder"),
    generator=(
      GeneratorConfig(**content["generator"])
      if "generator" in content
      else None
    ),
    settings=RagSettings(**content.get("settings", {})),
    question_tokenizer=tokenizer("encoder", QUESTION_TOKENIZER),
    generator_tokenizer=tokenizer("generator", GENERATOR_TOKENIZER),
    generation=content.get("generation", {}),
    max_tokens=content.get("max_tokens", 0),
  )
