"""A training step with shapes in place of arrays, on devices that are not here.

In: a config, and a topology such as "v5e:8x8" or devices. Out: the program of
one step of the main stage as its compiler makes it, without running it.
"""

from collections.abc import Sequence
import dataclasses
import functools
import importlib.util
import math
import os
import re
from typing import Any

from flax import linen as nn
import jax
from jax.experimental import topologies
import jax.numpy as jnp
from jaxtyping import PyTree
import numpy as np

from rag_jax.chips import Chip
from rag_jax.chips import chip_of_topology
from rag_jax.config import Config
from rag_jax.data.experiment import example_batch
from rag_jax.data.experiment import init_model
from rag_jax.data.step_batches import QuestionBatch
from rag_jax.models.batch import RagBatch
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
from rag_jax.training.stages import SpecialIds
from rag_jax.training.stages import main_loss
from rag_jax.training.stages import stage_optimizer
from rag_jax.training.stages import trained
from rag_jax.training.state import TrainState
from rag_jax.training.state import state_layouts
from rag_jax.training.step import compile_update
from rag_jax.training.step import update

_BOS = 0  # any id; it changes no shape
_SPECIAL = SpecialIds(_BOS, (_BOS,), (_BOS,))
# libtpu would ask the cloud which machine this is, for minutes, and complain;
# and refuse a second program, as if both used the same chips.
_NO_MACHINE = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


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
  for name, value in _NO_MACHINE.items():
    os.environ.setdefault(name, value)
  # JAX uses both cores of a v4 chip as one device; the compiler has to be told.
  one_device = {"chip_config_name": "megacore"} if chip.name == "v4" else {}
  try:
    found = topologies.get_topology_desc(topology, platform="tpu", **one_device)
  except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
    raise ValueError(
      f"The compiler knows no topology {topology!r}: {error}. Expected sizes"
      f" that Cloud TPU offers, as in '{chip.name}:4x4'; v4 and v5p have three."
    ) from error
  return chip, found.devices


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
    model, boxed = abstract_model(config)
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
    params = self.state.params
    jitted = compile_update(
      main_loss(config, self.model, _SPECIAL),
      stage_optimizer(config, TRAIN, params),
      jax.tree.map(lambda x: x.sharding, self.state),
      self.mesh,
      TRAIN,
      functools.partial(
        update_fn,
        accumulate=config.train.accumulate,
        trained=trained(config, TRAIN, params),
      ),
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
      parts["index"] = own.embeddings, own.scales, own.norms, own.embedded_at
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


def abstract_model(config: Config) -> tuple[RagModel, PyTree]:
  """Returns the model and its boxed, abstract parameters."""
  model = build_model(
    config,
    vocab_size=config.generator_sizes.vocab_size,
    retriever_vocab_size=config.encoder.vocab_size,
    decoder_start_id=_BOS,
  )
  init = functools.partial(init_model, config, model)
  return model, jax.eval_shape(init, jax.random.key(0))


def _index(
  config: Config, mesh: jax.sharding.Mesh, num_passages: int
) -> StepIndex:
  arrays = device.abstract_arrays(
    num_passages,
    config.encoder.embedding_dim,
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
  return StepIndex(arrays, *tokens(config.generator_sizes.vocab_size))


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
      accepted_tokens=whole.accepted_tokens,
    )
  if not config.data.n_docs:
    return dataclasses.replace(
      whole, question_tokens=None, question_mask=None, doc_tokens=None,
      doc_mask=None,
    )  # fmt: skip
  if not config.encoder.train_passage_encoder:
    dim = config.encoder.embedding_dim
    return dataclasses.replace(
      whole,
      doc_tokens=None,
      doc_mask=None,
      doc_embeddings=rows(jnp.float32, config.data.n_docs, dim),
    )
  return whole
