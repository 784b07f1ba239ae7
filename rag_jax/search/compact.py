"""Writes an updated search directory anew, without the deleted passages.

In: a search directory. Out: the same directory, in which no file holds a text,
an embedding or a word of documents that were deleted or replaced. Nothing is
embedded again. A search meanwhile finds the same passages before and after. An
interrupted call leaves the directory as it was, or as it will be; the next call
removes what is left over.
"""

from collections.abc import Sequence

from absl import logging
from etils import epath

from rag_jax import artifacts
from rag_jax.config import IndexConfig
from rag_jax.corpus.store import write_store
from rag_jax.corpus.twins import write_twins
from rag_jax.retrieval.bm25 import Bm25Index
from rag_jax.retrieval.certified_index import CertificateSettings
from rag_jax.retrieval.certified_index import build_certified_index
from rag_jax.retrieval.embeddings import EmbeddingFile
from rag_jax.search import versions
from rag_jax.search.directory import OpenedDirectory
from rag_jax.search.directory import locked
from rag_jax.search.directory import not_in_manifest
from rag_jax.search.directory import read_content
from rag_jax.search.directory import write_content

_BLOCK = 16_384  # embeddings that are copied at a time
_LEAST_TO_TUNE = 20  # questions


def compact_search_directory(
  path: epath.PathLike, *, questions: Sequence[str] = (), wait: bool = False
) -> int:
  """Removes deleted texts from the files; returns how many passages are left.

  This needs as much disk space as the passages, embeddings and words that are
  left. Arguments and errors as in `rag_jax.SearchDirectory.compact`.
  """
  with locked(path, again="compact it again", wait=wait) as directory:
    path = directory.path
    remove_left_over(path)
    if not directory.version.name:
      logging.info("%s was not updated: there is nothing to remove.", path)
      return len(directory)
    base = versions.add(
      path,
      versions.COMPACTED,
      lambda folder: _write(folder, directory, questions),
    )
    content = {
      "base": base,
      "num_passages": len(directory),
      "passages_fingerprint": directory.passages.fingerprint,
      "updates": "marked",
    }
    write_content(path, directory.content | content, base)
    remove_left_over(path)
    return len(directory)


def remove_left_over(path: epath.Path) -> None:
  """Removes what the directory does not need; the caller has the lock."""
  base = read_content(path).get("base", "")
  for name in not_in_manifest(path, base):
    if base or name != versions.UPDATES:
      versions.retire(path, name)
  versions.remove_unfinished(path, versions.UNFINISHED)


def _write(
  folder: epath.Path, directory: OpenedDirectory, questions: Sequence[str]
) -> None:
  """Writes the version in use to a folder, as a build of it would."""
  now, plan = directory.version, directory.content["plan"]
  artifacts.start_directory(folder)
  store = write_store(
    folder / versions.PASSAGES,
    now.passages,
    config=directory.built[0].config,
  )
  if now.twins is not None:
    write_twins(folder / versions.TWINS, now.twins, now.twins.rows)
  index = folder / versions.INDEX
  index.mkdir()
  embeddings, dim = now.index.embeddings, now.index.embedding_dim
  file = EmbeddingFile(index, len(store), dim, plan["storage"])
  for start in range(0, len(store), _BLOCK):
    file.write(start, embeddings[start : start + _BLOCK])
  tune = plan["target_recall"] if len(questions) >= _LEAST_TO_TUNE else 0.0
  certificate = now.index.certificate
  build_certified_index(
    index,
    _index_config(directory, tuned=bool(plan["target_recall"])),
    CertificateSettings(
      sample=directory.sample(questions),
      target_recall=tune,
      speed_secs=directory.speed_secs,
      coverage=certificate.coverage if certificate else None,
      modes=certificate.modes if certificate else None,
    ),
    encoder_fingerprint=now.index.encoder_fingerprint,
    passages_fingerprint=store.fingerprint,
  )
  if now.bm25 is not None:
    logging.info("Indexing the words of %d passages.", len(store))
    Bm25Index.write(
      folder / versions.BM25,
      store,
      passages_fingerprint=store.fingerprint,
      settings=now.bm25.settings,
    )
  versions.finish_base(folder, store.fingerprint)


def _index_config(directory: OpenedDirectory, *, tuned: bool) -> IndexConfig:
  """Returns the settings of the index, with those that tuning chose."""
  config = IndexConfig(**directory.content["plan"]["index"])
  for name, value in directory.built[1].settings.items() if tuned else ():
    if hasattr(config, f"scann_{name}"):
      setattr(config, f"scann_{name}", value)
  return config
