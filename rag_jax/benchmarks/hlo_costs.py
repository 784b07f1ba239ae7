"""What a compiled program moves: to and from memory, and between devices.

In: the text of an optimized HLO module, from `jax.stages.Compiled.as_text`.
Out: bytes per device and run of the program. XLA's own cost analysis counts the
body of a loop once; here it counts as often as the loop runs.

Counted as memory traffic is what each instruction reads and writes outside of
registers and on-chip memory. A slice of an array counts as the slice alone, and
an update in place as what is updated.

Of a conditional all branches count. What the program itself calls rare, in a
`jax.named_scope` of the name `RARELY`, counts as never run.
"""

from collections.abc import Iterable, Iterator, Sequence
import dataclasses
import functools
import itertools
import math
import re

import numpy as np

from rag_jax.retrieval.device import RARELY

_ARRAY = re.compile(r"\b(pred|[subf]\d+\w*|bf16|c\d+)\[([\d,]*)\](\{[^}]*\})?")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(
  r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)$"
)
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
  r"\b(?:calls|body|to_apply|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_CONSTANT = re.compile(r"^\w+\[\]\S* constant\((\d+)\)")
_RARE = re.compile(rf'op_name="[^"]*/{RARELY}/')
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_CYCLES = re.compile(r'estimated_cycles":"(\d+)"')

# They move nothing themselves.
_FREE = frozenset({
  "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while",
  "conditional", "call", "after-all", "partition-id", "replica-id", "iota",
  "optimization-barrier", "add-dependency", "async-done", "async-update",
})  # fmt: skip
_READ_A_PART = frozenset({"dynamic-slice", "slice", "gather"})
# By name of the operation: bytes that a device of n sends, per byte of the
# larger of input and output, on a ring.
_SENT = {
  "all-reduce": lambda n: 2 * (n - 1) / n,
  "all-gather": lambda n: (n - 1) / n,
  "reduce-scatter": lambda n: (n - 1) / n,
  "all-to-all": lambda n: (n - 1) / n,
  "ragged-all-to-all": lambda n: (n - 1) / n,
  "collective-permute": lambda n: 1.0,
}


@dataclasses.dataclass(frozen=True, slots=True)
class Collective:
  """Bytes that collectives of one kind send over the same mesh axes."""

  kind: str  # "all-reduce", for instance
  axes: str  # of the mesh: "data", or "data+fsdp"
  bytes_sent: float  # by each device, in one run of the program
  num_runs: int


@dataclasses.dataclass(frozen=True, slots=True)
class Costs:
  """The costs of one run of a program on each device."""

  memory_bytes: float  # read and written
  collectives: tuple[Collective, ...]  # the largest first
  cycles: float  # estimated by the compiler; 0 if it says nothing
  num_instructions: int  # in the text
  unknown_loops: int  # whose number of runs the text does not say: taken as 1


@dataclasses.dataclass(frozen=True, slots=True)
class _Instruction:
  name: str
  is_root: bool
  type: str
  op: str
  operands: tuple[str, ...]
  rest: str  # attributes


def program_costs(text: str, axis_sizes: dict[str, int]) -> Costs:
  """Returns the costs of a compiled program.

  Args:
    text: of the optimized HLO module.
    axis_sizes: names and sizes of the mesh axes, the outermost first.
  """
  return _Program(text).costs(axis_sizes)


class _Program:
  """The computations of a module, by name."""

  def __init__(self, text: str):
    self._computations: dict[str, dict[str, _Instruction]] = {}
    self._entry = ""
    current: dict[str, _Instruction] = {}
    for line in text.splitlines():
      if not line.startswith(" ") and (match := _COMPUTATION.match(line)):
        current = self._computations[match[2]] = {}
        if match[1]:
          self._entry = match[2]
      elif match := _INSTRUCTION.match(line):
        root, name, type_, op, rest = match.groups()
        inside, attributes = _split_operands(rest)
        current[name] = _Instruction(
          name, bool(root), type_, op, tuple(_NAME.findall(inside)), attributes
        )
        if op in ("constant", "parameter"):  # a value in place of operands
          value = f"{type_} constant({inside})" if op == "constant" else inside
          current[name] = dataclasses.replace(current[name], rest=value)
    if not self._entry:
      raise ValueError(
        "The text is no HLO module: it has no ENTRY computation. Expected what"
        " Compiled.as_text() of jax returns."
      )
    self._unknown_loops = 0

  def costs(self, axis_sizes: dict[str, int]) -> Costs:
    """Returns the costs of one run."""
    runs, executed = self._runs()
    moved = cycles = 0.0
    for name, times in executed.items():
      instructions = self._computations[name]
      for instruction in instructions.values():
        moved += times * self._moved(instruction, instructions)
        found = _CYCLES.search(instruction.rest)
        cycles += times * int(found[1]) if found else 0
    return Costs(
      memory_bytes=moved,
      collectives=self._collectives(runs, axis_sizes),
      cycles=cycles,
      num_instructions=sum(map(len, self._computations.values())),
      unknown_loops=self._unknown_loops,
    )

  def _runs(self) -> tuple[dict[str, int], dict[str, int]]:
    """Returns how often each computation runs; again without the fused ones."""
    runs: dict[str, int] = {}
    executed: dict[str, int] = {}

    def visit(name: str, times: int, fused: bool) -> None:
      runs[name] = runs.get(name, 0) + times
      if not fused:
        executed[name] = executed.get(name, 0) + times
      for instruction in self._computations.get(name, {}).values():
        number = times
        if instruction.op in ("while", "conditional") and _RARE.search(
          instruction.rest
        ):
          continue
        if instruction.op == "while":
          number *= self._trips(instruction)
        called = _CALLED.findall(instruction.rest)
        for branches in _BRANCHES.findall(instruction.rest):
          called += _NAME.findall(branches)
        inside = fused or instruction.op not in ("while", "call", "conditional")
        for each in called:
          visit(each, number, inside)

    visit(self._entry, 1, False)
    return runs, executed

  def _trips(self, loop: _Instruction) -> int:
    """Returns how often a loop runs."""
    if found := _TRIPS.search(loop.rest):
      return int(found[1])
    condition = re.search(r"condition=%?([\w.\-]+)", loop.rest)
    limits = self._constants(condition[1]) if condition else []
    if len(limits) != 1:  # it compares a counter from 0 with its limit
      self._unknown_loops += 1
      return 1
    return limits[0]

  def _constants(self, computation: str) -> list[int]:
    """Returns the integers in a computation and in those that it calls."""
    values = []
    for instruction in self._computations.get(computation, {}).values():
      if found := _CONSTANT.match(instruction.rest):
        values.append(int(found[1]))
      for called in _CALLED.findall(instruction.rest):
        values += self._constants(called)
    return values

  def _moved(
    self, instruction: _Instruction, others: dict[str, _Instruction]
  ) -> int:
    """Returns the bytes of memory that an instruction reads and writes."""
    op = instruction.op
    if op in _FREE or op.endswith("-done"):
      return 0
    operands = [others[name] for name in instruction.operands if name in others]
    if op.endswith("-start"):  # the type has the operands too
      return _moved_by_start(instruction, operands)
    if op == "fusion":
      inside = self._called(instruction)
      return self._moved_by_fusion(instruction, operands, inside)
    if op in _READ_A_PART:
      read = _bytes(instruction.type) if _memory_bytes(operands[0].type) else 0
      return read + _memory_bytes(instruction.type)
    if op == "dynamic-update-slice":
      update = operands[1]
      in_memory = _memory_bytes(instruction.type) > 0
      return _memory_bytes(update.type) + in_memory * _bytes(update.type)
    read = sum(_memory_bytes(x.type) for x in operands)
    return read + _memory_bytes(instruction.type)

  def _moved_by_fusion(
    self,
    fusion: _Instruction,
    operands: Sequence[_Instruction],
    inside: dict[str, _Instruction],
  ) -> int:
    """Returns the bytes that a fusion reads and writes."""
    parameters = sorted(
      (x for x in inside.values() if x.op == "parameter"), key=_number
    )
    read = 0
    for operand, parameter in zip(operands, parameters, strict=False):
      whole = _memory_bytes(operand.type)
      if whole:
        read += min(whole, self._part_read(parameter, inside))
    root = next(x for x in inside.values() if x.is_root)
    written = 0
    for size, type_ in zip(
      self._written(root, inside), _array_types(fusion.type), strict=False
    ):
      if _memory_bytes(type_):
        written += min(size, _bytes(type_))
    return read + written

  def _part_read(
    self, source: _Instruction, inside: dict[str, _Instruction]
  ) -> int:
    """Returns the bytes that a fused computation reads of an array in it."""
    total = 0
    for user in inside.values():
      if source.name not in user.operands:
        continue
      first = user.operands[0] == source.name
      if user.op in _READ_A_PART and first:
        total += _bytes(user.type)
      elif user.op == "dynamic-update-slice" and first:
        continue  # in place
      elif user.op == "bitcast":
        total += self._part_read(user, inside)
      elif user.op == "fusion":
        nested = self._called(user)
        for parameter in nested.values():
          if parameter.op == "parameter" and (
            user.operands[_number(parameter)] == source.name
          ):
            total += self._part_read(parameter, nested)
      else:
        return _bytes(source.type)
    return total

  def _written(
    self, root: _Instruction, inside: dict[str, _Instruction]
  ) -> Iterator[int]:
    """Yields the bytes that a computation writes of each of its results."""
    if root.op == "tuple":
      for name in root.operands:
        yield from self._written(inside[name], inside)
    elif root.op == "bitcast" and root.operands[0] in inside:
      yield from self._written(inside[root.operands[0]], inside)
    elif root.op == "dynamic-update-slice":
      yield _bytes(inside[root.operands[1]].type)
    elif root.op == "fusion":
      nested = self._called(root)
      last = next(x for x in nested.values() if x.is_root)
      yield from self._written(last, nested)
    else:
      yield from map(_bytes, _array_types(root.type))

  def _called(self, fusion: _Instruction) -> dict[str, _Instruction]:
    """Returns the computation of a fusion."""
    called = _CALLED.search(fusion.rest)
    assert called is not None
    return self._computations[called[1]]

  def _collectives(
    self, runs: dict[str, int], axis_sizes: dict[str, int]
  ) -> tuple[Collective, ...]:
    """Returns the collectives, summed by kind and mesh axes."""
    found: dict[str, tuple[str, str, float, int]] = {}
    for computation, instructions in self._computations.items():
      for instruction in instructions.values():
        kind = instruction.op.removesuffix("-start")
        if kind not in _SENT:
          continue
        result = instruction.type
        # That of a start is a tuple of operands and results.
        if instruction.op.endswith("-start"):
          result = max(_array_types(result), key=_bytes)
        operands = [
          instructions[name]
          for name in instruction.operands
          if name in instructions
        ]
        size = max(_bytes(result), sum(_bytes(x.type) for x in operands))
        axes, number = _axes_of(instruction.rest, axis_sizes)
        sent = size * _SENT[kind](number) if number > 1 else 0.0
        # The pieces of an asynchronous collective have one channel; but so do
        # all collectives that jax.shard_map makes.
        channel = re.search(r"channel_id=(\d+)", instruction.rest)
        key = f"{computation}/{instruction.name}"
        if channel:
          op_name = _OP_NAME.search(instruction.rest)
          arrays = [match.groups()[:2] for match in _ARRAY.finditer(result)]
          key = f"{channel[1]} {kind} {arrays} {op_name and op_name[1]}"
        times = runs.get(computation, 0)
        if key not in found or found[key][3] < times:
          found[key] = kind, axes, sent, times
    sums: dict[tuple[str, str], tuple[float, int]] = {}
    for kind, axes, sent, times in found.values():
      before, runs_before = sums.get((kind, axes), (0.0, 0))
      sums[kind, axes] = before + sent * times, runs_before + times
    collectives = [
      Collective(kind, axes, sent, times)
      for (kind, axes), (sent, times) in sums.items()
      if sent
    ]
    return tuple(sorted(collectives, key=lambda c: -c.bytes_sent))


def _split_operands(text: str) -> tuple[str, str]:
  """Returns what stands before and after the parenthesis that closes."""
  depth = 1
  for match in re.finditer(r"[()]", text):
    depth += 1 if match[0] == "(" else -1
    if not depth:
      return text[: match.start()], text[match.end() :]
  return text, ""


@functools.lru_cache(maxsize=100_000)
def _array_types(type_: str) -> tuple[str, ...]:
  """Returns the arrays of a type; several if it is a tuple."""
  return tuple(match[0] for match in _ARRAY.finditer(type_))


@functools.lru_cache(maxsize=100_000)
def _bytes(type_: str) -> int:
  """Returns the bytes of a type, wherever its arrays lie."""
  return sum(map(_size, _ARRAY.finditer(type_)))


@functools.lru_cache(maxsize=100_000)
def _memory_bytes(type_: str) -> int:
  """Returns the bytes of the arrays of a type that lie in main memory."""
  return sum(
    _size(match)
    for match in _ARRAY.finditer(type_)
    if not re.search(r"S\([1-9]", match[3] or "")
  )


def _size(match: re.Match[str]) -> int:
  kind, dims, _ = match.groups()
  bits = 8 if kind == "pred" else int(kind.lstrip("abcfsu").split("e")[0])
  number = math.prod(map(int, dims.split(","))) if dims else 1
  return -(-number * bits // 8)


def _moved_by_start(
  instruction: _Instruction, operands: Sequence[_Instruction]
) -> int:
  """Returns the bytes that an asynchronous copy, slice or collective moves."""
  types = _array_types(instruction.type)
  read = sum(_memory_bytes(x.type) for x in operands)
  if instruction.op == "copy-start":  # (result, operand, context)
    return read + _memory_bytes(types[0])
  results = types[len(operands) : 2 * len(operands)]  # ((operands), results)
  if instruction.op == "slice-start":
    read = sum(map(_bytes, results)) if read else 0
  return read + sum(map(_memory_bytes, results))


def _number(parameter: _Instruction) -> int:
  """Returns the position of a parameter of a computation."""
  return int(parameter.rest)


def _axes_of(rest: str, axis_sizes: dict[str, int]) -> tuple[str, int]:
  """Returns the mesh axes that a collective runs over, and its group size."""
  groups = _groups(rest, math.prod(axis_sizes.values()))
  size = max(map(len, groups), default=1)
  ids = np.arange(math.prod(axis_sizes.values())).reshape(*axis_sizes.values())
  names = [name for name, length in axis_sizes.items() if length > 1]
  for number in range(1, len(names) + 1):
    for chosen in itertools.combinations(names, number):
      if math.prod(axis_sizes[name] for name in chosen) != size:
        continue
      last = [list(axis_sizes).index(name) for name in chosen]
      moved = np.moveaxis(ids, last, range(-number, 0)).reshape(-1, size)
      if {frozenset(row) for row in moved.tolist()} == set(groups):
        return "+".join(chosen), size
  return "other", size


def _groups(rest: str, num_devices: int) -> list[frozenset[int]]:
  """Returns the groups of devices that communicate."""
  if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", rest):
    # Of a permutation: the devices that are connected, whatever the distance.
    edges = [
      tuple(map(int, pair)) for pair in re.findall(r"(\d+),(\d+)", pairs[1])
    ]
    return _connected(edges)
  if listed := re.search(r"replica_groups=\{(\{.*?\})\}", rest):
    return [
      frozenset(map(int, group.split(",")))
      for group in re.findall(r"\{([\d,]+)\}", listed[1])
    ]
  if iota := re.search(
    r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest
  ):
    shape, dims, order = (
      tuple(map(int, part.split(","))) if part else () for part in iota.groups()
    )
    ids = np.arange(math.prod(dims)).reshape(dims)
    ids = ids.transpose(order) if order else ids
    return [frozenset(row) for row in ids.reshape(shape).tolist()]
  if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", rest):
    sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
    along = re.findall(r"'([^']+)'", mesh[2])
    ids = np.arange(num_devices).reshape([int(n) for n in sizes.values()])
    places = [list(sizes).index(name) for name in along]
    ids = np.moveaxis(ids, places, range(-len(along), 0))
    size = math.prod(int(sizes[name]) for name in along)
    return [frozenset(row) for row in ids.reshape(-1, size).tolist()]
  return [frozenset(range(num_devices))]


def _connected(edges: Iterable[tuple[int, ...]]) -> list[frozenset[int]]:
  """Returns the sets of numbers that edges connect."""
  groups: list[set[int]] = []
  for edge in edges:
    joined = set(edge)
    apart = []
    for group in groups:
      if group & joined:
        joined |= group
      else:
        apart.append(group)
    groups = [*apart, joined]
  return [frozenset(group) for group in groups]
