"""How a checkpoint wants to generate: generation_config.json.

In: a checkpoint's directory. Out: its settings, by Hugging Face's names; from
config.json where a checkpoint is older than that file. And: the settings of a
run that may have started from one.
"""

from collections.abc import Mapping
import json
import pathlib
from typing import Any

from rag_jax import artifacts
from rag_jax.config import Config
from rag_jax.weights.config_fields import GENERATION_REFUSED
from rag_jax.weights.config_values import SpecialIds
from rag_jax.weights.directory import CheckpointDirectory

GENERATION_CONFIG = "generation_config.json"

# Those that a config.json of version 3 or 4 may hold, beside those that are
# refused.
GENERATION_NAMES = (
  "bad_words_ids", "bos_token_id", "decoder_start_token_id", "do_sample",
  "early_stopping", "eos_token_id", "force_bos_token_to_be_generated",
  "forced_bos_token_id", "forced_eos_token_id", "length_penalty", "max_length",
  "max_new_tokens", "min_length", "min_new_tokens", "no_repeat_ngram_size",
  "num_beams", "num_return_sequences", "pad_token_id", "repetition_penalty",
  "temperature", "top_k", "top_p",
)  # fmt: skip
# A setting that is one of these counts as not given: version 4 wrote them all,
# for RAG at both levels.
_DEFAULTS = {
  "do_sample": False, "early_stopping": False, "length_penalty": 1.0,
  "max_length": 20, "min_length": 0, "no_repeat_ngram_size": 0, "num_beams": 1,
  "num_return_sequences": 1, "repetition_penalty": 1.0, "temperature": 1.0,
  "top_k": 50, "top_p": 1.0,
}  # fmt: skip
_BOOKKEEPING = ("_from_model_config", "transformers_version")


def read_generation(
  directory: CheckpointDirectory, *configs: Mapping[str, Any]
) -> dict[str, Any]:
  """Returns the settings that are given, without those that are null.

  Args:
    directory: of the checkpoint.
    configs: where they stood before there was a generation_config.json; the
      first that gives another than the default counts.
  """
  if directory.has(GENERATION_CONFIG):
    configs = (directory.json(GENERATION_CONFIG),)
    names = [name for name in configs[0] if name not in _BOOKKEEPING]
  else:
    names = [*GENERATION_NAMES, *_active(*configs)]
  settings = {}
  for name in names:
    given = [c[name] for c in configs if c.get(name) is not None]
    unusual = [x for x in given if x != _DEFAULTS.get(name)]
    if given:
      settings[name] = (unusual or given)[0]
  return settings


def _active(*configs: Mapping[str, Any]) -> list[str]:
  """Returns the settings that ask for what the search here does not do."""
  return [
    name
    for name, inactive in GENERATION_REFUSED.items()
    if any(c.get(name) is not None and c[name] not in inactive for c in configs)
  ]


def typed_settings(
  settings: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Returns what `DecodingConfig` has fields for, and the rest."""
  rest = {k: v for k, v in settings.items() if v is not None}
  typed = {
    name: rest.pop(name)
    for name in ("num_beams", "length_penalty", "no_repeat_ngram_size")
    if name in rest
  }
  # Of both, the number of new tokens wins; the other counts the start token.
  new_tokens = rest.pop("min_new_tokens", None)
  length = rest.pop("min_length", None)
  if new_tokens is not None:
    typed["min_new_tokens"] = new_tokens
  elif isinstance(length, int):
    typed["min_new_tokens"] = max(length - 1, 0)
  return typed, rest


def settings_of(config: Config) -> dict[str, Any]:
  """Returns how a run answers, by Hugging Face's names.

  Token ids are included only if its checkpoint gave them.
  """
  settings: dict[str, Any] = json.loads(
    config.decoding.generation_config or "{}"
  )
  if not any(settings.get(k) for k in ("max_length", "max_new_tokens")):
    settings["max_new_tokens"] = config.data.target_length
  for name in (
    "num_beams", "length_penalty", "no_repeat_ngram_size", "min_new_tokens"
  ):  # fmt: skip
    settings[name] = getattr(config.decoding, name)
  return settings


def exported_settings(config: Config) -> dict[str, Any]:
  """Returns how a run answers, for its generation_config.json."""
  settings = settings_of(config)
  settings.pop("do_deduplication", None)  # of RAG's config.json
  settings.setdefault("do_sample", False)
  if "max_new_tokens" in settings:  # as older versions say it
    settings["max_length"] = settings.pop("max_new_tokens") + 1
  idle = {"length_penalty": 1.0, "no_repeat_ngram_size": 0, "min_new_tokens": 0}
  return {k: v for k, v in settings.items() if v != idle.get(k)}


def target_start(config: Config) -> tuple[int, ...]:
  """Returns what answers are forced to begin with: BART's <s>, or nothing.

  Targets begin with it too, or the model would never learn what follows it.
  """
  settings = settings_of(config)
  forced = settings.get("forced_bos_token_id")
  if forced is None and settings.get("force_bos_token_to_be_generated"):
    forced = settings.get("bos_token_id")  # how BART's older files said it
  return () if forced is None else (forced,)


def write_generation(
  path: pathlib.Path,
  settings: Mapping[str, Any],
  special_ids: SpecialIds,
  decoder_start_id: int | None = None,
) -> None:
  """Writes generation_config.json to directory `path`.

  Args:
    path: the directory.
    settings: they take precedence over the ids.
    special_ids: of the tokenizer.
    decoder_start_id: -1: the end token; None: there is no decoder beside.
  """
  ids = special_ids.to_config()
  if decoder_start_id is not None:
    start = special_ids.eos if decoder_start_id < 0 else decoder_start_id
    ids["decoder_start_token_id"] = None if start < 0 else start
  content = {k: v for k, v in ids.items() if v is not None} | dict(settings)
  artifacts.write_atomically(
    path / GENERATION_CONFIG,
    json.dumps(content, indent=2, sort_keys=True) + "\n",
  )
