"""Every kind of corpus gives its documents, whatever its format."""

import csv
import gzip
import json

import corpora
import pytest

from rag_jax.corpus.documents import Document
from rag_jax.corpus.documents import FieldNames
from rag_jax.corpus.documents import read_documents
from rag_jax.corpus.passage_reader import load_passages
from rag_jax.corpus.report import BadRecords

ROWS = (
  {"id": "a", "title": "Aaron", "text": "Aaron is a prophet."},
  {"id": 7, "title": "", "text": "Ahärôn.\n"},
)


def jsonl(rows):
  return "".join(json.dumps(row) + "\n" for row in rows)


def read(path, **kwargs):
  return corpora.read(path, **kwargs)[0]


def skipped(path, **kwargs):
  return corpora.read(path, "skip", **kwargs)


def refused(path, *parts, error=ValueError, **kwargs):
  corpora.assert_fails(lambda: read(path, **kwargs), *parts, error=error)


def plain(documents):
  return [(d.id, d.title, d.text) for d in documents]


EXPECTED = [(str(r["id"]), r["title"], r["text"]) for r in ROWS]


def tsv():
  lines = [["id", "text", "title"]]
  lines += [[r["id"], r["text"], r["title"]] for r in ROWS]
  out = []
  writer = csv.writer(
    type("W", (), {"write": staticmethod(out.append)}), delimiter="\t"
  )
  writer.writerows(lines)
  return "".join(out)


FORMATS = {
  "x.jsonl": jsonl(ROWS),
  "x.json": json.dumps(ROWS, indent=1),
  "lines.json": jsonl(ROWS),
  "object.json": json.dumps({"version": 1, "docs": ROWS}),
  "x.tsv": tsv(),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_documents(write, name, packed):
  data = FORMATS[name].encode()
  path = (
    write(gzip.compress(data), name + ".gz") if packed else write(data, name)
  )
  assert plain(read(path)) == EXPECTED


def test_a_document_knows_its_file_and_line(write):
  path = write("\n" + FORMATS["x.jsonl"])
  assert [d.where for d in read(path)] == [f"{path}:2", f"{path}:3"]
  path = write(FORMATS["x.tsv"], "x.tsv")
  assert [d.where for d in read(path)] == [f"{path}:2", f"{path}:3"]
  path = write(FORMATS["object.json"], "x.json")
  assert [d.where for d in read(path)] == [f"{path}:docs[0]", f"{path}:docs[1]"]


def test_the_fields_may_have_other_names(write):
  path = write(jsonl([{"key": 1, "head": "T", "body": "x", "text": "other"}]))
  fields = FieldNames(id="key", title="head", text="body")
  assert read(path, fields=fields) == [
    Document("1", "T", "x", (("text", "other"),), f"{path}:1")
  ]


def test_other_fields_become_metadata(write):
  row = {"id": "a", "text": "x", "lang": "en", "year": 1999, "score": 0.5}
  row |= {"ok": True, "tags": ["a", 1, True, None, "a", ["b"], {"c": 1}]}
  ignored = {"more": {"a": 1}, "none": None, "empty": [], "": "b"}
  nested = {"metadata": {"url": "http://x", "lang": "de", "deep": {}}}
  (document,) = read(write(jsonl([row | ignored | nested])))
  assert document.metadata == (
    ("url", "http://x"),
    ("lang", "en"),
    ("year", "1999"),
    ("score", "0.5"),
    ("ok", "true"),
    ("tags", "a"),
    ("tags", "1"),
    ("tags", "true"),
  )


def test_null_is_absent(write):
  rows = [{"id": None, "_id": "a", "title": None, "text": "x"}]
  assert plain(read(write(jsonl(rows)))) == [("a", "", "x")]
  path = write(jsonl([{"id": "a", "head": None, "text": "x"}]))
  assert plain(read(path, fields=FieldNames(title="head"))) == [("a", "", "x")]
  refused(
    write(jsonl([{"id": "a", "text": None}])),
    "no field 'text'; the record has ['id']",
  )


def test_a_title_is_needed_only_where_it_was_asked_for(write):
  path = write(jsonl([{"id": "a", "text": "x"}]))
  assert plain(read(path)) == [("a", "", "x")]
  refused(
    path,
    *(f"{path}:1: no field 'head'; the record has ['id', 'text']",),
    fields=FieldNames(title="head"),
  )


BEIR = (
  {"_id": "doc 1", "title": "T", "text": "x", "metadata": {"url": "u"}},
  {"_id": "2", "title": "Only a title", "text": "", "metadata": {}},
)


@pytest.mark.parametrize("as_folder", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_beir_is_read_by_its_folder_or_its_file(write, as_folder, packed):
  data, name = jsonl(BEIR).encode(), "nfcorpus/corpus.jsonl"
  path = write(gzip.compress(data) if packed else data, name + ".gz" * packed)
  write(jsonl([{"_id": "q", "text": "?"}]), "nfcorpus/queries.jsonl")
  where = path
  assert read(path.rpartition("/")[0] if as_folder else path) == [
    Document("doc 1", "T", "x", (("url", "u"),), f"{where}:1"),
    Document("2", "Only a title", "Only a title", (), f"{where}:2"),
  ]


def test_the_bundled_corpus_is_read_as_load_passages_reads_it():
  passages = load_passages("world_facts")
  expected = [(p.id, p.title, p.text) for p in passages]
  assert plain(read("world_facts")) == expected


BAD_LINES = {
  "cut in half": (jsonl(ROWS)[:20] + "\n", "not valid JSON", "bad_record"),
  "no text": (jsonl([{"id": "x"}]), "no field 'text'", "bad_record"),
  "no id": (jsonl([{"text": "x"}]), "no field 'id'", "bad_record"),
  "text is a number": (
    jsonl([{"id": "x", "text": 1}]),
    "1, a whole",
    "bad_record",
  ),
  "id is a fraction": (
    jsonl([{"id": 1.5, "text": "x"}]),
    "field 'id' is 1.5",
    "bad_record",
  ),
  "title is a number": (
    jsonl([{"id": "x", "title": 7, "text": "x"}]),
    "field 'title' is 7",
    "bad_record",
  ),
  "empty id": (
    jsonl([{"id": " ", "text": "x"}]),
    "the id of the",
    "bad_record",
  ),
  "empty text": (
    jsonl([{"id": "x", "text": " \n"}]),
    "the text of document 'x' is empty",
    "empty",
  ),
  "a text that is not drawn": (
    jsonl([{"id": "x", "text": "\u200b \u00ad\ufeff"}]),
    "the text of document 'x' is empty",
    "empty",
  ),
  "an id that is not drawn": (
    jsonl([{"id": "\u200b", "text": "x"}]),
    "the id of the",
    "bad_record",
  ),
  "not UTF-8": (
    '{"id": "x", "text": "café"}\n'.encode("latin-1"),
    "byte 0xe9",
    "undecodable",
  ),
  "NUL in metadata": (
    jsonl([{"id": "x", "text": "x", "lang": "\0"}]),
    "'lang' holds a NUL",
    "bad_record",
  ),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_named_or_skipped_and_the_others_remain(write, name):
  line, message, kind = BAD_LINES[name]
  line = line if isinstance(line, bytes) else line.encode()
  good = jsonl(ROWS).encode().splitlines(keepends=True)
  path = write(good[0] + line + good[1])
  refused(path, f"{path}:2: ", message, "Expected")
  documents, report = skipped(path)
  assert plain(documents) == EXPECTED
  assert documents[1].where == f"{path}:3"
  assert report.documents == 2
  assert sum(report.dropped.values()) == report.dropped[kind] == 1
  assert report.places[kind][0].startswith(f"{path}:2: ")


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.tsv.gz"])
def test_of_a_damaged_gzip_file_what_comes_before_is_read(write, name):
  end = name.removesuffix(".gz")
  data = FORMATS[end] if end == "x.tsv" else jsonl(ROWS)
  lines = "".join(
    f"{i}\tsome text {i * 7919}\tT\n"
    if end == "x.tsv"
    else jsonl([{"id": i, "text": f"some text {i * 7919}"}])
    for i in range(4_000)
  )
  packed = gzip.compress((data + lines).encode())
  path = write(packed[: len(packed) // 2], name)
  refused(path, f"{path}:", "the gzip data is damaged or cut off", "Expected")
  documents, report = skipped(path)
  assert 200 < len(documents) < 3_800
  assert plain(documents)[:2] == EXPECTED
  assert report.dropped["undecodable"] == 1
  assert report.dropped["bad_record"] == 0


def test_bad_rows_of_a_tsv_are_skipped_and_line_numbers_stay_right(write):
  header, *rows = FORMATS["x.tsv"].encode().splitlines(keepends=True)
  bad = [b"1\tcaf\xe9\tA\r\n", b"1\ttwo columns\r\n", b"1\t \tA\r\n"]
  bad += [b"1\t" + b"x" * 200_000 + b"\tA\r\n"]
  path = write(header + b"".join(bad) + b"".join(rows), "x.tsv")
  refused(path, f"{path}:2: byte 0xe9")
  documents, report = skipped(path)
  assert plain(documents) == EXPECTED
  assert documents[0].where == f"{path}:6"
  assert report.dropped["undecodable"] == 1
  assert report.dropped["bad_record"] == 2
  assert report.dropped["empty"] == 1
  assert [p.split(": ")[0] for p in report.places["bad_record"]] == [
    f"{path}:3",
    f"{path}:5",
  ]


def test_a_tsv_with_other_columns_is_refused_even_if_bad_records_are_skipped(
  write,
):
  path = write("a\tb\tc\n1\t2\t3\n", "x.tsv")
  with pytest.raises(ValueError, match="the first line is"):
    skipped(path)


@pytest.mark.parametrize("name", ["x.xml", "x.gz", "x.parquet"])
def test_a_file_of_another_kind_is_refused(write, name):
  refused(
    write("x", name),
    *("cannot be read by the end of its name", name[1:], "Expected one of"),
    *("'.jsonl', '.json', '.tsv', '.csv', '.txt'", "Convert or rename"),
  )


def test_a_missing_file_is_reported_with_the_nearest_names(write, tmp_path):
  write("", "corpus.json")
  refused(
    str(tmp_path / "corpu.json"),
    *("There is no file", "tfds:beir", "['corpus.json']"),
    error=FileNotFoundError,
  )


def test_reading_streams(write):
  path = write(jsonl(ROWS[:1]) + "no\n")
  documents = read_documents(path, bad_records=BadRecords())
  assert next(documents).id == "a"
  with pytest.raises(ValueError, match=r"file\.jsonl:2: not valid JSON"):
    next(documents)
