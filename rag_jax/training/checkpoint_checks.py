"""What a checkpoint can hold, and whether a run can continue from it.

In: a state, the JSON beside it, the shapes and dtypes that a manifest names,
the record of the inputs of the run that saved it. Out: nothing, or an error
that names what does not fit.
"""

from collections.abc import Iterator, Mapping, Sequence
import json
from typing import Any

import jax
from jaxtyping import PyTree

from rag_jax.training.stages import Stage

_NAMES_SHOWN = 10  # in a message about arrays that do not fit


def _leaves(tree: PyTree) -> Iterator[tuple[str, Any]]:
  """Yields ("params/encoder/kernel", leaf) of every leaf."""
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    yield jax.tree_util.keystr(path, simple=True, separator="/"), leaf


def arrays_of(tree: PyTree) -> dict[str, list[Any]]:
  """Returns [shape, dtype] of every array, as JSON can hold it."""
  return {
    name: [list(leaf.shape), str(leaf.dtype)] for name, leaf in _leaves(tree)
  }


def check_state(state: PyTree) -> None:
  """Raises `TypeError` unless every leaf is a `jax.Array`."""
  named = _leaves(state)
  bad = [f"{n}: {type(x)}" for n, x in named if not isinstance(x, jax.Array)]
  if bad:
    raise TypeError(
      f"The state to save has leaves that are no jax.Array: {_shown(bad)}."
      " Convert them with jnp.asarray, or put them into `extra`."
    )


def check_extra(extra: Mapping[str, Any]) -> None:
  """Raises `TypeError` unless JSON can hold `extra`."""
  for name, value in extra.items():
    try:
      json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
      raise TypeError(
        f"extra[{name!r}] cannot be saved as JSON: {error}. Expected finite"
        " numbers, strings, and lists and dicts of them. Convert it, or save"
        " arrays in the state."
      ) from error


def check_fit(
  saved: Mapping[str, Sequence[Any]], abstract_state: PyTree, *, origin: str
) -> None:
  """Raises `ValueError` unless the saved arrays are those of the state."""
  no_sharding = [
    name
    for name, leaf in _leaves(abstract_state)
    if getattr(leaf, "sharding", None) is None
  ]
  if no_sharding:
    raise ValueError(
      f"abstract_state has no sharding for {_shown(no_sharding)}; expected"
      " where to put each array. Give jax.ShapeDtypeStruct a `sharding`."
    )
  wanted = arrays_of(abstract_state)
  problems = []
  if unknown := [name for name in saved if name not in wanted]:
    problems.append(f"saved, but not expected: {_shown(unknown)}")
  if missing := [name for name in wanted if name not in saved]:
    problems.append(f"expected, but not saved: {_shown(missing)}")
  different = [
    f"{name}: saved as {_typed(saved[name])}, expected {_typed(spec)}"
    for name, spec in wanted.items()
    if name in saved and saved[name] != spec
  ]
  if different:
    problems.append(_shown(different, "\n  "))
  if problems:
    lines = "\n  ".join(problems)
    raise ValueError(
      f"The checkpoint {origin} has other arrays than the model and optimizer"
      f" of this config:\n  {lines}\nUse the config that it was trained with,"
      " or another workdir."
    )


def _typed(spec: Sequence[Any]) -> str:
  """Returns "float32[3,4]" of [[3, 4], "float32"]."""
  shape, dtype = spec
  return f"{dtype}[{','.join(map(str, shape))}]"


def _shown(names: Sequence[str], separator: str = ", ") -> str:
  """Returns the first of `names`, and how many more there are."""
  more = len(names) - _NAMES_SHOWN
  tail = [f"and {more} more"] if more > 0 else []
  return separator.join([*names[:_NAMES_SHOWN], *tail])


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
      " stages before. Expected a run with steps left. Set train.num_steps to"
      f" {step - stage.first_step} or more, or start in another --workdir."
    )
