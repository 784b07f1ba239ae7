"""Questions with known passages or answers, to measure retrieval with.

In: a BEIR folder, or a file of questions; and the results of a search. Out:
questions with their answers and graded passages, the rows of these passages,
and the metrics of the search.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import dataclasses
import functools
import math

from etils import epath
from jaxtyping import Float, Int
import numpy as np

from rag_jax.corpus.passages import Passage
from rag_jax.corpus.text_files import find_file
from rag_jax.corpus.text_files import read_lines
from rag_jax.corpus.text_files import read_records
from rag_jax.corpus.text_files import shorten
from rag_jax.corpus.twins import Twins
from rag_jax.data.question_files import EXPECTED
from rag_jax.data.question_files import read_question_file
from rag_jax.evaluation import ranking_metrics
from rag_jax.evaluation.retrieval import contains_answer
from rag_jax.retrieval.intervals import mean_interval

DEPTHS = (1, 5, 20, 100)  # of answer_recall and gold_recall

_EXPECTED = (
  "a BEIR folder (queries.jsonl and qrels/), one of its qrels/*.tsv, or a file"
  f" of {EXPECTED}, perhaps with 'gold'"
)
_QUERIES = "queries.jsonl"
_QRELS = "qrels"


@dataclasses.dataclass(slots=True, frozen=True, kw_only=True)
class JudgedQuestion:
  """A question, with the answers and passages that are known for it."""

  id: str
  question: str
  answers: tuple[str, ...] = ()  # accepted; () if they are not known
  gold: Mapping[str, int]  # id of a passage -> grade; {} if not known


def read_judged_questions(path: epath.PathLike) -> list[JudgedQuestion]:
  """Returns the questions of a file or folder, in its order.

  - A BEIR folder: the questions of queries.jsonl that qrels/test.tsv judges, or
    the only qrels/*.tsv. Pass a qrels/*.tsv itself to choose another.
  - Any file that `question_files.read_question_file` reads. Its gold passages
    are the paragraph of a SQuAD question, `positive_ctxs` of DPR, or `gold`: a
    list of passage ids, or an object of passage ids and grades.

  All may be gzip-compressed, with names that end in .gz.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: a record cannot be used; names its file and line, or place.
  """
  path = epath.Path(path).expanduser()
  if path.is_dir():
    questions = _read_beir(path, _qrels_file(path))
  else:
    find_file(path, _EXPECTED)
    name = path.name.lower().removesuffix(".gz")
    if name.endswith(".tsv") and _is_qrels(path):
      questions = _read_beir(path.parent.parent, path)
    else:
      questions = _read_file(path)
  found = list(questions)
  if not found:
    raise ValueError(
      f"There are no questions in {path}. Expected at least one, in"
      f" {_EXPECTED}. Give another file."
    )
  _check_ids(found, path)
  return found


def gold_rows(
  questions: Sequence[JudgedQuestion],
  passages: Iterable[Passage],
  twins: Twins | None = None,
) -> tuple[list[dict[int, int]], int]:
  """Returns row -> grade for each question, and how many passages are missing.

  A passage that is not in the corpus gets a row below -1, which no search
  finds: it counts as not found, as in trec_eval.

  Args:
    questions: with ids of passages.
    passages: the corpus, read once; row = position.
    twins: ids of passages with the same text as one of these.
  """
  wanted = {id_ for question in questions for id_ in question.gold}
  rows: dict[str, int] = {}
  if wanted:
    for row, passage in enumerate(passages):
      if passage.id in wanted:
        rows[passage.id] = row
    if twins is not None:
      for number, twin in enumerate(twins):
        if twin.id in wanted:
          rows[twin.id] = int(twins.rows[number])
  missing = sorted(wanted - set(rows))
  rows |= {id_: -2 - number for number, id_ in enumerate(missing)}
  graded: list[dict[int, int]] = []
  for question in questions:
    grades: dict[int, int] = {}
    for id_, grade in question.gold.items():
      # Several ids may have the same text: the highest grade counts.
      grades[rows[id_]] = max(grade, grades.get(rows[id_], grade))
    graded.append(grades)
  return graded, len(missing)


def _is_qrels(path: epath.Path) -> bool:
  """Returns whether a .tsv is in the place of BEIR's judgements."""
  queries = path.parent.parent / _QUERIES
  beir = queries.exists() or queries.with_name(f"{_QUERIES}.gz").exists()
  return beir or path.parent.name == _QRELS


def _qrels_file(folder: epath.Path) -> epath.Path:
  qrels = folder / _QRELS
  files = sorted(qrels.glob("*.tsv")) if qrels.is_dir() else []
  names = [file.name for file in files]
  if "test.tsv" in names:
    return qrels / "test.tsv"
  if len(files) != 1:
    raise ValueError(
      f"The folder {folder} has no qrels/test.tsv, and its qrels/*.tsv are"
      f" {names}. Expected {_EXPECTED}. Give one of the .tsv files itself, or"
      " another folder."
    )
  return files[0]


def _read_beir(
  folder: epath.Path, qrels: epath.Path
) -> Iterator[JudgedQuestion]:
  queries = folder / _QUERIES
  if not queries.exists() and (folder / f"{_QUERIES}.gz").exists():
    queries = folder / f"{_QUERIES}.gz"
  find_file(queries, f"{_QUERIES}, the questions that {qrels} judges")
  graded, lines = _read_qrels(qrels)
  required = {"_id": (str, int), "text": str}
  for line, record in read_records(queries, required=required):
    id_ = str(record["_id"])
    text = _question(record["text"], f"{queries}:{line}")
    if id_ in graded:
      yield JudgedQuestion(id=id_, question=text, gold=graded.pop(id_))
  if graded:
    id_ = next(iter(graded))
    raise ValueError(
      f"{qrels}:{lines[id_]}: judges passages for the question {id_!r}, which"
      f" {queries} does not have ({len(graded)} like it). Expected each to be"
      " there. Take both files from one copy of the data set."
    )


def _read_qrels(
  path: epath.Path,
) -> tuple[dict[str, dict[str, int]], dict[str, int]]:
  """Returns passage -> grade by question, and where each question begins."""
  graded: dict[str, dict[str, int]] = {}
  lines: dict[str, int] = {}
  for line, text in read_lines(path):
    fields = text.rstrip("\r\n").split("\t")
    if not text.strip() or (line == 1 and fields[0] == "query-id"):
      continue
    if len(fields) != 3 or not fields[2].strip().lstrip("-").isdecimal():
      raise ValueError(
        f"{path}:{line}: {shorten(text)} is no judgement. Expected three fields"
        " separated by tabs: the id of a question, the id of a passage, a whole"
        " number as grade. Correct the line; if it is the last one, the file"
        " may be cut off: copy it again."
      )
    question, passage, grade = fields[0], fields[1], int(fields[2])
    judged = graded.setdefault(question, {})
    lines.setdefault(question, line)
    if judged.setdefault(passage, grade) != grade:
      raise ValueError(
        f"{path}:{line}: gives passage {passage!r} the grade {grade} for"
        f" question {question!r}, and an earlier line {judged[passage]}."
        " Expected one grade. Remove one of the lines."
      )
  return graded, lines


def _read_file(path: epath.Path) -> Iterator[JudgedQuestion]:
  for found in read_question_file(path):
    place = found.where.removeprefix(f"{path}:")
    yield JudgedQuestion(
      id=found.id or place.strip("[]"),
      question="\n".join((*found.history, found.question)).strip(),
      answers=found.answers,
      gold=found.gold,
    )


def _question(text: str, where: str) -> str:
  if not text.strip():
    raise ValueError(
      f"{where}: the question is empty. Expected some text. Remove it."
    )
  return text.strip()


def _check_ids(questions: Sequence[JudgedQuestion], path: epath.Path) -> None:
  seen: set[str] = set()
  for question in questions:
    if question.id in seen:
      raise ValueError(
        f"{path} has the question id {question.id!r} twice, the second time for"
        f" {shorten(question.question)}. Expected a different id for each."
        " Remove or rename one."
      )
    seen.add(question.id)


@dataclasses.dataclass(slots=True, frozen=True, kw_only=True)
class Mean:
  """The mean of one number per question, with its 95% interval."""

  mean: float
  low: float
  high: float

  def __str__(self) -> str:
    """Returns the numbers as a table shows them."""
    return f"{self.mean:.3f} ({self.low:.3f} to {self.high:.3f})"


@dataclasses.dataclass(slots=True, frozen=True)
class Known:
  """Known answers and passages of the questions that are measured.

  Attributes:
    answers: per question; () where they are not known.
    gold: per question, row of a passage -> grade; {} where it is not known.
    text_of: returns title and text of a passage, given its row.
    own: per question, the row of the passage that is the question itself and is
      removed from its results, or -1; () removes nothing.
    num_passages: of the corpus.
    variant: how answers are found in text; see `retrieval.contains_answer`.
  """

  answers: Sequence[Sequence[str]]
  gold: Sequence[Mapping[int, int]]
  text_of: Callable[[int], str]
  own: Sequence[int] = ()
  num_passages: int = 0
  variant: str = "multilingual"

  def relevant(self, number: int, rows: Sequence[int]) -> list[bool]:
    """Returns which passages are relevant to a question.

    These have a grade above 0; if none is known, they contain an answer.
    """
    grades = self.gold[number]
    if any(grade > 0 for grade in grades.values()):
      return [grades.get(row, 0) > 0 for row in rows]
    answers = self.answers[number]
    return [
      contains_answer(self.text_of(row), answers, self.variant) for row in rows
    ]


class QuestionMetrics:
  """Computes the metrics of several systems on the same questions.

  Whether a passage holds an answer of a question is computed once.
  """

  def __init__(self, known: Known):
    self._known = known
    self._with_answers = [i for i, a in enumerate(known.answers) if a]
    self._with_gold = [
      i
      for i, grades in enumerate(known.gold)
      if max(grades.values(), default=0) > 0
    ]
    self._text_of = functools.lru_cache(maxsize=4096)(known.text_of)
    self._seen: dict[tuple[int, int], bool] = {}

  def __call__(self, ids: Int[np.ndarray, "B K"]) -> dict[str, Mean]:
    """Returns the means over the questions that can be judged.

    Args:
      ids: best first, -1 where nothing was found.
    """
    depths = sorted({min(k, ids.shape[1]) for k in DEPTHS})
    values: dict[str, np.ndarray] = {}
    if self._with_answers:
      first = np.array([self._first(i, ids[i]) for i in self._with_answers])
      for k in depths:
        values[f"answer_recall@{k}"] = (first < k).astype(np.float64)
    if self._with_gold:
      ranked = ids[self._with_gold]
      grades = [self._known.gold[i] for i in self._with_gold]
      for k in depths:
        recall = ranking_metrics.recall_at_k(ranked, grades, k)
        values[f"gold_recall@{k}"] = recall
      values["MRR@10"] = ranking_metrics.mrr_at_10(ranked, grades)
      values["nDCG@10"] = ranking_metrics.ndcg_at_10(ranked, grades)
    return {name: _mean(numbers) for name, numbers in values.items()}

  def _first(self, number: int, rows: Int[np.ndarray, "K"]) -> float:
    """Returns the rank of the first passage with an answer, from 0."""
    for place, row in enumerate(rows.tolist()):
      if row >= 0 and self._holds(number, row):
        return float(place)
    return math.inf

  def _holds(self, number: int, row: int) -> bool:
    key = (number, row)
    if key not in self._seen:
      self._seen[key] = contains_answer(
        self._text_of(row), self._known.answers[number], self._known.variant
      )
    return self._seen[key]


def without_own(
  ids: Int[np.ndarray, "B K"], own: Sequence[int], most: int
) -> tuple[Int[np.ndarray, "B k"], int]:
  """Returns the first `most` ids without `own`, and how many rows had theirs.

  Args:
    ids: best first, -1 where nothing was found.
    own: per row, the id to remove, or -1 to keep all.
    most: the most ids to return per row.
  """
  wanted = np.asarray(own)[:, None]
  is_own = (ids == wanted) & (wanted >= 0)
  # The sort is stable: all others keep their order.
  order = np.argsort(is_own, axis=1, kind="stable")
  kept = np.take_along_axis(np.where(is_own, -1, ids), order, axis=1)
  return kept[:, :most], int(is_own.any(axis=1).sum())


def _mean(values: Float[np.ndarray, "B"]) -> Mean:
  low, high = mean_interval(values)
  return Mean(mean=float(np.mean(values)), low=low, high=high)
