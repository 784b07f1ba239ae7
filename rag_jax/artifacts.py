"""Directories that say whether they are complete and unchanged.

In: a directory of files that another module wrote. Out: its manifest, written
last, with a digest of each file; and the content of that manifest, once every
digest was found to be right. A directory holds exactly the plain files that its
manifest names: no link, no pickle, no file more.

A single JSON file has its digest in itself: `with_digest`.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
import hashlib
import json
import os
import stat
from typing import Any

from absl import logging
from etils import epath
import numpy as np

from rag_jax import disk
from rag_jax.disk import is_local as is_local
from rag_jax.disk import temp_path as temp_path
from rag_jax.disk import write_atomically as write_atomically

MANIFEST = "manifest.json"

_PICKLES = (".pkl", ".pickle")  # loading one runs the code inside it
_READ_BYTES = 1 << 22
DIGEST = "sha256"  # in a manifest or a JSON file: of the rest of it
_FINGERPRINT_CHARS = 32  # 128 bits of the sha256


def start_directory(directory: epath.PathLike) -> epath.Path:
  """Makes `directory` and takes its manifest away until the next is written.

  Otherwise a build that is cut off while it writes over an older one would be
  reported as changed files, not as an interrupted build.
  """
  directory = epath.Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  if (directory / MANIFEST).exists():
    (directory / MANIFEST).unlink()
    if is_local(directory):
      disk.sync(directory)  # or new files could lie under the old manifest
  return directory


def check_no_links(
  directory: epath.PathLike, remedy: str, name: str = ""
) -> None:
  """Raises `ValueError` for a link, pipe or device at any depth.

  Of files that are not finished too: who goes on with them would write to
  where a link leads.

  Args:
    directory: local.
    remedy: a sentence for the end of the message: what to do next.
    name: of the one file or folder in it to look at; "": all.
  """
  directory = epath.Path(directory)
  try:
    if name and not _is_folder(directory, name, remedy):
      return
    for path in sorted((directory / name).iterdir()):
      inside = f"{name}/{path.name}" if name else path.name
      check_no_links(directory, remedy, inside)
  except FileNotFoundError:
    pass  # a writer is at work there


def directory_bytes(directory: epath.PathLike) -> int:
  """Returns the size of the finished files below `directory`.

  Raises:
    ValueError: as `write_manifest`.
  """
  directory = epath.Path(directory)
  names = _files_below(directory, remedy="Remove it and save again.")
  return sum((directory / name).stat().length for name in names)


def write_manifest(
  directory: epath.PathLike,
  *,
  kind: str,
  format: int,
  content: Mapping[str, Any],
  nested: bool = False,
  beside: Collection[str] = (),
) -> None:
  """Writes the manifest of all files below `directory`; call it last.

  All of them, and their names, are on the disk before the manifest is: after a
  power cut there is no manifest, or it is true.

  Args:
    directory: holds the finished files.
    kind: what the directory is, for instance "index".
    format: raise it when the files or `content` change their meaning.
    content: what JSON can hold; `read_manifest` returns it.
    nested: whether a directory inside that has a manifest of its own answers
      for its files: who opens it checks them.
    beside: names that the manifest leaves out, because they change.

  Raises:
    ValueError: the directory holds a pickle, a link or a device.
  """
  directory = epath.Path(directory)
  files = {}
  remedy = "Remove it and save again."
  for name in _files_below(directory, remedy, nested=nested, beside=beside):
    digest, size = _digest(directory / name, sync=True)
    files[name] = {"sha256": digest, "bytes": size}
  if is_local(directory):
    for folder in {os.path.dirname(name) for name in files} | set(beside):
      while folder:
        disk.sync(directory / folder)
        folder = os.path.dirname(folder)
    disk.sync_names(directory)
  manifest = {
    "kind": kind,
    "format": format,
    "content": dict(content),
    "files": files,
  }
  manifest = with_digest(manifest)
  write_atomically(directory / MANIFEST, json.dumps(manifest, indent=2) + "\n")


def read_manifest(
  directory: epath.PathLike,
  *,
  kind: str,
  format: int,
  remedy: str,
  nested: bool = False,
  beside: Collection[str] = (),
) -> dict[str, Any]:
  """Returns the content of the manifest after checking every file it names.

  Args:
    directory: what `write_manifest` was called with.
    kind: the expected kind.
    format: the newest format that the caller can read.
    remedy: a sentence for the end of each message: what to do next.
    nested: as it was written.
    beside: names that may lie there too; who opens them checks them.

  Raises:
    FileNotFoundError: no manifest: nothing was built, or it was cut off.
    ValueError: the manifest was changed, or is of another kind or a newer
      format; or a file is missing, cut off or changed; or the directory holds
      a file that the manifest does not name, a pickle, a link or a device.
  """
  directory = epath.Path(directory)
  path = directory / MANIFEST
  # A link that leads nowhere is a link, not a manifest that is missing.
  if not path.exists() and not os.path.islink(path):
    raise FileNotFoundError(
      f"There is no {MANIFEST} in {directory}: no {kind} was built there, or"
      f" the build was cut off before its end. {remedy}"
    )
  manifest = _parse(path, remedy)
  if manifest["kind"] != kind:
    raise ValueError(
      f"{directory} holds kind {manifest['kind']!r}, expected {kind!r}."
      f" {remedy}"
    )
  if manifest["format"] > format:
    raise ValueError(
      f"The {kind} in {directory} has format {manifest['format']}; this"
      f" version of rag_jax reads up to {format}. Upgrade rag_jax. {remedy}"
    )
  found = set(_files_below(directory, remedy, nested=nested, beside=beside))
  named = manifest["files"]
  for name, entry in named.items():
    _check_entry(directory, name, entry, found, remedy)
  extra = sorted(found - named.keys())
  if extra:
    raise ValueError(
      f"{directory} holds files that its {MANIFEST} does not name:"
      f" {', '.join(extra[:5])}{', ...' if len(extra) > 5 else ''}. Expected"
      " exactly those that it names. Move them away if they are yours."
      f" {remedy}"
    )
  for name, entry in named.items():
    _check_file(directory, name, entry, remedy)
  return manifest["content"]


def with_digest(content: Mapping[str, Any]) -> dict[str, Any]:
  """Returns what JSON can hold of `content`, and the digest of that.

  White space and the order of the parts do not matter to it.
  """
  # As it will be read: JSON makes other keys and tuples of some.
  plain = json.loads(json.dumps(dict(content)))
  plain.pop(DIGEST, None)
  # First: without its line the rest is still JSON.
  return {DIGEST: _own_digest(plain), **plain}


def without_digest(
  content: Mapping[str, Any], *, origin: str, remedy: str
) -> dict[str, Any]:
  """Returns what `with_digest` was given, after checking the digest.

  A file without one is of before there were digests, or was edited on purpose:
  it is taken, with a warning.

  Args:
    content: what the file holds.
    origin: the path of the file.
    remedy: a sentence for the end of the message: what to do next.

  Raises:
    ValueError: the content changed since it was written.
  """
  plain = {name: part for name, part in content.items() if name != DIGEST}
  if DIGEST not in content:
    logging.warning(
      "%s has no digest (%r): it was edited, or written by an older version."
      " Nobody can tell whether it is as it was written.",
      *(origin, DIGEST),
    )
  elif content[DIGEST] != _own_digest(plain):
    raise ValueError(
      f"{origin} was damaged: what it says changed since it was written, or it"
      f" was edited. Expected the digest {content[DIGEST]!r} of its content."
      f" {remedy}"
    )
  return plain


def manifest_digest(directory: epath.PathLike) -> str:
  """Returns the sha256 of a manifest, which holds those of all files.

  "" if there is no manifest.
  """
  path = epath.Path(directory) / MANIFEST
  return _digest(path)[0] if path.exists() else ""


def fingerprint_arrays(arrays: Mapping[str, np.ndarray]) -> str:
  """Returns hex digits that change with any name, dtype, shape or value.

  Args:
    arrays: for instance the parameters of an encoder, by their path. Their
      order does not matter.

  Raises:
    ValueError: an array holds Python objects, which have no fixed bytes.
  """
  sha = hashlib.sha256()
  for name in sorted(arrays):
    array = arrays[name]
    if array.dtype.hasobject:
      raise ValueError(
        f"The array {name!r} has dtype {array.dtype}, which has no fixed bytes"
        " to take a fingerprint of. Expected numbers; convert it first."
      )
    header = [name, array.dtype.name, array.dtype.str, *map(str, array.shape)]
    sha.update(fingerprint_lines(header).encode())
    sha.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
  return sha.hexdigest()[:_FINGERPRINT_CHARS]


def fingerprint_lines(lines: Iterable[str]) -> str:
  """Returns hex digits that change with any line, their number or order."""
  sha = hashlib.sha256()
  for line in lines:
    # Texts from JSON can hold half of a surrogate pair.
    data = line.encode("utf-8", "surrogatepass")
    # The length first: else ["ab", "c"] would be ["a", "bc"].
    sha.update(len(data).to_bytes(8, "little"))
    sha.update(data)
  return sha.hexdigest()[:_FINGERPRINT_CHARS]


def _digest(path: epath.Path, *, sync: bool = False) -> tuple[str, int]:
  """Returns the sha256 of a file and its number of bytes."""
  sha, size = hashlib.sha256(), 0
  with path.open("rb") as f:
    while data := f.read(_READ_BYTES):
      sha.update(data)
      size += len(data)
  if sync and is_local(path):
    disk.sync(path)
  return sha.hexdigest(), size


def _files_below(
  directory: epath.Path,
  remedy: str,
  prefix: str = "",
  *,
  nested: bool = False,
  beside: Collection[str] = (),
) -> Iterator[str]:
  """Yields the names of the finished files, relative to `directory`.

  Nested: of a directory inside that has a manifest, that manifest alone.

  Raises:
    ValueError: there is a link, a pipe, a device or a pickle.
  """
  for path in sorted((directory / prefix).iterdir()):
    name = prefix + path.name
    if disk.is_unfinished(path.name):
      _check_unfinished(directory, name, remedy)
      continue
    is_folder = _is_folder(directory, name, remedy)
    if name == MANIFEST or name in beside:
      continue
    if not is_folder:
      _check_no_pickle(directory, name, remedy)
      yield name
    elif nested and (path / MANIFEST).exists():
      yield f"{name}/{MANIFEST}"
    else:
      yield from _files_below(directory, remedy, name + "/", nested=nested)


def _is_folder(directory: epath.Path, name: str, remedy: str) -> bool:
  """Returns whether `name` is a folder, and no plain file.

  Raises:
    ValueError: it is neither.
  """
  path = directory / name
  if not is_local(path):
    return path.is_dir()
  mode = os.lstat(path).st_mode
  if stat.S_ISLNK(mode):
    inside = os.path.realpath(path).startswith(os.path.realpath(directory))
    raise ValueError(
      f"{name} in {directory} is a link to {os.readlink(path)}"
      f"{'' if inside else ', outside the directory'}. Expected plain files of"
      f" its own: a link can lead to any file of this machine. {remedy}"
    )
  if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
    raise ValueError(
      f"{name} in {directory} is a pipe, a socket or a device. Expected plain"
      f" files. {remedy}"
    )
  return stat.S_ISDIR(mode)


def _check_no_pickle(directory: epath.Path, name: str, remedy: str) -> None:
  if name.lower().endswith(_PICKLES):
    raise ValueError(
      f"{directory} holds {name}, a pickle: loading it could run any code."
      f" rag_jax never writes one, so somebody else put it there. {remedy}"
    )


def _check_unfinished(directory: epath.Path, name: str, remedy: str) -> None:
  """Raises `ValueError` for what no writer of ours leaves behind.

  A writer may be at work there: what is gone by now is not looked at.
  """
  if not is_local(directory):
    return
  try:
    if _is_folder(directory, name, remedy):
      for path in sorted((directory / name).iterdir()):
        _check_unfinished(directory, f"{name}/{path.name}", remedy)
    else:
      _check_no_pickle(directory, name.removesuffix(disk.TEMP_SUFFIX), remedy)
  except FileNotFoundError:
    pass


def _parse(path: epath.Path, remedy: str) -> dict[str, Any]:
  """Returns the manifest as an object of the four expected parts."""
  data = disk.read_own(path, remedy=remedy)
  try:
    manifest = json.loads(data.decode("utf-8"))
  except (ValueError, RecursionError) as e:  # of JSON, or of UTF-8
    raise ValueError(f"{path} is not JSON ({e}). {remedy}") from e
  parts = {"kind": str, "format": int, "content": dict, "files": dict}
  others = [*parts, DIGEST]  # a name that is damaged is another
  if not isinstance(manifest, dict):
    manifest = {}
  bad = [k for k, t in parts.items() if not isinstance(manifest.get(k), t)]
  if bad:
    raise ValueError(
      f"{path} is no manifest: {', '.join(bad)} missing or of the wrong type;"
      f" expected {', '.join(parts)}. {remedy}"
    )
  # Those of before have no digest of their own, and just these parts.
  unknown = [name for name in manifest if name not in others]
  digest = manifest.get(DIGEST)
  if unknown or (DIGEST in manifest and digest != _own_digest(manifest)):
    raise ValueError(
      f"{path} was damaged: what it says changed since it was written, or it"
      f" was edited. Expected the digest {digest!r} of its content and the"
      f" parts {', '.join(others)}. {remedy}"
    )
  return manifest


def _own_digest(manifest: Mapping[str, Any]) -> str:
  """Returns the sha256 of a manifest, but for its digest and white space."""
  rest = {name: part for name, part in manifest.items() if name != DIGEST}
  text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
  return hashlib.sha256(text.encode()).hexdigest()


def _check_entry(
  directory: epath.Path,
  name: str,
  entry: Any,
  found: Collection[str],
  remedy: str,
) -> None:
  """Raises `ValueError` if a manifest cannot say that of a file, or it is gone.

  Args:
    directory: of the manifest.
    name: of the file.
    entry: what the manifest says of it.
    found: the files in the directory.
    remedy: for the message.
  """
  parts = name.replace("\\", "/").split("/")
  if "://" in name or {"", ".", ".."} & set(parts):
    raise ValueError(
      f"{directory}/{MANIFEST} names the file {name!r}; expected a path"
      f" relative to the directory, without '..'. {remedy}"
    )
  if not (
    isinstance(entry, dict)
    and isinstance(entry.get("sha256"), str)
    and isinstance(entry.get("bytes"), int)
  ):
    raise ValueError(
      f"{directory}/{MANIFEST} says {entry!r} about {name}; expected its"
      f" sha256 and bytes. {remedy}"
    )
  if name not in found:
    raise ValueError(
      f"{name} is missing from {directory}, though {MANIFEST} names it."
      f" {remedy}"
    )


def _check_file(
  directory: epath.Path, name: str, entry: Mapping[str, Any], remedy: str
) -> None:
  """Raises `ValueError` unless the file is as the manifest describes it."""
  path = directory / name
  size = path.stat().length
  if size != entry["bytes"]:
    state = "was cut off" if size < entry["bytes"] else "has grown"
    raise ValueError(
      f"{name} in {directory} {state}: it has {size} bytes, {MANIFEST} says"
      f" {entry['bytes']}. {remedy}"
    )
  digest, _ = _digest(path)
  if digest != entry["sha256"]:
    raise ValueError(
      f"{name} in {directory} was damaged: its content changed since it was"
      f" written (digest {digest[:12]}, {MANIFEST} says"
      f" {entry['sha256'][:12]}). {remedy}"
    )
