"""How much of a text is another's: ROUGE, BLEU, and what was copied.

In: answers that a model wrote, right answers, documents. Out: numbers from 0 to
1 for one answer; for BLEU, counts that are added up over answers. The packages
rouge-score and sacrebleu are in the extra `eval` and imported when first used.

Words are those of `corpus.words.plain_words`: rouge-score's own tokenizer drops
all that is not ASCII. On ASCII text the two agree. In scripts without spaces
each character is a word. There is no stemming.
"""

from collections.abc import Sequence
import functools
import importlib
import importlib.util
from typing import Any

from jaxtyping import Float, Int
import numpy as np

from rag_jax.corpus.words import plain_words
from rag_jax.corpus.words import spaced_out

INSTALL = 'pip install -e ".[eval]"'
ROUGE = ("rouge1", "rouge2", "rougeL")
BLEU_ORDER = 4  # of the longest n-grams

_PACKAGES = {"rouge": "rouge_score", "bleu": "sacrebleu"}
_COPIED_ORDER = 3


def is_installed(metric: str) -> bool:
  """Returns whether what a metric needs is there; True for all but two."""
  package = _PACKAGES.get(metric)
  return package is None or importlib.util.find_spec(package) is not None


def check_installed(metric: str) -> None:
  """Raises `ImportError` unless what a metric needs is there."""
  if not is_installed(metric):
    raise ImportError(
      f"The metric {metric!r} is computed by {_PACKAGES[metric]}, which is not"
      f" installed. Expected the extra `eval`. Run: {INSTALL}"
    )


class _Words:
  """The tokenizer that rouge-score is given."""

  @staticmethod
  def tokenize(text: str) -> list[str]:
    """Returns the words."""
    return plain_words(text)


@functools.cache
def _rouge_scorer() -> Any:
  check_installed("rouge")
  module = importlib.import_module("rouge_score.rouge_scorer")
  return module.RougeScorer(list(ROUGE), tokenizer=_Words())


def rouge(prediction: str, answers: Sequence[str]) -> dict[str, float]:
  """Returns the F measures of ROUGE-1, -2 and -L, of the best answer each.

  Lin 2004, https://aclanthology.org/W04-1013. A text without a word shares
  nothing: the measures are 0, also if both texts are empty; and so is ROUGE-2
  of a single word.

  Raises:
    ImportError: rouge-score is not installed.
    ValueError: there are no answers.
  """
  if not answers:
    raise ValueError(
      "There are no answers to compare the prediction with; expected at least"
      " one. Remove such questions from the data."
    )
  found = _rouge_scorer().score_multi(list(answers), prediction)
  return {name: float(found[name].fmeasure) for name in ROUGE}


@functools.cache
def _bleu() -> Any:
  check_installed("bleu")
  module = importlib.import_module("sacrebleu.metrics")
  # The effective order changes no counts, and avoids a warning.
  return module.BLEU(effective_order=True)


def bleu_counts(
  prediction: str, answers: Sequence[str]
) -> Int[np.ndarray, "10"]:
  """Returns what an answer adds to the counts of corpus BLEU.

  These are the n-grams that are right, for n = 1 to 4; all n-grams; the length;
  and the length of the right answer that is nearest in length. sacrebleu's
  tokenizer "13a" splits the text, after `spaced_out`: in scripts without spaces
  each character is a token.

  Raises:
    ImportError: sacrebleu is not installed.
  """
  references = [spaced_out(answer) for answer in answers]
  found = _bleu().sentence_score(spaced_out(prediction), references)
  return np.array(
    [*found.counts, *found.totals, found.sys_len, found.ref_len], np.int64
  )


def bleu(counts: Int[np.ndarray, "10"] | Float[np.ndarray, "10"]) -> float:
  """Returns corpus BLEU, from 0 to 100, of the sums of `bleu_counts`.

  Papineni et al. 2002, https://aclanthology.org/P02-1040, as sacrebleu computes
  it (Post 2018, https://arxiv.org/abs/1804.08771) by default: with four orders
  and exponential smoothing. It is 0 if no answer has four tokens.
  """
  right, total = counts[:BLEU_ORDER], counts[BLEU_ORDER : 2 * BLEU_ORDER]
  length, expected = counts[2 * BLEU_ORDER :].tolist()
  found = _bleu().compute_bleu(
    right.tolist(), total.tolist(), length, expected, smooth_method="exp"
  )
  return float(found.score)


def bleu_signature() -> str:
  """Returns how BLEU is computed, as sacrebleu names it."""
  version = importlib.import_module("sacrebleu").__version__
  return (
    "nrefs:var|case:mixed|eff:no|tok:13a after spaces around unspaced scripts"
    f"|smooth:exp|version:{version}"
  )


def copied(prediction: str, documents: Sequence[str]) -> tuple[float, float]:
  """Returns the shares of the words and trigrams that stand in a document.

  Repeated ones count as often as they are written. A trigram is three words
  that follow one another, in one document.

  Returns:
    NaN for a share of nothing: an answer without words, or of fewer than three
    words.
  """
  words = plain_words(prediction)
  trigrams = _ngrams(words)
  known_words: set[str] = set()
  known_trigrams: set[tuple[str, ...]] = set()
  for document in documents:
    theirs = plain_words(document)
    known_words.update(theirs)
    known_trigrams.update(_ngrams(theirs))
  return (
    float(np.mean([w in known_words for w in words])) if words else np.nan,
    float(np.mean([t in known_trigrams for t in trigrams]))
    if trigrams
    else np.nan,
  )


def _ngrams(words: Sequence[str]) -> list[tuple[str, ...]]:
  shifted = (words[i:] for i in range(_COPIED_ORDER))
  return list(zip(*shifted, strict=False))
