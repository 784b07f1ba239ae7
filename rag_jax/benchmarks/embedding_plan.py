"""How long embedding all passages takes on accelerators that are not here.

In: a config that trains nothing (train.num_steps=0), a topology such as
"v5e:8x8", and the number of passages. Out: the memory of a chip for one batch,
the arithmetic of all passages and the shortest time for it, and the size of the
embeddings. Compiling and estimates as in plan.py.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import math
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from rag_jax.benchmarks.abstract_step import has_compiler
from rag_jax.benchmarks.abstract_step import topology_devices
from rag_jax.benchmarks.hlo_costs import Costs
from rag_jax.benchmarks.hlo_costs import program_costs
from rag_jax.benchmarks.memory_estimate import USABLE
from rag_jax.benchmarks.memory_estimate import check_sizes
from rag_jax.benchmarks.memory_estimate import memory_table
from rag_jax.benchmarks.memory_estimate import warn_of_estimate
from rag_jax.chips import CHIPS_PER_HOST
from rag_jax.chips import Chip
from rag_jax.config import Config
from rag_jax.config import MeshConfig
from rag_jax.config_rules import validate
from rag_jax.models.encoders import OneTower
from rag_jax.models.flops import step_flops
from rag_jax.models.flops import step_shapes
from rag_jax.models.partitioning import batch_sharding
from rag_jax.models.partitioning import make_mesh
from rag_jax.models.partitioning import replicated
from rag_jax.models.rag import build_encoder
from rag_jax.retrieval.embeddings import STORAGE
from rag_jax.retrieval.embeddings import bytes_of


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingPlan:
  """The embedding of all passages by all chips of a topology."""

  topology: str
  chip: Chip
  num_chips: int
  config: Config
  num_passages: int
  batch_per_chip: int  # passages that a chip embeds at a time
  hbm_parts: Mapping[str, int]  # bytes of a chip
  hbm_peak: int
  flops: float  # of all passages, on all chips, if none is short
  compiled: bool  # or refused by the compiler; False: estimated
  refused: str  # what the compiler said of a batch that is too large, or ""
  costs: Costs | None  # of one batch; None: there is no program
  program: str = dataclasses.field(default="", repr=False)  # optimized HLO

  @property
  def fits(self) -> bool:
    """Whether a chip has enough memory."""
    return not self.refused and self.hbm_peak <= USABLE * self.chip.hbm_bytes

  @property
  def secs_by_limit(self) -> dict[str, float]:
    """The shortest time for all passages if one resource were the limit."""
    each = self.num_passages / self.num_chips
    secs = {"compute": self.flops / self.num_chips / self.chip.peak_flops}
    if self.costs:
      moved = self.costs.memory_bytes * each / self.batch_per_chip
      secs["memory"] = moved / self.chip.hbm_bytes_per_sec
    return secs

  @property
  def secs(self) -> float:
    """A lower bound, as if all resources worked at their peak at once."""
    return max(self.secs_by_limit.values())

  @property
  def storage_bytes(self) -> dict[str, int]:
    """The size of all embeddings by the type that they are stored in."""
    dim = self.config.encoder.embedding_dim
    return {name: bytes_of(name, self.num_passages, dim) for name in STORAGE}

  def as_json(self) -> dict[str, Any]:
    """Returns the plan as JSON holds it; a step embeds one batch per chip."""
    share = self.batch_per_chip * self.num_chips / self.num_passages
    flops = self.flops * share / self.num_chips
    return {
      "topology": self.topology,
      "num_chips": self.num_chips,
      "compiled": self.compiled,
      "num_passages": self.num_passages,
      "batch_per_chip": self.batch_per_chip,
      "hbm_bytes_per_chip": self.hbm_peak,
      "hbm_capacity_bytes": self.chip.hbm_bytes,
      "hbm_parts": dict(self.hbm_parts),
      "fits": self.fits,
      "flops_per_chip": flops,
      "hbm_traffic_bytes_per_chip": self.costs and self.costs.memory_bytes,
      "collective_bytes_per_chip": 0,
      "step_secs_estimate": self.secs * share,
      "mfu_estimate": flops / self.chip.peak_flops / (self.secs * share),
      "secs_by_limit": self.secs_by_limit,
      "embedding_secs_estimate": self.secs,
      "passages_per_sec": self.num_passages / self.secs,
      "storage_bytes": self.storage_bytes,
    }


def make_embedding_plan(
  config: Config, topology: str, num_passages: int
) -> EmbeddingPlan:
  """Compiles the embedding of a batch for `topology`, or estimates it.

  Args:
    config: with the sizes of the encoder, its vocabulary included.
    topology: such as "v5e:8x8": a chip and how many of them in each direction.
    num_passages: to embed; 0 takes data.num_passages.

  Raises:
    ValueError: the topology does not exist, or the config does not say what the
      plan needs.
  """
  num_passages = num_passages or config.data.num_passages
  _check(config, num_passages)
  chip, devices = topology_devices(topology)
  # The chips of a host share a batch.
  batch = -(-config.index.embed_batch_size // min(CHIPS_PER_HOST, len(devices)))
  compiled, refused, parts = None, "", _estimate(config, batch)
  if has_compiler():
    try:
      compiled = _compile(config, devices, batch)
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      refused = str(error).splitlines()[0]
  else:
    warn_of_estimate()
  if compiled:
    memory: Any = compiled.memory_analysis()
    arguments = memory.argument_size_in_bytes
    others = memory.temp_size_in_bytes + memory.output_size_in_bytes
    parts = {"parameters and batch": arguments, "activations": others}
  program = (compiled.as_text() or "") if compiled else ""
  return EmbeddingPlan(
    topology=topology,
    chip=chip,
    num_chips=len(devices),
    config=config,
    num_passages=num_passages,
    batch_per_chip=batch,
    hbm_parts=parts,
    hbm_peak=sum(parts.values()),
    flops=_flops(config, num_passages),
    compiled=has_compiler(),
    refused=refused,
    costs=program_costs(program, {"data": len(devices)}) if compiled else None,
    program=program,
  )


def _check(config: Config, num_passages: int) -> None:
  """Raises `ValueError` unless the config says all that a plan needs."""
  validate(config)
  missing = [
    name
    for name, value in (
      ("encoder.vocab_size", config.encoder.vocab_size),
      ("data.num_passages", num_passages),
    )
    if not value
  ]
  check_sizes(missing)


def _flops(config: Config, num_passages: int) -> float:
  """Returns the FLOPs of embedding all passages, each of the full length."""
  # A step that embeds all passages again.
  index = dataclasses.replace(config.index, refresh_rows=num_passages)
  config = dataclasses.replace(config, index=index)
  shapes = step_shapes(config, num_passages)
  parts = step_flops(config, shapes, config.generator.vocab_size)
  return float(parts["refresh"].forward)


def _model(config: Config) -> OneTower:
  """Returns the encoder as `rag-jax build-index` embeds with it on a TPU."""
  tower = build_encoder(
    config.encoder,
    vocab_size=config.encoder.vocab_size,
    max_positions=config.data.passage_length,
    dtype=jnp.bfloat16,
  )
  return OneTower(tower)


def _params(config: Config) -> Any:
  """Returns the shapes of the encoder's parameters."""
  row = jnp.zeros((1, config.data.passage_length), jnp.int32)

  def init(key: jax.Array) -> Any:
    return _model(config).init(key, row, row == 0, method="embed_passages")

  return nn.meta.unbox(jax.eval_shape(init, jax.random.key(0))["params"])


def _compile(
  config: Config, devices: Sequence[Any], batch: int
) -> jax.stages.Compiled:
  """Returns the program in which each chip embeds a batch.

  A host compiles it for its own chips. They do not communicate, so that it is
  the same for all chips, and libtpu compiles for whole topologies alone.
  """
  mesh = make_mesh(MeshConfig(data=len(devices)), devices)
  params = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh)),
    _params(config),
  )
  shape, split = (
    (batch * len(devices), config.data.passage_length),
    batch_sharding(mesh),
  )
  tokens = jax.ShapeDtypeStruct(shape, np.int32, sharding=split)
  mask = jax.ShapeDtypeStruct(shape, np.bool_, sharding=split)
  model = _model(config)

  def embed(params: Any, tokens: jax.Array, mask: jax.Array) -> Any:
    return model.apply({"params": params}, tokens, mask,
                       method="embed_passages")  # fmt: skip

  traced = jax.jit(embed).trace(params, tokens, mask)
  return traced.lower(lowering_platforms=("tpu",)).compile()


def _estimate(config: Config, batch: int) -> dict[str, int]:
  """Returns the bytes of a chip by part: of the largest layer, twice."""
  e, length = config.encoder, config.data.passage_length
  layer = batch * length * 2 * (12 * e.embed_dim + 3 * e.mlp_dim)
  layer += batch * e.num_heads * length**2 * 6
  params = sum(
    math.prod(x.shape) * x.dtype.itemsize
    for x in jax.tree.leaves(_params(config))
  )
  return {
    "parameters and batch": params + 5 * batch * length,
    "activations": 2 * layer,
  }


def report(plan: EmbeddingPlan) -> str:
  """Returns the plan as text for a person."""
  c, chip = plan.config, plan.chip
  chips = f"{plan.num_chips} chip{'s' if plan.num_chips > 1 else ''}"
  lines = [
    f"{plan.topology}: {chips}, nothing is trained (train.num_steps=0).",
    f"They embed {plan.num_passages:,} passages of up to"
    f" {c.data.passage_length} tokens, {plan.batch_per_chip} at a time each.",
    *memory_table(
      "Memory of a chip",
      plan.hbm_parts, plan.hbm_peak, chip.hbm_bytes, plan.fits,
    ),
  ]  # fmt: skip
  lines += ["", f"{'Embeddings on the disk':<34}{'GB':>9}"]
  for name, size in plan.storage_bytes.items():
    lines.append(f"  {'--storage=' + name:<32}{size / 1e9:9.2f}")
  lines += ["", "All passages, if each resource alone were the limit"]
  for name, secs in plan.secs_by_limit.items():
    lines.append(f"  {name:<32}{secs:9.1f} s")
  lines += [
    "",
    f"At best {plan.secs:.0f} s, {plan.num_passages / plan.secs:,.0f} passages"
    f" per second, {plan.secs * plan.num_chips / 3600:.2f} chip-hours.",
    "It takes longer: one host reads and tokenizes the passages, and builds the"
    " index.",
  ]
  if not plan.fits:
    lines += ["", f"{plan.refused} Lower index.embed_batch_size.".strip()]
  return "\n".join(lines)
