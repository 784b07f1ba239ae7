"""The versions of a search directory that was updated.

In: what was built, and the folder `updates` beside it. Out: the version that is
in use. A version names the rows of the build that it deletes, and holds the
passages that it adds; it shares everything else with the other versions.

    updates/CURRENT      the name of the version in use and the digest of its
                         manifest; or "built", before the first update
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
# Names in what was built, and in each version.
PASSAGES, INDEX, BM25, TWINS = "passages", "index", "bm25", "twins"
KEEP = 2  # versions; a reader may be opening the one before the newest
# In CURRENT since the build, so that a missing file is never taken for "there
# was no update".
_BUILT = "built\n"
_FILES = re.compile(r"CURRENT|v\d{6}")
# In the manifests of versions whose digest stands in CURRENT. Only versions
# that an older rag_jax wrote do not have it.
MARK = {"digest_in": CURRENT}
_LINE = re.compile(r"(v\d{6})(?: ([0-9a-f]{64}))?\n")
_UNFINISHED_VERSION = re.compile(r"\.(CURRENT|[vb]\d{6})\.[0-9a-f]+\.tmp")
# What an interrupted update or compaction leaves beside what was built.
UNFINISHED = re.compile(
  r"\.(passages|twins|index|bm25|updates|b\d{6})\.[0-9a-f]+\.tmp"
)
BASE = re.compile(r"b\d{6}")  # names of the folders that compacting writes
_BASE_KIND = "base of a search directory"
_BASE_FORMAT = 1  # raise when the files of a base change their meaning
_KIND = "version of a search directory"
_FORMAT = 1  # raise when the files of a version change their meaning
_REMEDY = "Restore the directory from a copy, or build it again."
_GONE, _EMBEDDINGS = "gone.npy", "embeddings.npy"


@dataclasses.dataclass(frozen=True, slots=True)
class SearchVersion:
  """What is searched. It is immutable: who holds one reads one state.

  Attributes:
    name: of the version; "": what was built, without updates.
    passages: row = passage number of both indexes.
    index: over the embeddings.
    bm25: over the words; None if the build left it out.
    bm25_path: the folder of `bm25`.
    twins: passages with the title and text of one of `passages`; None: unknown,
      in directories that were built before twins were kept.
  """

  name: str
  passages: PassageStore | UpdatedPassages
  index: Index
  bm25: Bm25Index | None
  bm25_path: epath.Path
  twins: Twins | None

  def twins_of(self, row: int) -> tuple[Passage, ...]:
    """Returns the known passages with the title and text of passage `row`."""
    return self.twins.of(row) if self.twins else ()


def start_updates(path: epath.Path) -> None:
  """Writes that there was no update yet, unless `CURRENT` exists."""
  updates = path / UPDATES
  updates.mkdir(exist_ok=True)
  if not (updates / CURRENT).exists():
    artifacts.write_atomically(updates / CURRENT, _BUILT)


@dataclasses.dataclass(frozen=True, slots=True)
class Current:
  """The content of the file `CURRENT`.

  Attributes:
    name: of the version in use; "": what was built.
    digest: of its manifest; "": an older rag_jax wrote none.
  """

  name: str
  digest: str


def current(path: epath.Path, *, always: bool) -> Current:
  """Returns the version in use; its name is "" if there was no update.

  Args:
    path: the search directory.
    always: whether the build wrote `CURRENT`. Older directories got it with
      their first update.

  Raises:
    ValueError: `CURRENT` is missing, is a link, or names no version.
  """
  updates = path / UPDATES
  file = updates / CURRENT
  if not file.exists() and not os.path.islink(file):
    named = names(updates)
    if always or named:
      raise ValueError(
        f"There is no {UPDATES}/{CURRENT} in {path}, so nobody can"
        " tell which version is in use, of"
        f" {', '.join(['what was built', *named])}. Expected the file: it was"
        f" removed. {_REMEDY}"
      )
    return Current("", "")
  # A byte that is not UTF-8 is reported like any other damage.
  text = disk.read_own(file, remedy=_REMEDY).decode("utf-8", errors="replace")
  if text == _BUILT:
    return Current("", "")
  line = _LINE.fullmatch(text)
  if line is None:
    raise ValueError(
      f"{file} names {text.strip()!r}; expected a version like 'v000001' and"
      f" the digest of its manifest. {_REMEDY}"
    )
  return Current(line[1], line[2] or "")


def check_current(path: epath.Path, current: Current) -> None:
  """Checks that the version in use has the manifest it had when it was written.

  Args:
    path: the folder of the versions.
    current: what `CURRENT` in it says.

  Raises:
    FileNotFoundError: there is no such version.
    ValueError: its manifest was replaced or changed.
  """
  manifest = path / current.name / artifacts.MANIFEST
  if not current.name:  # there was no update
    pass
  elif not manifest.exists():
    raise FileNotFoundError(
      f"{path / CURRENT} names {current.name}, which is not in {path} or has"
      f" no {artifacts.MANIFEST}. Expected both from one copy of the directory."
      f" {_REMEDY}"
    )
  elif not current.digest and not _has_digest(manifest):
    logging.warning(
      "%s has no digest of %s: an older version of rag_jax wrote it. Nobody can"
      " tell whether that version was in use; the next update adds a digest.",
      *(path / CURRENT, current.name),
    )
  elif artifacts.manifest_digest(path / current.name) != current.digest:
    raise ValueError(
      f"{path / CURRENT} is not what was written there, or {current.name} is"
      " another version than the update wrote: the digest of its manifest is"
      f" not {current.digest[:12]}. Expected both from one copy of the"
      f" directory. {_REMEDY}"
    )
  later = [name for name in names(path) if name > current.name]
  if later:
    logging.warning(
      "%s holds %s, later than %s, which is in use: an update was interrupted"
      " just before its end, or %s was set back to an older version.",
      *(path, ", ".join(later), current.name or "what was built", CURRENT),
    )


def _has_digest(manifest: epath.Path) -> bool:
  """Returns whether the digest of a version was written to `CURRENT`."""
  with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
    return MARK.items() <= json.loads(manifest.read_bytes())["content"].items()
  return True  # a damaged manifest is never taken for an old one


def open_current(
  path: epath.Path, passages: PassageStore, index: Index, *, always: bool
) -> SearchVersion:
  """Returns the version in use.

  Args:
    path: the search directory.
    passages: the passages as they were built.
    index: the index as it was built.
    always: as in `current`.

  Raises:
    FileNotFoundError: the version does not exist.
    ValueError: a file of it is missing, cut off or changed, or there are files
      that do not belong there.
  """
  while True:
    now = current(path, always=always)
    try:
      _check_names(path / UPDATES)
      check_current(path / UPDATES, now)
      return _open(path, now.name, passages, index)
    except (FileNotFoundError, ValueError):
      # An update may have removed the version since `CURRENT` was read.
      if current(path, always=always) == now:
        raise


def _check_names(updates: epath.Path) -> None:
  """Raises `ValueError` if there are other files among the versions."""
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


def _open(
  path: epath.Path, name: str, passages: PassageStore, index: Index
) -> SearchVersion:
  """Opens one version of the search directory; "": what was built."""
  folder, fingerprint = path, passages.fingerprint
  now: PassageStore | UpdatedPassages = passages
  if name:
    folder = path / UPDATES / name
    now, index = _open_update(path, folder, passages, index)
    fingerprint = now.fingerprint
  words = None
  if (folder / BM25).exists():
    words = Bm25Index.load(folder / BM25, passages_fingerprint=fingerprint)
  twins = open_twins(folder / TWINS) if (folder / TWINS).exists() else None
  return SearchVersion(name, now, index, words, folder / BM25, twins)


def _open_update(
  path: epath.Path, folder: epath.Path, passages: PassageStore, index: Index
) -> tuple[UpdatedPassages, UpdatedIndex]:
  """Returns the passages and the index of the version in `folder`."""
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
      f" the one that was updated. Expected both from one copy. {_REMEDY}"
    )
  fingerprint = content["passages_fingerprint"]
  gone = np.array(read_array(folder / _GONE, _REMEDY))
  added = np.array(read_array(folder / _EMBEDDINGS, _REMEDY))
  store = None
  if len(added):
    store = PassageStore(folder / PASSAGES)
    # Opens each file now: a later update may remove them.
    store.get(range(0, len(store), content["passages_per_shard"]))
  updated = UpdatedIndex(index, gone, added, passages_fingerprint=fingerprint)
  updated.certificate = Certificate.from_content(
    content["certificate"], f"{folder}/{artifacts.MANIFEST}"
  )
  return UpdatedPassages(passages, gone, store, fingerprint), updated


def add(
  path: epath.Path, letter: str, save: Callable[[epath.Path], None]
) -> str:
  """Returns the name of a new version or base, which `save` wrote."""
  last = max(names(path, letter), default=f"{letter}0")
  name = f"{letter}{int(last[1:]) + 1:06d}"
  temp = artifacts.temp_path(path / name)
  save(temp)
  disk.rename(temp, path / name)
  return name


def switch(path: epath.Path, name: str) -> None:
  """Writes to `CURRENT` in `path` which version to read from now on."""
  digest = artifacts.manifest_digest(path / name)
  artifacts.write_atomically(path / CURRENT, f"{name} {digest}\n")


@dataclasses.dataclass(frozen=True, slots=True)
class Draft:
  """A version that is being written, in a folder without a manifest."""

  folder: epath.Path
  passages: UpdatedPassages
  index: UpdatedIndex


def draft(
  folder: epath.Path,
  built: tuple[PassageStore, Index],
  gone: Int[np.ndarray, "G"],
  added: Sequence[Passage],
  embeddings: Float[np.ndarray, "D R"],
) -> Draft:
  """Writes added passages and deleted rows to a new folder, and opens both.

  Args:
    folder: of the version.
    built: passages and index as they were built.
    gone: deleted rows of these, in rising order.
    added: all passages that were added since the build.
    embeddings: of `added`.
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
  return Draft(folder, now, updated)


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
  """Writes the manifest of a compacted base, which has no updates yet."""
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
  """Checks the files of a compacted base; raises as `read_manifest`."""
  artifacts.read_manifest(
    folder,
    kind=_BASE_KIND,
    format=_BASE_FORMAT,
    remedy=_REMEDY,
    nested=True,
    beside=[UPDATES],
  )


def remove_unused(path: epath.Path) -> None:
  """Removes old versions and what an interrupted update left.

  The caller holds the lock. Who has an old version open can still read it.
  """
  updates = path / UPDATES
  if not updates.exists():
    return
  now = current(path, always=False).name
  # Versions later than the one in use stay: CURRENT may have been set back by
  # mistake.
  for name in [name for name in names(updates) if name <= now][:-KEEP]:
    retire(updates, name)
  remove_unfinished(updates, _UNFINISHED_VERSION)


def retire(path: epath.Path, name: str) -> None:
  """Renames a file or folder in `path` to what `remove_unfinished` removes.

  Removing takes time, and a half-removed folder must not keep its name.
  """
  os.rename(path / name, artifacts.temp_path(path / name))


def remove_unfinished(path: epath.Path, pattern: re.Pattern[str]) -> None:
  """Removes files that an interrupted writer left; the caller has the lock."""
  for left in path.iterdir():
    if pattern.fullmatch(left.name):
      left.rmtree() if left.is_dir() else left.unlink()


def names(path: epath.Path, letter: str = VERSION) -> list[str]:
  """Returns the names of all versions or bases, the oldest first."""
  found = [p.name for p in path.iterdir()] if path.exists() else []
  return sorted(n for n in found if re.fullmatch(rf"{letter}\d{{6}}", n))
