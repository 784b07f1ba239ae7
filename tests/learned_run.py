"""A small run whose model can read, for tests that need right answers.

It is trained on the passages of world_facts about the capital and the continent
of a country, and on the questions about these. Tests ask it for the capitals of
countries that no training question is about.
"""

import dataclasses
import json
import pathlib
from typing import Any

import jax

from rag_jax.api.runs import train
from rag_jax.config import Config
from rag_jax.corpus.documents import BUNDLED
from rag_jax.data.questions import SPLITS


@dataclasses.dataclass(frozen=True)
class LearnedRun:
  """A finished run and its corpus."""

  workdir: pathlib.Path
  passages: pathlib.Path
  results: dict[str, Any]  # of the held-out test questions

  def records(self) -> list[dict[str, str]]:
    """Returns the passages as they stand in the file."""
    return [json.loads(line) for line in self.passages.read_text().splitlines()]


def make_config(root: pathlib.Path, seed: int = 0) -> Config:
  """Returns the quickstart's recipe, narrower, in a few seconds."""
  c = Config()
  c.seed = seed
  c.data.passages = str(root / "passages.jsonl")
  c.data.questions = str(root)
  c.data.n_docs = 2
  c.data.question_length = 32
  c.data.passage_length = 60
  c.data.context_length = 80
  c.data.target_length = 16
  c.data.substitute_answers = 0.5
  # Small, so that unseen names consist of pieces that training has seen.
  c.tokenizer.vocab_size = 600
  c.encoder.embed_dim = 64
  c.encoder.num_heads = 2
  c.encoder.projection_dim = 64
  c.encoder.normalize = True
  c.encoder.score_scale = 10.0
  c.encoder.learn_score_scale = True
  c.generator.num_layers = 1
  c.generator.embed_dim = 64
  c.generator.num_heads = 2
  c.generator.mlp_dim = 128
  c.generator.norm = "pre"
  c.generator.embedding_norm = False
  c.generator.position_offset = 0
  c.generator.max_positions = 80
  c.generator.position_init = "sinusoid"
  c.generator.relative_buckets = 32
  c.generator.init = "copy"
  c.generator.pointer = True  # goes on where it copied
  c.optimizer.peak_lr = 4e-3
  c.optimizer.retriever_lr = 2e-3
  c.optimizer.warmup_steps = 20
  c.optimizer.schedule = "cosine"
  c.optimizer.b2 = 0.98
  c.optimizer.weight_decay = 0.01
  c.optimizer.clip_norm = 1.0
  c.index.kind = "exact"
  c.train.num_steps = 300
  c.train.batch_size = 16
  c.train.validate_steps = 0  # only at the end
  c.train.checkpoint_steps = 0
  c.eval.batch_size = 32
  c.eval.num_validation = 32
  return c


def open_run(root: pathlib.Path, seed: int = 0) -> LearnedRun:
  """Returns the run in `root`, which is trained if it is not there yet."""
  results = root / "run" / "results.json"
  if not results.exists():
    root.mkdir(exist_ok=True)
    write_corpus(root)
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)  # it runs long
    train(make_config(root, seed), root / "run")
    jax.config.update("jax_disable_most_optimizations", before)
  return LearnedRun(
    root / "run", root / "passages.jsonl", json.loads(results.read_text())
  )


def write_corpus(root: pathlib.Path) -> None:
  """Writes the passages and the three splits into `root`."""
  _copy(root, "passages", "id", ("/capital", "/region"))
  for split in SPLITS:
    _copy(root, split, "relation", ("capital", "continent"))


def _copy(
  root: pathlib.Path, name: str, field: str, ends: tuple[str, ...]
) -> None:
  """Copies the bundled records whose `field` ends in one of `ends`."""
  lines = (BUNDLED["world_facts"] / f"{name}.jsonl").read_text().splitlines()
  kept = [line for line in lines if json.loads(line)[field].endswith(ends)]
  (root / f"{name}.jsonl").write_text("\n".join(kept) + "\n")
