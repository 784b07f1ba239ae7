"""Builds the arrays of a BM25 index from words, in bounded memory.

In: passages, one after the other, as lists of words. Out: three .npy files: for
each word the passages that contain it, in ascending order, and its scores.

This is an external sort: blocks of words are sorted in memory and written to
one file as runs. After the last passage the runs are merged, some words at a
time. It runs on the host.
"""

from array import array
from collections.abc import Iterable, Iterator
import contextlib
import itertools
import math
import os
from typing import Any

from absl import logging
from etils import epath
import numpy as np

from rag_jax.corpus.npy_files import ArrayRows
from rag_jax.corpus.npy_files import read_array
from rag_jax.disk import UnwritableError

# The start of each word in the next two; the passages with it; the scores.
ARRAYS = {"starts": np.int64, "passages": np.int32, "scores": np.float32}

_BLOCK = 1 << 22  # words, or postings when merging, in memory at once
_POSTING = np.dtype(
  [("word", np.int32), ("passage", np.int32), ("count", np.int32)]
)


class Postings:
  """How often each passage contains each of its words, on the disk.

  In memory are the distinct words of all passages, 4 bytes per passage, and one
  block.

  Attributes:
    vocabulary: the id of each word, in the order of first use.
  """

  def __init__(self, directory: epath.PathLike):
    """Starts empty; `directory` has to exist, on a local disk."""
    self.vocabulary: dict[str, int] = {}
    self._directory = epath.Path(directory)
    self._path = self._directory / ".runs.tmp"
    self._file = open(self._path, "wb")  # noqa: SIM115, closed by `close`
    self._words = array("i")  # word ids of the current block
    self._lengths = array("i")  # number of words per passage
    self._num_sorted = 0  # number of passages in the runs
    self._ends = [0]  # where the runs end, in postings
    self._num_holders = np.zeros(0, np.int64)  # passages with each word

  def __len__(self) -> int:
    return len(self._lengths)

  def add(self, words: Iterable[str]) -> None:
    """Adds the words of the next passage.

    Raises:
      OSError: the disk is full.
    """
    number, before = self.vocabulary, len(self._words)
    self._words.extend(number.setdefault(word, len(number)) for word in words)
    self._lengths.append(len(self._words) - before)
    if len(self._words) >= _BLOCK:
      self._write_run()

  def _write_run(self) -> None:
    """Writes the block as a run, sorted by word and then passage."""
    first, self._num_sorted = self._num_sorted, len(self)
    passages = np.arange(first, len(self))
    keys = np.array(self._words, np.int64) << 32
    keys |= np.repeat(passages, self._lengths[first:])
    keys.sort()
    starts = np.flatnonzero(np.diff(keys, prepend=-1))
    run = np.empty(len(starts), _POSTING)
    run["word"] = keys[starts] >> 32
    run["passage"] = keys[starts] & 0xFFFFFFFF
    run["count"] = np.diff(starts, append=len(keys))
    with _full_disk(self._directory):
      self._file.write(run.view(np.uint8).data)
    self._words = array("i")
    self._ends.append(self._ends[-1] + len(run))
    holders = np.bincount(run["word"], minlength=len(self.vocabulary))
    holders[: len(self._num_holders)] += self._num_holders
    self._num_holders = holders
    logging.log_every_n_seconds(
      logging.INFO, "Sorted the words of %d passages.", 30, len(self)
    )

  def write_arrays(self, k1: float, b: float) -> None:
    """Writes the arrays `ARRAYS`; call it after the last passage was added.

    `k1` and `b` are those of `Bm25Settings`.

    Raises:
      OSError: the disk is full.
    """
    if self._words:
      self._write_run()
    with _full_disk(self._directory):
      self._file.flush()
    starts = np.concatenate([[0], np.cumsum(self._num_holders)])
    shape = (int(starts[-1]),)
    lengths = np.array(self._lengths)
    mean_length = int(lengths.sum(dtype=np.int64)) / len(self)
    idf = _idf(self._num_holders, len(self))
    with (
      _full_disk(self._directory),
      self._array("starts", starts.shape) as starts_file,
      self._array("passages", shape) as passages_file,
      self._array("scores", shape) as scores_file,
    ):
      starts_file.append(starts)
      for postings in self._merged(starts):
        passages = postings["passage"]
        count = postings["count"].astype(np.float32)
        # In float64, and in the order of bm25s, to get the same bits.
        room = k1 * ((1 - b) + b * lengths[passages] / mean_length)
        passages_file.append(passages)
        scores_file.append(idf[postings["word"]] * (count / (room + count)))

  @contextlib.contextmanager
  def _array(self, name: str, shape: tuple[int, ...]) -> Iterator[ArrayRows]:
    """Yields a new file, which is renamed when it is complete.

    Until then an index that was opened from the directory reads the old file.
    """
    temp = self._directory / f".{name}.npy.tmp"
    rows = ArrayRows(temp, shape, ARRAYS[name])
    try:
      yield rows
      rows.flush()
      rows.close()
      os.replace(temp, self._directory / f"{name}.npy")
    finally:
      with contextlib.suppress(OSError):
        rows.close()
      temp.unlink(missing_ok=True)

  def _merged(self, starts: np.ndarray) -> Iterator[np.ndarray]:
    """Yields all postings sorted by word and passage, block by block."""
    # Each block holds the words between two of these bounds.
    bounds = [0]
    while bounds[-1] < len(starts) - 1:
      most = starts[bounds[-1]] + _BLOCK
      last = int(np.searchsorted(starts, most, side="right")) - 1
      bounds.append(max(last, bounds[-1] + 1))  # one word may exceed a block
    # Where these words are in each run, found by reading every run once.
    places = [
      (start + np.searchsorted(self._read(start, end)["word"], bounds)).tolist()
      for start, end in itertools.pairwise(self._ends)
    ]
    for part, (first, last) in enumerate(itertools.pairwise(bounds)):
      slices = (self._read(run[part], run[part + 1]) for run in places)
      if starts[last] - starts[first] > _BLOCK:  # one word: already sorted
        yield from slices
        continue
      postings = np.concatenate(list(slices))
      # Later runs have later passages.
      yield postings[np.argsort(postings["word"], kind="stable")]

  def _read(self, start: int, end: int) -> np.ndarray:
    """Returns postings of the file. A memory map would count as memory."""
    offset = start * _POSTING.itemsize
    return np.fromfile(self._path, _POSTING, end - start, offset=offset)

  def close(self) -> None:
    """Removes the file of the runs."""
    with contextlib.suppress(OSError):
      self._file.close()
    self._path.unlink(missing_ok=True)


def _idf(num_holders: np.ndarray, num_passages: int) -> np.ndarray:
  """Returns the inverse document frequency (weight) of each word."""
  # Not np.log, whose last bit may differ from that of bm25s.
  numbers, which = np.unique(num_holders, return_inverse=True)
  weights = [
    math.log(1 + (num_passages - n + 0.5) / (n + 0.5)) for n in numbers.tolist()
  ]
  return np.array(weights, np.float32)[which]


@contextlib.contextmanager
def _full_disk(directory: epath.Path) -> Iterator[None]:
  """Explains what to do when a file cannot be written."""
  try:
    yield
  except OSError as error:
    raise UnwritableError(
      f"The BM25 index cannot be written to {directory} ({error}). Expected"
      " room for 20 bytes per distinct word of each passage, of which 12 are"
      " freed after the build. Free some space, or choose another directory,"
      " and build it again."
    ) from error


def open_arrays(
  path: epath.Path, vocabulary: Any, remedy: str, num_passages: int
) -> dict[str, np.ndarray]:
  """Returns the arrays `ARRAYS`, which stay on the disk until used.

  Raises:
    ValueError: the files do not belong to the same build.
  """
  arrays = {name: read_array(path / f"{name}.npy", remedy) for name in ARRAYS}
  starts, passages, scores = (arrays[name] for name in ARRAYS)
  typed = all(
    arrays[name].dtype == dtype and arrays[name].ndim == 1
    for name, dtype in ARRAYS.items()
  )
  if (
    not typed
    or not isinstance(vocabulary, list)
    or not all(isinstance(word, str) for word in vocabulary)
    or starts.shape != (len(vocabulary) + 1,)
    or len(passages) != starts[-1]
    or len(scores) != starts[-1]
  ):
    shapes = {name: (a.shape, a.dtype.name) for name, a in arrays.items()}
    raise ValueError(
      f"{path} holds arrays {shapes} for the words {str(vocabulary)[:80]};"
      " expected a list of words, one more start than words, and as many"
      " passages and scores as the last start says; the directory mixes two"
      f" builds. {remedy}"
    )
  # A search with such ids would read beyond the end of memory.
  ids = int(passages.min(initial=0)), int(passages.max(initial=0))
  rising = bool(np.all(starts[1:] >= starts[:-1])) and starts[0] == 0
  if ids[0] < 0 or ids[1] >= max(num_passages, 1) or not rising:
    raise ValueError(
      f"{path} holds passages from {ids[0]} to {ids[1]}; expected 0 to"
      f" {num_passages - 1}, in the order of the words; the directory mixes two"
      f" builds. {remedy}"
    )
  return arrays
