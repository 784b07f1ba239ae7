"""Whether a config fits accelerators that are not here, and its best speed.

In: a config, a topology such as "v5e:8x8", and the number of passages. Out: the
memory, arithmetic and traffic of one step of the main stage on each chip, from
the program that the compiler made of the real step; and a bound on its speed.

Nothing runs, and no passage, question or checkpoint is read. Compiling needs
libtpu (`pip install 'rag_jax[tpu]'`); without it the memory is estimated from
the sizes of arrays, which is coarser.
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import functools
import importlib.util
import math
import os
import re
from typing import Any

from absl import logging
from flax import linen as nn
import jax
from jax.experimental import topologies
import jax.numpy as jnp
from jaxtyping import PyTree
import numpy as np

from rag_jax.benchmarks.hlo_costs import Collective
from rag_jax.benchmarks.hlo_costs import Costs
from rag_jax.benchmarks.hlo_costs import program_costs
from rag_jax.chips import Chip
from rag_jax.chips import chip_of_topology
from rag_jax.config import Config
from rag_jax.config_rules import validate
from rag_jax.data.experiment import example_batch
from rag_jax.data.step_batches import QuestionBatch
from rag_jax.models.batch import RagBatch
from rag_jax.models.flops import step_flops
from rag_jax.models.flops import step_shapes
from rag_jax.models.flops import total_flops
from rag_jax.models.partitioning import batch_sharding
from rag_jax.models.partitioning import check_devices
from rag_jax.models.partitioning import make_mesh
from rag_jax.models.partitioning import shardings
from rag_jax.models.rag import RagModel
from rag_jax.models.rag import build_model
from rag_jax.retrieval import device
from rag_jax.retrieval import device_index
from rag_jax.training.search_in_step import InStep
from rag_jax.training.search_in_step import StepIndex
from rag_jax.training.stages import TRAIN
from rag_jax.training.stages import main_loss
from rag_jax.training.stages import stage_optimizer
from rag_jax.training.state import TrainState
from rag_jax.training.state import state_layouts
from rag_jax.training.step import compile_update
from rag_jax.training.step import update

_BOS = 0  # any id; it changes no shape
_USABLE = 0.984  # of the memory: the runtime keeps 256 MiB of 16 GiB
_OUT_OF_MEMORY = re.compile(
  r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm", re.IGNORECASE
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
  fits: bool
  # Why not, as the compiler or the estimate says; "" if it fits.
  problem: str
  flops_parts: Mapping[str, float]  # of the model, without recomputation
  recomputed_flops: float
  costs: Costs | None  # None: it was not compiled
  program: str = dataclasses.field(default="", repr=False)  # optimized HLO

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
      "compiled": costs is not None,
      "hbm_bytes_per_chip": self.hbm_peak,
      "hbm_capacity_bytes": self.chip.hbm_bytes,
      "hbm_parts": dict(self.hbm_parts),
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
    flops_parts=_flops(config, num_passages, len(devices)),
    recomputed_flops=_recomputed(config, num_passages) / len(devices),
  )
  try:
    compiled = step.compile()
  except jax.errors.JaxRuntimeError as error:
    found = _OUT_OF_MEMORY.search(str(error))
    if not found:
      raise
    used = int(float(found[1]) * _UNITS[found[2].upper()])
    parts["activations"] = max(used - sum(parts.values()), 0)
    problem = f"The compiler: {found[0]}."
    return plan(
      hbm_parts=parts, hbm_peak=used, fits=False, problem=problem, costs=None
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
    fits=peak <= _USABLE * chip.hbm_bytes,
    problem="" if peak <= _USABLE * chip.hbm_bytes else _too_large(peak, chip),
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
    if expected <= _USABLE * plan.chip.hbm_bytes:
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


def has_compiler() -> bool:
  """Returns whether libtpu, the compiler for TPUs, is installed."""
  return importlib.util.find_spec("libtpu") is not None


def topology_devices(topology: str) -> tuple[Chip, Sequence[Any]]:
  """Returns the chip of a topology, and its devices.

  Without libtpu the devices are stand-ins, as many as the topology has.

  Raises:
    ValueError: there is no such topology.
  """
  chip = chip_of_topology(topology)
  if not chip.name.startswith("v"):
    raise ValueError(
      f"{topology!r} is no TPU topology. Expected one such as 'v5e:4x4', since"
      " the compiler of a plan is that of TPUs."
    )
  sizes = re.fullmatch(r"\w+:(\d+(?:x\d+)*)", topology)
  if not sizes:
    raise ValueError(
      f"The topology {topology!r} does not say how many chips there are."
      f" Expected their number in each direction, as in '{chip.name}:4x4'."
    )
  if not has_compiler():
    return chip, range(math.prod(map(int, sizes[1].split("x"))))
  # Otherwise libtpu asks the cloud which machine this is, for minutes.
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  try:
    found = topologies.get_topology_desc(topology, platform="tpu")
  except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
    raise ValueError(
      f"The compiler knows no topology {topology!r}: {error}. Expected sizes"
      f" that Cloud TPU offers, as in '{chip.name}:4x4'; v4 and v5p have three."
    ) from error
  return chip, found.devices


def refresh_period(config: Config, num_passages: int) -> float | None:
  """Returns the steps in which all passages are embedded again, once.

  None if they are never, or if the passage encoder does not learn.
  """
  if not config.encoder.train_passage_encoder:
    return None
  if config.index.refresh_rows:
    return num_passages / config.index.refresh_rows
  return float(config.index.refresh_steps)


@dataclasses.dataclass(frozen=True, slots=True)
class AbstractStep:
  """One step of the main stage, with shapes in place of arrays."""

  config: Config
  model: RagModel
  mesh: jax.sharding.Mesh
  state: TrainState
  batch: RagBatch | QuestionBatch

  @classmethod
  def make(
    cls, config: Config, devices: Sequence[Any], num_passages: int
  ) -> "AbstractStep":
    """Returns the step of `config` on `devices`."""
    mesh = make_mesh(check_devices(config, len(devices)), devices)
    model, boxed = _model(config)
    params = nn.meta.unbox(boxed)
    optimizer = stage_optimizer(config, TRAIN, params)
    layout = state_layouts(params, shardings(boxed, mesh), optimizer, mesh)
    kinds: dict[str, Any] = {
      "step": jax.ShapeDtypeStruct((), jnp.int32),
      "params": params,
      "opt_state": jax.eval_shape(optimizer.init, params),
    }
    state = jax.tree.map(
      lambda x, sharding: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=sharding
      ),
      TrainState(**kinds),
      layout,
    )
    if config.index.refresh_rows:
      index = _index(config, mesh, num_passages)
      state = dataclasses.replace(state, index=index)
    return cls(config, model, mesh, state, _batch(config, mesh))

  def compile(self) -> jax.stages.Compiled:
    """Returns the compiled program."""
    config = self.config
    in_step = InStep(
      self.model, config.data.n_docs, config.index.refresh_rows, None
    )
    update_fn = in_step.update if config.index.refresh_rows else update
    jitted = compile_update(
      main_loss(config, self.model, _BOS),
      stage_optimizer(config, TRAIN, self.state.params),
      jax.tree.map(lambda x: x.sharding, self.state),
      self.mesh,
      TRAIN,
      functools.partial(update_fn, accumulate=config.train.accumulate),
    )
    key = jax.eval_shape(
      lambda: jax.random.key(0, impl=config.train.dropout_prng)
    )
    traced = jitted.trace(self.state, self.batch, key)
    platform = "tpu" if "tpu" in self._kind.lower() else "cpu"
    return traced.lower(lowering_platforms=(platform,)).compile()

  @property
  def _kind(self) -> str:
    return self.mesh.devices.flat[0].device_kind

  def hbm_parts(self) -> dict[str, int]:
    """Returns the bytes per chip of the arguments of a step."""
    index = self.state.index
    parts = {
      "parameters": self.state.params,
      "optimizer": self.state.opt_state,
      "batch": self.batch,
    }
    if index is not None:
      own = index.arrays
      parts["index"] = own.embeddings, own.scales, own.embedded_at
      parts["tokens"] = (
        *(own.tokens, own.lengths),
        *(index.context_tokens, index.context_lengths),
      )
    return {name: _bytes_per_chip(tree) for name, tree in parts.items()}


def _bytes_per_chip(tree: PyTree) -> int:
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    for x in jax.tree.leaves(tree)
  )


def _check(config: Config, num_passages: int) -> None:
  """Raises `ValueError` unless the config says all that a plan needs."""
  validate(config)
  missing = [
    f"{name}.vocab_size"
    for name in ("encoder", "generator")
    if not getattr(config, name).vocab_size
  ]
  if not num_passages and config.data.n_docs:
    missing.append("data.num_passages")
  if missing:
    raise ValueError(
      f"The config does not say {', '.join(missing)}. Expected all sizes in it,"
      " since a plan reads no tokenizer, checkpoint or passage. Set them, for"
      f" instance --config.{missing[0]}=N."
    )


def _model(config: Config) -> tuple[RagModel, PyTree]:
  """Returns the model and its boxed, abstract parameters."""
  model = build_model(
    config,
    vocab_size=config.generator.vocab_size,
    retriever_vocab_size=config.encoder.vocab_size,
    decoder_start_id=_BOS,
  )
  batch = jax.tree.map(jnp.asarray, example_batch(config))

  def init(key: jax.Array) -> PyTree:
    return model.init(key, batch)["params"]

  return model, jax.eval_shape(init, jax.random.key(0))


def _index(
  config: Config, mesh: jax.sharding.Mesh, num_passages: int
) -> StepIndex:
  arrays = device.abstract_arrays(
    num_passages,
    config.encoder.projection_dim or config.encoder.embed_dim,
    mesh,
    **device_index.settings_of(config.index),
  )
  rows, sharding = arrays.embedded_at.shape[0], arrays.embedded_at.sharding

  def tokens(vocab_size: int) -> tuple[Any, Any]:
    dtype = np.uint16 if vocab_size <= 2**16 else np.int32
    length = config.data.passage_length
    return (
      jax.ShapeDtypeStruct((rows, length), dtype, sharding=sharding),
      jax.ShapeDtypeStruct((rows,), np.int32, sharding=sharding),
    )

  own, lengths = tokens(config.encoder.vocab_size)
  arrays = dataclasses.replace(arrays, tokens=own, lengths=lengths)
  if not config.encoder.init_from:  # one tokenizer for both
    return StepIndex(arrays)
  return StepIndex(arrays, *tokens(config.generator.vocab_size))


def _batch(config: Config, mesh: jax.sharding.Mesh) -> RagBatch | QuestionBatch:
  """Returns the batch of a step, as the data room makes it."""
  b, sharding = config.train.batch_size, batch_sharding(mesh)

  def rows(dtype: Any, *tail: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((b, *tail), dtype, sharding=sharding)

  whole = jax.tree.map(
    lambda x: rows(x.dtype, *x.shape[1:]), example_batch(config)
  )
  if config.index.refresh_rows:
    length = config.data.context_length
    return QuestionBatch(
      question_tokens=whole.question_tokens,
      question_mask=whole.question_mask,
      head_tokens=rows(jnp.int32, length),
      head_mask=rows(bool, length),
      target_tokens=whole.target_tokens,
      target_mask=whole.target_mask,
    )
  if not config.data.n_docs:
    return dataclasses.replace(
      whole, question_tokens=None, question_mask=None, doc_tokens=None,
      doc_mask=None,
    )  # fmt: skip
  if not config.encoder.train_passage_encoder:
    dim = config.encoder.projection_dim or config.encoder.embed_dim
    return dataclasses.replace(
      whole,
      doc_tokens=None,
      doc_mask=None,
      doc_embeddings=rows(jnp.float32, config.data.n_docs, dim),
    )
  return whole


def _flops(
  config: Config, num_passages: int, num_chips: int
) -> dict[str, float]:
  """Returns the FLOPs per chip of each part of a step."""
  shapes = step_shapes(config, num_passages)
  parts = step_flops(config, shapes, config.generator.vocab_size)
  return {
    name: total_flops({name: part}) / num_chips for name, part in parts.items()
  }


def _recomputed(config: Config, num_passages: int) -> float:
  """Returns the FLOPs of all chips that the backward pass computes again."""
  shapes = step_shapes(config, num_passages)
  parts = step_flops(config, shapes, config.generator.vocab_size)
  # Of the forward pass of the layers: "dots" repeats the products of attention
  # alone, "attention" all but queries, keys and values: about five sixths.
  share = {"none": 0.0, "dots": 0.1, "attention": 0.8, "full": 1.0}
  layers = sum(
    parts[name].forward
    for name in parts
    if name not in ("logits", "search", "refresh", "doc_scores", "pointer")
  )
  again = share[config.train.remat] * layers
  if config.train.vocab_chunk:
    again += parts["logits"].forward
  return again


def estimated_parts(
  config: Config, *, num_chips: int, num_passages: int
) -> dict[str, int]:
  """Returns the bytes per chip of each part of a step, without a compiler.

  Activations are what the layers keep for the backward pass, twice the largest
  layer, the logits, and the gradients.
  """
  mesh = check_devices(config, num_chips)
  split = mesh.fsdp * mesh.tensor
  _, boxed = _model(config)
  params = nn.meta.unbox(boxed)
  optimizer = stage_optimizer(config, TRAIN, params)

  def size(tree: PyTree) -> int:
    return sum(
      math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )

  e, g, d = config.encoder, config.generator, config.data
  rows = config.train.batch_size / (
    mesh.data * mesh.fsdp * config.train.accumulate
  )
  docs = rows * max(d.n_docs, 1)
  width = 2 if config.train.compute_dtype == "bfloat16" else 4
  kept = [
    _kept(config, e.num_layers, docs, d.passage_length, e, width),
    _kept(config, e.num_layers, rows, d.question_length, e, width),
    _kept(config, g.num_layers, docs, d.context_length, g, width),
    _kept(
      config,
      g.num_decoder_layers or g.num_layers,
      docs,
      d.target_length,
      g,
      width,
    ),
  ]
  logits = docs * d.target_length * (config.train.vocab_chunk or g.vocab_size)
  activations = sum(layers for layers, _ in kept) / mesh.tensor
  activations += 2 * max(one for _, one in kept) / mesh.tensor
  activations += 8 * logits / mesh.tensor + size(params) / split
  if config.train.accumulate > 1:
    activations += size(params) / split
  parts = {
    "parameters": size(params) / split,
    "optimizer": size(jax.eval_shape(optimizer.init, params)) / split,
    "activations": activations,
  }
  if config.index.refresh_rows:
    storage = {"float32": 4, "bfloat16": 2, "int8": 1}
    dim = e.projection_dim or e.embed_dim
    each = dim * storage[config.index.device_storage]
    towers = 2 if e.init_from else 1
    share = num_passages / num_chips
    parts["index"] = share * each
    parts["tokens"] = share * towers * (2 * d.passage_length + 4)
  return {name: int(value) for name, value in parts.items()}


def _kept(
  config: Config, num_layers: int, rows: float, length: int, sizes: Any,
  width: int,
) -> tuple[float, float]:  # fmt: skip
  """Returns the bytes that layers keep, and those that one of them works on."""
  tokens = rows * length * width
  dim, mlp, heads = sizes.embed_dim, sizes.mlp_dim, sizes.num_heads
  attention = rows * heads * length**2 * (4 + width)
  everything = tokens * (12 * dim + 3 * mlp) + attention
  per_layer = {
    "none": everything,
    "dots": tokens * (6 * dim + 2 * mlp),
    "attention": tokens * 5 * dim,
    "full": tokens * dim,
  }[config.train.remat]
  return num_layers * per_layer, everything


def _estimated(
  config: Config, topology: str, chip: Chip, num_chips: int, num_passages: int
) -> Plan:
  """Returns the plan without a compiler."""
  logging.warning(
    "libtpu is not installed: memory is estimated from the sizes of arrays, and"
    " traffic is left out. pip install 'rag_jax[tpu]' compiles the real step."
  )
  parts = estimated_parts(
    config, num_chips=num_chips, num_passages=num_passages
  )
  peak = sum(parts.values())
  fits = peak <= _USABLE * chip.hbm_bytes
  return Plan(
    topology=topology,
    chip=chip,
    num_chips=num_chips,
    config=dataclasses.replace(config, mesh=check_devices(config, num_chips)),
    num_passages=num_passages,
    hbm_parts=parts,
    hbm_peak=peak,
    fits=fits,
    problem="" if fits else _too_large(peak, chip),
    flops_parts=_flops(config, num_passages, num_chips),
    recomputed_flops=_recomputed(config, num_passages) / num_chips,
    costs=None,
  )


def _too_large(peak: int, chip: Chip) -> str:
  return (
    f"It needs {peak / 2**30:.2f} GiB, but a {chip.name} chip has"
    f" {_USABLE * chip.hbm_bytes / 2**30:.2f} GiB for programs."
  )


def report(plan: Plan) -> str:
  """Returns the plan as text for a person."""
  c, chip = plan.config, plan.chip
  mesh = f"data={c.mesh.data} x fsdp={c.mesh.fsdp} x tensor={c.mesh.tensor}"
  lines = [
    f"{plan.topology}: {plan.num_chips} chips, mesh {mesh},"
    f" {c.train.batch_size} questions per step, {c.data.n_docs} documents each",
    "",
    f"{'Memory of a chip':<34}{'GiB':>9}",
  ]
  for name, size in plan.hbm_parts.items():
    lines.append(f"  {name:<32}{size / 2**30:9.2f}")
  lines.append(
    f"  {'peak':<32}{plan.hbm_peak / 2**30:9.2f} of"
    f" {chip.hbm_bytes / 2**30:.0f}: {'fits' if plan.fits else 'DOES NOT FIT'}"
  )
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
