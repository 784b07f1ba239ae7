"""Removes from untrusted text what could control a terminal.

In: questions, passages, ids, names, messages. Out: the same text without escape
sequences, which can move the cursor, rename the window or fill the clipboard,
and without marks that change the direction of the text.
"""

import json
import logging as std_logging
import re
from typing import Any
import unicodedata

from absl import logging

# ECMA-48, 5.4 (CSI), 5.6 (strings: OSC, DCS, SOS, PM, APC), 5.3 and others.
_ESCAPES = re.compile(
  r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"
  r"|(?:\x1b[\]PX^_]|[\x90\x98\x9d-\x9f])[^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)"
  r"|\x1b[ -/]*[0-~]"
)
_LINES = re.compile("\r\n|[\x0b\x0c\x1c-\x1e\x85\u2028\u2029]")
# Words of Persian and other languages, and emoji, need these two.
_JOINERS = "\u200c\u200d"


def printable(text: str) -> str:
  """Returns `text` without what could control a terminal.

  It removes escape sequences and all characters of Unicode's category C
  (controls, direction marks and other invisible ones), except line feeds, tabs
  and the two joiners.
  """
  if text.isascii() and text.isprintable():
    return text
  text = _LINES.sub("\n", _ESCAPES.sub("", text))
  return "".join(c for c in text if _shown(c))


def one_line(text: str) -> str:
  """Returns printable `text` on one line, with single spaces."""
  return " ".join(printable(text.replace("\r", " ")).split())


def json_line(value: Any) -> str:
  r"""Returns `value` as JSON on one line that is safe for a terminal.

  Characters that `printable` would remove are written as \uXXXX.
  """
  text = json.dumps(value, ensure_ascii=False)
  if text.isascii() and text.isprintable():
    return text
  return "".join(
    c if _shown(c) and c not in "\x85\u2028\u2029" else json.dumps(c)[1:-1]
    for c in text
  )


def _shown(char: str) -> bool:
  return (
    char in "\n\t" or char in _JOINERS or unicodedata.category(char)[0] != "C"
  )


class PrintableStream:
  """A text stream like `inner` that writes only what is printable.

  It replaces `sys.stdout`, so that all output goes through it.
  """

  def __init__(self, inner: Any):  # a stream of text
    self._inner = inner

  def write(self, text: str) -> int:
    """Writes the printable part of `text`."""
    self._inner.write(printable(text))
    return len(text)

  def writelines(self, lines: Any) -> None:
    """Writes the printable part of each line."""
    for line in lines:
      self.write(line)

  def __getattr__(self, name: str) -> Any:
    return getattr(self._inner, name)


class PrintableFormatter(logging.PythonFormatter):
  """Formats log lines as absl does, and makes them printable."""

  def format(self, record: std_logging.LogRecord) -> str:
    """Returns the printable line of `record`."""
    return printable(super().format(record))


def clean_log() -> None:
  """Makes everything that is logged from now on printable."""
  logging.get_absl_handler().setFormatter(PrintableFormatter())
