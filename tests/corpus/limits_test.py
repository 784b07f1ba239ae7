"""What a file can make us hold in memory, or wait for, is limited."""

import gzip
import inspect
import os
import re
import resource
import socket
import sys
import time

import pytest

from rag_jax.corpus import text_files
from rag_jax.corpus.documents import read_documents
from rag_jax.corpus.report import BadRecords
from rag_jax.corpus.text_files import find_file
from rag_jax.corpus.text_files import read_bytes
from rag_jax.corpus.text_files import read_lines

ROW = b'{"id": "%d", "text": "One sentence of text, and number %d."}\n'


def read(path, action="fail"):
  bad = BadRecords(action)
  return [d.id for d in read_documents(path, bad_records=bad)], bad.report


def peak_bytes():
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.fixture
def small_limits(monkeypatch):
  monkeypatch.setattr(text_files, "MAX_LINE_BYTES", 1000)
  monkeypatch.setattr(text_files, "MAX_FILE_BYTES", 5000)
  monkeypatch.setattr(text_files, "_GZIP_FREE_BYTES", 2000)
  monkeypatch.setattr(text_files, "_BLOCK_BYTES", 100)


@pytest.fixture(scope="module")
def bomb(tmp_path_factory):
  """Two gigabytes of spaces in two megabytes."""
  path = tmp_path_factory.mktemp("bomb") / "bomb.gz"
  path.write_bytes(gzip.compress(b" " * (1 << 23)) * 256)
  return path


@pytest.mark.parametrize("end", [".jsonl", ".json", ".tsv", ".txt", ".html"])
def test_a_gzip_bomb_is_refused_before_it_takes_memory(bomb, tmp_path, end):
  path = tmp_path / f"corpus{end}.GZ"
  os.link(bomb, path)
  before, start = peak_bytes(), time.monotonic()
  with pytest.raises(
    ValueError, match=re.escape(str(path)) + r":1: .*(times|the line has more)"
  ):
    read(path)
  ids, report = read(path, "skip")
  assert not ids
  assert "made to fill memory" in str(report)
  assert peak_bytes() - before < 400_000_000
  assert time.monotonic() - start < 20


def test_text_that_compresses_well_is_no_bomb(tmp_path, small_limits):
  path = tmp_path / "corpus.jsonl.gz"
  path.write_bytes(gzip.compress(b"".join(ROW % (i, i) for i in range(500))))
  assert len(read(path)[0]) == 500


def test_a_line_that_is_too_long_is_skipped_and_the_next_is_read(
  tmp_path, small_limits
):
  path = tmp_path / "corpus.jsonl"
  long = b'{"id": "long", "text": "' + b"x" * 2500 + b'"}\n'
  path.write_bytes(ROW % (1, 1) + long + ROW % (2, 2))
  with pytest.raises(ValueError, match=r"corpus\.jsonl:2: the line has more"):
    read(path)
  ids, report = read(path, "skip")
  assert ids == ["1", "2"]
  assert report.dropped["undecodable"] == 1
  # The longest that fits, and one byte more.
  for size, number in ((999, 1), (1000, 0)):
    path.write_bytes(b"x" * size + b"\n")
    bad = BadRecords("skip")
    assert len(list(read_lines(path, bad_records=bad))) == number


def test_a_file_that_is_read_whole_has_a_largest_size(tmp_path, small_limits):
  path = tmp_path / "corpus.json"
  path.write_bytes(b" " * 5000)
  assert len(read_bytes(path)) == 5000
  path.write_bytes(b" " * 5001)
  with pytest.raises(ValueError, match=r"corpus\.json:1: .* more than 5,000 b"):
    read(path)
  path = tmp_path / "corpus.json.gz"
  path.write_bytes(gzip.compress(os.urandom(5001)))
  with pytest.raises(
    ValueError, match=r"gz:1: .* more than 5,000 bytes.*jsonl"
  ):
    read(path)


@pytest.mark.parametrize("depth", [101, 2_000, 100_000])
@pytest.mark.parametrize("brackets", ["[]", '{"a":}'])
@pytest.mark.parametrize("end", [".json", ".jsonl"])
def test_json_that_is_nested_deeply_is_not_valid(
  tmp_path, depth, brackets, end
):
  path = tmp_path / f"corpus{end}"
  inner = brackets[:-1] * depth + "1" + brackets[-1] * depth
  path.write_text('{"id": "a", "text": "b", "metadata": ' + inner + "}\n")
  with pytest.raises(
    ValueError, match=r":1: not valid JSON .*nested more than"
  ):
    read(path)


def test_json_may_be_nested_as_much_as_anybody_needs(tmp_path):
  path = tmp_path / "corpus.jsonl"
  inner = "[" * 90 + "]" * 90 + ', "b": "[[[[' + "[" * 500 + '"'
  path.write_text('{"id": "a", "text": "b", "x": ' + inner + "}\n")
  assert read(path)[0] == ["a"]


def test_what_is_no_plain_file_in_a_folder_is_left_alone_and_reported(tmp_path):
  (tmp_path / "a.txt").write_text("Text.")
  os.mkfifo(tmp_path / "fifo.txt")
  with socket.socket(socket.AF_UNIX) as server:
    server.bind(os.path.relpath(tmp_path / "socket.md"))
    os.symlink("/dev/zero", tmp_path / "zero.html")
    ids, report = read(tmp_path)
  assert ids == ["a.txt"]
  assert report.other_files == 3
  assert [place.split(": ")[1] for place in report.places["other_files"]] == [
    "a FIFO (named pipe)",
    "a socket",
    "a device",
  ]


@pytest.mark.parametrize("end", [".jsonl", ".json", ".tsv", ".csv", ".txt"])
def test_a_fifo_is_never_waited_for(tmp_path, end):
  path = tmp_path / f"corpus{end}"
  os.mkfifo(path)
  with pytest.raises(ValueError, match=r"is a FIFO .*, not a file\. Expected"):
    read(path)
  with pytest.raises(ValueError, match="is a device, not a file"):
    find_file("/dev/zero", "questions")


def test_files_that_cannot_be_opened_or_named_are_bad_records(tmp_path):
  (tmp_path / "a.txt").write_text("Text.")
  os.symlink("nothing", tmp_path / "b.txt")
  with open(os.fsencode(tmp_path) + b"/c\xff.txt", "wb") as file:
    file.write(b"Text.")
  with pytest.raises(ValueError, match=r"b\.txt:1: the file cannot be opened"):
    read(tmp_path)
  ids, report = read(tmp_path, "skip")
  assert ids == ["a.txt"]
  assert report.dropped["undecodable"] == 2
  assert "the file's name holds half of a surrogate" in str(report)


def test_folders_may_be_nested_deeper_than_calls(tmp_path):
  depth = 300
  folder = tmp_path / ("d/" * depth)
  folder.mkdir(parents=True)
  (folder / "a.txt").write_text("Text.")
  limit = sys.getrecursionlimit()
  sys.setrecursionlimit(len(inspect.stack()) + 200)
  try:
    ids, _ = read(tmp_path)
  finally:
    sys.setrecursionlimit(limit)
  assert ids == ["d/" * depth + "a.txt"]
