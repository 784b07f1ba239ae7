"""How a tool ends when something is wrong: with a message, not a stack trace.

In: the `main` of a tool. Out: its exit status; 1 for what a user can mend.
"""

from collections.abc import Callable
import dataclasses
import signal
import sys

from absl import app
from absl import flags

from rag_jax.retrieval.bm25 import Bm25Settings
from rag_jax.retrieval.bm25 import check_settings
from rag_jax.retrieval.bm25 import read_stop_words

# Anything else is a bug, and shows where.
_MENDABLE = (ValueError, TypeError, ImportError, OSError, FloatingPointError)


FIT_HYBRID = (
  "Questions with known passages or answers, to weigh embeddings and words with"
  " in hybrid search; the weights, and which mode is best, are kept."
)


def define_word_flags() -> Callable[[Bm25Settings], Bm25Settings]:
  """Defines the flags of BM25; returns what puts those given into settings."""
  given = {
    "stemmer": flags.DEFINE_string(
      "stemmer", None, "BM25: the language whose word endings are cut off."
    ),
    "stop_words": flags.DEFINE_string(
      "stop_words",
      None,
      "BM25 leaves out those of a language (english), a file, or some between"
      " commas.",
    ),
    "k1": flags.DEFINE_float(
      "k1", None, "BM25: how much a word counts that is there again."
    ),
    "b": flags.DEFINE_float(
      "b", None, "BM25: how much long passages are marked down, 0 to 1."
    ),
  }

  def settings(defaults: Bm25Settings) -> Bm25Settings:
    values = {k: f.value for k, f in given.items() if f.value is not None}
    if "stop_words" in values:
      values["stop_words"] = read_stop_words(values["stop_words"])
    return check_settings(dataclasses.replace(defaults, **values))

  return settings


def run(
  main: Callable[[list[str]], None],
  *,
  check: Callable[[list[str]], None] = lambda argv: None,
  interrupted: str = "",
) -> None:
  """Runs `main` with the flags of the command line.

  With --debug, where a tool has that flag, every error shows where it came
  from.

  Args:
    main: of the tool.
    check: of the arguments, before absl reads them.
    interrupted: what Ctrl-C prints.
  """
  try:
    check(sys.argv[1:])
    app.run(main)
  except KeyboardInterrupt:
    if interrupted:
      print(interrupted, file=sys.stderr)
    sys.exit(128 + signal.SIGINT)
  except _MENDABLE as error:
    if "--debug" in sys.argv:
      raise
    print(f"{type(error).__name__}: {error}", file=sys.stderr)
    sys.exit(1)
