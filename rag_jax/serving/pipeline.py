"""A finished run as something to ask.

In: the workdir of a run, questions. Out: answers, each with its documents.
"""

from collections.abc import Sequence

from absl import logging
from etils import epath
import jax
from jaxtyping import PyTree

from rag_jax.config import MeshConfig
from rag_jax.config_json import from_json
from rag_jax.corpus.passages import load_passages
from rag_jax.data.experiment import Experiment
from rag_jax.data.experiment import check_n_docs
from rag_jax.data.experiment import open_experiment
from rag_jax.decoding.answerer import Answer
from rag_jax.decoding.answerer import Answerer
from rag_jax.retrieval.index import Index
from rag_jax.retrieval.index import load_index
from rag_jax.retrieval.retriever import fingerprint
from rag_jax.training.model_files import load_model
from rag_jax.training.workdir import Workdir


class RagPipeline:
  """Answers questions with a trained model and an index.

  pipeline = RagPipeline.load("runs/quickstart")
  answer = pipeline.answer("What is the capital of France?")[0]
  print(answer.text, answer.docs[0].title, answer.docs[0].posterior)
  """

  def __init__(
    self, experiment: Experiment, params: PyTree, index: Index | None
  ):
    self._experiment = experiment
    self._params = params
    self._index = index
    self._answerer = Answerer(experiment)

  @classmethod
  def load(
    cls, workdir: epath.PathLike, *, corpus: epath.PathLike = ""
  ) -> "RagPipeline":
    """Opens what a run wrote.

    Args:
      workdir: of a run that has ended.
      corpus: passages to answer from instead of those of the run; they are
        embedded now, by the trained retriever.

    Raises:
      FileNotFoundError: no run is there, or it has not ended.
      ValueError: a file is damaged, or the index does not fit the model or the
        passages.
    """
    run = Workdir(epath.Path(workdir).expanduser())
    if not run.config_path.exists():
      raise FileNotFoundError(
        f"No config.json in {run.path}; expected the --workdir of a training"
        " run. Train first: python tools/train.py"
        " --config=configs/quickstart.py --workdir=" + str(run.path)
      )
    params, content = load_model(run.model)
    config = from_json(run.config_path.read_text(), str(run.config_path))
    # One device answers, whatever mesh the model was trained on.
    config.mesh = MeshConfig(data=1, fsdp=1, tensor=1)
    passages = load_passages(str(corpus) or config.data.passages)
    experiment = open_experiment(
      config,
      tokenizer_path=run.tokenizer,
      passages=passages,
      devices=jax.local_devices()[:1],
    )
    if content["tokenizer"] != experiment.tokenizer.fingerprint:
      raise ValueError(
        f"The tokenizer in {run.tokenizer} is not the one that the model in"
        f" {run.model} was trained with; its token ids would mean other text."
        " Put the old files back, or train again."
      )
    if experiment.closed_book:
      return cls(experiment, params, None)
    retriever = {k: v for k, v in params.items() if k != "generator"}
    if corpus:
      logging.info("Embedding %d passages of %s.", len(passages), corpus)
      index = experiment.index_builder.build(retriever)
    else:
      index = load_index(
        config.index.path or run.index,
        encoder_fingerprint=fingerprint(retriever),
        passages_fingerprint=passages.fingerprint,
      )
    return cls(experiment, params, index)

  def answer(
    self, questions: str | Sequence[str], *, n_docs: int = 0
  ) -> list[Answer]:
    """Returns an answer a question, decoded greedily (RAG-Token).

    Args:
      questions: one, or several.
      n_docs: documents to read for each; 0: as many as in training. Each new
        number compiles once.

    Raises:
      ValueError: a question is empty, or there are fewer passages than
        `n_docs`.
      TypeError: a question is no text.
    """
    questions = [questions] if isinstance(questions, str) else list(questions)
    for number, question in enumerate(questions):
      if not isinstance(question, str):
        raise TypeError(
          f"Question {number + 1} is {question!r}, a"
          f" {type(question).__name__}; expected text."
        )
      if not question.strip():
        raise ValueError(
          f"Question {number + 1} of {len(questions)} is empty: {question!r}."
          " Ask something, for instance 'What is the capital of France?'."
        )
    if n_docs < 0:
      raise ValueError(
        f"n_docs={n_docs}; expected 1 or more, or 0 for as many as in training."
      )
    if n_docs and self._index is None:
      raise ValueError(
        f"n_docs={n_docs}, but this model was trained closed book"
        " (data.n_docs=0) and reads no documents. Leave n_docs away."
      )
    n_docs = n_docs or self._experiment.config.data.n_docs
    check_n_docs(n_docs, self._experiment.passages)
    return self._answerer.answer(
      self._params, self._index, questions, n_docs=n_docs
    )
