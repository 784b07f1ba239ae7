"""Texts as words, for search by words.

In: a text in any language. Out: its words, lower-cased, as `Bm25Index` counts
them. Where words are written without spaces, as in Chinese, Japanese, Korean or
Thai, pairs of neighbouring characters stand for them: no dictionary is needed,
and a question and a passage are cut alike.
"""

from collections.abc import Callable, Iterator, Sequence
import functools
import itertools
import re
import threading
import unicodedata

import snowballstemmer

# Scripts that write no space between words, or, as Korean, between a word and
# its particles. Lucene's CJKBigramFilter has pairs for the first four:
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

# No character beyond has a meaning of its own in any version of Unicode.
_ASSIGNED = (*range(0x40000), *range(0xE0000, 0xE0200))


class WordTokenizer:
  """Cuts texts into words; calling it again gives the same words.

  A word is a run of letters, digits and marks, after Unicode's normal form
  NFKC (which makes ordinary digits of the wide ones in Chinese texts) and in
  lower case; accents stay. A run in a script without spaces is cut into pairs
  of neighbouring characters, each with its marks; a single one is a word. (Of
  XQuAD's questions in Chinese, BM25 by pairs ranks the gold passage first for
  0.936, by single characters for 0.896, by both for 0.935.)
  """

  def __init__(self, stemmer: str = "", stop_words: Sequence[str] = ()):
    """Keeps the settings.

    Args:
      stemmer: the language whose word endings are cut off, for instance
        "english", by Snowball (https://snowballstem.org); "" cuts nothing.
      stop_words: words that are left out, in any case.

    Raises:
      ValueError: there is no such stemmer.
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
        f"stemmer={stemmer!r} is no language of the Snowball stemmers."
        f" Expected one of {sorted(languages)}, or '' to cut off no endings."
      )
    self.stemmer = stemmer
    self.stop_words = tuple(stop_words)
    self._stop = frozenset(_normal(word) for word in stop_words)
    self._stem = _stem_function(stemmer)

  def __call__(self, text: str) -> list[str]:
    """Returns the words of `text`, in their order."""
    words = (word for word in _words(_normal(text)) if word not in self._stop)
    return [*map(self._stem, words)] if self._stem else [*words]


def _stem_function(language: str) -> Callable[[str], str] | None:
  if not language:
    return None
  stemmer, lock = snowballstemmer.stemmer(language), threading.Lock()

  # The frequent words are met again and again, and stemming is slow.
  @functools.lru_cache(maxsize=1 << 17)
  def stem(word: str) -> str:
    with lock:  # it keeps the word that it works on in itself
      return stemmer.stemWord(word)

  return stem


def _normal(text: str) -> str:
  return unicodedata.normalize("NFKC", text).lower()


def units(text: str, *, numbers: bool = False) -> list[str]:
  """Returns what a folded text is made of, to look for one in another.

  Words of letters, digits and marks; in scripts without spaces each character
  with its marks, so that a name is found inside a sentence; and every other
  visible character by itself.

  Args:
    text: as `folding.fold` returns it.
    numbers: make one unit of a number with its sign and decimals, "-3.5", and
      write it without zeros at the end; letters next to it are apart: "5km" is
      "5", "km".
  """
  found = _units(numbers).findall(text)
  return [*map(_plain_number, found)] if numbers else found


def _plain_number(unit: str) -> str:
  """Returns a number with decimals without zeros at its end."""
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

  Not `\w`: it has the underscore, and lacks the vowel signs of many scripts,
  so that it would cut Hindi words into pieces.
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
  # A mark belongs to what it follows. Marks of the spaced scripts can follow
  # an unspaced character too, such as the voiced sound mark of Japanese.
  unit = f"[{_ranges(unspaced)}][{_ranges(marks)}]*"
  runs = f"(?P<unspaced>(?:{unit})+)|(?P<spaced>[{_ranges(spaced)}]+)"
  return re.compile(runs), re.compile(unit)


@functools.cache
def _units(numbers: bool) -> re.Pattern[str]:
  runs, character = _patterns()
  spaced = runs.pattern.partition("(?P<spaced>")[2].removesuffix(")")
  # Neither space nor control, nor half of a pair, nor for private use.
  hidden = r"\x00-\x1f\x7f-\x9f\ud800-\uf8ff\U000e0000-\U0010ffff"
  other = rf"(?![{hidden}])\S"
  if not numbers:
    return re.compile(f"{character.pattern}|{spaced}|{other}")
  # A sign stands at the start, or behind a space, an opening mark, a currency.
  sign = "(?<![^\\s\"'(\\[{$\u00a3\u00a5\u20ac])-"
  begins = r"(?<![^\s($-])"  # a number, with its point
  number = rf"(?:{sign})?(?:[0-9]+(?:\.[0-9]+)*|{begins}\.[0-9]+)"
  word = f"(?:(?![0-9]){spaced.removesuffix('+')})+"
  return re.compile(f"{character.pattern}|{number}|{word}|{other}")


def _ranges(codes: list[int]) -> str:
  """Returns sorted code points as the inside of a character class."""
  parts = []
  # Where neighbours follow one another, code minus position stays the same.
  numbered = itertools.groupby(enumerate(codes), lambda pair: pair[1] - pair[0])
  for _, group in numbered:
    run = [code for _, code in group]
    parts.append(f"\\U{run[0]:08x}-\\U{run[-1]:08x}")
  return "".join(parts)
