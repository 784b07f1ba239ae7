"""The batches of the contrastive stage: questions, their passages, negatives.

In: questions whose passages are known (`gold`), perhaps with hard negatives,
and a step. Out: the `ContrastiveBatch` of that step. It is a function of (seed,
step) alone, so a resumed run sees the same batches as an uninterrupted one.

Source: Karpukhin et al. 2020, https://arxiv.org/abs/2004.04906, section 3.2.
"""

from collections.abc import Sequence
import dataclasses
import functools

from absl import logging
import grain
from jaxtyping import Bool, Int
import numpy as np

from rag_jax.config import Config
from rag_jax.corpus.passages import Passages
from rag_jax.corpus.words import holds
from rag_jax.corpus.words import joined_units
from rag_jax.data.context import ContextBuilder
from rag_jax.data.questions import Question
from rag_jax.models.batch import ContrastiveBatch

_KEPT_TEXTS = 1 << 16  # passages whose words are kept in memory


@dataclasses.dataclass(frozen=True, slots=True)
class _Row:
  """A question, and the numbers of its passages in the corpus."""

  number: int  # of the question in the training split
  positives: list[int]
  negatives: list[int]


class ContrastiveBatches:
  """The batches of the contrastive stage, by step.

  Each question comes with one of its positives and `contrastive.negatives` of
  its negatives, which are a function of (seed, epoch, question). Of the other
  passages of the batch all are its negatives but those in its `gold` and, with
  contrastive.mask_answers, those that state one of its answers. A question with
  fewer negatives has free places, which count for nobody.
  """

  def __init__(
    self,
    questions: Sequence[Question],
    passages: Passages,
    context: ContextBuilder,
    config: Config,
    *,
    share: Sequence[int] | None = None,  # rows that this process loads
  ):
    """Finds the passages, and logs what is left out.

    Raises:
      ValueError: no question has a passage of its own in the corpus, or fewer
        have one than a batch takes; or none has a negative, and some are asked
        for.
    """
    settings = config.contrastive
    self._rows = _find(questions, passages, settings.negatives)
    if len(self._rows) < settings.batch_size:
      raise ValueError(
        f"contrastive.batch_size={settings.batch_size} is more than the"
        f" training questions whose passage is known ({len(self._rows)}). Lower"
        " it, or bring more questions."
      )
    asked = [questions[row.number] for row in self._rows]
    self._question_ids, _ = context.encode_questions([q.asked for q in asked])
    self._numbers = config.eval.answers == "numbers"
    self._answers: list[list[str]] | None = None
    if settings.mask_answers:
      self._answers = [
        [joined_units(answer, numbers=self._numbers) for answer in q.answers]
        for q in asked
      ]
    self._passages, self._context = passages, context
    self._seed, self._settings = config.seed, settings
    everything = range(settings.batch_size)
    self._share = list(everything if share is None else share)
    order = grain.MapDataset.range(len(asked)).seed(config.seed).shuffle()
    self._order = order.repeat().batch(settings.batch_size)
    self._words = functools.lru_cache(maxsize=_KEPT_TEXTS)(self._read)

  def _read(self, row: int) -> str:
    passage = self._passages[row]
    return joined_units(
      f"{passage.title} {passage.text}", numbers=self._numbers
    )

  def _drawn(self, place: int, number: int) -> tuple[int, list[int]]:
    """Returns a positive and the negatives of a question.

    Args:
      place: of the question among all that the stage reads, from 0.
      number: of the question in `_rows`.
    """
    row, epoch = self._rows[number], place // len(self._rows)
    rng = np.random.default_rng((self._seed, epoch, row.number, 2))
    positive = row.positives[int(rng.integers(len(row.positives)))]
    order = rng.permutation(len(row.negatives))[: self._settings.negatives]
    return positive, [row.negatives[i] for i in order]

  def passages(
    self, step: int
  ) -> tuple[
    Int[np.ndarray, "B"], Int[np.ndarray, "B M"], Bool[np.ndarray, "B M"]
  ]:
    """Returns the questions of `step`, their passages, and which are real.

    Over all processes. Questions are numbers among those that are read. A place
    that is not real is filled with the question's own passage.
    """
    size, num = self._settings.batch_size, 1 + self._settings.negatives
    numbers = self._order[step]
    assert numbers is not None  # grain returns None for filtered-out rows
    docs = np.zeros((size, num), np.int32)
    real = np.zeros((size, num), bool)
    for b, number in enumerate(numbers.tolist()):
      positive, negatives = self._drawn(step * size + b, number)
      docs[b] = positive
      docs[b, 1 : 1 + len(negatives)] = negatives
      real[b, : 1 + len(negatives)] = True
    return numbers, docs, real

  def batch(self, step: int) -> ContrastiveBatch:
    """Returns this process's part of the batch of step `step`."""
    # Every process draws the whole batch and keeps its own rows.
    numbers, docs, real = self.passages(step)
    counts = np.repeat(real.reshape(1, -1), len(self._share), axis=0)
    flat = docs.reshape(-1)
    texts = []
    if self._answers is not None:
      texts = [self._words(row) for row in flat.tolist()]
    for i, b in enumerate(self._share):
      number = int(numbers[b])
      counts[i] &= ~np.isin(flat, self._rows[number].positives)
      if self._answers is not None:
        wanted = self._answers[number]
        for p in np.flatnonzero(counts[i]).tolist():
          counts[i, p] = not holds(texts[p], wanted)
      counts[i, b * docs.shape[1]] = True
    question_tokens, question_mask = self._context.questions(
      [self._question_ids[numbers[b]] for b in self._share]
    )
    doc_tokens, doc_mask = self._context.passages(docs[self._share])
    return ContrastiveBatch(
      question_tokens=question_tokens,
      question_mask=question_mask,
      doc_tokens=doc_tokens,
      doc_mask=doc_mask,
      counts=counts,
    )


def _find(
  questions: Sequence[Question], passages: Passages, num_negatives: int
) -> list[_Row]:
  """Returns the questions that have a positive; logs what is left out."""
  row_of = functools.cache(passages.row_of)
  rows, missing = [], 0
  num_gold = sum(bool(question.gold) for question in questions)

  def find(ids: Sequence[str]) -> list[int]:
    nonlocal missing
    found = [row for row in map(row_of, ids) if row is not None]
    missing += len(ids) - len(found)
    return list(dict.fromkeys(found))

  for number, question in enumerate(questions):
    positives = find(question.gold)
    negatives = find(question.negatives) if num_negatives else []
    negatives = [row for row in negatives if row not in positives]
    if positives:
      rows.append(_Row(number, positives, negatives))
  mine = "`rag-jax mine-negatives` writes them"
  if not rows:
    some = [p.id for p in passages[:3]]
    raise ValueError(
      f"The contrastive stage has nothing to learn from: of {len(questions)}"
      f" training questions {num_gold} name passages that answer them (`gold`),"
      f" and none of these is in {passages.origin}, whose ids look like {some}."
      f" Expected ids of its passages. {mine[0].upper()}{mine[1:]} (--positives"
      " finds some for questions without); or set contrastive.num_steps=0."
    )
  few = sum(len(row.negatives) < num_negatives for row in rows)
  if few and not any(row.negatives for row in rows):
    raise ValueError(
      f"contrastive.negatives={num_negatives}, but no training question has"
      f" hard negatives (`negatives`) in {passages.origin}. Expected some: "
      f"{mine}. Give such questions, or set contrastive.negatives=0."
    )
  logging.info(
    "The contrastive stage learns from %d of %d training questions: the others"
    " have no passage of their own in the corpus. %d ids that they name are not"
    " in it.%s",
    *(len(rows), len(questions), missing),
    f" {few} questions have fewer than {num_negatives} hard negatives, and"
    " leave places of the batch empty."
    if few
    else "",
  )
  return rows
