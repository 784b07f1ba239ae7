"""Trains a run from its config to its results, and evaluates models.

In: a config and a workdir; or a model and questions. Out: metrics; and a
workdir that `RagPipeline.load` opens.

This is the one place that knows data, training, decoding and evaluation.
"""

from collections.abc import Mapping, Sequence
import os
import pathlib
from typing import Any

from absl import logging
from etils import epath
import jax

from rag_jax.api.arguments import check_type
from rag_jax.api.arguments import path_of
from rag_jax.config import Config
from rag_jax.config_rules import validate
from rag_jax.data.experiment import open_experiment
from rag_jax.data.questions import SPLITS
from rag_jax.data.questions import Question
from rag_jax.data.questions import load_questions
from rag_jax.data.questions import read_questions
from rag_jax.decoding.answerer import Answerer
from rag_jax.evaluation.evaluate import Evaluator
from rag_jax.evaluation.evaluate import choose
from rag_jax.evaluation.results import finish
from rag_jax.search.reranker import open_reranker
from rag_jax.serving.pipeline import RagPipeline
from rag_jax.training import loop
from rag_jax.training.banner import banner
from rag_jax.training.workdir import open_workdir
from rag_jax.weights.init_from import load_initial

_WORKDIR = "a folder for what the run writes, for instance 'runs/first'"
_MODEL = (
  "a RagPipeline, or the workdir of a run that has ended, for instance"
  " 'runs/quickstart'"
)
_QUESTIONS = (
  "a file of questions with answers, a folder with a file per split, or a list"
  " of rag_jax.Question"
)


def train(
  config: Config,
  workdir: epath.PathLike,
  *,
  resume_from: int | None = None,
  overridden: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
  """Trains, or continues, the run in `workdir`; evaluates and saves the model.

  An interrupted run continues from its newest undamaged checkpoint, and ends
  with the same parameters. The model of a run that has ended is only evaluated
  again. On a pod, run `rag-jax train --distributed` on each host. From Python,
  call `rag_jax.pod.join` before, in a process on each host, with the same
  arguments for `train`.

  Args:
    config: of the experiment, a `Config`. It is not changed.
    workdir: the folder that gets checkpoints, metrics.jsonl, TensorBoard files,
      and at the end model, index, results.json and learning_curves.png.
    resume_from: step of a checkpoint to go back to, with other learning rates
      and the like. Later checkpoints are set aside.
    overridden: the values in the config file of settings that the user changed,
      by names like "optimizer.peak_lr". Other settings then count as defaults,
      which a checkpoint named in `init_from` can replace. None: all settings
      were chosen for these checkpoints.

  Returns:
    The content of results.json: "test/exact_match", "test/token_f1" and others,
    by name.

  Raises:
    StoppedEarlyError: SIGTERM or Ctrl-C asked to stop; everything is saved.
    FloatingPointError: the loss is not finite any more.
    FileNotFoundError: a file that the config names is not there.
    ValueError: a setting is not possible; a file cannot be used; the workdir is
      in use or of another experiment; or the index finds too little.
    TypeError: `config` is no `Config`.
  """
  path = path_of("workdir", workdir, _WORKDIR)
  if resume_from is not None:
    check_type("resume_from", resume_from, int, "the step of a checkpoint")
  config, initial = load_initial(validate(config), overridden)
  reranker = open_reranker(config.rerank)
  if reranker is not None:
    logging.info(
      "The reranker chooses documents in validation, in the test and for"
      " answers. Training steps read what the retriever finds."
    )
  with open_workdir(
    path, config, process_index=jax.process_index(), resume_from=resume_from
  ) as run:
    questions = {
      split: load_questions(config.data.questions, split) for split in SPLITS
    }
    experiment = open_experiment(
      config,
      tokenizer_path=run.tokenizer,
      tokens_path=run.tokens,
      initial=initial,
    )
    logging.info("%s", banner(experiment, run.path, questions))
    answerer = Answerer(experiment, None, reranker)
    evaluator = Evaluator(experiment, answerer)
    validation = choose(
      questions["validation"], config.eval.num_validation, config.seed
    )
    clock = loop.train(
      experiment,
      questions["train"],
      run,
      evaluator.validator(validation),
      resume_from,
    )
    test = choose(questions["test"], config.eval.num_test, config.seed)
    return finish(experiment, run, test, evaluator, clock, validation)


def evaluate(
  model: RagPipeline | epath.PathLike,
  questions: epath.PathLike | Sequence[Question] = "",
  *,
  split: str = "test",
) -> dict[str, float]:
  """Returns how well a model answers questions whose answers are known.

  Args:
    model: a `RagPipeline`, or the workdir of a run that has ended.
    questions: a file in a format that training reads; a folder with a file per
      split, or another value of the setting data.questions; or `Question`s. "":
      the questions of the model's config.
    split: of the questions: "train", "validation" or "test". The names of the
      metrics begin with it.

  Returns:
    By name, each from 0 to 1: "test/exact_match" with its 95 % interval
    ("test/exact_match_low", "test/exact_match_high"), "test/token_f1",
    "test/answer_recall_at_1", "test/answer_recall_at_5" and, of the index
    against exact search, "test/index_recall_at_5"; exact match and recall at 5
    also for each relation. And the numbers "test/num_questions" and
    "test/questions_per_second".

  Raises:
    FileNotFoundError: something named is not there.
    ValueError: it cannot be used, there are no questions, or the index finds
      less than the setting index.min_recall.
    TypeError: an argument is of another type.
  """
  if split not in SPLITS:
    raise ValueError(f"split={split!r}; expected one of {list(SPLITS)}.")
  if not isinstance(model, RagPipeline):
    model = RagPipeline.load(path_of("model", model, _MODEL))
  evaluator = Evaluator(model.experiment, model.answerer)
  asked = questions_of(
    questions or model.experiment.config.data.questions, split
  )
  return evaluator.evaluate(model.params, model.index, asked, split)


def questions_of(
  questions: epath.PathLike | Sequence[Question], split: str
) -> Sequence[Question]:
  """Returns the questions in a list, a file or a folder."""
  if isinstance(questions, (str, os.PathLike)):
    source = os.fspath(questions)
    if pathlib.Path(source).expanduser().is_file():
      return read_questions(source)
    return load_questions(source, split)
  check_type("questions", questions, (list, tuple), _QUESTIONS)
  for number, question in enumerate(questions):
    name = f"questions[{number}]"
    check_type(name, question, Question, "a rag_jax.Question")
  return questions
