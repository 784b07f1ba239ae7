r"""Answers that are regular expressions, as in CuratedTREC.

In: a text and patterns. Out: whether one of them matches. Patterns come from
untrusted files, so that time and memory of each are limited.

Source: DrQA (Chen et al. 2017, https://arxiv.org/abs/1704.00051), whose rules
DPR and RAG use: a passage holds an answer if a pattern occurs in it, and a
prediction is right if a pattern matches its beginning. Case is ignored, and ^
and $ match at line ends.
"""

from collections.abc import Iterable, Sequence
import functools
import re
import unicodedata

from absl import logging
import regex

REGEX = "regex"  # among the variants of answers.py

MAX_CHARS = 10_000  # of a pattern
MAX_COUNT = 10_000  # the product of its {n}, which are expanded in memory
TIMEOUT_SECS = 1.0  # for one pattern and one text

_FLAGS = regex.IGNORECASE | regex.UNICODE | regex.MULTILINE
_COUNTS = re.compile(r"\{\s*(\d+)")
_CALLS_ITSELF = re.compile(r"\(\?(?:R|&|P>|[+-]?\d)")


@functools.lru_cache(maxsize=10_000)
def _compile(pattern: str) -> regex.Pattern[str]:
  """Returns the compiled pattern.

  Raises:
    ValueError: it is not valid, or could need too much memory.
  """
  shown = repr(pattern[:100])
  remedy = (
    "Correct it, or choose another eval.answers if the answers are plain text."
  )
  size = 1
  for count in _COUNTS.findall(pattern[:MAX_CHARS]):
    size *= max(int(count), 1)
  if len(pattern) > MAX_CHARS or size > MAX_COUNT:
    raise ValueError(
      f"The answer {shown} has {len(pattern)} characters, and its counts like"
      f" {{3}} multiply to {size}. Expected a regular expression of at most"
      f" {MAX_CHARS} characters and counts up to {MAX_COUNT}, since counts are"
      f" expanded in memory. {remedy}"
    )
  if _CALLS_ITSELF.search(pattern):
    raise ValueError(
      f"The answer {shown} calls a part of itself, as (?R) or (?1) do. Expected"
      f" a regular expression without: it could run for ever. {remedy}"
    )
  try:
    return regex.compile(unicodedata.normalize("NFC", pattern), _FLAGS)
  except (regex.error, RecursionError, OverflowError, ValueError) as error:
    raise ValueError(
      f"The answer {shown} is no regular expression ({error}). Expected one, as"
      f" in CuratedTREC. {remedy}"
    ) from error


def check_patterns(answers: Iterable[str], where: str) -> None:
  """Raises `ValueError` unless each answer is a regular expression.

  Args:
    answers: of one question.
    where: the question, for the message.
  """
  for pattern in answers:
    try:
      _compile(pattern)
    except ValueError as error:
      raise ValueError(f"{where}: {error}") from error


def occurs(text: str, patterns: Sequence[str]) -> bool:
  """Returns whether a pattern matches anywhere in `text`."""
  return any(_matches(pattern, text, anywhere=True) for pattern in patterns)


def is_right(prediction: str, patterns: Sequence[str]) -> bool:
  """Returns whether a pattern matches the beginning of a prediction.

  Surrounding spaces are ignored, and an empty prediction is never right.
  """
  prediction = prediction.strip()
  return bool(prediction) and any(
    _matches(pattern, prediction, anywhere=False) for pattern in patterns
  )


_too_slow: set[str] = set()  # patterns that timed out and are not tried again


def _matches(pattern: str, text: str, *, anywhere: bool) -> bool:
  if pattern in _too_slow:
    return False
  compiled = _compile(pattern)
  match = compiled.search if anywhere else compiled.match
  try:
    found = match(unicodedata.normalize("NFC", text), timeout=TIMEOUT_SECS)
  except TimeoutError:
    _too_slow.add(pattern)
    logging.warning(
      "The answer %.100r took more than %.1f s with one text: it counts as not"
      " matching from now on. Expected a regular expression without nested"
      " repetitions. Correct it, and measure again.",
      *(pattern, TIMEOUT_SECS),
    )
    return False
  # A match of the empty string, like that of "x*", does not count.
  return found is not None and bool(found.group())
