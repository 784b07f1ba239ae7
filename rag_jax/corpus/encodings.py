"""Character encodings of pages and files.

In: bytes, and the encoding that a page names (its label). Out: the text, and
whether the label was wrong; or the likely encoding, for advice in messages.
Labels mean what the WHATWG's standard says, https://encoding.spec.whatwg.org.
The only file that imports webencodings and chardet.
"""

import codecs
from collections.abc import Mapping
import dataclasses
import re
import unicodedata

import chardet
import webencodings

_BOMS = (
  (codecs.BOM_UTF8, "utf-8"),
  (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16's, which it begins with
  (codecs.BOM_UTF16_LE, "utf-16"),
  (codecs.BOM_UTF16_BE, "utf-16"),
)
# chardet's names that are not labels of the standard.
_CHARDET = {
  "cp932": "shift_jis", "cp949": "euc-kr", "cp874": "windows-874",
  "maccyrillic": "x-mac-cyrillic", "macroman": "macintosh",
}  # fmt: skip
_ICONV = {
  "euc-kr": "CP949", "shift_jis": "CP932", "gbk": "GB18030",
  "x-mac-cyrillic": "MAC-CYRILLIC", "utf-16le": "UTF-16LE",
  "utf-16be": "UTF-16BE",
}  # fmt: skip
_LEAST_LETTERS = 5  # letters outside ASCII that tell encodings apart
_MANY_LETTERS = 12
_FEW_LETTERS = 3
_LEAST_SCORE = 0.1  # chardet's confidence for a guess
_SURE_SCORE = 0.2  # the same for a page that names no encoding
_SAMPLE_BYTES = 1 << 14
_ONE_BYTE = ("windows-", "iso-8859-", "koi8-", "mac", "x-mac-", "ibm866")
_LETTERS_PER_FLAW = 100  # or fewer, where an encoding is doubted for flaws
_ALMOST = 0.8  # as good a score
_BEYOND_ASCII = re.compile(r"(?s)(?=(.)([^\x00-\x7f])(.))")
# Punctuation that may stand between letters: points, quotes, dashes.
_IN_WORDS = (
  "\u00b7\u2022\u2026\u2019\u2018\u00b4\u201c\u201d\u201e"
  "\u2010\u2011\u2013\u2014"
)
_MARKUP = re.compile(rb"(?is)<script.*?</script>|<style.*?</style>|<[^>]*>")


@dataclasses.dataclass(frozen=True, slots=True)
class Decoded:
  """The text of a page.

  Attributes:
    text: without a byte order mark.
    encoding: the encoding that it was read in.
    label: what the page names, if that is wrong; "none" if it names nothing and
      the encoding was guessed; else "".
  """

  text: str
  encoding: str
  label: str = ""


def bom_encoding(raw: bytes) -> str:
  """Returns the encoding that a byte order mark stands for, or ""."""
  return next((name for bom, name in _BOMS if raw.startswith(bom)), "")


def decode_page(raw: bytes, label: str) -> Decoded | None:
  """Returns the text of an HTML page; None if its encoding is unclear.

  A byte order mark decides first; then UTF-8, if the bytes are valid UTF-8;
  then the label. If the bytes are not valid in the encoding of the label, or
  their letters fit another encoding far better, that one is used.

  Args:
    raw: the page.
    label: the encoding that it names, or "".
  """
  if name := bom_encoding(raw) or _wide(raw):
    text = _decode(raw, name)
    return None if text is None else Decoded(text.removeprefix("\ufeff"), name)
  if 100 * raw.count(0) > len(raw):
    return None  # no encoding of pages has so many zeros, but UTF-16
  named = webencodings.lookup(label)
  name = named.name if named else ""
  if name.startswith("utf-16"):  # the label could not have been read
    name = "utf-8"
  elif name == "x-user-defined":
    name = "windows-1252"
  jis = name == "iso-2022-jp" and b"\x1b" in raw
  if jis or re.search(rb"\x1b\$[@B]", raw):  # all bytes are those of ASCII
    text = _decode(raw, "iso-2022-jp")
    if text is not None:
      return Decoded(text, "iso-2022-jp", "" if jis else label or "none")
  if not jis and (text := _decode(raw, "utf-8")) is not None:
    wrong = bool(name) and name != "utf-8" and not raw.isascii()
    return Decoded(text, "utf-8", label if wrong else "")
  text = _decode(raw, name) if name and name != "utf-8" else None
  guess = _better(raw, name if text is not None else "")
  if guess:
    other = _decode(raw, guess)
    if other is not None and other != text:
      return Decoded(other, guess, label or "none")
  if text is None and not label and (name := _latin(raw)):
    return Decoded(_decode(raw, name) or "", name, "none")
  return None if text is None else Decoded(text, name)


def _latin(raw: bytes) -> str:
  """Returns the encoding of a page that names none, if its script is Latin.

  This is windows-1252, as in browsers, unless the letters fit another encoding
  of Latin letters far better. Returns "" if the script is another one, so that
  a guess could be nonsense, or if parts of the page are UTF-8.
  """
  if re.search(rb"[\xc2-\xdf][\x80-\xbf]", raw):
    return ""
  scores = _scores(raw)
  latin = {
    name: scores.get(name, 0.0)
    for name in ("windows-1252", *scores)
    if name.startswith(("windows-", "iso-8859-"))
    and _is_latin(_decode(_MARKUP.sub(b" ", raw), name) or "")
  }
  best = max(latin, key=latin.__getitem__, default="")
  usual = latin.get("windows-1252", _LEAST_SCORE / 2)
  if best and latin[best] > 1.3 * usual:
    return best
  return "windows-1252" if "windows-1252" in latin else ""


def _is_latin(text: str) -> bool:
  """Returns whether a text is Latin letters and common punctuation."""
  words = [word for word in re.findall(r"\w+", text) if not word.isascii()]
  mixed = sum(re.search("[A-Za-z]", word) is not None for word in words)
  return 2 * mixed >= len(words) and all(
    c.isascii()
    or (c.isalpha() and "LATIN" in unicodedata.name(c, ""))
    or unicodedata.category(c)[0] in "PZ"
    or c in "©®™°£€²³"
    for c in text
  )


def _better(raw: bytes, name: str) -> str:
  """Returns an encoding that fits bytes far better than `name`, or "".

  Args:
    raw: a page.
    name: the encoding that it names, if the bytes are valid in it; else "".
  """
  scores = _scores(raw)
  guess = max(scores, key=scores.__getitem__, default="")
  if name.startswith(_ONE_BYTE) and (other := _less_flawed(raw, name, scores)):
    return other
  text = _decode(raw, name) if name else None
  controls = text is not None and re.search("[\x80-\x9f]", text) is not None
  if not guess or scores[guess] < (0.02 if controls else _LEAST_SCORE):
    return ""
  letters = _num_letters(raw, guess)
  if not name:
    sure = scores[guess] >= _SURE_SCORE or letters >= _MANY_LETTERS
    return guess if sure and letters >= _LEAST_LETTERS else ""
  score = scores.get(name, 0.0)
  times = 1.6 if letters >= _MANY_LETTERS else 3.0
  if controls:  # nobody writes these characters, so the label is wrong
    times = 1.01
  enough = letters >= (_FEW_LETTERS if controls else _LEAST_LETTERS)
  return guess if enough and scores[guess] >= times * score else ""


def _less_flawed(raw: bytes, name: str, scores: Mapping[str, float]) -> str:
  """Returns an encoding in which words are whole where those of `name` are not.

  Args:
    raw: a page.
    name: the encoding of one byte per character that it names.
    scores: of `raw`.
  """
  sample = _sample(raw)
  flaws, letters = _flaws(_decode(sample, name) or "")
  if not flaws or _LETTERS_PER_FLAW * flaws < letters:
    return ""
  whole = {
    other: score
    for other, score in scores.items()
    if other.startswith(_ONE_BYTE)
    and score >= _ALMOST * scores.get(name, 0.0)
    and not _flaws(_decode(sample, other) or "")[0]
  }
  return max(whole, key=whole.__getitem__, default="")


def _flaws(text: str) -> tuple[int, int]:
  """Counts what words have in no language, and the letters outside ASCII.

  That is: a symbol between letters, a currency right after one, an upper case
  letter between lower case ones, two scripts in a word, a control character.
  """
  flaws = letters = 0
  quote = ""  # the last of « and », until it is closed
  for match in _BEYOND_ASCII.finditer(f" {text} "):
    before, c, after = match[1], match[2], match[3]
    kind = unicodedata.category(c)
    if kind == "Cc":
      flaws += 1
    elif c.isalpha():
      letters += 1
      inside = before.islower() and after.islower() and c.isupper()
      other = "LATIN" not in unicodedata.name(c, "") and c not in "µªº"
      mixed = other and re.search("[A-Za-z]", before + after) is not None
      flaws += inside or mixed
    elif c in "«»":
      closes = quote not in ("", c)
      flaws += before.isalpha() and after.isalpha() and not closes
      quote = "" if closes else c
    elif kind[0] in "PS" and before.isalpha() and c not in _IN_WORDS:
      money = kind in ("Sc", "Sm") and not before.isascii()
      flaws += money or after.isalpha()
  return flaws, letters


def _wide(raw: bytes) -> str:
  """Returns the kind of UTF-16 that bytes without a BOM look like, or "".

  In UTF-16, markup and spaces have a zero as their first or second byte, and
  letters of other scripts have none.
  """
  sample = raw[: _SAMPLE_BYTES // 2 * 2]
  half = len(sample) / 2
  zeros = sample[::2].count(0), sample[1::2].count(0)
  few, many = sorted(zeros)
  if many <= 0.05 * half or few > 0.1 * many:
    return ""
  name = "utf-16be" if zeros[0] > zeros[1] else "utf-16le"
  text = sample.decode(name, "replace")
  others = sample.replace(b"\0", b"")
  printable = len(re.findall(rb"[\t\n\r -~]", others))
  is_ascii = many < 0.6 * half and printable > 0.9 * len(others)
  if is_ascii and not re.search("<[A-Za-z!/?]", text):
    return ""  # words in ASCII with zeros between
  strange = sum(
    unicodedata.category(c) in ("Cc", "Cn", "Co") and not c.isspace()
    for c in text
  )
  return name if strange <= 0.05 * len(text) else ""


def _decode(raw: bytes, name: str) -> str | None:
  """Returns the text of bytes in a WHATWG encoding; None if invalid in it."""
  name = "gb18030" if name == "gbk" else name  # as the standard says
  known = webencodings.lookup(name)
  # Python's UTF-16 and UTF-32 read the byte order mark.
  own = ("gb18030", "utf-16", "utf-32")
  codec = known.codec_info.name if known and name not in own else name
  # In the standard, undefined bytes of these are control characters.
  errors = "rag_jax.control" if name.startswith("windows-") else "strict"
  try:
    return raw.decode(codec, errors)
  except (LookupError, UnicodeError):
    return None


def _as_control(error: UnicodeError) -> tuple[str, int]:
  if not isinstance(error, UnicodeDecodeError):
    raise error
  return error.object[error.start : error.end].decode("latin-1"), error.end


codecs.register_error("rag_jax.control", _as_control)


def _num_letters(raw: bytes, name: str) -> int:
  """Returns the number of letters outside ASCII of bytes in an encoding."""
  text = _decode(raw, name) or ""
  return sum(not c.isascii() and c.isalpha() for c in text)


def _sample(raw: bytes) -> bytes:
  """Returns the text of a page from its first word outside ASCII on."""
  text = _MARKUP.sub(b" ", raw)
  first = re.search(rb"[\x80-\xff]", text)
  start = max(text.rfind(b" ", 0, first.start()), 0) if first else 0
  return text[start : start + _SAMPLE_BYTES]


def _scores(raw: bytes) -> dict[str, float]:
  """Returns by encoding of the standard how well bytes fit it, from 0 to 1."""
  sample = _sample(raw)
  if sample.isascii():
    return {}
  scores: dict[str, float] = {}
  for found in chardet.detect_all(sample, ignore_threshold=True):
    name = (found["encoding"] or "").lower()
    known = webencodings.lookup(_CHARDET.get(name, name))
    if known and known.name != "utf-8" and _decode(raw, known.name) is not None:
      name = "gb18030" if known.name == "gbk" else known.name
      scores[name] = max(scores.get(name, 0.0), found["confidence"])
  if "gb18030" in scores:
    scores["gbk"] = scores["gb18030"]
  return scores


def likely_encoding(raw: bytes) -> str:
  """Returns iconv's name of the encoding that bytes seem to be in, or ""."""
  name = bom_encoding(raw) or _wide(raw) or _better(raw, "")
  return _ICONV.get(name, name).upper()
