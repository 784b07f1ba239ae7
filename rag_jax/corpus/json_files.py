"""Reads documents from .json files: a list of records, or SQuAD's paragraphs.

In: a file that is one JSON value. It is read whole, so memory grows with the
file; a .jsonl file has no such limit. Out: its documents.
"""

from collections.abc import Iterator, Mapping
import json
from typing import Any

from etils import epath

from rag_jax.corpus.document import Document
from rag_jax.corpus.document import FieldNames
from rag_jax.corpus.document import record_documents
from rag_jax.corpus.report import BadRecords
from rag_jax.corpus.text_files import bad_character
from rag_jax.corpus.text_files import decode_text
from rag_jax.corpus.text_files import read_bytes
from rag_jax.corpus.text_files import read_records
from rag_jax.corpus.text_files import shorten
from rag_jax.json_input import parse_json

_EXPECTED = (
  "Expected a list of objects, an object with one such list, SQuAD's format,"
  " or one object a line"
)


def squad_id(article: int, paragraph: int) -> str:
  """Returns our id for a paragraph of a SQuAD file, which has no ids.

  Both arguments are positions in the file's lists, from 0.
  """
  return f"{article}/{paragraph}"


def read_json(
  path: epath.PathLike, fields: FieldNames, bad_records: BadRecords
) -> Iterator[Document]:
  """Yields the documents of a .json or .json.gz file.

  Messages give the position of a record in the list, from 0, since many such
  files are one long line. A .json file with one object per line is read like a
  .jsonl file.

  Raises:
    ValueError: a record cannot be used; names the file and the position.
  """
  text = None
  with bad_records.refusing("undecodable"):
    text = decode_text(read_bytes(path), path)
  if text is None:
    return
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
  """Yields the documents of a file with one JSON object per line."""
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
      rows = [tree]  # a single record without a list around it
  if not isinstance(rows, list):
    found = f"object of {sorted(tree)}" if isinstance(tree, dict) else "value"
    problem = ValueError(
      f"{path}:1: {shorten(tree)}: the {found} is not one list of records."
      f" {_EXPECTED}. Convert the file."
    )
    bad_records.refuse("bad_record", problem)
    return
  for number, row in enumerate(rows):
    where = f"{path}:{name}[{number}]"
    with bad_records.refusing("bad_record"):
      if not isinstance(row, dict):
        raise ValueError(
          f"{where}: {shorten(row)} is not an object. Expected one with an id"
          " and text. Correct or remove it."
        )
      yield where, row


def _is_squad(tree: Any) -> bool:
  """Returns whether a JSON value is in the format of SQuAD."""
  articles = tree.get("data") if isinstance(tree, dict) else None
  return isinstance(articles, list) and any(
    isinstance(a, dict) and "paragraphs" in a for a in articles
  )


def _squad(
  tree: Mapping[str, Any], path: epath.PathLike, bad_records: BadRecords
) -> Iterator[Document]:
  """Yields a document for each paragraph; the questions are not read.

  The title is that of the article, with spaces for SQuAD's underscores.
  """
  for a, article in enumerate(tree["data"]):
    where = f"{path}:data[{a}]"
    fields = article if isinstance(article, dict) else {}
    title, paragraphs = fields.get("title", ""), fields.get("paragraphs")
    if not isinstance(paragraphs, list) or not isinstance(title, str):
      problem = ValueError(
        f"{where}: {shorten(article)} is not an article. Expected an object of"
        " paragraphs (a list) and perhaps a title (a string), as in SQuAD."
        " Correct or remove it."
      )
      bad_records.refuse("bad_record", problem)
      continue
    for p, paragraph in enumerate(paragraphs):
      place = f"{where}.paragraphs[{p}]"
      text = paragraph.get("context") if isinstance(paragraph, dict) else None
      bad = bad_character(text) or bad_character(title)
      with bad_records.refusing("bad_record"):
        if not isinstance(text, str) or bad:
          problem = f"its text holds {bad}" if bad else "no text in 'context'"
          raise ValueError(
            f"{place}: {problem}, in {shorten(paragraph)}. Expected an object"
            " whose field 'context' is plain text, as in SQuAD. Correct or"
            " remove the paragraph."
          )
        yield Document(squad_id(a, p), title.replace("_", " "), text, (), place)
