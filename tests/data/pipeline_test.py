"""Batches are a function of the step, whoever reads them and how fast."""

import dataclasses
import re
import threading
import types

import jax
import numpy as np
import pytest

from rag_jax.config import Config
from rag_jax.config import DataConfig
from rag_jax.config import DialogueConfig
from rag_jax.corpus.passage_reader import load_passages
from rag_jax.corpus.tokenized import TokenizedPassages
from rag_jax.corpus.tokenizer import train_tokenizer
from rag_jax.data import pipeline
from rag_jax.data.context import ContextBuilder
from rag_jax.data.pipeline import Ahead
from rag_jax.data.pipeline import Prepared
from rag_jax.data.pipeline import QuestionBatches
from rag_jax.data.questions import Question
from rag_jax.data.questions import load_questions
from rag_jax.models.batch import RagBatch
from rag_jax.retrieval.bm25 import Bm25Index
from rag_jax.retrieval.exact import ExactIndex
from rag_jax.retrieval.retriever import Embedder

N, B, K, R = 10, 4, 2, 6  # N questions
QUESTIONS = load_questions("world_facts", "validation")[:N]
PASSAGES = load_passages("world_facts")[:R]
CONFIG = DataConfig(
  n_docs=K,
  question_length=64,
  passage_length=96,
  context_length=160,
  target_length=48,
)
RETRIEVER = {"scale": np.float32(1.0)}


class OneHotEmbedder(Embedder):
  """A question's embedding says which passage is its first and its second."""

  def __init__(self):
    self.num_calls = 0

  def questions(self, retriever_params, tokens, mask):
    """Returns embeddings nearest to one passage, then to the next."""
    self.num_calls += 1
    first = [
      row[real].sum() % R for row, real in zip(tokens, mask, strict=True)
    ]
    eye = np.eye(R, dtype=np.float32)
    second = (np.array(first) + 1) % R
    return retriever_params["scale"] * (eye[first] + eye[second] / 2)


class NeverSearched(ExactIndex):
  """Fails where it is searched."""

  def search(self, question_embeddings, n_docs):
    """Fails."""
    raise AssertionError("searched")


class Maker:
  """Makes `QuestionBatches` that differ in one thing."""

  def __init__(self):
    texts = [f"{p.title} {p.text}" for p in PASSAGES]
    self.tokenizer = train_tokenizer(texts, 512)
    self.tokenized = TokenizedPassages(
      PASSAGES, self.tokenizer, CONFIG.passage_length
    )
    self.context = ContextBuilder(self.tokenizer, self.tokenized, CONFIG)
    self.embedder = OneHotEmbedder()

  def __call__(
    self,
    questions=QUESTIONS,
    *,
    seed=0,
    batch_size=B,
    informal_questions=0.0,
    substitute_subjects=0.0,
    frozen_passages=False,
    **settings,
  ):
    """Returns the batches of `questions`."""
    config = Config(seed=seed, data=dataclasses.replace(CONFIG))
    config.data.informal_questions = informal_questions
    config.data.substitute_subjects = substitute_subjects
    config.train.batch_size = batch_size
    config.encoder.train_passage_encoder = not frozen_passages
    return QuestionBatches(
      questions, self.context, self.embedder, config, **settings
    )


@pytest.fixture
def make():
  return Maker()


def make_index(cls=ExactIndex):
  # Orthogonal, and such that each passage has an embedding of its own.
  return cls(
    np.eye(R, dtype=np.float32),
    encoder_fingerprint="1a2b",
    passages_fingerprint="3c4d",
  )


def assert_equal(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)


def rows_of(batches, steps):
  return np.concatenate([batches.rows(step) for step in steps])


def test_the_rows_of_a_step_do_not_depend_on_what_was_read_before(make):
  in_order = [make().rows(step) for step in range(9)]
  batches = make()
  for step in (8, 0, 3, 3, 7):
    np.testing.assert_array_equal(batches.rows(step), in_order[step])
    assert len(in_order[step]) == B


def test_each_epoch_reads_every_question_once_in_another_order(make):
  # 10 questions, 4 a batch: the third batch ends one epoch and begins another.
  epochs = rows_of(make(), range(15)).reshape(6, N)
  for epoch in epochs:
    np.testing.assert_array_equal(np.sort(epoch), np.arange(N))
  assert len(np.unique(epochs, axis=0)) == 6
  assert not any(np.array_equal(epoch, np.arange(N)) for epoch in epochs)


def test_another_seed_reads_in_another_order(make):
  orders = [rows_of(make(seed=seed), range(5)) for seed in range(3)]
  assert len(np.unique(orders, axis=0)) == 3


def plainly(question):
  """Returns a question without what `informal` may change."""
  text = question.lower().rstrip("?")
  return re.sub(r"\b(what|where|who|how|when)(?:'s| is)\b", r"\1", text)


def test_some_questions_are_read_as_people_type_them(make):
  batches, plain = make(informal_questions=0.5), make()
  changed = 0
  for step in range(20):
    rows = batches.rows(step)
    texts, question_ids, context_ids = batches.asked(step, rows)
    assert_equal((texts, question_ids, context_ids), batches.asked(step, rows))
    assert question_ids == make.tokenizer.encode(texts) == context_ids
    written = plain.asked(step, rows)[0]
    assert written == [QUESTIONS[i].question for i in rows]
    assert [plainly(text) for text in texts] == [plainly(t) for t in written]
    changed += sum(a != b for a, b in zip(texts, written, strict=True))
  # Half of them, and of these one in eight stays as it is.
  assert 20 <= changed <= 50
  assert plain.prepare(0, RETRIEVER, make_index()).batch is not None


@pytest.mark.parametrize("process_count", [2, 4])
def test_processes_read_together_what_one_reads_alone(make, process_count):
  alone = make()
  parts = np.split(np.arange(B), process_count)
  together = [make(share=part.tolist()) for part in parts]
  for step in range(7):
    shares = [batches.rows(step) for batches in together]
    assert {len(share) for share in shares} == {B // process_count}
    np.testing.assert_array_equal(np.concatenate(shares), alone.rows(step))


def test_processes_prepare_together_what_one_prepares_alone(make):
  expected = make().prepare(3, RETRIEVER, make_index())
  parts = [
    make(share=share).prepare(3, RETRIEVER, make_index())
    for share in ([0, 1], [2, 3])
  ]
  joined = jax.tree.map(
    lambda *x: np.concatenate(x), *(part.batch for part in parts)
  )
  assert_equal(joined, expected.batch)
  np.testing.assert_array_equal(
    np.concatenate([part.doc_ids for part in parts]), expected.doc_ids
  )


def test_a_batch_holds_the_questions_their_documents_and_first_answers(make):
  batches = make()
  prepared = batches.prepare(2, RETRIEVER, make_index())
  batch, doc_ids = prepared.batch, prepared.doc_ids
  assert doc_ids.shape == (B, K)
  rows = batches.rows(2)
  question_ids = make.tokenizer.encode([QUESTIONS[i].question for i in rows])
  for b, row in enumerate(rows):
    question = batch.question_tokens[b, batch.question_mask[b]].tolist()
    assert question == [0, *question_ids[b], 2]
    target = batch.target_tokens[b, batch.target_mask[b]]
    assert target[-1] == 2
    assert make.tokenizer.decode(target) == QUESTIONS[row].answers[0]
    first = sum(question) % R
    assert doc_ids[b].tolist() == [first, (first + 1) % R]
  doc_tokens, doc_mask = make.context.passages(doc_ids)
  np.testing.assert_array_equal(batch.doc_tokens, doc_tokens)
  np.testing.assert_array_equal(batch.doc_mask, doc_mask)
  tokens, mask = make.context.contexts(question_ids, doc_ids)
  np.testing.assert_array_equal(batch.context_tokens, tokens)
  np.testing.assert_array_equal(batch.context_mask, mask)
  assert batch.doc_embeddings is None


def test_the_first_of_several_answers_is_the_one_to_learn(make):
  several = [q for q in load_questions("world_facts", "train") if q.answers[1:]]
  batch = make(questions=several[:B]).prepare(0, RETRIEVER, None).batch
  targets = {
    make.tokenizer.decode(tokens[mask])
    for tokens, mask in zip(batch.target_tokens, batch.target_mask, strict=True)
  }
  assert targets == {q.answers[0] for q in several[:B]}


@pytest.mark.parametrize("scored", ["embeddings", "words", "frozen"])
def test_the_retriever_reads_another_subject_where_it_embeds_the_passages(
  make, scored
):
  bm25 = Bm25Index.build(PASSAGES, passages_fingerprint="3c4d")
  asked = [
    Question(f"Where is {title} found?", ("no passage says",))
    for title in dict.fromkeys(p.title for p in PASSAGES)
  ]
  prepared = make(
    questions=asked,
    batch_size=len(asked),
    substitute_subjects=1.0,
    bm25=bm25 if scored == "words" else None,
    frozen_passages=scored == "frozen",
  )
  index = make_index(NeverSearched)
  num_renamed = 0
  for step in range(6):
    rows = prepared.rows(step)
    # Each question with two passages about what it names.
    docs = np.array(
      [
        [i for i, p in enumerate(PASSAGES) if p.title in asked[row].question][
          :K
        ]
        for row in rows
      ]
    )
    batch = prepared.prepare(step, RETRIEVER, index, docs).batch
    for b, row in enumerate(rows):
      true = asked[row].question
      mask = batch.question_mask[b]
      question = make.tokenizer.decode(batch.question_tokens[b, mask])
      if scored != "embeddings":  # those are of the passages as they are
        assert question == true
        continue
      old, new = (
        q.removeprefix("Where is ").removesuffix(" found?")
        for q in (true, question)
      )
      num_renamed += old != new
      for k, doc in enumerate(docs[b]):
        passage = f"{PASSAGES[doc].title} {PASSAGES[doc].text}"
        read = batch.doc_tokens[b, k, batch.doc_mask[b, k]]
        read = make.tokenizer.decode(read[read != make.tokenizer.eos_id])
        assert read == passage.replace(old, new)
      # The generator reads the same.
      context = batch.context_tokens[b, 0, batch.context_mask[b, 0]]
      assert make.tokenizer.decode(context).startswith(question)
  assert num_renamed or scored != "embeddings"


def test_the_parameters_that_are_given_embed_the_questions(make):
  ids = make().prepare(0, RETRIEVER, make_index()).doc_ids
  other = {"scale": np.float32(-1.0)}
  assert not np.array_equal(ids, make().prepare(0, other, make_index()).doc_ids)


def test_documents_that_were_found_before_are_not_searched_again(make):
  found = make().prepare(1, RETRIEVER, make_index())
  num_calls = make.embedder.num_calls
  again = make().prepare(1, None, make_index(NeverSearched), found.doc_ids)
  assert_equal(again.batch, found.batch)
  assert again.doc_ids is found.doc_ids
  assert make.embedder.num_calls == num_calls
  with pytest.raises(AssertionError, match="searched"):
    make().prepare(1, RETRIEVER, make_index(NeverSearched))


def test_with_words_the_fused_scores_choose_and_exact_ones_are_given(make):
  bm25 = Bm25Index.build(PASSAGES, passages_fingerprint="3c4d")
  params = RETRIEVER | {
    "hybrid": {"log_dense": np.float32(0.0), "log_bm25": np.float32(-1.0)}
  }
  batches = make(bm25=bm25)
  prepared = batches.prepare(1, params, make_index())
  texts = [QUESTIONS[i].question for i in batches.rows(1)]
  words = bm25.score(texts, np.tile(np.arange(R), (B, 1)))
  tokens, mask = prepared.batch.question_tokens, prepared.batch.question_mask
  dense = make.embedder.questions(RETRIEVER, tokens, mask)  # of one-hot rows
  expected = np.argsort(-(dense + np.exp(-1) * words), axis=1)[:, :K]
  np.testing.assert_array_equal(prepared.doc_ids, expected)
  alone = make().prepare(1, RETRIEVER, make_index())
  assert not np.array_equal(prepared.doc_ids, alone.doc_ids)
  np.testing.assert_array_equal(
    prepared.batch.bm25_scores,
    np.take_along_axis(words, prepared.doc_ids, axis=1),
  )
  assert alone.batch.bm25_scores is None
  # What a resumed run makes of the documents in its checkpoint.
  again = batches.prepare(1, None, make_index(NeverSearched), prepared.doc_ids)
  assert_equal(again.batch, prepared.batch)


def test_frozen_passages_are_given_as_the_index_embedded_them(make):
  embeddings = np.random.default_rng(0).normal(size=(R, R)).astype(np.float32)
  index = ExactIndex(
    embeddings, encoder_fingerprint="1a2b", passages_fingerprint="3c4d"
  )
  prepared = make(frozen_passages=True).prepare(0, RETRIEVER, index)
  batch = prepared.batch
  assert batch.doc_tokens is None
  assert batch.doc_mask is None
  assert batch.doc_embeddings.shape == (B, K, R)
  for b, k in np.ndindex(B, K):
    np.testing.assert_array_equal(
      batch.doc_embeddings[b, k], embeddings[prepared.doc_ids[b, k]]
    )
  learned = make().prepare(0, RETRIEVER, index).batch
  np.testing.assert_array_equal(batch.context_tokens, learned.context_tokens)


def test_closed_book_reads_the_question_alone(make):
  prepared = make().prepare(0, None, None)
  batch = prepared.batch
  assert prepared.doc_ids.shape == (B, 0)
  assert batch.question_tokens is None
  assert batch.doc_tokens is None
  assert batch.context_tokens.shape == (B, 1, CONFIG.context_length)
  open_book = make().prepare(0, RETRIEVER, make_index()).batch
  np.testing.assert_array_equal(batch.target_tokens, open_book.target_tokens)
  for b in range(B):
    question = open_book.question_tokens[b, open_book.question_mask[b]]
    context = batch.context_tokens[b, 0, batch.context_mask[b, 0]]
    np.testing.assert_array_equal(context, question)


def test_a_batch_may_be_as_large_as_the_split_but_no_larger(make):
  rows = make(batch_size=N).rows(5)
  np.testing.assert_array_equal(np.sort(rows), np.arange(N))
  with pytest.raises(
    ValueError,
    match=(
      r"train.batch_size=11 is larger than the training split \(10 questions\)"
      "; lower it or bring more questions."
    ),
  ):
    make(batch_size=11)


def numbered(step):
  """A batch that can be told from those of other steps."""
  tokens = np.full((1, 1), step, np.int32)
  mask = np.ones((1, 1), bool)
  batch = RagBatch(tokens[None], mask[None], tokens, mask)
  return Prepared(batch, np.full((1, 1), step, np.int32))


@pytest.fixture
def ahead():
  ahead = Ahead()
  yield ahead
  ahead.close()


def busy():
  return False


def test_batches_are_taken_in_the_order_they_were_submitted(ahead):
  ahead.submit(numbered, 0)
  for step in range(20):
    prepared, _ = ahead.take(busy)
    assert prepared.doc_ids == step
    ahead.submit(numbered, step + 1)


def test_a_batch_is_prepared_while_the_caller_goes_on(ahead):
  started, finish = threading.Event(), threading.Event()

  def prepare(step):
    started.set()
    assert finish.wait(10)
    return numbered(step)

  ahead.submit(prepare, 3)
  assert started.wait(10)  # nobody has asked for it yet
  finish.set()
  assert ahead.take(busy)[0].doc_ids == 3


def test_looking_at_a_batch_leaves_it_there(ahead):
  assert ahead.peek() is None
  ahead.submit(numbered, 5)
  assert ahead.peek().doc_ids == 5
  assert ahead.peek() is ahead.take(busy)[0]
  assert ahead.peek() is None


def test_waiting_counts_while_the_device_is_idle(ahead, monkeypatch):
  ticks = iter(range(10**6))  # each look at the clock is a second later
  clock = types.SimpleNamespace(perf_counter=lambda: float(next(ticks)))
  monkeypatch.setattr(pipeline, "time", clock)
  finish = threading.Event()
  answers = []

  def device_is_idle():
    answers.append(len(answers) >= 2)  # busy for two looks
    if len(answers) == 5:
      finish.set()
    return answers[-1]

  def prepare(step):
    assert finish.wait(10)
    return numbered(step)

  ahead.submit(prepare, 0)
  prepared, waited = ahead.take(device_is_idle)
  assert prepared.doc_ids == 0
  assert len(answers) >= 5
  assert waited == len(answers) - 2


def test_a_batch_that_is_ready_is_not_waited_for(ahead):
  ahead.submit(numbered, 0)
  ahead.peek()
  assert ahead.take(lambda: True)[1] == 0.0


def test_what_goes_wrong_in_the_thread_is_raised_where_it_is_taken(ahead):
  def prepare(step):
    raise ValueError(f"step {step} cannot be prepared")

  ahead.submit(prepare, 7)
  with pytest.raises(ValueError, match="step 7 cannot be prepared"):
    ahead.take(busy)


def test_closing_ends_the_thread():
  before = set(threading.enumerate())
  ahead = Ahead()
  ahead.submit(numbered, 0)
  assert set(threading.enumerate()) - before
  ahead.close()
  assert set(threading.enumerate()) <= before


def test_batches_hold_the_turns_before_a_question(make):
  turns = ("Which country is large?", "Peru", "Where is it?", "There.")
  questions = [
    dataclasses.replace(q, history=turns[4 - i % 5 :] if i % 5 else ())
    for i, q in enumerate(QUESTIONS)
  ]
  config = DialogueConfig(user="U: ", assistant="A: ", retriever_turns=1)
  make.context = ContextBuilder(
    make.tokenizer, make.tokenized, CONFIG, dialogue=config
  )
  bm25 = Bm25Index.build(PASSAGES, passages_fingerprint="3c4d")
  batches = make(questions, informal_questions=0.5, bm25=bm25)
  seen = set()
  for step in range(5):
    rows = batches.rows(step)
    words, ids, context_ids = batches.asked(step, rows)
    batch = batches.prepare(
      step, RETRIEVER, make_index(), np.zeros((B, K), np.int32)
    ).batch
    for b, row in enumerate(rows):
      history = questions[row].history
      seen.add(len(history))
      *before, asked = words[b].split("\n")
      assert tuple(before) == history[-1:]
      assert plainly(asked) == plainly(questions[row].question)
      named = [
        ("UA"[(len(history) - i) % 2]) + f": {turn}\n"
        for i, turn in enumerate(history)
      ]
      for read, few in ((ids, named[-1:]), (context_ids, named)):
        text = "".join([*few, "U: ", asked])
        assert list(read[b]) == make.tokenizer.encode([text])[0]
      size = len(ids[b]) + 2
      real = batch.question_tokens[b][batch.question_mask[b]]
      assert real[1 : size - 1].tolist() == ids[b]
      head = batch.context_tokens[b, 0, 1 : len(context_ids[b]) + 1]
      assert head.tolist() == context_ids[b]
    np.testing.assert_allclose(
      batch.bm25_scores, bm25.score(words, np.zeros((B, K), np.int32))
    )
  assert seen == {0, 1, 2, 3, 4}
