"""Search among the passages whose metadata is as asked for, such as lang=en.

In: conditions as a user writes them, and any search. Out: the best passages
that meet all conditions. An index knows no metadata, so that one index serves
every filter: more passages are searched for than are wanted, and those that do
not meet the conditions are dropped.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Literal

from jaxtyping import Float, Int
import numpy as np

from rag_jax.corpus.passages import Passage
from rag_jax.corpus.records import shorten
from rag_jax.retrieval import exact

Conditions = tuple[tuple[str, str], ...]  # (name, value); all have to be met
Found = tuple[Int[np.ndarray, "B K"], Float[np.ndarray, "B K"]]

_SHOWN = 5  # values of a name, in a message
_LOWEST = np.finfo(np.float32).min


def parse_conditions(texts: Iterable[str]) -> Conditions:
  """Returns the names and values of conditions like "lang=en".

  Args:
    texts: a name, "=" and a value each. The value may be empty or hold more
      "="; nothing is trimmed.

  Raises:
    ValueError: one has no "=", or nothing before it.
    TypeError: `texts` is one string.
  """
  if isinstance(texts, str):
    raise TypeError(
      f"The conditions {texts!r} are one string; expected a list of them. Pass"
      f" [{texts!r}]."
    )
  conditions = []
  for text in texts:
    name, sign, value = text.partition("=")
    if not (name and sign):
      raise ValueError(
        f"The filter {text!r} is not understood. Expected NAME=VALUE, such as"
        " lang=en, where NAME is a field of the passages' metadata. Correct it,"
        " and write several filters one by one."
      )
    conditions.append((name, value))
  return tuple(conditions)


def meets(passage: Passage, conditions: Conditions) -> bool:
  """Returns whether the metadata has every name with its value, as strings.

  A name that is there several times has several values, and one of them is
  enough. No conditions are met by every passage.
  """
  return set(conditions) <= set(passage.metadata)


def search_filtered(
  search: Callable[[Int[np.ndarray, "b"], int], Found],
  passages: Sequence[Passage],
  conditions: Conditions,
  *,
  num_questions: int,
  n_docs: int,
  too_few: Literal["fail", "fill"] = "fail",
) -> Found:
  """Returns the best `n_docs` passages that meet all conditions.

  First twice `n_docs` are searched for, then, for the questions that still lack
  some, twice as many each time, until they have them or all passages were seen.
  With an exact search the result is that of searching these passages alone.

  Args:
    search: (numbers of some questions, how many passages) -> their ids and
      scores, best first. For instance
      `lambda rows, n: index.search(embeddings[rows], n)`.
    passages: row = passage id.
    conditions: of `parse_conditions`.
    num_questions: how many there are (B).
    n_docs: how many passages to return for each question (K).
    too_few: what to do for a question for which fewer meet the conditions:
      "fail", or "fill" its row up with id -1 and the lowest float32.

  Returns:
    Passage ids [B, K] int32 and scores [B, K] float32, best first.

  Raises:
    ValueError: fewer than `n_docs` passages meet the conditions and `too_few`
      is "fail", there are fewer passages at all, or `too_few` is neither.
  """
  if too_few not in ("fail", "fill"):
    raise ValueError(
      f"too_few={too_few!r} is not one of ['fail', 'fill']. Expected what to do"
      " where fewer than n_docs passages meet the conditions."
    )
  if not 1 <= n_docs <= len(passages):
    raise ValueError(
      f"n_docs={n_docs} passages a question were asked for; expected 1 to"
      f" {len(passages)}, all passages. Change n_docs or index more passages."
    )
  met: dict[int, bool] = {}  # of the passages that were found so far

  def wanted(id_: int) -> bool:
    if id_ < 0:
      return False
    if id_ not in met:
      met[id_] = meets(passages[id_], conditions)
    return met[id_]

  best = [(np.zeros(0, np.int32), np.zeros(0, np.float32))] * num_questions
  lacking = np.arange(num_questions)
  depth = n_docs if not conditions else 2 * n_docs
  while len(lacking):
    depth = min(depth, len(passages))
    ids, scores = search(lacking, depth)
    for row, found, score in zip(lacking, ids, scores, strict=True):
      keep = [i for i, id_ in enumerate(found.tolist()) if wanted(id_)][:n_docs]
      best[row] = found[keep], score[keep]
    if depth == len(passages):
      break
    lacking = np.array([r for r in lacking if len(best[r][0]) < n_docs], int)
    depth *= 2
  short = [row for row, (ids, _) in enumerate(best) if len(ids) < n_docs]
  if short and too_few == "fail":
    number = len(best[short[0]][0])
    raise _few(passages, conditions, number, n_docs)
  return exact.stack_rows([_filled(*row, n_docs) for row in best], n_docs)


def _filled(
  ids: np.ndarray, scores: np.ndarray, n_docs: int
) -> tuple[np.ndarray, np.ndarray]:
  missing = n_docs - len(ids)
  return (
    np.pad(ids, (0, missing), constant_values=-1),
    np.pad(scores, (0, missing), constant_values=_LOWEST),
  )


def _few(
  passages: Sequence[Passage],
  conditions: Conditions,
  number: int,
  n_docs: int,
) -> ValueError:
  """Returns the error that says what metadata there is instead."""
  shown = " and ".join(f"{name}={value}" for name, value in conditions)
  there: dict[str, set[str]] = {}
  for passage in passages:
    for name, value in passage.metadata:
      values = there.setdefault(name, set())
      if len(values) < _SHOWN:  # each passage may have another, such as a URL
        values.add(value)
  names = {name for name, _ in conditions}
  values = {name: sorted(v) for name, v in there.items() if name in names}
  known = (
    f"Their values are like {shorten(values, 200)}"
    if values
    else f"The passages have metadata named {shorten(sorted(there), 200)}"
  )
  return ValueError(
    f"Only {number} of {len(passages)} passages meet the filter {shown};"
    f" expected at least n_docs={n_docs}. {known}. Change the filter, lower"
    " n_docs, or let short rows be filled up."
  )
