"""Splits texts into words, for search by words and comparison of answers.

In: a text in any language. Out: its words in a normal form, as `Bm25Index`
counts them. In Chinese, Japanese, Korean, Thai and similar scripts, pairs of
neighbouring characters are used as words: this needs no dictionary, and
questions and passages are split in the same way.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
import functools
import itertools
import re
import threading
import unicodedata

import snowballstemmer

from rag_jax.corpus import folding

# Scripts without spaces between words or, in Korean, between a word and its
# particles. Lucene's CJKBigramFilter makes pairs of the first four:
# https://lucene.apache.org/core/9_0_0/analysis/common/org/apache/lucene/analysis/cjk/CJKBigramFilter.html
_UNSPACED = (
  (0x2E80, 0x2FDF), (0x3005, 0x3007), (0x3400, 0x4DBF), (0x4E00, 0x9FFF),
  (0xF900, 0xFAFF), (0x20000, 0x3FFFF),  # Han
  (0x3040, 0x309F), (0x1B000, 0x1B16F),  # Hiragana, and old kana
  (0x30A0, 0x30FF), (0x31F0, 0x31FF),  # Katakana
  (0x1100, 0x11FF), (0x3130, 0x318F), (0xA960, 0xA97F), (0xAC00, 0xD7FF),
  # Hangul ends above. Bopomofo, Thai and Lao, Myanmar, Khmer:
  (0x3100, 0x312F), (0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF),
)  # fmt: skip

# Unicode assigns no other characters, except for private use.
_ASSIGNED = (*range(0x40000), *range(0xE0000, 0xE0200))

RULES = (1, 2)  # versions of the rule for words; new indexes use the last


class WordTokenizer:
  """Splits texts into words.

  A word is a run of letters, digits and marks, after `folding.fold` with digits
  joined: "STRASSE" equals "straße", and "1,000" equals "1000". (Rule 1, that of
  older indexes, only applies Unicode's NFKC and lower case.) Accents stay. A
  run in a script without spaces is split into pairs of neighbouring characters,
  each with its marks; a single character is a word. (For XQuAD's questions in
  Chinese, BM25 with pairs ranks the gold passage first for 0.936, with single
  characters for 0.896, with both for 0.935.)
  """

  def __init__(
    self,
    stemmer: str = "",
    stop_words: Sequence[str] = (),
    rule: int = RULES[-1],
  ):
    """Checks the settings.

    Args:
      stemmer: the language of the Snowball stemmer that removes word endings,
        for instance "english" (https://snowballstem.org); "" removes none.
      stop_words: words to leave out, in upper or lower case.
      rule: one of `RULES`.

    Raises:
      ValueError: there is no such stemmer or rule.
      TypeError: `stop_words` is one string.
    """
    if isinstance(stop_words, str):
      raise TypeError(
        f"stop_words={stop_words!r} is one string; expected a list of words."
        f" Pass [{stop_words!r}]."
      )
    languages = snowballstemmer.algorithms()
    if stemmer and stemmer not in languages:
      raise ValueError(
        f"stemmer={stemmer!r} is not a language of the Snowball stemmers."
        f" Expected one of {sorted(languages)}, or '' to remove no endings."
      )
    if rule not in RULES:
      raise ValueError(
        f"word_rule={rule!r} is not a known version of the rule for words."
        f" Expected one of {RULES}; new indexes use {RULES[-1]}. Correct it."
      )
    self.stemmer = stemmer
    self.stop_words = tuple(stop_words)
    self._fold = _FOLD[rule]
    self._stop = frozenset(
      part for word in stop_words for part in _words(self._fold(word))
    )
    self._stem = _stem_function(stemmer)

  def __call__(self, text: str) -> list[str]:
    """Returns the words of `text`, in order."""
    words = _words(self._fold(text))
    words = (word for word in words if word not in self._stop)
    return [*map(self._stem, words)] if self._stem else [*words]


def _stem_function(language: str) -> Callable[[str], str] | None:
  if not language:
    return None
  stemmer, lock = snowballstemmer.stemmer(language), threading.Lock()

  # Stemming is slow, and most words occur often.
  @functools.lru_cache(maxsize=1 << 17)
  def stem(word: str) -> str:
    with lock:  # the stemmer is not thread-safe
      return stemmer.stemWord(word)

  return stem


def _lower(text: str) -> str:
  return unicodedata.normalize("NFKC", text).lower()


_FOLD = {1: _lower, 2: functools.partial(folding.fold, join_digits=True)}


def units(text: str, *, numbers: bool = False) -> list[str]:
  """Returns the units of a folded text, for finding one text in another.

  Units are words of letters, digits and marks; in scripts without spaces each
  character with its marks, so that a name is found inside a sentence; and every
  other visible character.

  Args:
    text: a text that `folding.fold` returned.
    numbers: make a number with its sign and decimals one unit, "-3.5", without
      zeros at the end of the decimals. Letters next to it are a separate unit:
      "5km" is "5", "km".
  """
  found = _units(numbers).findall(text)
  return [*map(_plain_number, found)] if numbers else found


def joined_units(text: str, *, numbers: bool = False) -> str:
  """Returns the folded `units` of any text, with a space around each.

  No unit holds a space, so that a substring search finds exactly the places
  where the units of one text follow one another in another text: see `holds`.
  """
  found = units(folding.fold(text, join_digits=numbers), numbers=numbers)
  return " " + "".join(unit + " " for unit in found)


def holds(text: str, answers: Iterable[str]) -> bool:
  """Returns whether one of `answers` is in `text`, unit for unit.

  All are from `joined_units`. An answer without a unit is nowhere.
  """
  return any(len(answer) > 1 and answer in text for answer in answers)


def plain_words(text: str) -> list[str]:
  """Returns the words of any text: its folded `units` without punctuation.

  For ASCII these are the runs of letters and digits in lower case.
  """
  found = units(folding.fold(text))
  return [unit for unit in found if unicodedata.category(unit[0])[0] in "LNM"]


def spaced_out(text: str) -> str:
  """Returns `text` with spaces around each character of an unspaced script.

  Nothing else changes, so that a tokenizer for spaced text can read it.
  """
  _, character = _patterns()
  return character.sub(lambda match: f" {match.group()} ", text)


def _plain_number(unit: str) -> str:
  """Returns a unit; if it has decimals, without zeros at their end."""
  whole, point, decimals = unit.partition(".")
  if not point or not decimals.isdecimal():
    return unit
  sign, whole = ("-", whole[1:]) if whole.startswith("-") else ("", whole)
  return f"{sign}{whole or '0'}.{decimals}".rstrip("0").rstrip(".")


def _words(text: str) -> Iterator[str]:
  runs, character = _patterns()
  for match in runs.finditer(text):
    run = match.group()
    if match.lastgroup == "spaced":
      yield run
      continue
    characters = character.findall(run)
    if len(characters) == 1:
      yield run
    for pair in itertools.pairwise(characters):
      yield "".join(pair)


@functools.cache
def _patterns() -> tuple[re.Pattern[str], re.Pattern[str]]:
  r"""Returns patterns of a run, and of one character of an unspaced run.

  `\w` would not do: it includes the underscore and lacks the vowel signs of
  many scripts, so it would split Hindi words.
  """
  spaced, unspaced, marks = [], [], []
  for code in _ASSIGNED:
    kind = unicodedata.category(chr(code))[0]
    if kind == "M":
      marks.append(code)
    if kind not in "LNM":
      continue
    if any(first <= code <= last for first, last in _UNSPACED):
      unspaced.append(code)
    else:
      spaced.append(code)
  # A mark belongs to the character before it. Marks of spaced scripts can also
  # follow an unspaced character, such as the voiced sound mark of Japanese.
  unit = f"[{_ranges(unspaced)}][{_ranges(marks)}]*"
  runs = f"(?P<unspaced>(?:{unit})+)|(?P<spaced>[{_ranges(spaced)}]+)"
  return re.compile(runs), re.compile(unit)


@functools.cache
def _units(numbers: bool) -> re.Pattern[str]:
  runs, character = _patterns()
  spaced = runs.pattern.partition("(?P<spaced>")[2].removesuffix(")")
  # Control characters, halves of surrogate pairs, and private use.
  hidden = r"\x00-\x1f\x7f-\x9f\ud800-\uf8ff\U000e0000-\U0010ffff"
  other = rf"(?![{hidden}])\S"
  if not numbers:
    return re.compile(f"{character.pattern}|{spaced}|{other}")
  # A minus sign is at the start or after a space, opening mark or currency.
  sign = "(?<![^\\s\"'(\\[{$\u00a3\u00a5\u20ac])-"
  begins = r"(?<![^\s($-])"  # where a number like .5 may begin
  number = rf"(?:{sign})?(?:[0-9]+(?:\.[0-9]+)*|{begins}\.[0-9]+)"
  word = f"(?:(?![0-9]){spaced.removesuffix('+')})+"
  return re.compile(f"{character.pattern}|{number}|{word}|{other}")


def _ranges(codes: list[int]) -> str:
  """Returns sorted code points as the inside of a character class."""
  parts = []
  # In a run of consecutive codes, code minus position is constant.
  numbered = itertools.groupby(enumerate(codes), lambda pair: pair[1] - pair[0])
  for _, group in numbered:
    run = [code for _, code in group]
    parts.append(f"\\U{run[0]:08x}-\\U{run[-1]:08x}")
  return "".join(parts)
