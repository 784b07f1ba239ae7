"""Answer recall: how often the retrieved passages contain an answer.

In: texts of retrieved passages, best first. Out: one number from 0 to 1 per
question. There are two recalls, never called just "recall": the answer recall
of this file, and the index recall of rag_jax/retrieval/recall.py, which is the
share of the exact search's results that an index finds.
"""

from collections.abc import Iterator, Sequence
import functools
import itertools
import unicodedata

from jaxtyping import Float
import numpy as np

from rag_jax.corpus.words import holds
from rag_jax.corpus.words import joined_units
from rag_jax.evaluation.answers import check_variant
from rag_jax.evaluation.regex_answers import REGEX
from rag_jax.evaluation.regex_answers import occurs


def contains_answer(
  passage_text: str, answers: Sequence[str], variant: str = "multilingual"
) -> bool:
  """Returns whether one of `answers` occurs in a passage, word for word.

  The rule of DPR (Karpukhin et al. 2020, https://arxiv.org/abs/2004.04906,
  section 4): the tokens of the answer follow one another in the passage. A
  token is a run of letters, digits and marks, or one other character that is
  neither space nor control. Case is ignored; articles, punctuation and accents
  are not.

  Args:
    passage_text: is searched.
    answers: are looked for.
    variant: how both are split into tokens.
      "multilingual": after folding (corpus/folding.py); in scripts without
      spaces each character is a token, so that answers inside a sentence are
      found.
      "numbers": the same, but a number with its sign and decimals is one token,
      without separators between its digits.
      "squad": DPR's rule as published, which misses answers inside a run.
      "regex": answers are regular expressions (regex_answers.py).

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
  if variant == REGEX:
    return occurs(passage_text, answers)
  wanted = (_joined(answer, variant) for answer in answers)
  return holds(_joined(passage_text, variant), wanted)


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
      f" {len(answers)}; expected one list of each per question, in the same"
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


@functools.lru_cache(maxsize=65536)  # enough for the characters of most scripts
def _kind(char: str) -> str:
  """Returns "word" for letters, digits, marks; "" for space and control."""
  category = unicodedata.category(char)[0]
  return "word" if category in "LNM" else "" if category in "ZC" else "other"


def _tokens(text: str) -> Iterator[str]:
  # Decomposed, so that both encodings of "e-acute" are equal.
  for kind, run in itertools.groupby(unicodedata.normalize("NFD", text), _kind):
    if kind == "word":
      yield "".join(run).lower()
    elif kind == "other":
      yield from (char.lower() for char in run)


@functools.lru_cache(maxsize=1 << 12)
def _joined(text: str, variant: str) -> str:
  """Returns the tokens as one string, with a space before and after each."""
  if variant != "squad":
    return joined_units(text, numbers=variant == "numbers")
  return " " + "".join(token + " " for token in _tokens(text))
