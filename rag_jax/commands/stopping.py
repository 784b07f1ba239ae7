"""Ends a command after Ctrl-C: one line, exit status 130, no stack trace.

In: Ctrl-C, once or more often, at any moment. Out: the end of the process.
"""

import atexit
from collections.abc import Iterator
import contextlib
import os
import signal
import threading
import types

_EXIT_CODE = 128 + signal.SIGINT  # as shells show it


def _end(signum: int, frame: types.FrameType | None) -> None:
  os._exit(_EXIT_CODE)


@contextlib.contextmanager
def ending_quietly(message: str) -> Iterator[None]:
  """Ends the process after Ctrl-C inside the `with`.

  The first Ctrl-C raises KeyboardInterrupt in the `with`, so that what is open
  is closed. A second one ends the process at once: closing may take long, and
  another KeyboardInterrupt would be shown as an error of what it interrupts.
  For the same reason Ctrl-C ends the process at once after the `with`.

  A handler that is set already, or that the process ignores Ctrl-C, stays.

  Args:
    message: what to print on stderr.

  Raises:
    SystemExit: KeyboardInterrupt was raised in the `with`.
  """
  free = signal.getsignal(signal.SIGINT) in (signal.default_int_handler, _end)
  free = free and threading.current_thread() is threading.main_thread()

  def handle_with(handler: object) -> None:
    if free:
      signal.signal(signal.SIGINT, handler)  # pyright: ignore[reportArgumentType]

  def say() -> None:
    with contextlib.suppress(OSError):  # stderr is closed
      # Not print: a handler may interrupt one.
      os.write(2, f"{message}\n".encode())

  ending = False

  def say_and_end(signum: int, frame: types.FrameType | None) -> None:
    nonlocal ending
    if ending:  # Ctrl-C again, while the line is written: once is enough
      return
    ending = True
    say()
    _end(signum, frame)

  def interrupt(signum: int, frame: types.FrameType | None) -> None:
    handle_with(say_and_end)
    raise KeyboardInterrupt

  if free:
    # Registered first, so called last: after it, Python restores the default
    # handler, which ends the process by the signal.
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
  handle_with(interrupt)
  try:
    yield
  except KeyboardInterrupt:
    # Not SIG_IGN: of a Ctrl-C that came just before, Python would say that it
    # ignores it.
    handle_with(lambda signum, frame: None)
    say()
    raise SystemExit(_EXIT_CODE) from None
  finally:
    handle_with(_end)
