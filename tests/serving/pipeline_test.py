"""A finished run answers, follows its passages, and says what is wrong."""

import shutil

import numpy as np
import pytest

from rag_jax.data.dialogue import Asked
from rag_jax.data.questions import load_questions
from rag_jax.evaluation.answers import exact_match
from rag_jax.serving.explanation import explain
from rag_jax.serving.pipeline import RagPipeline

FRANCE = "What is the capital of France?"
NAMES = ("Newtown", "Marburg", "Baldor", "Kelmar", "Santa Rosa", "Lorwick",
         "Tanovia", "Zorbville")  # fmt: skip
PARTS = ("config.json", "tokenizer", "model", "index")  # of what is served


@pytest.fixture(scope="module")
def held_out(learned):
  """A question about the capital of each country of the test split."""
  questions = {}
  for question in load_questions(str(learned.passages.parent), "test"):
    if question.relation == "capital":
      country = question.id.rpartition("/capital/")[0]
      questions.setdefault(country, question)
  return questions


@pytest.fixture(scope="module")
def right(pipeline, held_out):
  """Those of the questions that are answered right."""
  answers = pipeline.answer([q.question for q in held_out.values()])
  return {
    country: question
    for (country, question), answer in zip(
      held_out.items(), answers, strict=True
    )
    if exact_match(answer.text, question.answers)
  }


def with_capitals(learned, held_out, capitals):
  """Returns the passages, with other capitals of some countries."""
  records = learned.records()
  by_id = {record["id"]: record for record in records}
  for country, capital in capitals.items():
    record = by_id[f"{country}/capital"]
    true = held_out[country].answers[0]
    assert true in record["text"]
    record["text"] = record["text"].replace(true, capital)
  return records


def test_capitals_that_were_never_asked_for_are_answered(learned, pipeline):
  asked = load_questions(str(learned.passages.parent), "test")
  asked = [q for q in asked if q.relation == "capital"]
  answers = pipeline.answer([q.question for q in asked])
  scores = [
    exact_match(answer.text, question.answers)
    for answer, question in zip(answers, asked, strict=True)
  ]
  assert np.mean(scores) >= 0.3
  # What is served is what was measured at the end of the run.
  measured = learned.results["test/exact_match/capital"]
  np.testing.assert_allclose(np.mean(scores), measured, atol=1.5 / len(asked))


def test_an_answer_comes_with_the_passages_it_was_read_from(learned, pipeline):
  (answer,) = pipeline.answer(FRANCE)
  assert (answer.question, answer.text) == (FRANCE, "Paris")
  # Both are sums of float32, one on the device.
  total = sum(answer.token_log_probs)
  assert answer.log_prob == pytest.approx(total, abs=1e-5)
  assert -1 < answer.log_prob < 0
  by_id = {record["id"]: record for record in learned.records()}
  assert answer.docs[0].id == "country/FR/capital"
  assert len(answer.docs) == 2
  for doc in answer.docs:
    record = by_id[doc.id]
    assert (doc.title, doc.text) == (record["title"], record["text"])
  assert answer.docs[0].posterior > 0.9
  for sums in (
    sum(doc.prior for doc in answer.docs),
    sum(doc.posterior for doc in answer.docs),
    *np.sum([doc.token_posteriors for doc in answer.docs], axis=0),
  ):
    assert sums == pytest.approx(1)
  assert explain(answer).startswith("Paris   (p = 0.")


def test_several_questions_are_answered_as_each_alone(pipeline, held_out):
  questions = [q.question for q in list(held_out.values())[:4]]
  together = pipeline.answer(questions)
  assert together == [pipeline.answer(question)[0] for question in questions]
  assert together == pipeline.answer(tuple(questions))
  assert len({answer.text for answer in together}) > 1
  assert pipeline.answer([]) == []


def test_an_answer_can_be_read_while_it_is_written(pipeline, right):
  texts = []
  question = right["country/FR"].question
  (streamed,) = pipeline.answer(question, on_text=texts.append)
  (whole,) = pipeline.answer(question)
  assert streamed.text == texts[-1] == whole.text
  assert len(texts) == len(streamed.tokens) > 1
  assert streamed.tokens == whole.tokens
  assert streamed.log_prob == pytest.approx(whole.log_prob, rel=1e-4)
  assert all(whole.text.startswith(text) for text in texts)


def test_other_numbers_of_documents_can_be_read(pipeline, right):
  question = right["country/FR"].question
  trained = pipeline.answer(question)[0]
  for n_docs in (1, 3):
    answer = pipeline.answer(question, n_docs=n_docs)[0]
    assert len(answer.docs) == n_docs
    assert sum(doc.prior for doc in answer.docs) == pytest.approx(1)
    assert answer.retrieved[0] == trained.retrieved[0]
    assert answer.text == trained.text
  assert pipeline.answer(question, n_docs=2) == [trained]
  assert pipeline.answer(question) == [trained]


def test_one_changed_passage_changes_its_answer_and_no_other(
  learned, pipeline, held_out, right, tmp_path, write_jsonl
):
  records = with_capitals(learned, held_out, {"country/FR": "Zorbville"})
  changed = [r for r in records if r not in learned.records()]
  assert [r["id"] for r in changed] == ["country/FR/capital"]
  corpus = write_jsonl("edited.jsonl", records)
  edited = RagPipeline.load(learned.workdir, corpus=corpus)
  (answer,) = edited.answer(FRANCE)
  assert answer.text == "Zorbville"
  assert "Zorbville" in answer.docs[0].text
  assert answer.docs[0].posterior > 0.9
  assert pipeline.answer(FRANCE)[0].text == "Paris"
  others = [q for c, q in right.items() if c != "country/FR"]
  for question, other in zip(
    others, edited.answer([q.question for q in others]), strict=True
  ):
    assert exact_match(other.text, question.answers)


def test_most_answers_follow_their_passages(
  learned, held_out, right, tmp_path, write_jsonl
):
  assert len(right) >= 5
  capitals = {c: NAMES[i % len(NAMES)] for i, c in enumerate(right)}
  corpus = write_jsonl(
    "edited.jsonl", with_capitals(learned, held_out, capitals)
  )
  edited = RagPipeline.load(learned.workdir, corpus=corpus)
  answers = edited.answer([q.question for q in right.values()])
  expected = list(capitals.values())
  follow = [a.text == name for a, name in zip(answers, expected, strict=True)]
  assert np.mean(follow) >= 0.6


def test_a_corpus_may_have_fewer_passages_than_were_read_in_training(
  learned, pipeline, tmp_path, write_jsonl
):
  records = [r for r in learned.records() if r["id"] == "country/FR/capital"]
  corpus = write_jsonl("one.jsonl", records)
  one = RagPipeline.load(learned.workdir, corpus=corpus)
  for n_docs in (0, 1):
    (answer,) = one.answer(FRANCE, n_docs=n_docs)
    assert answer.text == "Paris"
    assert [doc.prior for doc in answer.docs] == [1.0]
  with pytest.raises(
    ValueError, match=r"n_docs=2, but .*one\.jsonl has only 1"
  ):
    one.answer(FRANCE, n_docs=2)


def test_one_device_answers_for_a_model_that_was_trained_on_many(
  pipeline, run, change_config
):
  change_config("mesh", data=4, fsdp=2)
  many = RagPipeline.load(run)
  assert many.answer(FRANCE) == pipeline.answer(FRANCE)


def test_loading_writes_nothing(learned, run, tmp_path, write_jsonl):
  def files():
    return {p: p.stat().st_mtime_ns for p in run.rglob("*")}

  before = files()
  RagPipeline.load(run).answer(FRANCE)
  corpus = write_jsonl("same.jsonl", learned.records())
  RagPipeline.load(run, corpus=corpus)
  assert files() == before


def test_a_question_longer_than_the_encoder_takes_is_said_to_be_cut(pipeline):
  (answer,) = pipeline.answer(FRANCE + " Tell me, please." * 9)
  assert answer.question_cut
  assert "Note: the question is longer than the model takes" in explain(answer)
  assert not pipeline.answer(FRANCE)[0].question_cut


def test_closed_book_answers_without_documents(run, change_config):
  change_config("data", n_docs=0)
  shutil.rmtree(run / "index")  # such a run has none
  closed = RagPipeline.load(run)
  (answer,) = closed.answer(FRANCE)
  assert answer.docs == ()
  assert "closed book" in explain(answer)
  with pytest.raises(
    ValueError,
    match=r"n_docs=3, but this model was trained closed book .* Omit n_docs",
  ):
    closed.answer(FRANCE, n_docs=3)


def test_a_question_is_answered_by_what_was_said_before(pipeline):
  said = [FRANCE, "Paris"]
  (alone,) = pipeline.answer("And its continent?")
  (after,) = pipeline.answer("And its continent?", history=said)
  assert "country/FR/" not in alone.docs[0].id
  assert after.docs[0].title == "France"
  assert after.question == "And its continent?"
  # The generator reads them too: with the documents of the one, another answer.
  rows = np.array([alone.retrieved])
  found = [
    pipeline.answerer.answer(
      pipeline.params,
      pipeline.index,
      [asked],
      n_docs=2,
      choose_docs=lambda docs: rows,
    )[0].log_prob
    for asked in (
      "And its continent?",
      Asked("And its continent?"),
      Asked("And its continent?", tuple(said)),
    )
  ]
  assert found[0] == found[1]
  assert abs(found[2] - found[0]) > 1e-3


def test_a_long_history_is_cut_and_the_question_is_not(pipeline):
  said = ["What is the capital of Peru?", "Lima"] * 40
  with pipeline.experiment.context.counting() as cut:
    (answer,) = pipeline.answer("And its continent?", history=said)
  assert not answer.question_cut
  assert cut["histories_cut"] == 1 + 1  # of the question, and of its contexts
  assert cut["questions_cut"] == 0
  # The beginning is not read, the end is.
  longer, other = (
    pipeline.answer("And its continent?", history=turns)[0]
    for turns in ([FRANCE, "Paris", *said], [*said, FRANCE, "Paris"])
  )
  assert longer == answer
  assert other != answer


@pytest.mark.parametrize(
  ("questions", "history", "error", "message"),
  [
    (FRANCE, "Who?", TypeError, "history='Who\\?' is one text"),
    (FRANCE, ["Who?", " "], ValueError, "Turn 2 of 2 of the history is empty"),
    (FRANCE, ["\0"], ValueError, "Turn 1 of 1 of the history holds a NUL"),
    ([FRANCE, FRANCE], ["a"], ValueError, "of 1 turns, but 2 questions"),
  ],
)
def test_a_history_that_cannot_be_is_refused(
  pipeline, questions, history, error, message
):
  with pytest.raises(error, match=message):
    pipeline.answer(questions, history=history)


def test_a_model_that_reads_no_history_says_so(change_config, run):
  change_config("dialogue", turns=0)
  pipeline = RagPipeline.load(run)
  with pytest.raises(ValueError, match=r"\(dialogue\.turns=0\); expected one"):
    pipeline.answer(FRANCE, history=["a"])
  assert pipeline.answer(FRANCE)[0].text == "Paris"
