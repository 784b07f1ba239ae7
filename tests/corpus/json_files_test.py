"""JSON files that are one value give their records or SQuAD's paragraphs."""

import json

from corpora import assert_fails
from corpora import read
import pytest

from rag_jax.corpus.document import Document
from rag_jax.corpus.documents import FieldNames
from rag_jax.corpus.json_files import squad_id

SQUAD = {
  "version": "1.1",
  "data": [
    {
      "title": "Super_Bowl_50",
      "paragraphs": [
        {"context": "The Panthers.", "qas": [{"question": "Who?"}]},
        {"context": "The Broncos.", "qas": []},
      ],
    },
    {"paragraphs": [{"context": "Warsaw."}]},
  ],
}


@pytest.fixture
def write(write):
  def write_json(value):
    data = value if isinstance(value, bytes) else json.dumps(value)
    return write(data, "x.json")

  return write_json


def refused(path, *parts):
  assert_fails(lambda: read(path), *parts)


def test_each_paragraph_of_squad_is_a_document(write):
  path = write(SQUAD)
  documents, _ = read(path)
  where = f"{path}:data[{{}}].paragraphs[{{}}]".format
  assert documents == [
    Document("0/0", "Super Bowl 50", "The Panthers.", (), where(0, 0)),
    Document("0/1", "Super Bowl 50", "The Broncos.", (), where(0, 1)),
    Document("1/0", "", "Warsaw.", (), where(1, 0)),
  ]
  assert documents[1].id == squad_id(0, 1)


@pytest.mark.parametrize(
  ("article", "place", "message"),
  [
    ("no", "data[1]", "'no' is not an article"),
    ({"title": 7, "paragraphs": []}, "data[1]", "is not an article"),
    ({"paragraphs": {}}, "data[1]", "is not an article"),
    ({"paragraphs": ["no"]}, "data[1].paragraphs[0]", "no text in 'context'"),
    ({"paragraphs": [{}]}, "data[1].paragraphs[0]", "no text in 'context'"),
    (
      {"paragraphs": [{"context": "a\0b"}]},
      "data[1].paragraphs[0]",
      "its text holds a NUL",
    ),
  ],
)
def test_what_is_no_paragraph_is_named_or_skipped(
  write, article, place, message
):
  first, second = SQUAD["data"]
  path = write({"data": [first, article, second]})
  refused(path, f"{path}:{place}: ", message, "Expected", "orrect or")
  documents, report = read(path, "skip")
  assert [d.id for d in documents] == ["0/0", "0/1", "2/0"]
  assert report.dropped["bad_record"] == 1


def test_records_of_a_list_that_are_no_objects_are_named_or_skipped(write):
  path = write([{"id": 1, "text": "x"}, 7, {"id": 2}, {"id": 3, "text": "y"}])
  refused(path, f"{path}:[1]: 7 is not an object", "Correct or remove")
  documents, report = read(path, "skip")
  assert [d.id for d in documents] == ["1", "3"]
  assert report.dropped["bad_record"] == 2
  assert report.places["bad_record"][1].startswith(
    f"{path}:[2]: no field 'text'"
  )


def test_a_single_object_with_a_text_is_one_document(write):
  documents, _ = read(write({"id": 1, "text": "x", "tags": ["a"]}))
  assert [(d.id, d.text) for d in documents] == [("1", "x")]


@pytest.mark.parametrize(
  "value", [7, None, "x", {}, {"a": [1]}, {"a": [{}], "b": [{}]}]
)
def test_json_without_one_list_of_records_is_refused(write, value):
  refused(write(value), "x.json:1: ", "list of records. Expected a list of obj")


@pytest.mark.parametrize(
  ("data", "line"),
  [
    (json.dumps(SQUAD, indent=1).encode()[:80], 6),
    (b'[{"id": 1, "text": "x"}', 1),
    (b"[" * 100_000, 1),
    (b"", 1),
    (b"[NaN]", 1),
  ],
)
def test_a_file_that_is_cut_off_is_named_or_counted(write, data, line):
  path = write(data)
  refused(path, f"{path}:{line}: not valid JSON", "Expected", "copy it again")
  documents, report = read(path, "skip")
  assert documents == []
  assert report.dropped["bad_record"] == 1


def test_a_file_that_is_not_utf8_is_named_or_counted(write):
  path = write(b'[\n{"id": 1, "text": "caf\xe9"}]')
  refused(path, f"{path}:2: byte 0xe9 at offset 24", "Expected UTF-8")
  documents, report = read(path, "skip")
  assert documents == []
  assert report.dropped["undecodable"] == 1


def test_fields_have_other_names_in_lists_too(write):
  path = write({"rows": [{"k": 1, "body": "x"}]})
  documents, _ = read(path, fields=FieldNames(id="k", text="body"))
  assert [(d.id, d.text) for d in documents] == [("1", "x")]
