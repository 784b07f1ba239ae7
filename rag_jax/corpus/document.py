"""One document: what every reader gives, and how a JSON object becomes one.

In: a JSON object and the names of its fields. Out: a `Document`.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
import dataclasses
import json
from typing import Any

from rag_jax.corpus.records import check_fields
from rag_jax.corpus.records import shorten
from rag_jax.corpus.report import BadRecords

_SCALARS = (str, int, float, bool)
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
    title: if it is left at "title", a record may have none, or KILT's
      "wikipedia_title".
    text: what is split, searched and read. If it is left at "text", a record
      without it may have Pyserini's and FlashRAG's "contents".
  """

  id: str = "id"
  title: str = "title"
  text: str = "text"


DEFAULT_FIELDS = FieldNames()

_MAX_TITLE_CHARS = 200  # of the first line of "contents", to be a title
# Of a sentence, also a Chinese one.
_SENTENCE_ENDS = tuple(".!?:;,\u3002\uff01\uff1f")


def _present(
  names: Collection[str], field: str, default: str, other: str
) -> str:
  """Returns `field`, or `other` where that is there in its place."""
  is_other = field == default and field not in names and other in names
  return other if is_other else field


def id_field(names: Collection[str], fields: FieldNames) -> str:
  """Returns which of a record's `names` is its id."""
  return _present(names, fields.id, DEFAULT_FIELDS.id, "_id")


def text_field(names: Collection[str], fields: FieldNames) -> str:
  """Returns which of a record's `names` is its text."""
  return _present(names, fields.text, DEFAULT_FIELDS.text, "contents")


def _title_field(names: Collection[str], fields: FieldNames) -> str:
  title = DEFAULT_FIELDS.title
  return _present(names, fields.title, title, "wikipedia_title")


def _split_contents(contents: str) -> tuple[str, str]:
  """Returns the title and the text of Pyserini's or FlashRAG's "contents".

  FlashRAG writes the title, often in double quotes, into the first line. A
  first line that is a sentence, or long, or all there is, is text.
  """
  first, _, rest = contents.partition("\n")
  title = first.strip()
  if not title or not rest.strip():
    return "", contents
  if len(title) > 2 and title[0] == title[-1] == '"':
    return title[1:-1].replace('""', '"').strip(), rest
  if len(title) > _MAX_TITLE_CHARS or title.endswith(_SENTENCE_ENDS):
    return "", contents
  return title, rest


def _joined(paragraphs: list[Any], title: str, where: str) -> str:
  """Returns the text of KILT's list of paragraphs, of which the first is title.

  Raises:
    ValueError: a paragraph is no string.
  """
  for number, paragraph in enumerate(paragraphs):
    if not isinstance(paragraph, str):
      raise ValueError(
        f"{where}: paragraph {number} of the text is {shorten(paragraph)}."
        " Expected a string, or a list of strings, as in KILT's knowledge"
        " source. Correct the record."
      )
  if len(paragraphs) > 1 and title and paragraphs[0].strip() == title.strip():
    paragraphs = paragraphs[1:]
  return "\n".join(paragraph.removesuffix("\n") for paragraph in paragraphs)


def _metadata(
  record: Mapping[str, Any], taken: set[str], where: str
) -> Metadata:
  """Returns the fields of a record that can be filtered by."""
  nested = record.get("metadata")  # where BEIR has them
  values = dict(nested) if isinstance(nested, dict) else {}
  values |= {k: v for k, v in record.items() if k not in taken}
  metadata = []
  for name, value in values.items():
    items = value if isinstance(value, list) else [value]
    for item in items if name else ():
      if not isinstance(item, _SCALARS):
        continue
      check_fields({name: item}, where, required={name: _SCALARS})
      text = item if isinstance(item, str) else json.dumps(item)
      metadata.append((name, text))
  return tuple(dict.fromkeys(metadata))


def record_document(
  record: Mapping[str, Any], fields: FieldNames, where: str
) -> Document:
  """Returns the document that a JSON object is.

  The other fields become its metadata, and those of an object "metadata" in
  it: strings, numbers, true and false, and each of these in a list. Further
  objects do not. A field that is null is as one that is not there.

  Args:
    record: the object.
    fields: the names of its fields.
    where: its file and line.

  Raises:
    ValueError: the id (a string or a whole number), the text, or a title that
      was asked for is missing or of another type.
  """
  default = DEFAULT_FIELDS
  named = fields.title in record
  record = {k: v for k, v in record.items() if v is not None}
  id_, text_ = id_field(record, fields), text_field(record, fields)
  title_ = _title_field(record, fields)
  beir = id_ != fields.id
  required = {id_: (str, int), text_: (str, list)}
  title = {title_: str}
  optional = fields.title == default.title or named
  check_fields(
    record,
    where,
    required=required | ({} if optional else title),
    optional=title if optional else {},
  )
  text, heading = record[text_], record.get(title_, "")
  if isinstance(text, list):
    text = _joined(text, heading, where)
  if text_ != fields.text and not heading:
    heading, text = _split_contents(text)
  if beir and not text.strip():
    text = heading  # BEIR's own searchers read the title and the text
  return Document(
    id=str(record[id_]),
    title=heading,
    text=text,
    metadata=_metadata(record, {id_, title_, text_}, where),
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
