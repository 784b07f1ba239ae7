"""The metrics of judged answers, and the difference between two models.

In: `JudgedAnswer`s, and the names of metrics. Out: means with 95 % intervals,
for all questions and for parts of them; and paired differences with intervals
and p values.

- em, f1: exact match and token F1 (answers.py).
- accuracy: the answer is an accepted one to the letter, as KILT judges labels.
- recall: answer recall at several depths (retrieval.py).
- rouge, bleu: text_overlap.py. For BLEU, questions are resampled, and the BLEU
  of each resample is that of its summed counts: it is no mean over questions.
- kilt: R-precision and gold recall at 5 (evidence.py), and the scores that
  count only where R-precision is 1 (Petroni et al. 2021,
  https://arxiv.org/abs/2009.02252, section 5). Exact match and F1 are those
  above: KILT's own are --answers=squad. KILT's script has another ROUGE-L, of
  the package rouge.
- knowledge: token F1 of the answer with the text that it should be based on, if
  the question has one (Shuster et al. 2021, https://arxiv.org/abs/2104.07567,
  section 4.2). Words are compared as in f1.
- length: words and characters of answers, and of the first accepted ones.
- copy: the share of an answer's words, and of its trigrams, that stand in the
  documents that were read.
"""

from collections.abc import Collection, Sequence
import math
from typing import Any

from jaxtyping import Float, Int
import numpy as np

from rag_jax.corpus.text_files import shorten
from rag_jax.corpus.words import plain_words
from rag_jax.evaluation import text_overlap
from rag_jax.evaluation.differences import corpus_difference
from rag_jax.evaluation.differences import corpus_interval
from rag_jax.evaluation.differences import difference_interval
from rag_jax.evaluation.differences import mcnemar
from rag_jax.evaluation.differences import random_signs
from rag_jax.evaluation.judged_answers import JudgedAnswer
from rag_jax.evaluation.judged_answers import pairs
from rag_jax.evaluation.regex_answers import REGEX
from rag_jax.retrieval.intervals import mean_interval

METRICS = (
  "em", "f1", "accuracy", "recall", "rouge", "bleu", "kilt", "knowledge",
  "length", "copy",
)  # fmt: skip
BLEU = "bleu"

_DEPTHS = (1, 5, 10, 20, 50, 100)  # of answer recall
_WORDS = ((1, 5), (6, 10), (11, 20), (21, None))  # parts by length of question
_TEXTS = ("accuracy", "rouge", "bleu", "kilt", "length")  # accepted ones needed
_KILT = ("exact_match", "token_f1", "accuracy", "rougeL")
# What KILT's scores are computed from, and the metric that asks for it.
_OF_KILT = {"exact_match": "em", "token_f1": "f1", "accuracy": "accuracy"} | {
  name: "rouge" for name in text_overlap.ROUGE
}
# Differences of -1, 0 and 1.
_RIGHT_OR_WRONG = ("exact_match", "accuracy")
_LENGTHS = ("answer_words", "answer_characters", "accepted_words")
_TOP_BLEU = 100.0

Values = dict[str, Float[np.ndarray, "B"]]  # by metric; NaN: not known


def check_metrics(asked: Sequence[str]) -> None:
  """Raises an error unless the metrics exist and can be computed here.

  Raises:
    ValueError: there is no such metric, or one is given twice.
    ImportError: its package is missing; names the command that installs it.
  """
  unknown = [name for name in asked if name not in METRICS]
  if unknown or len(set(asked)) < len(asked):
    problem = f"no metric {unknown[0]!r}" if unknown else "one is given twice"
    raise ValueError(
      f"The metrics {shorten(','.join(asked))}: {problem}. Expected some of"
      f" {','.join(METRICS)}, with commas between them. Correct the list."
    )
  for name in asked:
    text_overlap.check_installed(name)


def choose_metrics(
  asked: Sequence[str],
  *,
  variant: str,
  has_gold: bool,
  has_knowledge: bool = False,
) -> tuple[tuple[str, ...], tuple[str, ...]]:
  """Returns the metrics to compute, and sentences on those left out.

  Args:
    asked: names; empty: all that the questions and packages allow.
    variant: how answers are compared; see answers.py.
    has_gold: whether a question names a gold passage or page.
    has_knowledge: whether a question has a text that answers it.

  Raises:
    ValueError: an asked one is not possible.
    ImportError: the package of an asked one is missing.
  """
  check_metrics(asked)
  chosen, notes = [], []
  for name in asked or METRICS:
    reason = ""
    if variant == REGEX and name in _TEXTS:
      reason = "the accepted answers are patterns, not texts"
    elif name == "kilt" and not has_gold:
      reason = "no question names a gold passage or page"
    elif name == "knowledge" and not has_knowledge:
      reason = "no question has a text of knowledge"
    elif not text_overlap.is_installed(name):
      reason = f"it needs the extra `eval`: {text_overlap.INSTALL}"
    if not reason:
      chosen.append(name)
    elif asked:
      raise ValueError(
        f"The metric {name!r} cannot be computed: {reason}. Leave it out, or"
        " give questions that allow it."
      )
    else:
      notes.append(f"Not measured: {name}, since {reason}.")
  return tuple(chosen), tuple(notes)


def values_of(
  judged: Sequence[JudgedAnswer], chosen: Collection[str]
) -> Values:
  """Returns the metrics that have a number for each question.

  Args:
    judged: one or more.
    chosen: some of `METRICS`.
  """
  columns: dict[str, list[float]] = {}
  if "em" in chosen or "kilt" in chosen:
    columns["exact_match"] = [x.exact_match for x in judged]
  if "f1" in chosen or "kilt" in chosen:
    columns["token_f1"] = [x.token_f1 for x in judged]
  if "accuracy" in chosen or "kilt" in chosen:
    columns["accuracy"] = [
      float(x.prediction.strip() in {a.strip() for a in x.answers})
      for x in judged
    ]
  if "recall" in chosen:
    depth = min(x.num_retrieved for x in judged)
    for k in sorted({k for k in _DEPTHS if k <= depth} | ({depth} - {0})):
      columns[f"answer_recall_at_{k}"] = [
        float(0 < x.answer_rank <= k) for x in judged
      ]
  if "rouge" in chosen or (
    "kilt" in chosen and text_overlap.is_installed("rouge")
  ):
    found = [text_overlap.rouge(x.prediction, x.answers) for x in judged]
    for name in text_overlap.ROUGE:
      columns[name] = [of[name] for of in found]
  if "knowledge" in chosen:
    columns["knowledge_f1"] = _known(judged, "knowledge_f1").tolist()
  if "length" in chosen:
    columns |= _lengths(judged)
  if "copy" in chosen:
    shares = [_copied(x) for x in judged]
    columns["copied_words"] = [words for words, _ in shares]
    columns["copied_trigrams"] = [trigrams for _, trigrams in shares]
  values = {name: np.array(x, np.float64) for name, x in columns.items()}
  if "kilt" in chosen:
    values |= _kilt(judged, values)
    for name, metric in _OF_KILT.items():
      if metric not in chosen:  # only computed for KILT's
        values.pop(name, None)
  return values


def _known(judged: Sequence[JudgedAnswer], name: str) -> Float[np.ndarray, "B"]:
  """Returns a field of all answers; NaN where it is None."""
  found = (getattr(x, name) for x in judged)
  return np.array([math.nan if x is None else x for x in found], np.float64)


def _kilt(judged: Sequence[JudgedAnswer], values: Values) -> Values:
  precision = _known(judged, "r_precision")
  found = {
    "r_precision": precision,
    "gold_recall_at_5": _known(judged, "gold_recall_at_5"),
  }
  for name in _KILT:
    if name in values:
      counted = np.where(precision == 1, values[name], 0.0)
      found[f"kilt_{name}"] = np.where(np.isnan(precision), np.nan, counted)
  return found


def _lengths(judged: Sequence[JudgedAnswer]) -> dict[str, list[float]]:
  texts = [x.prediction for x in judged]
  return {
    "answer_words": [float(len(plain_words(text))) for text in texts],
    "answer_characters": [float(len(text.strip())) for text in texts],
    "accepted_words": [float(len(plain_words(x.answers[0]))) for x in judged],
    "answered": [float(bool(text.strip())) for text in texts],
  }


def _copied(one: JudgedAnswer) -> tuple[float, float]:
  if not one.docs:
    return math.nan, math.nan
  texts = [f"{doc['title']} {doc['text']}" for doc in one.docs]
  return text_overlap.copied(one.prediction, texts)


def _counts(
  judged: Sequence[JudgedAnswer], chosen: Collection[str]
) -> Int[np.ndarray, "B 10"] | None:
  if BLEU not in chosen:
    return None
  return np.stack(
    [text_overlap.bleu_counts(x.prediction, x.answers) for x in judged]
  )


def _summary(name: str, values: Float[np.ndarray, "B"]) -> dict[str, float]:
  """Returns the mean of what is known, and its interval; {} if nothing is."""
  known = values[~np.isnan(values)]
  if not len(known):
    return {}
  # A length is a share of the largest one.
  top = max(float(known.max()), 1.0) if name in _LENGTHS else 1.0
  low, high = mean_interval(known / top)
  found = {"mean": float(known.mean()), "low": low * top, "high": high * top}
  if name in _LENGTHS:
    found["median"] = float(np.median(known))
    found |= {"least": float(known.min()), "most": float(known.max())}
  if len(known) < len(values):
    found["num_questions"] = len(known)
  return found


def metrics(
  judged: Sequence[JudgedAnswer],
  chosen: Collection[str] = ("em", "f1", "recall"),
) -> dict[str, dict[str, Any]]:
  """Returns the metrics of all questions ("all"), and of parts of them.

  Parts are "relation: NAME", if relations are known; "question 2 of a dialogue"
  and so on, if there are dialogues; and "words: A to B" by the length of the
  question. A metric is an object with `mean`, `low` and `high`;
  `num_questions` in it says how many have the metric, if not all have; one that
  no question has is left out. BLEU and lengths are not from 0 to 1: BLEU is
  from 0 to 100.

  Args:
    judged: one or more answers.
    chosen: some of `METRICS`.

  Raises:
    ValueError: there are no answers.
    ImportError: a package is missing.
  """
  if not judged:
    raise ValueError(
      "There are no answers to measure; expected at least one. Is the file of"
      " questions empty?"
    )
  values, counts = values_of(judged, chosen), _counts(judged, chosen)
  log_probs = np.array([x.log_prob for x in judged])
  found: dict[str, dict[str, Any]] = {}
  for part, rows in _parts(judged).items():
    found[part] = {"num_questions": len(rows)}
    for name, numbers in values.items():
      if summary := _summary(name, numbers[rows]):
        found[part][name] = summary
    if counts is not None:
      found[part][BLEU] = _bleu_summary(counts[rows])
    found[part]["log_prob"] = float(np.mean(log_probs[rows]))
  return found


def _bleu_summary(counts: Int[np.ndarray, "B 10"]) -> dict[str, Any]:
  low, high = corpus_interval(counts, text_overlap.bleu, _TOP_BLEU)
  return {
    "mean": text_overlap.bleu(counts.sum(axis=0)),
    "low": low,
    "high": high,
    "signature": text_overlap.bleu_signature(),
  }


def _parts(judged: Sequence[JudgedAnswer]) -> dict[str, list[int]]:
  """Returns the rows of each part that has any."""
  parts = {"all": list(range(len(judged)))}
  for relation in sorted({x.relation for x in judged} - {""}):
    parts[f"relation: {relation}"] = [
      row for row, x in enumerate(judged) if x.relation == relation
    ]
  exchanges = [1 + (len(x.history) + 1) // 2 for x in judged]
  for number in sorted(set(exchanges)) if max(exchanges) > 1 else ():
    parts[f"question {number} of a dialogue"] = [
      row for row, of in enumerate(exchanges) if of == number
    ]
  for first, last in _WORDS:
    name = f"words: {first} to {last}" if last else f"words: {first} or more"
    parts[name] = [
      row
      for row, x in enumerate(judged)
      if first <= max(len(x.question.split()), 1) <= (last or math.inf)
    ]
  return {name: rows for name, rows in parts.items() if rows}


def compare(
  judged: Sequence[JudgedAnswer],
  others: Sequence[JudgedAnswer],
  chosen: Collection[str] = ("em", "f1"),
) -> dict[str, Any]:
  """Returns how much better `judged` is than `others` on the same questions.

  By metric: the mean difference, its 95 % interval (bootstrap over questions)
  and the p value of no difference, two-sided: of McNemar's exact test for exact
  match and accuracy, of random signs of the differences for others, and of
  random swaps for BLEU. Questions for which a metric is known for one of the
  two only are left out, and `num_questions` in the metric then says how many
  remain.

  Raises:
    ValueError: the questions are not the same, or one has other right answers.
    ImportError: a package is missing.
  """
  both = list(pairs(judged, others))
  ours, theirs = [one for one, _ in both], [other for _, other in both]
  found: dict[str, Any] = {"num_questions": len(both)}
  left, right = values_of(ours, chosen), values_of(theirs, chosen)
  for name in left:
    if name in right:
      found[name] = _difference(name, left[name] - right[name])
  counts, other_counts = _counts(ours, chosen), _counts(theirs, chosen)
  if counts is not None and other_counts is not None:
    found[BLEU] = corpus_difference(
      counts, other_counts, text_overlap.bleu, _TOP_BLEU
    )
  return {name: of for name, of in found.items() if of}


def _difference(
  name: str, difference: Float[np.ndarray, "B"]
) -> dict[str, float]:
  """Returns a mean difference and what is known of it; {} if nothing is."""
  known = difference[~np.isnan(difference)]
  if not len(known):
    return {}
  top = max(float(np.abs(known).max()), 1.0)
  low, high = difference_interval(known, top)
  test = mcnemar if name in _RIGHT_OR_WRONG else random_signs
  found = {
    "difference": float(known.mean()),
    "low": low,
    "high": high,
    "p": test(known),
    "better": int(np.sum(known > 0)),
    "worse": int(np.sum(known < 0)),
  }
  if len(known) < len(difference):
    found["num_questions"] = len(known)
  return found
