"""Questions whose passages or answers are known, to measure retrieval with.

In: a BEIR folder, or a file of questions. Out: questions with the
answers and the graded passages that each has, and the rows of these passages.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
import dataclasses

from etils import epath

from rag_jax.corpus.passages import Passage
from rag_jax.corpus.records import find_file
from rag_jax.corpus.records import read_lines
from rag_jax.corpus.records import read_records
from rag_jax.corpus.records import shorten
from rag_jax.corpus.twins import Twins
from rag_jax.data.question_files import EXPECTED
from rag_jax.data.question_files import read_question_file

_EXPECTED = (
  "a BEIR folder (queries.jsonl and qrels/), one of its qrels/*.tsv, or a file"
  f" of {EXPECTED}, perhaps with 'gold'"
)
_QUERIES = "queries.jsonl"
_QRELS = "qrels"


@dataclasses.dataclass(slots=True, frozen=True, kw_only=True)
class BenchmarkQuestion:
  """A question, and what is known to answer it."""

  id: str
  question: str
  answers: tuple[str, ...] = ()  # accepted; () if they are not known
  gold: Mapping[str, int]  # id of a passage -> grade; {} if not known


def read_benchmark_questions(path: epath.PathLike) -> list[BenchmarkQuestion]:
  """Returns the questions of a file or folder, in its order.

  - A BEIR folder: those of queries.jsonl that qrels/test.tsv judges, or the one
    qrels/*.tsv that there is. Give a qrels/*.tsv itself to choose.
  - Any other file that `question_files.read_question_file` reads. The passage
    of SQuAD's questions is their paragraph, of DPR's those of `positive_ctxs`,
    of others `gold`, a list of ids of passages or an object of their grades.

  All may be gzip-compressed, with names that end in .gz.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: names the file and line, or place, of what cannot be used.
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
  questions: Sequence[BenchmarkQuestion],
  passages: Iterable[Passage],
  twins: Twins | None = None,
) -> tuple[list[dict[int, int]], int]:
  """Returns row -> grade for each question, and how many passages are missing.

  A passage that is not in the corpus gets a row below -1, which no search
  finds: it counts as not found, as in trec_eval.

  Args:
    questions: with ids of passages.
    passages: the corpus, read once; row = its place.
    twins: passages that have the text of one of these under another id.
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
      # Of ids with one text, the highest grade counts.
      grades[rows[id_]] = max(grade, grades.get(rows[id_], grade))
    graded.append(grades)
  return graded, len(missing)


def _is_qrels(path: epath.Path) -> bool:
  """Returns whether a .tsv lies where BEIR has its judgements."""
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
) -> Iterator[BenchmarkQuestion]:
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
      yield BenchmarkQuestion(id=id_, question=text, gold=graded.pop(id_))
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
        " with tabs between them: the id of a question, the id of a passage, a"
        " whole number as grade. Correct the line; if it is the last one, the"
        " file may be cut off: copy it again."
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


def _read_file(path: epath.Path) -> Iterator[BenchmarkQuestion]:
  for found in read_question_file(path):
    place = found.where.removeprefix(f"{path}:")
    yield BenchmarkQuestion(
      id=found.id or place.strip("[]"),
      question=found.question.strip(),
      answers=found.answers,
      gold=found.gold,
    )


def _question(text: str, where: str) -> str:
  if not text.strip():
    raise ValueError(
      f"{where}: the question is empty. Expected some text. Remove it."
    )
  return text.strip()


def _check_ids(
  questions: Sequence[BenchmarkQuestion], path: epath.Path
) -> None:
  seen: set[str] = set()
  for question in questions:
    if question.id in seen:
      raise ValueError(
        f"{path} has the question id {question.id!r} twice, the second time for"
        f" {shorten(question.question)}. Expected a different id for each."
        " Remove or rename one."
      )
    seen.add(question.id)
