"""Arrays that were merged from runs on the disk are those of bm25s."""

import json
import os
import random
import signal
import subprocess
import sys
import tracemalloc

import bm25s
from disks import full_disk
from indexes import assert_equal
import numpy as np
import pytest

from rag_jax.corpus.passages import Passage
from rag_jax.corpus.words import WordTokenizer
from rag_jax.directory_lock import building
from rag_jax.retrieval import postings
from rag_jax.retrieval.bm25 import Bm25Index
from rag_jax.retrieval.bm25 import Bm25Settings

FILES = ("starts.npy", "passages.npy", "scores.npy", "vocabulary.json")


def make(n, words=300):
  """Yields passages of words by Zipf's law, some without any."""
  rng = random.Random(0)
  known = [f"w{i}" for i in range(words)]
  weights = [1 / (1 + i) for i in range(words)]
  for i in range(n):
    text = " ".join(rng.choices(known, weights, k=rng.randrange(40)))
    yield Passage(str(i), "w0" if i % 3 else "", text)


def write(path, passages=None, **settings):
  return Bm25Index.write(
    path,
    make(200) if passages is None else passages,
    passages_fingerprint="3c4d",
    settings=Bm25Settings(**settings),
  )


def contents(path):
  return {name: (path / name).read_bytes() for name in FILES}


def of_bm25s(passages, k1, b):
  """Returns the vocabulary and the arrays as the package makes them."""
  split, vocabulary = WordTokenizer(), {}
  rows = [
    [
      vocabulary.setdefault(word, len(vocabulary))
      for word in split(f"{p.title}\n{p.text}")
    ]
    for p in passages
  ]
  scorer = bm25s.BM25(k1=k1, b=b, method="lucene")
  scores = scorer.build_index_from_ids(
    range(len(vocabulary)), rows, show_progress=False
  )
  arrays = {
    "starts": scores["indptr"],
    "passages": scores["indices"],
    "scores": scores["data"],
  }
  return list(vocabulary), arrays


# Many runs and ranges of words, of which some words are more than a block; and
# one of each.
@pytest.mark.parametrize("block", [1, 50, 1000, 1 << 22])
@pytest.mark.parametrize(("k1", "b"), [(0.9, 0.4), (1.5, 0.75), (0.0, 1.0)])
def test_the_arrays_are_those_of_bm25s_to_the_last_bit(
  tmp_path, monkeypatch, block, k1, b
):
  monkeypatch.setattr(postings, "_BLOCK", block)
  write(tmp_path, k1=k1, b=b)
  vocabulary, arrays = of_bm25s(make(200), k1, b)
  assert json.loads((tmp_path / "vocabulary.json").read_text()) == vocabulary
  for name, expected in arrays.items():
    array = np.load(tmp_path / f"{name}.npy")
    assert array.dtype == postings.ARRAYS[name]
    np.testing.assert_array_equal(array, expected)


def test_what_was_written_is_what_is_built_and_saved(tmp_path):
  index = write(tmp_path / "written")
  Bm25Index.build(make(200), passages_fingerprint="3c4d").save(tmp_path / "s")
  assert contents(tmp_path / "written") == contents(tmp_path / "s")
  assert all(isinstance(a, np.memmap) for a in index._arrays.values())
  left = {p.name for p in (tmp_path / "written").iterdir()}
  assert left == {*FILES, "manifest.json", ".lock.tmp"}


def test_an_open_index_goes_on_while_another_replaces_it(tmp_path):
  old = write(tmp_path)
  expected = old.search(["w1 w7"], 9)
  new = write(tmp_path, make(50))
  assert (old.num_passages, new.num_passages) == (200, 50)
  assert_equal(old.search(["w1 w7"], 9), expected)


KILLED = """
import os, signal, sys
sys.path[:0] = sys.argv[1].split(os.pathsep)
import postings_test
from rag_jax.retrieval import postings
postings._BLOCK = 100
kill = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[3] == "reading":
  passages = (p if p.id != "150" else kill() for p in postings_test.make(200))
else:
  passages = postings_test.make(200)
  postings.os.replace = kill
postings_test.write(sys.argv[2], passages)
"""


@pytest.mark.parametrize("moment", ["reading", "merging"])
def test_a_killed_build_leaves_nothing_that_loads(tmp_path, moment):
  path = tmp_path / "index"
  write(path, make(30))  # an older one
  here = os.path.dirname(__file__)
  here += os.pathsep + os.path.join(os.path.dirname(here), "helpers")
  killed = subprocess.run(
    [sys.executable, "-c", KILLED, here, path, moment], check=False
  )
  assert killed.returncode == -signal.SIGKILL
  assert (path / ".runs.tmp").exists()
  with pytest.raises(FileNotFoundError, match="no bm25 was built"):
    Bm25Index.load(path)
  write(path)
  write(tmp_path / "again")
  assert contents(path) == contents(tmp_path / "again")
  left = {p.name for p in path.iterdir()}
  assert left == {*FILES, "manifest.json", ".lock.tmp"}


def test_a_second_build_is_refused_and_files_of_others_stay(tmp_path):
  with (
    building(tmp_path, kind="x", own=lambda name: True),
    pytest.raises(ValueError, match="else is building a BM25 index"),
  ):
    write(tmp_path)
  (tmp_path / "thesis.txt").write_text("years of work")
  with pytest.raises(ValueError, match=r"other files .*'thesis.txt'"):
    write(tmp_path)


@pytest.mark.parametrize("num_bytes", [2_000, 9_000])  # of a run, of an array
def test_a_full_disk_is_said(tmp_path, monkeypatch, num_bytes):
  block = 1000 if num_bytes == 2_000 else 1 << 22
  monkeypatch.setattr(postings, "_BLOCK", block)
  with (
    full_disk(num_bytes),
    pytest.raises(OSError, match=r"cannot be written .*File too.*20 bytes.*Fr"),
  ):
    write(tmp_path, make(400 if block == 1000 else 200))
  assert {p.name for p in tmp_path.iterdir()} == {".lock.tmp"}


def test_an_error_of_the_passages_is_not_said_to_be_the_disks(tmp_path):
  def gone():
    yield Passage("0", "", "a")
    raise OSError("the source is gone")

  with pytest.raises(OSError, match=r"^the source is gone$"):
    write(tmp_path, gone())


def test_memory_does_not_grow_with_the_passages(tmp_path, monkeypatch):
  monkeypatch.setattr(postings, "_BLOCK", 1000)

  def peak(num_passages):
    tracemalloc.start()
    try:
      write(tmp_path, make(num_passages, words=100))
      return tracemalloc.get_traced_memory()[1]
    finally:
      tracemalloc.stop()

  peak(100)  # what is made once
  small, large = peak(500), peak(4000)
  # 3500 passages have 56,000 postings, of which each took 47 bytes once.
  assert large - small < 200_000
