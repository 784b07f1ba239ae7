"""Embeds all passages on several hosts, which exchange the rows through files.

In: the embedder and parameters that all processes have, a folder that all of
them see. Out: in each process the embeddings of all passages.

Threads can do it while the devices train, because no program of the devices
communicates: two programs that both wait for all devices would wait for each
other. The rows are divided into blocks, which every process cuts alike, so they
equal those of a single process, bit for bit.
"""

from collections.abc import Callable, Sequence
import io
import time
from typing import Any

from absl import logging
from etils import epath
import jax
from jaxtyping import Float, Int
import numpy as np

from rag_jax import artifacts

# Begins the names of the folders, one per version of the parameters.
PREFIX = ".embedding-"

_POLL_SECS = 0.2
_LOG_SECS = 60  # between two lines about what is waited for

EmbedRows = Callable[[Int[np.ndarray, "N"]], Float[np.ndarray, "N R"]]


def embed_shared(
  embed: EmbedRows,
  blocks: Sequence[Int[np.ndarray, "N"]],
  folder: epath.PathLike,
  kept: range | None = None,
) -> Float[np.ndarray, "N R"]:
  """Returns rows, of which each process embeds every n-th block.

  All processes call it with the same arguments, but for `kept`; it returns when
  the rows are there. What an interrupted call has embedded is used again.

  Memory: the result: 4 * P * R bytes for all rows, 64 GB for 21 million
  passages and R = 768. The files take as much of the disk.

  Args:
    embed: passage ids -> their embeddings in float32.
    blocks: the ids of each block, together 0 to P - 1, in this order.
    folder: its name identifies the parameters and the passages. `remove_shared`
      removes it, when all processes have returned.
    kept: the passages whose rows are returned; None: all.
  """
  folder = epath.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  mine, count = jax.process_index(), jax.process_count()
  result = np.zeros((0, 0), np.float32)
  kept = range(sum(map(len, blocks))) if kept is None else kept

  def keep(rows: Int[np.ndarray, "N"], embeddings: np.ndarray) -> None:
    nonlocal result
    if not result.shape[1]:
      result = np.empty((len(kept), embeddings.shape[1]), np.float32)
    start, stop = max(rows[0], kept.start), min(rows[-1] + 1, kept.stop)
    if start < stop:
      part = embeddings[start - rows[0] : stop - rows[0]]
      result[start - kept.start : stop - kept.start] = part

  for number in range(mine, len(blocks), count):
    path = _path(folder, number)
    if path.exists():
      keep(blocks[number], _read(path, len(blocks[number])))
      continue
    embeddings = np.asarray(embed(blocks[number]), np.float32)
    data = io.BytesIO()
    np.save(data, embeddings, allow_pickle=False)
    artifacts.write_atomically(path, data.getvalue())
    keep(blocks[number], embeddings)
  for number, rows in enumerate(blocks):
    needed = rows[0] < kept.stop and kept.start <= rows[-1]
    if number % count != mine and needed:
      path = _path(folder, number)
      _wait(path, number % count)
      keep(rows, _read(path, len(rows)))
  return result


def remove_shared(directory: epath.PathLike) -> None:
  """Removes the folders of `embed_shared` in `directory`.

  One process calls it, when none is embedding.
  """
  directory = epath.Path(directory)
  if directory.exists():
    for path in directory.iterdir():
      if path.name.startswith(PREFIX):
        path.rmtree()


def _path(folder: epath.Path, number: int) -> epath.Path:
  return folder / f"{number:06d}.npy"


def _wait(path: epath.Path, process: int) -> None:
  """Returns when the file is there.

  There is no limit: a block may take long, and if that process ends, JAX ends
  this one too.
  """
  start = time.monotonic()
  logged = start
  while not path.exists():
    time.sleep(_POLL_SECS)
    now = time.monotonic()
    if now - logged > _LOG_SECS:
      logged = now
      logging.info(
        "Waiting for %s, which process %d embeds, since %d seconds. Expected a"
        " workdir that all hosts see.",
        *(path, process, now - start),
      )


def _read(path: epath.Path, num_rows: int) -> Any:
  with path.open("rb") as f:
    rows = np.load(f, allow_pickle=False)
  if rows.ndim != 2 or len(rows) != num_rows or rows.dtype != np.float32:
    raise ValueError(
      f"{path} holds {rows.dtype}{list(rows.shape)}; expected float32 of"
      f" {num_rows} rows. Another version of rag_jax wrote it: remove its"
      " folder."
    )
  return rows
