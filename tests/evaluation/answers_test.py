"""The answer metrics, against values worked out by hand and SQuAD's script."""

import dataclasses
import random
import re
import string

import pytest

from rag_jax.config import EvalConfig
from rag_jax.evaluation.answers import VARIANTS
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
    ("  ", ""),
    ("São Tomé", "são tomé"),  # accents stay
  ],
)
def test_normalisation_is_that_of_squad(text, expected):
  assert normalize_answer(text, "squad") == expected
  assert normalize_answer(text) == expected


def published(text):
  """SQuAD's evaluate-v1.1.py, line by line."""
  text = text.lower()
  text = "".join(char for char in text if char not in string.punctuation)
  text = re.sub(r"\b(a|an|the)\b", " ", text)
  return " ".join(text.split())


def test_numbers_of_papers_can_be_compared_with_ours():
  rng = random.Random(0)
  parts = ["The ", "a", "an", " ", "U.S.", "1,000", "3.5", "-", "“", "”", "é",
           "%", "\u00a0", "東京", "。", "x", "'s"]  # fmt: skip
  texts = [
    "".join(rng.choices(parts, k=rng.randrange(1, 7))) for _ in range(999)
  ]
  for text in texts:
    if published(text):
      assert normalize_answer(text, "squad") == published(text), text
      if text.isascii():
        assert normalize_answer(text) == published(text), text
    else:  # an answer of nothing: see the next test
      assert exact_match("", [text], "squad") == 0.0


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("empty", ["", " ", "\n", "\u200b", "\u00a0", "\x00"])
def test_an_empty_prediction_equals_no_answer(variant, empty):
  if variant == "squad" and empty in ("\u200b", "\x00"):
    return  # as published, these are characters like others
  for answer in ("A", "%", "the", "", " ", "Paris", "..."):
    assert exact_match(empty, [answer], variant) == 0.0
    assert token_f1(empty, [answer], variant) == 0.0


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("answer", ["A", "%", "the", "The A", "...", "$", "東"])
def test_an_answer_equals_itself_whatever_it_is_made_of(variant, answer):
  assert exact_match(answer, [answer], variant) == 1.0
  assert token_f1(answer, [answer], variant) == 1.0
  assert exact_match(answer, ["#"], variant) == 0.0


@pytest.mark.parametrize(
  ("prediction", "answer"),
  [
    ("“Paris”", "Paris"),
    ("‘Paris’", "'Paris'"),
    ("«Paris»", "Paris"),
    ("「東京」", "東京"),
    ("東京。", "東京"),
    ("東京 タワー", "東京タワー"),  # no spaces there
    ("서울 특별시", "서울특별시"),
    ("Ｐａｒｉｓ，\u3000Ｔｅｘａｓ", "Paris, Texas"),
    ("Pa\u00adris", "Paris"),
    ("Par\u200bis\ufeff", "Paris"),
    ("ﬁfth", "fifth"),
    ("m²", "m2"),
    ("STRASSE", "straße"),
    ("ΟΔΟΣ", "οδος"),
    ("İstanbul", "istanbul"),
    ("it’s", "it's"),
    ("1990–1995", "1990-1995"),
    ("¿Qué?", "qué"),
    ("می\u200cخواهم", "میخواهم"),
    ("١٩٩٠", "1990"),
    ("½", "1/2"),
    ("5 °C", "5 ℃"),
  ],
)
def test_an_answer_is_the_same_however_it_is_written(prediction, answer):
  for variant in ("multilingual", "numbers"):
    assert exact_match(prediction, [answer], variant) == 1.0
    assert token_f1(prediction, [answer], variant) == 1.0


@pytest.mark.parametrize(
  ("prediction", "answer"),
  [("10²", "102"), ("½", "12"), ("Brasilia", "Brasília"), ("か", "が")],
)
def test_what_differs_is_no_match(prediction, answer):
  assert exact_match(prediction, [answer]) == 0.0


def test_f1_counts_characters_where_words_have_no_spaces():
  # 3 of 4 and 3 of 3 characters.
  assert token_f1("東京都庁", ["東京都"]) == pytest.approx(6 / 7)
  assert token_f1("在Paris", ["Paris"]) == pytest.approx(2 / 3)
  assert token_f1("東京都庁", ["東京都"], "squad") == 0.0


@pytest.mark.parametrize(
  ("prediction", "answer", "expected"),
  [
    ("1,000", "1000", 1.0),
    ("1\u00a0000", "1,000", 1.0),
    ("1.000.000", "1,000,000", 1.0),
    ("$1,000.50", "1000.5", 1.0),
    ("2.50", "2.5", 1.0),
    (".5", "0.5", 1.0),
    ("5km", "5 km", 1.0),
    ("−5", "-5", 1.0),
    ("1990-1995", "1990–1995", 1.0),
    ("3.5", "35", 0.0),
    ("-5", "5", 0.0),
    ("1990-1995", "19901995", 0.0),
    ("3:45", "345", 0.0),
    ("1.2.3", "123", 0.0),
    ("v1.2", "v12", 0.0),
    ("-$5", "$5", 0.0),
  ],
)
def test_numbers_are_compared_as_numbers_if_asked_for(
  prediction, answer, expected
):
  assert exact_match(prediction, [answer], "numbers") == expected
  assert exact_match(answer, [prediction], "numbers") == expected


@pytest.mark.parametrize(
  ("text", "language", "expected"),
  [
    ("el Niño", "es", "niño"),
    ("el Niño", "en", "el niño"),
    ("Die Brücke", "de", "brücke"),
    ("the Alps", "", "the alps"),
    ("những người", "vi", "người"),
    ("القاهرة", "ar", "قاهرة"),
  ],
)
def test_articles_are_those_of_the_language(text, language, expected):
  assert normalize_answer(text, language=language) == expected


def test_an_unknown_variant_or_language_is_refused():
  with pytest.raises(ValueError, match=r"eval.answers='squat' .*mean 'squad'"):
    exact_match("a", ["a"], "squat")
  with pytest.raises(ValueError, match=r"eval.language='xx' is not one of"):
    token_f1("a", ["a"], language="xx")


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


@pytest.mark.parametrize("metric", [exact_match, token_f1])
def test_one_string_in_place_of_a_list_of_answers_is_refused(metric):
  with pytest.raises(TypeError, match=r"answers='Paris' .*Pass \['Paris'\]"):
    metric("P", "Paris")


@pytest.mark.parametrize("metric", [exact_match, token_f1])
def test_a_question_without_answers_is_refused(metric):
  with pytest.raises(ValueError, match="no answers; at least one is needed"):
    metric("Paris", [])


def test_every_language_that_can_be_set_has_its_articles():
  choices = {f.name: f.metadata for f in dataclasses.fields(EvalConfig)}
  for language in choices["language"]["choices"]:
    assert normalize_answer("42", language=language) == "42"
