"""The cases of benchmark_hf.py that start from strings.

In: a file of questions and paragraphs in SQuAD's format, and a size. Out: cases
like those of hf_cases.py, which take questions as text: both tokenize, embed,
search, tokenize what they found, and then train or generate. The other side is
transformers' `RagRetriever` in its own models, as its documentation has it.

Tokenizers are made of the file's texts, and weights are random: neither changes
how long a step takes. Both sides read the same ones, and search the same
embeddings.
"""

from collections.abc import Callable, Iterator, Sequence
import copy
import dataclasses
import functools
import itertools
import os
import pathlib
import tempfile
from typing import Any

import hf_cases
from hf_cases import BOS
from hf_cases import B
from hf_cases import Case
from hf_cases import K
from hf_cases import Setup
import hf_retriever
import jax
from jaxtyping import Float, Int, PyTree
import numpy as np
import torch
import transformers

from rag_jax.config import Config
from rag_jax.config import MeshConfig
from rag_jax.config_models import EncoderConfig
from rag_jax.config_models import GeneratorConfig
from rag_jax.corpus.passage_reader import read_passages
from rag_jax.corpus.passages import PassageList
from rag_jax.corpus.report import BadRecords
from rag_jax.corpus.splitting import SplitConfig
from rag_jax.data.experiment import Experiment
from rag_jax.data.experiment import open_experiment
from rag_jax.data.questions import Question
from rag_jax.data.questions import read_questions
from rag_jax.decoding.answerer import Answerer
from rag_jax.decoding.rag import RagDecoder
from rag_jax.decoding.ranking import Generated
from rag_jax.decoding.ranking import HfParity
from rag_jax.models.batch import RagBatch
from rag_jax.models.packing import choose_packing
from rag_jax.retrieval.index import build_index
from rag_jax.retrieval.retriever import fingerprint
from rag_jax.weights.init_from import Initial
from rag_jax.weights.load import load_rag
from rag_jax.weights.loaded import LoadedRag

_CONTEXT = 300  # transformers pads every context to it: RagConfig's default
_PASSAGE_TOKENS = 512  # that are embedded: BERT's positions
_SPREAD = 2.0  # of the scores, as in the cases of fixed shape
_SAME_SCORE = 0.01  # documents that close may be exchanged by rounding
_SAME_LOSS = 1e-4  # relative


def _spread(
  passages: Float[np.ndarray, "P R"], questions: Float[np.ndarray, "N R"]
) -> Float[np.ndarray, "P R"]:
  """Returns passage embeddings whose scores depend on the question.

  A random encoder puts all texts in almost the same place, so that every
  question would find the same documents. What all have in common is removed.
  """
  mean = questions.mean(axis=0)
  mean /= np.linalg.norm(mean)
  passages = passages - passages.mean(axis=0)
  passages -= (passages @ mean)[:, None] * mean
  passages /= np.linalg.norm(passages, axis=1, keepdims=True)
  scores = questions @ passages.T
  return np.float32(_SPREAD / scores.std()) * passages


def _multiple(length: int) -> int:
  """Returns the smallest multiple of 8 from `length` on."""
  return -(-length // 8) * 8


def _config(kind: str, loaded: LoadedRag, setup: Setup) -> Config:
  """Returns the config of a run with the weights of transformers' model."""
  config = Config()
  config.loss = kind
  encoder = loaded.question_encoder.fields
  config.encoder = dataclasses.replace(EncoderConfig(), **encoder)
  config.encoder.vocab_size = setup.size.encoder_vocab
  fields = {  # JSON has lists where the config has tuples
    name: tuple(value) if isinstance(value, list) else value
    for name, value in loaded.generator.fields.items()
  }
  config.generator = dataclasses.replace(GeneratorConfig(), **fields)
  config.generator.vocab_size = setup.size.vocab
  config.train.compute_dtype = setup.dtype
  config.mesh = MeshConfig(data=1)
  config.index.kind = "exact"
  config.index.embed_batch_size = hf_cases.ENCODE_BATCH
  data = config.data
  data.n_docs = K
  data.context_style = "rag"
  data.title_sep = loaded.settings.title_sep
  data.doc_sep = loaded.settings.doc_sep
  data.question_length = data.passage_length = _PASSAGE_TOKENS
  data.context_length = loaded.settings.max_combined_length
  data.target_length = _PASSAGE_TOKENS
  return config


class _Sides:
  """Both models over the same passages.

  Attributes:
    questions: that are asked.
    longest: ours, opened with transformers' lengths.
    ours: opened with the smallest lengths that cut no more than theirs.
    params: of ours, on the host.
    index: that ours searches.
    theirs: transformers' model, with its retriever.
    retriever: of transformers.
    bert: transformers' tokenizer of questions.
    bart: and of contexts and answers.
    packing: of contexts, in training; None: each has a row of its own.
    note: what was padded to what.
  """

  def __init__(self, kind: str, setup: Setup, *, trains: bool = False):
    """Makes tokenizers and weights, embeds, and compares what is found.

    Args:
      kind: "rag_token" or "rag_sequence".
      setup: names the file of questions.
      trains: the decoder begins with <s>, as in transformers' labels.

    Raises:
      RuntimeError: the two find other documents.
    """
    self._setup = setup
    every = read_questions(setup.questions)
    rows = np.linspace(
      0, len(every) - 1, min(setup.num_questions, len(every))
    ).astype(int)
    self.questions = [every[row] for row in rows]
    method = "words" if setup.passage_words else "none"
    split = SplitConfig(method=method, size=setup.passage_words or 1)
    passages = PassageList(
      list(
        read_passages(setup.questions, split, bad_records=BadRecords("fail"))
      ),
      origin=setup.questions,
    )
    texts = [f"{p.title} {p.text}" for p in passages]
    texts += [q.question for q in every]
    self.theirs = hf_cases.their_model(kind, setup)
    with tempfile.TemporaryDirectory() as folder:
      path = pathlib.Path(folder)
      self.theirs.save_pretrained(folder)
      bert_path = path / "question_encoder_tokenizer"
      bart_path = path / "generator_tokenizer"
      hf_retriever.save_bert(bert_path, texts, setup.size.encoder_vocab)
      hf_retriever.save_bart(bart_path, texts, setup.size.vocab)
      self.bert = transformers.BertTokenizer.from_pretrained(bert_path)
      self.bart = transformers.BartTokenizer.from_pretrained(bart_path)
      loaded = load_rag(folder)
      self.params = jax.tree.map(np.array, loaded.params)
      self._config = _config(kind, loaded, setup)
      if trains:
        self._config.generator.decoder_start_id = BOS
      self._open = functools.partial(
        open_experiment,
        passages=passages,
        devices=jax.devices()[:1],
        initial=Initial(
          self.params, os.fspath(bart_path), os.fspath(bert_path)
        ),
      )
      # With transformers' lengths.
      self.longest = self._open(copy.deepcopy(self._config))
      asked = [q.question for q in self.questions]
      answerer = Answerer(self.longest)
      placed = setup.place(
        {"question_encoder": self.params["question_encoder"]}
      )
      embedded = answerer.embed(placed, asked)
      embeddings = _spread(
        self.longest.embedder.passages(
          placed, self.longest.context.passages, len(passages)
        ),
        embedded,
      )
      self.index = build_index(
        embeddings,
        self._config.index,
        encoder_fingerprint=fingerprint(placed),
        passages_fingerprint=passages.fingerprint,
      )
      self.retriever = hf_retriever.Retriever(
        self.theirs.config,
        self.bert,
        self.bart,
        hf_retriever.MemoryIndex(passages, embeddings),
      )
      self.theirs.set_retriever(self.retriever)
      self.theirs.to(setup.torch_device)
      found, _ = answerer.search(placed, self.index, asked, K)
      self._check_found(embedded, found)
      self.note = self._fit(found, trains)
      self.ours = self._open(self._config)

  def _check_found(
    self, embedded: Float[np.ndarray, "N R"], found: Int[np.ndarray, "N K"]
  ) -> None:
    """Raises `RuntimeError` if transformers finds other documents."""
    theirs = []
    for start in range(0, len(self.questions), hf_cases.ENCODE_BATCH):
      block = self.questions[start : start + hf_cases.ENCODE_BATCH]
      with torch.inference_mode():
        hidden = self.theirs.question_encoder(**self.their_inputs(block))[0]
      hidden = hidden.float().cpu().numpy()
      theirs.append(self.retriever.retrieve(hidden, K)[1])
    scores = embedded @ self.index.embeddings[:].T
    own = np.take_along_axis(scores, found, axis=1)
    other = np.take_along_axis(scores, np.concatenate(theirs), axis=1)
    worst = float(np.abs(own - other).max())
    if worst > _SAME_SCORE and self._setup.dtype == "float32":
      raise RuntimeError(
        f"The two find other documents: their scores differ by {worst:.3g},"
        f" expected at most {_SAME_SCORE}. The comparison would mean nothing."
      )

  def _fit(self, found: Int[np.ndarray, "N K"], trains: bool) -> str:
    """Sets the smallest lengths that hold everything, and says them."""
    context, data = self.longest.context, self._config.data
    question_ids, context_ids = context.encode_questions(
      [q.question for q in self.questions]
    )
    lengths = context.contexts(context_ids, found)[1].sum(axis=-1)
    num_cut = context.counts["contexts_cut"]
    data.context_length = min(_multiple(int(lengths.max())), _CONTEXT)
    self.packing = choose_packing(
      lengths.ravel(),
      B * K,
      data.context_length,
      self._config.generator.embed_dim,
    )
    data.question_length = _multiple(max(map(len, question_ids)) + 2)
    answers = self.longest.tokenizer.encode(
      [q.answers[0] for q in self.questions]
    )
    data.target_length = _multiple(max(map(len, answers)) + 1)
    note = (
      f"From strings: {len(self.questions)} questions of"
      f" {pathlib.Path(self._setup.questions).name}, which find"
      f" {len(np.unique(found))} of {self.index.num_passages} passages. A"
      f" context has {lengths.mean():.0f} tokens, {lengths.max()} at most;"
      f" {num_cut} of {lengths.size} are cut at {_CONTEXT} by both. It is"
      f" padded to {data.context_length} here, and to {_CONTEXT} by"
      f" RagRetriever. A question is padded to {data.question_length} here"
    )
    if trains:
      note += f", and an answer to {data.target_length}"
    if trains and self.packing:
      note += (
        f". With train.pack_contexts, the {B * K} contexts of a step are put"
        f" into {self.packing.rows} rows of {self.packing.length} tokens"
      )
    return note + "; by transformers to the longest of its batch."

  def batches(self) -> Iterator[list[Question]]:
    """Yields B questions after the other, without an end."""
    questions = itertools.cycle(self.questions)
    while True:
      yield list(itertools.islice(questions, B))

  def their_inputs(
    self, questions: Sequence[Question]
  ) -> dict[str, torch.Tensor]:
    """Returns the arguments of the question encoder."""
    made = self.bert(
      [q.question for q in questions],
      padding=True,
      truncation=True,
      return_tensors="pt",
    )
    names = ("input_ids", "attention_mask")
    return {name: made[name].to(self._setup.torch_device) for name in names}


def _train(kind: str, setup: Setup) -> Case:
  """One step of RAG, from questions and answers."""
  sides = _Sides(kind, setup, trains=True)
  return Case(
    _our_step(kind, sides),
    _their_step(sides, setup),
    _loss_difference,
    "relative difference of the loss",
    sides.note,
    check=_check_losses if setup.dtype == "float32" else _no_check,
  )


def _loss_difference(ours: float, hf: float) -> float:
  return abs(ours - hf) / abs(hf)


def _no_check(ours: Any, hf: Any) -> None:
  pass


def _check_losses(ours: float, hf: float) -> None:
  """Raises `RuntimeError` if the first losses differ."""
  difference = _loss_difference(ours, hf)
  if not difference <= _SAME_LOSS:
    raise RuntimeError(
      f"The first losses are {ours:.6g} here and {hf:.6g} in transformers:"
      f" they differ by {difference:.1e} of them, expected {_SAME_LOSS:.0e} at"
      " most. The comparison would mean nothing."
    )


def _our_step(kind: str, sides: _Sides) -> Callable[[], float]:
  """Returns a function that takes one step and returns the loss before it."""
  experiment, index, batches = sides.ours, sides.index, sides.batches()
  training = hf_cases.OurTraining(
    kind, experiment.model, sides.params, sides.packing
  )
  context = experiment.context

  def step() -> float:
    questions = next(batches)
    texts = [q.question for q in questions]
    question_ids, context_ids = context.encode_questions(texts)
    tokens, mask = context.questions(question_ids)
    # With the weights of this step, as transformers does.
    tower = training.state.params["question_encoder"]
    retriever = {"question_encoder": tower}
    embedded = experiment.embedder.questions(retriever, tokens, mask)
    found, _ = index.search(embedded, K)
    contexts = context.contexts(context_ids, found)
    answers = experiment.tokenizer.encode([q.answers[0] for q in questions])
    targets = context.targets(answers)
    batch = RagBatch(
      *contexts,
      *targets,
      question_tokens=tokens,
      question_mask=mask,
      doc_embeddings=index.embeddings[found],
    )
    return training.step(training.place(batch))

  return step


def _their_step(sides: _Sides, setup: Setup) -> Callable[[], float]:
  """Returns a function that takes one step and returns the loss before it."""
  training = hf_cases.TheirTraining(sides.theirs, setup)
  batches = sides.batches()

  def loss() -> torch.Tensor:
    questions = next(batches)
    answers = [q.answers[0] for q in questions]
    labels = sides.bart(text_target=answers, padding=True, return_tensors="pt")[
      "input_ids"
    ].to(setup.torch_device)
    out = sides.theirs(
      **sides.their_inputs(questions), labels=labels, reduce_loss=True
    )
    return out.loss / (labels[:, 1:] != hf_cases.PAD).sum()

  return lambda: training.step(loss)


class _Recorded(RagDecoder):
  """Keeps what it made: answers are texts, but token ids are compared."""

  made: Generated

  def __call__(self, *args: Any, **kwargs: Any) -> Generated:
    self.made = super().__call__(*args, **kwargs)
    return self.made


def _our_answers(
  sides: _Sides,
  experiment: Experiment,
  mode: str,
  params: PyTree,
  parity: HfParity | None = None,
) -> Callable[[], Int[np.ndarray, "B T"]]:
  """Returns a function that answers, and returns the answers' tokens."""
  decoder = _Recorded(
    experiment.model.generator, hf_cases.OUR_SEARCH, mode, hf_parity=parity
  )
  answerer, batches = Answerer(experiment, decoder), sides.batches()

  def answer() -> np.ndarray:
    texts = [q.question for q in next(batches)]
    answerer.answer(params, sides.index, texts, n_docs=K, batch_size=B)
    return np.asarray(decoder.made.tokens[:, 0])

  return answer


def _their_answers(sides: _Sides) -> Callable[[], Int[np.ndarray, "B T"]]:
  """Returns a function that answers, and returns the answers' tokens."""
  batches = sides.batches()

  def answer() -> np.ndarray:
    inputs = sides.their_inputs(next(batches))
    with torch.inference_mode():
      tokens = sides.theirs.generate(**inputs, **hf_cases.THEIR_SEARCH)
    sides.bart.batch_decode(tokens, skip_special_tokens=True)
    return tokens[:, 1:].cpu().numpy()  # without the start token

  return answer


def _generate(kind: str, setup: Setup) -> Case:
  """Beam search with 4 beams for 20 tokens, from questions to answers."""
  sides = _Sides(kind, setup)
  sides.theirs = sides.theirs.eval().to(setup.torch_dtype)
  params, note = setup.place(sides.params), sides.note
  if kind == "rag_sequence":
    note += f" {_padding_is_read(sides, params)}"
  return Case(
    _our_answers(sides, sides.ours, kind, params),
    _their_answers(sides),
    hf_cases.equal_tokens,
    "share of equal tokens",
    note,
  )


def _padding_is_read(sides: _Sides, params: PyTree) -> str:
  """Returns how alike the tokens are if padding is read here too."""
  ours = _our_answers(
    sides, sides.longest, "rag_sequence", params, HfParity()
  )()
  share = hf_cases.equal_tokens(ours, _their_answers(sides)())
  return (
    "RAG-Sequence of transformers reads the padding of contexts when it"
    " searches, so its answers may be others; with decoding.rag.HfParity and"
    f" contexts of {_CONTEXT} tokens, {share:.1%} of our tokens are equal to"
    " them."
  )


CASES: dict[str, Callable[[Setup], Case]] = {
  "train_rag_token_strings": functools.partial(_train, "rag_token"),
  "generate_rag_token_beam4_strings": functools.partial(_generate, "rag_token"),
  "generate_rag_sequence_thorough_beam4_strings": functools.partial(
    _generate, "rag_sequence"
  ),
}
