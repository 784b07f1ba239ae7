r"""Searches what rag-jax build-index wrote.

  rag-jax search --index=runs/index "what does the contract say?"

Several questions are several arguments; with `-` they are read from standard
input, one per line. --mode=bm25 searches words, and --mode=hybrid embeddings
and words. --filter=lang=en or "--filter=year>=1999" keeps the passages with
such metadata; give it once per condition. --stemmer, --stop_words, --k1 and --b
try other settings of BM25 than those of the build: the words are then indexed
again in memory. Give them to rag-jax build-index to keep them.

--fit_hybrid=FILE fits the weights of hybrid search to questions with known
passages or answers, finds the best mode, and stores both with the index.
--mode=best uses that mode.
"""

import itertools
import json
import textwrap

from absl import flags
from absl import logging

from rag_jax.api.search_directory import SearchDirectory
from rag_jax.commands import command
from rag_jax.corpus.passages import Passage
from rag_jax.evaluation.search_modes import fit_search_modes
from rag_jax.retrieval.filters import describe_metadata
from rag_jax.retrieval.filters import parse_conditions
from rag_jax.search.directory import MODES
from rag_jax.terminal import one_line

_INDEX = flags.DEFINE_string("index", None, "The directory to search.")
_N_DOCS = flags.DEFINE_integer(
  "n_docs", 5, "Passages per question; fewer if fewer are found."
)
_MODE = flags.DEFINE_enum("mode", "dense", list(MODES), "What is searched.")
_FILTER = flags.DEFINE_multi_string(
  "filter", [], "On the metadata: NAME=VALUE, or a range, as in 'NAME>=VALUE'"
)
_FIT_HYBRID = flags.DEFINE_string("fit_hybrid", "", command.FIT_HYBRID)
_words = command.define_word_flags()
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object per question.")
flags.mark_flag_as_required("index")

_WIDTH = 80  # columns of the output


def _metadata(passage: Passage) -> dict[str, str | list[str]]:
  """Returns the value of each name; a list if there are several."""
  values: dict[str, list[str]] = {}
  for name, value in passage.metadata:
    values.setdefault(name, []).append(value)
  return {k: v if len(v) > 1 else v[0] for k, v in values.items()}


def _wrapped(text: str) -> str:
  """Returns the lines of a passage, with long lines wrapped."""
  lines = (
    textwrap.wrap(line, _WIDTH - 10, replace_whitespace=False) or [""]
    for line in text.expandtabs(4).splitlines()
  )
  return "\n".join(itertools.chain.from_iterable(lines))


def main(argv: list[str]) -> None:
  """Runs the command."""
  if not flags.FLAGS["verbosity"].present:
    logging.set_verbosity(logging.WARNING)
  questions = list(command.questions(argv[1:]))
  if _FIT_HYBRID.value:
    modes = fit_search_modes(_INDEX.value or "", _FIT_HYBRID.value)
    print("\n".join(f"{name}: {value}" for name, value in modes.rows()))
    if not questions:
      return
  if not questions:
    raise ValueError("Give a question, or - to read them from a pipe.")
  directory = SearchDirectory(_INDEX.value or "")
  if _MODE.value != "dense":
    directory.set_words(**_words())
  filters = _FILTER.value or []
  found = directory.search(
    questions, _N_DOCS.value, mode=_MODE.value, filters=filters
  )
  if filters and not any(found):
    conditions = parse_conditions(filters)
    logging.warning("%s", describe_metadata(directory.passages, conditions))
  for number, (question, hits) in enumerate(zip(questions, found, strict=True)):
    if _JSON.value:
      rows = [
        {
          "id": hit.passage.id,
          "title": hit.passage.title,
          "text": hit.passage.text,
          "score": hit.score,
          "metadata": _metadata(hit.passage),
          "also": list(hit.also),
        }
        for hit in hits
      ]
      print(json.dumps({"question": question, "passages": rows}))
      continue
    print(f"{'' if not number else chr(10)}{question}")
    if not hits:
      print("\n          No passage was found.")
    for hit in hits:
      title = one_line(hit.passage.title)
      title = f"{title}  " if title else ""
      ids = ", ".join(map(one_line, (hit.passage.id, *hit.also)))
      print(f"\n{hit.score:8.3f}  {title}[{ids}]")
      print(textwrap.indent(_wrapped(hit.passage.text), " " * 10))


def run() -> None:
  """Runs `main`."""
  command.run(main, arguments="QUESTION ... | -")
