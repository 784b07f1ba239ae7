"""Whole models, from one format to the other: what tools/convert_hf.py does.

In: a checkpoint of transformers, to become a model directory of ours; or a
model directory or the workdir of a run, to become a checkpoint. Out: the
directory, and a report of its tensors.
"""

import dataclasses
import os
import pathlib
from typing import Any, cast

from etils import epath

from rag_jax.config_models import CausalConfig
from rag_jax.weights.card import model_card
from rag_jax.weights.card import read_results
from rag_jax.weights.encoder_configs import ENCODER_KINDS
from rag_jax.weights.export import EncoderKind
from rag_jax.weights.export import export_causal
from rag_jax.weights.export import export_encoder
from rag_jax.weights.export import export_generator
from rag_jax.weights.export import export_rag
from rag_jax.weights.load import Where
from rag_jax.weights.load import load_causal
from rag_jax.weights.load import load_checkpoint
from rag_jax.weights.load import load_encoder
from rag_jax.weights.load import load_generator
from rag_jax.weights.load import load_rag
from rag_jax.weights.loaded import LoadedCausal
from rag_jax.weights.loaded import LoadedEncoder
from rag_jax.weights.loaded import LoadedGenerator
from rag_jax.weights.loaded import LoadedRag
from rag_jax.weights.model_files import save_model
from rag_jax.weights.report import Report
from rag_jax.weights.saved import SavedModel
from rag_jax.weights.saved import read_saved
from rag_jax.weights.tensors import MAX_SHARD_BYTES
from rag_jax.weights.tokenizer_files import GENERATOR_TOKENIZER
from rag_jax.weights.tokenizer_files import QUESTION_TOKENIZER
from rag_jax.weights.tokenizer_files import copy_tokenizer

KINDS = ("rag_token", "rag_sequence", "generator", "causal", *ENCODER_KINDS)


def import_checkpoint(where: Where, output: Where, origin: str = "") -> Report:
  """Writes a checkpoint of transformers as a model directory of ours.

  Args:
    where: a local directory, or "hf:ORG/NAME".
    output: the directory to write: parameters, tokenizers and a manifest.
    origin: what the manifest says it came from; "": `where`.

  Raises:
    FileNotFoundError: there is no checkpoint, or a part of it is missing.
    ValueError: it is damaged or of an unsupported architecture.
  """
  loaded = load_checkpoint(where)
  parts: dict[str, LoadedEncoder | LoadedGenerator | LoadedCausal]
  content: dict[str, Any] = {"from": origin or os.fspath(where)}
  if isinstance(loaded, LoadedRag):
    parts = {"encoder": loaded.question_encoder, "generator": loaded.generator}
    content["settings"] = dataclasses.asdict(loaded.settings)
    content["kind"] = f"rag_{loaded.settings.kind}"
    content["tied"] = loaded.tied
    if loaded.passage_encoder is not None and not loaded.tied:
      content["passage_encoder"] = loaded.passage_encoder.fields
    params = loaded.params
  elif isinstance(loaded, LoadedEncoder):
    parts = {"encoder": loaded}
    content["kind"] = loaded.kind
    params = {"question_encoder": loaded.params}
  else:
    kind = "causal" if isinstance(loaded, LoadedCausal) else "generator"
    parts = {kind: loaded}
    content["kind"] = kind
    params = {"generator": loaded.params}
  folders = {"encoder": QUESTION_TOKENIZER, "generator": GENERATOR_TOKENIZER}
  output = pathlib.Path(output)
  for name, part in parts.items():
    owner = "encoder" if isinstance(part, LoadedEncoder) else "generator"
    content[name] = part.fields
    content[f"{owner}_ids"] = dataclasses.asdict(part.special_ids)
    if part.tokenizer:
      copy_tokenizer(part.tokenizer, output / folders[owner])
    if isinstance(part, LoadedEncoder):
      content["max_tokens"] = part.max_tokens
    else:
      content["generation"] = part.generation
  save_model(output, params, content)
  return loaded.report


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

  A model card is written beside.

  Args:
    source: a model directory, or the workdir of a run that has ended.
    output: the directory to write.
    kind: one of `KINDS`; "": what the model came as, or was trained as.
    max_shard_bytes: of one file.

  Raises:
    FileNotFoundError: there is no model.
    ValueError: it is damaged, or transformers has no class for it.
  """
  path = epath.Path(source)
  model = read_saved(path)
  kind = kind or model.kind
  _check_kind(kind, model, path)
  name = pathlib.Path(output).absolute().name
  card = model_card(model, kind, name, read_results(path))
  if kind in ("generator", "causal"):
    fields: Any = model.generator
    if kind == "causal":
      fields = CausalConfig(**model.load_causal().fields)
    write, load = {
      "generator": (export_generator, load_generator),
      "causal": (export_causal, load_causal),
    }[kind]
    write(
      output,
      fields,
      model.params["generator"],
      tokenizer=model.generator_tokenizer,
      generation=model.generation,
      max_shard_bytes=max_shard_bytes,
      card=card,
    )
    return load(output).report
  assert model.encoder is not None
  if kind in ENCODER_KINDS:
    passages = kind == "dpr_context"
    question = model.params["question_encoder"]
    params = model.params.get("passage_encoder", question)
    fields = (passages and model.passage_encoder) or model.encoder
    export_encoder(
      output,
      dataclasses.replace(
        fields, score_scale=1.0 if passages else model.score_scale
      ),
      params if passages else question,
      kind=cast(EncoderKind, kind),
      tokenizer=dataclasses.replace(
        model.question_tokenizer, max_tokens=model.max_tokens
      ),
      max_shard_bytes=max_shard_bytes,
      card=card,
    )
    return load_encoder(output, "passage" if passages else "question").report
  settings: Any = {"kind": kind.removeprefix("rag_")}
  settings = dataclasses.replace(model.settings, **settings)
  export_rag(
    output,
    dataclasses.replace(model, settings=settings),
    max_shard_bytes=max_shard_bytes,
    card=card,
  )
  return load_rag(output).report


def _check_kind(kind: str, model: SavedModel, path: epath.Path) -> None:
  possible = []
  if model.encoder and model.generator:
    possible += KINDS[:2]
  if model.generator:
    possible.append("generator")
  if model.causal:
    possible.append("causal")
  if model.encoder:
    possible += ENCODER_KINDS
  if kind not in possible:
    raise ValueError(
      f"{path} cannot be exported as kind {kind!r}; expected one of"
      f" {', '.join(possible)}. Choose one of them, or omit it to use"
      f" {model.kind}."
    )
