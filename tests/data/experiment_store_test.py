"""Passages in a store train what those of a file train, bit for bit."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from rag_jax.corpus.passage_reader import load_passages
from rag_jax.corpus.store import PassageStore
from rag_jax.corpus.store import write_store
from rag_jax.corpus.tokenizer import train_tokenizer
from rag_jax.data import experiment as experiment_lib
from rag_jax.data.experiment import open_experiment
from rag_jax.data.questions import load_questions
from rag_jax.retrieval.index import build_index
from rag_jax.training.stages import make_stages

NUM_PASSAGES = 2000


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
  """2000 passages as a file and as a store: those of tiny, and their like."""
  folder = tmp_path_factory.mktemp("store")
  records = [json.loads(x) for x in tiny.passages.read_text().splitlines()]
  for i in range(len(records), NUM_PASSAGES):
    some = records[i % 40]
    text = f"{some['text']} Here it is said of {some['title']} again. " * (
      i % 3 + 1
    )
    title = "" if i % 5 == 0 else f"{some['title']} {i}"
    records.append({"id": str(i), "title": title, "text": text})
  file = folder / "passages.jsonl"
  file.write_text("".join(json.dumps(r) + "\n" for r in records))
  write_store(
    folder / "passages", load_passages(str(file)), passages_per_shard=300
  )
  return folder


def config(tiny, folder, kind, **changes):
  changes = {
    "data__passages": str(folder / kind),
    "train__num_steps": 2,
    "warmup__num_steps": 2,
    "train__validate_steps": 0,
    "index__embed_batch_size": 250,
    **changes,
  }
  return tiny.config(**changes)


@pytest.fixture(scope="module")
def opened(tiny, folder):
  """The experiment of the file, and that of the store."""
  return (
    open_experiment(config(tiny, folder, "passages.jsonl")),
    open_experiment(
      config(tiny, folder, "passages"), tokens_path=folder / "tokens"
    ),
  )


def test_the_store_is_read_from_the_disk(opened):
  file, store = opened
  assert isinstance(store.passages, PassageStore)
  for name in ("tokens", "begins_word", "lengths"):
    on_disk, in_memory = (getattr(x.tokenized, name) for x in (store, file))
    assert isinstance(on_disk, np.memmap)
    assert not isinstance(in_memory, np.memmap)
    np.testing.assert_array_equal(on_disk, in_memory)
  assert store.tokenizer.fingerprint == file.tokenizer.fingerprint
  assert store.passages.fingerprint == file.passages.fingerprint


def batches(experiment, questions):
  rng = np.random.default_rng(0)
  warmup, main = make_stages(experiment, questions)
  for step in range(4):
    yield warmup.prepare(step).batch
  index = build_index(
    rng.standard_normal((NUM_PASSAGES, 4)).astype(np.float32),
    experiment.config.index,
    encoder_fingerprint="e",
    passages_fingerprint="p",
  )
  for step in range(4):
    found = rng.integers(0, NUM_PASSAGES, (8, 2)).astype(np.int32)
    found[0] = main.prepare.__self__.rows(step)[0]  # says its answer
    yield main.prepare(step, None, index, found).batch


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_batches_are_the_same(opened, tiny, share):
  made = []
  for experiment in opened:
    config = dataclasses.replace(experiment.config)
    config.data = dataclasses.replace(config.data, substitute_answers=share)
    experiment = dataclasses.replace(experiment, config=config)
    made.append(list(batches(experiment, tiny.split("train"))))
  for file, store in zip(*made, strict=True):
    leaves = jax.tree_util.tree_leaves_with_path(file)
    assert len(leaves) >= 8
    others = jax.tree_util.tree_leaves(store)
    for (path, a), b in zip(leaves, others, strict=True):
      assert (a.dtype, a.shape) == (b.dtype, b.shape), path
      np.testing.assert_array_equal(a, b, err_msg=str(path))


def test_training_ends_with_the_same_parameters(
  tiny, tiny_run, folder, tmp_path
):
  runs = [
    tiny.train(
      tmp_path / kind,
      config(tiny, folder, kind, data__token_cache=str(tmp_path / "tokens")),
    )
    for kind in ("passages.jsonl", "passages")
  ]
  assert isinstance(runs[1].experiment.tokenized.tokens, np.memmap)
  file, store = runs
  tiny_run.assert_bit_equal(file.state(4), store.state(4))
  assert file.extra(4)["doc_ids"] == store.extra(4)["doc_ids"]
  assert file.extra(4)["identity"] == store.extra(4)["identity"]


def test_a_run_of_a_file_keeps_no_tokens(tiny, folder, tmp_path):
  open_experiment(
    config(tiny, folder, "passages.jsonl"), tokens_path=tmp_path / "tokens"
  )
  assert not (tmp_path / "tokens").exists()


def test_a_tokenizer_is_trained_on_so_many_passages_at_most(
  tiny, folder, monkeypatch, caplog
):
  monkeypatch.setattr(experiment_lib, "_TOKENIZER_PASSAGES", 600)
  monkeypatch.setattr(experiment_lib, "_TOKENIZER_BLOCK", 7)
  passages = load_passages(str(folder / "passages.jsonl"))
  texts = [f"{p.title} {p.text}" for p in passages[::4]]
  texts += [q.question for q in load_questions(str(tiny.questions), "train")]
  expected = train_tokenizer(texts, 600)
  with caplog.at_level("INFO"):
    for kind in ("passages.jsonl", "passages"):
      opened = open_experiment(config(tiny, folder, kind))
      assert opened.tokenizer.fingerprint == expected.fingerprint
  assert "trained on every 4th of 2000 passages" in caplog.text
