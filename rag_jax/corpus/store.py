"""Passages on the disk, read at random rows: all of Wikipedia in no memory.

In: any number of passages, one after the other. Out: a directory of ArrayRecord
shards with one JSON record a passage, a table from ids to rows, and a manifest;
and `PassageStore`, which does what `Passages` does. A directory can be moved.
"""

from collections.abc import Iterable, Mapping, Sequence
import contextlib
import json
import os
import re
import time
from typing import Any

from absl import logging
from etils import epath

from rag_jax import artifacts
from rag_jax.corpus import id_table
from rag_jax.corpus import shards as shards_lib
from rag_jax.corpus.passages import Passage
from rag_jax.corpus.passages import Passages
from rag_jax.corpus.passages import fingerprint_parts
from rag_jax.directory_lock import building
from rag_jax.disk import UnwritableError

KIND = "passages"
FORMAT = 1  # raise when the files or the manifest change their meaning
PASSAGES_PER_SHARD = 1 << 18  # 80 shards for Wikipedia's 21 million

_CONTENT = {
  "num_passages": int,
  "passages_per_shard": int,
  "fingerprint": str,
  "config": dict,
}


def _is_own(name: str) -> bool:
  """Returns whether a file is one that writing a store makes."""
  tables = (id_table.HASHES, id_table.ROWS)
  return (
    name in tables
    or re.fullmatch(r"passages-\d{5,}\.arrayrecord", name) is not None
    or (name.startswith(".") and name.endswith(".tmp"))
  )


def is_store(directory: epath.PathLike) -> bool:
  """Returns whether a store was written to `directory`, or begun to be."""
  directory = epath.Path(directory)
  manifest = directory / artifacts.MANIFEST
  if not manifest.exists():
    return (directory / shards_lib.shard_name(0)).exists()
  try:
    # Many a folder has a manifest.json of something else.
    return json.loads(manifest.read_text())["kind"] == KIND
  except (ValueError, KeyError, TypeError):
    return (directory / shards_lib.shard_name(0)).exists()


class _Writer:
  """Takes passages in their order and writes all files but the manifest."""

  def __init__(self, directory: epath.Path, passages_per_shard: int):
    self._directory = directory
    self._shard_rows = passages_per_shard
    self._ids = id_table.IdTableWriter(directory)
    self._shard: Any = None
    self._started = time.monotonic()
    self.num_passages = 0

  def add(self, passage: Passage) -> tuple[str, str, str]:
    """Writes a passage; returns its lines of the fingerprint."""
    with _full_disk(self._directory):
      if self.num_passages % self._shard_rows == 0:
        self._next_shard()
      self._shard.write(shards_lib.encode(passage))
      self._ids.add(passage.id)
    self.num_passages += 1
    return fingerprint_parts(passage)

  def _next_shard(self) -> None:
    self._close_shard()
    shard = self.num_passages // self._shard_rows
    if shard:
      logging.info(
        "%d passages written to %s, %.0f a second.",
        self.num_passages,
        self._directory,
        self.num_passages / max(time.monotonic() - self._started, 1e-9),
      )
    path = self._directory / shards_lib.shard_name(shard)
    self._shard = shards_lib.open_writer(path)

  def _close_shard(self) -> None:
    # Forgotten first: one that failed to close is not closed again.
    shard, self._shard = self._shard, None
    if shard is not None:
      shard.close()

  def finish(self) -> None:
    """Writes what is left, and the table of the ids.

    Raises:
      ValueError: two passages have the same id.
    """
    self._close_shard()
    shards = shards_lib.Shards(
      self._directory, self.num_passages, self._shard_rows
    )
    for rows in self._ids.sort():
      first: dict[str, int] = {}
      for row in rows:
        (passage,) = shards.read([row])
        if first.setdefault(passage.id, row) != row:
          raise ValueError(
            f"Rows {first[passage.id]} and {row} of the {self.num_passages}"
            f" passages for {self._directory} both have the id"
            f" {passage.id!r}. Expected one passage an id; rename or remove"
            " one, and write the store again."
          )

  def close(self) -> None:
    """Closes files, as far as they are open."""
    with contextlib.suppress(RuntimeError, OSError):
      self._close_shard()
    with contextlib.suppress(OSError):
      self._ids.close()


class _full_disk:  # noqa: N801, used like a function
  """Raises one readable `OSError` for those of the libraries below.

  A class, because it is entered for every passage.
  """

  def __init__(self, directory: epath.Path):
    self._directory = directory

  def __enter__(self) -> None: ...

  def __exit__(self, kind: object, error: object, trace: object) -> None:
    # RuntimeError: ArrayRecord's.
    if isinstance(error, OSError | RuntimeError):
      raise UnwritableError(
        f"The passages cannot be written to {self._directory} ({error})."
        " Expected a disk with room for their texts and 32 bytes more for each."
        " What was written so far is removed. Free some space, or choose"
        " another directory, and write the store again."
      ) from error


def _remove_own(directory: epath.Path) -> None:
  """Removes what an interrupted writer left, but not the lock."""
  for name in os.listdir(directory):
    if _is_own(name) and not name.startswith(".lock"):
      (directory / name).unlink()


def write_store(
  directory: epath.PathLike,
  passages: Iterable[Passage],
  *,
  passages_per_shard: int = PASSAGES_PER_SHARD,
  config: Mapping[str, Any] | None = None,
) -> "PassageStore":
  """Writes passages to a directory and returns them as a `PassageStore`.

  Memory does not grow with the passages. The manifest is written last: what
  was interrupted is no store, and the next call begins again.

  Args:
    directory: local; empty, or left by a writer that was interrupted.
    passages: in the order of the index; read once.
    passages_per_shard: records a file.
    config: what made the passages, for the manifest; what JSON can hold.

  Raises:
    ValueError: there are no passages, two have one id (names their rows), the
      directory holds something or somebody writes there, or it is in a bucket.
    TypeError: JSON cannot hold the config.
    OSError: the disk is full.
  """
  _check_settings(passages_per_shard, config)
  with building(directory, kind="passage store", own=_is_own) as directory:
    if (directory / artifacts.MANIFEST).exists():
      raise ValueError(
        f"{directory} holds a complete store, or something else with a"
        f" {artifacts.MANIFEST}, which is not written over. Expected an empty"
        " directory. Open it with PassageStore, remove it, or choose another."
      )
    _remove_own(directory)
    writer = _Writer(directory, passages_per_shard)
    try:
      fingerprint = artifacts.fingerprint_lines(
        line for passage in passages for line in writer.add(passage)
      )
      if not writer.num_passages:
        raise ValueError(
          f"There are no passages to write to {directory}. Expected at least"
          " one. Is the corpus empty, or was all of it dropped?"
        )
      with _full_disk(directory):
        writer.finish()
        writer.close()
        artifacts.write_manifest(
          directory,
          kind=KIND,
          format=FORMAT,
          content={
            "num_passages": writer.num_passages,
            "passages_per_shard": passages_per_shard,
            "fingerprint": fingerprint,
            "config": dict(config or {}),
          },
        )
    except BaseException:
      writer.close()
      _remove_own(directory)
      raise
  return PassageStore(directory)


def _check_settings(
  passages_per_shard: int, config: Mapping[str, Any] | None
) -> None:
  """Raises before the long work what would be raised after it."""
  if passages_per_shard < 1:
    raise ValueError(
      f"passages_per_shard={passages_per_shard} puts no passages into a file."
      f" Expected at least 1; leave it out for {PASSAGES_PER_SHARD}."
    )
  try:
    json.dumps(dict(config or {}))
  except (TypeError, ValueError) as error:
    raise TypeError(
      f"The config of the passages cannot be kept ({error}). Expected what JSON"
      " can hold: strings, numbers, lists and objects of them. Convert it."
    ) from error


class PassageStore(Passages):
  """Passages on the disk, in the order of the index. Threads may share it.

  In memory are 8 bytes a passage, once all shards were read from.

  Attributes:
    origin: the directory, for messages.
    config: what made the passages.
  """

  def __init__(self, directory: epath.PathLike):
    """Opens what `write_store` wrote, wherever it was moved.

    Raises:
      FileNotFoundError: no store was written there, or it was interrupted.
      ValueError: a file is missing, cut off or changed, or of a newer format,
        or the directory is in a bucket.
    """
    directory = epath.Path(directory).expanduser()
    if not artifacts.is_local(directory):
      raise ValueError(
        f"The passages in {directory} cannot be read one by one from a bucket."
        " Expected a local directory. Copy it to a disk first, for instance"
        " with `gcloud storage cp -r`."
      )
    content = artifacts.read_manifest(
      directory, kind=KIND, format=FORMAT, remedy=shards_lib.REMEDY
    )
    bad = [k for k, t in _CONTENT.items() if not isinstance(content.get(k), t)]
    for name in ("num_passages", "passages_per_shard"):
      # true is an int to isinstance, and 0 passages are no store.
      if name not in bad and (content[name] is True or content[name] < 1):
        bad.append(name)
    if bad:
      raise ValueError(
        f"{directory}/{artifacts.MANIFEST} describes no passages that can be"
        f" read: {', '.join(bad)} missing or wrong; expected"
        f" {', '.join(_CONTENT)}. {shards_lib.REMEDY}"
      )
    self.origin = os.fspath(directory)
    self.config: dict[str, Any] = content["config"]
    self.fingerprint = content["fingerprint"]
    self._num_passages: int = content["num_passages"]
    self._shards = shards_lib.Shards(
      directory, self._num_passages, content["passages_per_shard"]
    )
    self._ids = id_table.IdTable(directory)
    self._ids.check(self._num_passages)

  def __len__(self) -> int:
    return self._num_passages

  def _read(self, rows: Sequence[int]) -> Iterable[Passage]:
    return self._shards.read(rows)

  def open_all(self) -> None:
    """Opens all files, so that they can be read after they were removed."""
    self._shards.open_all()

  def row_of(self, id: str) -> int | None:
    """Returns the row of the passage with this id; None if there is none."""
    for row in self._ids.candidates(id):
      if self[row].id == id:
        return row
    return None
