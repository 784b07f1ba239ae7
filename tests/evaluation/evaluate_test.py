"""What is measured of answers and index, against what is known of them."""

import dataclasses

import numpy as np
import pytest

from rag_jax.data.questions import Question
from rag_jax.decoding.answerer import Answer
from rag_jax.decoding.answerer import Answerer
from rag_jax.evaluation.evaluate import Evaluator
from rag_jax.evaluation.evaluate import choose
from rag_jax.retrieval.exact import ExactIndex
from rag_jax.retrieval.index import load_index
from rag_jax.weights.model_files import load_model


@pytest.fixture(scope="module")
def params(uninterrupted):
  return load_model(uninterrupted.path / "model")[0]


@pytest.fixture(scope="module")
def index(uninterrupted):
  return load_index(uninterrupted.path / "index")


@pytest.fixture(scope="module")
def evaluator(tiny, uninterrupted):
  experiment, answerer, _ = tiny.open(uninterrupted.config)
  return Evaluator(experiment, answerer)


class Worst(ExactIndex):
  """Finds the best passage, and after it the worst."""

  def search(self, question_embeddings, n_docs):
    """Returns the best, then the worst."""
    ids, scores = super().search(question_embeddings, self.num_passages)
    order = [0, *range(self.num_passages - 1, 0, -1)][:n_docs]
    return ids[:, order], scores[:, order]


def worst(index):
  return Worst(
    index.embeddings,
    encoder_fingerprint=index.encoder_fingerprint,
    passages_fingerprint=index.passages_fingerprint,
  )


class Scripted(Answerer):
  """Answers from a script: what is said, and which passages were retrieved."""

  def __init__(self, script):
    self._script = script
    self.asked = {}

  def answer(self, params, index, questions, **settings):
    """Returns what the script says."""
    self.asked = settings
    return [
      Answer(
        question=question,
        text=self._script[question][0],
        log_prob=-1.5,
        tokens=(),
        token_log_probs=(),
        docs=(),
        question_cut=False,
        retrieved=self._script[question][1],
      )
      for question in questions
    ]


QUESTIONS = (
  Question("capital of 0?", ("Yes", "Right"), relation="capital"),
  Question("river of 1?", ("the Nile",), relation="river"),
  Question("river of 2?", ("Nile",), relation="river"),
)


@pytest.fixture(scope="module")
def scripted(tiny, uninterrupted):
  experiment, _, _ = tiny.open(uninterrupted.config)
  # Passages 3 and 4 of 40 hold an answer, in the title and in the text.
  passages = [
    dataclasses.replace(p, title="X", text="Nothing.")
    for p in experiment.passages
  ]
  passages[3] = dataclasses.replace(passages[3], title="The Nile")
  passages[4] = dataclasses.replace(passages[4], text="Yes is right.")
  passages = type(experiment.passages)(passages, origin="made up")
  experiment = dataclasses.replace(experiment, passages=passages)
  answerer = Scripted(
    {
      "capital of 0?": ("right!", (0, 4)),
      "river of 1?": ("Nile", (1, 2, 5, 6, 7, 3)),  # found as the sixth
      "river of 2?": ("the blue Nile", (3,)),
    }
  )
  return Evaluator(experiment, answerer), answerer


def test_answers_are_measured_as_a_person_would_count_them(scripted):
  evaluator, _ = scripted
  metrics = evaluator.evaluate({}, None, QUESTIONS, "test")
  assert metrics.pop("test/questions_per_second") > 0
  assert metrics.pop("test/exact_match_low") < 2 / 3
  assert metrics.pop("test/exact_match_high") > 2 / 3
  # Articles, case and punctuation do not count: 2 of 3 are right, and "blue
  # Nile" has a precision of 1/2 and a recall of 1.
  assert metrics == pytest.approx(
    {
      "test/num_questions": 3,
      "test/num_questions/capital": 1,
      "test/num_questions/river": 2,
      "test/exact_match": 2 / 3,
      "test/exact_match/capital": 1,
      "test/exact_match/river": 1 / 2,
      "test/token_f1": (1 + 1 + 2 / 3) / 3,
      "test/answer_recall_at_1": 1 / 3,
      "test/answer_recall_at_5": 2 / 3,
      "test/answer_recall_at_5/capital": 1,
      "test/answer_recall_at_5/river": 1 / 2,
    }
  )


def test_five_passages_are_retrieved_even_if_fewer_are_read(scripted):
  evaluator, answerer = scripted
  evaluator.records({}, None, QUESTIONS)
  assert answerer.asked == {"n_docs": 2, "num_retrieved": 5, "batch_size": 8}


def test_records_are_in_the_order_of_the_questions(scripted):
  evaluator, _ = scripted
  records = evaluator.records({}, None, QUESTIONS[::-1])
  assert [r.question for r in records] == [q.question for q in QUESTIONS[::-1]]
  assert [r.answers for r in records] == [q.answers for q in QUESTIONS[::-1]]
  assert [r.prediction for r in records] == ["the blue Nile", "Nile", "right!"]
  assert [r.answer_in_top for r in records] == [True, False, True]
  assert [r.answer_in_first for r in records] == [True, False, False]
  assert records[0].retrieved_ids == (3,)
  assert records[0].log_prob == -1.5


def test_answers_do_not_depend_on_the_questions_beside_them(
  evaluator, params, index, tiny
):
  questions = tiny.split("test")  # 10, in batches of 8
  with tiny.compiling():
    together = evaluator.records(params, index, questions)
    alone = evaluator.records(params, index, questions[9:])
  assert alone[0].prediction == together[9].prediction
  assert alone[0].retrieved_ids == together[9].retrieved_ids
  assert alone[0].log_prob == pytest.approx(together[9].log_prob, rel=1e-5)
  assert len(together[9].retrieved_ids) == 5


def test_an_exact_index_finds_all_of_the_exact_top_5(
  evaluator, params, index, tiny
):
  with tiny.compiling():
    recall = evaluator.index_recall(params, index, tiny.split("test"))
  assert recall == 1.0


def test_an_index_that_misses_four_of_five_is_found_out(
  evaluator, params, index, tiny
):
  with tiny.compiling():
    recall = evaluator.index_recall(params, worst(index), tiny.split("test"))
  assert recall == pytest.approx(0.2)


def evaluate(tiny, params, index, **changes):
  experiment, answerer, _ = tiny.open(tiny.config())
  config = tiny.config(**changes)
  evaluator = Evaluator(
    dataclasses.replace(experiment, config=config), answerer
  )
  with tiny.compiling():
    return evaluator.evaluate(params, index, tiny.split("test"), "test")


def test_results_of_an_index_that_finds_too_little_are_refused(
  tiny, params, index
):
  with pytest.raises(
    ValueError,
    match=r"test/index_recall_at_5=0\.2000 is below index\.min_recall=0\.9"
    r": the answers would be blamed.*Use index\.kind='exact', or raise"
    r" index\.scann_leaves_to_search or index\.scann_reorder\.",
  ):
    evaluate(tiny, params, worst(index), index__min_recall=0.9)


def test_results_of_an_index_that_finds_enough_are_reported(
  tiny, params, index
):
  metrics = evaluate(tiny, params, index, index__min_recall=1.0)
  assert metrics["test/index_recall_at_5"] == 1.0
  metrics = evaluate(tiny, params, worst(index), index__min_recall=0.2)
  assert metrics["test/index_recall_at_5"] == pytest.approx(0.2)


def test_a_validator_measures_its_questions_as_validation(scripted):
  evaluator, _ = scripted
  metrics = evaluator.validator(QUESTIONS[:1])({}, None)
  assert metrics["validation/num_questions"] == 1
  assert all(name.startswith("validation/") for name in metrics)


def many(number):
  return [Question(f"question {i}?", ("yes",)) for i in range(number)]


def test_a_choice_is_the_same_for_a_seed_and_in_order():
  questions = many(100)
  chosen = choose(questions, 10, seed=3)
  assert chosen == choose(questions, 10, seed=3)
  assert chosen != choose(questions, 10, seed=4)
  rows = [questions.index(q) for q in chosen]
  assert len(set(rows)) == 10
  assert rows == sorted(rows)
  # Not the first ones: files are sorted by entity.
  assert rows != list(range(10))


@pytest.mark.parametrize("number", [0, 5, 6])
def test_all_questions_are_measured_if_asked_for(number):
  assert choose(many(5), number, seed=0) == many(5)


def test_choosing_rows_covers_all_questions_over_the_seeds():
  questions = many(6)
  chosen = {q.question for s in range(30) for q in choose(questions, 2, s)}
  assert chosen == {q.question for q in questions}
  assert np.all([len(choose(questions, 2, s)) == 2 for s in range(30)])
