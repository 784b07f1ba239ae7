"""Opens and closes the writer of TensorBoard files, on a full disk too.

In: a directory. Out: a `SummaryWriter` of tensorboardX. Where nothing can be
written, its `close` fails and is tried again at exit, and its thread shows a
stack trace. Here the error is raised once. A file in a bucket is not uploaded
once more when it is forgotten.
"""

import contextlib
import os
import threading
from typing import Any

from etils import epath

_FLUSH_SECS = 30


def open_writer(directory: epath.PathLike, purge_step: int | None) -> Any:
  """Returns a `SummaryWriter`; close it with `close_writer`.

  Args:
    directory: where its file is made.
    purge_step: TensorBoard forgets steps from here on; None: nothing.

  Raises:
    ImportError: the client of a bucket is not installed.
  """
  # Imported here, since processes that write nothing do not need it.
  from tensorboardX import SummaryWriter

  if not isinstance(threading.excepthook, _ExceptFullDisk):
    threading.excepthook = _ExceptFullDisk(threading.excepthook)
  return SummaryWriter(
    logdir=os.fspath(directory),
    purge_step=purge_step,
    max_queue=0,  # unbounded: training never waits for a full disk
    flush_secs=_FLUSH_SECS,
    # Names have a time in seconds; a quick restart must not overwrite.
    filename_suffix=f".{os.getpid()}",
  )


def close_writer(writer: Any) -> None:
  """Closes a `SummaryWriter`.

  Raises:
    OSError: what it had could not be written. It is closed nevertheless.
  """
  events = writer.file_writer.event_writer
  try:
    writer.close()
  except OSError:
    events._closed = True  # otherwise it is closed again at exit
    events._worker.stop()
    events._event_queue.cancel_join_thread()  # nobody reads it any more
    with contextlib.suppress(OSError):
      events._ev_writer._py_recordio_writer._writer.close()
    raise
  finally:
    file = events._ev_writer._py_recordio_writer._writer
    if hasattr(file, "blob"):  # in a bucket: its finaliser would upload again
      file.flush = lambda: None


class _ExceptFullDisk:
  """Shows the errors of threads, except those of tensorboardX with files.

  Who closes the writer gets the same error.
  """

  def __init__(self, show: Any):
    self._show = show

  def __call__(self, args: Any) -> None:
    of_writer = type(args.thread).__module__.startswith("tensorboardX.")
    if not (of_writer and isinstance(args.exc_value, OSError)):
      self._show(args)
