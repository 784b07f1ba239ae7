r"""Finds the words, sentences and encoded data in a text.

In: a text. Out: (start, end) of each word or sentence, in order. There is only
white space between them, so no text is lost. Or the places of base64 and
similar data, such as pictures, certificates and dumps. Hashes and addresses do
not count as such data, since people search for them.

Words are separated by white space. Chinese, Japanese, Thai, Lao, Khmer, Burmese
and Tibetan have no spaces between words; there each character counts as a word
(with its accents and vowel signs), as in BERT's tokenizer for Chinese. 100
words are then 100 characters, which say less than 100 English words. Korean has
spaces.
"""

from collections.abc import Iterator
import functools
import itertools
import re

Span = tuple[int, int]

# Unicode blocks without spaces: Thai and Lao; Tibetan; Burmese; Khmer;
# kana and Bopomofo; Han, its extensions and compatibility forms; small kana.
_UNSPACED = (
  "\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff"
  "\u3005-\u3007\u3040-\u312f\u31a0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
  "\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)
# Combining signs, of these scripts and general ones: they belong to the
# character before them, so a passage must not begin with one.
_SIGNS = (
  "\u0300-\u036f\u0e31\u0e34-\u0e3a\u0e47-\u0e4e\u0eb1\u0eb4-\u0ebc"
  "\u0ec8-\u0ece\u0f18\u0f19\u0f35\u0f37\u0f39\u0f71-\u0f84\u0f86\u0f87"
  "\u0f8d-\u0fbc\u102b-\u103e\u1056-\u1059\u17b4-\u17d3\u3099\u309a"
  "\ufe00-\ufe0f\U000e0100-\U000e01ef"
)
# East Asian punctuation that belongs to the text before it.
_CLOSING = (
  "\u3001\u3002\u3009\u300b\u300d\u300f\u3011\u3015\u3017\u3019\u301b"
  "\uff01\uff09\uff0c\uff0e\uff1a\uff1b\uff1f\uff3d\uff5d\uff60\uff61\uff63\uff64"
  "\u2025\u2026"
)

# The end of a sentence: its mark with closing quotes and brackets, if white
# space or the end follows; or a mark of East Asia, which no space follows.
# Possessive, and from the first of several marks, so that 10 MB of dots take
# linear time.
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
  """Returns a pattern of one word of at most `max_chars` characters.

  Up to eight combining signs may follow; a limit, since a text may consist of
  signs only.
  """
  more = f"[{_SIGNS}{_CLOSING}]{{0,8}}"
  return re.compile(
    f"[{_UNSPACED}]{more}|[^\\s{_UNSPACED}]{{1,{max_chars}}}[{_SIGNS}]{{0,8}}"
  )


def inside_word(text: str, place: int) -> bool:
  """Returns whether `place` is inside a word: no word ends or begins there."""
  return place > 0 and _INSIDE.match(text, place - 1) is not None


def word_spans(
  text: str, start: int = 0, end: int | None = None, *, max_chars: int
) -> Iterator[Span]:
  """Yields the spans of the words in `text[start:end]`.

  A run of more than `max_chars` without white space counts as several words.
  """
  stop = len(text) if end is None else end
  for match in _words(max_chars).finditer(text, start, stop):
    yield match.span()


def line_spans(text: str, start: int, end: int) -> Iterator[Span]:
  """Yields the spans of the lines that are not blank, with their indentation.

  The first begins at `start`, even in the middle of a line.
  """
  while start < end:
    stop = text.find("\n", start, end)
    stop = end if stop < 0 else stop
    if line := text[start:stop].rstrip():
      yield start, start + len(line)
    start = stop + 1


def sentence_spans(text: str) -> Iterator[Span]:
  """Yields the spans of the sentences of `text`, without the space around them.

  It uses rules for languages that end sentences with a period or a similar
  mark, or with an empty line. Where they are wrong ("at 5 a.m. Monday"), a
  passage may end inside a sentence, but no text is lost.
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
  """Returns the span without white space at its ends; None if it is blank."""
  inner = text[start:end].lstrip()
  begin = end - len(inner)
  inner = inner.rstrip()
  return (begin, begin + len(inner)) if inner else None


_LEAST_CHARS = 100  # of base64; a SHA-512 has 88
_LEAST_HEX = 130  # a SHA-512 has 128
# A data URL: data:image/png;base64,iVBORw0...
DATA_ADDRESS = re.compile(
  r"data:[\w.+-]*/?[\w.+-]*(?:;[\w.+-]+(?:=[^;,\s]{0,80})?)*,"
  r"[^\s\"'<>()\[\]`]{64,}"
)
_HEX = re.compile(rf"(?<![0-9A-Za-z])[0-9a-fA-F]{{{_LEAST_HEX},}}")
_BYTES = re.compile(r"(?:\\x[0-9a-fA-F]{2}){40,}")
_RUN = re.compile(rf"[A-Za-z0-9+/_\-]{{{_LEAST_CHARS},}}={{0,2}}")
# Base64 in lines, as in mails and certificates.
_FULL_LINE = r"[ \t>]{0,16}[A-Za-z0-9+/]{56,80}[ \t]*\r?\n"
_LINES = re.compile(
  rf"^{_FULL_LINE}(?:{_FULL_LINE})+"
  r"(?:[ \t>]{0,16}[A-Za-z0-9+/]{1,80}={0,2}[ \t]*$)?",
  re.MULTILINE,
)
_UUENCODED = re.compile(
  r"^begin [0-7]{3,4} [^\n]*\n(?:[ -`]{1,61}\r?\n)+(?:`\r?\n)?end$",
  re.MULTILINE,
)
_PATCH = re.compile(
  r"^(?:literal|delta) \d+\n(?:[A-Za-z][!-~]{5,66}\n)+", re.MULTILINE
)
_DUMP = re.compile(
  r"(?:^[0-9a-fA-F]{4,16}:?[ \t]+(?:[0-9a-fA-F]{2,8}[ \t]+){4,}"
  r"[^\n]*(?:\n|\Z)){4,}",
  re.MULTILINE,
)
_CERTAIN = (DATA_ADDRESS, _BYTES, _UUENCODED, _PATCH, _DUMP)


def _is_mixed(run: str) -> bool:
  """Returns whether upper case, lower case and digits alternate at random."""
  run = re.sub(r"(.)\1+", r"\1", re.sub(r"[\s>=]", "", run))
  kinds = re.sub("[a-z]", "a", re.sub("[A-Z]", "A", re.sub("[0-9]", "0", run)))
  total = len(kinds)
  changes = sum(a != b for a, b in itertools.pairwise(kinds))
  return (
    kinds.count("A") > 0.1 * total
    and kinds.count("a") > 0.1 * total
    and kinds.count("0") > 0.03 * total
    and changes > 0.3 * total
  )


def data_spans(text: str) -> list[Span]:
  """Returns where encoded data is, in order, without overlaps."""
  found = [m.span() for kind in _CERTAIN for m in kind.finditer(text)]
  found += [
    match.span()
    for kind in (_RUN, _LINES)
    for match in kind.finditer(text)
    if _is_mixed(match[0])
  ]
  found += [
    match.span()
    for match in _HEX.finditer(text)
    if sum(map(str.isalpha, match[0])) > 0.1 * len(match[0])  # else a number
  ]
  spans: list[Span] = []
  for start, end in sorted(found):
    if spans and start <= spans[-1][1]:
      spans[-1] = spans[-1][0], max(end, spans[-1][1])
    else:
      spans.append((start, end))
  return spans


def text_between(text: str, spans: list[Span]) -> Iterator[str]:
  """Yields the text before, between and after the spans."""
  before = 0
  for start, end in spans:
    yield text[before:start]
    before = end
  yield text[before:]
