"""The versions of a search directory that was updated.

In: what was built, and the folder `updates` beside it. Out: the version that is
in use. A version names the rows of what was built that are gone, and holds what
came: it shares all else with the others.

    updates/CURRENT      the version in use and the digest of its manifest; or
                         "built", before the first update
    updates/v000001/     gone.npy, embeddings.npy, passages/, twins/, bm25/, and
                         the manifest, written last, with the certificate
"""

from collections.abc import Callable, Sequence
import contextlib
import dataclasses
import json
import os
import re

from absl import logging
from etils import epath
from jaxtyping import Float, Int
import numpy as np

from rag_jax import artifacts
from rag_jax import disk
from rag_jax.corpus.npy_files import read_array
from rag_jax.corpus.passages import Passage
from rag_jax.corpus.store import PASSAGES_PER_SHARD
from rag_jax.corpus.store import PassageStore
from rag_jax.corpus.store import write_store
from rag_jax.corpus.twins import Twins
from rag_jax.corpus.twins import open_twins
from rag_jax.retrieval.bm25 import Bm25Index
from rag_jax.retrieval.certificate import Certificate
from rag_jax.retrieval.index import Index
from rag_jax.search.updated_index import UpdatedIndex
from rag_jax.search.updated_passages import UpdatedPassages

UPDATES = "updates"
CURRENT = "CURRENT"
VERSION, COMPACTED = "v", "b"  # the first letter of a folder's name
# Of what was built, and of versions.
PASSAGES, INDEX, BM25, TWINS = "passages", "index", "bm25", "twins"
KEEP = 2  # versions: who just opened the one before can go on opening it

# In CURRENT, from the build on: whether there was an update is never guessed.
_BUILT = "built\n"
_FILES = re.compile(r"CURRENT|v\d{6}")
_NAME = re.compile(r"[vb]\d{6}")
# In the manifests of versions whose digest stands in CURRENT: of all but those
# that an older rag_jax wrote.
MARK = {"digest_in": CURRENT}
_LINE = re.compile(r"(v\d{6})(?: ([0-9a-f]{64}))?\n")
_UNFINISHED_VERSION = re.compile(r"\.(CURRENT|[vb]\d{6})\.[0-9a-f]+\.tmp")

# What an update or a compaction that was killed leaves beside what was built.
UNFINISHED = re.compile(
  r"\.(passages|twins|index|bm25|updates|b\d{6})\.[0-9a-f]+\.tmp"
)
BASE = re.compile(r"b\d{6}")  # names of folders: what was compacted

_BASE_KIND = "base of a search directory"
_BASE_FORMAT = 1  # raise when the files of a base change their meaning
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
    twins: passages whose text one of `passages` has; None: nobody knows, of
      directories that were built before they were kept.
  """

  name: str
  passages: PassageStore | UpdatedPassages
  index: Index
  bm25: Bm25Index | None
  bm25_path: epath.Path
  twins: Twins | None

  def twins_of(self, row: int) -> tuple[Passage, ...]:
    """Returns the passages that have the title and text of one, if known."""
    return self.twins.of(row) if self.twins else ()


def start_updates(path: epath.Path) -> None:
  """Says that there was no update yet, unless it is known already."""
  updates = path / UPDATES
  updates.mkdir(exist_ok=True)
  if not (updates / CURRENT).exists():
    artifacts.write_atomically(updates / CURRENT, _BUILT)


@dataclasses.dataclass(frozen=True, slots=True)
class Current:
  """What `CURRENT` says.

  Attributes:
    name: of the version in use.
    digest: of its manifest; "": written before there was one.
  """

  name: str
  digest: str


def current(path: epath.Path, *, always: bool) -> Current:
  """Returns the version in use; its name is "" if there was no update.

  Args:
    path: of the search directory.
    always: whether it was built with the file that says so. Directories of
      before got it with their first update.

  Raises:
    ValueError: nobody can tell which version it is.
  """
  updates = path / UPDATES
  file = updates / CURRENT
  if not file.exists() and not os.path.islink(file):
    named = names(updates) if updates.exists() else []
    if always or named:
      raise ValueError(
        f"There is no {UPDATES}/{CURRENT} in {path}, so nobody can"
        " tell which version is in use, of"
        f" {', '.join(['what was built', *named])}. Expected the file: it was"
        f" removed. {_REMEDY}"
      )
    return Current("", "")
  if disk.read_own(file, remedy=_REMEDY) == _BUILT.encode():
    return Current("", "")
  return _read_current(updates)


def _read_current(path: epath.Path) -> Current:
  """Returns what says which version is in use.

  Raises:
    ValueError: it is no name, or a link.
  """
  file = path / CURRENT
  data = disk.read_own(file, remedy=_REMEDY)
  # A byte that is no UTF-8 is a damage like any other.
  text = data.decode("utf-8", errors="replace")
  line = _LINE.fullmatch(text)
  if line is None:
    raise ValueError(
      f"{file} names {text.strip()!r}; expected a version like 'v000001' and"
      f" the digest of its manifest. {_REMEDY}"
    )
  return Current(line[1], line[2] or "")


def check_current(path: epath.Path, current: Current) -> None:
  """Checks that the version in use is the one that was put into use.

  Raises:
    FileNotFoundError: there is no such version.
    ValueError: its manifest is another than when it was put into use.
  """
  manifest = path / current.name / artifacts.MANIFEST
  if not current.name:  # of a search directory that was never updated
    pass
  elif not manifest.exists():
    raise FileNotFoundError(
      f"{path / CURRENT} names {current.name}, which is not in {path} or has"
      f" no {artifacts.MANIFEST}. Expected both from one copy of the directory."
      f" {_REMEDY}"
    )
  elif not current.digest and not _has_digest(manifest):
    logging.warning(
      "%s has no digest of %s: an older version wrote it. Nobody can tell"
      " whether it is the version that was in use; the next update adds one.",
      *(path / CURRENT, current.name),
    )
  elif artifacts.manifest_digest(path / current.name) != current.digest:
    raise ValueError(
      f"{path / CURRENT} is not what was written there, or {current.name} is"
      " another than was put into use: the digest of its manifest is not"
      f" {current.digest[:12]}. Expected both from one copy of the directory."
      f" {_REMEDY}"
    )
  later = [name for name in names(path) if name > current.name]
  if later:
    logging.warning(
      "%s holds %s, later than %s, which is in use: an update was cut off just"
      " before its end, or %s was set back to an older one.",
      *(path, ", ".join(later), current.name or "what was built", CURRENT),
    )


def _has_digest(manifest: epath.Path) -> bool:
  """Returns whether a version was put into use with a digest in `CURRENT`."""
  with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
    return MARK.items() <= json.loads(manifest.read_bytes())["content"].items()
  return True  # damaged, which nobody calls old


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
      check_current(path / UPDATES, now)
      if now.name:
        return _open(path, now.name, passages, index)
      words = path / BM25
      return SearchVersion(
        "",
        passages,
        index,
        open_words(words, passages.fingerprint),
        words,
        _open_twins(path / TWINS),
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
      f"{', ...' if len(other) > 5 else ''}; expected {CURRENT} and"
      f" versions like v000001. Move them away if they are yours. {_REMEDY}"
    )


def open_words(path: epath.Path, passages_fingerprint: str) -> Bm25Index | None:
  """Returns the index of words in a directory; None if there is none."""
  if not path.exists():
    return None
  return Bm25Index.load(path, passages_fingerprint=passages_fingerprint)


def _open_twins(path: epath.Path) -> Twins | None:
  return open_twins(path) if path.exists() else None


def _open(
  path: epath.Path, name: str, passages: PassageStore, index: Index
) -> SearchVersion:
  folder = path / UPDATES / name
  content = artifacts.read_manifest(
    folder, kind=_KIND, format=_FORMAT, remedy=_REMEDY, nested=True
  )
  content.check(
    base_manifest=str,
    passages_fingerprint=str,
    passages_per_shard=int,
    certificate=dict,
  )
  if artifacts.manifest_digest(path) != content["base_manifest"]:
    raise ValueError(
      f"{folder} is an update of another build: the manifest of {path} is not"
      f" the one that it was made of. Expected both from one copy. {_REMEDY}"
    )
  fingerprint = content["passages_fingerprint"]
  gone = np.array(read_array(folder / _GONE, _REMEDY))
  added = np.array(read_array(folder / _EMBEDDINGS, _REMEDY))
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
    _open_twins(folder / TWINS),
  )


def add(
  path: epath.Path, letter: str, save: Callable[[epath.Path], None]
) -> str:
  """Returns the name of a new version or base, complete, that `save` wrote."""
  last = max(names(path, letter), default=f"{letter}0")
  name = f"{letter}{int(last[1:]) + 1:06d}"
  temp = artifacts.temp_path(path / name)
  save(temp)
  disk.rename(temp, path / name)
  return name


def switch(path: epath.Path, name: str) -> None:
  """Names the version to read from now on."""
  digest = artifacts.manifest_digest(path / name)
  artifacts.write_atomically(path / CURRENT, f"{name} {digest}\n")


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
  certificate = made.index.certificate
  assert certificate is not None, "whoever drafts a version certifies it"
  certificate = dataclasses.replace(
    certificate,
    disk_bytes=artifacts.directory_bytes(path / INDEX)
    + made.index.added.nbytes,
  )
  content = MARK | {
    "base_manifest": artifacts.manifest_digest(path),
    "num_passages": len(made.passages),
    "passages_fingerprint": made.passages.fingerprint,
    "passages_per_shard": PASSAGES_PER_SHARD,
    "certificate": certificate.to_content(),
  }
  artifacts.write_manifest(
    made.folder, kind=_KIND, format=_FORMAT, content=content, nested=True
  )


def finish_base(folder: epath.Path, passages_fingerprint: str) -> None:
  """Writes the manifest of what was compacted, never updated yet."""
  start_updates(folder)
  artifacts.write_manifest(
    folder,
    kind=_BASE_KIND,
    format=_BASE_FORMAT,
    content={"passages_fingerprint": passages_fingerprint},
    nested=True,
    beside=[UPDATES],
  )


def check_base(folder: epath.Path) -> None:
  """Raises as `artifacts.read_manifest` unless what was compacted is whole."""
  artifacts.read_manifest(
    folder,
    kind=_BASE_KIND,
    format=_BASE_FORMAT,
    remedy=_REMEDY,
    nested=True,
    beside=[UPDATES],
  )


def remove_unused(path: epath.Path) -> None:
  """Removes old versions and what a killed update left; needs the lock.

  Whoever has opened one of them goes on reading it.
  """
  updates = path / UPDATES
  if not updates.exists():
    return
  now = current(path, always=False).name
  named = names(updates)
  kept = [name for name in named if name <= now][-KEEP:]
  for name in named:
    # Later ones stay until they are older than that: CURRENT may have been set
    # back by mistake.
    if name < now and name not in kept:
      retire(updates, name)
  remove_unfinished(updates)


def retire(path: epath.Path, name: str) -> None:
  """Makes a version or base what `remove_unfinished` removes."""
  # Half a version is never met under its name.
  os.rename(path / name, artifacts.temp_path(path / name))


def remove_unfinished(path: epath.Path) -> None:
  """Removes what a writer left that was killed; call it with the lock."""
  for left in path.iterdir():
    if _UNFINISHED_VERSION.fullmatch(left.name):
      left.rmtree() if left.is_dir() else left.unlink()


def names(path: epath.Path, letter: str = VERSION) -> list[str]:
  """Returns the names of all versions or bases, the oldest first."""
  found = [p.name for p in path.iterdir()] if path.exists() else []
  return sorted(n for n in found if _NAME.fullmatch(n) and n[0] == letter)
