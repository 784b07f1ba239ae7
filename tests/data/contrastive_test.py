"""The batches of the contrastive stage: who is compared with what."""

import dataclasses
import logging

import numpy as np
import pytest

from rag_jax.config import Config
from rag_jax.corpus.passages import Passage
from rag_jax.corpus.passages import PassageList
from rag_jax.corpus.tokenized import TokenizedPassages
from rag_jax.corpus.tokenizer import train_tokenizer
from rag_jax.data.context import ContextBuilder
from rag_jax.data.contrastive import ContrastiveBatches
from rag_jax.data.questions import Question

NUM, B = 10, 4
# Passage i states name i, and where i is even also the next one.
NAMES = [
  *("Alba", "Brno", "Cork", "Dara", "Elba", "Faro", "Gent", "Hull", "Izmir"),
  *("Jena", "Kyiv", "Lodz", "Mons"),
]
PASSAGES = PassageList(
  [
    Passage(f"p{i}", f"Title {i}", f"It is called {name}."
            + (f" Not {NAMES[i + 1]}." if not i % 2 and i + 1 < 13 else ""))
    for i, name in enumerate(NAMES)
  ],
  "thirteen",
)  # fmt: skip
QUESTIONS = [
  Question(
    f"What is number {i} called?",
    (NAMES[i],),
    gold=(f"p{i}",),
    negatives=tuple(f"p{(i + k) % NUM}" for k in (3, 4, 5)),
  )
  for i in range(NUM)
]


def make(questions=QUESTIONS, share=None, seed=0, answers="multilingual", **of):
  config = Config(seed=seed)
  config.data.question_length, config.data.passage_length = 24, 32
  config.eval.answers = answers
  settings = {"num_steps": 9, "batch_size": B, "mask_answers": False} | of
  for name, value in settings.items():
    setattr(config.contrastive, name, value)
  tokenizer = train_tokenizer([p.text for p in PASSAGES] * 3, 300)
  context = ContextBuilder(
    tokenizer, TokenizedPassages(PASSAGES, tokenizer, 32), config.data
  )
  return ContrastiveBatches(questions, PASSAGES, context, config, share=share)


def with_gold(number, **fields):
  questions = list(QUESTIONS)
  questions[number] = dataclasses.replace(questions[number], **fields)
  return questions


def test_each_question_comes_with_its_passage_and_its_negatives():
  batches = make(negatives=2)
  seen = set()
  for step in range(20):
    numbers, docs, real = batches.passages(step)
    assert docs.shape == (B, 3)
    assert real.all()
    for number, (own, *others) in zip(numbers, docs.tolist(), strict=True):
      assert own == number
      allowed = {(number + k) % NUM for k in (3, 4, 5)}
      assert set(others) < allowed
      assert len(set(others)) == 2
      seen.update((int(number), other) for other in others)
  assert len(seen) == 3 * NUM  # all negatives get their turn


def test_the_tokens_are_those_of_questions_and_passages():
  batches = make(negatives=1)
  batch = batches.batch(3)
  numbers, docs, _ = batches.passages(3)
  assert batch.question_tokens.shape == (B, 24)
  assert batch.doc_tokens.shape == (B, 2, 32)
  tokenizer = batches._context.tokenizer
  for b in range(B):
    asked = batch.question_tokens[b][batch.question_mask[b]][1:-1]
    assert tokenizer.decode(asked.tolist()) == (QUESTIONS[numbers[b]].question)
    for m in range(2):
      ids = batch.doc_tokens[b, m][batch.doc_mask[b, m]]
      assert PASSAGES[docs[b, m]].text in tokenizer.decode(ids.tolist())


def test_an_epoch_reads_every_question_once():
  batches = make(batch_size=5)
  for first in (0, 2, 4):
    read = [*batches.passages(first)[0], *batches.passages(first + 1)[0]]
    assert sorted(read) == list(range(NUM))


def test_a_batch_is_a_function_of_seed_and_step():
  def drawn(batches, steps=range(6)):
    return [batches.passages(step)[1].tolist() for step in steps]

  one = make(negatives=2)
  later = make(negatives=2)
  assert drawn(later, [5, 2]) == [drawn(one)[5], drawn(one)[2]]
  assert drawn(make(negatives=2, seed=1)) != drawn(one)


def test_the_shares_of_processes_are_the_whole_batch():
  whole = make(negatives=1, mask_answers=True).batch(2)
  parts = [
    make(negatives=1, mask_answers=True, share=rows).batch(2)
    for rows in ([0, 1], [2, 3])
  ]
  for name in ("question_tokens", "doc_tokens", "doc_mask", "counts"):
    joined = np.concatenate([getattr(part, name) for part in parts])
    np.testing.assert_array_equal(joined, getattr(whole, name))


@pytest.mark.parametrize("mask_answers", [False, True])
def test_what_counts_is_what_a_loop_finds(mask_answers):
  questions = with_gold(3, gold=("p3", "p5"))
  batches = make(questions, negatives=2, mask_answers=mask_answers)
  masked = 0
  for step in range(10):
    counts = batches.batch(step).counts
    numbers, docs, _ = batches.passages(step)
    flat = docs.ravel()
    for b, number in enumerate(numbers):
      question = questions[number]
      for p, row in enumerate(flat):
        passage = PASSAGES[row]
        states = question.answers[0] in passage.text and mask_answers
        wrong = passage.id not in question.gold and not states
        assert counts[b, p] == (p == 3 * b or wrong), (step, b, p)
        masked += states and passage.id not in question.gold
  assert (masked > 0) == mask_answers


def test_one_of_several_positives_is_drawn_in_each_epoch():
  questions = with_gold(3, gold=("p3", "p11", "p12"))
  batches = make(questions, batch_size=5)
  drawn = [
    docs[numbers.tolist().index(3), 0]
    for numbers, docs, _ in map(batches.passages, range(80))
    if 3 in numbers
  ]
  assert set(drawn) == {3, 11, 12}


def test_a_question_twice_in_a_batch_is_not_its_own_negative():
  batches = make(batch_size=7)  # epochs of 10 questions
  for step in range(10):
    numbers = batches.passages(step)[0]
    counts = batches.batch(step).counts
    for b, number in enumerate(numbers):
      for other in np.flatnonzero(numbers == number):
        assert counts[b, other] == (other == b)
  twice = [len(set(batches.passages(s)[0].tolist())) < 7 for s in range(10)]
  assert any(twice)


def test_free_places_count_for_nobody(caplog):
  questions = with_gold(3, negatives=("p7",))
  questions[5] = dataclasses.replace(questions[5], negatives=())
  with caplog.at_level(logging.INFO):
    batches = make(questions, negatives=2)
  assert "2 questions have fewer than 2 hard negatives" in caplog.text
  free = 0
  for step in range(10):
    numbers, _, real = batches.passages(step)
    counts = batches.batch(step).counts
    for b, number in enumerate(numbers):
      num = {3: 1, 5: 0}.get(int(number), 2)
      assert real[b].tolist() == [True] * (1 + num) + [False] * (2 - num)
      for m in range(1 + num, 3):
        assert not counts[:, 3 * b + m].any()
        free += 1
  assert free


def test_a_gold_passage_among_the_negatives_is_none(caplog):
  batches = make(with_gold(3, negatives=("p3", "p6")), negatives=2)
  for step in range(10):
    numbers, docs, real = batches.passages(step)
    for number, row, known in zip(numbers, docs, real, strict=True):
      if number == 3:
        assert row.tolist() == [3, 6, 3]
        assert known.tolist() == [True, True, False]


def test_questions_without_a_passage_are_left_out_and_counted(caplog):
  questions = with_gold(0, gold=())
  questions[1] = dataclasses.replace(questions[1], gold=("gone",))
  questions[2] = dataclasses.replace(questions[2], gold=("gone", "p2"))
  questions[4] = dataclasses.replace(questions[4], negatives=("off", "p1"))
  with caplog.at_level(logging.INFO):
    batches = make(questions, negatives=1)
  assert "learns from 8 of 10 training questions" in caplog.text
  assert "3 ids that they name are not in it." in caplog.text
  read = {docs for step in range(9) for docs in batches.passages(step)[1][:, 0]}
  assert read == set(range(2, NUM))


@pytest.mark.parametrize(
  ("questions", "settings", "message"),
  [
    (
      [dataclasses.replace(q, gold=()) for q in QUESTIONS], {},
      r"of 10 training questions 0 name passages .* thirteen, whose ids look"
      r" like \['p0', 'p1', 'p2'\]\. .* `rag-jax mine-negatives`"),
    (
      [dataclasses.replace(q, gold=("7",)) for q in QUESTIONS], {},
      r"of 10 training questions 10 name passages .* none of these is in"),
    (
      [dataclasses.replace(q, negatives=("x",)) for q in QUESTIONS],
      {"negatives": 1},
      r"contrastive\.negatives=1, but no training question has hard negatives"),
    (
      QUESTIONS, {"batch_size": 11},
      r"contrastive\.batch_size=11 is more than .* \(10\)"),
  ],
)  # fmt: skip
def test_what_cannot_be_learned_is_refused(questions, settings, message):
  with pytest.raises(ValueError, match=message):
    make(questions, **settings)


@pytest.mark.parametrize(
  ("answers", "masks"), [("multilingual", False), ("numbers", True)]
)
def test_answers_are_compared_as_in_the_evaluation(answers, masks):
  texts = ["It is 1,000 high.", "It is 1000.0 high.", "It is low.", "It is."]
  passages = PassageList(
    [Passage(str(i), "", text) for i, text in enumerate(texts)], "heights"
  )
  config = Config()
  config.eval.answers = answers
  config.contrastive.batch_size = 3
  tokenizer = train_tokenizer(texts * 5, 300)
  tokenized = TokenizedPassages(passages, tokenizer, config.data.passage_length)
  questions = [
    Question("How high?", ("1,000",), gold=("0",)),
    Question("How big?", ("x",), gold=("1",)),
    Question("How low?", ("y",), gold=("2",)),
  ]
  batches = ContrastiveBatches(
    questions, passages, ContextBuilder(tokenizer, tokenized, config.data),
    config,
  )  # fmt: skip
  numbers = batches.passages(0)[0].tolist()
  counts = batches.batch(0).counts[numbers.index(0)]
  assert counts[numbers.index(0)]
  assert counts[numbers.index(2)]
  assert counts[numbers.index(1)] == (not masks)
