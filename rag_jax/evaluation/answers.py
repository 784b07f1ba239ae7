"""How well a predicted answer matches the answers that a person accepts.

In: strings. Out: numbers from 0 to 1, for one question.

Source: Rajpurkar et al. 2016, "SQuAD: 100,000+ Questions for Machine
Comprehension of Text", https://arxiv.org/abs/1606.05250, section 6.1. As there,
only the punctuation marks of ASCII are dropped and accents are kept.
"""

from collections import Counter
from collections.abc import Sequence
import re
import string
import unicodedata

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def normalize_answer(text: str) -> str:
  """Returns `text` lower case, without punctuation, articles, extra spaces."""
  # Composed first: between a letter and a combining accent there is a word
  # boundary, so the first letter of a decomposed "a-grave" reads as an article.
  text = unicodedata.normalize("NFC", text).lower()
  text = text.translate(_NO_PUNCTUATION)
  return " ".join(_ARTICLES.sub(" ", text).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
  """Returns 1.0 if `prediction` equals one of `answers` once normalised.

  Raises:
    TypeError: `answers` is one string, not a list of them.
    ValueError: there are no answers.
  """
  _check_answers(answers)
  normalized = normalize_answer(prediction)
  return float(any(normalized == normalize_answer(a) for a in answers))


def token_f1(prediction: str, answers: Sequence[str]) -> float:
  """Returns the F1 of shared words with the answer where it is highest.

  Words are those of the normalised strings, counted as often as they occur. A
  string without any word matches only another without any.

  Raises:
    TypeError: `answers` is one string, not a list of them.
    ValueError: there are no answers.
  """
  _check_answers(answers)
  words = normalize_answer(prediction).split()
  return max(_f1(words, normalize_answer(a).split()) for a in answers)


def _f1(predicted: list[str], expected: list[str]) -> float:
  if not predicted or not expected:
    return float(predicted == expected)
  num_shared = (Counter(predicted) & Counter(expected)).total()
  # The harmonic mean of shared / predicted and shared / expected.
  return 2.0 * num_shared / (len(predicted) + len(expected))


def _check_answers(answers: Sequence[str]) -> None:
  if isinstance(answers, str):
    raise TypeError(
      f"answers={answers!r} is one string; expected a list of them, since a"
      f" question may have several answers. Pass [{answers!r}]."
    )
  if not answers:
    raise ValueError(
      "The question has no answers; at least one is needed to judge a"
      " prediction. Remove such questions from the data."
    )
