"""Keeps the twins of passages: duplicates, with the same title and text.

Only one passage of each text is indexed. Its twins have other ids and perhaps
other metadata, and take its place when it is deleted.

In: the twins found while a corpus is read, each with the row of the passage
that is indexed. Out: a directory beside the passages, and `Twins`, which finds
the twins of a passage.

    rows.npy        for each twin, the row of the indexed passage
    passages/       the twins, a passage store; missing if there are none
    manifest.json
"""

from collections.abc import Iterable, Iterator, Sequence
import tempfile

from etils import epath
from jaxtyping import Int
import numpy as np

from rag_jax import artifacts
from rag_jax.corpus.npy_files import read_array
from rag_jax.corpus.passages import Passage
from rag_jax.corpus.passages import Passages
from rag_jax.corpus.store import PassageStore
from rag_jax.corpus.store import decode
from rag_jax.corpus.store import encode
from rag_jax.corpus.store import write_store

_KIND = "passages with the text of others"
_FORMAT = 1  # raise when the files change their meaning
_REMEDY = "Restore the directory from a copy, or build it again."
_ROWS, _PASSAGES = "rows.npy", "passages"


class Twins:
  """Twins of passages. They need 16 bytes of memory each.

  Attributes:
    rows: for each twin, the row of the passage that is indexed.
    passages: the twins; None if there are none.
  """

  def __init__(
    self, rows: Int[np.ndarray, "T"], passages: Passages | None = None
  ):
    """Keeps both, which have the same order."""
    self.rows, self.passages = rows, passages
    self._order = np.argsort(rows, kind="stable")

  def __len__(self) -> int:
    return len(self.rows)

  def __iter__(self) -> Iterator[Passage]:
    return iter(self.passages or ())

  def numbers_of(self, row: int) -> list[int]:
    """Returns the numbers of a passage's twins, in the order of the corpus."""
    first, last = (
      np.searchsorted(self.rows, row, side, sorter=self._order)
      for side in ("left", "right")
    )
    return self._order[first:last].tolist()

  def of(self, row: int) -> tuple[Passage, ...]:
    """Returns the twins of a passage, in the order of the corpus."""
    return self.get(self.numbers_of(row))

  def get(self, numbers: list[int]) -> tuple[Passage, ...]:
    """Returns the twins with these numbers."""
    return tuple(self.passages[n] for n in numbers) if self.passages else ()

  def each(self, numbers: Sequence[int]) -> Iterator[Passage]:
    """Yields the twins with these numbers, which need not fit into memory."""
    for number in numbers:
      yield from self.get([number])

  def number_of(self, id: str) -> int | None:
    """Returns the number of the twin with this id; None if there is none."""
    return self.passages.row_of(id) if self.passages else None


class TwinsWriter:
  """Collects twins in a temporary file while the passages are written."""

  def __init__(self):
    self._file = tempfile.TemporaryFile()  # noqa: SIM115, closed by `close`
    self._rows: list[int] = []

  def add(self, twin: Passage, row: int) -> None:
    """Adds a twin and the row of the passage that is indexed."""
    self._file.write(encode(twin) + b"\n")
    self._rows.append(row)

  def write(self, directory: epath.Path) -> None:
    """Writes the twins to a directory, over what an interrupted build left."""
    self._file.seek(0)
    lines = (decode(line) for line in self._file)
    write_twins(directory, lines, np.array(self._rows, np.int64))

  def close(self) -> None:
    """Removes the temporary file."""
    self._file.close()


def write_twins(
  directory: epath.Path, twins: Iterable[Passage], rows: Int[np.ndarray, "T"]
) -> None:
  """Writes twins and the rows of the indexed passages, in the same order.

  Raises:
    OSError: the disk is full.
  """
  if directory.exists():
    directory.rmtree()
  artifacts.start_directory(directory)
  np.save(directory / _ROWS, rows, allow_pickle=False)
  if len(rows):
    write_store(directory / _PASSAGES, twins)
  artifacts.write_manifest(
    directory,
    kind=_KIND,
    format=_FORMAT,
    content={"num_twins": len(rows)},
    nested=True,
  )


def open_twins(directory: epath.Path) -> Twins:
  """Opens a directory that `write_twins` wrote.

  Raises:
    FileNotFoundError: nothing was written there.
    ValueError: a file is missing, cut off or changed.
  """
  content = artifacts.read_manifest(
    directory, kind=_KIND, format=_FORMAT, remedy=_REMEDY, nested=True
  )
  content.check(num_twins=int)
  rows = np.array(read_array(directory / _ROWS, _REMEDY))
  if rows.ndim != 1 or rows.dtype != np.int64 or np.any(rows < 0):
    raise ValueError(
      f"{directory / _ROWS} holds {rows.dtype} of shape {rows.shape}; expected"
      f" the rows of passages, int64 and not negative. {_REMEDY}"
    )
  passages = PassageStore(directory / _PASSAGES) if len(rows) else None
  if not content["num_twins"] == len(rows) == len(passages or ()):
    raise ValueError(
      f"{directory} has {len(rows)} rows and {len(passages or ())} passages;"
      f" expected {content['num_twins']} of each. {_REMEDY}"
    )
  return Twins(rows, passages)
