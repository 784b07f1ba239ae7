"""Questions as people type them: "what's the capital of france".

In: a question as it is written in a data set. Out: the same question, at random
in lower case, contracted, or without its question mark. A generator that has
seen both forms in training can answer both.
"""

import re

import numpy as np

_CONTRACTED = re.compile(r"\b(what|where|who|how|when) is\b", re.IGNORECASE)


def informal(question: str, rng: np.random.Generator) -> str:
  """Returns `question` after three changes, each with probability 1/2."""
  lower, contract, unmarked = rng.random(3) < 0.5
  if contract:
    question = _CONTRACTED.sub(r"\1's", question)
  if unmarked:
    question = question.rstrip("? ") or question
  return question.lower() if lower else question
