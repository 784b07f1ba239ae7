"""A search directory that was updated, written anew without what is gone.

In: a search directory. Out: the same, in which nothing is left of the documents
that were deleted or replaced: no text, no embedding, no word. Nothing is
embedded again. Whoever searches meanwhile sees the same passages before and
after; a call that is killed leaves the directory as it was, or as it will be,
and the next one removes what is left over.
"""

from collections.abc import Sequence
import os

from absl import logging
from etils import epath

from rag_jax import artifacts
from rag_jax.building import lock
from rag_jax.config import IndexConfig
from rag_jax.corpus.store import write_store
from rag_jax.corpus.twins import write_twins
from rag_jax.retrieval.bm25 import Bm25Index
from rag_jax.retrieval.certified_index import CertificateSettings
from rag_jax.retrieval.certified_index import build_certified_index
from rag_jax.retrieval.embeddings import EmbeddingFile
from rag_jax.search import versions
from rag_jax.search.directory import FORMAT
from rag_jax.search.directory import KIND
from rag_jax.search.directory import SearchDirectory
from rag_jax.search.directory import beside
from rag_jax.search.directory import read_content
from rag_jax.search.versions import BM25
from rag_jax.search.versions import INDEX
from rag_jax.search.versions import PASSAGES
from rag_jax.search.versions import TWINS
from rag_jax.search.versions import UPDATES

_BLOCK = 16_384  # embeddings that are copied at a time
_LEAST_TO_TUNE = 20  # questions


def compact_search_directory(
  path: epath.PathLike,
  *,
  questions: Sequence[str] = (),
  speed_secs: float = 1.0,
  wait: bool = False,
) -> int:
  """Removes what updates took out, and returns how many passages are left.

  It needs as much room again as the passages, embeddings and words that are
  left. Who has the directory open goes on with what it opened, until it calls
  `reload`.

  Args:
    path: the directory.
    questions: that the certificate is measured with; none: passages.
    speed_secs: that each batch size is timed for the certificate.
    wait: for another process that writes there.

  Raises:
    FileNotFoundError: the directory is not there.
    ValueError: a file is missing, cut off or changed, or somebody else writes
      there.
    UnwritableError: the disk is full, or nothing may be written there.
  """
  path = epath.Path(path).expanduser()
  read_content(path)
  with lock(
    path,
    kind=KIND,
    wait=wait,
    remedy="What was there before is still in use: compact it again.",
  ):
    remove_left_over(path)
    directory = SearchDirectory(path)
    if not directory.version.name:
      logging.info("%s was not updated: there is nothing to remove.", path)
      return len(directory.passages)

    def save(folder: epath.Path) -> None:
      _write(folder, directory, questions, speed_secs)

    name = versions.add(path, versions.COMPACTED, save)
    content = directory.content | {
      "base": name,
      "num_passages": len(directory.passages),
      "passages_fingerprint": directory.passages.fingerprint,
      "updates": "marked",
    }
    artifacts.write_manifest(
      path,
      kind=KIND,
      format=FORMAT,
      content=content,
      nested=True,
      beside=beside(path, name),
    )
    remove_left_over(path)
    return len(directory.passages)


def remove_left_over(path: epath.Path) -> None:
  """Removes what a directory does not need any more; needs the lock."""
  base = read_content(path).get("base", "")
  for name in beside(path, base):
    if base or name != UPDATES:
      # Under a name that counts for nothing first: removing takes its time.
      os.rename(path / name, artifacts.temp_path(path / name))
  for left in path.iterdir():
    if versions.UNFINISHED.fullmatch(left.name):
      left.rmtree()


def _write(
  folder: epath.Path,
  directory: SearchDirectory,
  questions: Sequence[str],
  speed_secs: float,
) -> None:
  """Writes what is searched into a folder, as a build of it would."""
  now, plan = directory.version, directory.content["plan"]
  artifacts.start_directory(folder)
  store = write_store(
    folder / PASSAGES, now.passages, config=directory.built[0].config
  )
  if now.twins is not None:
    write_twins(folder / TWINS, now.twins, now.twins.rows)
  index = folder / INDEX
  index.mkdir()
  embeddings = now.index.embeddings
  dim = now.index.embedding_dim
  file = EmbeddingFile(index, len(store), dim, plan["storage"])
  for start in range(0, len(store), _BLOCK):
    file.write(start, embeddings[start : start + _BLOCK])
  sample = directory.embed_questions(questions) if questions else None
  tune = plan["target_recall"] if len(questions) >= _LEAST_TO_TUNE else 0.0
  certificate = now.index.certificate
  build_certified_index(
    index,
    _index_config(directory, tuned=bool(plan["target_recall"])),
    CertificateSettings(
      sample=sample,
      target_recall=tune,
      speed_secs=speed_secs,
      coverage=certificate.coverage if certificate else None,
      modes=certificate.modes if certificate else None,
    ),
    encoder_fingerprint=now.index.encoder_fingerprint,
    passages_fingerprint=store.fingerprint,
  )
  if now.bm25 is not None:
    logging.info("Indexing the words of %d passages.", len(store))
    Bm25Index.write(
      folder / BM25,
      store,
      passages_fingerprint=store.fingerprint,
      settings=now.bm25.settings,
    )
  versions.finish_base(folder, store.fingerprint)


def _index_config(directory: SearchDirectory, *, tuned: bool) -> IndexConfig:
  """Returns how the index was built; if it was tuned, as it was found best."""
  config = IndexConfig(**directory.content["plan"]["index"])
  for name, value in directory.built[1].settings.items() if tuned else ():
    if hasattr(config, f"scann_{name}"):
      setattr(config, f"scann_{name}", value)
  return config
