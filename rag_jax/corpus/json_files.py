"""Documents of .json files: a list of records, or SQuAD's paragraphs.

In: a file that is one JSON value, which is read whole: memory grows with the
file. Out: its documents. A .jsonl file has no such limit.
"""

from collections.abc import Iterator, Mapping
import json
from typing import Any

from etils import epath

from rag_jax.corpus.document import Document
from rag_jax.corpus.document import FieldNames
from rag_jax.corpus.document import record_documents
from rag_jax.corpus.records import bad_character
from rag_jax.corpus.records import decode_text
from rag_jax.corpus.records import read_bytes
from rag_jax.corpus.records import read_records
from rag_jax.corpus.records import shorten
from rag_jax.corpus.report import BadRecords
from rag_jax.json_input import parse_json

_EXPECTED = (
  "Expected a list of objects, an object with one such list, SQuAD's format,"
  " or one object a line"
)


def squad_id(article: int, paragraph: int) -> str:
  """Returns the id of a paragraph of a SQuAD file, which has none itself.

  Args:
    article: place in the file's list "data", from 0.
    paragraph: place in the article's list "paragraphs", from 0.
  """
  return f"{article}/{paragraph}"


def read_json(
  path: epath.PathLike, fields: FieldNames, bad_records: BadRecords
) -> Iterator[Document]:
  """Yields the documents of a .json or .json.gz file.

  A record's place is its number in the list, from 0: many such files are one
  line. What is named .json but has one object a line is read as .jsonl is.

  Raises:
    ValueError: names the file and place of what cannot be used.
  """
  try:
    raw = read_bytes(path)
    text = decode_text(raw, path)
  except ValueError as error:
    bad_records.refuse("undecodable", error)
    return
  del raw
  try:
    tree = parse_json(text)
  except ValueError as error:
    extra = isinstance(error, json.JSONDecodeError)
    if extra and error.msg == "Extra data":
      yield from read_jsonl_documents(path, fields, bad_records)
      return
    line = error.lineno if isinstance(error, json.JSONDecodeError) else 1
    problem = ValueError(
      f"{path}:{line}: not valid JSON ({error}). {_EXPECTED}. Correct the"
      " file; if it was cut off, copy it again."
    )
    problem.__cause__ = error
    bad_records.refuse("bad_record", problem)
    return
  del text
  if _is_squad(tree):
    yield from _squad(tree, path, bad_records)
  else:
    records = _records(tree, path, fields, bad_records)
    yield from record_documents(records, fields, bad_records)


def read_jsonl_documents(
  path: epath.PathLike, fields: FieldNames, bad_records: BadRecords
) -> Iterator[Document]:
  """Yields the documents of a file with one JSON object a line."""
  name = str(path)
  records = (
    (f"{name}:{line}", record)
    for line, record in read_records(path, required={}, bad_records=bad_records)
  )
  yield from record_documents(records, fields, bad_records)


def _records(
  tree: Any, path: epath.PathLike, fields: FieldNames, bad_records: BadRecords
) -> Iterator[tuple[str, Mapping[str, Any]]]:
  """Yields (where, object) of the one list of objects in a JSON value."""
  name, rows = "", tree
  if isinstance(tree, dict):
    lists = {
      k: v
      for k, v in tree.items()
      if isinstance(v, list) and any(isinstance(row, dict) for row in v)
    }
    if len(lists) == 1:
      ((name, rows),) = lists.items()
    elif fields.text in tree:
      rows = [tree]  # one record, and nothing around it
  if not isinstance(rows, list):
    found = f"an object of {sorted(tree)}" if isinstance(tree, dict) else "no"
    bad_records.refuse(
      "bad_record",
      ValueError(
        f"{path}:1: {shorten(tree)}: {found} list of records. {_EXPECTED}."
        " Convert the file."
      ),
    )
    return
  for number, row in enumerate(rows):
    where = f"{path}:{name}[{number}]"
    if isinstance(row, dict):
      yield where, row
    else:
      bad_records.refuse(
        "bad_record",
        ValueError(
          f"{where}: {shorten(row)} is not an object. Expected one with an id"
          " and text. Correct or remove it."
        ),
      )


def _is_squad(tree: Any) -> bool:
  """Returns whether a JSON value is in the format of SQuAD."""
  articles = tree.get("data") if isinstance(tree, dict) else None
  return isinstance(articles, list) and any(
    isinstance(a, dict) and "paragraphs" in a for a in articles
  )


def _squad(
  tree: Mapping[str, Any], path: epath.PathLike, bad_records: BadRecords
) -> Iterator[Document]:
  """Yields a document for each paragraph; questions are left alone.

  The title is that of the article, with spaces where SQuAD has underscores.
  """
  for a, article in enumerate(tree["data"]):
    where = f"{path}:data[{a}]"
    paragraphs = article.get("paragraphs") if isinstance(article, dict) else ""
    title = article.get("title", "") if isinstance(article, dict) else ""
    if not isinstance(paragraphs, list) or not isinstance(title, str):
      bad_records.refuse(
        "bad_record",
        ValueError(
          f"{where}: {shorten(article)} is no article. Expected an object of"
          " paragraphs (a list) and perhaps a title (a string), as in SQuAD."
          " Correct or remove it."
        ),
      )
      continue
    for p, paragraph in enumerate(paragraphs):
      place = f"{where}.paragraphs[{p}]"
      text = paragraph.get("context") if isinstance(paragraph, dict) else None
      bad = bad_character(text) or bad_character(title)
      if not isinstance(text, str) or bad:
        problem = f"its text holds {bad}" if bad else "no text in 'context'"
        bad_records.refuse(
          "bad_record",
          ValueError(
            f"{place}: {problem}, in {shorten(paragraph)}. Expected an object"
            " whose field 'context' is plain text, as in SQuAD. Correct or"
            " remove the paragraph."
          ),
        )
        continue
      yield Document(
        id=squad_id(a, p),
        title=title.replace("_", " "),
        text=text,
        metadata=(),
        where=place,
      )
