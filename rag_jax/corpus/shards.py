"""Files of passages that are read one by one, at random.

In: passages, one after the other. Out: ArrayRecord files of one JSON record a
passage, and their passages by row. The one file that imports array_record.
"""

from collections.abc import Iterator, Sequence
import json
import os
import threading
from typing import Any

# Compiled, and without a description of its types.
from array_record.python import array_record_module as array_record  # pyright: ignore[reportAttributeAccessIssue]
from etils import epath

from rag_jax.corpus.passages import Passage

REMEDY = "Copy the directory again, or write it again with write_store."

# Each record is a chunk of its own, which is read without its neighbours.
_WRITER_OPTIONS = "group_size:1"
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
_READER_BYTES = 1 << 15  # read at once; the default of 1 MiB is for whole files


def shard_name(shard: int) -> str:
  """Returns the file name of a shard."""
  return f"passages-{shard:05d}.arrayrecord"


def open_writer(path: epath.Path) -> Any:
  """Returns a file with `write(bytes)` and `close()`.

  Both raise RuntimeError where the disk is full; only after `close` returned
  is everything written.
  """
  return array_record.ArrayRecordWriter(os.fspath(path), _WRITER_OPTIONS)


def encode(passage: Passage) -> bytes:
  """Returns one record."""
  parts: list[Any] = [passage.id, passage.title, passage.text]
  if passage.metadata:
    parts.append(passage.metadata)
  text = json.dumps(parts, ensure_ascii=False, separators=(",", ":"))
  # Texts from JSON can hold half of a surrogate pair.
  return text.encode("utf-8", "surrogatepass")


def decode(record: bytes) -> Passage:
  """Returns the passage of one record."""
  id_, title, text, *metadata = json.loads(
    record.decode("utf-8", "surrogatepass")
  )
  pairs = tuple((k, v) for k, v in (metadata[0] if metadata else ()))
  texts = (id_, title, text, *(part for pair in pairs for part in pair))
  if not all(type(part) is str for part in texts):
    raise ValueError("a part of the passage is no text")
  return Passage(id_, title, text, pairs)


class Shards:
  """The records of the shards, by row. Threads may share it."""

  def __init__(self, directory: epath.Path, num_rows: int, shard_rows: int):
    self._directory = directory
    self._num_rows = num_rows
    self._shard_rows = shard_rows
    self._readers: dict[int, Any] = {}
    self._lock = threading.Lock()

  def _reader(self, shard: int) -> Any:
    """Returns what reads a shard, opened when the first row is asked for."""
    with self._lock:
      if shard not in self._readers:
        path = self._directory / shard_name(shard)
        reader = array_record.ArrayRecordReader(
          os.fspath(path),
          options=_READER_OPTIONS,
          file_reader_buffer_size=_READER_BYTES,
        )
        expected = min(
          self._shard_rows, self._num_rows - shard * self._shard_rows
        )
        if reader.num_records() != expected:
          # What it says of a file that it cannot read at all: 0 records.
          raise RuntimeError(
            f"it has {reader.num_records()} records instead of {expected}"
          )
        self._readers[shard] = reader
      return self._readers[shard]

  def open_all(self) -> None:
    """Opens every shard that was not read from yet.

    Raises:
      ValueError: one cannot be read.
    """
    for row in range(0, self._num_rows, self._shard_rows):
      for _ in self.read([row]):
        pass

  def read(self, rows: Sequence[int]) -> Iterator[Passage]:
    """Yields the passages of `rows`; rows that follow each other at once."""
    start = 0
    while start < len(rows):
      shard, first = divmod(rows[start], self._shard_rows)
      room = min(len(rows) - start, self._shard_rows - first)
      stop = 1
      while stop < room and rows[start + stop] == rows[start] + stop:
        stop += 1
      try:
        # Not read([row]), which asks a pool of threads: 100 times slower.
        records = self._reader(shard).read(first, first + stop)
        passages = [decode(record) for record in records]
      except (
        RuntimeError, ValueError, IndexError, TypeError, OverflowError
      ) as error:  # fmt: skip
        raise ValueError(
          f"{shard_name(shard)} in {self._directory} cannot be read at record"
          f" {first} ({error}). Expected the file as it was when the store was"
          f" opened; it has changed since, or the disk is failing. {REMEDY}"
        ) from error
      yield from passages
      start += stop
