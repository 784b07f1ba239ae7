"""An index in shards, each of which searches a contiguous range of the rows.

In: memory-mapped embeddings. Out: a directory with one index per shard, built
one after the other, and an index that searches the shards in parallel.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
import dataclasses
import itertools
import json
import os
from typing import Any

from absl import logging
from etils import epath
from jaxtyping import Float, Int
import numpy as np

from rag_jax import artifacts
from rag_jax.processes import is_first
from rag_jax.processes import wait_for_all
from rag_jax.retrieval.certificate import Certificate
from rag_jax.retrieval.embeddings import JoinedRows
from rag_jax.retrieval.embeddings import is_in
from rag_jax.retrieval.exact import search_exactly
from rag_jax.retrieval.index_core import ARTIFACT
from rag_jax.retrieval.index_core import FORMAT
from rag_jax.retrieval.index_core import REMEDY
from rag_jax.retrieval.index_core import Found
from rag_jax.retrieval.index_core import Index
from rag_jax.retrieval.index_core import IndexInfo
from rag_jax.retrieval.index_core import check_search
from rag_jax.retrieval.remote_shards import RemoteShard
from rag_jax.retrieval.remote_shards import owned_shards
from rag_jax.retrieval.remote_shards import share_shards

KIND = "sharded"  # several indexes of another kind
_FOLDER = "shards"
_INPUTS = "inputs.json"  # in the folder of a shard: what it was built of

BuildShard = Callable[[Any], Any]  # float32 embeddings -> Index


class ShardedIndex(Index):
  """Host indexes (the shards), which together hold all rows, in order.

  With exact search the result equals that of a single index, bit for bit: a
  score does not depend on the shard. Some may be in other processes.
  """

  def __init__(self, shards: Sequence[Any]):
    self.shards = list(shards)
    remote = [isinstance(shard, RemoteShard) for shard in shards]
    self.is_spread = any(remote)
    embeddings = JoinedRows([shard.embeddings for shard in shards])
    first = shards[0].info
    info = dataclasses.replace(
      first,
      kind=KIND,
      num_passages=len(embeddings),
      settings={"shards": len(shards), **first.settings},
      certificate=None,
    )
    super().__init__(info, embeddings, sum(s.memory_bytes for s in shards))
    # NumPy and ScaNN release the GIL while they multiply. Remote shards only
    # wait.
    workers = sum(remote) + min(remote.count(False), os.cpu_count() or 1)
    self._threads = futures.ThreadPoolExecutor(workers, "shard")

  def connect(self) -> None:
    """Lets the processes search their shards for each other; see `Index`."""
    if self.is_spread:
      share_shards(self.shards, self.info.identity)

  def search(
    self, question_embeddings: Float[np.ndarray, "B R"], n_docs: int
  ) -> Found:
    """Returns the best passages of all shards; see `Index.search`."""
    return self._best(
      question_embeddings, n_docs, lambda shard, *args: shard.search(*args)
    )

  def exact_search(
    self, question_embeddings: Float[np.ndarray, "B R"], n_docs: int
  ) -> Found:
    """Returns what exact search finds in the embeddings of all shards."""
    return self._best(question_embeddings, n_docs, exact_search)

  def _best(
    self,
    question_embeddings: np.ndarray,
    n_docs: int,
    search: Callable[[Any, np.ndarray, int], Found],
  ) -> Found:
    """Returns the best of what `search` finds in each shard."""
    questions = check_search(self.info, question_embeddings, n_docs)
    found = self._threads.map(
      lambda shard: search(
        shard, questions, min(n_docs, shard.info.num_passages)
      ),
      self.shards,
    )
    ids, scores, offset = [], [], 0
    for shard, (shard_ids, shard_scores) in zip(
      self.shards, found, strict=True
    ):
      ids.append(shard_ids + np.int32(offset))
      scores.append(shard_scores)
      offset += shard.info.num_passages
    return merge(np.concatenate(ids, 1), np.concatenate(scores, 1), n_docs)

  def save(self, path: epath.PathLike) -> None:
    """Writes the index to directory `path`, its manifest last.

    If it is spread, all processes write their shards.
    """
    path = epath.Path(path)
    wait = wait_for_all if self.is_spread else lambda what: None
    writes = not self.is_spread or is_first()
    if writes:
      artifacts.start_directory(path)
    wait("the directory of an index is there")
    for i, shard in enumerate(self.shards):
      if not isinstance(shard, RemoteShard):
        (_folder(path, i) / _INPUTS).unlink(missing_ok=True)
        shard.save(_folder(path, i))
    wait("the shards of an index are saved")
    if writes:
      count, certificate = len(self.shards), self.certificate
      self.certificate = _write_manifest(path, count, certificate)
    wait("an index is saved")

  @classmethod
  def load(
    cls,
    path: epath.PathLike,
    info: IndexInfo,
    kinds: Mapping[str, Any],
    spread: bool = False,
  ) -> "ShardedIndex":
    """Opens what `save` or `build_directory` wrote.

    Args:
      path: the directory.
      info: its manifest. `index.load_index` has checked it, and every file of
        every shard.
      kinds: the index classes that a shard may have, by kind.
      spread: whether this process opens its share alone; see `connect`.

    Raises:
      ValueError: the shards do not fit together.
    """
    path = epath.Path(path)
    contents = info.settings.get("shards")
    if (
      not isinstance(contents, list)
      or not contents
      or not all(isinstance(c, Mapping) for c in contents)
      or any(c.get("kind") not in kinds for c in contents)
      or sum(c["num_passages"] for c in contents) != info.num_passages
    ):
      raise ValueError(
        f"The manifest of {path} names the kind 'sharded', but its shards"
        f" {contents} are not of the kinds {sorted(kinds)} with"
        f" {info.num_passages} passages in total. {REMEDY}"
      )
    folders = [_folder(path, i) for i in range(len(contents))]
    infos = [
      IndexInfo.from_content(content, os.fspath(folder), kinds)
      for folder, content in zip(folders, contents, strict=True)
    ]
    own = owned_shards(len(infos)) if spread else range(len(infos))
    return cls(
      [
        kinds[info.kind].load(folder, info) if i in own else RemoteShard(info)
        for i, (folder, info) in enumerate(zip(folders, infos, strict=True))
      ]
    )


def exact_search(
  index: Index, questions: Float[np.ndarray, "B R"], n_docs: int
) -> Found:
  """Returns what exact search finds in the embeddings of `index`."""
  if isinstance(index, ShardedIndex | RemoteShard):
    return index.exact_search(questions, n_docs)
  return search_exactly(index, questions, n_docs)


def shard_bounds(
  num_passages: int, passages_per_shard: int
) -> list[tuple[int, int]]:
  """Returns (start, stop) of the rows of each shard.

  The sizes differ by at most one.

  Args:
    num_passages: at least 1.
    passages_per_shard: the largest size of a shard; 0 for a single shard.
  """
  number = -(-num_passages // (passages_per_shard or num_passages))
  ends = [num_passages * i // number for i in range(number + 1)]
  return list(itertools.pairwise(ends))


def merge(
  ids: Int[np.ndarray, "B N"], scores: Float[np.ndarray, "B N"], n_docs: int
) -> Found:
  """Returns the `n_docs` best of each row; of equal scores the smaller id."""
  order = np.lexsort((ids, -scores), axis=1)[:, :n_docs]
  return (
    np.take_along_axis(ids, order, axis=1),
    np.take_along_axis(scores, order, axis=1),
  )


def build_directory(
  path: epath.PathLike,
  embeddings: Float[Any, "P R"],
  passages_per_shard: int,
  build_shard: BuildShard,
  inputs: Mapping[str, Any],
) -> None:
  """Builds an index into directory `path`, one shard in memory at a time.

  After an interruption, call it again: it keeps the finished shards that were
  built of the same inputs.

  Args:
    path: the directory. Other files in the folders of its shards are removed.
    embeddings: [P, R], read shard by shard: a memory map of any type. If they
      are the files in `path`, the shards do not store them again.
    passages_per_shard: the largest size of a shard.
    build_shard: builds the index of a shard from its rows in float32.
    inputs: everything else that a shard depends on: settings, fingerprints.
  """
  path = artifacts.start_directory(path)
  bounds = shard_bounds(len(embeddings), passages_per_shard)
  for i, (start, stop) in enumerate(bounds):
    if is_in(embeddings, path):
      rows = embeddings.part(start, stop)
      arrays = rows.arrays
    else:
      rows = np.asarray(embeddings[start:stop])
      arrays = {"rows": rows}
    wanted = json.dumps(
      dict(inputs)
      | {
        "rows": [start, stop],
        "embeddings": artifacts.fingerprint_arrays(arrays),
      },
      sort_keys=True,
    )
    folder = _folder(path, i)
    kept = _is_finished(folder, wanted)
    if not kept:
      if folder.exists():
        folder.rmtree()
      folder.mkdir(parents=True)
      (folder / _INPUTS).write_text(wanted)  # the manifest will list it
      build_shard(_float32(rows)).save(folder)
    logging.info(
      "Shard %d of %d: %d passages %s.",
      i + 1,
      len(bounds),
      stop - start,
      "kept" if kept else "indexed",
    )
  _write_manifest(path, len(bounds))


def _float32(rows: Any) -> Any:
  """Returns rows in float32; `StoredEmbeddings` convert what is read."""
  if not isinstance(rows, np.ndarray):
    return rows
  return np.ascontiguousarray(rows, np.float32)


def _is_finished(folder: epath.Path, wanted: str) -> bool:
  """Returns whether a shard is complete and was built of `wanted`."""
  try:
    artifacts.read_manifest(folder, kind=ARTIFACT, format=FORMAT, remedy=REMEDY)
  except (FileNotFoundError, ValueError) as e:
    if folder.exists():
      logging.info("%s will be built again: %s", folder, e)
    return False
  file = folder / _INPUTS
  same = file.exists() and file.read_text() == wanted
  if not same:
    logging.info("%s will be built again: its inputs changed.", folder)
  return same


def _write_manifest(
  path: epath.Path, num_shards: int, certificate: Certificate | None = None
) -> Certificate | None:
  """Writes the manifest of the index and returns the certificate in it.

  Shards of an earlier index with more shards are removed.
  """
  folders = [_folder(path, i) for i in range(num_shards)]
  names = {folder.name for folder in folders}
  for old in (path / _FOLDER).iterdir():
    if old.name not in names:
      old.rmtree()
  contents = [
    json.loads((folder / artifacts.MANIFEST).read_text())["content"]
    for folder in folders
  ]
  info = IndexInfo(
    kind=KIND,
    num_passages=sum(c["num_passages"] for c in contents),
    embedding_dim=contents[0]["embedding_dim"],
    encoder_fingerprint=contents[0]["encoder_fingerprint"],
    passages_fingerprint=contents[0]["passages_fingerprint"],
    settings={"shards": contents},
    certificate=certificate,
  )
  return info.write(path).certificate


def _folder(path: epath.Path, shard: int) -> epath.Path:
  return path / _FOLDER / f"{shard:05d}"
