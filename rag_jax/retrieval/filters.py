"""Search among the passages whose metadata meets conditions, such as lang=en.

In: conditions as a user writes them, and any search. Out: the best passages
that meet all conditions. An index stores no metadata, so one index serves every
filter: it is searched for more passages than are needed, and those that do not
meet the conditions are dropped.
"""

from collections.abc import Callable, Iterable, Sequence
import decimal
import functools
import operator
import re
from typing import NamedTuple

from jaxtyping import Int
import numpy as np

from rag_jax.corpus.passages import Passage
from rag_jax.corpus.text_files import shorten
from rag_jax.retrieval import exact
from rag_jax.retrieval.index_core import Found


class Condition(NamedTuple):
  """A condition on the metadata of a passage."""

  name: str
  value: str
  sign: str = "="  # or ">=", "<=", ">", "<"

  def __str__(self) -> str:
    """Returns the condition as the user wrote it."""
    return f"{self.name}{self.sign}{self.value}"


Conditions = tuple[Condition, ...]  # all have to be met

_SHOWN = 5  # most values per name in a message
_COMPARE = {
  "=": operator.eq,
  ">=": operator.ge,
  "<=": operator.le,
  ">": operator.gt,
  "<": operator.lt,
}
_CONDITION = re.compile(r"([^=<>]+)(>=|<=|=|>|<)(.*)", re.DOTALL)
_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?([eE][+-]?\d{1,4})?", re.ASCII)
# Numbers as JSON and Python write them: "007" or "1.10" may be names.
_PLAIN = re.compile(
  r"-?(0|[1-9]\d*)(\.(0|\d*[1-9]))?([eE][+-]?\d{1,4})?", re.ASCII
)
_DATE = re.compile(r"\d{4}-\d\d(-\d\d([T ].*)?)?", re.DOTALL)
_YEAR = re.compile(r"\d{4}")


def parse_conditions(texts: Iterable[str]) -> Conditions:
  """Returns conditions like "lang=en" or "year>=1999".

  Args:
    texts: each is a name, one of = >= <= > < and a value. The value may be
      empty or contain these signs; no spaces are removed.

  Raises:
    ValueError: a text has no such sign, or !=, or no name, or a range has no
      value.
    TypeError: `texts` is one string.
  """
  if isinstance(texts, str):
    raise TypeError(
      f"The conditions {texts!r} are one string; expected a list of them. Pass"
      f" [{texts!r}]."
    )
  conditions = []
  for text in texts:
    match = _CONDITION.fullmatch(text)
    # "year!=1999" means "not equal", not the name "year!".
    named = match and not match[1].endswith("!")
    if not match or not named or (match[2] != "=" and not match[3]):
      raise ValueError(
        f"The filter {text!r} is not understood. Expected NAME=VALUE, such as"
        " lang=en, or a range such as 'year>=1999' (with >=, <=, > or <, in"
        " quotes for the shell), where NAME is a field of the metadata of the"
        " passages. Correct it, and pass several filters one by one."
      )
    conditions.append(Condition(match[1], match[3], match[2]))
  return tuple(conditions)


def meets(passage: Passage, conditions: Conditions) -> bool:
  """Returns whether the metadata of a passage meets all conditions.

  If a name occurs several times (from a list), one matching value is enough. A
  name that is missing, or was null, meets no condition.

  Two numbers are compared as numbers: 1999 equals 1999.0. But 007 does not
  equal 7, and 1.10 does not equal 1.1, because they may be names. A date such
  as 2024-05-01 is compared with a date, month or year, as precisely as the
  condition states it. Other values are compared as texts, for equality or
  alphabetical order. A text is in no range of numbers.
  """
  return all(
    any(
      name == condition.name and _compare(value, condition)
      for name, value in passage.metadata
    )
    for condition in conditions
  )


def _compare(value: str, condition: Condition) -> bool:
  compare = _COMPARE[condition.sign]
  if value == condition.value:
    return condition.sign in ("=", ">=", "<=")
  number, wanted = _number(value), _number(condition.value)
  numbers = number is not None and wanted is not None
  if condition.sign == "=":
    plain = _PLAIN.fullmatch(value) and _PLAIN.fullmatch(condition.value)
    return bool(numbers and plain and number == wanted)
  if numbers:
    return compare(number, wanted)
  if _DATE.fullmatch(value) and (
    _DATE.fullmatch(condition.value) or _YEAR.fullmatch(condition.value)
  ):
    return compare(value[: len(condition.value)], condition.value)
  return number is None and wanted is None and compare(value, condition.value)


@functools.lru_cache(maxsize=1 << 16)
def _number(text: str) -> decimal.Decimal | None:
  return decimal.Decimal(text) if _NUMBER.fullmatch(text) else None


def search_filtered(
  search: Callable[[Int[np.ndarray, "b"], int], Found],
  passages: Sequence[Passage],
  conditions: Conditions,
  *,
  num_questions: int,
  n_docs: int,
  wanted: Callable[[int], bool] | None = None,
) -> Found:
  """Returns the best `n_docs` passages that meet all conditions.

  It first searches for twice `n_docs` passages. For the questions that still
  lack some, it doubles the number each time, until they have enough, all
  passages were seen, or the search finds no more. With exact search the result
  equals a search among the passages that meet the conditions.

  Args:
    search: (rows of questions, how many passages) -> their ids and scores, best
      first; id -1 where it found no more. For instance
      `lambda rows, n: index.search(embeddings[rows], n)`.
    passages: row = passage id.
    conditions: the result of `parse_conditions`.
    num_questions: the number of questions (B).
    n_docs: how many passages to return per question (K).
    wanted: returns whether a passage meets the conditions; None for `meets`.

  Returns:
    Passage ids [B, K] int32 and scores [B, K] float32, best first. Short rows
    are padded with id -1 and the lowest float32.

  Raises:
    ValueError: `n_docs` is below 1.
  """
  if n_docs < 1:
    raise ValueError(
      f"n_docs={n_docs} passages per question were asked for; expected at least"
      " 1. Raise n_docs."
    )
  if wanted is None:
    wanted = lambda id_: meets(passages[id_], conditions)  # noqa: E731
  wanted = functools.cache(wanted)  # the same passages are found repeatedly
  best = [(np.zeros(0, np.int32), np.zeros(0, np.float32))] * num_questions
  lacking = np.arange(num_questions)
  depth = 2 * n_docs if conditions else n_docs
  while len(lacking):
    depth = min(depth, len(passages))
    ids, scores = search(lacking, depth)
    again = []
    for row, found, score in zip(lacking, ids, scores, strict=True):
      keep = [
        place
        for place, id_ in enumerate(found.tolist())
        if id_ >= 0 and wanted(id_)
      ][:n_docs]
      best[row] = found[keep], score[keep]
      if len(keep) < n_docs and found[-1] >= 0:  # it may find more
        again.append(row)
    if depth == len(passages):
      break
    lacking = np.array(again, int)
    depth *= 2
  return exact.stack_rows(best, n_docs)


def describe_metadata(
  passages: Sequence[Passage], conditions: Conditions
) -> str:
  """Returns the message for when no passage meets the conditions.

  It shows the existing values of each name, or, if a name does not exist, the
  existing names. It reads all passages.
  """
  shown = " and ".join(map(str, conditions))
  there: dict[str, set[str]] = {}
  for passage in passages:
    for name, value in passage.metadata:
      values = there.setdefault(name, set())
      if len(values) < _SHOWN:  # passages may all differ, as URLs do
        values.add(value)
  names = dict.fromkeys(condition.name for condition in conditions)
  known = [
    f"The values of {name!r} are like {shorten(sorted(there[name]), 200)}."
    for name in names
    if name in there
  ]
  if missing := [name for name in names if name not in there]:
    known.append(
      f"No passage has {shorten(missing, 200)}; there is metadata named"
      f" {shorten(sorted(there), 200)}."
    )
  return (
    f"None of {len(passages)} passages was found that meets {shown}."
    f" {' '.join(known)} Change the filter."
  )
