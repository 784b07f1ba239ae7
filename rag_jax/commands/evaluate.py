r"""Measures a model on questions whose answers are known.

  rag-jax evaluate --workdir=runs/quickstart --output=runs/measured
  rag-jax evaluate --model=hf:facebook/rag-token-nq --corpus=documents/ \
      --questions=nq-test.jsonl --output=runs/nq --against=runs/other

--workdir, --model and --corpus are those of rag-jax ask. --questions is a file
in a format that training reads, or a folder with one per split; without it,
those of the run. Writes to --output: answers.jsonl, a line per question with
the answer, its probability, and the passages that were read; metrics.json, the
metrics with 95 % intervals, also per relation and per length of the question;
and report.html, with the worst answers.

--metrics are some of em, f1, accuracy, recall, rouge, bleu, kilt, knowledge,
length and copy; by default all that the questions allow and whose packages are
there: pip install -e ".[eval]" installs those of rouge and bleu. kilt is
R-precision, recall of gold passages, and the scores of KILT: the questions have
to name gold passages, or pages as KILT does. knowledge is the F1 of an answer
with the text that it should be based on, the field `knowledge` of a question.

With --labels an answer is chosen from these, for instance for FEVER
--labels="SUPPORTS,REFUTES,NOT ENOUGH INFO": the label with the largest p(y|x),
summed over the documents. answers.jsonl has the probability of each.

--against is the output of another evaluation on the same questions: the
differences, their intervals and p values are added. Started again after an
interruption, it goes on with the answers that --output has.
"""

from collections.abc import Iterator
import json
import os
from typing import Any

from absl import flags
from absl import logging
from etils import epath
import jax
import numpy as np

from rag_jax.artifacts import fingerprint_arrays
from rag_jax.artifacts import fingerprint_lines
from rag_jax.artifacts import write_atomically
from rag_jax.commands import command
from rag_jax.commands.model_flags import asked_questions
from rag_jax.commands.model_flags import check_questions_named
from rag_jax.commands.model_flags import define_model_flags
from rag_jax.commands.model_flags import define_question_flags
from rag_jax.commands.model_flags import open_pipeline
from rag_jax.config import EvalConfig
from rag_jax.corpus.passages import Passage
from rag_jax.corpus.passages import Passages
from rag_jax.data.questions import Question
from rag_jax.evaluation.answer_metrics import METRICS
from rag_jax.evaluation.answer_metrics import check_metrics
from rag_jax.evaluation.answer_metrics import choose_metrics
from rag_jax.evaluation.answers import VARIANTS
from rag_jax.evaluation.answers import check_variant
from rag_jax.evaluation.answers_page import write_summary
from rag_jax.evaluation.evidence import find_evidence
from rag_jax.evaluation.judged_answers import LINES
from rag_jax.evaluation.judged_answers import JudgedAnswer
from rag_jax.evaluation.judged_answers import judge
from rag_jax.evaluation.judged_answers import line_of
from rag_jax.evaluation.judged_answers import read_judged
from rag_jax.evaluation.regex_answers import check_patterns
from rag_jax.progress import Progress
from rag_jax.serving.pipeline import RagPipeline

define_model_flags()
_NUM_QUESTIONS = define_question_flags(0)
_OUTPUT = flags.DEFINE_string("output", None, "Folder to write.")
_AGAINST = flags.DEFINE_string(
  "against", "", "The --output of another evaluation, to compare with."
)
_RETRIEVED = flags.DEFINE_integer(
  "num_retrieved", 20, "Passages per question for answer recall, at least as"
  " many as are read; fewer if there are fewer.",
)  # fmt: skip
_BATCH = flags.DEFINE_integer("batch_size", 32, "Questions answered together.")
_ANSWERS = flags.DEFINE_enum(
  "answers", "", ["", *VARIANTS], "How answers are compared; '': as in the run."
)
_METRICS = flags.DEFINE_list(
  "metrics", [], f"Some of {','.join(METRICS)}; '': all that can be computed."
)
_LABELS = flags.DEFINE_list(
  "labels", [], "The possible answers, with commas between; '': any."
)
flags.mark_flag_as_required("output")

_IDENTITY = "evaluation.json"  # in the output: which evaluation it is
_READ_AT_A_TIME = 1000  # passages


def _check_flags() -> None:
  check_questions_named()
  for flag, least in ((_NUM_QUESTIONS, 0), (_RETRIEVED, 1), (_BATCH, 1)):
    if flag.value < least:
      raise ValueError(
        f"--{flag.name}={flag.value}; expected {least} or more. Give such a"
        " number, or omit it."
      )
  check_metrics(_METRICS.value or [])


def _identity(
  pipeline: RagPipeline, asked: list[Question], **settings: Any
) -> dict[str, Any]:
  """Returns what has to be the same to go on with an evaluation."""
  names = "mode", "num_beams", "hf_parity"
  leaves = jax.tree_util.tree_leaves_with_path(pipeline.params)
  gold = [repr((q.gold, q.pages)) for q in asked]
  if any(q.gold or q.pages for q in asked):
    settings["gold"] = fingerprint_lines(gold)
  if any(q.knowledge for q in asked):
    settings["knowledge"] = fingerprint_lines(q.knowledge for q in asked)
  return {
    "model": fingerprint_arrays(
      {jax.tree_util.keystr(name): np.asarray(x) for name, x in leaves}
    ),
    **pipeline.experiment.identity,
    "questions": fingerprint_lines(map(repr, asked)),
    **{name: getattr(flags.FLAGS, name) for name in names},
    **settings,
  }


def _done(output: epath.Path, identity: dict[str, Any]) -> list[JudgedAnswer]:
  """Returns the answers that were written before, of the same evaluation.

  Raises:
    ValueError: they are of another one, or nobody knows of which.
  """
  mark, path = output / _IDENTITY, output / LINES
  if not mark.exists() and not path.exists():
    write_atomically(mark, json.dumps(identity, indent=2) + "\n")
    return []
  before = json.loads(mark.read_text()) if mark.exists() else {}
  other = [
    name for name in identity | before if before.get(name) != identity.get(name)
  ]
  if other:
    raise ValueError(
      f"{output} holds another evaluation than this: {', '.join(other)} differ."
      " Expected a new folder, or that of the same evaluation, which then goes"
      " on. Choose another --output."
    )
  if not path.exists():
    return []
  text = path.read_text()
  whole = text[: text.rfind("\n") + 1]
  if whole != text:  # the last line was cut off
    write_atomically(path, whole)
  done = read_judged(path)
  logging.info("%s has %d answers already.", path, len(done))
  return done


def _read(passages: Passages) -> Iterator[Passage]:
  """Yields all passages, and shows how many were read."""
  done = 0
  with Progress("Read", len(passages), "passages") as progress:
    for number, passage in enumerate(passages, start=1):
      yield passage
      if not number % _READ_AT_A_TIME:
        progress.update(number - done)
        done = number
    progress.update(len(passages) - done)


def main(argv: list[str]) -> None:
  """Runs the command."""
  _check_flags()
  # Before the model: what is compared with has to be there.
  against = read_judged(_AGAINST.value) if _AGAINST.value else []
  output = epath.Path(os.path.expanduser(_OUTPUT.value or ""))
  if output.exists() and not output.is_dir():
    raise ValueError(
      f"--output={output} is a file; expected a folder to write. Choose"
      " another."
    )
  pipeline = open_pipeline()
  asked = asked_questions(pipeline)
  settings: EvalConfig = pipeline.experiment.config.eval
  variant = _ANSWERS.value or settings.answers
  if problems := check_variant(variant, settings.language):
    raise ValueError(" ".join(problems))
  if variant == "regex":
    for question in asked:
      check_patterns(question.answers, f"The question {question.question!r}")
  labels = [label.strip() for label in _LABELS.value or []]
  for question in asked if labels else ():
    if not set(labels) & set(question.answers):
      raise ValueError(
        f"None of --labels={','.join(labels)} is an answer of the question"
        f" {question.question[:60]!r}: {', '.join(question.answers)[:60]}."
        " Expected labels that are spelt as in the questions. Correct --labels."
      )
  passages = pipeline.experiment.passages
  chosen, notes = choose_metrics(
    _METRICS.value or [],
    variant=variant,
    has_gold=any(q.gold or q.pages for q in asked),
    has_knowledge=any(q.knowledge for q in asked),
  )
  evidence = find_evidence(asked, _read(passages))
  n_docs = pipeline.experiment.config.data.n_docs
  most = min(max(_RETRIEVED.value, n_docs), len(passages))
  identity = _identity(
    pipeline, asked, n_docs=n_docs, num_retrieved=most, answers=variant
  )
  if pipeline.answerer.reranker is not None:
    identity["rerank"] = pipeline.answerer.reranker.identity
  if labels:
    identity["labels"] = labels
    pipeline.answerer.encode_labels(labels)  # or refuses them, before all else
  output.mkdir(parents=True, exist_ok=True)
  judged = _done(output, identity)
  # Appended, so that an interruption loses one batch.
  with (
    (output / LINES).open("a") as file,
    Progress("Answered", len(asked), "questions", len(judged)) as progress,
  ):
    while len(judged) < len(asked):
      part = asked[len(judged) : len(judged) + _BATCH.value]
      answers = pipeline.answerer.answer(
        pipeline.params,
        pipeline.index,
        [q.asked for q in part],
        n_docs=n_docs,
        num_retrieved=most,
        batch_size=_BATCH.value,
        labels=labels,
      )
      for answer, question in zip(answers, part, strict=True):
        found = [passages[row] for row in answer.retrieved]
        judged.append(
          judge(
            answer,
            question,
            [f"{passage.title} {passage.text}" for passage in found],
            variant=variant,
            language=settings.language,
            evidence=evidence.score(question, found),
          )
        )
        file.write(line_of(judged[-1]) + "\n")
      file.flush()
      progress.update(len(part))
  title = f"{output.name}: {len(judged)} questions"
  if "kilt" in chosen:
    notes = (*notes, *evidence.notes)
  _, tables = write_summary(
    output, title, judged, against, chosen=chosen, notes=notes
  )
  for heading, rows in tables:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print(f"{heading}\n")
    for row in rows:
      cells = (x.ljust(width) for x, width in zip(row, widths, strict=True))
      print("  ".join(cells).rstrip())
    print()
  print("".join(f"{note}\n" for note in notes))
  print(f"In {output}: {LINES}, metrics.json, report.html")


def run() -> None:
  """Runs `main`."""
  command.run(main)
