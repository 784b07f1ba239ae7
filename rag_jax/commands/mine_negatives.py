r"""Finds hard negatives of questions, for contrastive training.

  rag-jax mine-negatives --questions=train.jsonl --corpus=passages.jsonl \
      --output=mined/train.jsonl
  rag-jax mine-negatives --questions=train.jsonl --corpus=runs/index \
      --by=index --positive_share=0.95 --output=mined/train.jsonl

A hard negative is a passage that a search ranks high and that does not answer.
--by=bm25 searches words; --by=index searches embeddings: those of --corpus, if
rag-jax build-index wrote it, or of the run in --workdir, over --corpus or its
own passages. Of --depth candidates the --num best are kept: without the gold
passages of the question, and without those that state one of its answers
(--noanswer_filter keeps these). --positives gives questions without a gold
passage the best candidate that states an answer, as in DPR's data.

Candidates may answer without stating the answer. With --by=index, --margin and
--positive_share leave out those that score above the gold passage's score minus
a margin, or above a share of it (arXiv:2407.15831).

--questions is a file in a format that training reads. Writes JSON lines of
question, answers, gold and negatives: training reads them as train.jsonl in the
folder of data.questions, with contrastive.num_steps and contrastive.negatives.
"""

from collections import Counter
from collections.abc import Sequence
import json
import math
import os

from absl import flags
from etils import epath

from rag_jax.artifacts import write_atomically
from rag_jax.commands import command
from rag_jax.corpus.passages import Passages
from rag_jax.data.dialogue import Asked
from rag_jax.data.questions import Question
from rag_jax.data.questions import read_questions
from rag_jax.evaluation.answers import VARIANTS
from rag_jax.evaluation.mining import MiningSettings
from rag_jax.evaluation.mining import Search
from rag_jax.evaluation.mining import mine
from rag_jax.evaluation.mining import search_embeddings
from rag_jax.evaluation.mining import search_words
from rag_jax.evaluation.regex_answers import REGEX
from rag_jax.evaluation.regex_answers import check_patterns
from rag_jax.progress import Progress
from rag_jax.retrieval.bm25 import Bm25Index
from rag_jax.search.directory import OpenedDirectory
from rag_jax.serving.open_model import is_search_directory
from rag_jax.serving.open_model import open_corpus
from rag_jax.serving.pipeline import RagPipeline

_QUESTIONS = flags.DEFINE_string("questions", None, "Questions with answers.")
_CORPUS = flags.DEFINE_string(
  "corpus",
  "",
  "Passages, documents, or what rag-jax build-index wrote; '': those of"
  " --workdir.",
)
_WORKDIR = flags.DEFINE_string(
  "workdir", "", "With --by=index: the run whose retriever searches."
)
_OUTPUT = flags.DEFINE_string("output", None, "The .jsonl file to write.")
_OVERWRITE = flags.DEFINE_bool(
  "overwrite", False, "Overwrite an output that exists."
)
_BY = flags.DEFINE_enum("by", "bm25", ["bm25", "index"], "What is searched.")
_DEPTH = flags.DEFINE_integer("depth", 100, "Candidates per question.")
_NUM = flags.DEFINE_integer("num", 5, "Hard negatives per question.")
_ANSWER_FILTER = flags.DEFINE_bool(
  "answer_filter", True, "Leave out candidates that state an answer."
)
_POSITIVES = flags.DEFINE_bool(
  "positives", False, "Find a positive for questions without one."
)
_MARGIN = flags.DEFINE_float(
  "margin", None, "Least difference to the score of the gold passage."
)
_SHARE = flags.DEFINE_float(
  "positive_share", None, "Largest share of the score of the gold passage."
)
_ANSWERS = flags.DEFINE_enum(
  "answers", "multilingual", list(VARIANTS), "How answers are found in text."
)
flags.DEFINE_bool("debug", False, "Show where an error came from.")
flags.mark_flags_as_required(["questions", "output"])


def _settings() -> MiningSettings:
  """Returns what the flags say.

  Raises:
    ValueError: a value is not possible, or flags do not fit together.
  """
  for flag in (_DEPTH, _NUM):
    if flag.value < 1:
      raise ValueError(
        f"--{flag.name}={flag.value}; expected 1 or more. Give such a number,"
        " or omit it."
      )
  if _NUM.value > _DEPTH.value:
    raise ValueError(
      f"--num={_NUM.value} negatives cannot be kept of --depth={_DEPTH.value}"
      " candidates; expected at most as many. Raise --depth."
    )
  by_index = _BY.value == "index"
  for flag, good, expected in (
    (_MARGIN, lambda x: math.isfinite(x), "a number"),
    (_SHARE, lambda x: 0 < x <= 1, "a share above 0 and at most 1"),
  ):
    if flag.value is None:
      continue
    if not good(flag.value):
      raise ValueError(
        f"--{flag.name}={flag.value}; expected {expected}. Correct or omit it."
      )
    if not by_index:
      raise ValueError(
        f"--{flag.name}={flag.value} compares inner products, but"
        f" --by={_BY.value} has none. Expected --by=index. Give that, or omit"
        f" --{flag.name}."
      )
  if _WORKDIR.value and not by_index:
    raise ValueError(
      f"--workdir={_WORKDIR.value} names a retriever, but --by={_BY.value}"
      " searches words. Give --by=index, or --corpus alone."
    )
  return MiningSettings(
    depth=_DEPTH.value,
    num=_NUM.value,
    drop_answers=bool(_ANSWER_FILTER.value),
    find_positives=bool(_POSITIVES.value),
    margin=_MARGIN.value,
    share=_SHARE.value,
    variant=_ANSWERS.value or "",
  )


def _check_output() -> epath.Path:
  """Returns where to write.

  Raises:
    ValueError: nothing can be written there, or something is there.
  """
  output = epath.Path(os.path.expanduser(_OUTPUT.value or ""))
  if not output.name.endswith(".jsonl") or output.is_dir():
    raise ValueError(
      f"--output={output} is no name of a .jsonl file, which training reads."
      " Expected one such as mined/train.jsonl. Correct it."
    )
  if not output.parent.is_dir():
    try:
      output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
      raise ValueError(
        f"--output={output} cannot be written ({error.strerror}). Expected a"
        " file in a folder that exists or can be made. Choose another."
      ) from error
  if output.exists() and not _OVERWRITE.value:
    raise ValueError(
      f"--output={output} exists already. Expected a new file. Choose another,"
      " or give --overwrite."
    )
  return output


def _open() -> tuple[Passages, Search]:
  """Returns the passages, and what finds candidates among them.

  Raises:
    ValueError: neither corpus nor workdir is given, or they hold no index.
  """
  corpus, workdir = _CORPUS.value or "", _WORKDIR.value or ""
  if not corpus and not workdir:
    raise ValueError(
      "There is nothing to search; expected --corpus: a folder or file, or what"
      " rag-jax build-index wrote. Give one."
    )
  if workdir:
    pipeline = RagPipeline.load(workdir, corpus=corpus)
    answerer, params, index = pipeline.answerer, pipeline.params, pipeline.index
    if index is None:
      raise ValueError(
        f"The model in {workdir} answers closed book (data.n_docs=0) and has no"
        " index. Expected one that searches. Name another --workdir."
      )
    return (
      pipeline.experiment.passages,
      search_embeddings(index, lambda asked: answerer.embed(params, asked)),
    )
  if is_search_directory(corpus):
    directory = OpenedDirectory(corpus)
    passages = directory.passages
    if _BY.value == "index":
      return passages, search_embeddings(
        directory.index,
        lambda asked: directory.embed_questions(
          [Asked.of(question).said for question in asked]
        ),
      )
    words = directory.bm25
  elif _BY.value == "index":
    raise ValueError(
      f"--corpus={corpus} has no embeddings to search by --by=index. Expected"
      " what rag-jax build-index wrote, or a run in --workdir. Build it, or"
      " give --by=bm25."
    )
  else:
    passages, words = open_corpus(corpus), None
  if words is None:
    words = Bm25Index.build(passages, passages_fingerprint=passages.fingerprint)
  return passages, search_words(words)


def _record(question: Question) -> str:
  """Returns a line of the output; empty fields are left out."""
  record = {
    "id": question.id,
    "question": question.question,
    "history": list(question.history),
    "answers": list(question.answers),
    "knowledge": question.knowledge,
    "relation": question.relation,
    "gold": list(question.gold),
    "negatives": list(question.negatives),
  }
  return json.dumps(
    {name: value for name, value in record.items() if value},
    ensure_ascii=False,
  )


def _report(questions: Sequence[Question], counts: Counter[str]) -> str:
  """Returns what was found and what was left out, as text."""
  lines = [f"{len(questions)} questions, {counts['with a positive']} of them"
           " with a gold passage in the corpus"]  # fmt: skip
  if counts["gold not in the corpus"]:
    lines[0] += f" (ids that are not in it: {counts['gold not in the corpus']})"
  if not counts["with a positive"] and not _POSITIVES.value:
    lines.append(
      "Training needs a gold passage of each question: --positives finds them"
      " by the answers."
    )
  if _POSITIVES.value:
    lines.append(f"Gold passages that were found: {counts['found a positive']}")
  lines += [
    f"With {n} hard negatives: {counts[f'{n} negatives']} questions"
    for n in range(_NUM.value, -1, -1)
    if counts[f"{n} negatives"]
  ]
  lines += [
    f"Candidates left out, since they {name}: {counts[name]}"
    for name in (
      "are gold",
      "state an answer",
      "have a score too high",
      "have no gold to compare with",
    )
    if counts[name]
  ]
  return "\n".join(lines)


def main(argv: list[str]) -> None:
  """Runs the command."""
  settings, output = _settings(), _check_output()
  questions = read_questions(os.path.expanduser(_QUESTIONS.value or ""))
  if settings.variant == REGEX:
    for question in questions:
      check_patterns(question.answers, f"The question {question.question!r}")
  passages, search = _open()
  counts: Counter[str] = Counter()
  mined: list[Question] = []
  with Progress("Mined", len(questions), "questions") as progress:
    for question in mine(questions, passages, search, settings, counts):
      mined.append(question)
      progress.update(1)
  write_atomically(output, "".join(f"{_record(q)}\n" for q in mined))
  print(_report(mined, counts))
  print(f"Written to {output}.")


def run() -> None:
  """Runs `main`."""
  command.run(main)
