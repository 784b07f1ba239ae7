"""One document: what every reader gives, and how a JSON object becomes one.

In: a JSON object and the names of its fields. Out: a `Document`.
"""

from collections.abc import Iterable, Iterator, Mapping
import dataclasses
import json
from typing import Any

from rag_jax.corpus.records import check_fields
from rag_jax.corpus.report import BadRecords

Metadata = tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Heading:
  """A line of a text that is the heading of what follows."""

  start: int  # of the line, in the text
  end: int
  level: int  # from 1; those below it have higher numbers
  title: str


@dataclasses.dataclass(frozen=True, slots=True)
class Document:
  """A text as somebody wrote it, before it is split into passages."""

  id: str
  title: str  # may be empty
  text: str
  metadata: Metadata  # (name, value), in the order of the record
  where: str  # file and line, for messages
  # In their order. No part of what makes two documents equal: they are read
  # out of the same text.
  headings: tuple[Heading, ...] = dataclasses.field(default=(), compare=False)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FieldNames:
  """Where a record has its id, title and text.

  Attributes:
    id: if it is left at "id", a record without it may have BEIR's "_id".
    title: if it is left at "title", a record may have none.
    text: what is split, searched and read.
  """

  id: str = "id"
  title: str = "title"
  text: str = "text"


DEFAULT_FIELDS = FieldNames()


def _metadata(
  record: Mapping[str, Any], taken: set[str], where: str
) -> Metadata:
  """Returns the fields of a record that can be filtered by."""
  nested = record.get("metadata")  # where BEIR has them
  values = dict(nested) if isinstance(nested, dict) else {}
  values |= {k: v for k, v in record.items() if k not in taken}
  # Not isinstance: true is an int to it.
  values = {
    k: v for k, v in values.items() if type(v) in (str, int, float) and k
  }
  check_fields(values, where, required=dict.fromkeys(values, (str, int, float)))
  return tuple(
    (name, value if isinstance(value, str) else json.dumps(value))
    for name, value in values.items()
  )


def record_document(
  record: Mapping[str, Any], fields: FieldNames, where: str
) -> Document:
  """Returns the document that a JSON object is.

  The other fields that are strings or numbers become its metadata, and those
  of an object "metadata" in it; lists, further objects, true, false and null
  do not.

  Args:
    record: the object.
    fields: the names of its fields.
    where: its file and line.

  Raises:
    ValueError: the id (a string or a whole number), the text, or a title that
      was asked for is missing or of another type.
  """
  default = DEFAULT_FIELDS
  beir = fields.id == default.id and fields.id not in record and "_id" in record
  id_ = "_id" if beir else fields.id
  title = {fields.title: str}
  optional = fields.title == default.title
  check_fields(
    record,
    where,
    required={id_: (str, int), fields.text: str} | ({} if optional else title),
    optional=title if optional else {},
  )
  text, heading = record[fields.text], record.get(fields.title, "")
  if beir and not text.strip():
    text = heading  # BEIR's own searchers read the title and the text
  return Document(
    id=str(record[id_]),
    title=heading,
    text=text,
    metadata=_metadata(record, {id_, fields.title, fields.text}, where),
    where=where,
  )


def record_documents(
  records: Iterable[tuple[str, Mapping[str, Any]]],
  fields: FieldNames,
  bad_records: BadRecords,
) -> Iterator[Document]:
  """Yields the documents of (where, JSON object) pairs."""
  for where, record in records:
    try:
      document = record_document(record, fields, where)
    except ValueError as error:
      bad_records.refuse("bad_record", error)
      continue
    yield document
