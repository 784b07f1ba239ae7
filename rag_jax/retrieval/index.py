"""The one protocol of every search index, and how to build or open one.

In: passage embeddings, or a directory. Out: an `Index` to search on the host.
"""

from collections.abc import Callable
import dataclasses
from typing import Any, Protocol, runtime_checkable

from absl import logging
from etils import epath
from jax.sharding import Mesh
from jaxtyping import Float, Int, Shaped
import numpy as np

from rag_jax import artifacts
from rag_jax.config import IndexConfig
from rag_jax.config_rules import check_choice
from rag_jax.retrieval import device_index
from rag_jax.retrieval import exact
from rag_jax.retrieval import scann
from rag_jax.retrieval import sharded
from rag_jax.retrieval.certificate import Certificate
from rag_jax.retrieval.cost import BuildCost
from rag_jax.retrieval.cost import BuildMeter
from rag_jax.retrieval.embeddings import PART

_KINDS = {
  "exact": exact.ExactIndex,
  "scann": scann.ScannIndex,
  "device": device_index.DeviceIndex,
}
_SHARDED = "sharded"  # several of these kinds; index.passages_per_shard asks
# What the manifest says of every index.
_CONTENT = {
  "kind": str,
  "num_passages": int,
  "embedding_dim": int,
  "encoder_fingerprint": str,
  "passages_fingerprint": str,
  "settings": dict,
}


@runtime_checkable
class Index(Protocol):
  """Passage embeddings to be searched. Passage ids are 0 to num_passages - 1.

  The scores order the passages and are then thrown away: the model scores them
  again with gradient.
  """

  kind: str
  num_passages: int  # P
  embedding_dim: int  # R
  encoder_fingerprint: str  # of the weights that embedded the passages
  passages_fingerprint: str
  # In float32, for scoring again: an array, StoredEmbeddings in files, or
  # rows.JoinedRows of several.
  embeddings: Float[Any, "P R"]
  settings: dict[str, Any]  # of its kind
  memory_bytes: int  # that searching it takes
  certificate: Certificate | None  # what `certify` measured; `save` keeps it
  build_cost: BuildCost | None  # None once loaded

  def search(
    self, question_embeddings: Float[np.ndarray, "B R"], n_docs: int
  ) -> tuple[Int[np.ndarray, "B K"], Float[np.ndarray, "B K"]]:
    """Returns ids [B, K] int32 and scores, best first, ties by smaller id."""
    ...

  def save(self, path: epath.PathLike) -> None:
    """Writes the index to directory `path`, its manifest last."""
    ...


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
    path, kind=exact.ARTIFACT, format=exact.FORMAT, remedy=exact.REMEDY
  )
  bad = [k for k, t in _CONTENT.items() if not isinstance(content.get(k), t)]
  kinds = [*_KINDS, _SHARDED]
  if bad or content["kind"] not in kinds:
    raise ValueError(
      f"{path}/{artifacts.MANIFEST} describes no index that this version of"
      f" rag_jax can read: {', '.join(bad) or 'kind'} missing or wrong;"
      f" expected {', '.join(_CONTENT)} and a kind of {kinds}."
      f" {exact.REMEDY}"
    )
  if content["kind"] != _SHARDED and (epath.Path(path) / PART).exists():
    raise ValueError(
      f"{path} is a part of an index, whose embeddings are the files of another"
      " directory. Expected a whole one. Open the index two folders above."
    )
  if encoder_fingerprint not in ("", content["encoder_fingerprint"]):
    raise ValueError(
      f"The index at {path} was built by other weights: its passage encoder has"
      f" the fingerprint {content['encoder_fingerprint']!r}, the one in use has"
      f" {encoder_fingerprint!r}. Use the weights that built it, or rebuild."
      f" {exact.REMEDY}"
    )
  if passages_fingerprint not in ("", content["passages_fingerprint"]):
    raise ValueError(
      f"The index at {path} was built of other passages: theirs is the"
      f" fingerprint {content['passages_fingerprint']!r}, data.passages has"
      f" {passages_fingerprint!r}. Set data.passages to those that it was built"
      f" of, or rebuild. {exact.REMEDY}"
    )
  if content["kind"] == _SHARDED:
    index = sharded.ShardedIndex.load(path, content, _KINDS)
  elif content["kind"] == "device":
    index = device_index.DeviceIndex.load(path, content, mesh)
  else:
    index = _KINDS[content["kind"]].load(path, content)
  if "certificate" in content:  # indexes of before have none
    index.certificate = Certificate.from_content(
      content["certificate"], f"{path}/{artifacts.MANIFEST}"
    )
  return index


def _builder(
  kind: str,
  config: IndexConfig,
  encoder_fingerprint: str,
  passages_fingerprint: str,
  mesh: Mesh | None = None,
) -> Callable[[Any], Index]:
  """Returns embeddings in float32 -> index of a kind."""
  fingerprints = {
    "encoder_fingerprint": encoder_fingerprint,
    "passages_fingerprint": passages_fingerprint,
  }
  if kind == "scann":
    return lambda rows: scann.ScannIndex.build(rows, config, **fingerprints)
  if kind == "device":
    return lambda rows: device_index.DeviceIndex.build(
      rows, config, **fingerprints, mesh=mesh
    )
  return lambda rows: exact.ExactIndex(rows, **fingerprints)


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
  bad = exact.bad_rows(embeddings)
  if len(bad):
    raise ValueError(
      f"The embeddings of {len(bad)} of {len(embeddings)} passages hold NaN,"
      f" infinity or huge numbers: rows {exact.name_rows(bad)}. Expected finite"
      " numbers. Check the passage encoder: its training may have diverged; go"
      " back to an earlier checkpoint."
    )
