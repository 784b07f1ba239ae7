"""Contexts of strings, as RAG models were trained on, and two tokenizers.

Hugging Face's own retriever is the reference in tests/parity/context_test.py.
"""

import numpy as np
import pytest
import tokenizers
from tokenizers import models
from tokenizers import normalizers
from tokenizers import pre_tokenizers
from tokenizers import processors
import transformers

from rag_jax.config import DataConfig
from rag_jax.corpus.passages import Passage
from rag_jax.corpus.tokenized import TokenizedPassages
from rag_jax.corpus.tokenizer import Tokenizer
from rag_jax.corpus.tokenizer import train_tokenizer
from rag_jax.data.context import ContextBuilder
from rag_jax.data.context import rag_context
from rag_jax.data.substitution import Change

PASSAGES = (
  Passage("a", '"Andorra"', "The capital is Andorra la Vella."),
  Passage("b", "", "No   title."),
  Passage("c", "France", "Paris is the capital."),
)
QUESTIONS = ("What is the capital of Andorra?", "PARIS?")


@pytest.fixture(scope="module")
def generator():
  return train_tokenizer([f"{p.title} {p.text}" for p in PASSAGES], 512)


def word_tokenizer(start):
  """Returns a tokenizer of lower-case words, like BERT's or like T5's."""
  texts = [*QUESTIONS, *(f"{p.title} {p.text}" for p in PASSAGES)]
  normalizer = normalizers.Lowercase()
  split = pre_tokenizers.Whitespace()
  words = {
    word
    for text in texts
    for word, _ in split.pre_tokenize_str(normalizer.normalize_str(text))
  }
  special = ["[PAD]", "[SEP]", "[UNK]", *(["[CLS]"] if start else [])]
  vocab = {piece: i for i, piece in enumerate([*special, *sorted(words)])}
  model = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
  model.normalizer, model.pre_tokenizer = normalizer, split
  begin = ["[CLS]"] if start else []
  model.post_processor = processors.TemplateProcessing(
    single=[*begin, "$A", "[SEP]"],
    special_tokens=[(token, vocab[token]) for token in [*begin, "[SEP]"]],
  )
  return Tokenizer(
    transformers.PreTrainedTokenizerFast(
      tokenizer_object=model,
      pad_token="[PAD]",
      sep_token="[SEP]",
      unk_token="[UNK]",
      **({"cls_token": "[CLS]"} if start else {}),
    )
  )


@pytest.fixture(scope="module")
def retriever():
  return word_tokenizer(start=True)


def make(generator, retriever=None, **settings):
  """Returns a builder, of two tokenizers if `retriever` is given."""
  config = DataConfig(**{"context_length": 64} | settings)
  passages = TokenizedPassages(PASSAGES, generator, config.passage_length)
  if retriever is None:
    return ContextBuilder(generator, passages, config)
  return ContextBuilder(
    generator,
    passages,
    config,
    TokenizedPassages(PASSAGES, retriever, config.passage_length),
  )


def rows_of(tokens, mask):
  """The real tokens of each row; padding stands behind them."""
  lengths = mask.sum(axis=-1, keepdims=True)
  np.testing.assert_array_equal(mask, np.arange(mask.shape[-1]) < lengths)
  flat = zip(
    tokens.reshape(-1, tokens.shape[-1]),
    lengths.ravel().tolist(),
    strict=True,
  )
  return [row[:length].tolist() for row, length in flat]


@pytest.mark.parametrize(
  ("title", "expected"),
  [
    ("Paris", "Paris / A text. // why?"),
    ('"Paris"', "Paris / A text. // why?"),
    ('"Paris', "Paris / A text. // why?"),
    ('""Paris""', '"Paris" / A text. // why?'),
    ('"', " / A text. // why?"),
    ("", " / A text. // why?"),
    ("Le  Havre", "Le Havre / A text. // why?"),
    ("Le   Havre", "Le  Havre / A text. // why?"),  # one pass
    ("Le Havre ", "Le Havre / A text. // why?"),  # with the separator's
  ],
)
def test_the_string_has_the_title_without_quotes_and_single_spaces(
  title, expected
):
  assert rag_context(title, "A text.", "why?", DataConfig()) == expected


def test_prefix_and_separators_are_settings():
  config = DataConfig(context_prefix="q: ", title_sep=": ", doc_sep=" | ")
  assert rag_context("T", "x", "y", config) == "q: T: x | y"


def test_a_context_is_the_string_with_the_special_tokens_of_its_tokenizer(
  retriever,
):
  builder = make(retriever, context_style="rag")
  for_tower, for_context = builder.encode_questions(QUESTIONS)
  assert for_context is for_tower
  docs = np.array([[2, 0], [0, 1]])
  tokens, mask = builder.contexts(for_context, docs)
  assert tokens.shape == mask.shape == (2, 2, 64)
  got = [" ".join(retriever.tokens(row)) for row in rows_of(tokens, mask)]
  # The separators "/" and "//" are unknown words.
  capital = "what is the capital of andorra ?"
  andorra = "andorra [UNK] the capital is andorra la vella . [UNK]"
  assert got == [
    f"[CLS] france [UNK] paris is the capital . [UNK] {capital} [SEP]",
    f"[CLS] {andorra} {capital} [SEP]",
    f"[CLS] {andorra} paris ? [SEP]",
    "[CLS] [UNK] no title . [UNK] paris ? [SEP]",
  ]
  assert builder.counts == dict.fromkeys(builder.counts, 0)


def test_a_long_context_loses_the_question_first_and_is_counted(retriever):
  docs = np.array([[0, 2]])
  ids = retriever.encode(QUESTIONS[:1])
  whole = rows_of(*make(retriever, context_style="rag").contexts(ids, docs))
  long, short = (len(row) for row in whole)
  length = long - 2
  builder = make(retriever, context_style="rag", context_length=length)
  tokens, mask = builder.contexts(ids, docs)
  cut = rows_of(tokens, mask)
  assert cut[0] == [*whole[0][: length - 1], retriever.eos_id]
  assert "?" not in retriever.tokens(cut[0])
  assert short <= length < long
  assert builder.counts["contexts_cut"] == 1


def test_the_default_keeps_the_question_whole_where_the_other_cuts_it(
  generator, retriever
):
  length = 24
  ids = {}
  for style in ("rag", "question_first"):
    builder = make(
      generator, retriever, context_style=style, context_length=length
    )
    _, context_ids = builder.encode_questions(QUESTIONS[:1])
    tokens, mask = builder.contexts(context_ids, np.array([[0]]))
    ids[style] = rows_of(tokens, mask)[0]
    assert builder.counts["contexts_cut"] == 1
  assert QUESTIONS[0] in generator.decode(ids["question_first"])
  assert "andorra?" not in generator.decode(ids["rag"]).lower()


def test_the_default_keeps_the_case_and_the_other_has_the_retrievers(
  generator, retriever
):
  texts = {}
  for style in ("rag", "question_first"):
    builder = make(
      generator, retriever, context_style=style, context_length=128
    )
    _, context_ids = builder.encode_questions(QUESTIONS[1:])
    tokens, mask = builder.contexts(context_ids, np.array([[2]]))
    texts[style] = generator.decode(rows_of(tokens, mask)[0])
  assert texts["question_first"].startswith("PARIS?")
  assert texts["rag"] == "France / Paris is the capital. // paris ?"


def test_towers_read_the_retrievers_ids_and_the_generator_its_own(
  generator, retriever
):
  builder = make(generator, retriever, context_length=128)
  for_tower, for_context = builder.encode_questions(QUESTIONS)
  cls, sep = retriever.bos_id, retriever.eos_id
  questions = rows_of(*builder.questions(for_tower))
  assert questions == [[cls, *row, sep] for row in retriever.encode(QUESTIONS)]
  title, text = retriever.encode([PASSAGES[2].title, PASSAGES[2].text])
  passages = rows_of(*builder.passages(np.array([2])))
  assert passages == [[cls, *title, sep, *text, sep]]
  title, text = generator.encode([PASSAGES[2].title, PASSAGES[2].text])
  asked = generator.encode(QUESTIONS[:1])[0]
  contexts = rows_of(*builder.contexts(for_context[:1], np.array([[2]])))
  assert contexts == [[0, *asked, 2, *title, 2, *text, 2]]
  answer = generator.encode(["Paris"])[0]
  assert rows_of(*builder.targets([answer])) == [[*answer, 2]]
  assert builder.counts == dict.fromkeys(builder.counts, 0)


def test_one_tokenizer_encodes_a_question_once(generator):
  builder = make(generator)
  for_tower, for_context = builder.encode_questions(QUESTIONS)
  assert for_tower is for_context
  assert for_tower == generator.encode(QUESTIONS)
  assert builder.retriever_ids(for_tower) == for_tower


def test_ids_of_the_generator_become_the_retrievers_by_their_text(
  generator, retriever
):
  builder = make(generator, retriever)
  ids = generator.encode([PASSAGES[2].text])
  masked = [[*ids[0], generator.mask_id]]
  expected = retriever.encode([PASSAGES[2].text])
  assert builder.retriever_ids(masked) == expected


def test_without_a_start_token_rows_begin_with_their_text():
  t5 = word_tokenizer(start=False)
  assert t5.bos_id is None
  builder = make(t5)
  ids, _ = builder.encode_questions(QUESTIONS)
  end = t5.eos_id
  assert rows_of(*builder.questions(ids)) == [[*row, end] for row in ids]
  title, text = t5.encode([PASSAGES[2].title, PASSAGES[2].text])
  passages = builder.passages(np.array([[2]]))
  assert passages[0].shape == (1, 1, 64)
  assert rows_of(*passages) == [[*title, end, *text, end]]
  contexts = rows_of(*builder.contexts(ids[:1], np.array([[2]])))
  assert contexts == [[*ids[0], end, *title, end, *text, end]]


def test_a_row_without_a_start_token_has_room_for_one_more():
  t5 = word_tokenizer(start=False)
  (ids,) = t5.encode(QUESTIONS[:1])
  fits = make(t5, question_length=len(ids) + 1, context_length=len(ids) + 1)
  assert rows_of(*fits.questions([ids])) == [[*ids, t5.eos_id]]
  contexts = rows_of(*fits.contexts([ids], np.zeros((1, 0), int)))
  assert contexts == [[*ids, t5.eos_id]]
  assert not fits.is_cut(ids, ids)
  assert fits.counts == dict.fromkeys(fits.counts, 0)
  for name in ("question_length", "context_length"):
    assert make(t5, **{name: len(ids)}).is_cut(ids, ids)


@pytest.mark.parametrize("style", ["rag", "question_first"])
def test_a_question_is_cut_where_the_rows_say_so(style, generator, retriever):
  ids = retriever.encode(QUESTIONS)
  for too_few in (0, 1):
    length = len(ids[0]) + 2 - too_few
    builder = make(
      generator, retriever, context_style=style, question_length=length
    )
    builder.questions(ids)
    assert builder.counts["questions_cut"] == too_few
    context_ids = builder.encode_questions(QUESTIONS)[1]
    cut = [builder.is_cut(*both) for both in zip(ids, context_ids, strict=True)]
    assert cut == [bool(too_few), False]


def test_the_generator_reads_of_a_question_what_the_tower_read(
  generator, retriever
):
  builder = make(
    generator,
    retriever,
    context_style="rag",
    question_length=5,
    context_length=128,
  )
  _, ids = builder.encode_questions(QUESTIONS[:1])
  tokens, mask = builder.contexts(ids, np.array([[2]]))
  text = generator.decode(rows_of(tokens, mask)[0])
  assert text == "France / Paris is the capital. // what is the"


def test_without_documents_the_string_is_the_question(generator, retriever):
  builder = make(
    generator, retriever, context_style="rag", context_prefix="question: "
  )
  _, ids = builder.encode_questions(QUESTIONS)
  tokens, mask = builder.contexts(ids, np.zeros((2, 0), int))
  assert tokens.shape == (2, 1, 64)
  texts = [generator.decode(row) for row in rows_of(tokens, mask)]
  assert texts == [
    "question: what is the capital of andorra ?",
    "question: paris ?",
  ]


def test_changed_answers_are_refused_where_documents_are_strings(generator):
  builder = make(generator, context_style="rag")
  ids, docs = generator.encode(QUESTIONS), np.array([[0], [1]])
  builder.contexts(ids, docs, [Change(), Change()])
  with pytest.raises(
    ValueError,
    match=r"Names are changed in the documents' tokens, but with"
    r" data.context_style='rag' the generator reads them as strings. Set"
    r" data.substitute_answers=0.0, data.substitute_subjects=0.0 or"
    r" data.context_style='question_first'",
  ):
    builder.contexts(ids, docs, [Change(), Change((([5], [6]),))])


def test_passages_of_another_tokenizer_are_refused(generator, retriever):
  passages = TokenizedPassages(PASSAGES, retriever, 64)
  with pytest.raises(
    ValueError,
    match=r"The passages have ids of another tokenizer than the generator's,"
    r" which reads them. Expected passages tokenised with the generator's, and"
    r" the others as retriever_passages; or set data.context_style='rag'",
  ):
    ContextBuilder(generator, passages, DataConfig())
  # Strings have no ids: the retriever's passages are enough for them.
  config = DataConfig(context_style="rag")
  builder = ContextBuilder(generator, passages, config)
  ids, _ = builder.encode_questions(QUESTIONS)
  assert ids == retriever.encode(QUESTIONS)
