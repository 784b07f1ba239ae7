r"""Searches what rag-jax build-index wrote.

  rag-jax search --index=runs/index "what does the contract say?"

Several questions are several arguments; with `-` they are read from standard
input, one per line. --mode=bm25 searches words, and --mode=hybrid embeddings
and words. --filter=lang=en or "--filter=year>=1999" keeps the passages with
such metadata; give it once per condition. --stemmer, --stop_words, --k1 and --b
try other settings of BM25 than those of the build: the words are then indexed
again in memory. Give them to rag-jax build-index to keep them.

With --rerank=DIR, a cross-encoder reads each question together with each of the
--candidates that the mode finds, and orders them by its logits. This is far
slower than the first stage. Compiled programs are kept in ~/.cache/rag_jax.

--fit_hybrid=FILE fits the weights of hybrid search to questions with known
passages or answers, finds the best mode, and stores both with the index.
--mode=best uses that mode.

With --distributed on every host of a pod, each searches for a share of the
questions; the first host reads standard input, and prints all answers.
"""

from collections.abc import Sequence
import itertools
import json
import textwrap

from absl import flags
from absl import logging

from rag_jax.api.search_directory import SearchDirectory
from rag_jax.commands import command
from rag_jax.commands.model_flags import define_rerank_flags
from rag_jax.commands.model_flags import rerank_settings
from rag_jax.config import RerankConfig
from rag_jax.corpus.passages import Passage
from rag_jax.evaluation.search_modes import fit_search_modes
from rag_jax.processes import first_alone
from rag_jax.processes import is_first
from rag_jax.processes import share
from rag_jax.processes import told_by_first
from rag_jax.retrieval.filters import describe_metadata
from rag_jax.retrieval.filters import parse_conditions
from rag_jax.search.directory import MODES
from rag_jax.search.directory import Hit
from rag_jax.search.reranker import open_reranker
from rag_jax.search.reranker import rerank_config
from rag_jax.terminal import one_line
from rag_jax.training.workdir import keep_compiled

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
define_rerank_flags()
command.define_pod_flags()
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


def _text(question: str, hits: Sequence[Hit]) -> str:
  """Returns what is printed for a question."""
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
    return json.dumps({"question": question, "passages": rows})
  lines = [question]
  if not hits:
    lines.append("\n          No passage was found.")
  for hit in hits:
    title = one_line(hit.passage.title)
    title = f"{title}  " if title else ""
    ids = ", ".join(map(one_line, (hit.passage.id, *hit.also)))
    lines.append(f"\n{hit.score:8.3f}  {title}[{ids}]")
    lines.append(textwrap.indent(_wrapped(hit.passage.text), " " * 10))
  return "\n".join(lines)


def _fit_hybrid() -> None:
  modes = fit_search_modes(_INDEX.value or "", _FIT_HYBRID.value or "")
  print("\n".join(f"{name}: {value}" for name, value in modes.rows()))


def main(argv: list[str]) -> None:
  """Runs the command."""
  if not flags.FLAGS["verbosity"].present:
    logging.set_verbosity(logging.WARNING)
  questions = told_by_first(lambda: list(command.questions(argv[1:])))
  if _FIT_HYBRID.value:
    # One host writes to the directory before the others read it.
    first_alone("fit", lambda: _fit_hybrid() if is_first() else None)
    if not questions:
      return
  if not questions:
    raise ValueError("Give a question, or - to read them from a pipe.")
  reranker = open_reranker(rerank_config(rerank_settings(), RerankConfig()))
  if reranker is not None:
    reranker.candidates_for(_N_DOCS.value or 0)
    keep_compiled("")
  directory = SearchDirectory(_INDEX.value or "")
  if _MODE.value != "dense":
    directory.set_words(**_words())
  filters = _FILTER.value or []

  def search(some: Sequence[str]) -> list[str]:
    found = directory.search(
      list(some),
      _N_DOCS.value,
      mode=_MODE.value,
      filters=filters,
      reranker=reranker,
    )
    if filters and not any(found):
      conditions = parse_conditions(filters)
      logging.warning("%s", describe_metadata(directory.passages, conditions))
    return [_text(*pair) for pair in zip(some, found, strict=True)]

  texts = share(questions, search)
  if is_first():
    print(("\n" if _JSON.value else "\n\n").join(texts))


def run() -> None:
  """Runs `main`."""
  command.run(main, arguments="QUESTION ... | -")
