"""Formats an answer, for a person or for a program.

In: an `Answer`. Out: text of at most 80 columns, or JSON.
"""

from collections.abc import Iterator
import dataclasses
import itertools
import math
from typing import Any
import unicodedata

from rag_jax.decoding.answerer import Answer
from rag_jax.terminal import json_line
from rag_jax.terminal import one_line

_WIDTH = 80  # columns
_INDENT = 18  # of the lines below "passage"
_TEXT_LINES = 3  # lines of a passage's text that are shown
# Answers with a lower probability are called unsure. Nearly all answers of the
# quickstart to made-up names are below it, and nearly all right ones above.
SURE = 0.7
_MARK = " [...]"


def explain(
  answer: Answer, sure: float = SURE, least_score: float = -math.inf
) -> str:
  """Returns the answer and the passages that were read for it, as text.

  The text also says if the model is not sure: see `is_sure`. `p(z|x)` is the
  prior, which the retriever gives a passage before an answer is written.
  `p(z|x,y)` is the posterior: how much of the answer the passage explains.
  """
  probability = math.exp(answer.log_prob)
  text = one_line(answer.text) or "(no answer)"
  doubt = "" if is_sure(answer, sure, least_score) else ", not sure"
  lines = list(_wrap(f"{text}   (p = {probability:.2f}{doubt})", _WIDTH))
  if doubt:
    why = f"p is below {sure:g}"
    if probability >= sure:
      why = (
        f"the best passage scores {_best(answer):.2f}; for 99.5 % of the"
        f" validation questions it scores {least_score:.2f} or more"
      )
    lines += _wrap(
      f"The model is not sure: {why}. Perhaps no passage answers the question.",
      _WIDTH,
    )
  if answer.labels:
    chosen = ", ".join(f"{one_line(x)} {p:.3f}" for x, p in answer.labels)
    lines += _wrap(f"Of the labels: {chosen}", _WIDTH)
  if answer.question_cut:
    lines += _wrap(
      "Note: the question is longer than the model takes; its end was not read"
      " (data.question_length, data.context_length).",
      _WIDTH,
    )
  if not answer.docs:
    return "\n".join([*lines, "(closed book: no passages were read)"]) + "\n"
  lines += ["", "p(z|x)  p(z|x,y)  passage"]
  for doc in answer.docs:
    title = f"{one_line(doc.title)} [{one_line(doc.id)}]".lstrip()
    lines.append(
      f"{doc.prior:6.3f}  {doc.posterior:8.3f}  "
      + _shorten(title, _WIDTH - _INDENT)
    )
    lines += [" " * _INDENT + line for line in _first_lines(one_line(doc.text))]
  return "\n".join(lines) + "\n"


def is_sure(
  answer: Answer, sure: float = SURE, least_score: float = -math.inf
) -> bool:
  """Returns whether the model is sure of an answer.

  Args:
    answer: with the documents that were read for it.
    sure: the least probability of a sure answer.
    least_score: the least score of its best document. Without this limit, the
      generator can be sure of an answer that it copies from a passage about
      something else: about Atlantic County, if asked about Atlantis.
  """
  return math.exp(answer.log_prob) >= sure and _best(answer) >= least_score


def _best(answer: Answer) -> float:
  return max((doc.score for doc in answer.docs), default=math.inf)


def to_json(
  answer: Answer,
  sure: float = SURE,
  least_score: float = -math.inf,
  **more: Any,
) -> str:
  """Returns the answer, its passages and every probability as one line.

  Args:
    answer: with the documents that were read for it.
    sure: as in `is_sure`.
    least_score: as in `is_sure`.
    **more: fields that come after those of the answer.
  """
  found = is_sure(answer, sure, least_score)
  return json_line(dataclasses.asdict(answer) | {"sure": found} | more)


def _columns(text: str) -> int:
  """Returns how wide a terminal shows `text`."""
  return sum(
    0
    if unicodedata.category(c)
    in ("Mn", "Me", "Cf")  # combining or invisible characters
    else 1 + (unicodedata.east_asian_width(c) in "WF")
    for c in text
  )


def _fit(text: str, width: int) -> int:
  """Returns how many characters of `text` take at most `width` columns."""
  sizes = itertools.accumulate(_columns(c) for c in text)
  return next((i for i, size in enumerate(sizes) if size > width), len(text))


def _wrap(text: str, width: int) -> Iterator[str]:
  """Yields lines of at most `width` columns; textwrap counts characters."""
  while text:
    end = _fit(text, width)
    space = text.rfind(" ", 0, end + 1) if end < len(text) else -1
    end = space if space > 0 else end
    yield text[:end].rstrip()
    text = text[end:].lstrip()


def _first_lines(text: str) -> list[str]:
  width = _WIDTH - _INDENT
  lines = list(itertools.islice(_wrap(text, width), _TEXT_LINES + 1))
  last = _TEXT_LINES - 1
  if len(lines) > last:
    lines[last:] = [_shorten(" ".join(lines[last:]), width)]
  return lines


def _shorten(text: str, width: int) -> str:
  if _columns(text) <= width:
    return text
  return next(_wrap(text, width - len(_MARK))) + _MARK
