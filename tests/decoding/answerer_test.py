"""Answers as text against the training loss, whatever the batch around them."""

import json

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_cross_encoder import write_cross_encoder

from rag_jax.config import Config
from rag_jax.data.dialogue import Asked
from rag_jax.data.experiment import open_experiment
from rag_jax.decoding.answerer import Answerer
from rag_jax.losses import rag_token_nll
from rag_jax.models.batch import RagBatch
from rag_jax.retrieval.exact import ExactIndex
from rag_jax.search.reranker import Reranker

NAMES = ("Oslo", "Lima", "Rome", "Bern", "Cairo", "Quito", "Hanoi")
QUESTIONS = [f"Where is {name}?" for name in NAMES]
END = "</s>"


def make_config(folder, **data):
  config = Config()
  config.data.passages = str(folder / "passages.jsonl")
  config.data.questions = str(folder)
  config.data.n_docs = 2
  config.data.target_length = 4
  for name, value in data.items():
    setattr(config.data, name, value)
  config.tokenizer.vocab_size = 512
  config.encoder.embed_dim, config.encoder.num_heads = 8, 2
  config.generator.num_layers = 1
  config.generator.embed_dim, config.generator.num_heads = 8, 2
  config.generator.mlp_dim, config.generator.max_positions = 8, 128
  return config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("corpus")
  passages = [
    {"id": f"p{i}", "title": name, "text": f"{name} is city number {i}."}
    for i, name in enumerate(NAMES)
  ]
  questions = [{"question": q, "answers": ["here"]} for q in QUESTIONS]
  for name, records in {"passages": passages, "train": questions}.items():
    lines = "\n".join(map(json.dumps, records))
    (folder / f"{name}.jsonl").write_text(lines + "\n")
  return folder


@pytest.fixture(scope="module")
def experiment(folder):
  return open_experiment(make_config(folder))


@pytest.fixture(scope="module")
def params(experiment):
  shapes = jax.eval_shape(
    lambda key: nn.meta.unbox(experiment.init(key)), jax.random.key(0)
  )
  rng = np.random.default_rng(11)
  params = jax.tree.map(
    lambda x: rng.normal(size=x.shape).astype(np.float32), shapes
  )
  bias = params["generator"]["final_logits_bias"]
  # So that some answers end, and not all of them with the first token; and
  # without parts of a character, which all look the same.
  bias[experiment.tokenizer.eos_id] += 6
  tokens = experiment.tokenizer.tokens(range(len(bias)))
  bias[["\ufffd" in token for token in tokens]] = -1e9
  return params


@pytest.fixture(scope="module")
def index(experiment, params):
  return experiment.index_builder.build(params)


@pytest.fixture(scope="module")
def answerer(experiment):
  return Answerer(experiment)


@pytest.fixture(scope="module")
def answers(answerer, params, index):
  return answerer.answer(params, index, QUESTIONS, n_docs=2)


def rows_of(answer):
  return np.array([int(doc.id[1:]) for doc in answer.docs], int)


def nll_in_training(experiment, params, answer):
  """Returns the loss of the training step for this answer, [] float."""
  tokenizer, context = experiment.tokenizer, experiment.context
  ids, rows = tokenizer.encode([answer.question]), rows_of(answer)[None]
  inputs = dict(
    zip(
      ("context_tokens", "context_mask"),
      context.contexts(ids, rows),
      strict=True,
    )
  )
  if answer.docs:
    inputs["question_tokens"], inputs["question_mask"] = context.questions(ids)
    inputs["doc_tokens"], inputs["doc_mask"] = context.passages(rows)
  names = tokenizer.tokens(range(tokenizer.vocab_size))
  target = np.array([[names.index(token) for token in answer.tokens]], np.int32)

  @jax.jit
  def nll(params, target, inputs):
    mask = jnp.ones(target.shape, bool)
    batch = RagBatch(target_tokens=target, target_mask=mask, **inputs)
    out = experiment.model.apply({"params": params}, batch)
    return rag_token_nll(out.doc_scores, out.target_logits, target, mask)

  return float(nll(params, target, inputs)[0])


def assert_same_answers(answers, expected):
  for answer, other in zip(answers, expected, strict=True):
    assert answer.question == other.question
    assert answer.text == other.text
    assert answer.tokens == other.tokens
    assert answer.retrieved == other.retrieved
    np.testing.assert_allclose(answer.log_prob, other.log_prob, rtol=1e-5)
    for doc, same in zip(answer.docs, other.docs, strict=True):
      assert doc.id == same.id
      np.testing.assert_allclose(doc.posterior, same.posterior, atol=1e-5)


def test_the_log_prob_of_an_answer_is_minus_its_training_loss(
  experiment, params, answers
):
  # One of each length, as each is compiled.
  lengths = {len(answer.tokens): answer for answer in answers}
  assert len(lengths) > 1
  for answer in lengths.values():
    nll = nll_in_training(experiment, params, answer)
    np.testing.assert_allclose(answer.log_prob, -nll, rtol=1e-4)


def test_an_answer_shows_its_tokens_and_its_documents(experiment, answers):
  assert len({answer.text for answer in answers}) > 1
  for answer in answers:
    assert answer.text == "".join(answer.tokens).replace(END, "").strip()
    assert END not in answer.tokens[:-1]
    assert answer.tokens[-1] == END or len(answer.tokens) == 4
    size = len(answer.tokens)
    assert len(answer.token_log_probs) == size
    np.testing.assert_allclose(
      sum(answer.token_log_probs), answer.log_prob, rtol=1e-5
    )
    for doc in answer.docs:
      passage = experiment.passages.by_id(doc.id)
      assert (doc.title, doc.text) == (passage.title, passage.text)
      assert len(doc.token_posteriors) == size
    posteriors = [[*d.token_posteriors, d.posterior] for d in answer.docs]
    np.testing.assert_allclose(np.sum(posteriors, axis=0), 1, rtol=1e-5)


def test_the_prior_is_the_softmax_of_the_scores_best_first(answers):
  for answer in answers:
    exps = np.exp([doc.score for doc in answer.docs])
    priors = [doc.prior for doc in answer.docs]
    np.testing.assert_allclose(priors, exps / exps.sum(), rtol=1e-5)
    assert priors == sorted(priors, reverse=True)


class RoughIndex(ExactIndex):
  """Finds what it should, in the wrong order and with wrong scores."""

  def search(self, question_embeddings, n_docs):
    """Returns the passages from worst to best, and scores of nothing."""
    ids, scores = super().search(question_embeddings, n_docs)
    return ids[:, ::-1], np.full_like(scores, 99.0)


def test_scores_are_those_of_the_float32_embeddings_not_of_the_search(
  answerer, params, index, answers
):
  rough = RoughIndex(
    index.embeddings,
    encoder_fingerprint=index.encoder_fingerprint,
    passages_fingerprint=index.passages_fingerprint,
  )
  out = answerer.answer(params, rough, QUESTIONS, n_docs=2)
  found, questions = answerer.search(params, index, QUESTIONS, 2)
  for b, answer in enumerate(out):
    assert answer.retrieved == tuple(found[b, ::-1].tolist())
    expected = index.embeddings[rows_of(answer)] @ questions[b]
    scores = [doc.score for doc in answer.docs]
    np.testing.assert_allclose(scores, expected, rtol=1e-5)
    assert answer.text == answers[b].text
    assert [doc.id for doc in answer.docs] == [d.id for d in answers[b].docs]


@pytest.mark.parametrize("number", [0, 1, 3, 4, 7])
def test_any_number_of_questions_is_answered_in_their_order(
  answerer, params, index, answers, number
):
  out = answerer.answer(
    params, index, QUESTIONS[:number], n_docs=2, batch_size=3
  )
  assert_same_answers(out, answers[:number])


def test_batches_have_one_shape_whatever_the_number_of_questions(
  experiment, params, index, monkeypatch
):
  answerer, shapes = Answerer(experiment), []

  def questions(params, tokens, mask):
    shapes.append(tokens.shape)
    return embed(params, tokens, mask)

  embed = experiment.embedder.questions
  monkeypatch.setattr(experiment.embedder, "questions", questions)
  for number in (1, 2, 3, 5):
    answerer.answer(params, index, QUESTIONS[:number], n_docs=2, batch_size=2)
  assert shapes == [(2, 32)] * 7


def test_more_passages_can_be_retrieved_than_are_read(
  answerer, params, index, answers
):
  out = answerer.answer(params, index, QUESTIONS, n_docs=2, num_retrieved=5)
  expected, _ = answerer.search(params, index, QUESTIONS, 5)
  assert [answer.retrieved for answer in out] == [
    tuple(row) for row in expected.tolist()
  ]
  for answer, other in zip(out, answers, strict=True):
    assert answer.docs == other.docs
    assert answer.retrieved[:2] == other.retrieved


@pytest.mark.parametrize(
  ("question_length", "context_length"), [(12, 40), (40, 12)]
)
def test_a_question_is_cut_if_retriever_or_generator_takes_less(
  folder, params, index, question_length, context_length
):
  lengths = {
    "question_length": question_length,
    "context_length": context_length,
  }
  experiment = open_experiment(make_config(folder, **lengths))
  questions = ["Where is Oslo" + "?" * n for n in (7, 8)]
  encoded = experiment.tokenizer.encode(questions)
  assert [len(ids) for ids in encoded] == [10, 11]  # and two special tokens
  out = Answerer(experiment).answer(params, index, questions, n_docs=2)
  assert [answer.question_cut for answer in out] == [False, True]


def test_closed_book_answers_without_documents(folder, params):
  experiment = open_experiment(make_config(folder, n_docs=0))
  answerer = Answerer(experiment)
  out = answerer.answer(params, None, QUESTIONS, n_docs=0, batch_size=4)
  alone = answerer.answer(params, None, QUESTIONS, n_docs=0, batch_size=1)
  assert_same_answers(out, alone)
  assert {answer.docs for answer in out} == {()}
  assert {answer.retrieved for answer in out} == {()}
  nll = nll_in_training(experiment, params, out[0])
  np.testing.assert_allclose(out[0].log_prob, -nll, rtol=1e-4)


@pytest.fixture(scope="module")
def cross_encoder(folder):
  texts = [f"Where is {name}? {name} {name} is city number" for name in NAMES]
  return write_cross_encoder(folder / "cross", texts)


def reranked(experiment, where, **settings):
  return Answerer(
    experiment, None, Reranker.open(where, candidates=5, **settings)
  )


def test_the_reranker_chooses_and_the_prior_is_that_of_the_retriever(
  experiment, answerer, params, index, cross_encoder
):
  other = reranked(experiment, cross_encoder)
  out = other.answer(
    params, index, QUESTIONS, n_docs=2, num_retrieved=7, batch_size=3
  )
  first, embeddings = answerer.search(params, index, QUESTIONS, 7)
  moved = 0
  for b, answer in enumerate(out):
    texts = [f"{NAMES[i]} {NAMES[i]} is city number {i}." for i in first[b, :5]]
    (logits,) = other.reranker.score([QUESTIONS[b]], [texts])
    best = first[b, :5][np.argsort(-logits, kind="stable")]
    assert answer.retrieved == (*best.tolist(), *first[b, 5:].tolist())
    assert {doc.id for doc in answer.docs} == {f"p{i}" for i in best[:2]}
    np.testing.assert_allclose(
      [doc.score for doc in answer.docs],
      index.embeddings[rows_of(answer)] @ embeddings[b],
      rtol=1e-5,
    )
    moved += set(best[:2]) != set(first[b, :2])
  assert moved > 2
  # Given the documents, training has the same marginal likelihood.
  nll = nll_in_training(experiment, params, out[0])
  np.testing.assert_allclose(out[0].log_prob, -nll, rtol=1e-4)


def test_the_reranker_can_give_the_prior(
  experiment, params, index, cross_encoder
):
  other = reranked(experiment, cross_encoder, prior="reranker")
  asked = QUESTIONS[:3]
  for choose in (None, lambda ids: ids[:, [0, 4]]):
    for answer in other.answer(
      params, index, asked, n_docs=2, num_retrieved=5, choose_docs=choose
    ):
      rows = rows_of(answer)
      expected = other.reranker.logits(
        [answer.question], rows[None].astype(np.int32), experiment.passages
      )[0]
      scores = [doc.score for doc in answer.docs]
      np.testing.assert_allclose(scores, expected, atol=1e-5)
      priors = [doc.prior for doc in answer.docs]
      exps = np.exp(expected)
      np.testing.assert_allclose(priors, exps / exps.sum(), atol=1e-5)
      places = (0, 1) if choose is None else (0, 4)
      assert set(rows.tolist()) == {answer.retrieved[i] for i in places}


def test_the_reranker_reads_the_turns_that_the_retriever_reads(
  folder, params, index, cross_encoder
):
  config = make_config(folder)
  config.dialogue.retriever_turns = 1
  config.data.question_length = 40
  experiment = open_experiment(config)
  other = reranked(experiment, cross_encoder, prior="reranker")
  history = ("What about the others?", f"{NAMES[3]} is one.")
  (answer,) = other.answer(params, index, [Asked("And it?", history)], n_docs=2)
  expected = other.reranker.logits(
    [f"{history[1]}\nAnd it?"], rows_of(answer)[None].astype(np.int32),
    experiment.passages,
  )[0]  # fmt: skip
  scores = [doc.score for doc in answer.docs]
  np.testing.assert_allclose(scores, expected, atol=1e-5)


def test_a_long_history_does_not_hide_the_question_from_the_reranker(
  folder, params, index, cross_encoder
):
  experiment = open_experiment(make_config(folder))
  other = reranked(experiment, cross_encoder, prior="reranker")
  history = tuple(f"{NAMES[i % 4]} is city number {i}." for i in range(8))

  def scores(question):
    asked = [Asked(question, history)]
    (answer,) = other.answer(params, index, asked, n_docs=2)
    rows = rows_of(answer)
    found = other.reranker.last_lines("\n".join((*history, question)))
    assert found.endswith(f"\n{question}")
    assert len(found) < len("\n".join(history))
    expected = other.reranker.logits(
      [found], rows[None].astype(np.int32), experiment.passages
    )[0]
    np.testing.assert_allclose(
      [doc.score for doc in answer.docs], expected, atol=1e-5
    )
    return other.reranker.logits(
      [found], np.array([[0, 1]], np.int32), experiment.passages
    )

  first, second = (scores(f"Where is {NAMES[i]}?") for i in (1, 2))
  assert np.abs(first - second).max() > 1e-4
  assert other.reranker.last_lines("one line " * 99) == "one line " * 99


def test_of_a_single_document_the_reranker_says_which(
  folder, params, index, cross_encoder
):
  config = make_config(folder)
  config.decoding.mode = "single"
  config.rerank.init_from = str(cross_encoder)
  config.rerank.candidates = 5
  other = Answerer(open_experiment(config))
  for answer in other.answer(params, index, QUESTIONS[:4], n_docs=2):
    read = max(answer.docs, key=lambda doc: doc.posterior)
    assert (read.posterior, read.id) == (1, f"p{answer.retrieved[0]}")


def test_more_documents_than_candidates_are_refused(
  experiment, params, index, cross_encoder
):
  other = reranked(experiment, cross_encoder)
  with pytest.raises(ValueError, match=r"n_docs=6 .* rerank\.candidates=5"):
    other.answer(params, index, QUESTIONS, n_docs=6)
