r"""Measures training, generating and encoding against transformers in PyTorch.

  python tools/benchmark_hf.py --sizes=base --output=benchmark.json

Both sides have the same random weights and inputs (hf_cases.py) and the same
CPU cores, and take turns. With --questions=xquad.en.json there are also cases
that start from its questions and paragraphs as text (hf_strings.py). Prints a
table in Markdown; the medians, each run and the machine go to --output as JSON.
Needs the extra `parity`.
"""

import gc
import importlib.util
import json
import os
import pathlib
import time
from typing import Any

from absl import flags
import benchmark_report
from etils import epath
import jax

from rag_jax.artifacts import write_atomically
from rag_jax.benchmarks import trace_costs
from rag_jax.benchmarks.machine import describe_machine
from rag_jax.commands import command
from rag_jax.corpus.text_files import find_file

_SIZES = flags.DEFINE_list("sizes", ["base"], "Of tiny, base and large.")
_CASES = flags.DEFINE_list("cases", [], "What to measure; empty: everything.")
_QUESTIONS = flags.DEFINE_string(
  "questions",
  "",
  "File in SQuAD's format, whose questions and paragraphs the cases from"
  " strings read. Empty: without these cases.",
)
_NUM_QUESTIONS = flags.DEFINE_integer(
  "num_questions", 64, "Of --questions, at equal distances."
)
_PASSAGE_WORDS = flags.DEFINE_integer(
  "passage_words",
  0,
  "Words per passage of --questions, as 100 in DPR; 0: each paragraph is one.",
)
_REPETITIONS = flags.DEFINE_integer("repetitions", 3, "Runs of each side.")
_OUTPUT = flags.DEFINE_string("output", "", "JSON file to write.")
_DTYPE = flags.DEFINE_enum(
  "dtype", "float32", ["float32", "bfloat16"], "That both compute with."
)
_DEVICE = flags.DEFINE_enum("device", "cpu", ["cpu", "gpu"], "Of both.")
_CORES = flags.DEFINE_integer("cores", 2, "CPU cores that both may use.")
_PROFILE = flags.DEFINE_string(
  "profile", "", "Instead: where our time goes in this case, by operation."
)
_PROFILE_DIR = flags.DEFINE_string(
  "profile_dir", "runs/profile", "In a new folder here --profile's trace is."
)
_CACHE_DIR = flags.DEFINE_string(
  "cache_dir",
  "",
  "Folder of compiled programs. Empty: none, other than in the other tools, so"
  " that compile_secs is what it takes to compile.",
)


def _choose(flag: str, given: list[str], choices: list[str]) -> list[str]:
  """Returns `given`, or raises `ValueError` if it names something unknown."""
  unknown = [name for name in given if name not in choices]
  if unknown or not given:
    raise ValueError(
      f"--{flag}={','.join(given)} names {unknown or 'nothing'}; expected some"
      f" of {choices}. Give one or several, with commas between."
    )
  return given


def _prepare() -> None:
  """Sets what has to be set before the first array.

  Raises:
    ImportError: PyTorch is not installed.
    ValueError: a number is out of range.
    FileNotFoundError: the output has nowhere to go, or there are no questions.
  """
  for flag in (_REPETITIONS, _CORES, _NUM_QUESTIONS):
    if flag.value < 1:
      raise ValueError(
        f"--{flag.name}={flag.value} measures nothing; expected 1 or more."
        f" Give another, or leave it at {flag.default}."
      )
  if _QUESTIONS.value:
    try:
      find_file(_QUESTIONS.value, "a .json file in SQuAD's format")
    except (FileNotFoundError, ValueError) as error:
      raise type(error)(f"--questions={_QUESTIONS.value}: {error}") from None
  if _PASSAGE_WORDS.value < 0:
    raise ValueError(
      f"--passage_words={_PASSAGE_WORDS.value} is negative; expected the words"
      " of a passage, or 0 for whole paragraphs. Give one of them."
    )
  if importlib.util.find_spec("torch") is None:
    raise ImportError(
      "PyTorch is not installed; expected it beside transformers, to compare"
      ' with. Install the extra `parity`: pip install -e ".[parity]"'
    )
  output = pathlib.Path(_OUTPUT.value or "").expanduser()
  if not output.parent.is_dir():
    raise FileNotFoundError(
      f"--output={_OUTPUT.value}: there is no folder {output.parent}, expected"
      " to write into. Make it, or give another path."
    )
  available = sorted(os.sched_getaffinity(0))
  os.sched_setaffinity(0, available[: _CORES.value])
  jax.config.update("jax_platforms", {"gpu": "cuda"}.get(_DEVICE.value, "cpu"))
  jax.config.update("jax_enable_compilation_cache", bool(_CACHE_DIR.value))
  if _CACHE_DIR.value:
    jax.config.update("jax_compilation_cache_dir", _CACHE_DIR.value)
  if _DEVICE.value == "gpu" and _DTYPE.value == "float32":
    # Otherwise JAX multiplies in TF32 and PyTorch does not.
    jax.config.update("jax_default_matmul_precision", "highest")


def _profile(case: Any, folder: pathlib.Path) -> None:
  """Prints where the time of ours goes."""
  case.ours()  # compiles
  secs, _ = benchmark_report.timed(case.ours)
  print(trace_costs.profile(case.ours, folder))
  print(f"\nOne run took {secs:.3f} s before. The trace is in {folder}.")


def main(argv: list[str]) -> None:
  """Runs the command."""
  _prepare()
  folder = pathlib.Path(_PROFILE_DIR.value or "").expanduser()
  folder /= time.strftime(f"{_PROFILE.value}-%Y%m%d-%H%M%S")
  if _PROFILE.value:
    trace_costs.dump_programs(folder)
  import hf_cases  # not above: it needs PyTorch
  import hf_strings
  import torch

  torch.set_num_threads(len(os.sched_getaffinity(0)))
  sizes = _choose("sizes", _SIZES.value, list(hf_cases.SIZES))
  cases = hf_cases.CASES | hf_strings.CASES
  names = list(cases if _QUESTIONS.value else hf_cases.CASES)
  if _PROFILE.value:
    names = _choose("profile", [_PROFILE.value], list(cases))
  elif _CASES.value:
    names = _choose("cases", _CASES.value, list(cases))
  without = [name for name in names if name in hf_strings.CASES]
  if without and not _QUESTIONS.value:
    raise ValueError(
      f"{', '.join(without)}: these cases start from strings, but --questions"
      " is empty; expected a file in SQuAD's format. Give one, for instance"
      " --questions=xquad.en.json, or leave these cases out."
    )
  if _DEVICE.value == "gpu" and not torch.cuda.is_available():
    raise ValueError(
      "--device=gpu, but PyTorch finds no GPU; expected one that PyTorch and"
      " JAX both can use. Install their CUDA builds, or give --device=cpu."
    )
  gpu = torch.cuda.get_device_name() if _DEVICE.value == "gpu" else ""
  load = os.getloadavg()[0]
  packages = ("jax", "flax", "optax", "torch", "transformers")
  machine = describe_machine(load, packages)
  machine |= {"torch_threads": torch.get_num_threads(), "gpu": gpu}
  if load > 0.5:
    benchmark_report.log(
      f"Others use this machine too (load {load:.1f}). It has to be"
      " idle: PyTorch's threads wait for each other, JAX's less so."
    )
  rows = []
  for size in sizes:
    for name in names:
      benchmark_report.log(f"{name}, size {size}")
      setup = hf_cases.Setup(
        hf_cases.SIZES[size],
        _DTYPE.value,
        _DEVICE.value,
        _QUESTIONS.value,
        _NUM_QUESTIONS.value,
        _PASSAGE_WORDS.value,
      )
      case = cases[name](setup)
      if _PROFILE.value:
        _profile(case, folder)
        continue
      numbers = benchmark_report.measure(case, _REPETITIONS.value)
      numbers |= {"dtype": _DTYPE.value, "device": _DEVICE.value}
      rows.append({"case": name, "size": size} | numbers)
      del case  # before the next is made: a large one fills the memory
      gc.collect()
      jax.clear_caches()
      if _OUTPUT.value:  # what is measured stays, whatever comes
        text = json.dumps({"rows": rows, "machine": machine}, indent=2)
        write_atomically(epath.Path(_OUTPUT.value).expanduser(), text)
  if rows:
    print(benchmark_report.table(rows))


if __name__ == "__main__":
  command.run(main)
