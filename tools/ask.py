r"""Asks a trained model, and shows what it read.

  python tools/ask.py --workdir=runs/quickstart "What is the capital of France?"

Several questions are several arguments. With `-`, questions are read from
standard input, one a line; with no question, at a prompt. --json prints one
JSON object an answer. --corpus=edited.jsonl answers from other passages without
training again. Writes nothing but the programs that it
compiled, into .jax_cache of the workdir.
"""

from collections.abc import Iterator
import sys
import time

from absl import flags
from absl import logging
import command
from etils import epath

from rag_jax.serving.explanation import explain
from rag_jax.serving.explanation import to_json
from rag_jax.serving.pipeline import RagPipeline
from rag_jax.training.workdir import Workdir
from rag_jax.training.workdir import keep_compiled

_WORKDIR = flags.DEFINE_string("workdir", None, "Of a finished training run.")
_CORPUS = flags.DEFINE_string("corpus", "", "Other passages to answer from.")
_N_DOCS = flags.DEFINE_integer(
  "n_docs", 0, "Passages to read for a question; 0: as many as in training."
)
_CACHE_DIR = flags.DEFINE_string(
  "cache_dir", "", "Where compiled programs are kept; '': in the workdir."
)
_JSON = flags.DEFINE_bool("json", False, "Print JSON, one object a line.")
flags.mark_flag_as_required("workdir")


def _prompt() -> Iterator[str]:
  """Yields what a person types, until an empty line or the end."""
  print("Ask a question; an empty line ends.", file=sys.stderr)
  while True:
    print("> ", end="", file=sys.stderr, flush=True)  # not among the answers
    try:
      question = input()
    except (EOFError, KeyboardInterrupt):
      return
    if not question.strip():
      return
    yield question


def _questions(arguments: list[str]) -> Iterator[str]:
  if arguments == ["-"]:
    yield from (line.strip() for line in sys.stdin if line.strip())
  elif arguments:
    yield from arguments
  else:
    yield from _prompt()


def main(argv: list[str]) -> None:
  """Runs the command."""
  if not flags.FLAGS["verbosity"].present:
    # Answers alone; --verbosity=0 also says how long each took.
    logging.set_verbosity(logging.WARNING)
  workdir = Workdir(epath.Path(_WORKDIR.value or "").expanduser())
  keep_compiled(_CACHE_DIR.value or workdir.compiled)
  pipeline = RagPipeline.load(_WORKDIR.value or "", corpus=_CORPUS.value)
  for number, question in enumerate(_questions(argv[1:])):
    start = time.perf_counter()
    answer = pipeline.answer(question, n_docs=_N_DOCS.value)[0]
    logging.info("Answered in %.3f s.", time.perf_counter() - start)
    if _JSON.value:
      print(to_json(answer), flush=True)
      continue
    print(f"{'' if not number else chr(10)}{question}")
    print(explain(answer), end="", flush=True)


if __name__ == "__main__":
  command.run(main, arguments="[QUESTION ... | -]")
