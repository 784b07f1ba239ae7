"""The answer metrics of SQuAD, against values worked out by hand."""

import pytest

from rag_jax.evaluation.answers import exact_match
from rag_jax.evaluation.answers import normalize_answer
from rag_jax.evaluation.answers import token_f1


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    ("The  Eiffel\tTower!", "eiffel tower"),
    ("an apple a day", "apple day"),
    ("Theatre of Athens", "theatre of athens"),  # no article inside a word
    ("U.S.A.", "usa"),  # punctuation leaves no space
    ("the-best", "thebest"),  # articles go after punctuation
    ("a, the.", ""),
    ("  ", ""),
    ("São Tomé", "são tomé"),  # accents stay
    ("“Paris”", "“paris”"),  # as in SQuAD, punctuation of ASCII alone
    ("東京", "東京"),
  ],
)
def test_normalisation_is_that_of_squad(text, expected):
  assert normalize_answer(text) == expected


def test_a_decomposed_letter_is_not_taken_for_an_article():
  assert normalize_answer("A\u0300 Paris") == "\u00e0 paris"
  assert exact_match("A\u0300 la carte", ["\u00c0 la carte"]) == 1.0


def test_exact_match_is_with_any_of_the_answers():
  assert exact_match("The Hague", ["Den Haag", "hague"]) == 1.0
  assert exact_match("Hague city", ["Den Haag", "hague"]) == 0.0


def test_accents_count():
  assert exact_match("Brasilia", ["Brasília"]) == 0.0


def test_f1_counts_shared_words_as_often_as_they_occur():
  # 2 shared words, of 3 predicted and 4 expected: P = 2/3, R = 1/2, F1 = 4/7.
  assert token_f1("new york york", ["york new jersey usa"]) == pytest.approx(
    4 / 7
  )
  # A repeated word is shared only once: P = 1/3, R = 1.
  assert token_f1("york york york", ["york"]) == pytest.approx(0.5)


def test_f1_is_that_of_the_best_answer():
  answers = ["Saint Petersburg", "Petersburg", "Leningrad"]
  assert token_f1("petersburg", answers) == 1.0
  assert token_f1("saint", answers) == pytest.approx(2 / 3)
  assert token_f1("Moscow", answers) == 0.0


def test_strings_without_words_match_only_each_other():
  assert exact_match("the", ["a!"]) == 1.0
  assert token_f1("the", ["a!"]) == 1.0
  assert token_f1("", ["Paris"]) == 0.0
  assert token_f1("Paris", ["the"]) == 0.0


@pytest.mark.parametrize("metric", [exact_match, token_f1])
def test_one_string_in_place_of_a_list_of_answers_is_refused(metric):
  with pytest.raises(TypeError, match=r"answers='Paris' .*Pass \['Paris'\]"):
    metric("P", "Paris")


@pytest.mark.parametrize("metric", [exact_match, token_f1])
def test_a_question_without_answers_is_refused(metric):
  with pytest.raises(ValueError, match="no answers; at least one is needed"):
    metric("Paris", [])
