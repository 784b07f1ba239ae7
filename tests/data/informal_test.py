"""Questions as people type them, against every form that one can take."""

import numpy as np
import pytest

from rag_jax.data.informal import informal

FRANCE = "What is the capital of France?"


def forms(question):
  return {informal(question, np.random.default_rng(i)) for i in range(200)}


def test_case_contraction_and_question_mark_change_independently():
  assert forms(FRANCE) == {
    "What is the capital of France?",
    "What is the capital of France",
    "What's the capital of France?",
    "What's the capital of France",
    "what is the capital of france?",
    "what is the capital of france",
    "what's the capital of france?",
    "what's the capital of france",
  }


@pytest.mark.parametrize(
  ("question", "expected"),
  [
    ("Lyon: where is it?", {"Lyon: where is it?", "Lyon: where is it"}),
    ("WHO IS she?", {"WHO's she?", "who's she"}),
    ("Somewhat is left", {"Somewhat is left", "somewhat is left"}),
    ("?", {"?"}),
  ],
)
def test_only_whole_question_words_are_contracted_and_something_stays(
  question, expected
):
  assert expected <= forms(question)
  assert all(form for form in forms(question))
  assert not any("somewhat's" in form.lower() for form in forms(question))
