"""How well a predicted answer matches the answers that a person accepts.

In: strings. Out: numbers from 0 to 1, for one question.

Two answers are equal if their normalised texts are. There are three variants of
normalisation:

- "multilingual", the default: texts are folded (corpus/folding.py) and then
  normalised as for SQuAD, but with the punctuation of all scripts. In scripts
  without spaces each character is a word, as in MLQA (Lewis et al. 2020,
  https://arxiv.org/abs/1910.07475). ASCII text is normalised as for SQuAD,
  except that 1/2, 10^2 and 1_2 do not become 12 and 102.
- "squad": as published for SQuAD (Rajpurkar et al. 2016,
  https://arxiv.org/abs/1606.05250, section 6.1) and used by DPR and RAG: lower
  case, without ASCII punctuation, English articles and repeated spaces. Use it
  for results that are compared with those of papers.
- "numbers": as "multilingual", but numbers are compared by value: "1,000" is
  "1000" and "2.50" is "2.5", while "3.5" is not "35" and "-5" is not "5".

With "regex", answers are regular expressions: see regex_answers.py.

In the three variants, an answer that would become empty keeps its articles, and
its punctuation if need be ("A", "The Who?", "%"). An empty prediction equals no
answer; the published script gives such pairs 1.0.
"""

from collections import Counter
from collections.abc import Sequence
import dataclasses
import functools
import re
import string
import unicodedata

from rag_jax.config import EvalConfig
from rag_jax.config_rules import check_choice
from rag_jax.corpus.folding import fold
from rag_jax.corpus.words import units
from rag_jax.evaluation.regex_answers import REGEX
from rag_jax.evaluation.regex_answers import is_right

_SETTINGS = {field.name: field for field in dataclasses.fields(EvalConfig)}
VARIANTS: tuple[str, ...] = _SETTINGS["answers"].metadata["choices"]

# As MLQA drops them.
_ARTICLES = {
  "en": re.compile(r"\b(?:a|an|the)\b"),
  "es": re.compile(r"\b(?:un|una|unos|unas|el|la|los|las)\b"),
  "de": re.compile(
    r"\b(?:ein|eine|einen|einem|eines|einer|der|die|das|den|dem|des)\b"
  ),
  "vi": re.compile(r"\b(?:của|là|cái|chiếc|những)\b"),
  "ar": re.compile("(?<!\\w)ال"),
  "": re.compile("(?!)"),  # matches nothing
}
_ASCII_PUNCTUATION = str.maketrans("", "", string.punctuation)
_PUNCTUATION = _ASCII_PUNCTUATION | dict.fromkeys(
  code
  for code in range(0x20000)  # there is none beyond
  if unicodedata.category(chr(code))[0] == "P"
)
# One half is not 12, nor is 10 squared 102.
_FRACTION_OR_POWER = re.compile(r"(?<=[0-9])[/^_](?=[0-9])")
# Separators between digits, except the points and signs of numbers.
_BETWEEN_DIGITS = re.compile(r"(?<=[0-9])[^\w\s.](?=-?[0-9])")
_NO_POINT_OR_SIGN = re.compile(
  r"\.(?![0-9])|(?<=[^0-9\s($-])\."
  r"|-(?![$\u00a3\u00a5\u20ac]?\.?[0-9])|(?<=[^\s\"'(\[{$\u00a3\u00a5\u20ac])-"
)
_OTHER_PUNCTUATION = {
  code: nothing
  for code, nothing in _PUNCTUATION.items()
  if chr(code) not in ".-"
}


def check_variant(variant: str, language: str = "en") -> list[str]:
  """Returns messages on what is wrong with the two settings; [] if nothing."""
  problems = [
    check_choice("eval.answers", variant, VARIANTS),
    check_choice("eval.language", language, _ARTICLES),
  ]
  return [problem for problem in problems if problem]


@functools.lru_cache(maxsize=1 << 14)
def normalize_answer(
  text: str, variant: str = "multilingual", language: str = "en"
) -> str:
  """Returns the normalised `text`; "" if it has no visible character.

  With "squad", as published, a character that is not drawn is one like others.

  Args:
    text: an answer.
    variant: one of `VARIANTS`, which the docstring of this file describes.
    language: its articles are removed, for instance "en"; "" removes none. With
      "squad" they are always the English ones.

  Raises:
    ValueError: there is no such variant or language.
  """
  if problems := check_variant(variant, language):
    raise ValueError(" ".join(problems))
  if variant == "squad":
    # Composed first: between a letter and a combining accent there is a word
    # boundary, so the "a" of a decomposed "a-grave" reads as an article.
    text = unicodedata.normalize("NFC", text).lower()
    bare = text.translate(_ASCII_PUNCTUATION)
    without = _ARTICLES["en"].sub(" ", bare)
    choices = (" ".join(t.split()) for t in (without, bare, text))
  else:
    numbers = variant == "numbers"
    text = fold(text, join_digits=numbers)
    bare = _without_punctuation(text, numbers)
    without = _ARTICLES[language].sub(" ", bare)
    choices = (
      " ".join(units(t, numbers=numbers)) for t in (without, bare, text)
    )
  return next(filter(None, choices), "")


def _without_punctuation(text: str, numbers: bool) -> str:
  if not numbers:
    return _FRACTION_OR_POWER.sub(" ", text).translate(_PUNCTUATION)
  text = _BETWEEN_DIGITS.sub(" ", text)
  return _NO_POINT_OR_SIGN.sub("", text).translate(_OTHER_PUNCTUATION)


def exact_match(
  prediction: str,
  answers: Sequence[str],
  variant: str = "multilingual",
  language: str = "en",
) -> float:
  """Returns 1.0 if `prediction` equals one of `answers` once normalised.

  An empty prediction equals none.

  Raises:
    TypeError: `answers` is one string, not a list of them.
    ValueError: there are no answers, or no such variant.
  """
  _check_answers(answers)
  if variant == REGEX:
    return float(is_right(prediction, answers))
  ours = normalize_answer(prediction, variant, language)
  equal = (ours == normalize_answer(a, variant, language) for a in answers)
  return float(bool(ours) and any(equal))


def token_f1(
  prediction: str,
  answers: Sequence[str],
  variant: str = "multilingual",
  language: str = "en",
) -> float:
  """Returns the F1 of the words shared with an answer, for the best answer.

  Words are those of the normalised strings, counted as often as they occur. An
  empty prediction has an F1 of 0.

  Raises:
    TypeError: `answers` is one string, not a list of them.
    ValueError: there are no answers, or no such variant.
  """
  _check_answers(answers)
  if variant == REGEX:
    return float(is_right(prediction, answers))
  words = normalize_answer(prediction, variant, language).split()
  return max(
    _f1(words, normalize_answer(a, variant, language).split()) for a in answers
  )


def _f1(predicted: list[str], expected: list[str]) -> float:
  num_shared = (Counter(predicted) & Counter(expected)).total()
  # The harmonic mean of shared / predicted and shared / expected.
  return 2.0 * num_shared / max(len(predicted) + len(expected), 1)


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
