r"""How noisy is the gradient that the retriever learns from?

  python tools/gradient_variance.py --workdir=runs/quickstart

For each way to learn, the gradient of a run's retriever is computed on batches
of the training questions, several times each. The table has the squared norm of
the mean gradient, without what noise adds to it; the variance within a batch,
summed over the parameters, which comes from what is drawn at random inside the
step; the whole variance, over batches too; and the seconds of a gradient, the
least of all after compilation. The losses "reward" and "reward_sampled" have
the same expected gradient. The run's parameters do not change; what a setting
of the run freezes counts as if it trained.
"""

import dataclasses
import time
from typing import Any

from absl import flags
import jax
import jax.flatten_util
from jaxtyping import Float
import numpy as np

from rag_jax.commands import command
from rag_jax.config import Config
from rag_jax.config_rules import validate
from rag_jax.data.pipeline import QuestionBatches
from rag_jax.data.questions import load_questions
from rag_jax.progress import Progress
from rag_jax.serving.pipeline import RagPipeline
from rag_jax.training.stages import main_loss
from rag_jax.training.stages import special_ids

_WORKDIR = flags.DEFINE_string("workdir", None, "Run that has ended.")
_BATCHES = flags.DEFINE_integer("batches", 16, "Batches of questions.", 2)
_DRAWS = flags.DEFINE_integer("draws", 8, "Gradients of each batch.", 2)
_SIZE = flags.DEFINE_integer("batch_size", 0, "Questions; 0: as in the run.", 0)
_REWARD = flags.DEFINE_enum("reward", "em", ["em", "f1"], "Of an answer.")
_LOSSES = flags.DEFINE_list(
  "retriever_losses", ["marginal", "reward", "reward_sampled"], "To compare."
)
flags.mark_flag_as_required("workdir")


def _gradients(
  pipeline: RagPipeline, config: Config, progress: Progress
) -> tuple[Float[np.ndarray, "S D R"], float]:
  """Returns S batches' D gradients of the retriever, and seconds of one."""
  experiment = pipeline.experiment
  loss_fn = main_loss(config, experiment.model, special_ids(experiment.context))
  generator = pipeline.params["generator"]

  @jax.jit
  def gradient(retriever: Any, batch: Any, key: Any) -> Any:
    grads, _ = jax.grad(
      lambda part: loss_fn({**part, "generator": generator}, batch, key),
      has_aux=True,
    )(retriever)
    return jax.flatten_util.ravel_pytree(grads)[0]

  retriever = {k: v for k, v in pipeline.params.items() if k != "generator"}
  batches = QuestionBatches(
    load_questions(config.data.questions, "train"),
    experiment.context,
    experiment.embedder,
    config,
    bm25=experiment.bm25,
  )
  found, seconds = [], []
  for step in range(_BATCHES.value):
    batch = batches.prepare(step, pipeline.params, pipeline.index).batch
    of_batch = []
    for draw in range(_DRAWS.value):
      key = jax.random.fold_in(
        jax.random.key(config.seed), step * _DRAWS.value + draw
      )
      start = time.perf_counter()
      of_batch.append(np.asarray(gradient(retriever, batch, key), np.float64))
      seconds.append(time.perf_counter() - start)
      progress.update()
    found.append(of_batch)
  return np.array(found), min(seconds)


def main(argv: list[str]) -> None:
  """Runs the command."""
  pipeline = RagPipeline.load(_WORKDIR.value or "")
  config = pipeline.experiment.config
  config.train.batch_size = _SIZE.value or config.train.batch_size
  config.train.accumulate = 1
  config.train.num_steps = max(config.train.num_steps, 1)
  kinds = [
    validate(
      dataclasses.replace(config, retriever_loss=kind, reward=_REWARD.value)
    )
    for kind in _LOSSES.value or []
  ]
  lines = [
    "| retriever_loss | mean, squared | variance in a batch | in all | secs |",
    "|---|---|---|---|---|",
  ]
  total = len(kinds) * _BATCHES.value * _DRAWS.value
  with Progress("Computed", total, "gradients") as progress:
    for kind in kinds:
      found, seconds = _gradients(pipeline, kind, progress)
      mean = found.mean(axis=(0, 1))
      within = found.var(axis=1, ddof=1).mean(axis=0).sum()
      # Noise lengthens the mean too: what it adds is taken off.
      between = found.mean(axis=1).var(axis=0, ddof=1).sum()
      noise = between / len(found)
      # The means of batches vary by what is drawn, too.
      whole = between + within * (1 - 1 / found.shape[1])
      size = mean @ mean - noise
      lines.append(
        f"| {kind.retriever_loss} | {size:.2g} | {within:.2g} | {whole:.2g}"
        f" | {seconds:.3f} |"
      )
  print("\n".join(lines))


if __name__ == "__main__":
  command.run(main)
