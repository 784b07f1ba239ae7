r"""Converts checkpoints of Hugging Face's transformers, in and out.

  python tools/convert_hf.py --input=runs/exportable --output=exports/exportable
  python tools/convert_hf.py --input=hf:facebook/bart-base --output=models/bart

--input is the workdir of a finished run, or a model directory that this command
wrote: it becomes a checkpoint that transformers loads. Or it is a checkpoint, a
directory or a name of the hub: it becomes a model directory of rag_jax, with
its tokenizers. (Training needs no conversion: --config.generator.init_from
takes the checkpoint itself.) Prints what each tensor is called there and here.
Where the weights are a pytorch_model.bin alone, as of facebook/rag-*, torch's
loader of weights alone reads it: pip install 'rag_jax[parity]'.
"""

import os

from absl import app
from absl import flags
import command
import pickles

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
  "max_shard_bytes", MAX_SHARD_BYTES, "Of one exported file.", lower_bound=1
)
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "An output that exists.")
flags.DEFINE_bool("debug", False, "Show where an error came from.")
flags.mark_flags_as_required(["input", "output"])


def main(argv: list[str]) -> None:
  """Runs the command."""
  if len(argv) > 1:
    raise app.UsageError(f"Unexpected arguments: {argv[1:]}.")
  source = os.path.expanduser(_INPUT.value or "")
  output = os.path.expanduser(_OUTPUT.value or "")
  convert.check_output(source, output, overwrite=_OVERWRITE.value)
  if not source.startswith(HUB_PREFIX) and is_ours(source):
    report = convert.export_model(
      source, output, _KIND.value, _MAX_SHARD_BYTES.value
    )
    done = "Wrote a checkpoint of transformers to"
  else:
    if _KIND.value:
      raise ValueError(
        f"--kind={_KIND.value} is for an export, but {source} is no workdir and"
        " no model directory of rag_jax. Leave it away to import a checkpoint."
      )
    report = pickles.import_any(source, output)
    done = "Wrote a model directory of rag_jax to"
  print(report)
  print(f"{done} {output}.")


if __name__ == "__main__":
  command.run(main)
