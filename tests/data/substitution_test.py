"""Answers that change in question and passages alike."""

import numpy as np
import pytest

from rag_jax.config import DataConfig
from rag_jax.corpus.passages import Passage
from rag_jax.corpus.tokenized import TokenizedPassages
from rag_jax.corpus.tokenizer import train_tokenizer
from rag_jax.data import substitution
from rag_jax.data.context import ContextBuilder
from rag_jax.data.dialogue import Asked
from rag_jax.data.questions import Question
from rag_jax.data.substitution import Change
from rag_jax.data.substitution import Substitution
from rag_jax.data.substitution import places
from rag_jax.data.substitution import substitute

PASSAGES = (
  Passage("0", "France", "Paris is the capital of France. Paris is large."),
  Passage("1", "Niger", "Niamey is the capital of Niger, not of Nigeria."),
  Passage("2", "Nigeria", "Abuja is the capital of Nigeria."),
)
QUESTIONS = (
  Question("Capital of France?", ("Paris",), relation="capital"),
  Question("Capital of Niger?", ("Niamey",), relation="capital"),
  Question("Where is Abuja?", ("Nigeria",), relation="country"),
  Question("Where is Niamey?", ("Niger",), relation="country"),
)


@pytest.fixture(scope="module")
def tokenizer():
  # So few pieces that "Nigeria" begins with those of "Niger".
  return train_tokenizer([p.text for p in PASSAGES], 280)


@pytest.fixture(scope="module")
def tokenized(tokenizer):
  return TokenizedPassages(PASSAGES, tokenizer, 128)


@pytest.fixture
def make(tokenizer, tokenized):
  def build(share, seed=0):
    answers = tokenizer.encode([q.answers[0] for q in QUESTIONS])
    return Substitution(QUESTIONS, answers, tokenized, share=share, seed=seed)

  return build


def test_the_answer_changes_wherever_the_passage_says_it(tokenizer, tokenized):
  old, new = tokenizer.encode(["Paris", "Addis Ababa"])
  body = substitute(tokenized, 0, Change(((old, new),)))
  end = body.index(tokenizer.eos_id)
  assert tokenizer.decode(body[:end]) == "France"
  assert tokenizer.decode(body[end + 1 : -1]) == (
    "Addis Ababa is the capital of France. Addis Ababa is large."
  )
  assert body[-1] == tokenizer.eos_id


def test_a_word_that_begins_like_the_answer_stays(tokenizer, tokenized):
  (niger,), (nigeria,) = (tokenizer.encode([x]) for x in ("Niger", "Nigeria"))
  assert nigeria[: len(niger)] == niger  # or the test shows nothing
  body = substitute(
    tokenized, 1, Change(((niger, tokenizer.encode(["Chad"])[0]),))
  )
  text = tokenizer.decode([i for i in body if i != tokenizer.eos_id])
  assert text == "Chad Niamey is the capital of Chad, not of Nigeria."
  assert len(places(tokenized, 1, niger)) == 2
  assert places(tokenized, 2, niger) == []


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    ("in PARIS now", "in Rome now"),
    ("in Pa\u00adris now", "in Rome now"),
    ("in “Ｐａｒｉｓ” now", "in “ Rome” now"),
    ("in Par\u200bis now", "in Rome now"),
    ("in Parisian now", "in Parisian now"),
    ("Paris-Nord, Paris", "Paris-Nord, Rome"),
  ],
)
def test_the_answer_changes_however_it_is_written(tokenizer, text, expected):
  tokenized = TokenizedPassages([Passage("0", "Par", text)], tokenizer, 128)
  old, new = tokenizer.encode(["Paris", "Rome"])
  body = substitute(tokenized, 0, Change(((old, new),)))
  end = body.index(tokenizer.eos_id)
  assert tokenizer.decode(body[end + 1 : -1]) == expected


def test_no_answer_goes_on_from_the_title_into_the_text(tokenizer):
  tokenized = TokenizedPassages([Passage("0", "New", "York is")], tokenizer, 64)
  (old,) = tokenizer.encode(["New York"])
  assert places(tokenized, 0, old) == []


def test_without_a_change_the_passage_stays(tokenized):
  body = substitute(tokenized, 2, Change())
  assert body == tokenized.tokens[2, : tokenized.lengths[2]].tolist()


def test_an_answer_that_no_document_says_stays(make):
  rows, docs = np.array([0]), np.array([[1, 2]])
  for step in range(10):
    (change,) = make(1.0).changes(step, rows, docs)
    assert change.answer_ids is None


def changed_into(substitution, tokenizer, row, docs):
  """What the answer of question `row` becomes in 60 steps."""
  changes = [
    substitution.changes(step, np.array([row]), np.array([docs]))
    for step in range(60)
  ]
  return {
    tokenizer.decode(change.answer_ids)
    for (change,) in changes
    if change.answer_ids is not None
  }


def test_a_name_changes_into_any_title_or_answer_of_its_relation(
  make, tokenizer
):
  titles, capitals = {"France", "Niger", "Nigeria"}, {"Paris", "Niamey"}
  found = changed_into(make(1.0), tokenizer, 0, [1, 0])
  assert found == titles | capitals


def test_what_else_is_asked_of_a_document_changes_too(tokenizer):
  passages = [
    Passage("0", "Niger", "Niger pays in Franc and is called with +227."),
    Passage("1", "Chad", "Chad pays in Franc and is called with +235."),
  ]
  questions = [
    Question("What money has Niger?", ("Franc",), relation="money"),
    Question("What code has Niger?", ("+227",), relation="code"),
    Question("What code has Chad?", ("+235",), relation="code"),
  ]
  answers = tokenizer.encode([q.answers[0] for q in questions])
  tokenized = TokenizedPassages(passages, tokenizer, 64)

  def texts(share, row):
    substitution = Substitution(
      questions, answers, tokenized, share=share, seed=0
    )
    for step in range(60):
      (change,) = substitution.changes(step, np.array([row]), np.array([[0]]))
      body = substitute(tokenized, 0, change)
      yield change, tokenizer.decode([i for i in body if i != tokenizer.eos_id])

  for change, text in texts(1.0, 0):
    money = tokenizer.decode(change.answer_ids)
    code = text.split()[-1].rstrip(".")
    assert text.endswith(f" pays in {money} and is called with {code}.")
    assert code in ("+227", "+235")
  assert {"+227", "+235"} == {
    text.split()[-1].rstrip(".") for _, text in texts(1.0, 0)
  }
  # Each of the two facts changes or stays whatever the other does.
  both = {
    (
      change.answer_ids is not None,
      any(x[0] == answers[0] for x in change.replacements),
    )
    for change, _ in texts(0.5, 1)
  }
  assert both == {(a, b) for a in (True, False) for b in (True, False)}
  assert all(not change.replacements for change, _ in texts(0.0, 0))


def test_a_number_changes_into_one_of_its_relation(tokenizer):
  passages = [
    Passage("0", "Lyon", "Lyon counts 522,969 people."),
    Passage("1", "Nice", "Nice counts 342,522 people."),
  ]
  questions = [
    Question("?", ("522,969",), relation="population"),
    Question("?", ("342,522",), relation="population"),
    Question("?", ("33",), relation="code"),
  ]
  tokenized = TokenizedPassages(passages, tokenizer, 64)
  substitution = Substitution(
    questions,
    tokenizer.encode([q.answers[0] for q in questions]),
    tokenized,
    share=1.0,
    seed=0,
  )
  found = changed_into(substitution, tokenizer, 0, [1, 0])
  assert found == {"522,969", "342,522"}


def test_the_share_is_that_of_the_questions_and_zero_changes_nothing(make):
  rows, docs = np.arange(4), np.array([[0, 1, 2]] * 4)

  def share(substitution):
    changes = [substitution.changes(s, rows, docs) for s in range(200)]
    return np.mean([c.answer_ids is not None for x in changes for c in x])

  assert share(make(0.0)) == 0.0
  assert share(make(0.25)) == pytest.approx(0.25, abs=0.05)
  assert share(make(1.0)) == 1.0


def test_the_choice_is_a_function_of_seed_step_and_question(make):
  docs = np.array([[0, 1, 2]] * 4)
  rows = np.arange(4)
  whole = make(0.5).changes(7, rows, docs)
  # Another process reads half of the batch and chooses the same.
  assert make(0.5).changes(7, rows[2:], docs[2:]) == whole[2:]
  others = [make(0.5, seed=s).changes(7, rows, docs) for s in range(1, 9)]
  assert any(other != whole for other in others)


def test_the_generator_reads_the_changed_passage(tokenizer, tokenized):
  config = DataConfig(question_length=32, context_length=128)
  context = ContextBuilder(tokenizer, tokenized, config)
  question, old, new = tokenizer.encode(["Capital?", "Paris", "Lomé"])
  rows = np.array([[0, 2], [0, 2]])
  tokens, mask = context.contexts(
    [question] * 2, rows, [Change(((old, new),)), Change()]
  )
  read = [
    [tokenizer.decode(t[m]) for t, m in zip(*pair, strict=True)]
    for pair in zip(tokens, mask, strict=True)
  ]
  assert "Lomé is the capital of France. Lomé is large." in read[0][0]
  assert "Paris is the capital of France. Paris is large." in read[1][0]
  assert read[0][1] == read[1][1]


def test_titles_are_those_of_so_many_passages_at_most(
  make, tokenizer, tokenized, monkeypatch
):
  # Of three passages every second one.
  monkeypatch.setattr(substitution, "_MOST_PASSAGES", 2)
  rows, docs = np.zeros(1, int), np.zeros((1, 1), int)
  new = {
    tokenizer.decode(change.answer_ids)
    for step in range(40)
    for change in make(1.0).changes(step, rows, docs)
  }
  assert new == {"France", "Nigeria", "Paris", "Niamey"}
  assert len(list(tokenized.titles(3))) == len(list(tokenized.titles())) == 3


def test_without_a_share_no_title_is_read(make, tokenized, monkeypatch):
  monkeypatch.setattr(tokenized, "tokens", None)
  rows, docs = np.zeros(1, int), np.zeros((1, 1), int)
  assert make(0.0).changes(0, rows, docs) == [Change()]


def subjects(make, tokenizer, question, docs, passages, share=1.0):
  """Returns what a generator reads of question and first document, by step."""
  tokenized = TokenizedPassages(passages, tokenizer, 128)
  answers = tokenizer.encode([question.answers[0]])
  substitution = Substitution(
    [question], answers, tokenized, share=0.0, subject_share=share, seed=0
  )
  read = set()
  for step in range(60):
    (change,) = substitution.changes(step, np.zeros(1, int), np.array([docs]))
    assert change.answer_ids is None
    body = substitute(tokenized, docs[0], change)
    text = tokenizer.decode([i for i in body if i != tokenizer.eos_id])
    read.add((change.question or question.question, text))
  return read


def test_the_subject_changes_in_question_and_documents_alike(make, tokenizer):
  found = subjects(make, tokenizer, QUESTIONS[1], [1, 0], PASSAGES)
  assert found == {
    (f"Capital of {name}?", f"{name} Niamey is the capital of {name}, not of"
     " Nigeria.")
    for name in ("France", "Niger", "Nigeria")
  }  # fmt: skip


@pytest.mark.parametrize(
  ("question", "text"),
  [
    ("Capital of Nigeria?", "Niger"),  # a longer name is another one
    ("Capital?", "Niger"),
  ],
)
def test_a_subject_that_is_not_asked_for_stays(make, tokenizer, question, text):
  asked = Question(question, ("Niamey",))
  found = subjects(make, tokenizer, asked, [1], PASSAGES)
  assert [(q, t.split()[0]) for q, t in found] == [(question, text)]


def test_a_subject_that_is_part_of_the_answer_stays(make, tokenizer):
  passages = (Passage("0", "Panama", "Panama City is the capital of Panama."),)
  asked = Question("What is the capital of Panama?", ("Panama City",))
  found = subjects(make, tokenizer, asked, [0], passages)
  assert {question for question, _ in found} == {asked.question}


def test_of_two_names_at_one_place_the_longer_is_replaced(tokenizer):
  passages = (Passage("0", "New York County", "It lies in New York."),)
  tokenized = TokenizedPassages(passages, tokenizer, 64)
  old, longer, a, b = tokenizer.encode(
    ["New York", "New York County", "A", "B"]
  )
  body = substitute(tokenized, 0, Change(((old, a), (longer, b))))
  text = tokenizer.decode([i for i in body if i != tokenizer.eos_id])
  assert text == "B It lies in A."


def test_the_subject_of_a_dialogue_changes_where_it_was_named(make, tokenizer):
  asked = Question(
    "And its capital?", ("Niamey",), history=("Is Niger large?", "Yes.")
  )
  found = subjects(make, tokenizer, asked, [1, 0], PASSAGES)
  assert found == {
    (Asked("And its capital?", (f"Is {name} large?", "Yes.")),
     f"{name} Niamey is the capital of {name}, not of Nigeria.")
    for name in ("France", "Niger", "Nigeria")
  }  # fmt: skip


def test_an_answer_that_was_said_before_stays(tokenizer):
  tokenized = TokenizedPassages(PASSAGES, tokenizer, 128)
  turns = ("Capital of Nigeria?", "Niamey")
  asked = Question("Are you sure? Which one?", ("Niamey",), history=turns)
  other = Question("Capital of France?", ("Paris",))
  alone = Question("Are you sure? Which one?", ("Niamey",))
  for question, changes in ((asked, False), (alone, True)):
    both = [question, other]
    substitution = Substitution(
      both, tokenizer.encode([q.answers[0] for q in both]), tokenized,
      share=1.0, seed=0,
    )  # fmt: skip
    found = [
      substitution.changes(step, np.zeros(1, int), np.array([[1]]))[0]
      for step in range(30)
    ]
    assert any(change.answer_ids is not None for change in found) == changes
