"""The versions of a search directory that was updated.

In: what was built, and the folder `updates` beside it. Out: the version that is
in use. A version names the rows of what was built that are gone, and holds what
came: it shares all else with the others.

    updates/CURRENT      the version in use and the digest of its manifest; or
                         "built", before the first update
    updates/v000001/     gone.npy, embeddings.npy, passages/, bm25/, and the
                         manifest, written last, with the certificate
"""

from collections.abc import Sequence
import dataclasses
import os
import re

from etils import epath
from jaxtyping import Float, Int
import numpy as np

from rag_jax import artifacts
from rag_jax import disk
from rag_jax.corpus.passages import Passage
from rag_jax.corpus.store import PASSAGES_PER_SHARD
from rag_jax.corpus.store import PassageStore
from rag_jax.corpus.store import write_store
from rag_jax.corpus.updated_passages import UpdatedPassages
from rag_jax.retrieval import live_files
from rag_jax.retrieval.bm25 import Bm25Index
from rag_jax.retrieval.certificate import Certificate
from rag_jax.retrieval.index import Index
from rag_jax.retrieval.updated_index import UpdatedIndex

UPDATES = "updates"
PASSAGES, INDEX, BM25 = "passages", "index", "bm25"  # of what was built
KEEP = 2  # versions: who just opened the one before can go on opening it

# In CURRENT, from the build on: whether there was an update is never guessed.
_BUILT = "built\n"
_FILES = re.compile(r"CURRENT|v\d{6}")

_KIND = "version of a search directory"
_FORMAT = 1  # raise when the files of a version change their meaning
_REMEDY = "Restore the directory from a copy, or build it again."
_GONE, _EMBEDDINGS = "gone.npy", "embeddings.npy"


@dataclasses.dataclass(frozen=True, slots=True)
class SearchVersion:
  """What is searched. It never changes: who holds one reads one state.

  Attributes:
    name: of the version; "": what was built, never updated.
    passages: row = passage number of both indexes.
    index: over the embeddings.
    bm25: over the words; None if they were left out.
    bm25_path: where it was opened.
  """

  name: str
  passages: PassageStore | UpdatedPassages
  index: Index
  bm25: Bm25Index | None
  bm25_path: epath.Path


def start_updates(path: epath.Path) -> None:
  """Says that there was no update yet, unless it is known already."""
  updates = path / UPDATES
  updates.mkdir(exist_ok=True)
  if not (updates / live_files.CURRENT).exists():
    artifacts.write_atomically(updates / live_files.CURRENT, _BUILT)


def current(path: epath.Path, *, always: bool) -> live_files.Current:
  """Returns the version in use; its name is "" if there was no update.

  Args:
    path: of the search directory.
    always: whether it was built with the file that says so. Directories of
      before got it with their first update.

  Raises:
    ValueError: nobody can tell which version it is.
  """
  updates = path / UPDATES
  file = updates / live_files.CURRENT
  if not file.exists() and not os.path.islink(file):
    named = live_files.names(updates) if updates.exists() else []
    if always or named:
      raise ValueError(
        f"There is no {UPDATES}/{live_files.CURRENT} in {path}, so nobody can"
        " tell which version is in use, of"
        f" {', '.join(['what was built', *named])}. Expected the file: it was"
        f" removed. {_REMEDY}"
      )
    return live_files.Current("", "")
  if disk.read_own(file, remedy=_REMEDY) == _BUILT.encode():
    return live_files.Current("", "")
  return live_files.read_current(updates, _REMEDY)


def open_current(
  path: epath.Path, passages: PassageStore, index: Index, *, always: bool
) -> SearchVersion:
  """Returns the version in use.

  Args:
    path: of the search directory.
    passages: that it was built of.
    index: that was built.
    always: as `current`.

  Raises:
    FileNotFoundError: the version is gone.
    ValueError: its files are missing, cut off or changed, or others lie there.
  """
  while True:
    now = current(path, always=always)
    try:
      _check_names(path / UPDATES)
      live_files.check_current(path / UPDATES, now, _REMEDY)
      if now.name:
        return _open(path, now.name, passages, index)
      words = path / BM25
      return SearchVersion(
        "", passages, index, open_words(words, passages.fingerprint), words
      )
    except (FileNotFoundError, ValueError):
      # It may have been removed just now, because newer ones are there.
      if current(path, always=always) == now:
        raise


def _check_names(updates: epath.Path) -> None:
  """Raises `ValueError` if something else lies among the versions."""
  if not updates.exists():
    return
  artifacts.check_no_links(updates, _REMEDY)
  other = [
    name
    for name in sorted(os.listdir(updates))
    if not disk.is_unfinished(name) and not _FILES.fullmatch(name)
  ]
  if other:
    raise ValueError(
      f"{updates} holds {', '.join(other[:5])}"
      f"{', ...' if len(other) > 5 else ''}; expected {live_files.CURRENT} and"
      f" versions like v000001. Move them away if they are yours. {_REMEDY}"
    )


def open_words(path: epath.Path, passages_fingerprint: str) -> Bm25Index | None:
  """Returns the index of words in a directory; None if there is none."""
  if not path.exists():
    return None
  return Bm25Index.load(path, passages_fingerprint=passages_fingerprint)


def _open(
  path: epath.Path, name: str, passages: PassageStore, index: Index
) -> SearchVersion:
  folder = path / UPDATES / name
  content = artifacts.read_manifest(
    folder, kind=_KIND, format=_FORMAT, remedy=_REMEDY, nested=True
  )
  if artifacts.manifest_digest(path) != content["base_manifest"]:
    raise ValueError(
      f"{folder} is an update of another build: the manifest of {path} is not"
      f" the one that it was made of. Expected both from one copy. {_REMEDY}"
    )
  fingerprint = content["passages_fingerprint"]
  gone = np.load(folder / _GONE, allow_pickle=False)
  added = np.load(folder / _EMBEDDINGS, allow_pickle=False)
  store = None
  if len(added):
    store = PassageStore(folder / PASSAGES)
    # Opens each file now: what is read later may have been removed by then.
    store.get(range(0, len(store), content["passages_per_shard"]))
  updated = UpdatedIndex(index, gone, added, passages_fingerprint=fingerprint)
  updated.certificate = Certificate.from_content(
    content["certificate"], f"{folder}/{artifacts.MANIFEST}"
  )
  return SearchVersion(
    name,
    UpdatedPassages(passages, gone, store, fingerprint),
    updated,
    open_words(folder / BM25, fingerprint),
    folder / BM25,
  )


@dataclasses.dataclass(frozen=True, slots=True)
class Draft:
  """A version that is not in use yet, in a folder that is not finished."""

  folder: epath.Path
  gone: Int[np.ndarray, "G"]
  passages: UpdatedPassages
  index: UpdatedIndex


def draft(
  folder: epath.Path,
  built: tuple[PassageStore, Index],
  gone: Int[np.ndarray, "G"],
  added: Sequence[Passage],
  embeddings: Float[np.ndarray, "D R"],
) -> Draft:
  """Writes what came into a new folder, and opens what would be searched.

  Args:
    folder: of the version, until it is finished.
    built: the passages and index below all versions.
    gone: their rows that are gone, rising.
    added: passages that came, since the directory was built.
    embeddings: of these.
  """
  passages, index = built
  artifacts.start_directory(folder)
  np.save(folder / _GONE, gone, allow_pickle=False)
  np.save(folder / _EMBEDDINGS, embeddings, allow_pickle=False)
  store = write_store(folder / PASSAGES, added) if added else None
  now = UpdatedPassages(passages, gone, store)
  updated = UpdatedIndex(
    index, gone, embeddings, passages_fingerprint=now.fingerprint
  )
  return Draft(folder, gone, now, updated)


def finish(path: epath.Path, made: Draft) -> None:
  """Writes the manifest of a version, with its certificate."""
  certificate = dataclasses.replace(
    made.index.certificate,
    disk_bytes=artifacts.directory_bytes(path / INDEX)
    + made.index.added.nbytes,
  )
  content = live_files.MARK | {
    "base_manifest": artifacts.manifest_digest(path),
    "num_passages": len(made.passages),
    "passages_fingerprint": made.passages.fingerprint,
    "passages_per_shard": PASSAGES_PER_SHARD,
    "certificate": certificate.to_content(),
  }
  artifacts.write_manifest(
    made.folder, kind=_KIND, format=_FORMAT, content=content, nested=True
  )


def remove_unused(path: epath.Path) -> None:
  """Removes old versions and what a killed update left; needs the lock.

  Whoever has opened one of them goes on reading it.
  """
  updates = path / UPDATES
  if not updates.exists():
    return
  now = current(path, always=False).name
  named = live_files.names(updates)
  kept = [name for name in named if name <= now][-KEEP:]
  for name in named:
    # Later ones stay until they are older than that: CURRENT may have been set
    # back by mistake.
    if name < now and name not in kept:
      live_files.retire(updates, name)
  live_files.remove_unfinished(updates)
