r"""Trains retriever and generator together, and evaluates them.

  rag-jax train --config=configs/quickstart.py --workdir=runs/quickstart

Every setting is also a flag: --config.train.num_steps=200; rag_jax/config.py
lists them. The workdir gets checkpoints, metrics.jsonl, TensorBoard files, and
at the end model, index, results.json and learning_curves.png. The same command
again continues from the last checkpoint; Ctrl-C saves a checkpoint first.
"""

import sys
from typing import Any

from absl import flags
import jax
from ml_collections import config_flags

from rag_jax.api.runs import train
from rag_jax.commands import command
from rag_jax.commands.config_flag import check_config
from rag_jax.evaluation.report import table
from rag_jax.training.interrupt import StoppedEarlyError
from rag_jax.training.workdir import keep_compiled

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "The config of the experiment."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the run is written.")
_CACHE_DIR = flags.DEFINE_string(
  "cache_dir", "", "Where compiled programs are kept; '': in ~/.cache."
)
flags.DEFINE_bool("debug", False, "Show where an error came from.")
command.define_pod_flags()
_RESUME_FROM = flags.DEFINE_integer(
  "resume_from", None, "Step of a checkpoint to go back to, with other learning"
  " rates and the like. Later checkpoints are set aside.",
)  # fmt: skip
_MIN_INDEX_RECALL = flags.DEFINE_float(
  "min_index_recall", None, "Refuse to train or evaluate with an index whose"
  " recall is lower, 0 to 1; the same as --config.index.min_recall.",
)  # fmt: skip
flags.mark_flags_as_required(["config", "workdir"])


def main(argv: list[str]) -> None:
  """Runs the command."""
  if _MIN_INDEX_RECALL.value is not None:
    _CONFIG.value.index.min_recall = _MIN_INDEX_RECALL.value
  keep_compiled(_CACHE_DIR.value or "")
  results = train(
    _CONFIG.value,
    _WORKDIR.value or "",
    resume_from=_RESUME_FROM.value,
    overridden=_overridden(),
  )
  if jax.process_index():
    return
  print(table(results))
  print(f"Ask it: rag-jax ask --workdir={_WORKDIR.value}")


def _overridden() -> dict[str, Any]:
  """Returns the config file's values of settings that flags override."""
  names = config_flags.get_override_values(flags.FLAGS["config"])
  return {name: flags.FLAGS[f"config.{name}"].default for name in names}


def run() -> None:
  """Runs `main`; an interrupted run says how to continue."""
  command.keep_freed_memory()
  try:
    command.run(
      main,
      check=check_config,
      interrupted="Stopped. Run the same command again to continue.",
      agreed=(StoppedEarlyError,),
    )
  except StoppedEarlyError as stopped:
    print(stopped, file=sys.stderr)
    sys.exit(128 + stopped.signum)
