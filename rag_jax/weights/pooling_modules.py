"""A sentence-transformers directory: an encoder, a pooling, maybe more.

In: modules.json and what it names: after the pooling a dense layer and a
normalisation, and prompts. Out: where the encoder lies, and the fields that say
how its states become one embedding; and back.
"""

from collections.abc import Mapping
import dataclasses
import json
import pathlib
from typing import Any

from jaxtyping import PyTree

from rag_jax import artifacts
from rag_jax.config_models import EncoderConfig
from rag_jax.weights.config_values import ConfigValues
from rag_jax.weights.directory import CheckpointDirectory
from rag_jax.weights.encoder_tensors import dense
from rag_jax.weights.mapping import Architecture
from rag_jax.weights.mapping import put
from rag_jax.weights.tensors import write_tensors

MODULES = "modules.json"

_LENGTHS = "sentence_bert_config.json"
_SETTINGS = "config_sentence_transformers.json"
_POOLING = "1_Pooling"
_DENSE = "2_Dense"
_TYPE = "sentence_transformers.models."
# Ours by theirs; the three others that exist are not supported.
_POOLINGS = {"cls": "cls_token", "mean": "mean_tokens", "max": "max_tokens"}


_KINDS = ("Transformer", "Pooling", "Dense", "Normalize")
# Ours -> theirs, of the dense layer.
_ACTIVATIONS = {
  "none": "torch.nn.modules.linear.Identity",
  "tanh": "torch.nn.modules.activation.Tanh",
  "relu": "torch.nn.modules.activation.ReLU",
  "gelu": "torch.nn.modules.activation.GELU",
  "silu": "torch.nn.modules.activation.SiLU",
}
# What sentence-transformers looks for, for a passage.
_PASSAGE_PROMPTS = ("document", "passage", "corpus")


@dataclasses.dataclass(frozen=True, slots=True)
class Modules:
  """What modules.json describes.

  Attributes:
    transformer: where the encoder is.
    fields: of `EncoderConfig`, that the modules after it decide.
    dense: where the dense layer is; None: there is none.
    max_tokens: of an input, special tokens included; 0: not said.
    notes: for the report.
  """

  transformer: CheckpointDirectory
  fields: dict[str, Any]
  dense: CheckpointDirectory | None
  max_tokens: int
  notes: tuple[str, ...]


def read_modules(directory: CheckpointDirectory) -> Modules:
  """Returns the modules of a sentence-transformers directory.

  Raises:
    ValueError: there is a module or pooling that rag_jax does not have.
    FileNotFoundError: a file is missing.
  """
  modules = directory.json(MODULES, default=[])
  kinds = [_kind(directory, module) for module in modules]
  # The first two, and of the others each at most once, in this order.
  if kinds[:2] != [*_KINDS[:2]] or kinds != [k for k in _KINDS if k in kinds]:
    raise ValueError(
      f"{directory.origin}/{MODULES} lists {', '.join(kinds) or 'nothing'};"
      " supported are Transformer, Pooling (cls, mean or max) and, after them,"
      " one Dense and Normalize, or one of these. Take another checkpoint."
    )
  folders = dict(zip(kinds, (m["path"] for m in modules), strict=True))
  transformer = directory.folder(folders["Transformer"])
  pooling = directory.folder(folders["Pooling"])
  lengths = transformer.json(_LENGTHS, default={})
  values = ConfigValues(lengths, f"{transformer.origin}/{_LENGTHS}")
  settings = ConfigValues(
    directory.json(_SETTINGS, default={}), f"{directory.origin}/{_SETTINGS}"
  )
  fields = {
    "pooling": _read_pooling(pooling),
    "normalize": "Normalize" in kinds,
    **_read_prompts(settings),
  }
  if fields["question_prompt"] or fields["passage_prompt"]:
    _pooling_values(pooling).refuse(include_prompt=True)
  dense = None
  if "Dense" in kinds:
    dense = directory.folder(folders["Dense"])
    fields |= _read_dense(dense)
  return Modules(
    transformer=transformer,
    fields=fields,
    dense=dense,
    max_tokens=values.size("max_seq_length", 0, least=0),
    notes=tuple(_notes(settings, values, normalize=fields["normalize"])),
  )


def dense_layer(e: EncoderConfig) -> Architecture:
  """Returns the tensors of the module Dense."""
  sizes = (e.embed_dim,), (e.projection_dim,)
  rules = dense("projection", "linear", *sizes, e.projection_bias)
  return Architecture("Dense", tuple(rules))


def _read_dense(directory: CheckpointDirectory) -> dict[str, Any]:
  """Returns the fields of a dense layer."""
  values = ConfigValues(
    directory.json("config.json"), f"{directory.origin}/config.json"
  )
  values.refuse(
    use_residual=False,
    module_input_name="sentence_embedding",
    module_output_name="sentence_embedding",
  )
  theirs = values.text("activation_function", _ACTIVATIONS["tanh"])
  ours = {name: ours for ours, name in _ACTIVATIONS.items()}
  if theirs not in ours:
    raise ValueError(
      f"{values.origin} says activation_function={theirs!r}; expected one of"
      f" {', '.join(ours)}. rag_jax has no other: take another checkpoint."
    )
  return {
    "projection_dim": values.size("out_features", 0),
    "projection_bias": values.flag("bias", True),
    "projection_activation": ours[theirs],
  }


def _read_prompts(settings: ConfigValues) -> dict[str, Any]:
  """Returns the fields of config_sentence_transformers.json.

  As `encode_query` and `encode_document` of sentence-transformers choose their
  prompts.
  """
  prompts = settings.part("prompts")
  default = ""
  if settings.has("default_prompt_name"):
    name = settings.text("default_prompt_name", "")
    if not prompts.has(name):
      raise ValueError(
        f"{settings.origin} says default_prompt_name={name!r}; expected one of"
        f" its prompts, {sorted(prompts.values)}. The file was edited; copy it"
        " again."
      )
    default = prompts.text(name, "")
  passage = next(filter(prompts.has, _PASSAGE_PROMPTS), "")
  return {
    "question_prompt": prompts.text("query", default),
    "passage_prompt": prompts.text(passage, default),
    "truncate_dim": settings.size("truncate_dim", 0, least=0),
  }


def _kind(directory: CheckpointDirectory, module: Any) -> str:
  if not isinstance(module, Mapping) or not all(
    isinstance(module.get(key), str) for key in ("type", "path")
  ):
    raise ValueError(
      f"{directory.origin}/{MODULES} lists {module!r}; expected an object with"
      " type and path. The file was edited; copy it again."
    )
  return module["type"].rpartition(".")[2]


def _pooling_values(directory: CheckpointDirectory) -> ConfigValues:
  return ConfigValues(
    directory.json("config.json"), f"{directory.origin}/config.json"
  )


def _read_pooling(directory: CheckpointDirectory) -> str:
  config = _pooling_values(directory).values
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
  settings: ConfigValues, lengths: ConfigValues, normalize: bool
) -> list[str]:
  notes = []
  if settings.values.get("similarity_fn_name") == "cosine" and not normalize:
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
  if e.pooling not in _POOLINGS or e.truncate_dim:
    raise ValueError(
      "sentence-transformers has no module for an encoder with"
      f" encoder.pooling={e.pooling!r}, encoder.truncate_dim={e.truncate_dim};"
      f" expected pooling {', '.join(_POOLINGS)} and truncate_dim 0. Choose"
      " kind 'dpr_question', or train an encoder with these fields."
    )


def write_modules(
  path: pathlib.Path, e: EncoderConfig, max_tokens: int, params: PyTree
) -> None:
  """Writes what makes a directory with an encoder one of sentence-transformers.

  Call `check_modules` before.

  Args:
    path: of the directory.
    e: fields of the encoder.
    max_tokens: of an input; 0: as many as there are positions, or no limit.
    params: {"projection": ...}, or {} if the encoder has none.
  """
  kinds = [("", "Transformer"), (_POOLING, "Pooling")]
  if e.projection_dim:
    kinds.append((_DENSE, "Dense"))
  if e.normalize:
    kinds.append((f"{len(kinds)}_Normalize", "Normalize"))
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
      "max_seq_length": max_tokens or e.max_positions or None,
      "do_lower_case": False,
    },
    _SETTINGS: {
      "prompts": {
        name: prompt
        for name, prompt in (
          ("query", e.question_prompt),
          ("document", e.passage_prompt),
        )
        if prompt
      },
      "default_prompt_name": None,
      "similarity_fn_name": "dot",
    },
    MODULES: [
      {"idx": i, "name": str(i), "path": folder, "type": _TYPE + kind}
      for i, (folder, kind) in enumerate(kinds)
    ],
  }
  if e.projection_dim:
    files[f"{_DENSE}/config.json"] = {
      "in_features": e.embed_dim,
      "out_features": e.projection_dim,
      "bias": e.projection_bias,
      "activation_function": _ACTIVATIONS[e.projection_activation],
    }
    write_tensors(path / _DENSE, put(params, dense_layer(e)))
  for name, content in files.items():
    artifacts.write_atomically(
      path / name, json.dumps(content, indent=2) + "\n"
    )
