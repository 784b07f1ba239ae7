"""Answers questions with the model of a run or with a RAG checkpoint.

In: the workdir of a run that has ended, or a checkpoint and a corpus; and
questions. Out: answers, each with its documents.
"""

from collections.abc import Callable, Mapping, Sequence
import math
import os
from typing import Any

from absl import logging
from etils import epath
import jax
from jaxtyping import PyTree

from rag_jax.artifacts import instead_of
from rag_jax.artifacts import manifest_digest
from rag_jax.config import RerankConfig
from rag_jax.config_json import read_config
from rag_jax.corpus.folding import is_blank
from rag_jax.corpus.text_files import bad_character
from rag_jax.corpus.text_files import shorten
from rag_jax.data.dialogue import Asked
from rag_jax.data.experiment import Experiment
from rag_jax.data.experiment import check_n_docs
from rag_jax.data.experiment import open_experiment
from rag_jax.decoding.answerer import Answer
from rag_jax.decoding.answerer import Answerer
from rag_jax.decoding.answerer import make_decoder
from rag_jax.decoding.rag import RagDecoder
from rag_jax.decoding.settings import GenerationSettings
from rag_jax.retrieval.index import Index
from rag_jax.retrieval.index import load_index
from rag_jax.retrieval.retriever import fingerprint
from rag_jax.search.reranker import Reranker
from rag_jax.search.reranker import open_reranker
from rag_jax.search.reranker import rerank_config
from rag_jax.serving.open_model import fit_to_serving
from rag_jax.serving.open_model import open_corpus
from rag_jax.serving.open_model import open_model
from rag_jax.training.workdir import Workdir
from rag_jax.weights.model_files import load_model

# A cross-encoder, settings of `config.RerankConfig`, or None: as it was.
Rerank = str | os.PathLike[str] | Mapping[str, Any] | None


class RagPipeline:
  """Answers questions with a trained model and an index.

  pipeline = RagPipeline.load("runs/quickstart")
  answer = pipeline.answer("What is the capital of France?")[0]
  print(answer.text, answer.docs[0].title, answer.docs[0].posterior)

  Attributes:
    experiment: the config, the passages, the tokenizers and the model.
    params: of the model.
    index: over the embeddings of the passages; None: closed book.
    answerer: retrieves documents and decodes answers.
    least_score: the score that the best passage reaches for 99.5 % of the
      validation questions; -inf: unknown, as with a reranker, which may not
      choose that passage. See `explanation.is_sure`.
  """

  def __init__(
    self,
    experiment: Experiment,
    params: PyTree,
    index: Index | None,
    decoder: RagDecoder | None = None,
    least_score: float = -math.inf,
    reranker: Reranker | None = None,
  ):
    self.experiment = experiment
    self.params = params
    self.index = index
    self.answerer = Answerer(experiment, decoder, reranker)
    is_reranked = self.answerer.reranker is not None
    self.least_score = -math.inf if is_reranked else least_score

  @classmethod
  def load(
    cls,
    workdir: epath.PathLike,
    *,
    corpus: epath.PathLike = "",
    mode: str = "",
    generation: Mapping[str, Any] | None = None,
    rerank: Rerank = None,
  ) -> "RagPipeline":
    """Opens the model and the index of a finished run.

    Args:
      workdir: of a run that has ended.
      corpus: other passages to answer from, as `open_corpus` reads them, which
        are embedded now; "": the passages of the run.
      mode: one of `decoding.rag.MODES`; "": as in training.
      generation: settings by the names of generation_config.json, which
        override those of the run.
      rerank: a cross-encoder that chooses the documents: a directory or
        "hf:ORG/NAME"; or settings of `config.RerankConfig` by name, which
        override those of the run. "": none; None: as in the run.

    Raises:
      FileNotFoundError: no run is there, or it has not ended.
      ValueError: a file is damaged, the index does not fit the model or the
        passages, or `corpus` is given to a closed-book model.
    """
    run = Workdir(epath.Path(workdir).expanduser())
    if not run.config_path.exists():
      there = "" if run.path.exists() else f"{instead_of(run.path)} "
      raise FileNotFoundError(
        f"No config.json in {run.path}; expected the --workdir of a training"
        f" run. {there}Train first: rag-jax train"
        " --config=configs/quickstart.py --workdir=" + str(run.path)
      )
    params, content = load_model(run.model)
    config = read_config(run.config_path, content.get("config"))
    if corpus and not config.data.n_docs:
      raise ValueError(
        f"The corpus {corpus} was given, but the model in {run.path} was"
        " trained closed book (data.n_docs=0) and reads no passages. Omit the"
        " corpus, or train with data.n_docs=1 or more."
      )
    if corpus:
      config.index.bm25_path = ""  # it belongs to the passages of the run
    config.decoding.mode = mode or config.decoding.mode
    config.rerank = rerank_config(rerank, config.rerank)
    reranker = open_reranker(config.rerank)
    passages = open_corpus(str(corpus) or config.data.passages)
    fit_to_serving(config, passages)
    _check_tokenizer(run, content.get("tokenizer_manifest", ""))
    experiment = open_experiment(
      config,
      tokenizer_path=run.tokenizer,
      tokens_path=run.tokens,
      passages=passages,
      devices=jax.local_devices()[:1],
    )
    if content["tokenizer"] != experiment.token_ids:
      raise ValueError(
        f"The tokenizer in {run.tokenizer} is not the one that the model in"
        f" {run.model} was trained with; its token ids would mean other text."
        " Put the old files back, or train again."
      )
    decoder = _decoder(experiment, generation or {})
    if experiment.closed_book:
      return cls(experiment, params, None, decoder)
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
    least_score = -math.inf  # of older runs, and of runs with few questions
    if content.get("least_score") is not None:
      content.check(least_score=float)
      least_score = content["least_score"]
    return cls(experiment, params, index, decoder, least_score, reranker)

  @classmethod
  def from_checkpoint(
    cls,
    model: epath.PathLike,
    corpus: epath.PathLike,
    *,
    passage_encoder: str = "",
    mode: str = "",
    generation: Mapping[str, Any] | None = None,
    hf_parity: bool = True,
    rerank: Rerank = None,
  ) -> "RagPipeline":
    """Opens a RAG checkpoint over a corpus; see `open_model` and `load`.

    pipeline = RagPipeline.from_checkpoint(
      "models/rag-token-nq", "runs/documents", generation={"num_beams": 4}
    )
    """
    config = rerank_config(rerank, RerankConfig())
    reranker = open_reranker(config)
    parts = open_model(
      os.fspath(model),
      corpus,
      passage_encoder=passage_encoder,
      mode=mode,
      generation=generation,
      hf_parity=hf_parity,
      rerank=config,
    )
    return cls(*parts, reranker=reranker)

  def answer(
    self,
    questions: str | Sequence[Any],
    *,
    n_docs: int = 0,
    on_text: Callable[[str], None] | None = None,
    labels: Sequence[str] = (),
    history: Sequence[str] = (),
  ) -> list[Answer]:
    """Returns one answer per question.

    Args:
      questions: one string, or several.
      n_docs: documents to read per question; 0: as many as in training. Each
        new number compiles once.
      on_text: called after each token with the text of each answer so far, in
        greedy search and sampling by RAG-Token or FiD. Beam search and
        RAG-Sequence, which know an answer only at its end, do not call it.
      labels: the possible answers, two or more, of which the most likely is
        chosen; (): an answer is written. `Answer.labels` has the probabilities.
      history: what was said before the one question in a dialogue: questions
        and answers in turn, the oldest first.

    Raises:
      ValueError: a question is empty or cannot be tokenised; there are fewer
        passages than `n_docs`; or there is a history that the model does not
        read (dialogue.turns=0), or several questions after it.
      TypeError: a question or turn is not a string.
    """
    several = isinstance(questions, Sequence) and not isinstance(questions, str)
    questions = list(questions) if several else [questions]
    check_questions(questions)
    asked = self._after(history, questions) if len(history) else questions
    if type(n_docs) is not int or n_docs < 0:
      raise ValueError(
        f"n_docs={n_docs}; expected 1 or more, or 0 for as many as in training."
      )
    if n_docs and self.index is None:
      raise ValueError(
        f"n_docs={n_docs}, but this model was trained closed book"
        " (data.n_docs=0) and reads no documents. Omit n_docs."
      )
    n_docs = n_docs or self.experiment.config.data.n_docs
    check_n_docs(n_docs, self.experiment.passages)
    return self.answerer.answer(
      self.params,
      self.index,
      asked,
      n_docs=n_docs,
      on_text=on_text,
      labels=labels,
    )

  def _after(
    self, history: Sequence[str], questions: Sequence[str]
  ) -> list[Asked]:
    """Returns the one question, after what was said before it."""
    if isinstance(history, str):
      raise TypeError(
        f"history={shorten(history)} is one text; expected a list of turns."
        " Pass [question, answer]."
      )
    for number, turn in enumerate(history, start=1):
      _check_question(turn, f"Turn {number} of {len(history)} of the history")
    if len(questions) != 1:
      raise ValueError(
        f"There is a history of {len(history)} turns, but {len(questions)}"
        " questions; expected the one that follows it. Ask them one by one."
      )
    self.check_reads_history()
    return [Asked(questions[0], tuple(history))]

  def check_reads_history(self) -> None:
    """Raises `ValueError` unless the model reads earlier turns."""
    if not self.experiment.context.reads_history:
      raise ValueError(
        "The model reads no earlier turns of a dialogue (dialogue.turns=0);"
        " expected one that does. Ask without them, or train another."
      )


def _decoder(
  experiment: Experiment, generation: Mapping[str, Any]
) -> RagDecoder:
  """Returns the decoder of the config, with `generation` overriding it."""
  decoder = make_decoder(experiment)
  if not generation:
    return decoder
  values = decoder.settings.to_dict()
  if "max_length" in generation:
    values.pop("max_new_tokens", None)
  settings = GenerationSettings.from_dict(
    values | dict(generation), "generation"
  )
  return RagDecoder(experiment.model.generator, settings, decoder.mode)


def _check_tokenizer(run: Workdir, digest: str) -> None:
  """Raises if the tokenizer is missing, or is not the one of the training.

  Args:
    run: of the model.
    digest: of the manifest of its tokenizer; "": unknown.
  """
  # Otherwise a new tokenizer would be trained and written to the workdir.
  if not (run.tokenizer / "tokenizer.json").exists():
    raise FileNotFoundError(
      f"No tokenizer.json in {run.tokenizer}; expected the tokenizer that the"
      f" model in {run.model} was trained with. Put its files back, or train"
      " again."
    )
  if digest and manifest_digest(run.tokenizer) != digest:
    raise ValueError(
      f"The tokenizer in {run.tokenizer} has no manifest, or not the one that"
      f" it had when the model in {run.model} was trained; expected the same"
      " files. Put the old files back, or train again."
    )


def check_questions(questions: Sequence[Any]) -> None:
  """Raises an exception if a question cannot be asked; see `answer`."""
  for number, question in enumerate(questions, start=1):
    _check_question(question, f"Question {number} of {len(questions)}")


def _check_question(question: Any, name: str) -> None:
  if not isinstance(question, str):
    raise TypeError(
      f"{name} is {shorten(question)}, of type {type(question).__name__};"
      " expected text. Pass one string, or a list of strings."
    )
  if is_blank(question):
    raise ValueError(
      f"{name} is empty: {shorten(question)}. Ask something, for instance"
      " 'What is the capital of France?'."
    )
  if bad := bad_character(question):
    raise ValueError(
      f"{name} holds {bad}: {shorten(question)}. Expected text that can be"
      " written as UTF-8. Remove the character."
    )
