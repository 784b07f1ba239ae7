"""Where a text holds data instead of language: base64 and the like.

In: a text. Out: the text without pictures, certificates and dumps that
somebody pasted into it, of which nobody reads a word. Hashes and addresses
stay: they are searched for.
"""

from collections.abc import Iterator
import itertools
import re

from rag_jax.corpus.text_spans import Span

_LEAST_CHARS = 100  # of a run of base64; a SHA-512 has 88
_LEAST_HEX = 130  # a SHA-512 has 128
# A picture in an address: data:image/png;base64,iVBORw0...
DATA_ADDRESS = re.compile(
  r"data:[\w.+-]*/?[\w.+-]*(?:;[\w.+-]+(?:=[^;,\s]{0,80})?)*,"
  r"[^\s\"'<>()\[\]`]{64,}"
)
_HEX = re.compile(rf"(?<![0-9A-Za-z])[0-9a-fA-F]{{{_LEAST_HEX},}}")
_BYTES = re.compile(r"(?:\\x[0-9a-fA-F]{2}){40,}")
_RUN = re.compile(rf"[A-Za-z0-9+/_\-]{{{_LEAST_CHARS},}}={{0,2}}")
# Wrapped as in mails and certificates.
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
  """Returns whether capitals, small letters and digits come as if by chance."""
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


def left_over(text: str, spans: list[Span]) -> Iterator[str]:
  """Yields what stands between spans."""
  before = 0
  for start, end in spans:
    yield text[before:start]
    before = end
  yield text[before:]
