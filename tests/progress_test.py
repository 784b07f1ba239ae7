"""Long work is shown as a bar on a terminal and as lines in a log."""

import io
import sys

from rag_jax import progress
from rag_jax.progress import Progress


def test_the_first_update_and_the_end_are_logged(caplog):
  with caplog.at_level("INFO"), Progress("Read", 8, "files", 2) as work:
    assert caplog.messages == []
    for _ in range(3):
      work.update(2)
  first, last = caplog.messages
  assert first.startswith("Read 4 of 8 files (50%), ")
  assert "files/s, " in first
  assert first.endswith(" left.")
  assert last.startswith("Read 8 of 8 files (100%), ")


def test_between_them_a_line_comes_now_and_then(caplog, monkeypatch):
  monkeypatch.setattr(progress, "LOG_SECS", 0.0)
  with caplog.at_level("INFO"), Progress("Read", 3, "files") as work:
    for _ in range(3):
      work.update()
  assert [line.split()[1] for line in caplog.messages][:3] == ["1", "2", "3"]


def test_nothing_to_do_is_not_shown(caplog):
  with caplog.at_level("INFO"), Progress("Read", 5, "files", 5):
    pass
  assert caplog.messages == []


def test_a_terminal_gets_a_bar_and_the_log_no_line(caplog, monkeypatch):
  terminal = io.StringIO()
  terminal.isatty = lambda: True
  monkeypatch.setattr(sys, "stderr", terminal)
  with caplog.at_level("INFO"), Progress("Read", 2, "files") as work:
    work.update()
    work.update()
  assert "Read:  50%|" in terminal.getvalue()
  assert "2/2" in terminal.getvalue()
  assert caplog.messages == []
