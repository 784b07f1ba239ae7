"""The flags that name a model, a reranker and questions, and what they name.

In: the command line. Out: a `RagPipeline`, of a run or of a RAG checkpoint; and
questions with their answers.
"""

import os
import pathlib
from typing import Any

from absl import flags

from rag_jax.api import pickles
from rag_jax.api.runs import questions_of
from rag_jax.config import RerankConfig
from rag_jax.data.questions import SPLITS
from rag_jax.data.questions import Question
from rag_jax.decoding.rag import MODES
from rag_jax.serving.open_model import default_passage_encoder
from rag_jax.serving.open_model import is_search_directory
from rag_jax.serving.pipeline import RagPipeline
from rag_jax.training.workdir import keep_compiled
from rag_jax.weights.hub import HUB_PREFIX
from rag_jax.weights.saved import is_workdir

# A flag that is defined here belongs to the command that asked for it.
flags.disclaim_key_flags()


def define_model_flags() -> None:
  """Defines the flags."""
  flags.DEFINE_string("workdir", "", "The workdir of a finished training run.")
  flags.DEFINE_string(
    "model", "", "A RAG checkpoint instead: a directory, or hf:ORG/NAME."
  )
  flags.DEFINE_string(
    "corpus", "", "Documents to answer from; '': the passages of the run."
  )
  flags.DEFINE_string(
    "passage_encoder",
    "",
    "Checkpoint that embeds the corpus, if --model has no passage encoder; ''"
    " for facebook/rag-*: their DPR encoder.",
  )
  flags.DEFINE_integer(
    "num_beams", 0, "Beams; 1: greedy search; 0: as the model says."
  )
  flags.DEFINE_enum(
    "mode", "", ["", *MODES], "How to decode; '': as the model was trained."
  )
  flags.DEFINE_bool(
    "hf_parity", True, "With --model, reproduce the defects of transformers;"
    " --nohf_parity ranks answers by their likelihood.",
  )  # fmt: skip
  flags.DEFINE_string(
    "cache_dir", "", "Where compiled programs are kept; '': in ~/.cache."
  )
  define_rerank_flags()
  flags.DEFINE_enum(
    "rerank_prior", None, ["retriever", "reranker"],
    "Whose scores give p(z|x); by default as in the run, or the retriever's.",
  )  # fmt: skip


def define_rerank_flags() -> None:
  """Defines the flags of the second stage of retrieval."""
  flags.DEFINE_string(
    "rerank", None, "A cross-encoder that chooses from the candidates: a"
    " directory, or hf:ORG/NAME. '': none; by default as in the run, if any.",
  )  # fmt: skip
  flags.DEFINE_integer(
    "candidates", None, "With --rerank, passages of the first stage; by default"
    f" {RerankConfig().candidates}.",
  )  # fmt: skip
  flags.DEFINE_integer(
    "rerank_length", None, "With --rerank, tokens of question and passage that"
    f" are read; by default {RerankConfig().length}.",
  )  # fmt: skip


def rerank_settings() -> dict[str, Any] | None:
  """Returns what the flags say of the reranker; None: nothing.

  A checkpoint whose only weights are a pickle is converted.
  """
  names = {
    "rerank": "init_from", "candidates": "candidates",
    "rerank_length": "length", "rerank_prior": "prior",
  }  # fmt: skip
  values = flags.FLAGS.flag_values_dict()
  given = {
    setting: values[flag]
    for flag, setting in names.items()
    if values.get(flag) is not None
  }
  if given.get("init_from"):
    where = os.path.expanduser(given["init_from"])
    given["init_from"] = pickles.converted(where, _converted(), as_is=True)
  return given or None


def _converted() -> pathlib.Path:
  """Returns the folder of converted checkpoints."""
  cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
  return cache.expanduser() / "rag_jax" / "converted"


def define_question_flags(num_questions: int) -> flags.FlagHolder[int]:
  """Defines the flags that name questions; returns that of their number.

  Args:
    num_questions: by default.
  """
  flags.DEFINE_string(
    "questions", "", "Questions with answers; '': those of the run."
  )
  flags.DEFINE_enum("split", "test", list(SPLITS), "Of the questions.")
  return flags.DEFINE_integer(
    "num_questions", num_questions, "At equal distances; 0: all."
  )


def check_questions_named() -> None:
  """Raises `ValueError` if --model is given without --questions.

  A checkpoint has no questions of its own, as a run has.
  """
  model = flags.FLAGS.model or ""
  if model and not flags.FLAGS.questions and not is_workdir(model):
    raise ValueError(
      f"--model={model} is a checkpoint, which has no questions of its own;"
      " expected --questions too. Give a file of questions with answers."
    )


def asked_questions(pipeline: RagPipeline) -> list[Question]:
  """Returns the questions of --questions or of the run, in their order."""
  config, num = pipeline.experiment.config, flags.FLAGS.num_questions
  named = flags.FLAGS.questions or config.data.questions
  asked = list(questions_of(named, flags.FLAGS.split))
  if 0 < num < len(asked):
    asked = [asked[i * len(asked) // num] for i in range(num)]
  return asked


def open_pipeline(corpus: str = "") -> RagPipeline:
  """Returns the pipeline of --workdir or --model, over `corpus` or --corpus.

  Raises:
    ValueError: neither or both are given, or the corpus is missing.
  """
  workdir, model = flags.FLAGS.workdir or "", flags.FLAGS.model or ""
  if bool(workdir) == bool(model):
    raise ValueError(
      f"--workdir={workdir!r} and --model={model!r}: expected one of them, a"
      " run that has ended or a RAG checkpoint. For instance"
      " --workdir=runs/quickstart, or --model=hf:facebook/rag-token-nq"
      " --corpus=documents/."
    )
  if model and not model.startswith(HUB_PREFIX) and is_workdir(model):
    workdir, model = model, ""
  beams, mode = flags.FLAGS.num_beams or 0, flags.FLAGS.mode or ""
  if beams < 0:
    raise ValueError(
      f"--num_beams={beams}; expected 1 or more, or 0 for as many as the model"
      " says."
    )
  generation = {"num_beams": beams} if beams else {}
  corpus = corpus or flags.FLAGS.corpus or ""
  rerank = rerank_settings()
  if workdir:
    keep_compiled(flags.FLAGS.cache_dir or "")
    return RagPipeline.load(
      workdir, corpus=corpus, mode=mode, generation=generation, rerank=rerank
    )
  passages_of = flags.FLAGS.passage_encoder or ""
  if not corpus:
    raise ValueError(
      f"--model={model} has no passages of its own; expected --corpus: a folder"
      " or file to answer from, or what rag-jax build-index wrote."
    )
  keep_compiled(flags.FLAGS.cache_dir or "")
  model = pickles.converted(os.path.expanduser(model), _converted())
  if not (passages_of or is_search_directory(corpus)):
    passages_of = default_passage_encoder(model)
  if passages_of:
    passages_of = pickles.converted(
      os.path.expanduser(passages_of), _converted()
    )
  return RagPipeline.from_checkpoint(
    model,
    corpus,
    passage_encoder=passages_of,
    mode=mode,
    generation=generation,
    hf_parity=flags.FLAGS.hf_parity,
    rerank=rerank,
  )
