"""How often retrieval finds what it should.

In: texts of retrieved passages, best first. Out: one number from 0 to 1 for
every question. There are two recalls, never called just "recall": this one, of
an answer among the passages, and that of rag_jax/retrieval/recall.py, of the
exact search among what an index found.
"""

from collections.abc import Iterator, Sequence
import functools
import itertools
import unicodedata

from jaxtyping import Float
import numpy as np

from rag_jax.corpus.folding import fold
from rag_jax.corpus.words import units
from rag_jax.evaluation.answers import check_variant


def contains_answer(
  passage_text: str, answers: Sequence[str], variant: str = "multilingual"
) -> bool:
  """Returns whether one of `answers` occurs in a passage, word for word.

  The rule of DPR (Karpukhin et al. 2020, https://arxiv.org/abs/2004.04906,
  section 4): the tokens of the answer follow one another in the passage. A
  token is a run of letters, digits and marks, or one other character that is
  neither space nor control; case does not count, articles, punctuation and
  accents do.

  Args:
    passage_text: what is searched.
    answers: that are looked for.
    variant: with "multilingual" both are folded (corpus/folding.py), and in
      scripts without spaces each character is a token, so that an answer is
      found inside a sentence; "numbers": a number with its sign and decimals
      is one token, without separators between its digits; "squad": DPR's rule
      as published, where an answer inside a run is missed.

  Raises:
    TypeError: `answers` is one string, not a list of them.
    ValueError: there is no such variant.
  """
  if isinstance(answers, str):
    raise TypeError(
      f"answers={answers!r} is one string; expected a list of them, since a"
      f" question may have several answers. Pass [{answers!r}]."
    )
  if problems := check_variant(variant):
    raise ValueError(" ".join(problems))
  passage = _joined(passage_text, variant)
  wanted = (_joined(answer, variant) for answer in answers)
  # An answer without a token occurs in nothing, rather than everywhere.
  return any(len(answer) > 1 and answer in passage for answer in wanted)


def answer_recall_at_k(
  retrieved_texts: Sequence[Sequence[str]],  # [B][K], best first
  answers: Sequence[Sequence[str]],  # [B][any number]
  k: int,
  variant: str = "multilingual",
) -> Float[np.ndarray, "B"]:
  """Returns 1 where an answer occurs in one of the first `k` passages, else 0.

  A question with fewer than `k` passages is judged by those that it has.
  `variant` is that of `contains_answer`.

  Raises:
    ValueError: `k` is below 1, or the two have different lengths.
  """
  _check_k(k)
  if len(retrieved_texts) != len(answers):
    raise ValueError(
      f"retrieved_texts has {len(retrieved_texts)} questions, answers has"
      f" {len(answers)}; expected one list of each a question, in the same"
      " order."
    )
  found = [
    any(contains_answer(text, accepted, variant) for text in texts[:k])
    for texts, accepted in zip(retrieved_texts, answers, strict=True)
  ]
  return np.array(found, np.float64)


def _check_k(k: int) -> None:
  if k < 1:
    raise ValueError(f"k={k} passages; expected at least 1.")


@functools.lru_cache(maxsize=65536)  # as many as there are in most scripts
def _kind(char: str) -> str:
  """Returns "word" for letters, digits, marks; "" for space and control."""
  category = unicodedata.category(char)[0]
  return "word" if category in "LNM" else "" if category in "ZC" else "other"


def _tokens(text: str) -> Iterator[str]:
  # Decomposed, so that "e-acute" is the same written in either way.
  for kind, run in itertools.groupby(unicodedata.normalize("NFD", text), _kind):
    if kind == "word":
      yield "".join(run).lower()
    elif kind == "other":
      yield from (char.lower() for char in run)


@functools.lru_cache(maxsize=1 << 12)
def _joined(text: str, variant: str) -> str:
  """Returns the tokens, a space before and after each.

  No token holds a space, so one of these occurs in another exactly where its
  tokens do, and the search is the one of `str`.
  """
  if variant == "squad":
    tokens = _tokens(text)
  else:
    numbers = variant == "numbers"
    tokens = units(fold(text, join_digits=numbers), numbers=numbers)
  return " " + "".join(token + " " for token in tokens)
