"""Normalises texts, so that two spellings of the same text are equal.

In: a text in any language, as people and files write it. Out: the same text in
one case, with one form of each character and no invisible characters. All code
that compares texts folds them first: answers, answers in passages, words for
search, and answers that are substituted.
"""

import functools
import re
import unicodedata

# Invisible characters (Default_Ignorable_Code_Point of Unicode 15.1,
# https://www.unicode.org/Public/15.1.0/ucd/DerivedCoreProperties.txt): soft
# hyphens, zero-width spaces, joiners and non-joiners, variation selectors,
# marks of the writing direction.
_NOT_DRAWN = (
  (0xAD, 0xAD), (0x34F, 0x34F), (0x61C, 0x61C), (0x115F, 0x1160),
  (0x17B4, 0x17B5), (0x180B, 0x180F), (0x200B, 0x200F), (0x202A, 0x202E),
  (0x2060, 0x206F), (0x3164, 0x3164), (0xFE00, 0xFE0F), (0xFEFF, 0xFEFF),
  (0xFFA0, 0xFFA0), (0xFFF0, 0xFFF8), (0x1BCA0, 0x1BCA3),
  (0x1D173, 0x1D17A), (0xE0000, 0xE0FFF),
)  # fmt: skip
_VISIBLE = re.compile(
  rf"[^\s{''.join(f'{chr(a)}-{chr(b)}' for a, b in _NOT_DRAWN)}]"
)
_KASHIDA = "\u0640"  # stretches an Arabic word on paper

# Marks that people type for one another. Modifier letters and single accents
# are listed since people type them as apostrophes.
_ALIKE = {
  "'": "\u2018\u2019\u201a\u201b\u2032\u2035\u2039\u203a\u02b9\u02bb\u02bc"
  "\u02bd\u02c8\u00b4\u1ffd\u02ca\u02cb\u0060\u05f3\u300e\u300f",
  '"': "\u201c\u201d\u201e\u201f\u2033\u2036\u02ba\u02ee\u00ab\u00bb\u05f4"
  "\u300a\u300b\u300c\u300d\u301d\u301e\u301f",
  "-": "\u2010\u2011\u2012\u2013\u2014\u2015\u2212\u02d7\u058a\u05be\u2e3a"
  "\u2e3b\u3030",
  "\u00b7": "\u2022\u2024\u2027\u2219\u22c5\u30fb\u0387",
  "/": "\u2044\u2215",
  ".": "\u3002\u06d4\u066b",
  ",": "\u3001\u060c",
  ";": "\u061b\u037e",
  "?": "\u061f",
  "<": "\u3008\u2329",
  ">": "\u3009\u232a",
}


def _table() -> dict[int, str | None]:
  """Returns the table of single characters for `str.translate`."""
  table: dict[int, str | None] = dict.fromkeys(
    (code for first, last in _NOT_DRAWN for code in range(first, last + 1))
  )
  table[ord(_KASHIDA)] = None
  for mark, others in _ALIKE.items():
    table |= dict.fromkeys(map(ord, others), mark)
  for code in range(0x80, 0x20000):  # digits of all scripts become 0 to 9
    if unicodedata.category(chr(code)) == "Nd":
      table[code] = str(unicodedata.decimal(chr(code)))
  return table


_TABLE = _table()

# NFKC alone would turn 1½ into 11/2, and 10² into 102.
_FRACTION = re.compile("(?<=[0-9])(?=[\u00bc-\u00be\u2150-\u215e\u2189])")
_RAISED = re.compile(
  "(?<=[0-9])(?=[\u00b2\u00b3\u00b9\u2070\u2074-\u2079\u207a\u207b])"
)
_LOWERED = re.compile("(?<=[0-9])(?=[\u2080-\u2089])")
# A dotted capital I in lower case, which Turkish and others write "i".
_DOTTED_I = "i\u0307"

# Digits in groups of three (Indian: the last of three, the others of two) with
# one kind of separator; not a single point, which may be a decimal point.
_START = "(?<![0-9])(?<![0-9][.,'])[1-9][0-9]{0,2}"
_GROUPS = re.compile(
  _START + "(?:(?:,[0-9]{3})+|(?:,[0-9]{2})+,[0-9]{3}|(?:'[0-9]{3})+"
  "|(?:\u066c[0-9]{3})+|(?:\\.[0-9]{3}){2,}(?![.,][0-9]))"
  "(?![0-9]|[,'\u066c][0-9])"
)
_SPACED_GROUPS = re.compile(
  _START + "(?:(?:\u00a0[0-9]{3})+|(?:\u2009[0-9]{3})+|(?:\u202f[0-9]{3})+)"
  "(?![0-9]|[\u00a0\u2009\u202f][0-9])"
)

_RUN = re.compile(r"\S*[^\x00-\x7f]\S*")  # a word that is not ASCII
_MAX_CACHED = 32  # characters; longer words hardly ever occur twice


def is_blank(text: str) -> bool:
  """Returns whether `text` has no visible character."""
  return _VISIBLE.search(text) is None


def fold(text: str, *, join_digits: bool = False) -> str:
  """Returns `text` in the form in which texts are compared.

  This is Unicode's NFKC_Casefold (https://www.unicode.org/reports/tr44/,
  section 5.7.3): compatibility forms such as full-width letters and ligatures
  become ordinary letters, "STRASSE" equals "straße", accents are composed, and
  invisible characters are removed, such as soft hyphens and the zero-width
  non-joiners of Persian. In addition,

  - quotation marks, apostrophes and primes, dashes and the minus sign, middle
    dots, and the stops and commas of other scripts each get one form, the one
    in ASCII if there is one;
  - digits of all scripts become 0 to 9; a fraction character is separated from
    the number before it, and superscript or subscript digits after a digit are
    written with ^ or _: "10²" becomes "10^2", not "102";
  - the dotted capital I of Turkish becomes i, and Arabic's kashida is removed.

  Accents stay. Folding again changes nothing.

  Args:
    text: in any language.
    join_digits: join digits in groups to one number: "1,000", "1'000",
      "1.000.000", "12,34,567", and groups with no-break or thin spaces. A
      single point stays, since it may be a decimal point, and so does an
      incomplete grouping such as "1,2345".
  """
  if join_digits and not text.isascii():
    text = _SPACED_GROUPS.sub(_only_digits, text)
  text = text.lower().replace("`", "'")
  if not text.isascii():
    text = _RUN.sub(_fold_match, text)
  return _GROUPS.sub(_only_digits, text) if join_digits else text


def _only_digits(match: re.Match[str]) -> str:
  return "".join(c for c in match.group() if c in "0123456789")


def _fold_match(match: re.Match[str]) -> str:
  run = match.group()
  return _cached(run) if len(run) <= _MAX_CACHED else _fold_run(run)


def _fold_run(text: str) -> str:
  text = text.translate(_TABLE)
  text = _FRACTION.sub(" ", text)
  text = _RAISED.sub("^", text)
  text = _LOWERED.sub("_", text)
  text = unicodedata.normalize("NFD", text).casefold()
  text = unicodedata.normalize("NFKC", text).casefold()
  text = unicodedata.normalize("NFKC", text).translate(_TABLE)
  # An invisible character may have been between a letter and its accent.
  text = unicodedata.normalize("NFC", text.replace(_DOTTED_I, "i"))
  return text.replace(_DOTTED_I, "i")


_cached = functools.lru_cache(maxsize=1 << 16)(_fold_run)
