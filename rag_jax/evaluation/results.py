"""Ends a run: the best parameters, their index, the measured results.

In: the checkpoints of a run that has trained. Out, in the workdir: `model`,
`index`, `results.json` and `learning_curves.png`.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any

from absl import logging
import jax
from jaxtyping import PyTree

from rag_jax.artifacts import fingerprint_lines
from rag_jax.artifacts import manifest_digest
from rag_jax.config_json import settings_of
from rag_jax.data.experiment import Experiment
from rag_jax.data.questions import Question
from rag_jax.evaluation.evaluate import Evaluator
from rag_jax.evaluation.plots import learning_curves
from rag_jax.evaluation.report import CERTIFICATE
from rag_jax.evaluation.report import FINGERPRINTS
from rag_jax.evaluation.report import write_results
from rag_jax.models.hybrid import learned_weights
from rag_jax.models.lora import merged
from rag_jax.models.lora import without_adapters
from rag_jax.processes import is_first
from rag_jax.processes import wait_for_all
from rag_jax.retrieval.certify import check_min_recall
from rag_jax.retrieval.index import Index
from rag_jax.retrieval.index import load_index
from rag_jax.retrieval.retriever import RetrieverSnapshots
from rag_jax.retrieval.shared_embedding import remove_shared
from rag_jax.training.checkpoint import Checkpointer
from rag_jax.training.clock import Clock
from rag_jax.training.metrics import peak_memory_bytes
from rag_jax.training.search_in_step import abstract_index
from rag_jax.training.stages import TRAIN
from rag_jax.training.stages import stage_optimizer
from rag_jax.training.state import abstract_state
from rag_jax.training.state import free
from rag_jax.training.state import init_params
from rag_jax.training.state import make_state
from rag_jax.training.workdir import Workdir
from rag_jax.weights.model_files import save_model


def finish(
  experiment: Experiment,
  workdir: Workdir,
  questions: Sequence[Question],
  evaluator: Evaluator,
  clock: Clock,
  validation: Sequence[Question] = (),
) -> dict[str, Any]:
  """Writes model, index, results and curves; returns the results.

  Args:
    experiment: of the run.
    workdir: of the run, with its checkpoints.
    questions: of the test split.
    evaluator: measures the answers to them.
    clock: how long the run trained.
    validation: questions that passages answer. The scores of their best
      passages are kept with the model, to recognise later a question that no
      passage answers.

  Raises:
    ValueError: no checkpoint is whole, or the index finds less than
      index.min_recall.
  """
  config = experiment.config
  params, step = _best_params(experiment, workdir)
  index = _final_index(experiment, workdir, params, evaluator, questions)
  save_model(
    workdir.model,
    params,
    {
      "step": step,
      "tokenizer": experiment.token_ids,
      # Serving checks that the config is the one of the training.
      "config": settings_of(config),
      "tokenizer_manifest": manifest_digest(workdir.tokenizer),
      "least_score": evaluator.least_score(params, index, validation),
    },
  )
  with experiment.context.counting() as cut:
    results: dict[str, Any] = evaluator.evaluate(
      params, index, questions, "test"
    )
  num_questions = config.train.num_steps * config.train.batch_size
  if index is not None and index.certificate is not None:
    results[CERTIFICATE] = index.certificate.to_content()
  results |= {
    "seed": config.seed,
    "step": step,
    "train/seconds": clock.train_secs,
    # Without a step there is no time, and no speed.
    "train/questions_per_second": (
      num_questions / clock.question_secs if num_questions else 0.0
    ),
    "train/peak_memory_bytes": peak_memory_bytes(),
    "num_parameters": sum(x.size for x in jax.tree.leaves(params)),
    "num_passages": len(experiment.passages),
    FINGERPRINTS: {
      "passages": experiment.passages.fingerprint,
      "questions": fingerprint_lines(map(repr, questions)),
    },
    "n_docs": config.data.n_docs,
    # In training, of all processes and attempts, and in the test.
    "cut": {
      name: clock.cut.get(name, 0) + number for name, number in cut.items()
    }
    | {"passages_cut": experiment.tokenized.num_cut},
  }
  weights = learned_weights(params)
  if weights is not None:
    results["hybrid_dense"] = float(weights.dense)
    results["hybrid_bm25"] = float(weights.bm25)
  if jax.process_index() == 0:
    write_results(workdir.path, results)
    learning_curves(
      workdir.metrics,
      workdir.path / "learning_curves.png",
      str(workdir.path.name),
      n_docs=config.data.n_docs,
    )
  return results


def _best_params(
  experiment: Experiment, workdir: Workdir
) -> tuple[PyTree, int]:
  """Returns the parameters that validated best, merged, and their step."""
  config = experiment.config
  params, layout = init_params(
    experiment.init, jax.random.key(config.seed), experiment.mesh
  )
  checkpoints = Checkpointer(
    workdir.checkpoints,
    keep_last=config.train.keep_checkpoints,
    process_index=jax.process_index(),
  )
  step = checkpoints.best_whole()
  assert step is not None, "a run that has trained has a checkpoint"
  # If the main stage has no steps, it may be the last of an earlier stage.
  stage = TRAIN
  if not config.train.num_steps:
    stage = checkpoints.read_extra(step)["stage"]
  optimizer = stage_optimizer(config, stage, params)
  state, state_layout = make_state(params, layout, optimizer, experiment.mesh)
  abstract = abstract_state(state, state_layout)
  if stage == TRAIN:
    abstract = dataclasses.replace(
      abstract, index=abstract_index(experiment, params)
    )
  free(state)
  state, _ = checkpoints.restore(abstract, step)
  logging.info("The best checkpoint is the one of step %d.", step)
  if not config.lora.rank:
    return state.params, step
  merge = jax.jit(merged, out_shardings=without_adapters(layout))
  return merge(state.params), step


def _final_index(
  experiment: Experiment,
  workdir: Workdir,
  params: PyTree,
  evaluator: Evaluator,
  questions: Sequence[Question],
) -> Index | None:
  """Returns the index of `params`, certified; saved, if it was built here.

  Raises:
    ValueError: it finds less than index.min_recall.
  """
  config = experiment.config
  if experiment.closed_book:
    return None
  if config.index.path:
    index = load_index(config.index.path, spread=True)
    index.connect()
  else:
    retriever = RetrieverSnapshots(experiment.mesh).take(params)
    index = experiment.index_builder.build(
      retriever, directory=workdir.indexes, devices=jax.local_devices()
    )
    wait_for_all("the passages are embedded")
    if is_first():
      remove_shared(workdir.indexes)
  if not config.index.path or index.certificate is None:
    index.certificate = evaluator.certify(params, index, questions)
  if not config.index.path and (is_first() or index.is_spread):
    index.save(workdir.index)
  check_min_recall(index, config.index.min_recall, config.data.n_docs)
  return index
