"""Splitting loses no text, keeps to its sizes, and counts what it does."""

import random
import re

import pytest

from rag_jax.corpus.document import Document
from rag_jax.corpus.passages import Passage
from rag_jax.corpus.passages import load_passages
from rag_jax.corpus.report import CorpusReport
from rag_jax.corpus.splitting import SplitConfig
from rag_jax.corpus.splitting import split
from rag_jax.corpus.splitting import validate
from rag_jax.corpus.tokenizer import train_tokenizer

SENTENCES = (
  "One two three. Four five. Six seven eight nine. Ten. Eleven twelve."
)


class Letters:
  """A tokenizer whose tokens are letters; white space is none."""

  def encode(self, texts):
    """Returns a number for each letter."""
    return [[ord(c) for c in text if not c.isspace()] for text in texts]


@pytest.fixture(scope="module")
def tokenizer():
  return train_tokenizer((p.text for p in load_passages("world_facts")), 600)


def document(text, id="a"):
  return Document(id, "Title", text, (("lang", "en"),), "file:1")


def texts(text, tokenizer=None, report=None, **settings):
  """The texts of the passages."""
  passages = split(
    [document(text)],
    SplitConfig(**settings),
    tokenizer=tokenizer,
    report=report,
  )
  return [p.text for p in passages]


def random_text(seed, num_words=1000):
  rng = random.Random(seed)
  ends = [" "] * 8 + [". ", "\n", ".\n\n", "  ", "? ", ", "]
  return "".join(
    "".join(rng.choices("abcdé", k=rng.randint(1, 12))) + rng.choice(ends)
    for _ in range(num_words)
  )


@pytest.mark.parametrize("size", [1, 7, 100, 5000])
@pytest.mark.parametrize("seed", range(3))
def test_words_are_disjoint_and_give_the_text_back(seed, size):
  text = random_text(seed)
  # The oracle: DPR's loop.
  words = text.split()
  expected = [words[i : i + size] for i in range(0, len(words), size)]
  pieces = texts(text, method="words", size=size)
  assert [piece.split() for piece in pieces] == expected
  assert " ".join(pieces).split() == words


@pytest.mark.parametrize("method", ["words", "sentences"])
@pytest.mark.parametrize("unit", ["words", "tokens"])
@pytest.mark.parametrize("seed", range(6))
def test_no_character_is_lost_in_any_script(seed, unit, method):
  rng = random.Random(seed)
  alphabet = "abc .!?\n“”')。\uff0c\uff01你好ก่\u0301\t"
  text = "".join(rng.choice(alphabet) for _ in range(600))
  text += "x" * 300 + text
  pieces = texts(
    text,
    Letters() if unit == "tokens" else None,
    method=method,
    unit=unit,
    size=9,
    max_word_chars=10,
  )
  assert "".join("".join(pieces).split()) == "".join(text.split())
  assert all(piece in text and piece == piece.strip() for piece in pieces)
  if unit == "tokens":
    sizes = map(len, Letters().encode(pieces))
    assert max(sizes) <= 9


def test_white_space_inside_a_passage_stays_as_it_is():
  assert texts("  a\n\nb  c d ", size=3) == ["a\n\nb  c", "d"]


def test_a_hundred_words_of_chinese_are_a_hundred_characters():
  text = "黑豹队的防守只丢了三百零八分。" * 20
  pieces = texts(text, size=100)
  assert "".join(pieces) == text
  assert [len(re.sub("。", "", p)) for p in pieces] == [100, 100, 80]


def test_none_keeps_the_text_as_it_is():
  assert texts(" a  b\n", method="none", size=1) == [" a  b\n"]


def test_a_passage_has_title_and_metadata_of_its_document():
  passages = list(
    split([document("a b c"), document("d", "b")], SplitConfig(size=2))
  )
  lang = (("lang", "en"),)
  assert passages == [
    Passage("a#0", "Title", "a b", lang),
    Passage("a#1", "Title", "c", lang),
    Passage("b", "Title", "d", lang),
  ]


def test_sentences_stay_whole_as_long_as_they_fit():
  assert texts(SENTENCES, method="sentences", size=5) == [
    "One two three. Four five.",
    "Six seven eight nine. Ten.",
    "Eleven twelve.",
  ]


def test_overlap_repeats_whole_sentences_that_fit():
  assert texts(SENTENCES, method="sentences", size=6, overlap=2) == [
    "One two three. Four five.",
    "Four five. Six seven eight nine.",
    "Ten. Eleven twelve.",  # four words would be too many to repeat
  ]
  assert texts(SENTENCES, method="sentences", size=5, overlap=2) == [
    "One two three. Four five.",
    "Six seven eight nine. Ten.",  # with "Four five." it would be 6 words
    "Ten. Eleven twelve.",
  ]


def packed_slowly(sizes, size, overlap):
  """The oracle: (start, end) of passages of parts of these sizes."""
  spans, start, begin = [], 0, 0  # of the passage; of what is new in it
  while begin < len(sizes):
    while start < begin and sum(sizes[start : begin + 1]) > size:
      start += 1
    end = begin + 1
    while end < len(sizes) and sum(sizes[start : end + 1]) <= size:
      end += 1
    spans.append((start, end))
    previous, start, begin = start, end, end
    while start - 1 > previous and sum(sizes[start - 1 : end]) <= overlap:
      start -= 1
  return spans


@pytest.mark.parametrize("seed", range(30))
def test_sentences_are_packed_as_a_slow_loop_packs_them(seed):
  rng = random.Random(seed)
  size = rng.randint(5, 30)
  overlap = rng.randint(0, size - 1)
  sizes = [rng.randint(1, min(size, 9)) for _ in range(60)]
  parts = [" ".join(["w"] * (n - 1) + [f"{i}."]) for i, n in enumerate(sizes)]
  expected = [
    " ".join(parts[a:b]) for a, b in packed_slowly(sizes, size, overlap)
  ]
  text = " ".join(parts)
  settings = {"method": "sentences", "size": size, "overlap": overlap}
  assert texts(text, **settings) == expected
  if overlap > size // 2 and max(sizes) < 9:
    assert len(expected) > len(texts(text, method="sentences", size=size))


@pytest.mark.parametrize("method", ["words", "sentences"])
@pytest.mark.parametrize("size", [8, 40, 200])
def test_passages_of_tokens_have_at_most_so_many(tokenizer, method, size):
  text = "\n\n".join(p.text for p in load_passages("world_facts")[:150])
  text += " " + "naïve黑豹队🜚" * 30
  settings = {"method": method, "unit": "tokens", "size": size}
  pieces = texts(text, tokenizer, **settings)
  counts = [len(ids) for ids in tokenizer.encode(pieces)]
  assert max(counts) <= size
  assert sum(counts) > 0.7 * size * len(counts)  # they are well filled
  assert "".join("".join(pieces).split()) == "".join(text.split())


def test_a_sentence_that_is_too_long_is_divided_between_words_and_counted():
  report = CorpusReport()
  text = "Short one. This sentence is longer than five words. End."
  pieces = texts(text, method="sentences", size=5, report=report)
  assert pieces == [
    *("Short one.", "This sentence is longer than", "five words. End."),
  ]
  assert report.broken == 1
  assert report.places["broken"] == ["file:1"]


TEN_MB = 10_000_000


@pytest.mark.parametrize(
  "settings",
  [{}, {"method": "sentences", "size": 10, "max_word_chars": 1_000}],
)
def test_ten_mb_without_a_space_are_split_and_counted(settings):
  report = CorpusReport()
  pieces = texts("x" * TEN_MB, report=report, **settings)
  assert [len(p) for p in pieces] == [10_000] * 1_000
  assert (report.split, report.broken, report.cut) == (1, 999, 0)


def test_a_word_of_many_tokens_is_split_into_as_many_as_fit(tokenizer):
  report = CorpusReport()
  settings = {"method": "sentences", "unit": "tokens", "size": 250}
  pieces = texts("xy" * 50_000, tokenizer, report, **settings)
  assert sum(map(len, pieces)) == 100_000
  assert max(len(i) for i in tokenizer.encode(pieces)) <= 250
  assert report.broken == len(pieces) - 1


def test_ten_mb_in_one_piece_are_cut_where_settings_say_and_counted():
  report = CorpusReport()
  text = "word " * (TEN_MB // 5)
  settings = {"method": "none", "max_chars": 1_000}
  assert texts(text, report=report, **settings) == [text[:1_000]]
  assert (report.split, report.cut) == (0, 1)
  assert report.cut_chars == TEN_MB - 1_000
  assert report.places["cut"] == [f"file:1: {TEN_MB - 1_000} characters"]
  assert texts(text, method="none") == [text]


def test_documents_that_are_split_are_counted_with_their_place():
  report = CorpusReport()
  list(
    split(
      [document("a b c"), document("d")], SplitConfig(size=2), report=report
    )
  )
  assert report.split == 1
  assert report.places == {"split": ["file:1"]}


def test_every_impossible_setting_is_named_in_one_message():
  settings = SplitConfig(method="word", size=0, overlap=-1, max_word_chars=0)
  with pytest.raises(ValueError, match="The splitting is not valid") as info:
    validate(settings)
  for part in (
    "split.method='word' is not one of ['none', 'sentences', 'words']",
    "Did you mean 'words'?",
    "split.size=0 must be at least 1",
    "split.overlap=-1 must be at least 0",
    "split.max_word_chars=0 must be at least 1",
  ):
    assert part in str(info.value)


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"overlap": 5}, "split.overlap=5 is for split.method='sentences'"),
    (
      {"method": "sentences", "size": 5, "overlap": 5},
      "split.overlap=5 must be below split.size=5",
    ),
    ({"method": "none", "unit": "tokens"}, "split.unit='tokens' is the unit"),
  ],
)
def test_settings_that_contradict_one_another_are_refused(settings, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    validate(SplitConfig(**settings))


@pytest.mark.parametrize(
  ("unit", "tokenizer", "given"),
  [("tokens", None, "none is given"), ("words", Letters(), "a tokenizer is")],
)
def test_a_tokenizer_is_needed_for_tokens_alone(unit, tokenizer, given):
  with pytest.raises(ValueError, match=f"split.unit='{unit}', but {given}"):
    texts("a b", tokenizer, unit=unit)
