"""Words of texts in several scripts, against a loop over characters."""

from concurrent import futures
import itertools
import random
import sys
import unicodedata

import pytest

from rag_jax.corpus import folding
from rag_jax.corpus import words as words_lib
from rag_jax.corpus.words import WordTokenizer


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    ("The River  Seine, in Paris.", ["the", "river", "seine", "in", "paris"]),
    ("Newton's $5,000 e-mail", ["newton", "s", "5000", "e", "mail"]),
    ("STRASSE Straße ΌΣΟΣ όσος", ["strasse"] * 2 + ["όσοσ"] * 2),  # casefold
    ("1,000 1'000 1\u202f000 1000", ["1000"] * 4),
    ("1.000.000 1,000.5 1.000", ["1000000", "1000", "5", "1", "000"]),
    ("1,2,345 12,34", ["1", "2", "345", "12", "34"]),  # are no one number
    ("1,000km ١٬٠٠٠", ["1000km", "1000"]),
    ("soft\xadhyphen می\u200cروم", ["softhyphen", "میروم"]),
    ("snake_case", ["snake", "case"]),  # "_" is no letter
    ("S\u00e3o sa\u0303o", ["s\u00e3o", "s\u00e3o"]),  # the same accent
    ("Sao", ["sao"]),  # accents stay
    ("मुंबई भारत में है", ["मुंबई", "भारत", "में", "है"]),  # vowel signs
    ("\uff11\uff12\uff13 \ufb01ne", ["123", "fine"]),  # NFKC
    ("東京は日本", ["東京", "京は", "は日", "日本"]),  # pairs
    ("308分", ["308", "分"]),  # one character is a word
    ("苹果iPhone手机", ["苹果", "iphone", "手机"]),
    ("は\u3099んか\u3099", ["ばん", "んが"]),
    ("한국어는 좋다", ["한국", "국어", "어는", "좋다"]),
    ("ไทยั้", ["ไท", "ทยั้"]),  # marks stay with their character
    ("ก๓๔", ["ก", "34"]),
    ("", []),
    (" \t\n...!?", []),
    ("\ud800 a", ["a"]),  # half of a surrogate pair, as JSON can hold it
  ],
)
def test_a_text_is_cut_into_words(text, expected):
  assert WordTokenizer()(text) == expected


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    ("STRASSE Straße", ["strasse", "straße"]),
    ("$1,000 1000", ["1", "000", "1000"]),
    ("\uff11\uff12\uff13 \ufb01ne", ["123", "fine"]),
  ],
)
def test_older_indexes_go_on_by_their_rule(text, expected):
  assert WordTokenizer(rule=1)(text) == expected
  # A stop word is left out in the form that the rule gives it.
  stopped = WordTokenizer(stop_words=[text.split()[1]], rule=1)
  assert stopped(text) == expected[:-1]


def naive_words(text, rule):
  """One character after another."""

  def unspaced(char):
    return any(a <= ord(char) <= b for a, b in words_lib._UNSPACED)

  words, run, kind = [], [], ""

  def close():
    if kind == "spaced":
      words.append("".join(run))
    elif kind == "unspaced" and len(run) == 1:
      words.append(run[0])
    elif kind == "unspaced":
      words.extend(a + b for a, b in itertools.pairwise(run))

  text = (
    unicodedata.normalize("NFKC", text).lower()
    if rule == 1
    else folding.fold(text, join_digits=True)
  )
  for char in text:
    category = unicodedata.category(char)[0]
    if category == "M" and kind == "unspaced":
      run[-1] += char
      continue
    new = ""
    if category in "LNM":
      new = "unspaced" if unspaced(char) else "spaced"
    if new != kind:
      close()
      run, kind = [], new
    if new:
      run.append(char)
  close()
  return words


@pytest.mark.parametrize("rule", words_lib.RULES)
def test_words_are_those_of_a_loop_over_characters(rule):
  rng = random.Random(0)
  alphabet = (
    "aZé\u0301_ .5ßİ東京はガが\u3099ไทยั้한ก\u094d\u093fक½\uff11\u200d\u00b2"
  )
  split = WordTokenizer(rule=rule)
  for _ in range(2000):
    text = "".join(rng.choices(alphabet, k=rng.randrange(12)))
    assert split(text) == naive_words(text, rule), ascii(text)


def test_endings_are_cut_off_if_asked_for():
  assert WordTokenizer()("Running rivers") == ["running", "rivers"]
  assert WordTokenizer("english")("Running rivers") == ["run", "river"]
  assert WordTokenizer("german")("Häuser") == ["haus"]


def test_threads_do_not_cut_each_others_words():
  words = [f"{a}{b}{end}" for a in "bcdfg" for b in ("unn", "elat", "ossibl")
           for end in ("ings", "ations", "iveness", "ies")]  # fmt: skip
  expected = [WordTokenizer("english")(word) for word in words]
  before = sys.getswitchinterval()
  sys.setswitchinterval(1e-6)
  try:
    for _ in range(5):
      shared = WordTokenizer("english")
      with futures.ThreadPoolExecutor(4) as threads:
        assert list(threads.map(shared, words)) == expected
  finally:
    sys.setswitchinterval(before)


def test_stop_words_are_left_out_in_any_case():
  assert WordTokenizer(stop_words=("The", "\uff2fF"))("the end OF the") == [
    "end"
  ]


def test_a_stop_word_is_left_out_before_its_ending_is():
  assert WordTokenizer("english", ("does",))("does doe") == ["doe"]


def test_an_unknown_stemmer_is_refused_with_the_known_ones():
  with pytest.raises(ValueError, match=r"stemmer='klingon' is.*'english'.* ''"):
    WordTokenizer("klingon")


@pytest.mark.parametrize("rule", [0, 3])
def test_an_unknown_rule_is_refused(rule):
  with pytest.raises(
    ValueError, match=r"word_rule=.* Expected one of \(1, 2\)"
  ):
    WordTokenizer(rule=rule)


def test_one_string_of_stop_words_is_refused():
  with pytest.raises(TypeError, match=r"stop_words='the' is one string; exp"):
    WordTokenizer(stop_words="the")
