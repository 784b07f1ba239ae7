"""A sentence-transformers directory: BERT, a pooling, maybe a normalisation.

In: modules.json and what it names. Out: where BERT lies, and the fields that
say how its states become one embedding; and back.
"""

from collections.abc import Mapping
import dataclasses
import json
import pathlib
from typing import Any

from rag_jax import artifacts
from rag_jax.config import EncoderConfig
from rag_jax.weights.config_values import ConfigValues
from rag_jax.weights.directory import CheckpointDirectory

MODULES = "modules.json"

_LENGTHS = "sentence_bert_config.json"
_SETTINGS = "config_sentence_transformers.json"
_POOLING = "1_Pooling"
_TYPE = "sentence_transformers.models."
# Ours by theirs; the three others that exist are not supported.
_POOLINGS = {"cls": "cls_token", "mean": "mean_tokens", "max": "max_tokens"}


@dataclasses.dataclass(frozen=True, slots=True)
class Modules:
  """What modules.json describes."""

  transformer: CheckpointDirectory
  pooling: str
  normalize: bool
  max_tokens: int  # of an input, special tokens included; 0: not said
  notes: tuple[str, ...]


def read_modules(directory: CheckpointDirectory) -> Modules:
  """Returns the modules of a sentence-transformers directory.

  Raises:
    ValueError: there is a module or pooling that rag_jax does not have.
    FileNotFoundError: a file is missing.
  """
  modules = directory.json(MODULES, default=[])
  kinds = [_kind(directory, module) for module in modules]
  if kinds not in (
    ["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]
  ):  # fmt: skip
    raise ValueError(
      f"{directory.origin}/{MODULES} lists {', '.join(kinds) or 'nothing'};"
      " supported are Transformer, Pooling (cls, mean or max) and, after them,"
      " Normalize. Take another checkpoint."
    )
  transformer = directory.folder(modules[0]["path"])
  pooling = directory.folder(modules[1]["path"])
  lengths = transformer.json(_LENGTHS, default={})
  values = ConfigValues(lengths, f"{transformer.origin}/{_LENGTHS}")
  return Modules(
    transformer=transformer,
    pooling=_read_pooling(pooling),
    normalize=len(kinds) == 3,
    max_tokens=values.size("max_seq_length", 0, least=0),
    notes=tuple(_notes(directory, values, normalize=len(kinds) == 3)),
  )


def _kind(directory: CheckpointDirectory, module: Any) -> str:
  if not isinstance(module, Mapping) or not all(
    isinstance(module.get(key), str) for key in ("type", "path")
  ):
    raise ValueError(
      f"{directory.origin}/{MODULES} lists {module!r}; expected an object with"
      " type and path. The file was edited; copy it again."
    )
  return module["type"].rpartition(".")[2]


def _read_pooling(directory: CheckpointDirectory) -> str:
  config = directory.json("config.json")
  modes = [
    mode.removeprefix("pooling_mode_")
    for mode, on in config.items()
    if mode.startswith("pooling_mode_") and on is True
  ]
  newer = config.get("pooling_mode")
  if isinstance(newer, str):
    modes = [_POOLINGS.get(newer, newer)]
  for ours, theirs in _POOLINGS.items():
    if modes == [theirs]:
      return ours
  raise ValueError(
    f"{directory.origin}/config.json asks for the pooling"
    f" {' and '.join(modes) or 'of nothing'}; supported is one of"
    f" {', '.join(_POOLINGS.values())}. Take another checkpoint."
  )


def _notes(
  directory: CheckpointDirectory, lengths: ConfigValues, normalize: bool
) -> list[str]:
  notes = []
  settings = directory.json(_SETTINGS, default={})
  prompts = settings.get("prompts")
  if isinstance(prompts, dict) and any(prompts.values()):
    notes.append(
      f"sentence-transformers puts prompts before its texts, rag_jax does not:"
      f" {json.dumps(prompts)}"
    )
  if settings.get("similarity_fn_name") == "cosine" and not normalize:
    notes.append(
      "made for cosine similarity, but without a Normalize module: scores here"
      " are inner products; set encoder.normalize=True for cosines"
    )
  if lengths.flag("do_lower_case", False):
    notes.append(
      "sentence-transformers lower-cases its texts, rag_jax does not"
    )
  return notes


def check_modules(e: EncoderConfig) -> None:
  """Raises `ValueError` if there is no module for the encoder's fields."""
  if e.pooling not in _POOLINGS or e.projection_dim:
    raise ValueError(
      "sentence-transformers has no module for an encoder with"
      f" encoder.pooling={e.pooling!r},"
      f" encoder.projection_dim={e.projection_dim}; expected pooling"
      f" {', '.join(_POOLINGS)} and projection_dim 0. Choose kind"
      " 'dpr_question' for a projection of the first state."
    )


def write_modules(
  path: pathlib.Path, e: EncoderConfig, max_tokens: int
) -> None:
  """Writes what makes a directory with BERT one of sentence-transformers.

  Call `check_modules` before.
  """
  kinds = [("", "Transformer"), (_POOLING, "Pooling")]
  if e.normalize:
    kinds.append(("2_Normalize", "Normalize"))
  for folder, _ in kinds:
    (path / folder).mkdir(exist_ok=True)
  pooling: dict[str, Any] = {"word_embedding_dimension": e.embed_dim}
  for ours, theirs in _POOLINGS.items():
    pooling[f"pooling_mode_{theirs}"] = ours == e.pooling
  for theirs in ("mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken"):
    pooling[f"pooling_mode_{theirs}"] = False
  pooling["include_prompt"] = True
  files = {
    f"{_POOLING}/config.json": pooling,
    _LENGTHS: {
      "max_seq_length": max_tokens or e.max_positions,
      "do_lower_case": False,
    },
    _SETTINGS: {
      "prompts": {},
      "default_prompt_name": None,
      "similarity_fn_name": "dot",
    },
    MODULES: [
      {"idx": i, "name": str(i), "path": folder, "type": _TYPE + kind}
      for i, (folder, kind) in enumerate(kinds)
    ],
  }
  for name, content in files.items():
    artifacts.write_atomically(
      path / name, json.dumps(content, indent=2) + "\n"
    )
