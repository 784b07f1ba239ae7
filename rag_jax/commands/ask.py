r"""Asks a trained model, and shows what it read.

  rag-jax ask --workdir=runs/quickstart "What is the capital of France?"
  rag-jax ask --model=hf:facebook/rag-token-nq --corpus=documents/ \
      "What is the capital of France?"

--workdir is a run that has ended. --model is a RAG checkpoint: a directory of
transformers, one that rag-jax convert-hf wrote, or a name of the hub; it
answers as in transformers, with its own generation_config.json. --corpus is a
folder or file of documents or passages, which are embedded at each start, or
what rag-jax build-index wrote, whose embeddings are used. With --workdir it
answers from other passages without training again.

With --chat, questions are turns of a dialogue, and the model reads what was
said before: "What is the capital of France?" and then "And its currency?". The
line /new begins another dialogue.

Several questions are several arguments. With `-`, questions are read from
standard input, one per line; without a question, at a prompt. --json prints one
JSON object per answer. With --distributed on every host of a pod, each answers
a share of the questions; the first host reads standard input, and prints all
answers. Only the user's cache directory (~/.cache/rag_jax) is written to:
compiled programs, and converted weights of a --model that has them as a pickle
only.
"""

from collections.abc import Iterable, Iterator, Sequence
import sys
import time
from typing import Any

from absl import flags
from absl import logging

from rag_jax.commands import command
from rag_jax.commands.model_flags import define_model_flags
from rag_jax.commands.model_flags import open_pipeline
from rag_jax.corpus.folding import is_blank
from rag_jax.corpus.text_files import bad_character
from rag_jax.decoding.answerer import Answer
from rag_jax.pod import joined
from rag_jax.processes import is_first
from rag_jax.processes import share
from rag_jax.processes import told_by_first
from rag_jax.serving.explanation import SURE
from rag_jax.serving.explanation import explain
from rag_jax.serving.explanation import to_json
from rag_jax.serving.pipeline import RagPipeline
from rag_jax.serving.pipeline import check_questions
from rag_jax.terminal import one_line

define_model_flags()
_SURE = flags.DEFINE_float(
  "sure", SURE, "Answers with a lower probability are called unsure.", 0.0, 1.0
)
_N_DOCS = flags.DEFINE_integer(
  "n_docs", 0, "Passages to read per question; 0: as many as in training."
)
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object per line.")
_STREAM = flags.DEFINE_bool(
  "stream", None, "Show an answer on stderr while it is written, but not in"
  " beam search or RAG-Sequence. By default if stderr is a terminal.",
)  # fmt: skip
_LABELS = flags.DEFINE_list(
  "labels", [], "The possible answers, with commas between, of which the most"
  " likely is chosen; '': any.",
)  # fmt: skip
_CHAT = flags.DEFINE_bool(
  "chat", False, "Questions are turns of one dialogue; /new begins another."
)
command.define_pod_flags()
_NEW = "/new"
_SHOWN_CHARS = 39  # of an unfinished answer; a character may take two columns


def _prompt() -> Iterator[str]:
  """Yields what a person types, until an empty line or the end."""
  again = f" {_NEW} begins another dialogue." if _CHAT.value else ""
  print(f"Ask a question; an empty line ends.{again}", file=sys.stderr)
  while True:
    print("> ", end="", file=sys.stderr, flush=True)  # not among the answers
    try:
      question = input()
    except (EOFError, KeyboardInterrupt):
      return
    if not question.strip():
      return
    yield question


def _questions(arguments: list[str]) -> Iterable[str]:
  """Returns the questions; those of the command line are checked before."""
  if not arguments:
    return _prompt()
  questions = command.questions(arguments)
  if arguments == ["-"]:
    return questions
  questions = list(questions)
  check_questions(questions)
  return questions


def _show(text: str) -> None:
  """Shows an unfinished answer on stderr, over what was shown before."""
  shown = one_line(text)[-_SHOWN_CHARS:]
  print(f"\r{shown}\x1b[K", end="", file=sys.stderr, flush=True)


def _text(
  pipeline: RagPipeline, answer: Answer, history: Sequence[str] = ()
) -> str:
  """Returns what is printed for an answer."""
  how = answer, _SURE.value, pipeline.least_score
  if _JSON.value:
    more = {"history": list(history)} if _CHAT.value else {}
    return f"{to_json(*how, **more)}\n"
  return f"{answer.question}\n{explain(*how)}"


def _how() -> dict[str, Any]:
  """Returns how a question is answered."""
  labels = [label.strip() for label in _LABELS.value or []]
  return {"n_docs": _N_DOCS.value, "labels": labels}


def _answer_on_hosts(arguments: list[str]) -> None:
  """Answers on all hosts of a pod, each a share; the first one prints.

  Raises:
    ValueError: there is no question to share.
  """
  questions = told_by_first(lambda: list(command.questions(arguments)))
  check_questions(questions)
  if not questions:
    raise ValueError(
      "--distributed was given without a question; expected questions that the"
      " hosts can share. Give them as arguments, or - for standard input."
    )
  pipeline = open_pipeline()

  def answer(some: Sequence[str]) -> list[str]:
    found = (pipeline.answer(q, **_how())[0] for q in some)
    return [_text(pipeline, answer) for answer in found]

  texts = share(questions, answer)
  if is_first():
    print(("" if _JSON.value else "\n").join(texts), end="")


def main(argv: list[str]) -> None:
  """Runs the command."""
  if not flags.FLAGS["verbosity"].present:
    # Answers alone; --verbosity=0 also says how long each took.
    logging.set_verbosity(logging.WARNING)
  if joined() and _CHAT.value:
    raise ValueError(
      "--chat was given with --distributed; expected one of them, since each"
      " turn of a dialogue needs the ones before. Leave out --distributed."
    )
  if joined():
    _answer_on_hosts(argv[1:])
    return
  questions = _questions(argv[1:])
  pipeline = open_pipeline()
  if _CHAT.value:
    pipeline.check_reads_history()
  streams = sys.stderr.isatty() if _STREAM.value is None else _STREAM.value
  on_text = _show if streams and not _JSON.value else None
  number, history = 0, list[str]()
  for question in questions:
    if _CHAT.value and question.strip() == _NEW:
      history = []
      continue
    start = time.perf_counter()
    (answer,) = pipeline.answer(
      question, on_text=on_text, history=history, **_how()
    )
    if on_text:
      _show("")
    logging.info("Answered in %.3f s.", time.perf_counter() - start)
    if number and not _JSON.value:
      print()
    print(_text(pipeline, answer, history), end="", flush=True)
    number += 1
    # What cannot be asked is no turn either.
    if _CHAT.value and not (
      is_blank(answer.text) or bad_character(answer.text)
    ):
      # Between turns there are line breaks.
      history += [question, " ".join(answer.text.split())]


def run() -> None:
  """Runs `main`."""
  command.run(main, arguments="[QUESTION ... | -]")
