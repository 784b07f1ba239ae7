"""What was read from a checkpoint, for a person to check.

In: each tensor that was mapped or ignored. Out: a table in which the layers of
a model are one line, and the number of parameters.
"""

from collections.abc import Sequence
import dataclasses
import math
import re

from rag_jax.weights.mapping import Mapped
from rag_jax.weights.mapping import Taken

_OUR_LAYER = re.compile(r"\blayer_(\d+)\b")
_THEIR_LAYER = re.compile(r"\b(layers?|block|h)\.(\d+)\b")


@dataclasses.dataclass(frozen=True, slots=True)
class Report:
  """Of one model, or of the parts of one."""

  mapped: tuple[Mapped, ...]
  ignored: tuple[tuple[str, str], ...]  # name, why
  notes: tuple[str, ...] = ()

  @classmethod
  def of(cls, taken: Taken, *notes: str) -> "Report":
    """Returns the report of one model; empty notes are left out."""
    told = (*taken.notes, *(note for note in notes if note))
    return cls(taken.mapped, taken.ignored, told)

  @property
  def num_parameters(self) -> int:
    """How many numbers were read."""
    return sum(math.prod(line.shape) for line in self.mapped)

  def below(self, ours: str) -> "Report":
    """Returns the report of the same model as part `ours` of a larger one."""
    return dataclasses.replace(
      self,
      mapped=tuple(
        dataclasses.replace(line, ours=f"{ours}/{line.ours}")
        for line in self.mapped
      ),
    )

  def __add__(self, other: "Report") -> "Report":
    return Report(
      self.mapped + other.mapped,
      self.ignored + other.ignored,
      self.notes + tuple(n for n in other.notes if n not in self.notes),
    )

  def __str__(self) -> str:
    return self.table()

  def table(self) -> str:
    """Returns the table as text, layers that are alike in one line."""
    rows = [("theirs", "ours", "shape", "parameters")]
    for group in _groups(self.mapped):
      shape = list(group[0].shape)
      theirs, ours = (_compact([getattr(line, side) for line in group])
                      for side in ("theirs", "ours"))  # fmt: skip
      count = sum(math.prod(line.shape) for line in group)
      rows.append((theirs, ours, str(shape), f"{count:,}"))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [
      "  ".join(
        cell.rjust(width) if i == 3 else cell.ljust(width)
        for i, (cell, width) in enumerate(zip(row, widths, strict=True))
      )
      for row in rows
    ]
    lines.append(f"{self.num_parameters:,} parameters in all")
    lines += [f"ignored: {name} ({why})" for name, why in self.ignored]
    return "\n".join(lines + [f"note: {note}" for note in self.notes])


def _groups(mapped: Sequence[Mapped]) -> list[list[Mapped]]:
  """Returns the lines by their names without the numbers of layers."""
  groups: dict[tuple[str, ...], list[Mapped]] = {}
  for line in mapped:
    key = (
      _THEIR_LAYER.sub(r"\1.*", line.theirs, count=1),
      _OUR_LAYER.sub("layer_*", line.ours),
      str(line.shape),
    )
    groups.setdefault(key, []).append(line)
  return list(groups.values())


def _compact(names: Sequence[str]) -> str:
  """Returns one name for those that differ in the number of their layer."""
  first = names[0]
  pattern = _OUR_LAYER if "/" in first else _THEIR_LAYER
  match = pattern.search(first)
  if match is None or len(names) == 1:
    return first
  numbers = [int(pattern.search(name)[match.lastindex or 1]) for name in names]  # pyright: ignore[reportOptionalSubscript]  (they are alike)
  start, end = match.span(match.lastindex or 1)
  return f"{first[:start]}{{{min(numbers)}..{max(numbers)}}}{first[end:]}"
