"""Questions whose passages or answers are known, to measure retrieval with.

In: a BEIR folder, SQuAD's or DPR's JSON, or JSONL. Out: questions with the
answers and the graded passages that each has, and the rows of these passages.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
import dataclasses
import json
from typing import Any

from etils import epath

from rag_jax.corpus.json_files import squad_id
from rag_jax.corpus.passages import Passage
from rag_jax.corpus.records import check_fields
from rag_jax.corpus.records import decode_text
from rag_jax.corpus.records import find_file
from rag_jax.corpus.records import parse_json
from rag_jax.corpus.records import read_bytes
from rag_jax.corpus.records import read_lines
from rag_jax.corpus.records import read_records
from rag_jax.corpus.records import shorten
from rag_jax.corpus.twins import Twins

_EXPECTED = (
  "a BEIR folder (queries.jsonl and qrels/), one of its qrels/*.tsv, SQuAD's or"
  " DPR's .json, or .jsonl with 'question', 'answers' and perhaps 'gold'"
)
_QUERIES = "queries.jsonl"


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
  - SQuAD's .json: each question's passage is its paragraph, under the id that
    the reader of a corpus gives it.
  - DPR's .json: `question`, `answers`, and the ids of `positive_ctxs`.
  - .jsonl: `question`, `answers`, and perhaps `id` and `gold`, a list of ids of
    passages or an object of their grades.

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
    name = path.name.removesuffix(".gz")
    if name.endswith(".tsv"):
      questions = _read_beir(path.parent.parent, path)
    elif name.endswith(".json"):
      questions = _read_json(path)
    elif name.endswith(".jsonl"):
      questions = _read_jsonl(path)
    else:
      raise ValueError(
        f"{path} is no file of questions that can be read. Expected"
        f" {_EXPECTED}. Rename or convert it."
      )
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
    for number, twin in enumerate(twins or ()):
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


def _qrels_file(folder: epath.Path) -> epath.Path:
  qrels = folder / "qrels"
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


def _read_json(path: epath.Path) -> Iterator[BenchmarkQuestion]:
  try:
    tree = parse_json(decode_text(read_bytes(path), path))
  except RecursionError as error:
    raise ValueError(
      f"{path}:1: nested too deeply. Expected {_EXPECTED}. Convert the file."
    ) from error
  except json.JSONDecodeError as error:
    raise ValueError(
      f"{path}:{error.lineno}: not valid JSON ({error}). Expected {_EXPECTED}."
      " Correct the file; if it was cut off, copy it again. One object a line"
      " is .jsonl: rename it."
    ) from error
  if isinstance(tree, list):
    yield from _dpr(tree, path)
  elif isinstance(tree, dict) and isinstance(tree.get("data"), list):
    yield from _squad(tree["data"], path)
  else:
    raise ValueError(
      f"{path}:1: {shorten(tree)} is neither a list of questions (DPR) nor an"
      f" object with a list 'data' (SQuAD). Expected {_EXPECTED}. Convert the"
      " file."
    )


def _squad(
  articles: list[Any], path: epath.Path
) -> Iterator[BenchmarkQuestion]:
  for a, article in enumerate(articles):
    place = f"{path}:data[{a}]"
    for p, paragraph in _objects(article, "paragraphs", place):
      inner = f"{place}.paragraphs[{p}]"
      for q, record in _objects(paragraph, "qas", inner):
        where = f"{inner}.qas[{q}]"
        check_fields(record, where, required={"question": str, "id": str})
        texts = []
        for number, answer in _objects(record, "answers", where):
          check_fields(
            answer, f"{where}.answers[{number}]", required={"text": str}
          )
          texts.append(answer["text"])
        yield BenchmarkQuestion(
          id=record["id"],
          question=_question(record["question"], where),
          answers=tuple(dict.fromkeys(texts)),
          gold={squad_id(a, p): 1},
        )


def _dpr(records: list[Any], path: epath.Path) -> Iterator[BenchmarkQuestion]:
  for number, record in enumerate(records):
    where = f"{path}:[{number}]"
    _check_object(record, where)
    check_fields(record, where, required={"question": str, "answers": list})
    gold: dict[str, int] = {}
    if "positive_ctxs" in record:
      for _, context in _objects(record, "positive_ctxs", where):
        id_ = context.get("passage_id", context.get("psg_id"))
        if isinstance(id_, (str, int)):
          gold[str(id_)] = 1
    yield BenchmarkQuestion(
      id=str(number),
      question=_question(record["question"], where),
      answers=_strings(record["answers"], "answers", where),
      gold=gold,
    )


def _read_jsonl(path: epath.Path) -> Iterator[BenchmarkQuestion]:
  rows = read_records(
    path,
    required={"question": str, "answers": list},
    optional={"id": (str, int), "gold": (list, dict)},
  )
  for line, record in rows:
    where = f"{path}:{line}"
    gold = record.get("gold", [])
    if isinstance(gold, list):
      gold = dict.fromkeys(_strings(gold, "gold", where), 1)
    for id_, grade in gold.items():
      if type(grade) is not int:  # true is an int to isinstance
        raise ValueError(
          f"{where}: field 'gold' gives passage {id_!r} the grade"
          f" {shorten(grade)}. Expected a whole number. Correct it."
        )
    yield BenchmarkQuestion(
      id=str(record.get("id", line)),
      question=_question(record["question"], where),
      answers=_strings(record["answers"], "answers", where),
      gold=gold,
    )


def _objects(
  parent: Any, name: str, where: str
) -> Iterator[tuple[int, Mapping[str, Any]]]:
  """Yields (number, object) of the list that is a field of `parent`."""
  _check_object(parent, where)
  check_fields(parent, where, required={name: list})
  for number, child in enumerate(parent[name]):
    _check_object(child, f"{where}.{name}[{number}]")
    yield number, child


def _check_object(value: Any, where: str) -> None:
  if not isinstance(value, dict):
    raise ValueError(
      f"{where}: {shorten(value)} is not an object. Expected {_EXPECTED}."
      " Correct or remove it."
    )


def _strings(values: list[Any], name: str, where: str) -> tuple[str, ...]:
  for value in values:
    if not isinstance(value, str):
      raise ValueError(
        f"{where}: field {name!r} holds {shorten(value)}. Expected a list of"
        " strings. Correct it."
      )
  return tuple(values)


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
