r"""Says whether a config fits TPUs, and how fast it can be.

  rag-jax plan --config=configs/nq_rag_token.py --topology=v5e:8x8

Compiles the real training step for chips that are not here (libtpu: pip install
'rag_jax[tpu]') and prints the memory, arithmetic and traffic of each chip. If
the step does not fit, it looks for settings that make it fit. Settings are
flags, as for training: --config.train.remat=full. With train.num_steps=0 the
plan is that of embedding all passages.
"""

import json
import pathlib
from typing import Any

from absl import flags
from absl import logging
import jax
from ml_collections import config_flags

from rag_jax.benchmarks import embedding_plan
from rag_jax.benchmarks import plan as plans
from rag_jax.commands import command
from rag_jax.commands.config_flag import check_config

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "The config of the experiment."
)
_TOPOLOGY = flags.DEFINE_string(
  "topology", None, "A chip and how many of them in each direction: v5e:8x8."
)
_NUM_PASSAGES = flags.DEFINE_integer(
  "num_passages", 0, "Passages to search; 0: data.num_passages of the config.",
  lower_bound=0,
)  # fmt: skip
_OUTPUT = flags.DEFINE_string(
  "output", "", "JSON file for the plan; '': none is written."
)
_PROGRAM = flags.DEFINE_string(
  "program", "", "File for the text of the compiled program; '': none."
)
_SUGGEST = flags.DEFINE_bool(
  "suggest", True, "If it does not fit, compile settings that may make it fit."
)
flags.DEFINE_bool("debug", False, "Show where an error came from.")
flags.mark_flags_as_required(["config", "topology"])


def main(argv: list[str]) -> None:
  """Runs the command."""
  # Nothing runs; a TPU that JAX looks for is not here.
  jax.config.update("jax_platforms", "cpu")
  topology = _TOPOLOGY.value or ""
  output = _writable("output", _OUTPUT.value or "")
  program = _writable("program", _PROGRAM.value or "")
  config = _CONFIG.value
  if config.contrastive.num_steps and not config.train.num_steps:
    raise ValueError(
      "The config trains in the contrastive stage alone (train.num_steps=0),"
      " which has no plan; expected a main stage, or no training at all. Set"
      " contrastive.num_steps=0 for the plan of embedding all passages."
    )
  if config.contrastive.num_steps:
    logging.warning(
      "The plan is that of the main stage. A step of the contrastive stage, of"
      " %d questions with %d passages each, is not in it.",
      *(config.contrastive.batch_size, 1 + config.contrastive.negatives),
    )
  given = config, topology, _NUM_PASSAGES.value or 0
  if config.train.num_steps:
    plan = plans.make_plan(*given)
    text = plans.report(plan)
  else:
    plan = embedding_plan.make_embedding_plan(*given)
    text = embedding_plan.report(plan)
  if program and plan.program:
    program.write_text(plan.program, encoding="utf-8")
  print(text, flush=True)
  result = plan.as_json()
  if isinstance(plan, plans.Plan) and not plan.fits_chip and _SUGGEST.value:
    result["suggestion"] = _suggested(plan)
  if output:
    output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"Written to {output}.")


def _suggested(plan: plans.Plan) -> dict[str, Any] | None:
  """Prints and returns settings with which the step fits, or None."""
  for changes, config in plans.suggest(plan):
    flags_ = " ".join(f"--config.{k}={v}" for k, v in changes.items())
    print(f"\nTrying {flags_}", flush=True)
    changed = plans.make_plan(config, plan.topology, plan.num_passages)
    gib = changed.hbm_peak / 2**30
    if changed.fits_chip:
      print(
        f"It fits: {gib:.2f} GiB, at best {changed.step_secs:.4f} s per step,"
        f" MFU {changed.mfu:.2f}."
      )
      return {"settings": changes, "plan": changed.as_json()}
    print(f"It needs {gib:.2f} GiB.")
  print("\nNo settings were found that make it fit: take a larger topology.")
  return None


def _writable(flag: str, output: str) -> pathlib.Path | None:
  """Returns the path of the plan, if it can be written there.

  Raises:
    ValueError: it cannot. Said before the step is compiled for minutes.
  """
  if not output:
    return None
  path = pathlib.Path(output).expanduser()
  if path.is_dir() or not path.parent.is_dir():
    raise ValueError(
      f"--{flag}={output} cannot be written. Expected a file in a folder that"
      " exists, such as plan.json. Create the folder, or choose another file."
    )
  return path


def run() -> None:
  """Runs `main`."""
  command.run(main, check=check_config, interrupted="Stopped.")
