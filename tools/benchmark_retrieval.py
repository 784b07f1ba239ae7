r"""Measures searches of passages side by side: what they find, how fast.

  python tools/benchmark_retrieval.py --index=runs/index \
      --questions=beir/nfcorpus --output=runs/retrieval

--index is what tools/build_index.py made. --questions is a BEIR folder, SQuAD's
or DPR's .json, or .jsonl with "question", "answers" and perhaps "gold". Or, for
indexes of embeddings alone:

  python tools/benchmark_retrieval.py --embeddings=passages.npy \
      --question_embeddings=questions.npy --output=runs/retrieval

Several --embeddings, of corpora of different sizes, measure what an index costs
as the corpus grows: building, memory and latency, into growth.json, growth.md
and growth.png.

Prints the tables; --output gets results.json, recall_speed.png and report.html,
which holds all. FAISS is measured too where it is installed (pip install
faiss-cpu). Tuned systems are tuned with half of the questions and measured with
the others.

With --rerank=DIR a cross-encoder is measured as a second stage, after exact
search and after hybrid search. It reads --candidates passages per question, so
that a CPU takes minutes for some hundreds of questions.

With --distributed on every host of a pod, the device index is spread over all
chips, which search together; each host embeds a share of the questions, and
finds by exact search what a share of them should find. The other systems are
indexes of one host: the first host measures them alone, and the sizes of a
growing corpus. It prints and writes everything.
"""

from collections.abc import Callable

from absl import flags
from absl import logging

from rag_jax.benchmarks.growth import GrowthSettings
from rag_jax.benchmarks.growth import benchmark_growth
from rag_jax.benchmarks.growth_report import growth_table
from rag_jax.benchmarks.growth_report import write_growth
from rag_jax.benchmarks.report import Benchmark
from rag_jax.benchmarks.report import write_benchmark
from rag_jax.benchmarks.run import BenchmarkSettings
from rag_jax.benchmarks.run import benchmark_directory
from rag_jax.benchmarks.run import benchmark_embeddings
from rag_jax.benchmarks.systems import RERANKED
from rag_jax.benchmarks.systems import SYSTEMS
from rag_jax.commands import command
from rag_jax.commands.model_flags import define_rerank_flags
from rag_jax.commands.model_flags import rerank_settings
from rag_jax.config import RerankConfig
from rag_jax.evaluation.answers import VARIANTS
from rag_jax.processes import first_alone
from rag_jax.processes import is_first
from rag_jax.search.reranker import rerank_config

command.define_pod_flags()
define_rerank_flags()
_DEFAULT = BenchmarkSettings(systems=SYSTEMS)

_INDEX = flags.DEFINE_string("index", "", "Directory of tools/build_index.py.")
_QUESTIONS = flags.DEFINE_string("questions", "", "File, or BEIR folder.")
_EMBEDDINGS = flags.DEFINE_multi_string(
  "embeddings", [], ".npy, of passages; several: as the corpus grows."
)
_QUESTION_EMBEDDINGS = flags.DEFINE_string(
  "question_embeddings", "", ".npy, of questions."
)
_SYSTEMS = flags.DEFINE_list(
  "systems", list(SYSTEMS), f"What is measured, of {', '.join(SYSTEMS)};"
  f" --rerank adds {' and '.join(RERANKED)}.",
)  # fmt: skip
_OUTPUT = flags.DEFINE_string("output", "", "Directory to write.")
_MAX = flags.DEFINE_integer(
  "max_questions", _DEFAULT.max_questions, "Measured; as many tune."
)
_TARGET = flags.DEFINE_float(
  "target_recall", _DEFAULT.target_recall, "index_recall@10 to tune for."
)
_TUNE_SECS = flags.DEFINE_float(
  "tune_secs", _DEFAULT.tune_secs, "That ScaNN's tuner may take."
)
_DROP_OWN_ID = flags.DEFINE_bool(
  "drop_own_id", False, "Leave out the passage whose id is the question's, for"
  " questions that are documents themselves (ArguAna, Quora).",
)  # fmt: skip
_ANSWERS = flags.DEFINE_enum(
  "answers", _DEFAULT.answers, list(VARIANTS),
  "How they are looked for; regex: regular expressions, as CuratedTREC's.",
)  # fmt: skip
_ROUNDS = flags.DEFINE_integer("rounds", _DEFAULT.rounds, "Of timing.")
_SPEED_SECS = flags.DEFINE_float(
  "speed_secs", _DEFAULT.speed_secs, "Of each system, in each round."
)


def main(argv: list[str]) -> None:
  """Runs the command."""
  rerank = rerank_config(rerank_settings(), RerankConfig())
  if rerank.init_from and not _INDEX.value:
    raise ValueError(
      f"--rerank={rerank.init_from} reads the texts of passages, and embeddings"
      " have none; expected --index and --questions. Give them, or omit it."
    )
  added = RERANKED if rerank.init_from else ()
  settings = BenchmarkSettings(
    answers=_ANSWERS.value,
    systems=tuple(dict.fromkeys((*(_SYSTEMS.value or ()), *added))),
    rerank=rerank,
    max_questions=_MAX.value,
    target_recall=_TARGET.value,
    tune_secs=_TUNE_SECS.value,
    rounds=_ROUNDS.value,
    speed_secs=_SPEED_SECS.value,
    drop_own_id=_DROP_OWN_ID.value,
  )
  directory = _INDEX.value, _QUESTIONS.value
  files = _EMBEDDINGS.value or []
  arrays = files, _QUESTION_EMBEDDINGS.value
  if all(directory) and not any(arrays):
    benchmark = benchmark_directory(*directory, settings)
  elif all(arrays) and not any(directory) and len(files) > 1:
    _by_first("measure", lambda: _measure_growth(files, arrays[1] or ""))
    return
  elif all(arrays) and not any(directory):
    benchmark = benchmark_embeddings(files[0], arrays[1], settings)
  else:
    raise ValueError(
      "Give --index and --questions, or --embeddings and --question_embeddings."
    )
  _by_first("report", lambda: _report(benchmark))


def _by_first(what: str, act: Callable[[], None]) -> None:
  """Calls `act` on the first host; the others wait, and fail if it fails."""
  first_alone(what, act if is_first() else lambda: None)


def _report(benchmark: Benchmark) -> None:
  if _OUTPUT.value:
    write_benchmark(_OUTPUT.value, benchmark)
  print(benchmark.markdown())


def _measure_growth(files: list[str], questions: str) -> None:
  settings = GrowthSettings(
    target_recall=_TARGET.value, max_questions=_MAX.value
  )
  growth = benchmark_growth(files, questions, settings)
  if _OUTPUT.value:
    write_growth(_OUTPUT.value, growth)
  print(growth_table(growth))


if __name__ == "__main__":
  logging.set_verbosity(logging.INFO)
  command.run(main)
