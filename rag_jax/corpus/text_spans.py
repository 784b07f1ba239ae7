r"""Where the words and sentences of a text are.

In: a text. Out: (start, end) of each word or sentence, in order; between them
there is white space alone, so that nothing is lost if they are put together.

A word is what stands between white space. Some scripts have none between
their words: Chinese and Japanese, and Thai, Lao, Khmer, Burmese and Tibetan.
Of them each character counts as a word of its own (with the accents and vowel
signs on it), as in BERT's tokenizer for Chinese: 100 words are then 100
characters, less than 100 words of English hold. Korean has spaces.
"""

from collections.abc import Iterator
import functools
import re

Span = tuple[int, int]

# Scripts without spaces, by blocks: Thai and Lao; Tibetan; Burmese; Khmer;
# kana and Bopomofo; Han, its extensions and compatibility forms; small kana.
_UNSPACED = (
  "\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff"
  "\u3005-\u3007\u3040-\u312f\u31a0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
  "\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)
# Signs that belong to the character before them, of those scripts and of all:
# a passage does not begin with one.
_SIGNS = (
  "\u0300-\u036f\u0e31\u0e34-\u0e3a\u0e47-\u0e4e\u0eb1\u0eb4-\u0ebc"
  "\u0ec8-\u0ece\u0f18\u0f19\u0f35\u0f37\u0f39\u0f71-\u0f84\u0f86\u0f87"
  "\u0f8d-\u0fbc\u102b-\u103e\u1056-\u1059\u17b4-\u17d3\u3099\u309a"
  "\ufe00-\ufe0f\U000e0100-\U000e01ef"
)
# Punctuation of East Asia closes what stands before it.
_CLOSING = (
  "\u3001\u3002\u3009\u300b\u300d\u300f\u3011\u3015\u3017\u3019\u301b"
  "\uff01\uff09\uff0c\uff0e\uff1a\uff1b\uff1f\uff3d\uff5d\uff60\uff61\uff63\uff64"
  "\u2025\u2026"
)

# A sentence ends here: after these and closing quotes and brackets, if white
# space or the end follows; or after those of East Asia, which no space follows.
# Possessive, and from the first of several on: 10 MB of dots take linear time.
_END = re.compile(
  "(?<![.!?\u2026\u06d4\u061f\u0964\u0965])[.!?\u2026\u06d4\u061f\u0964\u0965]++"
  r"[\"'\u201d\u2019\u00bb)\]]*+(?=\s|\Z)"
  "|[\u3002\uff01\uff1f\uff61]++[\"'\u201d\u2019\u300d\u300f\uff09\u3011]*+"
  r"|\n[^\S\n]*+\n"  # an empty line
)
# A period after one of these ends no sentence: single letters and titles.
_ABBREVIATION = re.compile(
  r"(?:\b[A-Za-z]|\b(?:Mr|Mrs|Ms|Dr|Prof|St|Mt|Jr|Sr|Gen|Col|Lt|Capt|Gov|Sen"
  r"|Rep|Rev|No|Nos|Vol|Fig|vs|cf|al|approx|ca|e\.g|i\.e))\.\Z"
)
_LONGEST_ABBREVIATION = 12


_INSIDE = re.compile(f"[^\\s{_UNSPACED}{_CLOSING}]{{2}}")


@functools.cache
def _words(max_chars: int) -> re.Pattern[str]:
  """Returns what one word is, of at most `max_chars` characters.

  Eight more may follow that belong to the last one: a text of signs alone is
  no word without an end.
  """
  more = f"[{_SIGNS}{_CLOSING}]{{0,8}}"
  return re.compile(
    f"[{_UNSPACED}]{more}|[^\\s{_UNSPACED}]{{1,{max_chars}}}[{_SIGNS}]{{0,8}}"
  )


def inside_word(text: str, place: int) -> bool:
  """Returns whether a run without white space goes on at `place`.

  Between characters that each count as a word it does not.
  """
  return place > 0 and _INSIDE.match(text, place - 1) is not None


def word_spans(
  text: str, start: int = 0, end: int | None = None, *, max_chars: int
) -> Iterator[Span]:
  """Yields where the words of `text` are.

  Args:
    text: any.
    start: where to begin.
    end: where to stop; None: at the end of the text.
    max_chars: a longer run without white space is several words.
  """
  stop = len(text) if end is None else end
  for match in _words(max_chars).finditer(text, start, stop):
    yield match.span()


def line_spans(text: str, start: int, end: int) -> Iterator[Span]:
  """Yields where lines are that hold more than space, with their indentation.

  The first begins at `start`, wherever that is in its line.
  """
  while start < end:
    stop = text.find("\n", start, end)
    stop = end if stop < 0 else stop
    if line := text[start:stop].rstrip():
      yield start, start + len(line)
    start = stop + 1


def sentence_spans(text: str) -> Iterator[Span]:
  """Yields where the sentences of `text` are, without the space around them.

  By rules, for any language that ends sentences with a period or the like, or
  with an empty line. They are wrong at times ("at 5 a.m. Monday"): then a
  passage ends at another place, and nothing is lost.
  """
  start = 0
  for match in _END.finditer(text):
    before = text[max(start, match.end() - _LONGEST_ABBREVIATION) : match.end()]
    if match[0] == "." and _ABBREVIATION.search(before):
      continue
    if span := _stripped(text, start, match.end()):
      yield span
    start = match.end()
  if span := _stripped(text, start, len(text)):
    yield span


def _stripped(text: str, start: int, end: int) -> Span | None:
  """Returns the span without the white space at its ends, if some is left."""
  inner = text[start:end].lstrip()
  begin = end - len(inner)
  inner = inner.rstrip()
  return (begin, begin + len(inner)) if inner else None
