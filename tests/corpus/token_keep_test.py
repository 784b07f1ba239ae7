"""Kept tokens are made once, by one process, and are the right ones."""

import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest

from rag_jax.corpus.passages import Passage
from rag_jax.corpus.store import write_store
from rag_jax.corpus.token_store import keep_tokens
from rag_jax.corpus.tokenized import TokenizedPassages
from rag_jax.corpus.tokenizer import train_tokenizer

LENGTH = 16
PASSAGES = [
  Passage(str(i), f"Title {i}" if i % 3 else "", "some words " * (i % 9 + 1))
  for i in range(60)
]


@pytest.fixture(scope="module")
def tokenizer():
  return train_tokenizer([f"{p.title} {p.text}" for p in PASSAGES], 400)


def assert_right(kept, tokenizer, length=LENGTH, passages=PASSAGES):
  expected = TokenizedPassages(passages, tokenizer, length)
  assert isinstance(kept.tokens, np.memmap)
  for name in ("tokens", "begins_word", "lengths"):
    np.testing.assert_array_equal(getattr(kept, name), getattr(expected, name))


def test_tokens_are_made_once(tokenizer, tmp_path, asked):
  folder = tmp_path / "deep" / "tokens"
  assert_right(keep_tokens(folder, PASSAGES, tokenizer, LENGTH), tokenizer)
  assert len(asked) == 60
  assert_right(keep_tokens(folder, PASSAGES, tokenizer, LENGTH), tokenizer)
  assert len(asked) == 60


def test_tokens_of_something_else_are_made_beside_them(
  tokenizer, tmp_path, asked
):
  first = keep_tokens(tmp_path, PASSAGES, tokenizer, LENGTH)
  other = train_tokenizer(["another text"], 300)
  changed = [Passage("new", "", "Text."), *PASSAGES[1:]]
  assert_right(keep_tokens(tmp_path, PASSAGES, other, LENGTH), other)
  assert_right(keep_tokens(tmp_path, PASSAGES, tokenizer, 20), tokenizer, 20)
  assert_right(
    keep_tokens(tmp_path, changed, tokenizer, LENGTH),
    tokenizer,
    passages=changed,
  )
  assert len(asked) == 4 * 60
  assert_right(first, tokenizer)
  assert len(list(tmp_path.iterdir())) == 4


def test_what_is_complete_is_opened_without_writing(
  tokenizer, tmp_path, monkeypatch
):
  keep_tokens(tmp_path, PASSAGES, tokenizer, LENGTH)

  read = os.open

  def refuse(*_args, **_kwargs):
    raise PermissionError("read-only")

  def only_read(path, flags, *args, **kwargs):
    if flags & (os.O_CREAT | os.O_WRONLY | os.O_RDWR):  # as of the lock
      refuse()
    return read(path, flags, *args, **kwargs)

  monkeypatch.setattr(os, "open", only_read)
  monkeypatch.setattr(pathlib.Path, "mkdir", refuse)
  assert_right(keep_tokens(tmp_path, PASSAGES, tokenizer, LENGTH), tokenizer)


PROCESS = """
import os, signal, sys, time
from rag_jax.corpus import token_store
from rag_jax.corpus.store import PassageStore
from rag_jax.corpus.tokenizer import load_tokenizer

token_store._BLOCK_ROWS = token_store._PROGRESS_ROWS = 20
folder, store, tokenizer, killed = sys.argv[1:]
tokenize = token_store.tokenize_rows
def slow(block, *args):
  print("block", block[0].id, flush=True)
  time.sleep(0.5)
  if killed == "yes" and block[0].id == "40":
    os.kill(os.getpid(), signal.SIGKILL)
  return tokenize(block, *args)
token_store.tokenize_rows = slow
token_store.keep_tokens(
  folder, PassageStore(store), load_tokenizer(tokenizer), 16
)
"""


@pytest.mark.parametrize("killed", ["no", "yes"])
def test_of_processes_one_writes_and_the_next_goes_on_if_it_dies(
  tokenizer, tmp_path, killed
):
  write_store(tmp_path / "store", PASSAGES)
  tokenizer.save(tmp_path / "tokenizer")
  names = [tmp_path / name for name in ("tokens", "store", "tokenizer")]

  def start(killed):
    return subprocess.Popen(
      [sys.executable, "-c", PROCESS, *names, killed],
      stdout=subprocess.PIPE,
      text=True,
    )

  first = start(killed)
  assert first.stdout.readline() == "block 0\n"
  second = start("no")
  written = [p.communicate(timeout=60)[0].split() for p in (first, second)]
  assert written[0] == ["block", "20", "block", "40"]
  if killed == "yes":
    assert first.returncode == -signal.SIGKILL
    assert written[1] == ["block", "40"]
  else:
    assert first.returncode == 0
    assert written[1] == []
  assert second.returncode == 0
  assert_right(keep_tokens(names[0], PASSAGES, tokenizer, LENGTH), tokenizer)


def test_a_damaged_file_is_refused(tokenizer, tmp_path):
  keep_tokens(tmp_path, PASSAGES, tokenizer, LENGTH)
  (file,) = tmp_path.glob("*/tokens.npy")
  file.write_bytes(file.read_bytes()[:-1])
  with pytest.raises(ValueError, match=r"tokens.npy.*cut off.*remove it"):
    keep_tokens(tmp_path, PASSAGES, tokenizer, LENGTH)


def test_a_place_for_no_tokens_is_refused(tokenizer, tmp_path):
  with pytest.raises(ValueError, match=r"gs://b/t, a bucket.*data.token_cache"):
    keep_tokens("gs://b/t", PASSAGES, tokenizer, LENGTH)
  (tmp_path / "file").write_text("")
  with pytest.raises(OSError, match=r"cannot be kept in .*data.token_cache"):
    keep_tokens(tmp_path / "file", PASSAGES, tokenizer, LENGTH)
