"""Questions and documents are laid out as the module's docstring shows."""

import numpy as np
import pytest

from rag_jax.config import DataConfig
from rag_jax.corpus.passages import Passage
from rag_jax.corpus.tokenized import TokenizedPassages
from rag_jax.corpus.tokenized import Wording
from rag_jax.corpus.tokenizer import train_tokenizer
from rag_jax.data.context import ContextBuilder
from rag_jax.data.substitution import Change

PASSAGES = (
  Passage("a", "Andorra", "The capital is Andorra la Vella."),
  Passage("b", "", "No title."),
  Passage("c", "France", "Paris is the capital."),
)
QUESTIONS = ("What is the capital of Andorra?", "Paris?")
BOS, PAD, EOS = 0, 1, 2


@pytest.fixture(scope="module")
def tokenizer():
  return train_tokenizer([f"{p.title} {p.text}" for p in PASSAGES], 512)


@pytest.fixture
def build(tokenizer):
  def make(**lengths):
    config = DataConfig(**lengths)
    passages = TokenizedPassages(PASSAGES, tokenizer, config.passage_length)
    return ContextBuilder(tokenizer, passages, config)

  return make


def padded(rows, length):
  """Rows of ids as an array, and its mask."""
  tokens = [[*row, *[PAD] * (length - len(row))] for row in rows]
  mask = [[i < len(row) for i in range(length)] for row in rows]
  return np.array(tokens), np.array(mask)


def passage_ids(tokenizer, row):
  title, text = tokenizer.encode([PASSAGES[row].title, PASSAGES[row].text])
  return [*title, EOS, *text, EOS] if title else [*text, EOS]


def assert_rows(got, rows):
  """`got` holds these rows of ids, padded, and is True where they are."""
  tokens, mask = got
  expected_tokens, expected_mask = padded(rows, tokens.shape[-1])
  assert tokens.dtype == np.int32
  assert mask.dtype == bool
  np.testing.assert_array_equal(tokens, expected_tokens)
  np.testing.assert_array_equal(mask, expected_mask)


def test_a_question_is_start_question_end(build, tokenizer):
  builder = build(question_length=40)
  ids = tokenizer.encode(QUESTIONS)
  got = builder.questions(ids)
  assert got[0].shape == (2, 40)
  assert_rows(got, [[BOS, *row, EOS] for row in ids])
  assert builder.counts == dict.fromkeys(builder.counts, 0)


def test_a_long_question_is_cut_and_counted_and_keeps_its_end(build, tokenizer):
  long, short = tokenizer.encode(QUESTIONS)
  length = len(long) + 1  # one too few
  builder = build(question_length=length)
  got = builder.questions([long, short, long])
  cut = [BOS, *long[:-1], EOS]
  assert_rows(got, [cut, [BOS, *short, EOS], cut])
  assert builder.counts == {
    "questions_cut": 2,
    "contexts_cut": 0,
    "targets_cut": 0,
    "histories_cut": 0,
  }


def test_a_target_is_the_answer_and_the_end(build, tokenizer):
  ids = tokenizer.encode(["Andorra la Vella", "Paris"])
  builder = build(target_length=20)
  assert_rows(builder.targets(ids), [[*row, EOS] for row in ids])
  assert builder.counts["targets_cut"] == 0


def test_a_long_target_is_cut_and_counted_and_keeps_its_end(build, tokenizer):
  long, short = tokenizer.encode(["Andorra la Vella", "Paris"])
  # As long as the answer alone: the end token takes its last place.
  builder = build(target_length=len(long))
  got = builder.targets([long, short])
  assert_rows(got, [[*long[:-1], EOS], [*short, EOS]])
  assert builder.counts["targets_cut"] == 1
  assert builder.counts["questions_cut"] == 0


def test_a_passage_is_start_title_end_text_end(build, tokenizer):
  builder = build(passage_length=48)
  got = builder.passages(np.array([2, 0, 1, 2]))
  assert got[0].shape == (4, 48)
  rows = [[BOS, *passage_ids(tokenizer, row)] for row in (2, 0, 1, 2)]
  assert_rows(got, rows)


def test_passages_of_questions_have_the_shape_of_their_numbers(build):
  builder = build(passage_length=48)
  rows = np.array([[0, 1], [2, 0], [1, 1]])
  tokens, mask = builder.passages(rows)
  assert tokens.shape == mask.shape == (3, 2, 48)
  for b, k in np.ndindex(*rows.shape):
    alone, mask_alone = builder.passages(rows[b, k : k + 1])
    np.testing.assert_array_equal(tokens[b, k], alone[0])
    np.testing.assert_array_equal(mask[b, k], mask_alone[0])


def test_a_passage_that_was_cut_is_read_to_its_end(build, tokenizer):
  length = len(passage_ids(tokenizer, 0))  # with the start token, one too few
  tokens, mask = build(passage_length=length).passages(np.array([0]))
  assert mask.all()
  assert tokens[0, -1] == EOS
  assert tokens[0, :-1].tolist() == [BOS, *passage_ids(tokenizer, 0)[:-2]]


def test_a_context_is_the_question_and_then_the_passage(build, tokenizer):
  builder = build(context_length=96)
  ids = tokenizer.encode(QUESTIONS)
  docs = np.array([[0, 1, 2], [2, 2, 1]])
  tokens, mask = builder.contexts(ids, docs)
  assert tokens.shape == (2, 3, 96)
  for b in range(2):
    rows = [
      [BOS, *ids[b], EOS, *passage_ids(tokenizer, row)] for row in docs[b]
    ]
    assert_rows((tokens[b], mask[b]), rows)
  assert builder.counts == dict.fromkeys(builder.counts, 0)


def test_a_context_that_just_fits_is_not_cut(build, tokenizer):
  (ids,) = tokenizer.encode(QUESTIONS[:1])
  row = [BOS, *ids, EOS, *passage_ids(tokenizer, 0)]
  builder = build(context_length=len(row))
  tokens, mask = builder.contexts([ids], np.array([[0]]))
  assert tokens[0, 0].tolist() == row
  assert mask.all()
  assert builder.counts["contexts_cut"] == 0


def test_the_passage_is_cut_for_the_question_and_counted(build, tokenizer):
  (ids,) = tokenizer.encode(QUESTIONS[:1])
  head = [BOS, *ids, EOS]
  builder = build(context_length=len(head) + 4)
  tokens, mask = builder.contexts([ids], np.array([[0, 1, 2]]))
  for k in range(3):
    expected = head + passage_ids(tokenizer, k)[:4]
    assert tokens[0, k].tolist() == expected
  assert mask.all()
  assert builder.counts == {
    "questions_cut": 0,
    "contexts_cut": 3,
    "targets_cut": 0,
    "histories_cut": 0,
  }


@pytest.mark.parametrize("too_few", [0, 1, 5])
def test_a_question_that_fills_the_context_leaves_no_passage(
  build, tokenizer, too_few
):
  (ids,) = tokenizer.encode(QUESTIONS[:1])
  length = len(ids) + 2 - too_few
  builder = build(context_length=length)
  tokens, mask = builder.contexts([ids], np.array([[0, 1]]))
  for k in range(2):
    assert tokens[0, k].tolist() == [BOS, *ids[: length - 2], EOS]
  assert mask.all()
  assert builder.counts["questions_cut"] == 0  # of what the retriever reads
  assert builder.counts["contexts_cut"] == 2 + (too_few > 0)


def test_a_context_without_documents_is_the_question_alone(build, tokenizer):
  builder = build(context_length=96)
  ids = tokenizer.encode(QUESTIONS)
  tokens, mask = builder.contexts(ids, np.zeros((2, 0), np.int32))
  assert tokens.shape == (2, 1, 96)
  rows = [[BOS, *row, EOS] for row in ids]
  assert_rows((tokens[:, 0], mask[:, 0]), rows)


def test_the_order_of_documents_is_kept(build, tokenizer):
  ids = tokenizer.encode(QUESTIONS)
  builder = build(context_length=64)
  docs = np.array([[0, 1, 2], [1, 2, 0]])
  tokens, mask = builder.contexts(ids, docs)
  reverse_tokens, reverse_mask = builder.contexts(ids, docs[:, ::-1])
  np.testing.assert_array_equal(tokens[:, ::-1], reverse_tokens)
  np.testing.assert_array_equal(mask[:, ::-1], reverse_mask)


def test_the_counts_add_up_over_batches(build, tokenizer):
  ids = tokenizer.encode(QUESTIONS)
  builder = build(question_length=4, context_length=8, target_length=2)
  docs = np.array([[0], [1]])
  counts = []
  for _ in range(2):
    builder.questions(ids)
    builder.contexts(ids, docs)
    builder.targets(ids)
    counts.append(dict(builder.counts))
  assert [name for name, count in counts[0].items() if not count] == [
    "histories_cut"
  ]
  assert counts[1] == {name: 2 * count for name, count in counts[0].items()}


@pytest.mark.parametrize("context_length", [12, 24, 90])
def test_contexts_that_are_gathered_are_those_of_a_loop(
  build, tokenizer, context_length
):
  rows = np.array([[2, 0, 1], [1, 1, 2]])
  ids = tokenizer.encode(QUESTIONS)
  gathered = build(context_length=context_length, passage_length=20)
  looped = build(context_length=context_length, passage_length=20)
  # A change of what no passage says goes through them one by one.
  absent = Change(((tokenizer.encode(["Nowhere else"])[0], [BOS]),))
  expected = looped.contexts(ids, rows, [absent, absent])
  for actual, array in zip(gathered.contexts(ids, rows), expected, strict=True):
    np.testing.assert_array_equal(actual, array)
    assert actual.dtype == array.dtype
  assert gathered.counts == looped.counts


@pytest.mark.parametrize("style", ["question_first", "rag"])
def test_the_retriever_alone_reads_prompts(tokenizer, style):
  config = DataConfig(context_style=style)
  length, wording = config.passage_length, Wording("query: ", "passage: ")
  plain = TokenizedPassages(PASSAGES, tokenizer, length)
  prompted = TokenizedPassages(PASSAGES, tokenizer, length, wording)
  builder = ContextBuilder(tokenizer, plain, config, prompted, wording=wording)
  ids, context_ids = builder.encode_questions(QUESTIONS)
  assert ids == tokenizer.encode([f"query: {q}" for q in QUESTIONS])
  assert context_ids == tokenizer.encode(QUESTIONS)
  tokens, mask = builder.passages(np.array([1]))
  (passage,) = tokenizer.encode(["passage: No title."])
  assert tokens[mask].tolist() == [BOS, *passage, EOS]
  rows = np.array([[0, 2], [1, 0]])
  for got, expected in zip(
    builder.contexts(context_ids, rows),
    ContextBuilder(tokenizer, plain, config).contexts(context_ids, rows),
    strict=True,
  ):
    np.testing.assert_array_equal(got, expected)
  # A part that begins a question, as in the warm-up.
  (begins,) = builder.retriever_ids(context_ids[:1], begins=True)
  assert begins == ids[0]
  assert builder.retriever_ids(context_ids) == context_ids
