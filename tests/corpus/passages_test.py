"""Passages come from the bundled corpus, JSONL or DPR's TSV, unchanged."""

import csv
import gzip
import json

from corpora import assert_fails
import numpy as np
import pytest

from rag_jax.artifacts import fingerprint_lines
from rag_jax.corpus.passage_reader import load_passages
from rag_jax.corpus.passages import Passage
from rag_jax.corpus.passages import PassageList

PASSAGES = (
  Passage("a", "Aaron", 'Aaron ( or ; "Ahärôn") is a prophet.'),
  Passage("b", "", "No title\tbut a tab."),
  Passage("c", '"Heroes" (song)', " Spaces stay. "),
)

HEADER = "id\ttext\ttitle\n"


def as_jsonl(passages):
  rows = [{"id": p.id, "title": p.title, "text": p.text} for p in passages]
  return "".join(json.dumps(row) + "\n" for row in rows)


def refused(path, *parts, error=ValueError):
  assert_fails(lambda: load_passages(path), *parts, error=error)


def test_jsonl_gives_the_passages_that_were_written(write):
  path = write(as_jsonl(PASSAGES))
  passages = load_passages(path)
  assert tuple(passages) == PASSAGES
  assert passages.origin == path


def test_tsv_gives_the_passages_that_csv_wrote(tmp_path):
  path = tmp_path / "file.tsv"
  with path.open("w", newline="") as f:
    writer = csv.writer(f, delimiter="\t", quoting=csv.QUOTE_ALL)
    writer.writerow(["id", "text", "title"])
    writer.writerows([p.id, p.text, p.title] for p in PASSAGES)
  assert tuple(load_passages(str(path))) == PASSAGES


@pytest.mark.parametrize("end", [".jsonl", ".tsv"])
def test_compressed_files_give_the_same_passages(write, tmp_path, end):
  text = as_jsonl(PASSAGES) if end == ".jsonl" else HEADER + "1\tone\tA\r\n"
  plain = load_passages(write(text, "plain" + end))
  packed = tmp_path / f"packed{end}.gz"
  packed.write_bytes(gzip.compress(text.encode()))
  loaded = load_passages(str(packed))
  assert tuple(loaded) == tuple(plain)
  assert loaded.fingerprint == plain.fingerprint


def test_a_number_as_id_becomes_a_string(write):
  path = write('{"id": 17, "title": "T", "text": "x"}\n')
  assert tuple(load_passages(path)) == (Passage("17", "T", "x"),)


def test_the_bundled_corpus_is_there_and_every_id_leads_to_its_passage():
  passages = load_passages("world_facts")
  assert passages.origin == "world_facts"
  assert len(passages) > 1000
  assert all(passages.by_id(p.id) is p for p in passages)


def test_passages_are_a_sequence():
  passages = PassageList(PASSAGES, origin="here")
  assert len(passages) == 3
  assert passages[1] == passages[np.int32(1)] == passages[-2] == PASSAGES[1]
  assert passages[1:] == PASSAGES[1:]
  assert PASSAGES[2] in passages
  assert list(reversed(passages)) == list(reversed(PASSAGES))
  assert repr(passages) == "PassageList(3 from here)"
  with pytest.raises(IndexError):
    _ = passages[3]


def test_the_fingerprint_depends_on_the_passages_and_not_on_their_origin():
  first = PassageList(PASSAGES, origin="here").fingerprint
  assert PassageList(list(PASSAGES), origin="there").fingerprint == first


@pytest.mark.parametrize(
  "changed",
  [
    PASSAGES[::-1],
    PASSAGES[:2],
    (Passage("z", PASSAGES[0].title, PASSAGES[0].text), *PASSAGES[1:]),
    (Passage("a", "Aaron ", PASSAGES[0].text), *PASSAGES[1:]),
    (Passage("a", "Aaron", PASSAGES[0].text + " "), *PASSAGES[1:]),
    # The same characters, at other places.
    (Passage("aA", "aron", PASSAGES[0].text), *PASSAGES[1:]),
  ],
)
def test_any_change_of_the_passages_changes_the_fingerprint(changed):
  first = PassageList(PASSAGES, origin="here").fingerprint
  assert PassageList(changed, origin="here").fingerprint != first


def test_an_unknown_id_is_refused_with_what_ids_look_like():
  passages = PassageList(PASSAGES, origin="here")
  with pytest.raises(
    ValueError, match=r"No passage of here has the id 'q'.*3 "
  ):
    passages.by_id("q")


def test_the_same_id_twice_is_refused_in_memory_too():
  with pytest.raises(ValueError, match=r"3 passages of here have the id 'a'"):
    PassageList((*PASSAGES[:2], PASSAGES[0]), origin="here")


def test_the_same_id_twice_is_refused_with_both_lines(write):
  path = write("\n" + as_jsonl([*PASSAGES, Passage("b", "", "Again")]))
  refused(
    path,
    *(f"{path}:5: the id 'b' is that of {path}:3 too", "Expected one passage"),
    "Rename or remove",
  )


def test_a_number_and_the_string_of_it_are_the_same_id(write):
  path = write(
    '{"id": 1, "title": "", "text": "x"}\n{"id": "1", "title": "", "text": "y"}'
  )
  refused(path, f":2: the id '1' is that of {path}:1 too")


@pytest.mark.parametrize("text", ["", "\n\n"])
def test_a_file_without_passages_is_refused(write, text):
  refused(write(text), "file.jsonl holds no passages", "Expected at least one")


@pytest.mark.parametrize("text", ["", HEADER])
def test_a_tsv_without_passages_is_refused(write, text):
  refused(write(text, "x.tsv"), "x.tsv holds no passages")


@pytest.mark.parametrize("text", ["", " \t\u00a0"])
def test_an_empty_text_is_refused_with_its_line(write, text):
  path = write(as_jsonl([PASSAGES[0], Passage("b", "The title", text)]))
  refused(
    path,
    f"{path}:2: the text of document 'b' is empty",
    *("Expected some text", "Complete or remove"),
  )


def test_a_title_that_is_null_is_none(write):
  path = write('{"id": "a", "title": null, "text": "x"}')
  assert load_passages(str(path))[0] == Passage("a", "", "x")


def test_a_misspelt_corpus_is_refused_with_its_name(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  refused(
    "world_fact",
    *("There are no passages 'world_fact'", "Expected one of the bundled"),
    *("['world_facts']", "'.jsonl'", "Did you mean 'world_facts'?"),
  )


@pytest.mark.parametrize("name", ["", "wikipedia"])
def test_an_unknown_corpus_is_refused(tmp_path, monkeypatch, name):
  monkeypatch.chdir(tmp_path)
  refused(name, f"There are no passages '{name}'", "Correct the name")


def test_of_a_corpus_that_is_not_there_the_neighbours_are_named(
  tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "letters").mkdir()
  refused("wikipedia", "There are no passages", "holds letters/.")
  refused("leters", "Did you mean 'letters'?")
  refused(
    *("old/leters.jsonl", "its folder old does not", "holds letters/."),
    error=FileNotFoundError,
  )


def test_a_missing_file_is_reported_with_the_nearest_names(write, tmp_path):
  write("", "passages.jsonl")
  refused(
    str(tmp_path / "passage.jsonl"),
    *("There is no file", "['world_facts']", "['passages.jsonl']"),
    error=FileNotFoundError,
  )


def test_a_folder_is_refused(tmp_path):
  refused(str(tmp_path), "is a folder, not a file", "Give the path of one file")


@pytest.mark.parametrize("name", ["x.parquet", "x.gz", "jsonl.txt"])
def test_a_file_of_another_kind_is_refused(write, name):
  refused(
    write(as_jsonl(PASSAGES), name),
    *("cannot be read by the end of their name", "." + name.split(".")[1]),
    *("['.jsonl', '.json', '.tsv', '.csv']", "Convert or rename"),
  )


def test_metadata_changes_the_fingerprint_only_where_there_is_some():
  def fingerprint(*passages):
    return PassageList(passages, origin="here").fingerprint

  plain = Passage("a", "T", "x")
  lang = (("lang", "en"),)
  tagged = [
    Passage("a", "T", "x", lang),
    Passage("a", "T", "x", (("lang", "de"),)),
    Passage("a", "T", "x", (("lan", "gen"),)),
    Passage("a", "T", "x", lang * 2),
  ]
  assert fingerprint(Passage("a", "T", "x", ())) == fingerprint(plain)
  assert fingerprint(plain) == fingerprint_lines(["a", "T", "x"])
  assert len({fingerprint(p) for p in (plain, *tagged)}) == 5
  second = Passage("b", "", "y")
  swapped = (plain, Passage("b", "", "y", lang))
  assert fingerprint(tagged[0], second) != fingerprint(*swapped)
