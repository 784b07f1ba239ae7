"""Retrieval-augmented generation in JAX: p(y|x) = sum_z p(z|x) p(y|x,z)."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from rag_jax.api.checkpoints import export as export
  from rag_jax.api.checkpoints import import_checkpoint as import_checkpoint
  from rag_jax.api.checkpoints import load_checkpoint as load_checkpoint
  from rag_jax.api.configs import load_config as load_config
  from rag_jax.api.runs import evaluate as evaluate
  from rag_jax.api.runs import train as train
  from rag_jax.api.search_directory import SearchDirectory as SearchDirectory
  from rag_jax.config import Config as Config
  from rag_jax.data.questions import Question as Question
  from rag_jax.decoding.rag import RagDecoder as RagDecoder
  from rag_jax.decoding.settings import GenerationSettings as GenerationSettings
  from rag_jax.search.build import BuildConfig as BuildConfig
  from rag_jax.serving.pipeline import RagPipeline as RagPipeline

__version__ = "0.1.0"

# Imported when a name is first used: jax and transformers take seconds.
_HOMES = {
  "BuildConfig": "rag_jax.search.build",
  "Config": "rag_jax.config",
  "GenerationSettings": "rag_jax.decoding.settings",
  "Question": "rag_jax.data.questions",
  "RagDecoder": "rag_jax.decoding.rag",
  "RagPipeline": "rag_jax.serving.pipeline",
  "SearchDirectory": "rag_jax.api.search_directory",
  "evaluate": "rag_jax.api.runs",
  "export": "rag_jax.api.checkpoints",
  "import_checkpoint": "rag_jax.api.checkpoints",
  "load_checkpoint": "rag_jax.api.checkpoints",
  "load_config": "rag_jax.api.configs",
  "train": "rag_jax.api.runs",
}


def __getattr__(name: str) -> Any:
  """Returns a public function or class, and keeps it."""
  if name not in _HOMES:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  value = getattr(importlib.import_module(_HOMES[name]), name)
  globals()[name] = value
  return value


def __dir__() -> list[str]:
  return sorted({*globals(), *_HOMES})
