"""Retrieval-augmented generation in JAX: p(y|x) = sum_z p(z|x) p(y|x,z).

This is what the commands do (`rag-jax --help` lists them), from Python. Each
name has a docstring with its arguments and errors.

Documents become a directory that can be searched. `BuildConfig` says how they
are split, embedded and indexed. Update the directory when documents change:

  import rag_jax

  directory = rag_jax.SearchDirectory.build(
    "documents/",
    "hf:sentence-transformers/all-MiniLM-L6-v2",
    "runs/documents",
    rag_jax.BuildConfig(storage="bfloat16"),
  )
  report = directory.update(upsert="documents/", delete=["house.md"])
  print(report.text())

  directory = rag_jax.SearchDirectory.open("runs/documents")
  hits = directory.search("when does the contract end?", mode="hybrid")[0]
  for hit in hits:
    print(hit.score, hit.passage.title, hit.passage.text)

A cross-encoder chooses from the candidates of a search:

  reranker = rag_jax.Reranker.open("hf:cross-encoder/ms-marco-MiniLM-L6-v2")
  hits = directory.search("who can leave?", n_docs=2, reranker=reranker)[0]

A run trains retriever and generator together and measures the result. Every
setting is a field of its `Config`. The same call again continues a run that was
interrupted:

  config = rag_jax.load_config("configs/quickstart.py")
  config.seed = 1
  config.generator.pointer = False  # which transformers does not have
  results = rag_jax.train(config, "runs/quickstart")
  print(results["test/exact_match"])

A pipeline answers with what a run has trained, or with a RAG checkpoint of
transformers:

  pipeline = rag_jax.RagPipeline.load("runs/quickstart")
  answer = pipeline.answer("What is the capital of France?")[0]
  print(answer.text, answer.log_prob, answer.docs[0].title)
  print(rag_jax.evaluate(pipeline, "questions.jsonl")["test/exact_match"])

  rag_jax.export("runs/quickstart", "exports/quickstart")
  print(rag_jax.load_checkpoint("exports/quickstart").report)
  pipeline = rag_jax.RagPipeline.from_checkpoint(
    "exports/quickstart",
    "documents/",
    mode="rag_sequence",
    generation={"num_beams": 4, "max_new_tokens": 20},
  )

`RagDecoder` is one way to decode any generator, with the settings of
transformers and their meaning:

  experiment = pipeline.experiment
  settings = rag_jax.GenerationSettings(
    num_beams=4,
    max_new_tokens=20,
    eos_token_id=experiment.tokenizer.eos_id,
  )
  decoder = rag_jax.RagDecoder(
    experiment.model.generator, settings, "rag_sequence_fast"
  )
  pipeline = rag_jax.RagPipeline(
    experiment, pipeline.params, pipeline.index, decoder
  )
  print(pipeline.answer("What is the capital of France?")[0].text)
"""

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
  from rag_jax.search.reranker import Reranker as Reranker
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
  "Reranker": "rag_jax.search.reranker",
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
