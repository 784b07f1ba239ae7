r"""Converts checkpoints from and to Hugging Face's transformers.

  rag-jax convert-hf --input=runs/exportable --output=exports/exportable
  rag-jax convert-hf --input=hf:facebook/bart-base --output=models/bart

An --input that is the workdir of a finished run, or a model directory that this
command wrote, becomes a checkpoint that transformers loads. An --input that is
a checkpoint, a directory or a name of the hub, becomes a model directory of
rag_jax, with its tokenizers. (Training needs no conversion:
--config.generator.init_from takes the checkpoint itself.) Prints the name of
each tensor there and here. Weights that are a pytorch_model.bin only, as of
facebook/rag-*, are read by torch's weights-only loader: pip install
'rag_jax[parity]'.
"""

import os

from absl import flags

from rag_jax.api.checkpoints import export
from rag_jax.api.checkpoints import import_checkpoint
from rag_jax.commands import command
from rag_jax.weights import convert
from rag_jax.weights.hub import HUB_PREFIX
from rag_jax.weights.saved import is_ours
from rag_jax.weights.tensors import MAX_SHARD_BYTES

_INPUT = flags.DEFINE_string("input", None, "What to convert.")
_OUTPUT = flags.DEFINE_string("output", None, "The directory to write.")
_KIND = flags.DEFINE_enum(
  "kind", "", ["", *convert.KINDS], "What to export it as; '': what it is."
)
_MAX_SHARD_BYTES = flags.DEFINE_integer(
  "max_shard_bytes",
  MAX_SHARD_BYTES,
  "Most bytes of an exported file.",
  lower_bound=1,
)
_OVERWRITE = flags.DEFINE_bool(
  "overwrite", False, "Overwrite an output that exists."
)
flags.DEFINE_bool("debug", False, "Show where an error came from.")
flags.mark_flags_as_required(["input", "output"])


def main(argv: list[str]) -> None:
  """Runs the command."""
  source = os.path.expanduser(_INPUT.value or "")
  output = os.path.expanduser(_OUTPUT.value or "")
  overwrite = bool(_OVERWRITE.value)
  if not source.startswith(HUB_PREFIX) and is_ours(source):
    report = export(
      source,
      output,
      kind=_KIND.value or "",
      max_shard_bytes=_MAX_SHARD_BYTES.value or MAX_SHARD_BYTES,
      overwrite=overwrite,
    )
    done = "Wrote a checkpoint of transformers to"
  else:
    if _KIND.value:
      raise ValueError(
        f"--kind={_KIND.value} is for an export, but {source} is no workdir and"
        " no model directory of rag_jax. Omit --kind to import a checkpoint."
      )
    report = import_checkpoint(source, output, overwrite=overwrite)
    done = "Wrote a model directory of rag_jax to"
  print(report)
  print(f"{done} {output}.")


def run() -> None:
  """Runs `main`."""
  command.run(main)
