"""Loads, imports and exports checkpoints of transformers.

In: a directory of transformers, a name of the hub, or a run. Out: its
parameters in memory; a model directory of rag_jax; or a checkpoint that
transformers loads.
"""

import os

from etils import epath

from rag_jax.api.arguments import check_type
from rag_jax.api.arguments import path_of
from rag_jax.api.pickles import import_any
from rag_jax.weights import convert
from rag_jax.weights import load
from rag_jax.weights.hub import HUB_PREFIX
from rag_jax.weights.loaded import LoadedCausal
from rag_jax.weights.loaded import LoadedEncoder
from rag_jax.weights.loaded import LoadedGenerator
from rag_jax.weights.loaded import LoadedRag
from rag_jax.weights.report import Report
from rag_jax.weights.tensors import MAX_SHARD_BYTES

_WHERE = (
  "a checkpoint: a directory, or a name of the hub such as"
  " 'hf:facebook/bart-base'"
)
_RUN = (
  "the workdir of a run that has ended, or what import_checkpoint wrote, for"
  " instance 'runs/exportable'"
)
_OUTPUT = "a directory to write, for instance 'exports/exportable'"


def load_checkpoint(
  where: epath.PathLike,
) -> LoadedRag | LoadedEncoder | LoadedGenerator | LoadedCausal:
  """Returns the parameters in a checkpoint, with their config and a report.

  Args:
    where: a directory of transformers, "hf:ORG/NAME", the workdir of a run that
      has ended, or what `import_checkpoint` wrote.

  Returns:
    A `LoadedRag` if it has a retriever and a generator (its parts are
    `question_encoder`, `passage_encoder` and `generator`), else one such part.
    `params` are float32, with the names of rag_jax; `report` has the name of
    each tensor in the file.

  Raises:
    FileNotFoundError: there is no checkpoint, or a part of it is missing.
    ValueError: it is damaged, or of an unsupported architecture.
    TypeError: `where` is no path.
  """
  return load.load_checkpoint(path_of("where", where, _WHERE))


def import_checkpoint(
  where: epath.PathLike, output: epath.PathLike, *, overwrite: bool = False
) -> Report:
  """Writes a checkpoint of transformers as a model directory of rag_jax.

  This is needed only for a checkpoint whose only weights are a pickle
  (pytorch_model.bin, as of facebook/rag-*): training and
  `RagPipeline.from_checkpoint` read all others directly. A pickle is read by
  torch's weights-only loader, so torch has to be installed.

  Args:
    where: a directory, or "hf:ORG/NAME".
    output: the directory to write.
    overwrite: whether to replace an output that is not empty.

  Returns:
    The name of each tensor there and here.

  Raises:
    FileNotFoundError: there is no checkpoint, or a part of it is missing.
    ImportError: torch is needed and not installed.
    ValueError: it is damaged or has an unsupported architecture, or the output
      cannot be written.
    TypeError: an argument is of another type.
  """
  source, written = _paths("where", where, _WHERE, output, overwrite)
  return import_any(source, written)


def export(
  source: epath.PathLike,
  output: epath.PathLike,
  *,
  kind: str = "",
  max_shard_bytes: int = MAX_SHARD_BYTES,
  overwrite: bool = False,
) -> Report:
  """Writes a trained model as a checkpoint that transformers loads.

  It comes with a model card, and is read back once, to check it.

  Args:
    source: the workdir of a run that has ended, or what `import_checkpoint`
      wrote.
    output: the directory to write.
    kind: "rag_token", "rag_sequence", "generator", "causal", "dpr_question",
      "dpr_context", "sentence_transformers", or an encoder's model_type such
      as "bert" or "roberta"; "": as it was trained.
    max_shard_bytes: most bytes of a file.
    overwrite: whether to replace an output that is not empty.

  Returns:
    The name of each tensor there and here.

  Raises:
    FileNotFoundError: there is no model.
    ValueError: it is damaged, transformers has no class for it, or the output
      cannot be written.
    TypeError: an argument is of another type.
  """
  check_type("kind", kind, str, f"one of {', '.join(convert.KINDS)}, or ''")
  check_type("max_shard_bytes", max_shard_bytes, int, "a number of bytes")
  if max_shard_bytes < 1:
    raise ValueError(f"max_shard_bytes={max_shard_bytes}; expected 1 or more.")
  source, written = _paths("source", source, _RUN, output, overwrite)
  return convert.export_model(source, written, kind, max_shard_bytes)


def _paths(
  name: str,
  source: epath.PathLike,
  expected: str,
  output: epath.PathLike,
  overwrite: bool,
) -> tuple[str, str]:
  """Returns the paths to read and to write, after checking the output."""
  found = path_of(name, source, expected)
  if not found.startswith(HUB_PREFIX):
    found = os.path.expanduser(found)
  written = os.path.expanduser(path_of("output", output, _OUTPUT))
  convert.check_output(found, written, overwrite=overwrite)
  return found, written
