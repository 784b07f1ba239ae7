"""Records of the field's corpora become documents with title and text."""

import json

import pytest

from rag_jax.corpus.document import DEFAULT_FIELDS
from rag_jax.corpus.document import FieldNames
from rag_jax.corpus.document import record_document
from rag_jax.corpus.documents import read_documents
from rag_jax.corpus.passage_reader import load_passages
from rag_jax.corpus.report import BadRecords


def document(record, fields=DEFAULT_FIELDS):
  return record_document(record, fields, "here")


@pytest.mark.parametrize(
  ("contents", "title", "text"),
  [
    ("One passage.", "", "One passage."),  # Pyserini's MS MARCO
    ('"Aaron"\nAaron is a prophet.', "Aaron", "Aaron is a prophet."),
    ('"""Heroes"" (song)"\nBy Bowie.', '"Heroes" (song)', "By Bowie."),
    ("Bowl 50\nThe Panthers\nlost.", "Bowl 50", "The Panthers\nlost."),
    ("The first one.\nThe second.", "", "The first one.\nThe second."),
    ("x" * 201 + "\nThe second.", "", "x" * 201 + "\nThe second."),
    ("第一句。\n第二句。", "", "第一句。\n第二句。"),
    ("Only a title\n \n", "", "Only a title\n \n"),
    ("\nText.", "", "\nText."),
  ],
)  # fmt: skip
def test_contents_hold_text_and_perhaps_a_title(contents, title, text):
  found = document({"id": "7", "contents": contents})
  assert (found.id, found.title, found.text) == ("7", title, text)
  assert found.metadata == ()


def test_a_title_of_its_own_leaves_contents_whole():
  found = document({"id": 1, "title": "T", "contents": "Line\nand line."})
  assert (found.title, found.text) == ("T", "Line\nand line.")


def test_contents_beside_a_text_or_another_name_are_metadata():
  found = document({"id": 1, "text": "x", "contents": "y"})
  assert (found.text, found.metadata) == ("x", (("contents", "y"),))
  with pytest.raises(ValueError, match="no field 'body'"):
    document({"id": 1, "contents": "y"}, FieldNames(text="body"))


KILT = {
  "_id": "290",
  "wikipedia_id": "290",
  "wikipedia_title": "A",
  "text": ["A\n", "A is a letter.\n", "Section::::History.\n", "No line end."],
  "anchors": [{"text": "letter"}],
  "categories": "Vowel letters",
}


def test_kilts_pages_are_lists_of_paragraphs_of_which_the_first_is_the_title():
  found = document(KILT)
  assert found.id == "290"
  assert found.title == "A"
  assert found.text == "A is a letter.\nSection::::History.\nNo line end."
  assert found.metadata == (
    ("wikipedia_id", "290"),
    ("categories", "Vowel letters"),
  )


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    (["One.", "Two."], "One.\nTwo."),
    (["B\n", "Two."], "B\nTwo."),
    (["A\n"], "A"),
    ([], "A"),  # as BEIR's documents that are a title alone
  ],
)
def test_lists_of_paragraphs_are_joined_by_line_ends(text, expected):
  assert document(KILT | {"text": text}).text == expected


@pytest.mark.parametrize("bad", [3, None, ["x"], {}])
def test_a_paragraph_that_is_no_string_is_refused(bad):
  with pytest.raises(
    ValueError, match=r"here: paragraph 1 .* Expected a string, or a list"
  ):
    document(KILT | {"text": ["x", bad]})


@pytest.mark.parametrize(
  ("name", "data"),
  [
    ("x.jsonl", '{"id": "1", "contents": "\\"T\\"\\nSome text."}\n'),
    ("x.json", '[{"_id": 1, "wikipedia_title": "T", "text": ["Some text."]}]'),
    ("x.csv", "id,title,text\n1,T,Some text.\n"),
    ("x.tsv", "id\ttitle\tcontents\n1\tT\tSome text.\n"),
  ],
)
def test_training_reads_what_search_reads(tmp_path, name, data):
  path = tmp_path / name
  path.write_text(data)
  (found,) = read_documents(path, bad_records=BadRecords())
  (passage,) = load_passages(str(path))
  assert (passage.id, passage.title, passage.text) == ("1", "T", "Some text.")
  assert (found.id, found.title, found.text) == ("1", "T", "Some text.")


def test_metadata_is_left_out_in_training_as_it_always_was(tmp_path):
  path = tmp_path / "x.jsonl"
  path.write_text(json.dumps({"id": 1, "title": "", "text": "x", "lang": "en"}))
  assert load_passages(str(path))[0].metadata == ()
