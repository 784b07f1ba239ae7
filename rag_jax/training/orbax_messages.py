"""Hides what orbax and its threads print beside the error that is raised.

In: nothing. Out: filters of log records, warnings and errors that nobody can
catch. A full disk is then one message, that of `checkpoint.Checkpointer`.
"""

from collections.abc import Callable
import logging
import os
import sys
from typing import Any
import warnings

from rag_jax import disk


def quieten() -> None:
  """Installs the filters; calling it again changes nothing."""
  logging.getLogger("absl").addFilter(_orbax_warnings_only)
  logging.getLogger("asyncio").addFilter(_no_full_disk)
  # Arrays that were not begun when the disk was full.
  warnings.filterwarnings(
    "ignore", "coroutine 'async_serialize_from_host.* was never awaited"
  )
  if not isinstance(sys.unraisablehook, _ExceptClosedLoop):
    sys.unraisablehook = _ExceptClosedLoop(sys.unraisablehook)


def _orbax_warnings_only(record: logging.LogRecord) -> bool:
  """Returns whether to log `record`; of orbax's records, only warnings.

  Orbax logs 60 info lines per save, and also raises the errors it logs.
  """
  from_orbax = f"{os.sep}orbax{os.sep}" in record.pathname
  return record.levelno == logging.WARNING or not from_orbax


def _no_full_disk(record: logging.LogRecord) -> bool:
  """Returns whether to log `record`: not that orbax found the disk full.

  Orbax writes each array in a task of asyncio and raises the first error, which
  becomes an `UnwritableError`. The tasks that failed as well are reported by
  asyncio, each with a stack trace, when they are deleted.
  """
  error = record.exc_info[1] if record.exc_info else None
  return not ("never retrieved" in record.getMessage() and disk.is_full(error))


class _ExceptClosedLoop:
  """Shows errors that nobody can catch, but not those of a save that failed.

  The first array that cannot be written ends the event loop of the save. The
  threads of TensorStore that are still writing then find it closed.
  """

  def __init__(self, show: Callable[[Any], object]):
    self._show = show

  def __call__(self, unraisable: Any) -> None:
    closed = isinstance(unraisable.exc_value, RuntimeError) and (
      str(unraisable.exc_value) == "Event loop is closed"
    )
    # Code in Python would be named by `object`.
    if not closed or unraisable.object is not None:
      self._show(unraisable)
