"""A filtered search, against a search of the filtered passages alone."""

import itertools
import re

from indexes import exact
import numpy as np
import pytest

from rag_jax.corpus.passages import Passage
from rag_jax.corpus.passages import PassageList
from rag_jax.retrieval.bm25 import Bm25Index
from rag_jax.retrieval.filters import Condition
from rag_jax.retrieval.filters import describe_metadata
from rag_jax.retrieval.filters import meets
from rag_jax.retrieval.filters import parse_conditions
from rag_jax.retrieval.filters import search_filtered

B, P, R = 9, 200, 5
ENGLISH = (Condition("lang", "en"),)


def corpus(seed=0):
  """Returns passages of two languages and five years."""
  rng = np.random.default_rng(seed)
  langs = rng.choice(["en", "de"], size=P, p=[0.1, 0.9])
  years = rng.integers(2020, 2025, size=P)
  return [
    Passage(str(i), "", "text", (("lang", str(lang)), ("year", str(year))))
    for i, (lang, year) in enumerate(zip(langs, years, strict=True))
  ]


def indexed(seed=0):
  rng = np.random.default_rng(seed)
  embeddings = rng.normal(size=(P, R)).astype(np.float32)
  return exact(embeddings), rng.normal(size=(B, R)).astype(np.float32)


@pytest.mark.parametrize("n_docs", [1, 3, 12])
@pytest.mark.parametrize(
  "texts", [[], ["lang=en"], ["lang=de", "year=2021"], ["year=2020"]]
)
def test_the_result_is_that_of_searching_the_filtered_passages(texts, n_docs):
  passages, (index, questions) = corpus(), indexed()
  conditions = parse_conditions(texts)
  ids, scores = search_filtered(
    lambda rows, n: index.search(questions[rows], n),
    passages,
    conditions,
    num_questions=B,
    n_docs=n_docs,
  )
  rows = [
    i
    for i, p in enumerate(passages)
    if all(dict(p.metadata)[text[:4]] == text[5:] for text in texts)
  ]
  expected, expected_scores = exact(index.embeddings[rows]).search(
    questions, n_docs
  )
  np.testing.assert_array_equal(ids, np.array(rows)[expected])
  np.testing.assert_array_equal(scores, expected_scores)
  assert (ids.dtype, scores.dtype) == (np.int32, np.float32)


def test_the_search_is_widened_for_those_that_lack_passages_alone():
  passages, (index, questions) = corpus(), indexed()
  asked = []

  def search(rows, n):
    asked.append((rows.tolist(), n))
    return index.search(questions[rows], n)

  search_filtered(search, passages, ENGLISH, num_questions=B, n_docs=3)
  assert [n for _, n in asked] == [6 * 2**i for i in range(len(asked))]
  assert len(asked) > 2
  assert asked[0][0] == list(range(B))
  for (before, _), (after, _) in itertools.pairwise(asked):
    assert set(after) <= set(before)
  assert len(asked[-1][0]) < B


def test_without_conditions_as_many_are_searched_for_as_are_wanted():
  passages, (index, questions) = corpus(), indexed()
  asked = []

  def search(rows, n):
    asked.append(n)
    return index.search(questions[rows], n)

  search_filtered(search, passages, (), num_questions=B, n_docs=3)
  assert asked == [3]


def test_any_search_can_be_filtered():
  passages = corpus()
  bm25 = Bm25Index.build(passages, passages_fingerprint="")
  questions = ["text", "unheard", "text unheard"]
  ids, _ = search_filtered(
    lambda rows, n: bm25.search([questions[i] for i in rows], n),
    passages,
    ENGLISH,
    num_questions=3,
    n_docs=4,
  )
  english = [i for i, p in enumerate(passages) if ("lang", "en") in p.metadata]
  # All tie, but none has the unheard word.
  assert ids.tolist() == [english[:4], [-1] * 4, english[:4]]


def test_a_search_that_finds_no_more_is_not_asked_for_more():
  asked = []

  def search(rows, n):
    asked.append(n)
    ids = np.full((len(rows), n), -1, np.int32)
    ids[:, :2] = 3, 7
    return ids, np.zeros(ids.shape, np.float32)

  found, _ = search_filtered(
    search, corpus(), ENGLISH, num_questions=2, n_docs=4
  )
  assert asked == [8]
  assert found.shape == (2, 4)


FEW = PassageList(
  [
    Passage("a", "", "text", (("lang", "en"),)),
    Passage("b", "", "text", (("lang", "de"), ("lang", "fr"))),
    Passage("c", "", "text"),
  ],
  "test",
)


def search_few(rows, n):
  ids = np.tile(np.array([2, 1, 0], np.int32)[:n], (len(rows), 1))
  return ids, -ids.astype(np.float32)


def filtered_few(texts, n_docs=2):
  return search_filtered(
    search_few,
    FEW,
    parse_conditions(texts),
    num_questions=2,
    n_docs=n_docs,
  )


@pytest.mark.parametrize(
  "text", ["=x", "lang", "year>=", "year!=1999", "!=x", ""]
)
def test_a_condition_with_another_sign_is_refused(text):
  with pytest.raises(ValueError, match=f"filter '{text}' is not understood"):
    parse_conditions([text])


def test_fewer_passages_than_asked_for_are_fewer():
  ids, scores = filtered_few(["lang=en"])
  assert ids.tolist() == [[0, -1]] * 2
  assert scores[:, 0].tolist() == [-0.0] * 2
  assert np.all(scores[:, 1] == np.finfo(np.float32).min)
  assert filtered_few(["lang=fr"], 9)[0].tolist() == [[1] + [-1] * 8] * 2
  assert filtered_few([], 4)[0].tolist() == [[2, 1, 0, -1]] * 2
  assert filtered_few(["lang=es"])[0].tolist() == [[-1, -1]] * 2


@pytest.mark.parametrize(
  ("texts", "message"),
  [
    (
      ["lang=es"],
      r"None of 3 .*lang=es. The values of 'lang' .*'de', 'en', 'f",
    ),
    (
      ["land=en", "x>1"],
      r"land=en and x>1. No passage has \['land', 'x'\].*\['l",
    ),
  ],
)
def test_where_nothing_meets_a_filter_it_is_said_what_there_is(texts, message):
  said = describe_metadata(FEW, parse_conditions(texts))
  assert re.search(message, said), said


def test_gaps_of_an_index_are_never_a_passage():
  def search(rows, n):
    ids = np.tile(np.array([1, -1, -1], np.int32)[:n], (len(rows), 1))
    return ids, np.zeros(ids.shape, np.float32)

  ids, _ = search_filtered(search, FEW, (), num_questions=1, n_docs=2)
  assert ids.tolist() == [[1, -1]]


def test_no_questions_find_nothing():
  ids, scores = search_filtered(search_few, FEW, (), num_questions=0, n_docs=2)
  assert (ids.shape, scores.shape) == ((0, 2), (0, 2))


@pytest.mark.parametrize(
  ("texts", "row", "expected"),
  [
    ([], 2, True),
    (["lang=en"], 0, True),
    (["lang=EN"], 0, False),
    (["lang=e"], 0, False),
    (["lang=fr"], 1, True),  # the second value of that name
    (["lang=de", "lang=fr"], 1, True),
    (["lang=de", "lang=en"], 1, False),
    (["lang="], 2, False),  # no value is not an empty one
  ],
)
def test_conditions_are_met_by_equal_strings(texts, row, expected):
  assert meets(FEW[row], parse_conditions(texts)) is expected


def test_a_value_may_hold_an_equals_sign_or_nothing():
  assert parse_conditions(["url=a?b=c>d", "x=", "y>==1"]) == (
    Condition("url", "a?b=c>d"),
    Condition("x", ""),
    Condition("y", "=1", ">="),
  )


@pytest.mark.parametrize(
  ("value", "condition", "expected"),
  [
    ("1999", "=1999.0", True),
    ("1999.0", "=1999", True),
    ("1999", "=1.999e3", True),
    ("-0.5", "=-5e-1", True),
    ("1999", "=1999.5", False),
    ("007", "=7", False),  # those may be names
    ("1.10", "=1.1", False),
    ("1.10", "=1.10", True),
    ("1e9999", "=1e9998", False),
    ("true", "=true", True),
    ("true", "=1", False),
    ("1999", ">=1999", True),
    ("1999.0", ">=1999", True),
    ("1999", ">1999.0", False),
    ("999", ">=1999", False),  # not as texts
    ("10000", ">1999", True),
    ("-3", "<0", True),
    ("12.50", "<=12.5", True),
    ("about 1999", ">=1999", False),
    ("", ">=0", False),
    ("2021-03-01", ">=2021", True),
    ("2021-03-01", "<=2021", True),  # a day of that year
    ("2021-03-01", ">2021", False),
    ("2021-03-01", ">2021-02", True),
    ("2021-03-01T10:00", "<2021-03-02", True),
    ("2021-03-01", "<2021-03-01T10:00", True),
    ("2021-03-01", ">=7", False),
    ("pear", ">=apple", True),
    ("pear", "<apple", False),
    ("pear", "<=pear", True),
  ],
)
def test_values_are_compared_as_what_they_are(value, condition, expected):
  passage = Passage("a", "", "text", (("x", "other"), ("v", value)))
  assert meets(passage, parse_conditions([f"v{condition}"])) is expected
  assert not meets(passage, parse_conditions([f"w{condition}"]))  # is absent


@pytest.mark.parametrize("text", ["lang", "", "=en", ">=3", "year>", "year>="])
def test_a_filter_that_is_not_understood_is_refused(text):
  with pytest.raises(ValueError, match=f"filter '{text}' .*NAME=VALUE, such"):
    parse_conditions(["a=b", text])


def test_one_string_is_no_list_of_filters():
  with pytest.raises(TypeError, match="'lang=en' are one string; expected a"):
    parse_conditions("lang=en")


@pytest.mark.parametrize("n_docs", [0, -1])
def test_less_than_one_passage_is_refused(n_docs):
  with pytest.raises(
    ValueError, match=f"n_docs={n_docs} .*expected at least 1"
  ):
    filtered_few([], n_docs)
