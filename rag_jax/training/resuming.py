"""Checks that a run can continue from a checkpoint.

In: the checkpoint's record of its inputs, and the run. Out: nothing, or an
error that says what has changed.
"""

from collections.abc import Mapping

from rag_jax.training.stages import Stage


def check_identity(
  saved: Mapping[str, str], ours: Mapping[str, str], step: int
) -> None:
  """Raises `ValueError` if the checkpoint of `step` had other inputs."""
  changed = [name for name, value in ours.items() if saved[name] != value]
  if changed:
    # The rule that splits words has changed since some runs began.
    rule = " set index.word_rule=1," if "BM25 settings" in changed else ""
    raise ValueError(
      f"The checkpoint of step {step} was made with other"
      f" {' and '.join(changed)}: what the config names has changed since."
      f" Put the old files back,{rule} or start in another --workdir."
    )


def check_end(stage: Stage, step: int) -> None:
  """Raises `ValueError` if `step` is beyond `stage`, the last of the run."""
  if step > stage.first_step + stage.num_steps:
    raise ValueError(
      f"The checkpoint of step {step} is beyond the end of the run:"
      f" train.num_steps={stage.num_steps}, after {stage.first_step} of the"
      " warm-up. Expected a run with steps left. Set train.num_steps to"
      f" {step - stage.first_step} or more, or start in another --workdir."
    )
