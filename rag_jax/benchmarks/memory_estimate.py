"""The memory of a training step, estimated from the sizes of its arrays.

In: a config and a number of chips. Out: bytes per chip of each part of a step,
without a compiler, which is coarser than what a compiler says, but takes
seconds; and bytes per host of the index that it searches.
"""

from collections.abc import Mapping, Sequence
import math
from typing import Any

from absl import logging
from flax import linen as nn
import jax
from jaxtyping import PyTree

from rag_jax.benchmarks.abstract_step import abstract_model
from rag_jax.config import Config
from rag_jax.config_models import CausalConfig
from rag_jax.models.partitioning import check_devices
from rag_jax.retrieval import scann
from rag_jax.retrieval.sharded import shard_bounds
from rag_jax.training.stages import TRAIN
from rag_jax.training.stages import stage_optimizer
from rag_jax.training.stages import trained

USABLE = 0.984  # of a chip's memory: the runtime keeps 256 MiB of 16 GiB


def warn_of_estimate() -> None:
  """Logs that there is no compiler."""
  logging.warning(
    "libtpu is not installed: memory is estimated from the sizes of arrays, and"
    " traffic is left out. pip install 'rag_jax[tpu]' compiles the real step."
  )


def check_sizes(missing: Sequence[str]) -> None:
  """Raises `ValueError` if settings that a plan needs are missing."""
  if missing:
    raise ValueError(
      f"The config does not say {', '.join(missing)}. Expected all sizes in it,"
      " since a plan reads no tokenizer, checkpoint or passage. Set them, for"
      f" instance --config.{missing[0]}=N."
    )


def memory_table(
  title: str, parts: Mapping[str, int], peak: int, capacity: int, fits: bool
) -> list[str]:
  """Returns lines for a person: bytes by part, and of them the most at once."""
  lines = ["", f"{title:<34}{'GiB':>9}"]
  for name, size in parts.items():
    lines.append(f"  {name:<32}{size / 2**30:9.2f}")
  lines.append(
    f"  {'peak':<32}{peak / 2**30:9.2f} of {capacity / 2**30:.0f}:"
    f" {'fits' if fits else 'DOES NOT FIT'}"
  )
  return lines


def estimated_parts(
  config: Config, *, num_chips: int, num_passages: int
) -> dict[str, int]:
  """Returns the bytes per chip of each part of a step, without a compiler.

  Activations are what the layers keep for the backward pass, twice the largest
  layer, the logits, and the gradients.
  """
  mesh = check_devices(config, num_chips)
  split = mesh.fsdp * mesh.tensor
  _, boxed = abstract_model(config)
  params = nn.meta.unbox(boxed)
  optimizer = stage_optimizer(config, TRAIN, params)

  def size(tree: PyTree) -> int:
    return sum(
      math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )

  e, g, d = config.encoder, config.generator_sizes, config.data
  rows = config.train.batch_size / (
    mesh.data * mesh.fsdp * config.train.accumulate
  )
  docs, contexts = rows * max(d.n_docs, 1), rows * config.contexts_per_question
  width = 2 if config.train.compute_dtype == "bfloat16" else 4
  kept = [
    _kept(config, e.num_layers, docs, d.passage_length, e, width),
    _kept(config, e.num_layers, rows, d.question_length, e, width),
  ]
  if isinstance(g, CausalConfig):
    length = d.context_length + d.target_length - 1
    kept.append(_kept(config, g.num_layers, contexts, length, g, width))
  else:
    kept += [
      _kept(config, layers, contexts, length, g, width)
      for layers, length in (
        (g.num_layers, d.context_length),
        (g.num_decoder_layers or g.num_layers, d.target_length),
      )
    ]
  logits = (
    contexts * d.target_length * (config.train.vocab_chunk or g.vocab_size)
  )
  activations = sum(layers for layers, _ in kept) / mesh.tensor
  activations += 2 * max(one for _, one in kept) / mesh.tensor
  learned = trained(config, TRAIN, params)
  gradients = size(jax.tree.map(lambda x, t: x if t else None, params, learned))
  activations += 8 * logits / mesh.tensor + gradients / split
  if config.train.accumulate > 1:
    activations += gradients / split
  parts = {
    "parameters": size(params) / split,
    "optimizer": size(jax.eval_shape(optimizer.init, params)) / split,
    "activations": activations,
  }
  if config.index.refresh_rows:
    storage = {"float32": 4, "bfloat16": 2, "int8": 1}
    dim = e.embedding_dim
    each = dim * storage[config.index.device_storage] + 4  # and the norm
    towers = 2 if e.init_from else 1
    share = num_passages / num_chips
    parts["index"] = share * each
    parts["tokens"] = share * towers * (2 * d.passage_length + 4)
  return {name: int(value) for name, value in parts.items()}


def host_parts(
  config: Config, num_passages: int, num_hosts: int
) -> dict[str, int]:
  """Returns the bytes of an index in a host's memory; {}: there is none.

  Of an index in shards (index.passages_per_shard) each host has some, and that
  with the most counts; of any other, each host has the whole. While the passage
  encoder learns, the next version is built beside the one in use. An index that
  is opened (index.path) is memory-mapped, and may have smaller embeddings than
  the float32 that counts here.
  """
  index, encoder = config.index, config.encoder
  if not config.data.n_docs or not num_passages or index.kind == "device":
    return {}
  dim = encoder.embedding_dim
  shards = shard_bounds(num_passages, index.passages_per_shard)
  most = -(-len(shards) // num_hosts)
  sizes = [stop - start for start, stop in shards[:most]]
  parts = {"embeddings": 4 * sum(sizes) * dim}
  if index.kind != "exact":
    parts["ScaNN"] = sum(scann.planned_bytes(n, dim, index) for n in sizes)
  if encoder.train_passage_encoder:
    parts["the next version"] = sum(parts.values())
  return parts


def _kept(
  config: Config, num_layers: int, rows: float, length: int, sizes: Any,
  width: int,
) -> tuple[float, float]:  # fmt: skip
  """Returns the bytes that layers keep, and those that one of them works on."""
  tokens = rows * length * width
  dim, mlp, heads = sizes.embed_dim, sizes.mlp_dim, sizes.num_heads
  # The logits of attention; parts of them are not kept.
  part = config.train.attention_rows
  logits = min(rows, part or rows) * heads * length**2 * (4 + width)
  most = tokens * (12 * dim + 3 * mlp)
  per_layer = {
    "none": most if part else most + logits,
    "dots": tokens * (6 * dim + 2 * mlp),
    "attention": tokens * 5 * dim,
    "full": tokens * dim,
  }[config.train.remat]
  return num_layers * per_layer, most + logits
