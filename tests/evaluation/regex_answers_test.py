"""Answers as regular expressions match as DrQA's, with limits."""

import re
import time

import pytest

from rag_jax.config import Config
from rag_jax.config_rules import validate
from rag_jax.evaluation import regex_answers
from rag_jax.evaluation.regex_answers import check_patterns
from rag_jax.evaluation.regex_answers import is_right
from rag_jax.evaluation.regex_answers import occurs
from rag_jax.evaluation.report import AnswerRecord
from rag_jax.evaluation.report import summarise
from rag_jax.evaluation.retrieval import answer_recall_at_k

# Of CuratedTREC.
YEARS = (r"18(0[0-9]|1[0-9])", r"19\s?14")
MILES = (r"(9[0-9])(\.\d+)? million( mi(les)?)?",)


@pytest.mark.parametrize(
  ("text", "patterns", "found", "right"),
  [
    ("1805", YEARS, True, True),
    ("in 1805", YEARS, True, False),  # a prediction has to begin with it
    ("1805 AD", YEARS, True, True),
    ("1825", YEARS, False, False),
    ("19 14", YEARS, True, True),
    ("about 92.96 Million Miles away", MILES, True, False),
    ("92.96 MILLION", MILES, True, True),
    ("one\nParis", ("^paris$",), True, False),
    ("São Tomé", ("sa\u0303o tom[eé]",), True, True),
    ("", ("x*", ".*"), False, False),
    ("anything", ("x*",), False, False),  # matches nothing, everywhere
    ("  Paris ", ("Paris",), True, True),
  ],
)
def test_patterns_are_searched_in_passages_and_matched_to_predictions(
  text, patterns, found, right
):
  assert occurs(text, patterns) == found
  assert is_right(text, patterns) == right


@pytest.mark.parametrize(
  ("pattern", "message"),
  [
    ("(", "is no regular expression"),
    (r"\p{Nope}", "is no regular expression"),
    ("[a-", "is no regular expression"),
    ("(" * 5000 + ")" * 4999, "is no regular expression"),
    ("x" * 10_001, "has 10001 characters"),
    ("((a{1000}){1000}){1000}", "counts .* multiply to 1000000000"),
    ("(a|b){10001}", "counts .* multiply to 10001"),
    ("(?R)", "calls a part of itself"),
    ("(a|(?1))*", "calls a part of itself"),
  ],
)
def test_a_pattern_that_cannot_be_used_is_named_before_it_takes_memory(
  pattern, message
):
  start = time.monotonic()
  expected = rf"Question 7: The answer .*{message}.*Expected.*Correct it"
  with pytest.raises(ValueError, match=re.compile(expected, re.DOTALL)):
    check_patterns(["fine", pattern], "Question 7")
  assert time.monotonic() - start < 5


def test_a_pattern_without_end_is_given_up_once(monkeypatch, caplog):
  monkeypatch.setattr(regex_answers, "TIMEOUT_SECS", 0.05)
  slow, text = r"^(([a-z])+.)+[A-Z]([a-z])+$", "a" * 5000 + "1"
  start = time.monotonic()
  for _ in range(200):
    assert not occurs(text, [slow])
  assert time.monotonic() - start < 5
  assert occurs(text, [slow, "a1"])
  assert caplog.text.count("counts as not matching") == 1


def test_results_and_recall_use_the_patterns():
  def record(prediction):
    return AnswerRecord(
      question="When?",
      answers=YEARS,
      prediction=prediction,
      log_prob=0.0,
    )

  for variant, expected in (("regex", 0.5), ("multilingual", 0.0)):
    records = [record("1814"), record("1825")]
    results = summarise(records, variant=variant)
    assert results["test/exact_match"] == expected
    assert results["test/token_f1"] == expected
  texts = [["none", "in 1805"], ["1914", "x"], ["1825", "x"]]
  recall = answer_recall_at_k(texts, [YEARS] * 3, 2, "regex")
  assert recall.tolist() == [1, 1, 0]
  assert answer_recall_at_k(texts, [YEARS] * 3, 1, "regex").tolist() == [
    0,
    1,
    0,
  ]


def test_patterns_are_not_taught():
  config = Config()
  config.eval.answers = "regex"
  with pytest.raises(ValueError, match="no answer that can be taught"):
    validate(config)
  config.train.num_steps = 0
  config.train.validate_steps = 0
  validate(config)
