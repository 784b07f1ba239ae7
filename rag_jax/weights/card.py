"""The model card of an export: the README.md that the hub shows.

In: a model of ours, what it is exported as, and the results of its run. Out:
Markdown that says what it is, how it is loaded, and what was measured.
"""

from collections.abc import Mapping
from typing import Any

from etils import epath
import jax
import numpy as np

from rag_jax import artifacts
from rag_jax.weights.encoder_configs import PLAIN_ENCODERS
from rag_jax.weights.saved import SavedModel

CARD = "README.md"

_CLASSES = {
  "rag_token": "RagTokenForGeneration",
  "rag_sequence": "RagSequenceForGeneration",
  "generator": "AutoModelForSeq2SeqLM",
  "causal": "AutoModelForCausalLM",
  "dpr_question": "DPRQuestionEncoder",
  "dpr_context": "DPRContextEncoder",
  **dict.fromkeys(PLAIN_ENCODERS, "AutoModel"),
  "t5_encoder": "T5EncoderModel",  # AutoModel would add a decoder
}
_TASKS = {
  "rag_token": "question-answering",
  "rag_sequence": "question-answering",
  "generator": "text-generation",
  "causal": "text-generation",
}
_PARTS = {
  "rag_token": ("question_encoder", "passage_encoder", "generator"),
  "rag_sequence": ("question_encoder", "passage_encoder", "generator"),
  "generator": ("generator",),
  "causal": ("generator",),
  "dpr_context": ("passage_encoder", "question_encoder"),
}


def read_results(path: epath.PathLike) -> dict[str, Any]:
  """Returns what a run measured at its end; {} if nothing is there.

  Raises:
    ValueError: it is not as it was written: numbers that are not those of the
      run would be published.
  """
  try:
    return artifacts.read_json(
      epath.Path(path) / "results.json",
      "Remove it and start the run again with the same workdir.",
    )
  except FileNotFoundError:
    return {}


def model_card(
  model: SavedModel, kind: str, name: str, results: Mapping[str, Any]
) -> str:
  """Returns the card of `model` as `kind`, one of `convert.KINDS`.

  Args:
    model: what is exported.
    kind: what as.
    name: of the directory, for the title and the example.
    results: of its run, with names such as "test/exact_match"; may be empty.
  """
  lines = [
    "---",
    f"library_name: {_library(kind)}",
    f"pipeline_tag: {_TASKS.get(kind, 'feature-extraction')}",
    "tags:",
    *(f"- {tag}" for tag in ("rag_jax", "jax", kind.replace("_", "-"))),
    "---",
    "",
    f"# {name}",
    "",
    _origin(model, kind),
    "",
    "## Load it",
    "",
    "```python",
    *_example(kind, name),
    "```",
    "",
    "## What is in it",
    "",
    "| part | parameters |",
    "|---|---:|",
    *_sizes(model, kind),
  ]
  if kind.startswith("rag"):
    lines += ["", *_settings(model)]
  measured = _measured(results)
  if measured:
    lines += [
      "",
      "## Results",
      "",
      "Of the run that trained it, on its own test questions.",
      "",
      "| metric | value |",
      "|---|---:|",
      *measured,
    ]
  lines += [
    "",
    "## Limits",
    "",
    f"{_limits(kind)} No licence is stated here: it follows from those of the"
    " weights and texts that the model was made of.",
  ]
  return "\n".join(lines) + "\n"


def _limits(kind: str) -> str:
  if kind == "causal":
    return "What it writes can be wrong."
  return (
    "It answers from the passages that it is given, and repeats what they say,"
    " also where they are wrong."
  )


def _library(kind: str) -> str:
  if kind == "sentence_transformers":
    return "sentence-transformers"
  return "transformers"


def _origin(model: SavedModel, kind: str) -> str:
  if model.content_from:
    return f"`{kind}`, converted from {model.content_from} by rag_jax."
  trained = "trained with rag_jax, retriever and generator together"
  if model.encoder is None:
    trained = "trained with rag_jax without documents"
  return f"`{kind}`, {trained}."


def _example(kind: str, name: str) -> list[str]:
  if kind == "sentence_transformers":
    return [
      "from sentence_transformers import SentenceTransformer",
      "",
      f'model = SentenceTransformer("{name}")',
    ]
  tokenizer = "RagTokenizer" if kind.startswith("rag") else "AutoTokenizer"
  return [
    f"from transformers import {_CLASSES[kind]}",
    f"from transformers import {tokenizer}",
    "",
    f'model = {_CLASSES[kind]}.from_pretrained("{name}")',
    f'tokenizer = {tokenizer}.from_pretrained("{name}")',
  ]


def _sizes(model: SavedModel, kind: str) -> list[str]:
  names = _PARTS.get(kind, ("question_encoder",))
  found = [name for name in names if name in model.params]
  if kind == "dpr_context":
    found = found[:1]
  lines = []
  for name in found:
    size = sum(np.size(x) for x in jax.tree.leaves(model.params[name]))
    lines.append(f"| {name} | {size:,} |")
  return lines


def _settings(model: SavedModel) -> list[str]:
  said = model.settings
  lines = [
    f"It reads {said.n_docs} documents for a question, in contexts of up to"
    f" {said.max_combined_length} tokens."
  ]
  if model.context_style == "question_first":
    lines += [
      "",
      "It was trained on contexts `<s> question </s> title </s> text </s>`, not"
      " on those that `RagRetriever` makes: give it the former, as"
      " `context_input_ids`.",
    ]
  return lines


def _measured(results: Mapping[str, Any]) -> list[str]:
  named = {
    "exact match": "test/exact_match",
    "token F1": "test/token_f1",
    "answer recall@5": "test/answer_recall_at_5",
    "questions": "test/num_questions",
  }
  lines = []
  for name, key in named.items():
    value = results.get(key)
    if isinstance(value, int | float) and not isinstance(value, bool):
      number = f"{value:,.0f}" if name == "questions" else f"{value:.3f}"
      lines.append(f"| {name} | {number} |")
  return lines
