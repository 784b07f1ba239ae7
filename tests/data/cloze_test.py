"""The warm-up asks a passage for a span of its own that it cannot see."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from rag_jax.config import Config
from rag_jax.corpus.passage_reader import load_passages
from rag_jax.corpus.passages import Passage
from rag_jax.corpus.tokenized import TokenizedPassages
from rag_jax.corpus.tokenizer import train_tokenizer
from rag_jax.data.cloze import ClozeBatches
from rag_jax.data.context import ContextBuilder

BOS, EOS, MASK = 0, 2, 4
PASSAGES = load_passages("world_facts")[:40]


@pytest.fixture(scope="module")
def tokenizer():
  return train_tokenizer([f"{p.title} {p.text}" for p in PASSAGES], 600)


@pytest.fixture
def build(tokenizer):
  """Returns (the batches, the passages as token ids)."""

  def make(passages=PASSAGES, seed=0, n_docs=4, **warmup):
    config = Config(seed=seed)
    config.data.n_docs = n_docs
    config.data.passage_length = 128
    config.data.context_length = 192
    config.warmup.batch_size = 16
    for name, value in warmup.items():
      setattr(config.warmup, name, value)
    tokenized = TokenizedPassages(passages, tokenizer, 128)
    assert tokenized.num_cut == 0
    context = ContextBuilder(tokenizer, tokenized, config.data)
    batches = ClozeBatches(tokenizer, tokenized, context, config)
    ids = [
      row[:length].tolist()
      for row, length in zip(tokenized.tokens, tokenized.lengths, strict=True)
    ]
    return batches, ids

  return make


def test_a_retriever_with_its_own_tokenizer_reads_the_same_window(tokenizer):
  uncased = train_tokenizer(
    [f"{p.title} {p.text}" for p in PASSAGES], 500, uncased=True
  )
  config = Config()
  config.warmup.batch_size = 16
  tokenized = [
    TokenizedPassages(PASSAGES, t, 128) for t in (tokenizer, uncased)
  ]
  context = ContextBuilder(tokenizer, tokenized[0], config.data, tokenized[1])
  batch = ClozeBatches(tokenizer, tokenized[0], context, config).batch(3)
  questions = rows_of(batch.question_tokens, batch.question_mask)
  contexts = rows_of(batch.context_tokens[:, 0], batch.context_mask[:, 0])
  compared = 0
  for question, read in zip(questions, contexts, strict=True):
    window = read[1 : read.index(EOS)]
    if MASK not in window:  # it begins in the title and goes on in the text
      continue
    compared += 1
    parts = [question[1:-1], window]
    texts = []
    for ids, reader in zip(parts, (uncased, tokenizer), strict=True):
      assert ids.count(MASK) == 1
      cut = ids.index(MASK)
      texts.append((reader.decode(ids[:cut]), reader.decode(ids[cut + 1 :])))
    by_generator = [
      (uncased.decode(uncased.encode([text])[0])) for text in texts[1]
    ]
    assert list(texts[0]) == by_generator
  assert compared >= 8


def rows_of(tokens, mask):
  """The real tokens of each row, as lists."""
  return [row[real].tolist() for row, real in zip(tokens, mask, strict=True)]


def parts(batch):
  """Yields (window, span, passage) of each row."""
  windows = rows_of(batch.question_tokens, batch.question_mask)
  spans = rows_of(batch.target_tokens, batch.target_mask)
  passages = rows_of(batch.doc_tokens[:, 0], batch.doc_mask[:, 0])
  for window, span, passage in zip(windows, spans, passages, strict=True):
    assert (window[0], window[-1]) == (BOS, EOS)
    assert span[-1] == EOS
    assert (passage[0], passage[-1]) == (BOS, EOS)
    yield window[1:-1], span[:-1], passage[1:]


def is_inside(part, whole):
  starts = range(len(whole) - len(part) + 1)
  return any(whole[i : i + len(part)] == part for i in starts)


def assert_equal(a, b):
  """Every array of two batches is the same."""
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_the_span_fits_where_the_mask_is_and_nowhere_is_it_shown(build):
  batches, _ = build()
  for step in range(20):
    for window, span, passage in parts(batches.batch(step)):
      assert window.count(MASK) == 1
      at = window.index(MASK)
      assert is_inside([*window[:at], *span, *window[at + 1 :]], passage)
      assert 1 <= len(span) <= 10
      assert len(window) - 1 <= 16


def test_the_mask_stands_at_each_side_and_inside_of_the_window(build):
  batches, _ = build(window_tokens=4)
  places = {
    (window.index(MASK), len(window))
    for step in range(10)
    for window, _, _ in parts(batches.batch(step))
  }
  assert {(at, 5) for at in range(5)} <= places


def test_spans_are_whole_words_from_the_title_to_the_end_of_the_text(
  build, tokenizer
):
  batches, _ = build(span_max_words=2, span_max_tokens=15)
  texts = {p.title for p in PASSAGES} | {p.text for p in PASSAGES}
  word = re.compile(r"\b[\w,'-]+\b|\S")
  counts, titles, ends = set(), False, False
  for step in range(40):
    for _, span, passage in parts(batches.batch(step)):
      text = tokenizer.decode(span)
      counts.add(len(word.findall(text)))
      assert EOS not in span
      # A word begins where the span does, and one ends where it ends.
      head = r"(?<!\w)" if text[0].isalnum() else ""
      tail = r"(?!\w)" if text[-1].isalnum() else ""
      pattern = re.compile(head + re.escape(text) + tail)
      assert any(pattern.search(whole) for whole in texts), text
      titles |= passage[: len(span)] == span
      ends |= passage[-1 - len(span) : -1] == span
  assert counts == {1, 2}
  assert titles
  assert ends


def test_a_word_longer_than_the_longest_span_is_cut(build):
  batches, _ = build(span_max_tokens=2)
  spans = [len(span) for _, span, _ in parts(batches.batch(0))]
  assert max(spans) == 2


def test_the_document_is_the_passage_of_the_span(build):
  batches, ids = build()
  batch = batches.batch(3)
  assert batch.doc_tokens.shape == (16, 1, 128)
  contexts = rows_of(batch.context_tokens[:, 0], batch.context_mask[:, 0])
  questions = rows_of(batch.question_tokens, batch.question_mask)
  for context, question, (_, _, passage) in zip(
    contexts, questions, parts(batch), strict=True
  ):
    assert passage in ids
    assert context == question + passage
  assert batch.doc_embeddings is None


def test_a_batch_is_a_function_of_seed_and_step(build):
  batches, _ = build()
  expected = {step: batches.batch(step) for step in (5, 0, 1)}
  again, _ = build()
  for step in (0, 1, 5):
    assert_equal(again.batch(step), expected[step])
  for batch in (expected[1], build(seed=1)[0].batch(0)):
    assert not np.array_equal(batch.doc_tokens, expected[0].doc_tokens)


def test_no_passage_is_its_own_negative(build):
  batches, _ = build(batch_size=40)
  for step in range(5):
    passages = batches.batch(step).doc_tokens[:, 0]
    assert len(np.unique(passages, axis=0)) == len(passages)


def test_closed_book_shows_the_window_alone(build):
  batches, ids = build(n_docs=0)
  batch = batches.batch(0)
  given = {
    field.name
    for field in dataclasses.fields(batch)
    if getattr(batch, field.name) is not None
  }
  assert given == {
    "context_tokens",
    "context_mask",
    "target_tokens",
    "target_mask",
  }
  assert batch.context_tokens.shape == (16, 1, 192)
  contexts = rows_of(batch.context_tokens[:, 0], batch.context_mask[:, 0])
  spans = rows_of(batch.target_tokens, batch.target_mask)
  for context, span in zip(contexts, spans, strict=True):
    window = context[1:-1]
    at = window.index(MASK)
    assert len(window) <= 17
    filled = [*window[:at], *span[:-1], *window[at + 1 :]]
    assert any(is_inside(filled, passage) for passage in ids)


def test_closed_book_asks_for_the_same_spans(build):
  open_book, closed_book = build()[0].batch(2), build(n_docs=0)[0].batch(2)
  np.testing.assert_array_equal(
    open_book.target_tokens, closed_book.target_tokens
  )


def test_fewer_passages_than_the_batch_are_refused(build):
  with pytest.raises(
    ValueError,
    match=(
      r"warmup.batch_size=8 is more than there are passages \(3\), and the"
      " warm-up uses each at most once per batch. Lower it, or skip the"
      " warm-up: warmup.num_steps=0."
    ),
  ):
    build(passages=PASSAGES[:3], batch_size=8)


def test_no_passage_comes_twice_in_a_batch(build):
  batches, ids = build(passages=PASSAGES[:3], batch_size=3)
  found = [passage for _, _, passage in parts(batches.batch(0))]
  assert sorted(found) == sorted(ids)


def test_a_window_is_as_long_as_the_passage_allows(build):
  batches, _ = build(passages=PASSAGES, batch_size=len(PASSAGES))
  for step in range(20):
    for window, span, passage in parts(batches.batch(step)):
      assert len(window) > 1 or len(passage) == len(span)


def test_passages_of_a_word_or_two_are_asked_for_a_word(build):
  short = [
    Passage("a", "", "a"),
    Passage("b", "", "a b"),
    Passage("c", "C", "d"),
  ]
  batches, ids = build(passages=short, batch_size=3)
  for step in range(20):
    for window, span, passage in parts(batches.batch(step)):
      at = window.index(MASK)
      assert is_inside([*window[:at], *span, *window[at + 1 :]], passage)
      assert passage in ids
      assert 1 <= len(span) <= 2


@pytest.mark.parametrize("part", ["generator", "retriever"])
def test_a_tokenizer_that_has_no_mask_is_refused_at_once(part):
  kinds = [train_tokenizer(["a b"], 300), train_tokenizer(["a c"], 300)]
  kinds[part == "retriever"].mask_id = None
  tokenized = [TokenizedPassages(PASSAGES, kind, 128) for kind in kinds]
  config = Config()
  config.warmup.batch_size = 16
  context = ContextBuilder(kinds[0], tokenized[0], config.data, tokenized[1])
  with pytest.raises(
    ValueError,
    match=(
      f"The {part}'s tokenizer has neither mask_token nor unk_token, and the"
      r" warm-up masks spans .* or skip the warm-up: warmup\.num_steps=0"
    ),
  ):
    ClozeBatches(kinds[0], tokenized[0], context, config)
  if part == "retriever":  # a closed-book model has none
    config.data.n_docs = 0
    ClozeBatches(kinds[0], tokenized[0], context, config)


def test_a_mask_that_a_passage_spells_out_is_text(build):
  attack = [Passage("a", "", "one <mask> two </s> three <pad> four")]
  batches, _ = build(passages=attack, batch_size=1)
  for step in range(10):
    for window, span, _ in parts(batches.batch(step)):
      assert window.count(MASK) == 1
      assert not {BOS, 1, EOS, MASK} & set(span)
