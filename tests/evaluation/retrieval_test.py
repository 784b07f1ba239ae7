"""The recall of answers, against a loop over tokens."""

import json
import pathlib
import unicodedata

import numpy as np
import pytest

from rag_jax.evaluation.answers import exact_match
from rag_jax.evaluation.retrieval import answer_recall_at_k
from rag_jax.evaluation.retrieval import contains_answer

DATA = pathlib.Path(__file__).parents[2].parent / "shared" / "data"
DPR = [
  ("Paris is the capital of France.", "paris", True),  # no case
  ("It lies on the river Seine, in Paris.", "the river seine", True),
  ("Parisian cafes", "Paris", False),  # whole tokens
  ("the of capital", "capital of", False),  # in their order
  ("the capital city of France", "capital of", False),  # without a gap
  ("the river", "river", True),
  ("a river", "the river", False),  # articles count
  ("in the U.S. army", "U.S.", True),
  ("in the US army", "U.S.", False),  # punctuation counts
  ("costs $5,000 today", "5,000", True),
  ("costs $5,000 today", "5", True),  # the comma ends a token
  ("born in S\u00e3o Paulo", "sa\u0303o paulo", True),  # same accent
  ("born in S\u00e3o Paulo", "Sao Paulo", False),  # accents count
  ("snake_case", "snake", True),  # "_" is no letter
  ("a\u00a0b\u2003c", "a b c", True),  # any kind of space
  ("a\x00\u200bb", "a b", True),  # nor control or format characters
  ("Ⓐ team", "ⓐ", True),  # symbols have case too
  ("मुंबई भारत में है", "मुंबई", True),  # vowel signs are marks
  ("anything", "", False),
  ("anything", " \t", False),
  ("", "anything", False),
]


@pytest.mark.parametrize(("passage", "answer", "expected"), DPR)
def test_an_answer_is_found_token_by_token(passage, answer, expected):
  assert contains_answer(passage, [answer]) is expected
  assert contains_answer(passage, [answer], "squad") is expected


@pytest.mark.parametrize(
  ("passage", "answer"),
  [
    ("東京は日本の首都", "東京"),
    ("서울은 한국의 수도", "서울"),
    ("ประเทศไทยมี", "ไทย"),
    ("在Paris的", "paris"),
    ("他生于1990年。", "1990年"),
    ("“Old Faithful” erupts", '"Old Faithful"'),
    ("the ﬁfth ＣＤ，sold", "fifth cd, sold"),
    ("Pa\u00adris and Lon\u200bdon", "Paris and London"),
    ("او می\u200cخواهد برود", "میخواهد"),
    ("او می\u200cخواهد برود", "می\u200cخواهد"),
    ("in der Großen Straße", "GROSSEN STRASSE"),
    ("at −5 ℃ in it’s", "-5 °C in it's"),
    ("سنة ١٩٩٠", "1990"),
  ],
)
def test_an_answer_is_found_however_it_is_written(passage, answer):
  assert contains_answer(passage, [answer])
  assert contains_answer(passage, [answer], "numbers")
  # What equals an answer holds it.
  for variant in ("multilingual", "numbers"):
    assert exact_match(answer, [answer], variant) == 1.0
    assert contains_answer(answer, [answer], variant)


@pytest.mark.parametrize(
  ("passage", "answer", "expected"),
  [
    ("costs $5,000 today", "5", False),
    ("costs $5,000 today", "5000", True),
    ("costs 5000 today", "5,000", True),
    ("1.000.000 people", "1,000,000", True),
    ("pi is 3.14", "3", False),
    ("pi is 3.140", "3.14", True),
    ("it was -5 degrees", "5", False),
    ("it was −5 degrees", "-5", True),
    ("from 1990-1995 on", "1995", True),
    ("5km away", "5 km", True),
    ("the year 1990.", "1990", True),
  ],
)
def test_numbers_are_found_as_numbers_if_asked_for(passage, answer, expected):
  assert contains_answer(passage, [answer], "numbers") is expected


@pytest.mark.skipif(not DATA.exists(), reason=f"{DATA} is not there")
@pytest.mark.parametrize(
  # One of the English answers begins inside a word.
  ("language", "expected"),
  [("zh", (1190, 0)), ("en", (1189, 1))],
)
def test_answers_of_xquad_are_found_in_their_paragraphs(language, expected):
  text = (DATA / f"xquad.{language}.json").read_text()
  found = missed = 0
  for article in json.loads(text)["data"]:
    for paragraph in article["paragraphs"]:
      for question in paragraph["qas"]:
        answers = [answer["text"] for answer in question["answers"]]
        holds = contains_answer(paragraph["context"], answers)
        found, missed = found + holds, missed + (not holds)
  assert (found, missed) == expected


def naive_tokens(text):
  """One character after another, as DPR's regular expression reads them."""
  tokens, word = [], ""
  for char in unicodedata.normalize("NFD", text):
    category = unicodedata.category(char)
    if category[0] in ("L", "N", "M"):
      word += char
      continue
    if word:
      tokens.append(word)
    word = ""
    if category[0] not in ("Z", "C"):
      tokens.append(char)
  return [t.lower() for t in [*tokens, *([word] if word else [])]]


def test_answers_are_found_where_a_loop_over_tokens_finds_them():
  rng = np.random.default_rng(0)
  alphabet = [*"abAB  é.,-_1²'\n", "e\u0301", "Σ", "ς", "\u200d"]
  found = 0
  for _ in range(2000):
    passage = "".join(rng.choice(alphabet, 12))
    answer = "".join(rng.choice(alphabet, rng.integers(1, 4)))
    tokens, wanted = naive_tokens(passage), naive_tokens(answer)
    expected = bool(wanted) and any(
      tokens[i : i + len(wanted)] == wanted for i in range(len(tokens))
    )
    assert contains_answer(passage, [answer], "squad") == expected, passage
    found += expected
  assert 200 < found < 1800  # both outcomes were tried


def test_any_of_the_answers_will_do():
  assert contains_answer("Leningrad, 1924", ["Petrograd", "Leningrad"])
  assert not contains_answer("Leningrad, 1924", [])


def test_answer_recall_looks_at_the_first_k_passages():
  texts = [["no", "yes"], ["yes", "no"], ["no", "no"], []]
  answers = [["yes"]] * 4
  np.testing.assert_array_equal(
    answer_recall_at_k(texts, answers, 1), [0, 1, 0, 0]
  )
  np.testing.assert_array_equal(
    answer_recall_at_k(texts, answers, 2), [1, 1, 0, 0]
  )
  np.testing.assert_array_equal(
    answer_recall_at_k(texts, answers, 9), [1, 1, 0, 0]
  )


def test_each_question_has_its_own_answers():
  recall = answer_recall_at_k([["red"], ["red"]], [["red"], ["blue"]], 1)
  np.testing.assert_array_equal(recall, [1, 0])


def test_k_below_one_is_refused():
  with pytest.raises(ValueError, match="k=-1 passages; expected at least 1"):
    answer_recall_at_k([["a"]], [["a"]], -1)


def test_texts_and_answers_of_different_length_are_refused():
  with pytest.raises(
    ValueError, match="retrieved_texts has 2 questions, answers has 1"
  ):
    answer_recall_at_k([["a"], ["b"]], [["a"]], 1)


def test_one_string_in_place_of_a_list_of_answers_is_refused():
  with pytest.raises(TypeError, match=r"answers='Paris' .*Pass \['Paris'\]"):
    contains_answer("Paris", "Paris")
