"""Reads questions from files, in the formats of common data sets.

In: .jsonl (ours, NQ-open, FlashRAG, KILT, FEVER), .json (SQuAD, TriviaQA, DPR,
FiD, or a list of the objects of .jsonl, as WebQuestions), .csv or .tsv (DPR's
qas), or the dialogues of dialogue_files.py. Out: each question with its
answers, and the passages that are known to hold them.
"""

import ast
from collections.abc import Iterator, Mapping
import dataclasses
import json
from typing import Any

from etils import epath

from rag_jax.corpus.folding import is_blank
from rag_jax.corpus.json_files import squad_id
from rag_jax.corpus.report import BadRecords
from rag_jax.corpus.tables import Rows
from rag_jax.corpus.tables import sniff_delimiter
from rag_jax.corpus.text_files import check_fields
from rag_jax.corpus.text_files import decode_text
from rag_jax.corpus.text_files import find_file
from rag_jax.corpus.text_files import read_bytes
from rag_jax.corpus.text_files import read_records
from rag_jax.corpus.text_files import shorten
from rag_jax.data.dialogue_files import DialogueReader
from rag_jax.data.dialogue_files import dialogues_of
from rag_jax.data.dialogue_files import history_of
from rag_jax.data.dialogue_files import is_dialogue
from rag_jax.data.dialogue_files import kilt_turns
from rag_jax.data.published_records import as_ours
from rag_jax.json_input import parse_json

ENDS = (".jsonl", ".json", ".csv", ".tsv")
EXPECTED = (
  "objects with 'question' and 'answers' (or FlashRAG's 'golden_answers',"
  " NQ-open's 'answer', KILT's 'input' and 'output', FEVER's 'claim' and"
  " 'label', or those of TriviaQA or WebQuestions), SQuAD's .json, or DPR's"
  " question and list of answers with a tab between them"
)

# Names of the field with the answers; the first one found is used.
_ANSWERS = ("answers", "golden_answers", "answer")
# Fields that a file may leave out, or give as null.
_MAY_BE_NULL = ("id", "relation", "entity", "gold", "negatives", "target",
                "history", "knowledge")  # fmt: skip
_TABLE_NAMES = ["question", "answers"]

Page = tuple[str, str]  # id and title in Wikipedia; one may be ""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FoundQuestion:
  """A question as it stands in a file."""

  where: str  # file and line, or place, for messages
  question: str
  answers: tuple[str, ...]  # accepted; () if there is none, or none is known
  id: str = ""  # "" if the file gives none
  relation: str = ""  # what kind of fact is asked for; "" if not given
  gold: Mapping[str, int]  # id of a passage -> grade; {} if not known
  negatives: tuple[str, ...] = ()  # ids of passages that do not answer it
  # Sets of pages, each enough to answer it; () if not known.
  pages: tuple[tuple[Page, ...], ...] = ()
  history: tuple[str, ...] = ()  # earlier turns of a dialogue, oldest first
  knowledge: str = ""  # text that the answer is based on; "" if not given
  impossible: bool = False  # whether the file says that nobody can answer it


def read_question_file(path: epath.PathLike) -> Iterator[FoundQuestion]:
  """Yields the questions of a file, in its order.

  Ids and answers may be numbers: 1999 is read as "1999". FiD's `target` becomes
  the first answer. The gold passages are

  - SQuAD: the question's paragraph, under the id that the corpus reader gives
    it. A question that SQuAD 2 calls impossible has neither answers nor a gold
    passage;
  - DPR: `positive_ctxs`;
  - our .jsonl: `gold`.

  Hard negatives are `negatives` of our .jsonl; or DPR's `hard_negative_ctxs`,
  and if there are none, its `negative_ctxs`.

  Our .jsonl may also have `history`, the earlier turns of a dialogue, and
  `knowledge`, the text that the answer is based on. Each answer in a dialogue
  of dialogue_files.py is a question here.

  KILT names pages of Wikipedia instead, the `provenance` of each output; and
  FEVER by their titles, in `evidence`. Its labels are the answers.

  Args:
    path: ends in one of `ENDS`, optionally followed by .gz.

  Raises:
    FileNotFoundError: there is no such file; names the nearest ones.
    ValueError: a record is not a question; names its line or place.
  """
  path = find_file(path, EXPECTED)
  name = path.name.lower().removesuffix(".gz")
  if name.endswith((".csv", ".tsv")):
    yield from _read_table(path)
  elif name.endswith(".json"):
    yield from _read_json(path)
  elif name.endswith(".jsonl"):
    yield from _read_jsonl(path)
  else:
    raise ValueError(
      f"{path} ends in {path.suffix!r}, which is not a format of questions that"
      f" can be read. Expected one of {list(ENDS)}, optionally followed by .gz,"
      f" with {EXPECTED}. Rename or convert it."
    )


def _read_jsonl(path: epath.Path) -> Iterator[FoundQuestion]:
  dialogues = DialogueReader(path)
  for line, record in read_records(path, required={}):
    if is_dialogue(record):
      yield from _of_dialogue(dialogues, record, f"{path}:{line}")
    else:
      yield _of_record(record, f"{path}:{line}")


def _read_json(path: epath.Path) -> Iterator[FoundQuestion]:
  try:
    tree = parse_json(decode_text(read_bytes(path), path))
  except ValueError as error:
    line = 1
    if isinstance(error, json.JSONDecodeError):
      if error.msg == "Extra data":  # one object per line
        yield from _read_jsonl(path)
        return
      line = error.lineno
    elif str(error).startswith(str(path)):
      raise  # of read_bytes or decode_text
    raise ValueError(
      f"{path}:{line}: not valid JSON ({error}). Expected {EXPECTED}. Correct"
      " the file; if it was cut off, copy it again."
    ) from error
  if (found := dialogues_of(tree)) is not None:
    dialogues = DialogueReader(path)
    for place, record in found:
      yield from _of_dialogue(dialogues, record, f"{path}{place}")
    return
  if isinstance(tree, dict) and isinstance(tree.get("data"), list):
    yield from _squad(tree["data"], path)
    return
  if isinstance(tree, dict) and {"question", "input"} & set(tree):
    tree = [tree]  # one question, and nothing around it
  inside = ""
  if isinstance(tree, dict) and isinstance(tree.get("Data"), list):  # TriviaQA
    tree, inside = tree["Data"], "Data"
  if not isinstance(tree, list):
    raise ValueError(
      f"{path}:1: {shorten(tree)} is neither a list of questions nor an object"
      f" with a list 'data' (SQuAD). Expected {EXPECTED}. Convert the file."
    )
  for number, record in enumerate(tree):
    where = f"{path}:{inside}[{number}]"
    _check_object(record, where)
    yield _of_record(record, where)


def _read_table(path: epath.Path) -> Iterator[FoundQuestion]:
  """Yields the questions of DPR's qas: no header, answers as a Python list.

  With a header (question, answers, and optionally id and relation) the columns
  may have any order, and answers may be a JSON list.
  """
  rows = Rows(path, sniff_delimiter(path), bad_records=BadRecords("fail"))
  names = _TABLE_NAMES
  for number, row in enumerate(rows):
    if not number and "question" in row:
      names = row
      continue
    where = rows.where
    if len(row) != len(names):
      raise ValueError(
        f"{where}: {len(row)} columns, {shorten(row, 120)}. Expected"
        f" {len(names)}: {shorten(names, 120)}, with tabs between them, as in"
        " DPR's qas. Correct the line; if it is the last one, the file may be"
        " cut off: copy it again."
      )
    record: dict[str, Any] = dict(zip(names, row, strict=True))
    for name in _ANSWERS:
      if name in record:
        record[name] = _literal(record[name], f"{where}: column {name!r}")
    yield _of_record(record, where)


def _literal(text: str, what: str) -> list[Any]:
  """Returns the list that a cell holds, or its text as a list of one."""
  if not text.lstrip().startswith("["):
    return [text]
  # Only literals are parsed, nothing is executed. A list of them is not nested.
  depth = text.count("[") + text.count("(") + text.count("{")
  try:
    if len(text) > 1 << 20 or depth > 10_000:
      raise ValueError("too long")
    value = ast.literal_eval(text.strip())
  except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
    raise ValueError(
      f"{what} is {shorten(text)}, which is not a list ({error}). Expected a"
      " list in Python or JSON syntax, such as ['Paris', 'Paris, France']."
      " Correct the line."
    ) from error
  return value


def _of_record(record: Mapping[str, Any], where: str) -> FoundQuestion:
  """Returns the question of one JSON object."""
  record = as_ours(record, where)
  if "claim" in record and "question" not in record:
    return _fever(record, where)
  kilt = "question" not in record and "input" in record
  question = "input" if kilt else "question"
  record = {  # null is absent
    name: value
    for name, value in record.items()
    if value is not None or name not in _MAY_BE_NULL
  }
  check_fields(
    record,
    where,
    required={question: str},
    optional={
      "id": (str, int),
      "relation": str,
      "entity": str,
      "gold": (list, dict),
      "negatives": list,
      "target": str,
      "history": list,
      "knowledge": str,
    },
  )
  if is_blank(record[question]):
    raise ValueError(
      f"{where}: the question is empty, {shorten(record[question])}. Expected"
      " text. Complete or remove it."
    )
  answers = _kilt_answers(record, where) if kilt else _answers(record, where)
  target = record.get("target", "")
  if target in answers:  # FiD's: what is taught
    answers = [target, *(a for a in answers if a != target)]
  history, asked = history_of(record, where), record[question]
  if kilt and not history:
    history, asked = kilt_turns(asked)
  return FoundQuestion(
    where=where,
    question=asked,
    answers=tuple(dict.fromkeys(answers)),
    id=str(record.get("id", "")),
    relation=record.get("relation", ""),
    gold=_gold(record, where),
    negatives=_negatives(record, where),
    pages=_kilt_pages(record, where) if kilt else (),
    history=history,
    knowledge=record.get("knowledge", ""),
  )


def _of_dialogue(
  dialogues: DialogueReader, record: Any, where: str
) -> Iterator[FoundQuestion]:
  for found in dialogues.exchanges(record, where):
    yield FoundQuestion(
      where=found.where,
      question=found.question,
      answers=(found.answer,),
      gold={},
      history=found.history,
      knowledge=found.knowledge,
      pages=((("", found.title),),) if found.title else (),
    )


# How FEVER writes brackets and the like in titles.
_BRACKETS = {"-LRB-": "(", "-RRB-": ")", "-LSB-": "[", "-RSB-": "]",
             "-COLON-": ":", "_": " "}  # fmt: skip


def _fever(record: Mapping[str, Any], where: str) -> FoundQuestion:
  """Returns a claim, whose answer is its label (Thorne et al. 2018)."""
  record = {name: value for name, value in record.items() if value is not None}
  check_fields(
    record,
    where,
    required={"claim": str},
    optional={"id": (str, int), "label": str, "evidence": list},
  )
  if is_blank(record["claim"]):
    raise ValueError(
      f"{where}: the claim is empty, {shorten(record['claim'])}. Expected text."
      " Complete or remove it."
    )
  label = record.get("label")
  return FoundQuestion(
    where=where,
    question=record["claim"],
    answers=() if label is None else (_answer(label, where),),
    id=str(record.get("id", "")),
    gold=_gold(record, where),
    pages=_fever_pages(record.get("evidence", [])),
  )


def _fever_pages(evidence: list[Any]) -> tuple[tuple[Page, ...], ...]:
  """Returns the titles of each set of sentences that decides a claim."""
  sets: dict[tuple[Page, ...], None] = {}
  for sentences in evidence:
    titles = set()
    for sentence in sentences if isinstance(sentences, list) else ():
      # Annotation, evidence, title and line; a title may be null.
      if isinstance(sentence, list) and len(sentence) == 4 and sentence[2]:
        title = str(sentence[2])
        for theirs, ours in _BRACKETS.items():
          title = title.replace(theirs, ours)
        titles.add(("", title))
    if titles:
      sets[tuple(sorted(titles))] = None
  return tuple(sets)


def _answers(record: Mapping[str, Any], where: str) -> list[str]:
  name = next((name for name in _ANSWERS if name in record), _ANSWERS[0])
  if name not in record and ("gold" in record or "positive_ctxs" in record):
    return []  # the passages of use are known, not what they answer
  value = record.get(name)
  # HotpotQA and others have one, and SQuAD at Hugging Face an object of lists.
  if name == "answer" and not isinstance(value, list):
    value = [value]
  if isinstance(value, dict) and isinstance(value.get("text"), list):
    value = value["text"]
  check_fields({**record, name: value} if name in record else record, where,
               required={name: list})  # fmt: skip
  assert isinstance(value, list)
  return [_answer(answer, where) for answer in value]


def _answer(value: Any, where: str) -> str:
  """Returns one answer as text; a number as it is written.

  Raises:
    ValueError: it is something else, or empty.
  """
  if type(value) in (int, float):  # true is an int to isinstance
    return json.dumps(value)
  if not isinstance(value, str) or is_blank(value):
    raise ValueError(
      f"{where}: {shorten(value)} is one of the answers. Expected a list of"
      " strings that are not empty, or numbers, such as"
      ' ["Paris"]. Correct or remove the question.'
    )
  return value


def _kilt_answers(record: Mapping[str, Any], where: str) -> list[str]:
  return [
    _answer(output["answer"], where)
    for _, output in _objects(record, "output", where)
    if "answer" in output  # others have a passage alone
  ]


def _kilt_pages(
  record: Mapping[str, Any], where: str
) -> tuple[tuple[Page, ...], ...]:
  """Returns the pages of each output, without repeated sets.

  A set with a page that has neither id nor title is left out.
  """
  sets: dict[tuple[Page, ...], None] = {}
  for number, output in _objects(record, "output", where):
    if output.get("provenance") is None:
      continue
    inner = f"{where}.output[{number}]"
    pages = set()
    for _, page in _objects(output, "provenance", inner):
      id_, title = page.get("wikipedia_id"), page.get("title")
      pages.add((
        str(id_).strip() if type(id_) in (str, int) else "",
        title.strip() if isinstance(title, str) else "",
      ))  # fmt: skip
    if pages and ("", "") not in pages:
      sets[tuple(sorted(pages))] = None
  return tuple(sets)


def _gold(record: Mapping[str, Any], where: str) -> dict[str, int]:
  """Returns the graded passages of our .jsonl, or those of DPR."""
  if "gold" in record:
    gold = record["gold"]
    if isinstance(gold, list):
      gold = {_id(id_, "gold", where): 1 for id_ in gold}
    for id_, grade in gold.items():
      if type(grade) is not int:
        raise ValueError(
          f"{where}: field 'gold' gives passage {id_!r} the grade"
          f" {shorten(grade)}. Expected a whole number. Correct it."
        )
    return gold
  return dict.fromkeys(_dpr_ids(record, "positive_ctxs", where), 1)


def _negatives(record: Mapping[str, Any], where: str) -> tuple[str, ...]:
  """Returns the hard negatives, without repetitions."""
  if "negatives" in record:
    found = [_id(id_, "negatives", where) for id_ in record["negatives"]]
  else:
    names = "hard_negative_ctxs", "negative_ctxs"
    # As DPR falls back: the second only if the first is empty.
    lists = (_dpr_ids(record, name, where) for name in names
             if record.get(name) is not None)  # fmt: skip
    found = next(filter(None, lists), [])
  return tuple(dict.fromkeys(found))


def _dpr_ids(record: Mapping[str, Any], name: str, where: str) -> list[str]:
  """Returns the ids of the passages that DPR's field `name` lists."""
  if name not in record:
    return []
  ids = [
    context.get("passage_id", context.get("psg_id"))
    for _, context in _objects(record, name, where)
  ]
  return [str(id_) for id_ in ids if type(id_) in (str, int)]


def _id(value: Any, name: str, where: str) -> str:
  if type(value) not in (str, int):
    raise ValueError(
      f"{where}: field {name!r} holds {shorten(value)}. Expected a list of"
      " strings or whole numbers. Correct it."
    )
  return str(value)


def _squad(articles: list[Any], path: epath.Path) -> Iterator[FoundQuestion]:
  for a, article in enumerate(articles):
    place = f"{path}:data[{a}]"
    for p, paragraph in _objects(article, "paragraphs", place):
      inner = f"{place}.paragraphs[{p}]"
      for q, record in _objects(paragraph, "qas", inner):
        yield _squad_question(record, f"{inner}.qas[{q}]", squad_id(a, p))


def _squad_question(
  record: Mapping[str, Any], where: str, paragraph: str
) -> FoundQuestion:
  check_fields(
    record,
    where,
    required={"question": str, "id": (str, int)},
    optional={"is_impossible": bool},
  )
  if is_blank(record["question"]):
    raise ValueError(
      f"{where}: the question is empty. Expected some text. Remove it."
    )
  texts: list[str] = []
  # SQuAD 2 has plausible answers of questions that nobody can answer.
  impossible = record.get("is_impossible", False)
  if not impossible:
    for number, answer in _objects(record, "answers", where):
      check_fields(answer, f"{where}.answers[{number}]",
                   required={"text": (str, int, float)})  # fmt: skip
      texts.append(_answer(answer["text"], f"{where}.answers[{number}]"))
  return FoundQuestion(
    where=where,
    question=record["question"],
    answers=tuple(dict.fromkeys(texts)),
    id=str(record["id"]),
    gold={} if impossible else {paragraph: 1},
    impossible=impossible,
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
      f"{where}: {shorten(value)} is not an object. Expected {EXPECTED}."
      " Correct or remove it."
    )
