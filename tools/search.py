r"""Searches what tools/build_index.py made.

  python tools/search.py --index=runs/index "what does the contract say?"

Several questions are several arguments; with `-` they are read from standard
input, one a line. --mode=bm25 searches words, --mode=hybrid both;
--filter=lang=en, as often as wanted, keeps the passages with that metadata.
"""

import itertools
import json
import sys
import textwrap

from absl import app
from absl import flags
from absl import logging
import command

from rag_jax.data.search_directory import MODES
from rag_jax.data.search_directory import SearchDirectory
from rag_jax.retrieval.filters import parse_conditions

_INDEX = flags.DEFINE_string("index", None, "The directory to search.")
_N_DOCS = flags.DEFINE_integer(
  "n_docs", 5, "Passages a question; fewer if there are fewer, unless given."
)
_MODE = flags.DEFINE_enum("mode", "dense", list(MODES), "What is searched.")
_FILTER = flags.DEFINE_multi_string("filter", [], "NAME=VALUE of the metadata.")
_JSON = flags.DEFINE_bool("json", False, "Print JSON, one object a question.")
flags.mark_flag_as_required("index")

_WIDTH = 80  # of what is printed


def _wrapped(text: str) -> str:
  """Returns the lines of a passage, those that are too long in several."""
  lines = (
    textwrap.wrap(line, _WIDTH - 10, replace_whitespace=False) or [""]
    for line in text.expandtabs(4).splitlines()
  )
  return "\n".join(itertools.chain.from_iterable(lines))


def main(argv: list[str]) -> None:
  """Runs the command."""
  if not flags.FLAGS["verbosity"].present:
    logging.set_verbosity(logging.WARNING)
  questions = argv[1:]
  if questions == ["-"]:
    questions = [line.strip() for line in sys.stdin if line.strip()]
  if not questions:
    raise app.UsageError("Give a question, or - to read them from a pipe.")
  directory = SearchDirectory(_INDEX.value or "")
  n_docs = _N_DOCS.value
  if not flags.FLAGS["n_docs"].present:
    n_docs = min(n_docs, len(directory.passages))
  found = directory.search(
    questions,
    n_docs,
    mode=_MODE.value,
    conditions=parse_conditions(_FILTER.value),
  )
  for number, (question, hits) in enumerate(zip(questions, found, strict=True)):
    if _JSON.value:
      rows = [
        {
          "id": hit.passage.id,
          "title": hit.passage.title,
          "text": hit.passage.text,
          "score": hit.score,
          "metadata": dict(hit.passage.metadata),
        }
        for hit in hits
      ]
      print(json.dumps({"question": question, "passages": rows}))
      continue
    print(f"{'' if not number else chr(10)}{question}")
    for hit in hits:
      title = f"{hit.passage.title}  " if hit.passage.title else ""
      print(f"\n{hit.score:8.3f}  {title}[{hit.passage.id}]")
      print(textwrap.indent(_wrapped(hit.passage.text), " " * 10))


if __name__ == "__main__":
  command.run(main, arguments="QUESTION ... | -")
