"""Stores any number of passages on the disk, with random access.

In: passages, one after the other. Out: a directory of ArrayRecord shards with
one JSON record per passage, a table from ids to rows, and a manifest; and
`PassageStore`, which reads it as `Passages`. The directory can be moved. The
only file that imports array_record.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
import contextlib
import json
import os
import re
import threading
import time
from typing import Any

from absl import logging

# A compiled module without type stubs.
from array_record.python import array_record_module as array_record  # pyright: ignore[reportAttributeAccessIssue]
from etils import epath

from rag_jax import artifacts
from rag_jax.corpus import id_table
from rag_jax.corpus.passages import Passage
from rag_jax.corpus.passages import Passages
from rag_jax.corpus.passages import fingerprint_parts
from rag_jax.directory_lock import building
from rag_jax.disk import UnwritableError
from rag_jax.disk import is_unfinished

KIND = "passages"
FORMAT = 1  # raise when the files or the manifest change their meaning
PASSAGES_PER_SHARD = 1 << 18  # 80 shards for Wikipedia's 21 million
REMEDY = "Copy the directory again, or write it again with write_store."

# Each record is a chunk, so that it can be read without its neighbours.
_WRITER_OPTIONS = "group_size:1"
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
_READER_BYTES = 1 << 15  # per read; the default of 1 MiB suits whole files


def _is_own(name: str) -> bool:
  """Returns whether a file has a name that this module writes."""
  return (
    name in (id_table.HASHES, id_table.ROWS)
    or re.fullmatch(r"passages-\d{5,}\.arrayrecord", name) is not None
    or is_unfinished(name)
  )


def is_store(directory: epath.PathLike) -> bool:
  """Returns whether `directory` holds a store, complete or not."""
  directory = epath.Path(directory)
  manifest = directory / artifacts.MANIFEST
  if not manifest.exists():
    return (directory / _shard_name(0)).exists()
  try:
    # Other programs write files called manifest.json too.
    return json.loads(manifest.read_text())["kind"] == KIND
  except (ValueError, KeyError, TypeError):
    return (directory / _shard_name(0)).exists()


def _shard_name(shard: int) -> str:
  """Returns the file name of a shard."""
  return f"passages-{shard:05d}.arrayrecord"


def _open_writer(path: epath.Path) -> Any:
  """Returns a file with `write(bytes)` and `close()`.

  Both raise RuntimeError on a full disk. The data is only complete after
  `close` returns.
  """
  return array_record.ArrayRecordWriter(os.fspath(path), _WRITER_OPTIONS)


def encode(passage: Passage) -> bytes:
  """Returns a passage as one record."""
  parts: list[Any] = [passage.id, passage.title, passage.text]
  if passage.metadata:
    parts.append(passage.metadata)
  text = json.dumps(parts, ensure_ascii=False, separators=(",", ":"))
  # Texts from JSON can hold halves of surrogate pairs.
  return text.encode("utf-8", "surrogatepass")


def decode(record: bytes) -> Passage:
  """Returns the passage of one record."""
  id_, title, text, *metadata = json.loads(
    record.decode("utf-8", "surrogatepass")
  )
  pairs = tuple((k, v) for k, v in (metadata[0] if metadata else ()))
  texts = (id_, title, text, *(part for pair in pairs for part in pair))
  if not all(type(part) is str for part in texts):
    raise ValueError("a part of the passage is not a string")
  return Passage(id_, title, text, pairs)


class _Shards:
  """The passages in the shards, by row. Thread-safe."""

  def __init__(self, directory: epath.Path, num_rows: int, shard_rows: int):
    self._directory = directory
    self._num_rows = num_rows
    self._shard_rows = shard_rows
    self._readers: dict[int, Any] = {}
    self._lock = threading.Lock()

  def _reader(self, shard: int) -> Any:
    """Returns the reader of a shard, which is opened on first use."""
    with self._lock:
      if shard not in self._readers:
        path = self._directory / _shard_name(shard)
        reader = array_record.ArrayRecordReader(
          os.fspath(path),
          options=_READER_OPTIONS,
          file_reader_buffer_size=_READER_BYTES,
        )
        expected = min(
          self._shard_rows, self._num_rows - shard * self._shard_rows
        )
        if reader.num_records() != expected:
          # 0 records, if it cannot read the file at all.
          raise RuntimeError(
            f"it has {reader.num_records()} records instead of {expected}"
          )
        self._readers[shard] = reader
      return self._readers[shard]

  def open_all(self) -> None:
    """Opens every shard.

    Raises:
      ValueError: one cannot be read.
    """
    for row in range(0, self._num_rows, self._shard_rows):
      for _ in self.read([row]):
        pass

  def read(self, rows: Sequence[int]) -> Iterator[Passage]:
    """Yields the passages of `rows`; consecutive rows are read together."""
    start = 0
    while start < len(rows):
      shard, first = divmod(rows[start], self._shard_rows)
      room = min(len(rows) - start, self._shard_rows - first)
      stop = 1
      while stop < room and rows[start + stop] == rows[start] + stop:
        stop += 1
      try:
        # Not read([row]), which uses a thread pool and is 100 times slower.
        records = self._reader(shard).read(first, first + stop)
        passages = [decode(record) for record in records]
      except (
        RuntimeError, ValueError, IndexError, TypeError, OverflowError
      ) as error:  # fmt: skip
        raise ValueError(
          f"{_shard_name(shard)} in {self._directory} cannot be read at record"
          f" {first} ({error}). Expected the file as it was when the store was"
          f" opened; it has changed since, or the disk is failing. {REMEDY}"
        ) from error
      yield from passages
      start += stop


class _Writer:
  """Writes passages in their order; all files except the manifest."""

  def __init__(self, directory: epath.Path, passages_per_shard: int):
    self._directory = directory
    self._shard_rows = passages_per_shard
    self._ids = id_table.IdTableWriter(directory)
    self._shard: Any = None
    self._started = time.monotonic()
    self.num_passages = 0

  def add(self, passage: Passage) -> tuple[str, str, str]:
    """Writes a passage and returns its lines for the fingerprint."""
    with _full_disk(self._directory):
      if self.num_passages % self._shard_rows == 0:
        self._next_shard()
      self._shard.write(encode(passage))
      self._ids.add(passage.id)
    self.num_passages += 1
    return fingerprint_parts(passage)

  def _next_shard(self) -> None:
    self._close_shard()
    shard = self.num_passages // self._shard_rows
    if shard:
      logging.info(
        "%d passages written to %s, %.0f per second.",
        self.num_passages,
        self._directory,
        self.num_passages / max(time.monotonic() - self._started, 1e-9),
      )
    path = self._directory / _shard_name(shard)
    self._shard = _open_writer(path)

  def _close_shard(self) -> None:
    # Set to None first: a shard that fails to close is not closed again.
    shard, self._shard = self._shard, None
    if shard is not None:
      shard.close()

  def finish(self) -> None:
    """Closes the last shard and writes the table of the ids.

    Raises:
      ValueError: two passages have the same id.
    """
    self._close_shard()
    shards = _Shards(self._directory, self.num_passages, self._shard_rows)
    for rows in self._ids.sort():
      first: dict[str, int] = {}
      for row in rows:
        (passage,) = shards.read([row])
        if first.setdefault(passage.id, row) != row:
          raise ValueError(
            f"Rows {first[passage.id]} and {row} of the {self.num_passages}"
            f" passages for {self._directory} both have the id"
            f" {passage.id!r}. Expected one passage per id; rename or remove"
            " one, and run the same command again."
          )

  def close(self) -> None:
    """Closes the files that are open."""
    with contextlib.suppress(RuntimeError, OSError):
      self._close_shard()
    with contextlib.suppress(OSError):
      self._ids.close()


class _full_disk:  # noqa: N801, used like a function
  """Explains the errors that the libraries raise when they cannot write.

  A class, since it is entered for every passage and must be fast.
  """

  def __init__(self, directory: epath.Path):
    self._directory = directory

  def __enter__(self) -> None: ...

  def __exit__(self, kind: object, error: object, trace: object) -> None:
    # ArrayRecord raises RuntimeError.
    if isinstance(error, OSError | RuntimeError):
      raise UnwritableError(
        f"The passages cannot be written to {self._directory} ({error})."
        " Expected a disk with room for their texts and 32 bytes more for each."
        " What was written so far is removed. Free some space, or choose"
        " another directory, and run the same command again."
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

  Memory does not grow with the number of passages. The manifest is written
  last: after an interruption there is no store, and the next call starts again.

  Args:
    directory: a local directory; empty, or left by an interrupted call.
    passages: in the order of the index; read once.
    passages_per_shard: records per file.
    config: how the passages were made, for the manifest; JSON values.

  Raises:
    ValueError: there are no passages; two have the same id (names their rows);
      the directory holds other files or is in a bucket; or another process
      writes there.
    TypeError: the config is not made of JSON values.
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
  """Raises errors of the settings before the long work begins."""
  if passages_per_shard < 1:
    raise ValueError(
      f"passages_per_shard={passages_per_shard} puts no passages into a file."
      f" Expected at least 1; leave it out for {PASSAGES_PER_SHARD}."
    )
  try:
    json.dumps(dict(config or {}))
  except (TypeError, ValueError) as error:
    raise TypeError(
      f"The config of the passages cannot be saved ({error}). Expected JSON"
      " values: strings, numbers, lists and objects of them. Convert it."
    ) from error


class PassageStore(Passages):
  """Passages on the disk, in the order of the index. Thread-safe.

  It needs 8 bytes of memory per passage, once all shards have been read from.

  Attributes:
    origin: the directory, for messages.
    config: how the passages were made.
  """

  def __init__(self, directory: epath.PathLike):
    """Opens a directory that `write_store` wrote; it may have been moved.

    Raises:
      FileNotFoundError: no store was written there, or it was interrupted.
      ValueError: a file is missing, cut off or changed; the format is newer; or
        the directory is in a bucket.
    """
    directory = epath.Path(directory).expanduser()
    if not artifacts.is_local(directory):
      raise ValueError(
        f"The passages in {directory} cannot be read one by one from a bucket."
        " Expected a local directory. Copy it to a disk first, for instance"
        " with `gcloud storage cp -r`."
      )
    content = artifacts.read_manifest(
      directory, kind=KIND, format=FORMAT, remedy=REMEDY
    )
    content.check(num_passages=int, passages_per_shard=int)
    content.check(fingerprint=str, config=dict)
    for name in ("num_passages", "passages_per_shard"):
      if not content[name]:
        raise ValueError(
          f"{directory}/{artifacts.MANIFEST} says {name}=0; expected at least"
          f" 1. {REMEDY}"
        )
    self.origin = os.fspath(directory)
    self.config: dict[str, Any] = content["config"]
    self.fingerprint = content["fingerprint"]
    self._num_passages: int = content["num_passages"]
    self._shards = _Shards(
      directory, self._num_passages, content["passages_per_shard"]
    )
    self._ids = id_table.IdTable(directory, REMEDY)
    self._ids.check(self._num_passages)

  def __len__(self) -> int:
    return self._num_passages

  def _read(self, rows: Sequence[int]) -> Iterable[Passage]:
    return self._shards.read(rows)

  def open_all(self) -> None:
    """Opens all files, so that they can be read even after their removal."""
    self._shards.open_all()

  def row_of(self, id: str) -> int | None:
    """Returns the row of the passage with this id; None if there is none."""
    for row in self._ids.candidates(id):
      if self[row].id == id:
        return row
    return None
