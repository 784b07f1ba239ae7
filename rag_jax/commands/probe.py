r"""Tests if a model answers from what it reads, and what it bears.

  rag-jax probe --workdir=runs/quickstart --output=runs/probe

--workdir, --model and --corpus are those of rag-jax ask; --questions and
--split those of rag-jax evaluate. Two tests:

Exchanged passages. The passages about the subjects of the questions are made to
state other answers, those of other questions of the same relation, and both
corpora are searched. A model that reads follows the passages; one that has
learned facts by heart does not.

Worse documents. Of the K documents that the model reads, some are replaced by
random passages, by an empty one, or by the best one again; their order is
changed; or a share of the passages that retrieval finds is lost, as an index of
lower recall would lose it.

Writes to --output: passages.jsonl and exchanged.jsonl, the two corpora;
probe.json, exact match with 95 % intervals; and probe.png. It embeds both
corpora, so that it is for up to --max_passages.
"""

from collections.abc import Sequence
import json
import os
from typing import Any

from absl import flags
from etils import epath
import numpy as np

from rag_jax.artifacts import write_atomically
from rag_jax.commands import command
from rag_jax.commands.model_flags import asked_questions
from rag_jax.commands.model_flags import check_questions_named
from rag_jax.commands.model_flags import define_model_flags
from rag_jax.commands.model_flags import define_question_flags
from rag_jax.commands.model_flags import open_pipeline
from rag_jax.corpus.passages import Passage
from rag_jax.data.questions import Question
from rag_jax.evaluation.answers import exact_match
from rag_jax.evaluation.probe import Choice
from rag_jax.evaluation.probe import choices
from rag_jax.evaluation.probe import draw
from rag_jax.evaluation.probe import exchange_facts
from rag_jax.progress import Progress
from rag_jax.retrieval.intervals import mean_interval
from rag_jax.serving.pipeline import RagPipeline

define_model_flags()
_NUM_QUESTIONS = define_question_flags(500)
_OUTPUT = flags.DEFINE_string("output", None, "Folder to write.")
_BATCH = flags.DEFINE_integer("batch_size", 32, "Questions answered together.")
_SEED = flags.DEFINE_integer("seed", 0, "Of all that is drawn.")
_MOST = flags.DEFINE_integer("max_passages", 200_000, "More are refused.")
flags.mark_flag_as_required("output")

_BLANK = "."  # the text of a passage that says nothing


def _check_flags() -> None:
  check_questions_named()
  limits = ((_NUM_QUESTIONS, 0), (_BATCH, 1), (_SEED, 0), (_MOST, 1))
  for flag, least in limits:
    if flag.value < least:
      raise ValueError(
        f"--{flag.name}={flag.value}; expected {least} or more. Give such a"
        " number, or omit it."
      )


def _check(pipeline: RagPipeline) -> None:
  """Raises `ValueError` if the model cannot be tested."""
  n_docs = pipeline.experiment.config.data.n_docs
  if pipeline.index is None:
    raise ValueError(
      "The model answers closed book (data.n_docs=0), so that there is nothing"
      " to exchange below it. Expected one that reads passages. Name another."
    )
  number = len(pipeline.experiment.passages)
  if not 2 * n_docs < number <= _MOST.value:
    raise ValueError(
      f"The corpus has {number} passages; expected more than {2 * n_docs},"
      f" twice what the model reads, and at most --max_passages={_MOST.value},"
      " since all are embedded twice. Give another --corpus, or raise the"
      " limit."
    )


def _write_corpus(path: epath.Path, passages: Sequence[Passage]) -> None:
  """Writes passages, and last the one that says nothing."""
  ids = {p.id for p in passages}
  blank = next(x for x in _blank_ids() if x not in ids)
  records = [{"id": p.id, "title": p.title, "text": p.text} for p in passages]
  records.append({"id": blank, "title": "", "text": _BLANK})
  lines = (json.dumps(record, ensure_ascii=False) for record in records)
  write_atomically(path, "\n".join(lines) + "\n")


def _blank_ids() -> Any:
  name = "blank"
  while True:
    yield name
    name += "_"


class _Probe:
  """A model over one of the two corpora."""

  def __init__(self, pipeline: RagPipeline, progress: Progress):
    self.pipeline = pipeline
    self._progress = progress

  def predictions(
    self, questions: Sequence[Question], choose: Choice
  ) -> list[str]:
    """Returns the answer to each question from the chosen passages."""
    experiment, texts = self.pipeline.experiment, []
    n_docs = experiment.config.data.n_docs
    # Enough to fill up from if half of them are lost, and the blank one.
    retrieved = min(4 * n_docs + 16, len(experiment.passages))
    for start in range(0, len(questions), _BATCH.value):
      part = [q.asked for q in questions[start : start + _BATCH.value]]
      answers = self.pipeline.answerer.answer(
        self.pipeline.params,
        self.pipeline.index,
        part,
        n_docs=n_docs,
        num_retrieved=retrieved,
        batch_size=_BATCH.value,
        choose_docs=choose,
      )
      texts += [answer.text for answer in answers]
      self._progress.update(len(part))
    return texts

  def judged(
    self, predictions: Sequence[str], questions: Sequence[Question]
  ) -> dict[str, float]:
    """Returns the exact match, with its interval."""
    settings = self.pipeline.experiment.config.eval
    right = np.array([
      exact_match(text, q.answers, settings.answers, settings.language)
      for text, q in zip(predictions, questions, strict=True)
    ], float)  # fmt: skip
    low, high = mean_interval(right)
    return {"mean": float(right.mean()), "low": low, "high": high}


def _text(found: dict[str, float]) -> str:
  return (
    f"{100 * found['mean']:.1f} ({100 * found['low']:.1f} to"
    f" {100 * found['high']:.1f})"
  )


def main(argv: list[str]) -> None:
  """Runs the command."""
  _check_flags()
  output = epath.Path(os.path.expanduser(_OUTPUT.value or ""))
  if output.exists() and not output.is_dir():
    raise ValueError(
      f"--output={output} is a file; expected a folder to write. Choose"
      " another."
    )
  opened = open_pipeline()
  _check(opened)
  asked = asked_questions(opened)
  passages = list(opened.experiment.passages)
  changed = exchange_facts(passages, asked, _SEED.value)
  output.mkdir(parents=True, exist_ok=True)
  files = output / "passages.jsonl", output / "exchanged.jsonl"
  for path, corpus in zip(files, (passages, changed.passages), strict=True):
    _write_corpus(path, corpus)
  del opened
  blank = len(passages)
  pipelines = [open_pipeline(os.fspath(path)) for path in files]
  for pipeline in pipelines:  # rows are counted on
    assert len(pipeline.experiment.passages) == blank + 1
  n_docs = pipelines[0].experiment.config.data.n_docs
  conditions = choices(n_docs, blank + 1, blank, _SEED.value)
  total = 2 * len(changed.before) + len(conditions) * len(asked)
  with Progress("Answered", total, "questions") as progress:
    own, other = (_Probe(pipeline, progress) for pipeline in pipelines)
    best = conditions["as retrieved"][2]
    exchanged = {}
    for corpus, probe in (("before", own), ("after", other)):
      predictions = probe.predictions(changed.before, best)
      exchanged[corpus] = {
        answers: probe.judged(predictions, getattr(changed, answers))
        for answers in ("before", "after")
      }
    found = {
      name: own.judged(own.predictions(asked, choose), asked)
      for name, (_, _, choose) in conditions.items()
    }
  kinds = {name: {"kind": k, "degree": d} for name, (k, d, _) in
           conditions.items()}  # fmt: skip
  content = {
    "num_questions": len(asked),
    "num_exchanged": len(changed.before),
    "num_left_out": changed.num_left_out,
    "n_docs": n_docs,
    "exchanged": exchanged,
    "documents": {name: kinds[name] | found[name] for name in found},
  }
  write_atomically(output / "probe.json", json.dumps(content, indent=2) + "\n")
  points: dict[str, list[tuple[float, float, float, float]]] = {}
  for row in content["documents"].values():
    point = row["degree"], row["mean"], row["low"], row["high"]
    points.setdefault(row["kind"], []).append(point)
  draw(output / "probe.png", f"{output.name}: worse documents", points, n_docs)
  print(
    f"Exact match in percent, with 95 % intervals.\n\n{len(changed.before)}"
    f" questions whose facts were exchanged ({changed.num_left_out} were left"
    " out):\n\n| passages | answers before | answers after |\n|---|---:|---:|"
  )
  for corpus in ("before", "after"):
    row = exchanged[corpus]
    print(f"| {corpus} | {_text(row['before'])} | {_text(row['after'])} |")
  print(f"\n{len(asked)} questions:\n\n| documents | exact match |\n|---|---:|")
  for name, row in found.items():
    print(f"| {name} | {_text(row)} |")
  print(f"\nIn {output}: probe.json, probe.png, and both corpora")


def run() -> None:
  """Runs `main`."""
  command.run(main)
