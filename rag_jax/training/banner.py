"""Summarises a run in a few lines, for the beginning of its log.

In: an experiment, its questions and its folder. Out: text.
"""

from collections.abc import Mapping, Sequence
import math
import os

from etils import epath
import jax

from rag_jax.config import Config
from rag_jax.config_rules import fields
from rag_jax.data.experiment import Experiment
from rag_jax.data.questions import Question


def banner(
  experiment: Experiment,
  workdir: epath.PathLike,
  questions: Mapping[str, Sequence[Question]],
) -> str:
  """Returns parameters, data, stages, devices and changed settings, as text.

  Args:
    experiment: of the run.
    workdir: of the run; its config.json has all settings.
    questions: of each split, by its name.
  """
  config = experiment.config
  shapes = jax.eval_shape(experiment.init, jax.random.key(0))
  counts = {
    name: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(part))
    for name, part in shapes.items()
  }
  parts = ", ".join(f"{name} {_short(count)}" for name, count in counts.items())
  asked = ", ".join(f"{len(qs):,} {split}" for split, qs in questions.items())
  steps = []
  if config.warmup.num_steps:
    warmup = config.warmup
    steps.append(
      f"warm-up, {warmup.num_steps:,} steps of {warmup.batch_size} passages"
    )
  if config.contrastive.num_steps:
    stage = config.contrastive
    steps.append(
      f"contrastive, {stage.num_steps:,} steps of {stage.batch_size} questions"
      f" with {1 + stage.negatives} passages"
    )
  steps.append(f"{config.train.num_steps:,} steps of {config.train.batch_size}")
  mesh = ", ".join(f"{k}={v}" for k, v in experiment.mesh.shape.items())
  devices = experiment.mesh.devices.flat
  kind = f"{devices[0].platform}, {devices[0].device_kind}"
  defaults = {name: value for name, _, value in fields(Config())}
  changed = [
    f"    {name}={value!r}"
    for name, _, value in fields(config)
    if value != defaults[name]
  ]
  return "\n".join([
    f"{os.fspath(workdir)} (config.json has every setting)",
    f"  parameters  {_short(sum(counts.values()))}: {parts}",
    f"  passages    {len(experiment.passages):,}",
    f"  questions   {asked}",
    f"  stages      {', then '.join(steps)} questions",
    f"  devices     {experiment.mesh.devices.size} ({kind}); {mesh}",
    f"  set here    {len(changed)} settings differ from the defaults:",
    *changed,
  ])  # fmt: skip


def _short(count: int) -> str:
  """Returns a number of parameters, such as "1.28 M"."""
  for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
    if count >= size:
      return f"{count / size:.3g} {unit}"
  return str(count)
