"""An answer as a person or a program reads it.

In: an `Answer`. Out: text of at most 80 columns, or JSON.
"""

import dataclasses
import json
import math
import textwrap
import unicodedata

from rag_jax.decoding.answerer import Answer

_WIDTH = 80
_MARK = "[...]"


def explain(answer: Answer) -> str:
  """Returns the answer, then the passages that it was read from.

  `p(z|x)` is the prior: how much the retriever trusted the passage before the
  answer; `p(z|x,y)` the posterior: how well the passage explains it.
  """
  probability = math.exp(answer.log_prob)
  head = f"{answer.text or '(no answer)'}   (p = {probability:.2f})"
  lines = textwrap.wrap(head, _WIDTH) or [head]
  if answer.question_cut:
    lines += textwrap.wrap(
      "Note: the question is longer than the model takes; its end was not read"
      " (data.question_length, data.context_length).",
      _WIDTH,
    )
  if not answer.docs:
    return "\n".join([*lines, "(closed book: no passages were read)"]) + "\n"
  lines += ["", "p(z|x)  p(z|x,y)  passage"]
  for doc in answer.docs:
    lines.append(
      f"{doc.prior:6.3f}  {doc.posterior:8.3f}  "
      + _shorten(f"{_clean(doc.title)} [{_clean(doc.id)}]", _WIDTH - 18)
    )
    lines += textwrap.wrap(
      _clean(doc.text),
      _WIDTH,
      initial_indent=" " * 18,
      subsequent_indent=" " * 18,
      max_lines=3,
      placeholder=" " + _MARK,
    )
  return "\n".join(lines) + "\n"


def to_json(answer: Answer) -> str:
  """Returns the answer, its passages and every probability as one line."""
  return json.dumps(dataclasses.asdict(answer), ensure_ascii=False)


def _clean(text: str) -> str:
  """Returns `text` without what could move a terminal's cursor."""
  text = " ".join(text.split())
  return "".join(c for c in text if unicodedata.category(c)[0] != "C")


def _shorten(text: str, width: int) -> str:
  return text if len(text) <= width else text[: width - 6] + " " + _MARK
