"""What a terminal would obey is not shown to it, and nothing else is lost."""

import io
import json
import logging as std_logging

import pytest

from rag_jax import terminal


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    ("plain\n\ttext é 東京", "plain\n\ttext é 東京"),
    ("a\x1b[31mred\x1b[0m", "ared"),
    ("a\x1b]52;c;ZXZpbA==\x07b", "ab"),  # fills the clipboard
    ("a\x1b]0;title\x1b\\b", "ab"),
    ("a\x9d8;;http://x\x9cb", "ab"),
    ("a\x1bPq#0\x1b\\b", "ab"),  # device control
    ("a\x9b2Jb", "ab"),
    ("a\x1bcb", "ab"),  # reset
    ("a\x1b", "a"),
    ("a\x1b]52;c;never ended", "a52;c;never ended"),
    ("a\rb", "ab"),  # would be written over
    ("a\r\nb", "a\nb"),
    ("a\x08\x7f\x00b", "ab"),
    ("a\u202eb\u2066c\u200ed", "abcd"),
    ("a\U000e0041b\ufeffc", "abc"),
    ("a\ud800b", "ab"),
    ("a\u2028b\x85c", "a\nb\nc"),
    ("می\u200cخواهم", "می\u200cخواهم"),
    ("👩\u200d🚀", "👩\u200d🚀"),
  ],
)
def test_what_a_terminal_would_obey_is_left_out(text, expected):
  assert terminal.printable(text) == expected
  assert terminal.printable(expected) == expected


def test_one_line_is_one_line():
  assert terminal.one_line(" a\n\x1b[1mb\r\tc\u2028d ") == "a b c d"


@pytest.mark.parametrize(
  "text",
  ["plain", "é\n\t", "\x1b[1m\x9b\u202e\ud800\u2028\x85\x7f", "a\u200cb"],
)
def test_json_loses_nothing_and_is_shown_safely(text):
  line = terminal.json_line({"text": [text]})
  assert json.loads(line) == {"text": [text]}
  assert terminal.printable(line) == line
  assert "\n" not in line


def test_a_stream_writes_what_may_be_shown():
  inner = io.StringIO()
  stream = terminal.PrintableStream(inner)
  print("a\x1b[2J", 1, file=stream, flush=True)
  stream.writelines(["\u202eb\n"])
  assert inner.getvalue() == "a 1\nb\n"
  assert stream.getvalue() == inner.getvalue()


def test_a_log_line_is_what_may_be_shown():
  record = std_logging.LogRecord(
    "absl", std_logging.INFO, "file.py", 1, "id %s", ("a\x1b]0;x\x07b",), None
  )
  line = terminal.PrintableFormatter().format(record)
  assert line.endswith("] id ab")
