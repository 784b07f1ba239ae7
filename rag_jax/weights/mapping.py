"""Maps tensors between the names and layouts of transformers and ours.

In: the tensors of a checkpoint and the rules of its architecture. Out: our
parameters, by path; and back, by the same rules. A rule moves numbers and never
computes, so what is written and read again is equal bit for bit.
"""

import collections
from collections.abc import Callable, Mapping
import dataclasses
import re
from typing import Literal

import flax.traverse_util
from jaxtyping import PyTree
import numpy as np

from rag_jax.weights.tensors import TensorFiles

Arrays = dict[str, np.ndarray]  # ours by path, as "layer_0/mlp/up/kernel"


@dataclasses.dataclass(frozen=True, slots=True)
class Rule:
  """How one tensor is named and laid out in transformers and here."""

  ours: str
  theirs: str
  shape: tuple[int, ...]  # ours
  their_shape: tuple[int, ...]
  transposed: bool = False  # PyTorch keeps kernels [out, in]
  optional: bool = False  # a missing one is read as zeros
  # (i, n): part i of n equal ones of their last axis; others have the rest.
  part: tuple[int, int] = (0, 1)

  def to_ours(self, array: np.ndarray) -> np.ndarray:
    """Returns their tensor, or our part of it, in our layout."""
    if self.part[1] > 1:
      array = np.split(array, self.part[1], axis=-1)[self.part[0]]
    return (array.T if self.transposed else array).reshape(self.shape)

  def to_theirs(self, array: np.ndarray) -> np.ndarray:
    """Returns our parameter in their layout: the tensor, or its part."""
    if self.transposed:
      return array.reshape(self.their_shape[::-1]).T
    if self.part[1] > 1:
      return array.reshape(*self.their_shape[:-1], -1)
    return array.reshape(self.their_shape)


@dataclasses.dataclass(frozen=True, slots=True)
class Redundant:
  """Tensors that say nothing new, or that nothing here reads.

  A "copy" must be equal to the tensor `of`, "positions" must count from zero,
  "zeros" must be zero; "unused" can hold anything.
  """

  theirs: str  # a name; of "unused" a regular expression
  why: str  # they are ignored
  kind: Literal["copy", "positions", "zeros", "unused"] = "unused"
  of: str = ""
  shape: tuple[int, ...] = ()  # of zeros
  written: bool = False  # exports have it too

  def covers(self, name: str) -> bool:
    """Returns whether this is about the tensor `name`."""
    if self.kind == "unused":
      return re.fullmatch(self.theirs, name) is not None
    return name == self.theirs


@dataclasses.dataclass(frozen=True, slots=True)
class Architecture:
  """All the tensors of a model whose sizes are known."""

  name: str  # as config.json calls it under `architectures`
  rules: tuple[Rule, ...]
  redundant: tuple[Redundant, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Mapped:
  """A tensor that was read: for the report."""

  theirs: str
  ours: str
  their_shape: tuple[int, ...]
  shape: tuple[int, ...]


class View:
  """The tensors of a checkpoint that belong to one model.

  Prefixes and old spellings are removed from their names.
  """

  def __init__(self, files: TensorFiles, rename: Callable[[str], str | None]):
    """Names each tensor what `rename` returns; None leaves it out."""
    self.files = files
    self._stored: dict[str, str] = {}  # by the name without prefix
    for stored in files.names:
      name = rename(stored)
      if name is None:
        continue
      if name in self._stored:
        raise ValueError(
          f"{files.origin} holds {stored} and {self._stored[name]}, two"
          f" spellings of {name}. Expected one; remove the other from the"
          " checkpoint."
        )
      self._stored[name] = stored

  def __contains__(self, name: str) -> bool:
    return name in self._stored

  @property
  def names(self) -> list[str]:
    """Without their prefix."""
    return sorted(self._stored)

  def stored(self, name: str) -> str:
    """Returns the name as it stands in the file, or as it would."""
    if name in self._stored:
      return self._stored[name]
    prefixes = collections.Counter(
      stored.removesuffix(name)
      for name, stored in self._stored.items()
      if stored.endswith(name)
    )
    return "".join(prefix for prefix, _ in prefixes.most_common(1)) + name

  def shape(self, name: str) -> tuple[int, ...]:
    """Returns the shape of a tensor."""
    return self.files.shape(self._stored[name])

  def read(self, name: str) -> np.ndarray:
    """Returns a tensor as float32."""
    return self.files.read(self._stored[name])

  def dtype(self, name: str) -> str:
    """Returns what safetensors calls the dtype of a tensor: "F32"."""
    return self.files.dtype(self._stored[name])

  def raw(self, name: str) -> np.ndarray:
    """Returns a tensor as it is stored."""
    return self.files.raw(self._stored[name])

  def equal(self, one: str, other: str) -> bool:
    """Returns whether two tensors have the same bits."""
    if self.shape(one) != self.shape(other):
      return False
    a, b = self.raw(one), self.raw(other)
    return a.dtype == b.dtype and a.tobytes() == b.tobytes()


def problems(view: View, architecture: Architecture) -> list[str]:
  """Returns a line for each kind of tensor that does not fit."""
  rules = {rule.theirs: rule for rule in architecture.rules}
  missing, misshapen = [], []
  for name, rule in rules.items():
    source = _source(view, architecture, name)
    if source is None:
      missing += [] if rule.optional else [view.stored(name)]
    elif view.shape(source) != rule.their_shape:
      misshapen.append(
        f"{view.stored(source)} is {list(view.shape(source))}, expected"
        f" {list(rule.their_shape)} for our {rule.ours} {list(rule.shape)}"
      )
  unknown, contradicting = [], []
  for name in view.names:
    if name in rules:
      continue
    redundant = _redundant(architecture, name)
    if redundant is None:
      unknown.append(view.stored(name))
    else:
      of = _source(view, architecture, redundant.of)
      contradicting += _contradictions(view, redundant, name, of)
  found = {
    "missing": missing,
    "unknown": unknown,
    "of another shape": misshapen,
    "contradicting": contradicting,
  }
  return [
    f"{kind}: {'; '.join(lines)}" for kind, lines in found.items() if lines
  ]


def _source(view: View, architecture: Architecture, name: str) -> str | None:
  """Returns where the tensor `name` stands: maybe under that of a copy."""
  if name in view:
    return name
  for redundant in architecture.redundant:
    if redundant.of == name and redundant.theirs in view:
      return redundant.theirs
  return None


def _redundant(architecture: Architecture, name: str) -> Redundant | None:
  for redundant in architecture.redundant:
    if redundant.covers(name):
      return redundant
  return None


def _contradictions(
  view: View, redundant: Redundant, name: str, of: str | None
) -> list[str]:
  """Returns why a redundant tensor is not what it should be, if it is not."""
  stored = view.stored(name)
  if redundant.kind == "copy":
    if of is not None and of != name and not view.equal(name, of):
      return [f"{stored} differs from {view.stored(of)}, its copy"]
  elif redundant.kind == "positions":
    positions = view.raw(name).reshape(-1)
    if not np.array_equal(positions, np.arange(positions.size)):
      return [f"{stored} does not count from zero"]
  elif redundant.kind == "zeros" and np.any(view.raw(name)):
    return [f"{stored} is not zero, as config.json says"]
  return []


def check(origin: str, found: Mapping[str, list[str]]) -> None:
  """Raises one `ValueError` that names all problems, by architecture."""
  lines = [f"{name}: {line}" for name, lines in found.items() for line in lines]
  if lines:
    raise ValueError(
      f"The tensors of {origin} are not what its config.json describes:\n  "
      + "\n  ".join(lines)
      + "\nExpected those of "
      + " and ".join(found)
      + ", all and no others. Files of different checkpoints were mixed, or the"
      " model has parts that rag_jax does not: save it from the class named."
    )


@dataclasses.dataclass(frozen=True, slots=True)
class Taken:
  """What was read, and what to tell about it."""

  params: PyTree
  mapped: tuple[Mapped, ...]
  ignored: tuple[tuple[str, str], ...]  # name, why
  notes: tuple[str, ...]


def take(view: View, architecture: Architecture) -> Taken:
  """Returns our parameters. Call it when there are no `problems`."""
  params: Arrays = {}
  mapped, dtypes = [], collections.Counter()
  used = set()
  for rule in architecture.rules:
    source = _source(view, architecture, rule.theirs)
    if source is None:
      params[rule.ours] = np.zeros(rule.shape, np.float32)
      theirs = "(missing: zeros)"
    else:
      params[rule.ours] = rule.to_ours(view.read(source))
      theirs = view.stored(source)
      dtypes[view.dtype(source)] += source not in used
      used.add(source)
    mapped.append(Mapped(theirs, rule.ours, rule.their_shape, rule.shape))
  ignored = [
    (view.stored(name), redundant.why)
    for name in view.names
    if name not in used
    and (redundant := _redundant(architecture, name)) is not None
  ]
  notes = [
    f"{count} tensors were {dtype} and are float32 now"
    for dtype, count in dtypes.items()
    if dtype != "F32"
  ]
  nested = flax.traverse_util.unflatten_dict(params, sep="/")
  return Taken(nested, tuple(mapped), tuple(ignored), tuple(notes))


def put(params: PyTree, architecture: Architecture) -> Arrays:
  """Returns the tensors of a checkpoint, for our parameters.

  Raises:
    ValueError: names every parameter that the architecture lacks, needs, or has
      of another shape.
  """
  flat = flax.traverse_util.flatten_dict(params, sep="/")
  ours: Arrays = {k: np.asarray(x, np.float32) for k, x in flat.items()}
  rules = {rule.ours: rule for rule in architecture.rules}
  wrong = [f"{path} is missing" for path in rules if path not in ours]
  wrong += [f"{path} has no place there" for path in ours if path not in rules]
  wrong += [
    f"{path} is {list(ours[path].shape)}, expected {list(rule.shape)}"
    for path, rule in rules.items()
    if path in ours and ours[path].shape != rule.shape
  ]
  if wrong:
    raise ValueError(
      f"The parameters are not those of {architecture.name} of this config:\n  "
      + "\n  ".join(wrong)
      + "\nExpected the parameters that were made with these fields. Give the"
      " config of the run that the parameters come from."
    )
  parts: dict[str, list[np.ndarray]] = {}
  for path, rule in rules.items():
    parts.setdefault(rule.theirs, []).append(rule.to_theirs(ours[path]))
  theirs = {
    name: np.concatenate(arrays, axis=-1) if arrays[1:] else arrays[0]
    for name, arrays in parts.items()
  }
  for redundant in architecture.redundant:
    if redundant.written and redundant.kind == "copy":
      theirs[redundant.theirs] = theirs[redundant.of]
    elif redundant.written:
      theirs[redundant.theirs] = np.zeros(redundant.shape, np.float32)
  return theirs
