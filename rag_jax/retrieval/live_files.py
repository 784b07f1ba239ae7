"""What lies in the directory of a live index, and how it is changed safely.

In: the parts of a version. Out: a directory that holds, whenever its writer is
killed, the old version or the new.

  CURRENT     the name of the version in use, and the digest of its manifest
  .lock.tmp   held by the one that writes
  v000001/    which base, the rows that changed since it was built, tombstones
  b000001/    a base: an index of any kind, shared by versions
"""

from collections.abc import Callable
import contextlib
import dataclasses
import json
import os
import re
from typing import Any

from absl import logging
from etils import epath
import numpy as np

from rag_jax import artifacts
from rag_jax import building
from rag_jax import disk

CURRENT = "CURRENT"

_ARTIFACT = "version of a live index"
_FORMAT = 1  # raise when the files of a version change their meaning
_REMEDY = (
  "Restore the directory from a copy, or create the live index again with"
  " LiveIndex.create."
)
VERSION, _BASE = "v", "b"  # the first letter of a name
_NAME = re.compile(r"[vb]\d{6}")
# In the manifests of versions whose digest stands in CURRENT: of all but those
# that an older rag_jax wrote.
MARK = {"digest_in": CURRENT}
_LINE = re.compile(r"(v\d{6})(?: ([0-9a-f]{64}))?\n")
_UNFINISHED = re.compile(r"\.(CURRENT|[vb]\d{6})\.[0-9a-f]+\.tmp")
_ARRAYS = ("delta_ids", "delta", "deleted")


def check_local(path: epath.PathLike) -> epath.Path:
  """Returns `path`.

  Raises:
    ValueError: it is in a bucket.
  """
  if not artifacts.is_local(path):
    raise ValueError(
      f"{path} is in a bucket; expected a directory of a file system, where a"
      " file can be replaced and locked. Keep the live index on a disk, and"
      " copy it to the bucket."
    )
  return epath.Path(path)


def lock(path: epath.Path) -> contextlib.AbstractContextManager[None]:
  """Waits until no other writes."""
  return building.lock(
    path,
    kind="live index",
    wait=True,
    remedy="The version that was in use stays in use: call it again.",
  )


@dataclasses.dataclass(frozen=True, slots=True)
class Current:
  """What `CURRENT` says.

  Attributes:
    name: of the version in use.
    digest: of its manifest; "": written before there was one.
  """

  name: str
  digest: str


def read_current(path: epath.Path, remedy: str = _REMEDY) -> Current:
  """Returns what says which version is in use.

  Raises:
    FileNotFoundError: there is no live index.
    ValueError: it is no name, or a link.
  """
  file = path / CURRENT
  if not file.exists() and not os.path.islink(file):
    raise FileNotFoundError(
      f"There is no {CURRENT} in {path}; expected the directory of a live"
      " index. Create one with LiveIndex.create."
    )
  data = disk.read_own(file, remedy=remedy)
  # A byte that is no UTF-8 is a damage like any other.
  text = data.decode("utf-8", errors="replace")
  line = _LINE.fullmatch(text)
  if line is None:
    raise ValueError(
      f"{file} names {text.strip()!r}; expected a version like 'v000001' and"
      f" the digest of its manifest. {remedy}"
    )
  return Current(line[1], line[2] or "")


def check_current(
  path: epath.Path, current: Current, remedy: str = _REMEDY
) -> None:
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
      f" {remedy}"
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
      f" {remedy}"
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


def add_base(path: epath.Path, save: Callable[[epath.Path], None]) -> str:
  """Returns the name of a new base that `save` wrote."""
  return add(path, _BASE, save)


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


def publish(
  path: epath.Path,
  *,
  base: str,
  base_deleted: int,
  passages_fingerprint: str,
  **arrays: np.ndarray,  # of LiveVersion: delta_ids, delta, deleted
) -> None:
  """Writes a version, complete, and only then names it in `CURRENT`."""
  content = MARK | {
    "base": base,
    "base_manifest": artifacts.manifest_digest(path / base),
    "base_deleted": base_deleted,
    "passages_fingerprint": passages_fingerprint,
  }

  def save(temp: epath.Path) -> None:
    artifacts.start_directory(temp)
    for part in _ARRAYS:
      np.save(temp / f"{part}.npy", arrays[part], allow_pickle=False)
    artifacts.write_manifest(
      temp, kind=_ARTIFACT, format=_FORMAT, content=content
    )

  switch(path, add(path, VERSION, save))


def read_version(
  path: epath.Path, name: str
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """Returns what a version says of itself, and its arrays.

  Of the one in use, call `check_current` first.

  Raises:
    FileNotFoundError: there is no such version, or not its base.
    ValueError: its files are missing, cut off or changed, or the base is not
      the one that it was made of.
  """
  content = artifacts.read_manifest(
    path / name, kind=_ARTIFACT, format=_FORMAT, remedy=_REMEDY
  )
  base = path / content["base"]
  if not _NAME.fullmatch(content["base"]) or not base.exists():
    raise FileNotFoundError(
      f"{name} in {path} needs the base {content['base']!r}, which is not"
      f" there; expected both from one copy of the directory. {_REMEDY}"
    )
  if artifacts.manifest_digest(base) != content["base_manifest"]:
    raise ValueError(
      f"{base} is not the base that {name} was made of: its manifest is"
      f" another. Expected both from one copy of the directory. {_REMEDY}"
    )
  arrays = {
    part: np.load(path / name / f"{part}.npy", allow_pickle=False)
    for part in _ARRAYS
  }
  return content, arrays


def prune(path: epath.Path, current: str, keep: int) -> None:
  """Removes what the `keep` versions up to `current` do not need.

  Later ones stay until they are older than that: `CURRENT` may have been set
  back by mistake.
  """
  older = [name for name in names(path, VERSION) if name <= current]
  later = [name for name in names(path, VERSION) if name > current]
  kept = {*older[-keep:], *later}
  kept |= {read_version(path, name)[0]["base"] for name in kept}
  for name in names(path, VERSION) + names(path, _BASE):
    if name not in kept:
      retire(path, name)
  remove_unfinished(path)


def retire(path: epath.Path, name: str) -> None:
  """Makes a version or base what `remove_unfinished` removes."""
  # Half a version is never met under its name.
  os.rename(path / name, artifacts.temp_path(path / name))


def remove_unfinished(path: epath.Path) -> None:
  """Removes what a writer left that was killed; call it with the lock."""
  for left in path.iterdir():
    if _UNFINISHED.fullmatch(left.name):
      left.rmtree() if left.is_dir() else left.unlink()


def names(path: epath.Path, letter: str = VERSION) -> list[str]:
  """Returns the names of all versions or bases, the oldest first."""
  found = [p.name for p in path.iterdir()] if path.exists() else []
  return sorted(n for n in found if _NAME.fullmatch(n) and n[0] == letter)
