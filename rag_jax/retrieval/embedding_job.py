"""Embeds a whole corpus, in shards that survive an interruption.

In: an embedder, its parameters, the tokens of all passages, a directory. Out:
the embeddings in that directory. Interruptions and the number of processes do
not change a single byte.
"""

from collections.abc import Callable
import dataclasses
import json
import shutil
from typing import Any

from absl import logging
from etils import epath
import jax
from jaxtyping import PyTree
import numpy as np

from rag_jax import artifacts
from rag_jax.disk import UnwritableError
from rag_jax.processes import wait_for_all
from rag_jax.progress import Progress
from rag_jax.retrieval.embeddings import EmbeddingFile
from rag_jax.retrieval.embeddings import StoredEmbeddings
from rag_jax.retrieval.embeddings import bytes_of
from rag_jax.retrieval.embeddings import check_storage
from rag_jax.retrieval.embeddings import open_embeddings
from rag_jax.retrieval.index_core import check_finite
from rag_jax.retrieval.retriever import Embedder
from rag_jax.retrieval.retriever import PassageTokens

# Named like unfinished files, which no manifest lists.
_PLAN = ".plan.json.tmp"  # the fields of the job
_DONE = ".done.tmp"  # a folder with one file per finished shard


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingJob:
  """What is embedded, and how it is stored.

  The result depends on every field. So a job only continues in a directory
  where all fields are the same.
  """

  num_passages: int  # P
  embedding_dim: int  # R
  passage_length: int  # tokens of the longest passage, L
  storage: str = "float32"  # or "bfloat16", "int8"
  passages_per_shard: int = 32_768
  embed_batch_size: int = 64
  encoder_fingerprint: str = ""
  passages_fingerprint: str = ""

  @property
  def num_shards(self) -> int:
    """The number of shards; the last one may be smaller."""
    return -(-self.num_passages // self.passages_per_shard)

  @property
  def num_bytes(self) -> int:
    """The size of the embeddings on the disk."""
    return bytes_of(self.storage, self.num_passages, self.embedding_dim)

  def rows(self, shard: int) -> range:
    """Returns the passages of a shard."""
    start = shard * self.passages_per_shard
    return range(start, min(start + self.passages_per_shard, self.num_passages))


def embed_corpus(
  directory: epath.PathLike,
  job: EmbeddingJob,
  embedder: Embedder,
  retriever_params: PyTree,
  passage_tokens: PassageTokens,
  on_shard: Callable[[int], None] = lambda shard: None,
) -> StoredEmbeddings:
  """Embeds all passages that are not embedded yet; returns all embeddings.

  In a program with several processes, all of them call it with the same
  arguments. Each embeds its share of the shards.

  Args:
    directory: on a disk that all processes see. If it holds an interrupted job,
      that job is continued.
    job: what is embedded.
    embedder: has the batch size of the job.
    retriever_params: the parameters of the retriever.
    passage_tokens: passage ids -> (tokens, mask), both [N, L].
    on_shard: called after a shard was written to the disk.

  Raises:
    ValueError: there are no passages, the directory holds another job, or an
      embedding is NaN, infinite or huge.
    OSError: the disk is too small, or cannot be written to.
  """
  directory = epath.Path(directory)
  _check(directory, job)
  first = jax.process_index() == 0
  if first:
    _start(directory, job)
  wait_for_all("embedding: the files are there")
  file = EmbeddingFile(
    directory, job.num_passages, job.embedding_dim, job.storage
  )
  missing = [
    i for i in range(job.num_shards) if not _is_done(directory, job, file, i)
  ]
  mine = missing[jax.process_index() :: jax.process_count()]
  if first:
    logging.info(
      "%d passages in %d shards, %d of which are already embedded.",
      job.num_passages,
      job.num_shards,
      job.num_shards - len(missing),
    )
  wait_for_all("embedding: everyone knows what is missing")
  params = embedder.place(retriever_params)
  todo = sum(len(job.rows(i)) for i in mine)
  with Progress("Embedded", todo, "passages") as progress:
    for shard in mine:
      rows = job.rows(shard)
      embeddings = embedder.rows(
        params, passage_tokens, np.array(rows), progress.update
      )
      check_finite(
        embeddings,
        "passage",
        first_row=rows.start,
        note=" The finished shards are kept.",
      )
      file.write(rows.start, embeddings)
      digest = file.digest(rows.start, rows.stop)
      artifacts.write_atomically(_marker(directory, shard), digest)
      on_shard(shard)
  wait_for_all("embedding: everything is embedded")
  return open_embeddings(directory)


def remove_job_files(directory: epath.PathLike) -> None:
  """Removes the files that only an unfinished job needs."""
  directory = epath.Path(directory)
  (directory / _PLAN).unlink(missing_ok=True)
  if (directory / _DONE).exists():
    (directory / _DONE).rmtree()


def _check(directory: epath.Path, job: EmbeddingJob) -> None:
  check_storage(job.storage)
  if job.num_passages < 1 or job.passages_per_shard < 1:
    raise ValueError(
      f"There is nothing to embed: {job.num_passages} passages in shards of"
      f" {job.passages_per_shard}; expected at least one of each. Is the corpus"
      " empty?"
    )
  if not artifacts.is_local(directory):
    raise ValueError(
      f"{directory} is in a bucket, where shards cannot be written in place;"
      " expected a directory on a disk. Build there, and then copy the finished"
      " directory to the bucket."
    )


def _start(directory: epath.Path, job: EmbeddingJob) -> None:
  """Creates the files, or checks that the existing ones are of this job."""
  directory.mkdir(parents=True, exist_ok=True)
  plan = json.dumps(dataclasses.asdict(job), indent=2) + "\n"
  path = directory / _PLAN
  if path.exists():
    found = path.read_text()
    if found != plan:
      raise ValueError(
        f"{directory} holds a part of other embeddings:"
        f" {_differences(found, job)}. Expected a job with the same settings."
        " Use these settings to continue it; to start anew, remove the"
        " directory or choose another."
      )
  else:
    if (directory / _DONE).exists():
      (directory / _DONE).rmtree()  # of an unknown job
    _check_room(directory, job)
    EmbeddingFile(directory, job.num_passages, job.embedding_dim, job.storage)
    artifacts.write_atomically(path, plan)
  (directory / _DONE).mkdir(exist_ok=True)


def _differences(found: str, job: EmbeddingJob) -> str:
  try:
    old = json.loads(found)
  except ValueError:
    old = {}
  new: dict[str, Any] = dataclasses.asdict(job)
  return ", ".join(
    f"{name} is {old.get(name)!r} there and {value!r} here"
    for name, value in new.items()
    if old.get(name) != value
  )


def _check_room(directory: epath.Path, job: EmbeddingJob) -> None:
  """Logs what the job needs; raises `OSError` if the disk is too small."""
  free = shutil.disk_usage(directory).free
  logging.info(
    "The embeddings of %d passages, %d numbers of %s each, take %.2f GiB of"
    " disk; %.2f GiB are free. In memory are the parameters and one shard of %d"
    " passages, %.2f GiB.",
    job.num_passages,
    job.embedding_dim,
    job.storage,
    job.num_bytes / 2**30,
    free / 2**30,
    len(job.rows(0)),
    len(job.rows(0)) * (5 * job.passage_length + 8 * job.embedding_dim) / 2**30,
  )
  existing = sum(f.stat().length for f in directory.glob("*.npy"))
  if job.num_bytes > free + existing:
    raise UnwritableError(
      f"The disk of {directory} has {free:,} bytes free, but the embeddings"
      f" need {job.num_bytes:,}. Free some space, choose another output, or"
      " store them smaller (bfloat16 or int8)."
    )


def _marker(directory: epath.Path, shard: int) -> epath.Path:
  return directory / _DONE / f"{shard:06d}"


def _is_done(
  directory: epath.Path, job: EmbeddingJob, file: EmbeddingFile, shard: int
) -> bool:
  """Returns whether the shard was finished and is unchanged."""
  marker = _marker(directory, shard)
  if not marker.exists():
    return False
  rows = job.rows(shard)
  if marker.read_text() == file.digest(rows.start, rows.stop):
    return True
  logging.warning(
    "Shard %d in %s has changed since it was written; it is embedded again.",
    shard,
    directory,
  )
  return False
