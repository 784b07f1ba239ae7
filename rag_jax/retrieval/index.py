"""How an index of any kind is built or opened.

In: passage embeddings, or a directory. Out: an `Index` to search on the host.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

from absl import logging
from etils import epath
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
from rag_jax.retrieval.index_core import bad_rows
from rag_jax.retrieval.index_core import name_rows
from rag_jax.retrieval.resources import BuildMeter

_KINDS = {
  "exact": exact.ExactIndex,
  "scann": scann.ScannIndex,
  "device": device_index.DeviceIndex,
}


def resolve_kind(kind: str) -> str:
  """Returns a kind for index.kind; for "auto" ScaNN, if it works here.

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
) -> Index:
  """Returns an index of passage embeddings, of the kind that `config` names.

  Args:
    embeddings: [P, R], row = passage id. In float32, or in files, they are
      kept, not copied: do not write into them afterwards.
    config: how passages are searched.
    encoder_fingerprint: of the weights that embedded the passages.
    passages_fingerprint: of the passages.
    mesh: of kind "device", where it lies; None: on one local device.

  Raises:
    ValueError: no passages, not [P, R] numbers, or NaN or infinity in them.
  """
  kind = resolve_kind(config.kind)
  _check_embeddings(embeddings)
  build = _builder(
    kind, config, encoder_fingerprint, passages_fingerprint, mesh
  )
  if isinstance(embeddings, np.ndarray):
    embeddings = np.ascontiguousarray(embeddings, np.float32)
  meter = BuildMeter()
  if kind != "device" and 0 < config.passages_per_shard < len(embeddings):
    index = sharded.ShardedIndex.build(
      embeddings, config.passages_per_shard, build
    )
  else:
    index = build(embeddings)
  index.build_cost = meter.cost()
  return index


def build_index_directory(
  path: epath.PathLike,
  embeddings: Shaped[Any, "..."],
  config: IndexConfig,
  *,
  encoder_fingerprint: str,
  passages_fingerprint: str,
) -> None:
  """Builds the index of `build_index` into a directory, for `load_index`.

  With `index.passages_per_shard` one shard is in memory at a time, and a build
  that was cut off goes on after the last shard that was finished.

  Args:
    path: of the directory.
    embeddings: [P, R], row = passage id: an array, or `JoinedRows`. A memory
      map is read shard by shard.
    config: how passages are searched.
    encoder_fingerprint: of the weights that embedded the passages.
    passages_fingerprint: of the passages.

  Raises:
    ValueError: as `build_index`.
  """
  kind = resolve_kind(config.kind)
  per_shard = 0 if kind == "device" else config.passages_per_shard
  if per_shard:
    _check_embeddings(embeddings)
  if not 0 < per_shard < len(embeddings):
    index = build_index(
      embeddings,
      config,
      encoder_fingerprint=encoder_fingerprint,
      passages_fingerprint=passages_fingerprint,
    )
    index.save(path)
    return
  own = {
    name: value
    for name, value in dataclasses.asdict(config).items()
    if name.startswith(f"{kind}_")
  }
  sharded.build_directory(
    path,
    embeddings,
    per_shard,
    _builder(kind, config, encoder_fingerprint, passages_fingerprint),
    own
    | {
      "kind": kind,
      "encoder_fingerprint": encoder_fingerprint,
      "passages_fingerprint": passages_fingerprint,
    },
  )


def load_index(
  path: epath.PathLike,
  *,
  encoder_fingerprint: str = "",
  passages_fingerprint: str = "",
  mesh: Mesh | None = None,
) -> Index:
  """Opens the index in directory `path`, whatever its kind.

  Args:
    path: what `Index.save` was called with, or where that was moved to.
    encoder_fingerprint: of the weights that embed passages now; "" = any.
    passages_fingerprint: of the passages that ids stand for; "" = any.
    mesh: of kind "device", where it will lie; None: on one local device.

  Raises:
    FileNotFoundError: no index was built there, or its build was cut off.
    ValueError: its files are missing, cut off or changed, it is of a newer
      format, or it was built by other weights or of other passages.
  """
  content = artifacts.read_manifest(
    path, kind=ARTIFACT, format=FORMAT, remedy=REMEDY
  )
  manifest = f"{path}/{artifacts.MANIFEST}"
  kinds = [*_KINDS, sharded.KIND]  # or several; index.passages_per_shard asks
  info = IndexInfo.from_content(content, manifest, kinds)
  if info.kind != sharded.KIND and (epath.Path(path) / PART).exists():
    raise ValueError(
      f"{path} is a part of an index, whose embeddings are the files of another"
      " directory. Expected a whole one. Open the index two folders above."
    )
  if encoder_fingerprint not in ("", info.encoder_fingerprint):
    raise ValueError(
      f"The index at {path} was built by other weights: its passage encoder has"
      f" the fingerprint {content['encoder_fingerprint']!r}, the one in use has"
      f" {encoder_fingerprint!r}. Use the weights that built it, or rebuild."
      f" {REMEDY}"
    )
  if passages_fingerprint not in ("", info.passages_fingerprint):
    raise ValueError(
      f"The index at {path} was built of other passages: theirs is the"
      f" fingerprint {content['passages_fingerprint']!r}, data.passages has"
      f" {passages_fingerprint!r}. Set data.passages to those that it was built"
      f" of, or rebuild. {REMEDY}"
    )
  if info.kind == sharded.KIND:
    index = sharded.ShardedIndex.load(path, info, _KINDS)
  elif info.kind == "device":
    index = device_index.DeviceIndex.load(path, info, mesh)
  else:
    index = _KINDS[info.kind].load(path, info)
  index.certificate = info.certificate
  return index


def _builder(
  kind: str,
  config: IndexConfig,
  encoder_fingerprint: str,
  passages_fingerprint: str,
  mesh: Mesh | None = None,
) -> Callable[[Any], Index]:
  """Returns embeddings in float32 -> index of a kind."""

  def build(rows: Any) -> Index:
    inner = exact.ExactIndex(
      rows,
      encoder_fingerprint=encoder_fingerprint,
      passages_fingerprint=passages_fingerprint,
    )
    if kind == "scann":
      return scann.ScannIndex.build(inner, config)
    if kind == "device":
      settings = device_index.settings_of(config)
      return device_index.DeviceIndex(inner, settings, mesh)
    return inner

  return build


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
  bad = bad_rows(embeddings)
  if len(bad):
    raise ValueError(
      f"The embeddings of {len(bad)} of {len(embeddings)} passages hold NaN,"
      f" infinity or huge numbers: rows {name_rows(bad)}. Expected finite"
      " numbers. Check the passage encoder: its training may have diverged; go"
      " back to an earlier checkpoint."
    )
