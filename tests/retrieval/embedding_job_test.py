"""Embeddings in shards: the same bytes, whatever happens on the way."""

import errno
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys

from flax import linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

from rag_jax.config import MeshConfig
from rag_jax.models.partitioning import make_mesh
from rag_jax.retrieval import embedding_job
from rag_jax.retrieval.embedding_job import EmbeddingJob
from rag_jax.retrieval.embedding_job import embed_corpus
from rag_jax.retrieval.embedding_job import remove_job_files
from rag_jax.retrieval.embeddings import EMBEDDINGS
from rag_jax.retrieval.embeddings import EmbeddingFile
from rag_jax.retrieval.retriever import Embedder

P, L, R, V = 23, 12, 8, 40
SHARD = 5  # passages: five shards, the last of three


class BagOfWords(nn.Module):
  """The sum of a vector a word."""

  def embed_passages(self, tokens, mask):  # noqa: D102 - as RagModel's
    table = jnp.sin(jnp.arange(V * R, dtype=jnp.float32)).reshape(V, R)
    return jnp.sum(table[tokens] * mask[..., None], axis=1)

  def embed_questions(self, tokens, mask):  # noqa: D102 - as RagModel's
    return self.embed_passages(tokens, mask)


def passage_tokens(rows):
  rows = np.asarray(rows)
  tokens = (rows[:, None] * 7 + np.arange(L) * 3) % V
  return tokens.astype(np.int32), np.arange(L) < 1 + rows[:, None] % L


def job_of(**fields):
  return EmbeddingJob(
    **{
      "num_passages": P,
      "embedding_dim": R,
      "passage_length": L,
      "passages_per_shard": SHARD,
      "embed_batch_size": 4,
      "encoder_fingerprint": "weights",
      "passages_fingerprint": "texts",
    }
    | fields
  )


def embed(directory, job=None, **kwargs):
  job = job or job_of()
  embedder = Embedder(BagOfWords(), job.embed_batch_size)
  return embed_corpus(directory, job, embedder, {}, passage_tokens, **kwargs)


def resume(directory):
  """Embeds the rest; returns the shards that were missing."""
  shards = []
  embed(directory, on_shard=shards.append)
  return shards


def expected():
  tokens, mask = passage_tokens(np.arange(P))
  return np.asarray(BagOfWords().embed_passages(tokens, mask))


def bytes_in(directory):
  return (directory / EMBEDDINGS).read_bytes()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
  directory = tmp_path_factory.mktemp("whole")
  embed(directory)
  return bytes_in(directory)


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "int8"])
def test_what_is_read_is_what_was_embedded_as_far_as_it_is_stored(
  tmp_path, storage
):
  got = embed(tmp_path, job_of(storage=storage))
  assert got.shape == (P, R)
  assert got[3].dtype == np.float32
  largest = np.abs(expected()).max(axis=1, keepdims=True)
  error = {
    "float32": 1e-6 * largest,
    "bfloat16": 2**-8 * np.abs(expected()) + 1e-6,
    "int8": 0.5001 * largest / 127,
  }[storage]
  assert np.all(np.abs(got[:] - expected()) <= error)
  if storage != "float32":  # the bound is close: it is lossy
    assert np.abs(got[:] - expected()).max() > 1e-4
  rows = np.array([[4, 0], [22, 4]])
  np.testing.assert_array_equal(got[rows], got[:][rows])
  assert got.nbytes == job_of(storage=storage).num_bytes


@pytest.mark.parametrize("stop_after", range(5))
def test_an_interrupted_job_goes_on_and_ends_with_the_same_bytes(
  tmp_path, uninterrupted, stop_after
):
  def stop(shard):
    if shard == stop_after:
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    embed(tmp_path, on_shard=stop)
  assert resume(tmp_path) == list(range(stop_after + 1, 5))
  assert bytes_in(tmp_path) == uninterrupted


def test_a_shard_that_changed_is_embedded_again(tmp_path, uninterrupted):
  embed(tmp_path)
  with (tmp_path / EMBEDDINGS).open("r+b") as f:
    f.seek(-SHARD * R * 4, os.SEEK_END)
    byte = f.read(1)[0]
    f.seek(-1, os.SEEK_CUR)
    f.write(bytes([byte ^ 1]))
  assert resume(tmp_path) == [3]
  assert bytes_in(tmp_path) == uninterrupted


def test_a_cut_off_file_is_made_anew(tmp_path, uninterrupted):
  embed(tmp_path)
  data = bytes_in(tmp_path)
  (tmp_path / EMBEDDINGS).write_bytes(data[: len(data) // 2])
  embed(tmp_path)
  assert bytes_in(tmp_path) == uninterrupted


def test_another_job_does_not_go_on_with_this_one(tmp_path):
  embed(tmp_path)
  before = bytes_in(tmp_path)
  other = job_of(encoder_fingerprint="newer", storage="bfloat16")
  with pytest.raises(ValueError, match="a part of other embeddings") as error:
    embed(tmp_path, other)
  assert "encoder_fingerprint is 'weights' there and 'newer' here" in str(
    error.value
  )
  assert "storage is 'float32' there and 'bfloat16' here" in str(error.value)
  assert bytes_in(tmp_path) == before


def test_a_disk_that_fills_up_loses_no_finished_shard(
  tmp_path, uninterrupted, monkeypatch
):
  write = EmbeddingFile.write

  def full(self, start, embeddings):
    if start == 2 * SHARD:
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    write(self, start, embeddings)

  with monkeypatch.context() as patch:
    patch.setattr(EmbeddingFile, "write", full)
    with pytest.raises(OSError, match="No space left"):
      embed(tmp_path)
  assert resume(tmp_path) == [2, 3, 4]
  assert bytes_in(tmp_path) == uninterrupted


def test_a_disk_that_is_too_small_is_refused_before_any_work(
  tmp_path, monkeypatch
):
  usage = shutil.disk_usage(tmp_path)._replace(free=100)
  monkeypatch.setattr(embedding_job.shutil, "disk_usage", lambda path: usage)
  with pytest.raises(OSError, match="100 bytes free, but the embeddings need"):
    embed(tmp_path)
  assert not (tmp_path / EMBEDDINGS).exists()


def test_a_file_that_finds_no_room_says_what_it_needs(tmp_path, monkeypatch):
  def full(*args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setattr(os, "posix_fallocate", full)
  with pytest.raises(OSError, match=f"has no room.*{P * R * 4} bytes"):
    EmbeddingFile(tmp_path, P, R, "float32")
  assert not list(tmp_path.iterdir())


def test_numbers_that_cannot_be_searched_are_named_by_their_passage(tmp_path):
  class Broken(BagOfWords):
    def embed_passages(self, tokens, mask):
      good = BagOfWords.embed_passages(self, tokens, mask)
      return jnp.where(tokens[:, :1] == 7 * 11 % V, jnp.nan, good)

  with pytest.raises(
    ValueError, match=r"of 1 of 5 passages .* rows 11\..*are kept"
  ):
    embed_corpus(tmp_path, job_of(), Embedder(Broken(), 4), {}, passage_tokens)
  assert resume(tmp_path) == [2, 3, 4]


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"num_passages": 0}, "nothing to embed: 0 passages"),
    ({"passages_per_shard": 0}, "in shards of 0"),
    ({"storage": "float8"}, "stored as 'float8'; expected one of float32"),
  ],
)
def test_a_job_that_cannot_be_done_is_refused(tmp_path, fields, message):
  with pytest.raises(ValueError, match=message):
    embed(tmp_path, job_of(**fields))


def test_a_bucket_is_refused():
  with pytest.raises(ValueError, match="is in a bucket"):
    embed("gs://bucket/embeddings")


def test_finishing_leaves_the_embeddings_alone(tmp_path, uninterrupted):
  embed(tmp_path)
  remove_job_files(tmp_path)
  assert [f.name for f in tmp_path.iterdir()] == [EMBEDDINGS]
  assert bytes_in(tmp_path) == uninterrupted


def test_a_mesh_shares_each_batch(tmp_path):
  mesh = make_mesh(MeshConfig(data=1))
  embedder = Embedder(BagOfWords(), 4, mesh)
  got = embed_corpus(tmp_path, job_of(), embedder, {}, passage_tokens)
  np.testing.assert_allclose(got[:], expected(), rtol=1e-6, atol=1e-6)


_SCRIPT = f"""
import sys
import time

import jax

directory, process, count, port, wait = sys.argv[1:]
if int(count) > 1:
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  jax.distributed.initialize(
    coordinator_address=f"localhost:{{port}}",
    num_processes=int(count),
    process_id=int(process),
  )
sys.path.insert(0, {str(pathlib.Path(__file__).parent)!r})
import embedding_job_test as test


def on_shard(shard):
  print(shard, flush=True)
  time.sleep(float(wait))


test.embed(directory, on_shard=on_shard)
"""


def start(directory, process=0, count=1, port=0, wait=0.0):
  command = [str(x) for x in (directory, process, count, port, wait)]
  environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
  environment["JAX_PLATFORMS"] = "cpu"
  return subprocess.Popen(
    [sys.executable, "-c", _SCRIPT, *command],
    env=environment,
    stdout=subprocess.PIPE,
    text=True,
  )


def test_killed_while_it_embeds_it_goes_on_with_what_it_had(
  tmp_path, uninterrupted
):
  process = start(tmp_path, wait=0.2)
  assert process.stdout is not None
  assert process.stdout.readline() == "0\n"
  assert process.stdout.readline() == "1\n"
  process.send_signal(signal.SIGKILL)
  process.communicate()
  assert resume(tmp_path) in ([2, 3, 4], [3, 4])  # it may have done one more
  assert bytes_in(tmp_path) == uninterrupted


def test_two_processes_share_the_shards(tmp_path, uninterrupted):
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  both = [start(tmp_path, process, 2, port) for process in range(2)]
  lines = [process.communicate(timeout=120)[0].splitlines() for process in both]
  shards = [[line for line in own if line.isdigit()] for own in lines]
  assert [process.returncode for process in both] == [0, 0]
  assert shards == [["0", "2", "4"], ["1", "3"]]
  assert bytes_in(tmp_path) == uninterrupted
