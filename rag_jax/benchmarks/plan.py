"""Whether a config fits accelerators that are not here, and its best speed.

In: a config, a topology such as "v5e:8x8", and the number of passages. Out: the
memory, arithmetic and traffic of one step of the main stage on each chip, from
the program that the compiler made of the real step; and a bound on its speed.

Nothing runs, and no passage, question or checkpoint is read. Compiling needs
libtpu (`pip install 'rag_jax[tpu]'`); without it the memory is estimated from
the sizes of arrays, which is coarser.
"""

from collections.abc import Iterator, Mapping
import dataclasses
import functools
import re
from typing import Any

import jax

from rag_jax.benchmarks.abstract_step import AbstractStep
from rag_jax.benchmarks.abstract_step import has_compiler
from rag_jax.benchmarks.abstract_step import topology_devices
from rag_jax.benchmarks.hlo_costs import Collective
from rag_jax.benchmarks.hlo_costs import Costs
from rag_jax.benchmarks.hlo_costs import program_costs
from rag_jax.benchmarks.memory_estimate import USABLE
from rag_jax.benchmarks.memory_estimate import check_sizes
from rag_jax.benchmarks.memory_estimate import estimated_parts
from rag_jax.benchmarks.memory_estimate import host_parts
from rag_jax.benchmarks.memory_estimate import memory_table
from rag_jax.benchmarks.memory_estimate import warn_of_estimate
from rag_jax.chips import Chip
from rag_jax.chips import num_hosts
from rag_jax.config import Config
from rag_jax.config_rules import validate
from rag_jax.models.flops import step_flops
from rag_jax.models.flops import step_shapes
from rag_jax.models.flops import total_flops
from rag_jax.models.partitioning import check_devices

_HOST_USABLE = 0.9  # of a host's memory: the rest is for passages and programs
# In the message of the compiler: temporaries, or all of the memory.
_OUT_OF_MEMORY = re.compile(
  r"(HLO temporaries \(|Used )([\d.]+)([KMGT]?)\)? (?:exceeds|of) [^.]*?"
  r"[\d.]+[KMGT]?"
)
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
  """One step of a config on each chip of a topology."""

  topology: str
  chip: Chip
  num_chips: int
  config: Config
  num_passages: int
  # Bytes by part: parameters, optimizer, index, tokens, batch, activations.
  hbm_parts: Mapping[str, int]
  hbm_peak: int
  fits_chip: bool
  # Why not, as the compiler or the estimate says; "" if it fits.
  chip_problem: str
  host_parts: Mapping[str, int]  # bytes of an index that each host searches
  flops_parts: Mapping[str, float]  # of the model, without recomputation
  recomputed_flops: float
  compiled: bool  # or refused by the compiler; False: estimated
  costs: Costs | None  # of the program; None: there is none
  program: str = dataclasses.field(default="", repr=False)  # optimized HLO

  @property
  def host_problem(self) -> str:
    """Why the index does not fit into the memory of a host; "" if it does."""
    needed, there = sum(self.host_parts.values()), self.chip.host_bytes
    share = self.num_passages // num_hosts(self.num_chips)
    if needed <= _HOST_USABLE * there or not there:
      return ""
    return (
      f"Its index needs {needed / 2**30:.0f} GiB on each host, but a host of"
      f" {self.chip.name} has {there / 2**30:.0f} GiB. Expected what each host"
      f" holds to fit. With index.passages_per_shard={share} or less the hosts"
      " hold a part each; with index.kind=device the chips do; with"
      " encoder.train_passage_encoder=False there is one version of it alone."
    )

  @property
  def fits(self) -> bool:
    """Whether chips and hosts have enough memory."""
    return self.fits_chip and not self.host_problem

  @property
  def problem(self) -> str:
    """Why it does not fit; "" if it does."""
    return " ".join(filter(None, (self.chip_problem, self.host_problem)))

  @property
  def model_flops(self) -> float:
    """FLOPs per chip and step, without what is computed again."""
    return sum(self.flops_parts.values())

  @property
  def secs_by_limit(self) -> dict[str, float]:
    """The shortest time of a step if one resource alone were the limit."""
    flops = self.model_flops + self.recomputed_flops
    secs = {"compute": flops / self.chip.peak_flops}
    if self.costs:
      sent = sum(c.bytes_sent for c in self.costs.collectives)
      secs["memory"] = self.costs.memory_bytes / self.chip.hbm_bytes_per_sec
      secs["interconnect"] = sent / self.chip.ici_bytes_per_sec
    return secs

  @property
  def step_secs(self) -> float:
    """A lower bound, as if all resources worked at their peak at once."""
    return max(self.secs_by_limit.values())

  @property
  def mfu(self) -> float:
    """An upper bound of the model FLOPs utilization, from 0 to 1."""
    return self.model_flops / self.chip.peak_flops / self.step_secs

  def as_json(self) -> dict[str, Any]:
    """Returns the plan as JSON holds it: bytes, FLOPs and seconds per chip."""
    config, costs = self.config, self.costs
    hours = config.train.num_steps * self.step_secs / 3600
    return {
      "topology": self.topology,
      "num_chips": self.num_chips,
      "mesh": dataclasses.asdict(config.mesh),
      "compiled": self.compiled,
      "hbm_bytes_per_chip": self.hbm_peak,
      "hbm_capacity_bytes": self.chip.hbm_bytes,
      "hbm_parts": dict(self.hbm_parts),
      "host_bytes_per_host": sum(self.host_parts.values()),
      "host_capacity_bytes": self.chip.host_bytes,
      "host_parts": dict(self.host_parts),
      "fits": self.fits,
      "problem": self.problem,
      "flops_per_chip": self.model_flops,
      "flops_parts": dict(self.flops_parts),
      "recomputed_flops_per_chip": self.recomputed_flops,
      "hbm_traffic_bytes_per_chip": costs.memory_bytes if costs else None,
      "collective_bytes_per_chip": (
        sum(c.bytes_sent for c in costs.collectives) if costs else None
      ),
      "collectives": (
        [dataclasses.asdict(c) for c in costs.collectives] if costs else None
      ),
      "compiler_cycles_per_chip": costs.cycles if costs else None,
      "secs_by_limit": self.secs_by_limit,
      "step_secs_estimate": self.step_secs,
      "mfu_estimate": self.mfu,
      "questions_per_sec": config.train.batch_size / self.step_secs,
      "run_days": hours / 24,
      "run_chip_hours": hours * self.num_chips,
      "refresh_period_steps": refresh_period(config, self.num_passages),
    }


def make_plan(config: Config, topology: str, num_passages: int) -> Plan:
  """Compiles a step of `config` for `topology`, or estimates it.

  Args:
    config: with the sizes of both models, vocabularies included.
    topology: such as "v5e:8x8": a chip and how many of them in each direction.
    num_passages: of the index; 0 takes data.num_passages.

  Raises:
    ValueError: the topology does not exist, or the config does not say what the
      plan needs, or does not fit the mesh.
  """
  num_passages = num_passages or config.data.num_passages
  _check(config, num_passages)
  if config.train.compute_dtype == "auto":  # as it is on TPUs
    config = with_settings(config, {"train.compute_dtype": "bfloat16"})
  chip, devices = topology_devices(topology)
  mesh_config = check_devices(config, len(devices))
  if not has_compiler():
    return _estimated(config, topology, chip, len(devices), num_passages)
  config = dataclasses.replace(config, mesh=mesh_config)
  step = AbstractStep.make(config, devices, num_passages)
  parts = step.hbm_parts()
  plan = functools.partial(
    Plan,
    topology=topology,
    chip=chip,
    num_chips=len(devices),
    config=config,
    num_passages=num_passages,
    host_parts=host_parts(config, num_passages, num_hosts(len(devices))),
    compiled=True,
    flops_parts=_flops(config, num_passages, len(devices)),
    recomputed_flops=_recomputed(config, num_passages) / len(devices),
  )
  try:
    compiled = step.compile()
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    estimate = estimated_parts(
      config, num_chips=len(devices), num_passages=num_passages
    )
    parts["activations"] = _activations(
      str(error), sum(parts.values()), estimate["activations"]
    )
    peak = sum(parts.values())
    return plan(
      hbm_parts=parts,
      hbm_peak=peak,
      fits_chip=False,
      chip_problem=(
        f"{_too_large(peak, chip)} The compiler: {_first_line(error)}"
      ),
      costs=None,
    )
  memory: Any = compiled.memory_analysis()
  peak = getattr(memory, "peak_memory_in_bytes", 0) or (
    memory.argument_size_in_bytes
    + memory.temp_size_in_bytes
    + memory.output_size_in_bytes
    - memory.alias_size_in_bytes
  )
  parts["activations"] = max(peak - sum(parts.values()), 0)
  program = compiled.as_text() or ""
  axes = dict(zip(step.mesh.axis_names, step.mesh.devices.shape, strict=True))
  return plan(
    hbm_parts=parts,
    hbm_peak=peak,
    fits_chip=peak <= USABLE * chip.hbm_bytes,
    chip_problem=(
      "" if peak <= USABLE * chip.hbm_bytes else _too_large(peak, chip)
    ),
    costs=program_costs(program, axes),
    program=program,
  )


def suggest(plan: Plan) -> Iterator[tuple[dict[str, Any], Config]]:
  """Yields changes of settings that should make `plan` fit, the mildest first.

  By an estimate of the memory, scaled to what the plan found.
  """
  config, chips = plan.config, plan.num_chips
  estimate = functools.partial(
    estimated_parts, num_chips=chips, num_passages=plan.num_passages
  )
  own = sum(estimate(config).values())
  scale = plan.hbm_peak / own
  for changes in _changes(config, chips):
    changed = with_settings(config, changes)
    try:
      check_devices(changed, chips)
    except ValueError:
      continue
    expected = scale * sum(estimate(changed).values())
    if expected <= USABLE * plan.chip.hbm_bytes:
      yield changes, changed


def _changes(config: Config, num_chips: int) -> Iterator[dict[str, Any]]:
  """Yields combinations of settings that need less memory, in turn."""
  changes: dict[str, Any] = {}
  if not config.train.scan_layers:
    changes["train.scan_layers"] = True
  kinds = ("none", "dots", "attention", "full")
  for remat in kinds[kinds.index(config.train.remat) :]:
    changes = {**changes, "train.remat": remat}
    yield changes
  if not config.train.vocab_chunk and not config.hf_loss:
    changes = {**changes, "train.vocab_chunk": 8192}
    yield changes
  parts = config.train.accumulate
  while parts < config.train.batch_size:
    parts *= 2
    changes = {**changes, "train.accumulate": parts}
    yield changes
    fsdp = config.mesh.fsdp
    while fsdp < num_chips:
      fsdp *= 2
      yield {**changes, "mesh.data": 0, "mesh.fsdp": fsdp}


def with_settings(config: Config, changes: Mapping[str, Any]) -> Config:
  """Returns a copy of `config` with settings changed, by their dotted names."""
  for name, value in changes.items():
    section, field = name.split(".")
    changed = dataclasses.replace(getattr(config, section), **{field: value})
    config = dataclasses.replace(config, **{section: changed})
  return config


def refresh_period(config: Config, num_passages: int) -> float | None:
  """Returns the steps in which all passages are embedded again, once.

  None if they are never, or if the passage encoder does not learn.
  """
  if not config.encoder.train_passage_encoder:
    return None
  if config.index.refresh_rows:
    return num_passages / config.index.refresh_rows
  return float(config.index.refresh_steps)


def _check(config: Config, num_passages: int) -> None:
  """Raises `ValueError` unless the config says all that a plan needs."""
  validate(config)
  generator = "causal" if config.generator.kind == "causal" else "generator"
  missing = [
    f"{name}.vocab_size"
    for name in ("encoder", generator)
    if not getattr(config, name).vocab_size
  ]
  if not num_passages and config.data.n_docs:
    missing.append("data.num_passages")
  check_sizes(missing)


def _flops(
  config: Config, num_passages: int, num_chips: int
) -> dict[str, float]:
  """Returns the FLOPs per chip of each part of a step."""
  shapes = step_shapes(config, num_passages)
  parts = step_flops(config, shapes, config.generator_sizes.vocab_size)
  return {
    name: total_flops({name: part}) / num_chips for name, part in parts.items()
  }


def _recomputed(config: Config, num_passages: int) -> float:
  """Returns the FLOPs of all chips that the backward pass computes again."""
  shapes = step_shapes(config, num_passages)
  parts = step_flops(config, shapes, config.generator_sizes.vocab_size)
  # Of the forward pass of the layers: "dots" repeats the products of attention
  # alone, "attention" all but queries, keys and values: about five sixths.
  share = {"none": 0.0, "dots": 0.1, "attention": 0.8, "full": 1.0}
  layers = sum(
    parts[name].forward
    for name in parts
    if name not in ("logits", "search", "refresh", "doc_scores", "pointer")
  )
  # In parts, attention repeats one of its two products.
  in_parts = 0.05 if config.train.attention_rows else 0.0
  again = max(share[config.train.remat], in_parts) * layers
  if config.train.vocab_chunk:
    again += parts["logits"].forward
  return again


def _estimated(
  config: Config, topology: str, chip: Chip, num_chips: int, num_passages: int
) -> Plan:
  """Returns the plan without a compiler."""
  warn_of_estimate()
  parts = estimated_parts(
    config, num_chips=num_chips, num_passages=num_passages
  )
  peak = sum(parts.values())
  fits = peak <= USABLE * chip.hbm_bytes
  return Plan(
    topology=topology,
    chip=chip,
    num_chips=num_chips,
    config=dataclasses.replace(config, mesh=check_devices(config, num_chips)),
    num_passages=num_passages,
    hbm_parts=parts,
    hbm_peak=peak,
    fits_chip=fits,
    chip_problem="" if fits else _too_large(peak, chip),
    host_parts=host_parts(config, num_passages, num_hosts(num_chips)),
    flops_parts=_flops(config, num_passages, num_chips),
    recomputed_flops=_recomputed(config, num_passages) / num_chips,
    compiled=False,
    costs=None,
  )


def _activations(message: str, arguments: int, estimate: int) -> int:
  """Returns the bytes beside the arguments that did not fit.

  Args:
    message: of the compiler.
    arguments: bytes of the arguments.
    estimate: for a message without a number.
  """
  found = _OUT_OF_MEMORY.search(message)
  if not found:
    return estimate
  size = int(float(found[2]) * _UNITS[found[3]])
  return size if found[1] != "Used " else max(size - arguments, 0)


def _first_line(error: Exception) -> str:
  return str(error).splitlines()[0].removeprefix("RESOURCE_EXHAUSTED: ")


def _too_large(peak: int, chip: Chip) -> str:
  return (
    f"It needs {peak / 2**30:.2f} GiB, but a {chip.name} chip has"
    f" {USABLE * chip.hbm_bytes / 2**30:.2f} GiB for programs."
  )


def report(plan: Plan) -> str:
  """Returns the plan as text for a person."""
  c, chip = plan.config, plan.chip
  chips = f"{plan.num_chips} chip{'s' if plan.num_chips > 1 else ''}"
  mesh = f"data={c.mesh.data} x fsdp={c.mesh.fsdp} x tensor={c.mesh.tensor}"
  lines = [
    f"{plan.topology}: {chips}, mesh {mesh},"
    f" {c.train.batch_size} questions per step, {c.data.n_docs} documents each",
    *memory_table(
      "Memory of a chip",
      plan.hbm_parts, plan.hbm_peak, chip.hbm_bytes, plan.fits_chip,
    ),
  ]  # fmt: skip
  if index := plan.host_parts:
    lines += memory_table(
      "Index in the memory of each host",
      index, sum(index.values()), chip.host_bytes, not plan.host_problem,
    )  # fmt: skip
  lines += ["", f"{'Arithmetic of a chip and step':<34}{'TFLOP':>9}"]
  for name, flops in plan.flops_parts.items():
    if flops:
      lines.append(f"  {name:<32}{flops / 1e12:9.3f}")
  lines.append(f"  {'computed again':<32}{plan.recomputed_flops / 1e12:9.3f}")
  if plan.costs:
    traffic = plan.costs.memory_bytes / 1e9
    lines += ["", f"{'Traffic of a chip and step':<34}{'GB':>9}"]
    lines.append(f"  {'memory':<32}{traffic:9.2f}")
    lines += map(_collective_line, plan.costs.collectives)
    if plan.costs.cycles:
      cycles = plan.costs.cycles / 1e6
      lines += ["", f"The compiler itself expects {cycles:.0f} million cycles."]
  lines += ["", "Step, if each resource alone were the limit, at its peak"]
  for name, secs in plan.secs_by_limit.items():
    lines.append(f"  {name:<32}{secs:9.4f} s")
  days = c.train.num_steps * plan.step_secs / 86400
  lines += [
    "",
    f"At best {plan.step_secs:.4f} s per step, MFU {plan.mfu:.2f},"
    f" {c.train.batch_size / plan.step_secs:.0f} questions per second;",
    f"{c.train.num_steps} steps in {days:.2f} days,"
    f" {24 * days * plan.num_chips:.0f} chip-hours. A real step takes longer.",
  ]
  period = refresh_period(c, plan.num_passages)
  if period is not None and c.index.refresh_rows:
    share = plan.flops_parts["refresh"] / plan.model_flops
    lines.append(
      f"All {plan.num_passages:,} passages are embedded again every"
      f" {period:,.0f} steps, which is {100 * share:.1f} % of the arithmetic."
    )
  if plan.problem:
    lines += ["", plan.problem]
  return "\n".join(lines)


def _collective_line(collective: Collective) -> str:
  name = f"{collective.kind} over {collective.axes}"
  sent = collective.bytes_sent / 1e9
  return f"  {name:<32}{sent:9.3f}  ({collective.num_runs} times)"
