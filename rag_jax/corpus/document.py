"""The `Document`: what every reader returns, and how a JSON object becomes one.

In: a JSON object and the names of its fields. Out: a `Document`.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
import dataclasses
import json
from typing import Any, Literal

from rag_jax.corpus.report import BadRecords
from rag_jax.corpus.text_files import check_fields
from rag_jax.corpus.text_files import shorten

_SCALARS = (str, int, float, bool)
Metadata = tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Heading:
  """A line of a text that is the heading of the lines after it."""

  start: int  # of the line, in characters of the text
  end: int
  level: int  # 1 is the top; subheadings have higher numbers
  title: str


@dataclasses.dataclass(frozen=True, slots=True)
class Document:
  """A text as its author wrote it, before it is split into passages."""

  id: str
  title: str  # may be empty
  text: str
  metadata: Metadata  # (name, value), in the order of the record
  where: str  # file and line, for messages
  # In the order of the text. Not compared: they follow from the text.
  headings: tuple[Heading, ...] = dataclasses.field(default=(), compare=False)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FieldNames:
  """The names of the fields with the id, title and text of a record.

  Attributes:
    id: with the default "id", BEIR's "_id" is read if there is no "id".
    title: with the default "title", KILT's "wikipedia_title" is read if there
      is no "title", and a record may have no title at all.
    text: what is split, searched and read. With the default "text", the
      "contents" of Pyserini and FlashRAG is read if there is no "text".
  """

  id: str = "id"
  title: str = "title"
  text: str = "text"


DEFAULT_FIELDS = FieldNames()

# Read instead of a default name that a record does not have.
_OTHER_NAMES = {"id": "_id", "title": "wikipedia_title", "text": "contents"}
_MAX_TITLE_CHARS = 200  # a longer first line of "contents" is text
_SENTENCE_ENDS = tuple(".!?:;,\u3002\uff01\uff1f")  # also Chinese ones


def field_name(
  part: Literal["id", "title", "text"],
  names: Collection[str],
  fields: FieldNames,
) -> str:
  """Returns the field that holds a record's id, title or text.

  Args:
    part: which of the three.
    names: the fields that the record has.
    fields: the names that the user gave.
  """
  field, other = getattr(fields, part), _OTHER_NAMES[part]
  is_default = field == getattr(DEFAULT_FIELDS, part)
  return (
    other if is_default and field not in names and other in names else field
  )


def _split_contents(contents: str) -> tuple[str, str]:
  """Returns the title and the text in the "contents" of Pyserini or FlashRAG.

  FlashRAG writes the title, often in double quotes, into the first line. A
  first line that is a sentence, is long, or is the only line is text.
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
  """Returns the text of KILT's list of paragraphs; the first is the title.

  Raises:
    ValueError: a paragraph is not a string.
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
  """Returns the fields of a record that searches can filter by."""
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
  """Returns a JSON object as a document.

  Its other fields become metadata, as do those of an inner object "metadata":
  strings, numbers, true and false, and lists of these. Other objects are left
  out. A field that is null counts as missing.

  Args:
    record: the object.
    fields: the names of its fields.
    where: its file and line.

  Raises:
    ValueError: the id (a string or a whole number), the text, or a title whose
      name the user gave is missing or has another type.
  """
  named = fields.title in record
  record = {k: v for k, v in record.items() if v is not None}
  id_ = field_name("id", record, fields)
  title_ = field_name("title", record, fields)
  text_ = field_name("text", record, fields)
  required, title = {id_: (str, int), text_: (str, list)}, {title_: str}
  if named or fields.title == DEFAULT_FIELDS.title:
    check_fields(record, where, required=required, optional=title)
  else:
    check_fields(record, where, required=required | title)
  text, heading = record[text_], record.get(title_, "")
  if isinstance(text, list):
    text = _joined(text, heading, where)
  if text_ != fields.text and not heading:
    heading, text = _split_contents(text)
  if id_ != fields.id and not text.strip():
    text = heading  # BEIR's own search reads the title and the text
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
    with bad_records.refusing("bad_record"):
      yield record_document(record, fields, where)
