"""One form of every text, against Unicode's own tables and by hand."""

import itertools
import random
import sys
import unicodedata

import pytest

from rag_jax.corpus.folding import fold
from rag_jax.corpus.folding import is_blank

ALIKE = [
  ("STRASSE straße", "strasse strasse"),
  ("Ὀδυσσεύς ὈΔΥΣΣΕΎΣ", "ὀδυσσεύσ ὀδυσσεύσ"),  # final and other sigma
  ("İSTANBUL istanbul", "istanbul istanbul"),
  ("ＡＢＣ１２３！＂＃～", 'abc123!"#~'),  # full width
  ("ﾃｽﾄ", "テスト"),  # half width
  ("ﬁne eﬀect", "fine effect"),
  ("SA\u0303O", "são"),
  ("Pa\u00adris", "paris"),  # soft hyphen
  ("Pa\u200bris\ufeff", "paris"),
  ("\u202aParis\u202c\u2069", "paris"),
  ("ca\u034fe\u200d\u0301", "caé"),  # between a letter and its accent
  ("می\u200cخواهم", "میخواهم"),
  ("كتـــاب", "كتاب"),
  ("ﻛﺘﺎﺏ", "كتاب"),
  ("۱۹۹۰ ١٩٩٠ १९९०", "1990 1990 1990"),
  ("“a” „b‟ «c» 「d」 ″ ＂", '"a" "b" "c" "d" " "'),
  ("it’s itʼs it´s it`s it′s", "it's it's it's it's it's"),
  ("a–b a—b a‐b a‑b −5", "a-b a-b a-b a-b -5"),
  ("乔治·华盛顿・乔治•", "乔治·华盛顿·乔治·"),
  ("东京。、，：", "东京.,,:"),
  ("\u00a0a\u2003b\u3000", " a b "),
  ("CO₂ m² ㎞ № …", "co2 m2 km no ..."),
  ("½ 1½ 10² 2₁₀ 10⁻³", "1/2 1 1/2 10^2 2_10 10^-3"),
  ("❤\ufe0f", "❤"),
]


@pytest.mark.parametrize(("text", "expected"), ALIKE)
def test_a_text_has_one_form(text, expected):
  assert fold(text) == expected


@pytest.mark.parametrize(
  ("one", "other"),
  [("Sao", "São"), ("10²", "102"), ("1½", "11/2"), ("ı", "i"), ("か", "が")],
)
def test_what_differs_stays_different(one, other):
  assert fold(one) != fold(other)


def test_folding_again_changes_nothing():
  blocks = (range(0x3400), range(0xA000, 0xAC80), range(0xF900, 0x20000))
  every = " ".join(map(chr, itertools.chain(*blocks, range(0x2F800, 0x2FA20))))
  assert fold(fold(every)) == fold(every)
  rng = random.Random(0)
  odd = "iIİß1½²₂\u0307\u0301\u00ad\u200c\u034f\u3164´ '`٣．ﬁが\u3099Σς\u1e9e"
  for _ in range(3000):
    text = "".join(rng.choices(odd + "ab ", k=rng.randrange(8)))
    text += chr(rng.randrange(0x80, 0x3100))
    assert fold(fold(text)) == fold(text), ascii(text)


def test_letters_are_those_of_unicodes_own_folding():
  """NFKC and casefold, until nothing changes; but for the stated rules."""
  letters = [c for c in map(chr, range(sys.maxunicode + 1)) if c.isalpha()]
  marks = "İ\u0640\u02b9\u02ba\u02bb\u02bc\u02bd\u02c8\u02ca\u02cb\u02ee"
  text = " ".join(c for c in letters if c not in marks + "ŉ\u0374ẚ")
  expected, before = text, ""
  while expected != before:
    before = expected
    expected = unicodedata.normalize("NFD", expected).casefold()
    expected = unicodedata.normalize("NFKC", expected)
  # Kashida, and letters of Hangul that are not drawn.
  expected = expected.translate(dict.fromkeys([0x640, 0x115F, 0x1160]))
  assert fold(text) == expected


def test_all_that_is_not_drawn_goes():
  for code in (0xAD, 0x200B, 0x200C, 0x200D, 0x200E, 0x202E, 0x2060, 0x2066,
               0xFEFF, 0xFE0F, 0xE0041, 0x180E, 0x3164, 0x61C):  # fmt: skip
    assert fold(f"a{chr(code)}b") == "ab", hex(code)


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    ("1,000", "1000"),
    ("12,345,678.90", "12345678.90"),
    ("'1,000'", "'1000'"),
    ("12,34,567", "1234567"),  # Indian
    ("1’000 1'000'000", "1000 1000000"),
    ("1.000.000", "1000000"),
    ("1\u00a0000 2\u202f000\u202f000", "1000 2000000"),
    ("１，０００", "1000"),
    ("۱٬۰۰۰", "1000"),
    ("5,000–6,000", "5000-6000"),
    ("in 1,000, 2,000", "in 1000, 2000"),
    # No groups, or as likely something else:
    ("1.000", "1.000"),
    ("1 000", "1 000"),
    ("1,2345", "1,2345"),
    ("1,000,00", "1,000,00"),
    ("0,123", "0,123"),
    ("0.123,456", "0.123,456"),
    ("1990,1991", "1990,1991"),
    ("1'000,000", "1'000,000"),
    ("3.141.59", "3.141.59"),
  ],
)
def test_digits_in_groups_are_one_number_if_asked_for(text, expected):
  assert fold(text, join_digits=True) == expected
  assert fold(fold(text, join_digits=True), join_digits=True) == expected


def test_every_mark_has_the_form_of_its_canonical_equivalent():
  for code in range(0x80, 0x30000):
    composed = unicodedata.normalize("NFC", chr(code))
    if composed == chr(code):
      continue
    for text in ("a{}b", " {} ", "{}", "1{}2"):
      expected = fold(text.format(composed))
      assert fold(text.format(chr(code))) == expected, hex(code)


@pytest.mark.parametrize("text", ["", " \t\n", "\u200b", "\u00ad \ufeff\u2060"])
def test_a_text_without_visible_characters_is_blank(text):
  assert is_blank(text)
  assert not is_blank(text + "x" + text)
  assert not is_blank(text + "\u0301")
