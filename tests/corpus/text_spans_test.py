"""Words and sentences are found where a reader finds them, and none is lost.

Base64 and the like are found, and language is not taken for it.
"""

import base64
import binascii
import random

import pytest

from rag_jax.corpus.passage_reader import load_passages
from rag_jax.corpus.text_spans import data_spans
from rag_jax.corpus.text_spans import inside_word
from rag_jax.corpus.text_spans import sentence_spans
from rag_jax.corpus.text_spans import text_between
from rag_jax.corpus.text_spans import word_spans


def words(text, max_chars=100):
  return [text[a:b] for a, b in word_spans(text, max_chars=max_chars)]


def sentences(text):
  return [text[a:b] for a, b in sentence_spans(text)]


@pytest.mark.parametrize(
  "text",
  [
    "",
    " \n\t ",
    "One two  three\nfour\u00a0five.",
    "naïve cafe\u0301 — 1,863 km² (e.g. this)",
    "한국어 텍스트에는 공백이 있다.",
    "Слово за словом",
  ],
)
def test_words_are_what_stands_between_white_space(text):
  assert words(text) == text.split()


def test_each_chinese_character_is_a_word_with_the_mark_behind_it():
  assert words("黑豹队。第308分、NFL (a)") == [
    *("黑", "豹", "队。", "第", "308", "分、", "NFL", "(a)"),
  ]


def test_a_thai_vowel_or_tone_stays_with_its_consonant():
  assert words("ที่นี่") == ["ที่", "นี่"]


def test_a_long_run_is_several_words():
  assert words("a" * 25 + " b", max_chars=10) == [
    *("a" * 10, "a" * 10, "a" * 5, "b"),
  ]


def test_an_accent_is_not_parted_from_its_letter_at_the_limit():
  assert words("abcde\u0301f", max_chars=5) == ["abcde\u0301", "f"]


def test_a_text_of_signs_alone_has_no_word_without_an_end():
  assert max(map(len, words("\u0301" * 1000, max_chars=10))) <= 18


def test_inside_a_word_is_between_two_letters_without_space():
  text = "ab c你好。d"
  inside = [place for place in range(len(text) + 1) if inside_word(text, place)]
  assert inside == [1]


@pytest.mark.parametrize(
  "expected",
  [
    ["One.", "Two!", "Three?", "Four"],
    ["He said “no.”", 'Then "yes!"', "(Both.)", "End…", "Go on."],
    ["Mr. J. Smith met Dr. No, e.g. at 5.30 in St. Ives.", "He left."],
    ["It has 6.5 km (see www.a.org/b.html) of v1.2.3.", "Next."],
    ["Why?!", "Wait..."],
  ],
)
def test_sentences_end_where_a_reader_ends_them(expected):
  assert sentences(" ".join(expected)) == expected
  assert sentences("\n  ".join(expected)) == expected


def test_chinese_sentences_need_no_space_between_them():
  expected = ["他来了。", "“真的吗\uff1f”", "是\uff01", "完"]
  assert sentences("".join(expected)) == expected


def test_an_empty_line_ends_a_sentence_and_a_line_end_does_not():
  assert sentences("A heading\n \nText that\ngoes on\n\n\n\nEnd") == [
    *("A heading", "Text that\ngoes on", "End"),
  ]


@pytest.mark.parametrize("seed", range(20))
def test_between_sentences_and_words_there_is_white_space_alone(seed):
  rng = random.Random(seed)
  alphabet = "ab .!?\n“”\"')。\uff01你好ก่\u0301,;Mr. \t\u2028"
  text = "".join(rng.choice(alphabet) for _ in range(400))
  for spans in (sentence_spans(text), word_spans(text, max_chars=3)):
    end = 0
    for start, stop in spans:
      assert start < stop
      assert not text[end:start].strip()
      assert text[start:stop] == text[start:stop].strip()
      end = stop
    assert not text[end:].strip()


@pytest.mark.parametrize("text", [".", ".a", ".)", "\n", "。", "\n ", "a"])
def test_long_texts_without_a_sentence_end_are_read_to_their_end(text):
  # In quadratic time, this would not end.
  long = text * 300_000
  kept = "".join(long[start:stop] for start, stop in sentence_spans(long))
  assert "".join(kept.split()) == "".join(long.split())


DATA = random.Random(0).randbytes(3_000)
B64 = base64.b64encode(DATA).decode()


def without(text):
  return "".join(text_between(text, data_spans(text)))


@pytest.mark.parametrize(
  "data",
  [
    B64,
    base64.urlsafe_b64encode(DATA).decode(),
    base64.encodebytes(DATA).decode().strip(),
    "\n".join(B64[i : i + 64] for i in range(0, 1000, 64)),
    DATA.hex(),
    f"data:image/png;base64,{B64}",
    "data:image/svg+xml;charset=utf-8," + "%3Csvg%20a" * 20,
    "\\x89\\x50" * 50,
    "begin 644 a.bin\n"
    + "".join(
      binascii.b2a_uu(DATA[i : i + 45]).decode() for i in range(0, 900, 45)
    )
    + "`\nend",
    base64.b64encode(
      b"Plain words, but nobody can read them so. " * 9
    ).decode(),
  ],
)
def test_encoded_data_is_left_out_and_nothing_beside_it(data):
  text = without(f"Before.\n\n{data}\n\nBehind, too.")
  assert " ".join(text.split()) == "Before. Behind, too."


@pytest.mark.parametrize(
  "text",
  [
    "sha256:" + DATA[:32].hex(),
    "sha512-" + base64.b64encode(DATA[:64]).decode(),
    "https://example.org/" + "some/path-to/a_page/" * 9 + "?q=1&b=two#three",
    "src/main/java/org/example/project/service/impl/CustomerAccountServiceImpl"
    "FactoryBeanRegistrationTest/AbstractDependencyInjectionContextTests",
    "x" * 500,
    "ACGT" * 100,
    "snake_case_names_are_long_in_some_places_" * 5,
    "https://example.org/%D0%9C%D0%BE%D1%81%D0%BA%D0%B2%D0%B0" * 3,
    "1234567890" * 30,
    "| a | b |\n|---|---|\n" + "-" * 200,
  ],
)
def test_what_is_searched_for_stays(text):
  assert without(text) == text


def test_no_passage_of_a_real_corpus_is_touched():
  assert not any(data_spans(p.text) for p in load_passages("world_facts"))
