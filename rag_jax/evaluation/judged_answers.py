"""Answers compared with the right ones, and kept as JSON lines.

In: questions with the answers that a model wrote. Out: a `JudgedAnswer` for
each; and pairs of what two models answered to the same questions.
"""

from collections.abc import Iterator, Sequence
import dataclasses
from typing import Any

from etils import epath

from rag_jax.corpus.text_files import check_fields
from rag_jax.corpus.text_files import read_records
from rag_jax.data.questions import Question
from rag_jax.decoding.answerer import Answer
from rag_jax.evaluation.answers import exact_match
from rag_jax.evaluation.answers import token_f1
from rag_jax.evaluation.regex_answers import REGEX
from rag_jax.evaluation.retrieval import contains_answer
from rag_jax.terminal import json_line

LINES = "answers.jsonl"


@dataclasses.dataclass(frozen=True, slots=True)
class JudgedAnswer:
  """One question, its answer, and how right that is."""

  question: str
  answers: tuple[str, ...]  # accepted
  relation: str  # kind of question; "": not known
  prediction: str
  log_prob: float  # of the prediction, in nats
  exact_match: float  # 0 or 1
  token_f1: float
  num_retrieved: int
  # Of the first passage that holds an accepted answer, from 1; 0: none does.
  answer_rank: int
  docs: tuple[dict[str, Any], ...]  # that were read: see `AnswerDoc`
  # Of what was retrieved, by evidence.py; None: no gold passage is known.
  r_precision: float | None = None
  gold_recall_at_5: float | None = None
  # Probability of each label; {}: the answer was written, not chosen.
  labels: dict[str, float] = dataclasses.field(default_factory=dict)
  history: tuple[str, ...] = ()  # earlier turns of a dialogue
  # Token F1 with what the answer is based on; None: that is not known.
  knowledge_f1: float | None = None


def judge(
  answer: Answer,
  question: Question,
  retrieved_texts: Sequence[str],
  *,
  variant: str,
  language: str,
  evidence: tuple[float, float] | None = None,
) -> JudgedAnswer:
  """Returns how right an answer is.

  Args:
    answer: to the question.
    question: with the accepted answers.
    retrieved_texts: title and text of what was retrieved, best first.
    variant: how answers are compared; see answers.py.
    language: its articles are ignored.
    evidence: R-precision and gold recall at 5; None: not known.
  """
  accepted = question.answers
  ranks = (
    rank
    for rank, text in enumerate(retrieved_texts, start=1)
    if contains_answer(text, accepted, variant)
  )
  return JudgedAnswer(
    question=question.question,
    answers=accepted,
    relation=question.relation,
    prediction=answer.text,
    log_prob=answer.log_prob,
    exact_match=exact_match(answer.text, accepted, variant, language),
    token_f1=token_f1(answer.text, accepted, variant, language),
    num_retrieved=len(retrieved_texts),
    answer_rank=next(ranks, 0),
    docs=tuple(
      {
        name: getattr(doc, name)
        for name in ("id", "title", "text", "score", "prior", "posterior")
      }
      for doc in answer.docs
    ),
    r_precision=evidence and evidence[0],
    gold_recall_at_5=evidence and evidence[1],
    labels=dict(answer.labels),
    history=question.history,
    knowledge_f1=(
      token_f1(answer.text, [question.knowledge], _texts(variant), language)
      if question.knowledge
      else None
    ),
  )


def _texts(variant: str) -> str:
  """Returns how texts are compared, if answers may be patterns."""
  return "multilingual" if variant == REGEX else variant


def line_of(judged: JudgedAnswer) -> str:
  """Returns the line of a file of answers, without its end."""
  return json_line(dataclasses.asdict(judged))


def read_judged(path: epath.PathLike) -> list[JudgedAnswer]:
  """Returns the answers in a file, or in that of a directory.

  Lines that an older rag_jax wrote have no `r_precision`, which is not known
  then, and neither `labels` nor `history`.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: a line is no such answer; begins with `path:line`.
  """
  path = epath.Path(path).expanduser()
  path = path / LINES if path.is_dir() else path
  if not path.exists():
    raise FileNotFoundError(
      f"There is no {path}; expected the {LINES} that rag-jax evaluate wrote."
      " Evaluate the model first, or correct the path."
    )
  kinds = {
    "question": str, "answers": list, "relation": str, "prediction": str,
    "log_prob": (int, float), "exact_match": (int, float),
    "token_f1": (int, float), "num_retrieved": int, "answer_rank": int,
    "docs": list,
  }  # fmt: skip
  later: dict[str, Any] = {
    "r_precision": (int, float), "gold_recall_at_5": (int, float),
    "labels": dict, "history": list, "knowledge_f1": (int, float),
  }  # fmt: skip
  found = []
  for line, record in read_records(path, required=kinds):
    given = {
      name: record[name] for name in later if record.get(name) is not None
    }
    check_fields(given, f"{path}:{line}", required={}, optional=later)
    values = {name: record[name] for name in kinds} | given
    texts = "answers", "docs", "history"
    values |= {name: tuple(values.get(name, ())) for name in texts}
    found.append(JudgedAnswer(**values))
  return found


def pairs(
  judged: Sequence[JudgedAnswer], others: Sequence[JudgedAnswer]
) -> Iterator[tuple[JudgedAnswer, JudgedAnswer]]:
  """Yields the two answers to each question, in the order of `judged`.

  Raises:
    ValueError: the questions are not the same, or one has other right answers.
  """

  def key(x: JudgedAnswer) -> tuple[Any, ...]:
    return tuple(x.history), x.question, tuple(x.answers)

  left: dict[tuple[Any, ...], list[JudgedAnswer]] = {}
  for other in others:
    left.setdefault(key(other), []).append(other)
  missing = []
  for one in judged:
    same = left.get(key(one))
    if same:
      yield one, same.pop(0)
    else:
      missing.append(one.question)
  more = sum(map(len, left.values()))
  if missing or more:
    example = f", for instance {missing[0]!r}" if missing else ""
    raise ValueError(
      f"The two were asked different questions: {len(missing)} of"
      f" {len(judged)} are not among the other's{example}, and {more} of"
      f" {len(others)} are only there. Expected the same questions with the"
      " same right answers. Evaluate both on one file."
    )
