"""A corpus becomes passages without duplicates, and nothing is lost unseen."""

import json
import subprocess
import sys

import pytest

from rag_jax.corpus.passage_reader import read_passages
from rag_jax.corpus.report import BadRecords
from rag_jax.corpus.splitting import SplitConfig

NONE = SplitConfig(method="none")


def row(id, text, title=""):
  return {"id": id, "title": title, "text": text}


def read(path, settings=NONE, action="fail", **kwargs):
  """The passages, and the report."""
  bad = BadRecords(action)
  passages = list(read_passages(path, settings, bad_records=bad, **kwargs))
  return passages, bad.report


def ids(passages):
  return [p.id for p in passages]


def test_documents_become_passages_and_are_counted(write):
  path = write([row("a", "one two three"), row("b", "four")])
  passages, report = read(path, SplitConfig(size=2))
  assert [(p.id, p.text) for p in passages] == [
    ("a#0", "one two"),
    ("a#1", "three"),
    ("b", "four"),
  ]
  assert (report.documents, report.passages, report.split) == (2, 3, 1)
  assert not any(report.dropped.values())


def test_an_id_that_is_there_twice_is_named_with_both_lines_or_skipped(write):
  path = write([row("a", "one"), row("b", "two"), row("a", "three")])
  message = f"{path}:3: the id 'a' is that of {path}:1 too. Expected one"
  with pytest.raises(ValueError, match=message):
    read(path)
  passages, report = read(path, action="skip")
  assert [(p.id, p.text) for p in passages] == [("a", "one"), ("b", "two")]
  assert (report.documents, report.passages) == (3, 2)
  assert report.dropped["duplicate_id"] == 1
  assert report.places["duplicate_id"][0].startswith(message)


@pytest.mark.parametrize("order", [1, -1])
def test_the_id_of_a_part_never_is_that_of_another_document(write, order):
  path = write([row("a", "one two three"), row("a#1", "x")][::order])
  with pytest.raises(ValueError, match="the id 'a#1' is that of"):
    read(path, SplitConfig(size=2))
  passages, report = read(path, SplitConfig(size=2), action="skip")
  assert len(passages) == 2
  assert len(set(ids(passages))) == 2
  assert report.dropped["duplicate_id"] == 1


def test_a_text_that_was_met_is_dropped_and_counted_even_if_bad_records_fail(
  write,
):
  rows = [row("a", "one", "T"), row("b", "one"), row("c", "one", "T")]
  path = write(rows)
  passages, report = read(path)
  assert ids(passages) == ["a", "b"]  # under another title it is another text
  assert report.dropped["duplicate_text"] == 1
  assert report.places["duplicate_text"] == [
    f"{path}:3: passage 'c' has the text of {path}:1"
  ]


def test_two_files_of_one_text_are_one_whatever_their_names(tmp_path):
  for name in ("a.txt", "b.txt", "sub/c.md"):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("one")
  (tmp_path / "d.md").write_text("# Title\none")
  passages, report = read(str(tmp_path))
  assert ids(passages) == ["a.txt", "d.md"]
  assert report.dropped["duplicate_text"] == 2


def test_texts_that_were_met_can_be_kept(write):
  path = write([row("a", "one"), row("b", "one")])
  passages, report = read(path, drop_duplicate_texts=False)
  assert ids(passages) == ["a", "b"]
  assert report.dropped["duplicate_text"] == 0


@pytest.mark.parametrize("rows", [[], [{"id": "a"}], [row("a", " ")]])
def test_an_empty_corpus_is_an_error_that_says_what_was_dropped(write, rows):
  path = write(rows)
  with pytest.raises(ValueError, match=r"jsonl holds no passages") as info:
    read(path, action="skip")
  assert "Expected at least one document" in str(info.value)
  dropped = f"{path}:1: " in str(info.value)
  assert dropped == bool(rows)


def test_impossible_settings_fail_before_anything_is_read():
  with pytest.raises(ValueError, match=r"split\.size=0"):
    read("no such file", SplitConfig(size=0))


def test_what_comes_in_goes_out_or_is_counted(write, tmp_path):
  rows = [row(i % 90, f"text {i % 80} " * (i % 7)) for i in range(200)]
  path = tmp_path / "x.jsonl"
  lines = [json.dumps(r) for r in rows]
  lines[5] = lines[5][:12]
  path.write_text("\n".join(lines))
  passages, report = read(str(path), action="skip")
  assert report.passages == len(passages)
  assert report.passages + sum(report.dropped.values()) == 200
  assert report.dropped["bad_record"] == 1
  # The oracle: two sets.
  known, texts, expected = set(), set(), []
  for i, r in enumerate(rows):
    if i == 5 or not r["text"].strip() or r["id"] in known:
      continue
    known.add(r["id"])
    if r["text"] not in texts:
      texts.add(r["text"])
      expected.append(str(r["id"]))
  assert ids(passages) == expected


# The peak is that of a process, so each way has one of its own. (Linux; the
# ru_maxrss of `resource` begins with that of the process that started it.)
_MEASURE = """
import sys
from rag_jax.corpus.passage_reader import read_passages
from rag_jax.corpus.report import BadRecords
from rag_jax.corpus.splitting import SplitConfig
path, hold, settings = sys.argv[1], sys.argv[2] == "hold", SplitConfig()
def peak():
  with open("/proc/self/status") as f:
    line = next(line for line in f if line.startswith("VmHWM"))
  return int(line.split()[1]) * 1024
kept, start, count = [], peak(), 0
for passage in read_passages(path, settings, bad_records=BadRecords()):
  count += 1
  if hold:
    kept.append(passage)
print(count, peak() - start)
"""


@pytest.mark.parametrize("end", [".jsonl", ".tsv", "folder"])
def test_memory_does_not_grow_with_the_corpus(tmp_path, end):
  number, size = (500, 1_200) if end == "folder" else (5_000, 120)
  path = tmp_path / f"x{end}"
  word = "x" * 50
  texts = (
    " ".join(f"{word}{i}.{k}" for k in range(size)) for i in range(number)
  )
  if end == "folder":
    path.mkdir()
    for i, text in enumerate(texts):
      (path / f"{i}.txt").write_text(text)
  else:
    with path.open("w") as f:
      f.write("id\ttext\ttitle\n" if end == ".tsv" else "")
      for i, text in enumerate(texts):
        line = f"{i}\t{text}\tT" if end == ".tsv" else json.dumps(row(i, text))
        f.write(line + "\n")

  def growth(kind):
    command = [sys.executable, "-c", _MEASURE, str(path), kind]
    out = subprocess.run(command, capture_output=True, check=True).stdout
    count, grown = map(int, out.split())
    assert count == (6_000 if end == "folder" else 10_000)
    return grown

  assert growth("stream") < 16e6  # the corpus has 35 MB
  assert growth("hold") > 32e6  # so a reader that holds it would be found
