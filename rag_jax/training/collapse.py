"""Detects that retrieval collapses, and says so once.

In: the metrics of the log lines. Out: a warning in the log.
"""

from collections.abc import Mapping, Sequence
import math

from absl import logging

_LINES = 5  # a value counts if it holds for so many lines in a row
_STUCK_LINES = 10  # so many, if it never was better
# Of the documents that a batch could have, those that it has.
_FEW_DISTINCT = 0.2
_CERTAIN = 0.05  # entropy of p(z|x) over that of a uniform one, log K
_SOME_ANSWERS = 0.1  # below, answers are rarely in documents anyway
_REMEDY = (
  "Go back to a checkpoint from before, with --resume_from and a lower"
  " optimizer.retriever_lr; or refresh the index more often"
  " (index.refresh_steps); or start from a retriever that was trained before"
  " (encoder.init_from, warmup.num_steps)."
)


class CollapseWarning:
  """Warns, once, if one of two things lasts for five log lines.

  All questions get nearly the same documents: of the documents that a batch
  could have, at most 20 % are different (or 1.5 times as many as if all
  questions had the same), and it was at least twice as much before, or stayed
  so for ten lines.

  Or p(z|x) is certain of documents that do not answer: its entropy is below 5 %
  of log K, and the share of questions with an answer in their documents is half
  of what it was over five lines before, or less.
  """

  def __init__(self, *, batch_size: int, n_docs: int, num_passages: int):
    # Several questions may need the same documents if there are few passages.
    self._most_distinct = min(1.0, num_passages / (batch_size * n_docs))
    # With one question a batch cannot have fewer than all.
    self._few = max(_FEW_DISTINCT, 1.5 / batch_size) if batch_size > 1 else 0.0
    self._certain = _CERTAIN * math.log(n_docs) if n_docs > 1 else 0.0
    self._distinct: list[float] = []
    self._entropy: list[float] = []
    self._answers: list[float] = []
    self._warned = False

  def look(self, step: int, values: Mapping[str, float]) -> None:
    """Notes the metrics of a log line, and warns if it is time to."""
    if self._warned:
      return
    distinct = values["train/distinct_docs"] / self._most_distinct
    self._distinct.append(distinct)
    self._entropy.append(values["train/doc_entropy"])
    self._answers.append(values["train/answer_in_docs"])
    seen = self._same_docs() or self._wrong_docs()
    if seen:
      self._warned = True
      logging.warning(
        "Retrieval has collapsed, in the last %d log lines up to step %d: %s"
        " %s",
        *(_LINES, step, seen, _REMEDY),
      )

  def _same_docs(self) -> str:
    """Returns what is seen if questions share their documents, or ""."""
    last, before = self._distinct[-_LINES:], self._distinct[:-_LINES]
    if len(last) < _LINES or max(last) > self._few:
      return ""
    best, stuck = max(before, default=0.0), self._distinct[-_STUCK_LINES:]
    if best < 2 * _mean(last) and (
      len(stuck) < _STUCK_LINES or max(stuck) > self._few
    ):
      return ""
    return (
      "different questions get the same documents. Only"
      f" {_mean(last):.0%} of the documents that a batch could have are"
      f" different (train/distinct_docs); {best:.0%} were at best before."
      " Expected other documents for other questions."
    )

  def _wrong_docs(self) -> str:
    """Returns what is seen if p(z|x) is certain of wrong documents, or ""."""
    last = self._answers[-_LINES:]
    best = max(
      (
        _mean(self._answers[i : i + _LINES])
        for i in range(len(self._answers) - 2 * _LINES + 1)
      ),
      default=0.0,
    )
    if (
      best < _SOME_ANSWERS
      or max(self._entropy[-_LINES:]) >= self._certain
      or _mean(last) > best / 2
    ):
      return ""
    return (
      "p(z|x) is certain of one document (train/doc_entropy is"
      f" {_mean(self._entropy[-_LINES:]):.3f} nats), but answers are in the"
      f" documents of {_mean(last):.0%} of the questions, after {best:.0%}"
      " before (train/answer_in_docs). Expected certainty only where documents"
      " answer."
    )


def _mean(values: Sequence[float]) -> float:
  return sum(values) / len(values)
