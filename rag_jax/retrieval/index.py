"""How an index of any kind is built or opened.

In: passage embeddings, or a directory. Out: an `Index` to search on the host.
"""

import dataclasses
import functools
from typing import Any

from absl import logging
from etils import epath
import jax
from jax.sharding import Mesh
from jaxtyping import Shaped
import numpy as np

from rag_jax import artifacts
from rag_jax.config import IndexConfig
from rag_jax.config_rules import check_choice
from rag_jax.retrieval import device_index
from rag_jax.retrieval import exact
from rag_jax.retrieval import scann
from rag_jax.retrieval import sharded
from rag_jax.retrieval.embeddings import PART
from rag_jax.retrieval.index_core import ARTIFACT
from rag_jax.retrieval.index_core import FORMAT
from rag_jax.retrieval.index_core import REMEDY
from rag_jax.retrieval.index_core import Index
from rag_jax.retrieval.index_core import IndexInfo
from rag_jax.retrieval.index_core import check_finite
from rag_jax.retrieval.index_core import check_passages
from rag_jax.retrieval.remote_shards import RemoteShard
from rag_jax.retrieval.remote_shards import owned_shards
from rag_jax.retrieval.remote_shards import share_shards
from rag_jax.retrieval.resources import BuildMeter

_KINDS = {
  "exact": exact.ExactIndex,
  "scann": scann.ScannIndex,
  "device": device_index.DeviceIndex,
}


def resolve_kind(kind: str) -> str:
  """Returns the kind that index.kind asks for; "auto" is ScaNN if it works.

  Raises:
    ValueError: `kind` is no choice, or "scann" without the package.
  """
  problem = check_choice("index.kind", kind, ["auto", *_KINDS])
  if problem:
    raise ValueError(f"The config is not valid: {problem}")
  if kind == "auto":
    missing = scann.import_problem()
    kind = "exact" if missing else "scann"
    logging.log_first_n(
      logging.INFO,
      "index.kind='auto' is %r: %s.",
      1,
      kind,
      missing or "the package scann is installed",
    )
  elif kind == "scann":
    scann.check_import()
  return kind


def build_index(
  embeddings: Shaped[Any, "..."],
  config: IndexConfig,
  *,
  encoder_fingerprint: str,
  passages_fingerprint: str,
  mesh: Mesh | None = None,
  num_passages: int = 0,
) -> Index:
  """Returns an index of passage embeddings, of the kind that `config` names.

  Args:
    embeddings: [P, R], row = passage id. Embeddings in float32, or in files,
      are not copied: do not change them afterwards.
    config: how passages are searched.
    encoder_fingerprint: identifies the weights that embedded the passages.
    passages_fingerprint: identifies the passages.
    mesh: the devices of an index of kind "device"; None for one local device.
    num_passages: P, if `embeddings` holds the rows that `own_rows` names and
      no others. All processes call this, and share the index. 0: all rows.

  Raises:
    ValueError: there are no passages, the embeddings are not numbers [P, R], or
      some are NaN or infinite.
  """
  kind = resolve_kind(config.kind)
  if len(embeddings) or not num_passages:  # a process may have no shard
    _check_embeddings(embeddings)
  if isinstance(embeddings, np.ndarray):
    embeddings = np.ascontiguousarray(embeddings, np.float32)
  build = functools.partial(
    _build_unsplit,
    kind=kind,
    config=config,
    fingerprints={
      "encoder_fingerprint": encoder_fingerprint,
      "passages_fingerprint": passages_fingerprint,
    },
    mesh=mesh,
  )
  meter = BuildMeter()
  total = num_passages or len(embeddings)
  per_shard = _passages_per_shard(kind, config, total)
  if per_shard:
    bounds = sharded.shard_bounds(total, per_shard)
    numbers = owned_shards(len(bounds)) if num_passages else range(len(bounds))
    first = bounds[numbers.start][0] if numbers else 0
    shards = {}
    for number in numbers:
      start, stop = bounds[number]
      shards[number] = build(embeddings[start - first : stop - first])
    every = [shards.get(i) or RemoteShard() for i in range(len(bounds))]
    if num_passages:
      share_shards(every, f"{encoder_fingerprint} {passages_fingerprint}")
    index = sharded.ShardedIndex(every)
  else:
    index = build(embeddings)
  index.build_cost = meter.cost()
  return index


def own_rows(config: IndexConfig, num_passages: int) -> range:
  """Returns the rows of an index that this process holds.

  All, unless there are several processes and `index.passages_per_shard` splits
  the index. Then each process has some shards, and searches them for all.
  """
  per_shard = _passages_per_shard(
    resolve_kind(config.kind), config, num_passages
  )
  if jax.process_count() == 1 or not per_shard:
    return range(num_passages)
  bounds = sharded.shard_bounds(num_passages, per_shard)
  shards = owned_shards(len(bounds))
  ends = [0, *(stop for _, stop in bounds)]
  return range(ends[shards.start], ends[shards.stop])


def build_index_directory(
  path: epath.PathLike,
  embeddings: Shaped[Any, "..."],
  config: IndexConfig,
  *,
  encoder_fingerprint: str,
  passages_fingerprint: str,
) -> None:
  """Builds the index of `build_index` into a directory, for `load_index`.

  With `index.passages_per_shard` only one shard is in memory at a time, if the
  embeddings are a memory map or `Rows`. An interrupted build continues after
  the last finished shard. Arguments and errors as in `build_index`.
  """
  fingerprints: dict[str, Any] = {
    "encoder_fingerprint": encoder_fingerprint,
    "passages_fingerprint": passages_fingerprint,
  }
  kind = resolve_kind(config.kind)
  per_shard = _passages_per_shard(kind, config, len(embeddings))
  if not per_shard:
    build_index(embeddings, config, **fingerprints).save(path)
    return
  _check_embeddings(embeddings)
  settings_of_kind = {
    name: value
    for name, value in dataclasses.asdict(config).items()
    if name.startswith(f"{kind}_")
  }
  sharded.build_directory(
    path,
    embeddings,
    per_shard,
    functools.partial(
      _build_unsplit, kind=kind, config=config, fingerprints=fingerprints
    ),
    settings_of_kind | {"kind": kind} | fingerprints,
  )


def load_index(
  path: epath.PathLike,
  *,
  encoder_fingerprint: str = "",
  passages_fingerprint: str = "",
  mesh: Mesh | None = None,
  spread: bool = False,
) -> Index:
  """Opens the index in directory `path`, whatever its kind.

  Args:
    path: the directory of `Index.save`, wherever it was moved to.
    encoder_fingerprint: of the weights that embed passages now; "" for any.
    passages_fingerprint: of the passages that ids stand for; "" for any.
    mesh: the devices of an index of kind "device"; None for one local device.
    spread: whether each process opens some shards, of an index in shards. They
      are searched after all processes have called `Index.connect`.

  Raises:
    FileNotFoundError: no index was built there, or its build was interrupted.
    ValueError: files are missing, cut off or changed, the index has a newer
      format, or it was built by other weights or of other passages.
  """
  content = artifacts.read_manifest(
    path, kind=ARTIFACT, format=FORMAT, remedy=REMEDY
  )
  manifest = f"{path}/{artifacts.MANIFEST}"
  info = IndexInfo.from_content(content, manifest, [*_KINDS, sharded.KIND])
  if info.kind != sharded.KIND and (epath.Path(path) / PART).exists():
    raise ValueError(
      f"{path} is one shard of an index, whose embeddings are in the files of"
      " another directory. Expected a whole index. Open the directory two"
      " levels above."
    )
  if encoder_fingerprint not in ("", info.encoder_fingerprint):
    raise ValueError(
      f"The index at {path} was built by other weights: its passage encoder has"
      f" the fingerprint {info.encoder_fingerprint!r}, the one in use has"
      f" {encoder_fingerprint!r}. Use the weights that built it, or rebuild."
      f" {REMEDY}"
    )
  check_passages(
    f"The index at {path}",
    info.passages_fingerprint,
    passages_fingerprint,
    REMEDY,
  )
  if info.kind == sharded.KIND:
    index = sharded.ShardedIndex.load(
      path, info, _KINDS, spread and jax.process_count() > 1
    )
  elif info.kind == "device":
    index = device_index.DeviceIndex.load(path, info, mesh)
  else:
    index = _KINDS[info.kind].load(path, info)
  index.certificate = info.certificate
  return index


def _build_unsplit(
  embeddings: Any,  # in float32
  kind: str,
  config: IndexConfig,
  fingerprints: dict[str, str],
  mesh: Mesh | None = None,
) -> Index:
  """Returns an index, or one shard of an index, of a kind."""
  inner = exact.ExactIndex(embeddings, **fingerprints)
  if kind == "scann":
    return scann.ScannIndex.build(inner, config)
  if kind == "device":
    settings = device_index.settings_of(config)
    return device_index.DeviceIndex(inner, settings, mesh)
  return inner


def _passages_per_shard(
  kind: str, config: IndexConfig, num_passages: int
) -> int:
  """Returns the size of a shard; 0 if the index is not split."""
  size = config.passages_per_shard
  return size if kind != "device" and 0 < size < num_passages else 0


def _check_embeddings(embeddings: Any) -> None:
  """Raises `ValueError` as `build_index`."""
  floating = np.issubdtype(embeddings.dtype, np.floating)
  if embeddings.ndim != 2 or not floating or not embeddings.shape[1]:
    raise ValueError(
      f"The passage embeddings have shape {embeddings.shape} and dtype"
      f" {embeddings.dtype}; expected (passages, embedding size) of float32."
    )
  if not len(embeddings):
    raise ValueError(
      "There are no passages to index: the embeddings have shape"
      f" {embeddings.shape}. Expected at least one; is data.passages empty?"
    )
  check_finite(embeddings, "passage")
