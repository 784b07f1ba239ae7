"""Whatever happens to a workdir, nothing else is served than was trained."""

from damage import attack
import numpy as np

from rag_jax.evaluation.report import read_results
from rag_jax.evaluation.report import write_results
from rag_jax.retrieval.retriever import fingerprint
from rag_jax.serving.pipeline import RagPipeline


def served(path):
  """Returns all that decides an answer or a number; nothing is compiled."""
  pipeline = RagPipeline.load(path)
  experiment = pipeline.experiment
  index = pipeline.index
  vectors = np.random.default_rng(0).normal(size=(2, index.embedding_dim))
  return (
    experiment.config,
    fingerprint(pipeline.params),
    experiment.token_ids,
    experiment.tokenizer.decode_hf(range(5, 60)),
    [np.array(x).tolist() for x in index.search(vectors.astype("f4"), 5)],
    read_results(path / "results.json"),
  )


def test_nothing_is_served_that_was_not_written(run, tmp_path):
  write_results(run, {"test/exact_match": 0.5, "step": 3})
  (tmp_path / "attack").mkdir()
  refused, whole = attack(run, tmp_path / "attack", served, most=60)
  # White space, and more files beside those of the run, change nothing.
  assert refused > 2 * whole
