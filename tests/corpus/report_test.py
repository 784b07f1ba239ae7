"""The report counts what was read and dropped, and names the first places."""

import json

import pytest

from rag_jax.corpus.report import BadRecords
from rag_jax.corpus.report import CorpusReport
from rag_jax.corpus.report import raise_empty


def test_fail_raises_the_error_itself_and_counts_nothing():
  bad = BadRecords("fail")
  error = ValueError("a.jsonl:3: no text")
  with pytest.raises(ValueError, match=r"a\.jsonl:3") as info:
    bad.refuse("empty", error)
  assert info.value is error
  assert bad.report == CorpusReport()


def test_skip_counts_each_record_under_its_reason():
  bad = BadRecords("skip")
  bad.refuse("empty", ValueError("a:3: no text"))
  bad.refuse("bad_record", ValueError("a:5: cut"))
  bad.refuse("bad_record", ValueError("a:6: cut"))
  assert bad.report.dropped == {
    "empty": 1,
    "duplicate_id": 0,
    "duplicate_text": 0,
    "undecodable": 0,
    "bad_record": 2,
  }
  assert bad.report.places == {
    "empty": ["a:3: no text"],
    "bad_record": ["a:5: cut", "a:6: cut"],
  }


def test_another_action_is_refused():
  with pytest.raises(ValueError, match="on_bad_record='skipp' is not one of"):
    BadRecords("skipp")


def test_readers_can_share_one_report():
  report = CorpusReport(documents=4)
  BadRecords("skip", report).refuse("empty", ValueError("x"))
  assert (report.documents, report.dropped["empty"]) == (4, 1)


def test_only_the_first_places_are_kept_and_each_is_short():
  report = CorpusReport()
  for i in range(1000):
    report.drop("empty", f"file:{i}: " + "x" * 1000)
  assert report.dropped["empty"] == 1000
  places = report.places["empty"]
  assert [p.split(" ")[0] for p in places] == [f"file:{i}:" for i in range(20)]
  assert all(len(p) == 303 and p.endswith("...") for p in places)
  assert "the first 20 of 1,000" in report.table()


def test_the_table_shows_every_count_and_place_once():
  report = CorpusReport(
    documents=1234, passages=56, split=7, broken=8, cut=9, cut_chars=10
  )
  report.other_files = 11
  report.drop("undecodable", "b.txt:2: byte 0xff")
  lines = str(report).splitlines()
  for line in (
    "1,234  documents read",
    "   56  passages written",
    "    7  documents split into several passages",
    "    8  passages that end inside a sentence or word that is too long",
    "    9  passages cut off at split.max_chars characters",
    "   10  characters lost by that",
    "   11  other files in the folder, not read",
    "    1  dropped: not UTF-8, or damaged",
    "    0  dropped: without any text",
    "  b.txt:2: byte 0xff",
  ):
    assert lines.count(line) == 1


def test_the_json_holds_the_whole_report():
  report = CorpusReport(documents=2)
  report.drop("empty", "é:1: no text")
  report.note("split", "é:2")
  assert "é:1" in report.to_json()
  assert CorpusReport(**json.loads(report.to_json())) == report


def test_an_empty_corpus_is_an_error_that_shows_the_report():
  report = CorpusReport()
  report.drop("empty", "a.jsonl:1: no text")
  with pytest.raises(ValueError, match=r"a\.jsonl holds no passages") as info:
    raise_empty("a.jsonl", report)
  assert "Expected at least one document" in str(info.value)
  assert "a.jsonl:1: no text" in str(info.value)


def test_places_in_one_file_stand_below_its_name():
  report = CorpusReport()
  for place in (
    "a.tsv:3: one",
    "b.tsv:1: two",
    "a.tsv:7: three",
    "c.txt: four",
  ):
    report.drop("bad_record", place)
  lines = report.table().splitlines()
  assert lines[lines.index("bad_record (4):") + 1 :] == [
    "  a.tsv (2):",
    "    3: one",
    "    7: three",
    "  b.tsv:1: two",
    "  c.txt: four",
  ]
