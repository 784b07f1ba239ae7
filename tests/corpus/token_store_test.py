"""Tokens on the disk are those in memory, and no others are ever opened."""

import json
import os
import signal
import subprocess
import sys

from corpora import peak_bytes
from disks import full_disk
import numpy as np
import pytest

from rag_jax import artifacts
from rag_jax import progress
from rag_jax.config import DataConfig
from rag_jax.corpus import token_store
from rag_jax.corpus import tokenized as tokenized_lib
from rag_jax.corpus.passages import Passage
from rag_jax.corpus.passages import PassageList
from rag_jax.corpus.store import write_store
from rag_jax.corpus.token_store import open_tokens
from rag_jax.corpus.token_store import write_tokens
from rag_jax.corpus.tokenized import TokenizedPassages
from rag_jax.corpus.tokenized import Wording
from rag_jax.corpus.tokenizer import load_tokenizer
from rag_jax.corpus.tokenizer import train_tokenizer
from rag_jax.data.context import ContextBuilder

LENGTH = 16
WORDS = "one two three four five six seven eight nine ten"


def make(n):
  """Passages with and without a title, some too long."""
  for i in range(n):
    title = "" if i % 4 == 0 else f"Number {i}"
    yield Passage(f"id-{i}", title, WORDS[: 3 + 5 * (i % 10)] + f" {i}.")


PASSAGES = PassageList(make(60), "memory")


@pytest.fixture(scope="module")
def tokenizer():
  return train_tokenizer([f"{p.title} {p.text}" for p in PASSAGES], 400)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  monkeypatch.setattr(token_store, "_BLOCK_ROWS", 7)
  monkeypatch.setattr(token_store, "_PROGRESS_ROWS", 14)


@pytest.fixture
def directory(tokenizer, tmp_path):
  write_tokens(tmp_path / "tokens", PASSAGES, tokenizer, LENGTH)
  return tmp_path / "tokens"


def contents(directory):
  names = ("tokens.npy", "begins_word.npy", "lengths.npy", "manifest.json")
  return {name: (directory / name).read_bytes() for name in names}


def assert_same(actual, expected):
  for name in ("tokens", "begins_word", "lengths"):
    np.testing.assert_array_equal(
      getattr(actual, name), getattr(expected, name)
    )
  assert actual.num_cut == expected.num_cut
  assert actual.joined_by == expected.joined_by
  assert list(actual.titles()) == list(expected.titles())
  assert len(actual) == len(expected)


def test_the_tokens_on_the_disk_are_those_in_memory(directory, tokenizer):
  memory = TokenizedPassages(PASSAGES, tokenizer, LENGTH)
  disk = open_tokens(directory, PASSAGES, tokenizer, LENGTH)
  assert 0 < memory.num_cut < len(PASSAGES)
  assert_same(disk, memory)
  assert isinstance(disk.tokens, np.memmap)
  assert disk.tokens.dtype == np.uint16
  assert disk.passages is PASSAGES
  assert disk.tokenizer is tokenizer


def test_the_tokens_of_a_store_are_those_of_its_passages(
  directory, tokenizer, tmp_path
):
  store = write_store(tmp_path / "store", PASSAGES, passages_per_shard=11)
  write_tokens(tmp_path / "of_store", store, tokenizer, LENGTH)
  assert contents(tmp_path / "of_store") == contents(directory)
  plain = list(PASSAGES)
  disk = open_tokens(tmp_path / "of_store", plain, tokenizer, LENGTH)
  assert_same(disk, TokenizedPassages(plain, tokenizer, LENGTH))


def test_a_batch_of_contexts_is_the_same_from_the_disk(directory, tokenizer):
  config = DataConfig(
    passage_length=LENGTH, context_length=40, question_length=12
  )
  rows = np.array([[3, 0, 59], [8, 8, 21]])
  memory, disk = (
    ContextBuilder(tokenizer, tokenized, config)
    for tokenized in (
      TokenizedPassages(PASSAGES, tokenizer, LENGTH),
      open_tokens(directory, PASSAGES, tokenizer, LENGTH),
    )
  )
  questions, _ = memory.encode_questions(["Which number?", "What is two?"])
  for actual, expected in (
    (disk.passages(rows), memory.passages(rows)),
    (disk.contexts(questions, rows), memory.contexts(questions, rows)),
  ):
    for a, b in zip(actual, expected, strict=True):
      np.testing.assert_array_equal(a, b)
      assert a.dtype == b.dtype


def test_ids_that_do_not_fit_into_16_bits_have_32(
  directory, tokenizer, tmp_path, monkeypatch
):
  expected = open_tokens(directory, PASSAGES, tokenizer, LENGTH)
  monkeypatch.setattr(tokenizer, "largest_id", 1 << 16)
  disk = write_tokens(tmp_path / "large", PASSAGES, tokenizer, LENGTH)
  assert disk.tokens.dtype == np.int32
  assert_same(disk, expected)


def test_a_directory_that_was_moved_opens(directory, tokenizer, tmp_path):
  moved = directory.rename(tmp_path / "elsewhere")
  disk = open_tokens(moved, PASSAGES, tokenizer, LENGTH)
  assert_same(disk, TokenizedPassages(PASSAGES, tokenizer, LENGTH))


def test_no_passages_have_no_rows(tokenizer, tmp_path):
  disk = write_tokens(tmp_path / "none", [], tokenizer, LENGTH)
  assert disk.tokens.shape == (0, LENGTH - 1)
  assert disk.num_cut == 0


def refused(directory, match, *args):
  with pytest.raises(ValueError, match=match):
    open_tokens(directory, *args)
  # Whoever would write gets the same, and overwrites nothing.
  before = contents(directory)
  with pytest.raises(ValueError, match=match):
    write_tokens(directory, *args)
  assert contents(directory) == before


def test_tokens_of_something_else_are_refused(directory, tokenizer, tmp_path):
  changed = [Passage("new", "", "Text."), *PASSAGES[1:]]
  match = r"made with other passages.*Use the same passages, or write tokens to"
  refused(directory, match, changed, tokenizer, LENGTH)
  other = train_tokenizer(["another text"], 300)
  match = r"made with another tokenizer.*Use the same tokenizer"
  refused(directory, match, PASSAGES, other, LENGTH)
  match = (
    r"another prompt or .*: None, but \['p: ', ''\].*the same encoder\.pass"
  )
  refused(
    directory, match, PASSAGES, tokenizer, LENGTH, Wording(passage_prompt="p: ")
  )
  match = rf"another length: {LENGTH}, but {LENGTH + 1} is in use"
  refused(directory, match, PASSAGES, tokenizer, LENGTH + 1)
  tokenizer.save(tmp_path / "same")
  same = load_tokenizer(tmp_path / "same")
  open_tokens(directory, PASSAGES, same, LENGTH)
  same.eos_id = same.mask_id
  match = r"other special tokens.*Use the same tokenizer"
  refused(directory, match, PASSAGES, same, LENGTH)


def test_a_number_of_passages_that_was_edited_is_refused(directory, tokenizer):
  manifest = json.loads((directory / "manifest.json").read_text())
  del manifest["sha256"]  # as of a manifest of before
  manifest["content"]["made_of"]["num_passages"] = 61
  (directory / "manifest.json").write_text(json.dumps(manifest))
  match = "another number of passages: 61, but 60"
  refused(directory, match, PASSAGES, tokenizer, LENGTH)
  manifest["content"]["made_of"] = None
  (directory / "manifest.json").write_text(json.dumps(manifest))
  refused(directory, "other passages.*None", PASSAGES, tokenizer, LENGTH)
  manifest["content"]["joined_by"] = "glue"
  (directory / "manifest.json").write_text(json.dumps(manifest))
  match = "says 'glue' about how.*'ids', 'text'.*Copy the directory"
  refused(directory, match, PASSAGES, tokenizer, LENGTH)


@pytest.mark.parametrize("name", ["tokens", "begins_word", "lengths"])
@pytest.mark.parametrize("damage", ["missing", "was cut off", "damaged"])
def test_a_damaged_file_is_named(directory, tokenizer, name, damage):
  path = directory / f"{name}.npy"
  data = bytearray(path.read_bytes())
  if damage == "missing":
    path.unlink()
  elif damage == "damaged":
    data[-1] ^= 1
    path.write_bytes(data)
  else:
    path.write_bytes(data[:-1])
  with pytest.raises(ValueError, match=rf"{name}.npy.*{damage}.*write_tokens"):
    open_tokens(directory, PASSAGES, tokenizer, LENGTH)


def test_what_is_no_complete_token_store_is_refused(tokenizer, tmp_path):
  args = (PASSAGES, tokenizer, LENGTH)
  with pytest.raises(FileNotFoundError, match=r"no manifest.json, since there"):
    open_tokens(tmp_path / "no", *args)
  with pytest.raises(ValueError, match=r"gs://b/t.*from a bucket.*Copy it"):
    open_tokens("gs://b/t", *args)
  with pytest.raises(ValueError, match=r"token store.*gs://b/t, a bucket"):
    write_tokens("gs://b/t", *args)
  write_store(tmp_path / "store", PASSAGES)
  with pytest.raises(ValueError, match=r"holds other files.*id_hashes.npy"):
    write_tokens(tmp_path / "store", *args)


class Interrupted(PassageList):
  """Passages of which a row cannot be read, until it can."""

  last = 0

  def __getitem__(self, index):
    if isinstance(index, slice) and index.stop > self.last:
      raise KeyboardInterrupt
    return super().__getitem__(index)


def test_an_interrupted_writer_goes_on_where_it_stopped(
  directory, tokenizer, tmp_path, asked, caplog
):
  path = tmp_path / "part"
  passages = Interrupted(PASSAGES, "memory")
  passages.last = 45
  with pytest.raises(KeyboardInterrupt):
    write_tokens(path, passages, tokenizer, LENGTH)
  with pytest.raises(FileNotFoundError, match="cut off"):
    open_tokens(path, PASSAGES, tokenizer, LENGTH)
  asked.clear()
  with caplog.at_level("INFO"):
    write_tokens(path, PASSAGES, tokenizer, LENGTH)
  assert asked == list(PASSAGES[42:])  # the last multiple of 14 before 45
  assert "42 of 60 passages were tokenised" in caplog.text
  assert contents(path) == contents(directory)
  assert not (path / ".progress.json.tmp").exists()
  asked.clear()
  write_tokens(path, PASSAGES, tokenizer, LENGTH)
  assert asked == []


@pytest.mark.parametrize("change", ["length", "lost"])
def test_a_writer_begins_again_where_it_cannot_go_on(
  directory, tokenizer, tmp_path, caplog, change
):
  path = tmp_path / "part"
  passages = Interrupted(PASSAGES, "memory")
  passages.last = 45
  length = LENGTH + (change == "length")
  with pytest.raises(KeyboardInterrupt):
    write_tokens(path, passages, tokenizer, length)
  if change == "lost":  # as after a power cut
    os.truncate(path / "tokens.npy", 1000)
  write_tokens(path, PASSAGES, tokenizer, LENGTH)
  assert contents(path) == contents(directory)
  lost = "tokens.npy does not hold 42 rows" in caplog.text
  assert lost == (change == "lost")


KILLED = """
import os, signal, sys
from rag_jax.corpus import token_store
from rag_jax.corpus import tokenized as tokenized_lib
from rag_jax.corpus.store import PassageStore
from rag_jax.corpus.tokenizer import load_tokenizer

token_store._BLOCK_ROWS, token_store._PROGRESS_ROWS = 7, 14
store, tokenizer, directory = sys.argv[1:4]
tokenize = token_store.tokenize_rows

def killed(block, *args):
  if block[0].id == "id-35":
    os.kill(os.getpid(), signal.SIGKILL)
  return tokenize(block, *args)

token_store.tokenize_rows = killed
token_store.write_tokens(
  directory, PassageStore(store), load_tokenizer(tokenizer), int(sys.argv[4])
)
"""


def test_a_killed_writer_loses_nothing_that_it_had_noted(
  directory, tokenizer, tmp_path
):
  store = write_store(tmp_path / "store", PASSAGES)
  tokenizer.save(tmp_path / "tokenizer")
  names = [tmp_path / name for name in ("store", "tokenizer", "killed")]
  killed = subprocess.run(
    [sys.executable, "-c", KILLED, *names, str(LENGTH)], check=False
  )
  assert killed.returncode == -signal.SIGKILL
  note = json.loads((names[2] / ".progress.json.tmp").read_text())
  assert note["progress"]["num_done"] == 28
  write_tokens(names[2], store, tokenizer, LENGTH)
  assert contents(names[2]) == contents(directory)


def test_of_two_writers_one_is_refused_and_the_other_finishes(
  directory, tokenizer, tmp_path, monkeypatch
):
  path = tmp_path / "both"
  tokenize = token_store.tokenize_rows
  refusals = []

  def both(block, *args):
    with pytest.raises(ValueError, match="else is building a token store"):
      write_tokens(path, PASSAGES, tokenizer, LENGTH)
    refusals.append(1)
    return tokenize(block, *args)

  monkeypatch.setattr(token_store, "tokenize_rows", both)
  write_tokens(path, PASSAGES, tokenizer, LENGTH)
  assert len(refusals) == 9
  assert contents(path) == contents(directory)


def test_a_full_disk_is_said_and_what_was_written_stays(
  directory, tokenizer, tmp_path
):
  path = tmp_path / "full"
  with (
    full_disk(1500),
    pytest.raises(
      OSError, match=r"cannot be written.*File too.*continues from"
    ),
  ):
    write_tokens(path, PASSAGES, tokenizer, LENGTH)
  note = json.loads((path / ".progress.json.tmp").read_text())
  assert 0 < note["progress"]["num_done"] < len(PASSAGES)
  write_tokens(path, PASSAGES, tokenizer, LENGTH)
  assert contents(path) == contents(directory)


def test_long_work_says_how_far_it_is(tokenizer, tmp_path, monkeypatch, caplog):
  monkeypatch.setattr(progress, "LOG_SECS", 0.0)
  with caplog.at_level("INFO"):
    write_tokens(tmp_path / "t", PASSAGES, tokenizer, LENGTH)
  assert "Tokenised 7 of 60 passages (12%), " in caplog.text
  assert "60 passages tokenised in" in caplog.text
  assert "cut; rows are the ids of title and text, each" in caplog.text


def test_memory_does_not_grow_with_the_passages(
  tokenizer, tmp_path, monkeypatch
):
  monkeypatch.setattr(artifacts, "_READ_BYTES", 1 << 14)
  monkeypatch.setattr(token_store, "_BLOCK_ROWS", 32)
  monkeypatch.setattr(tokenized_lib, "_SAMPLE", 32)
  store = write_store(tmp_path / "store", make(400))
  limit = 350_000
  args = (store, tokenizer, 256)
  assert peak_bytes(lambda: TokenizedPassages(*args)) > 2 * limit
  path = tmp_path / "tokens"
  assert peak_bytes(lambda: write_tokens(path, *args)) < limit


def test_a_wording_is_stored_and_not_taken_for_none(tokenizer, tmp_path):
  wording = Wording(passage_prompt="p: ", title_sep=" | ")
  args = PASSAGES, tokenizer, LENGTH
  stored = write_tokens(tmp_path / "tokens", *args, wording)
  expected = TokenizedPassages(*args, wording)
  np.testing.assert_array_equal(stored.tokens, expected.tokens)
  with pytest.raises(
    ValueError, match=r"another prompt .*, but None is in use"
  ):
    open_tokens(tmp_path / "tokens", *args)
