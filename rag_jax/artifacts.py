"""Manifests, which show whether a directory is complete and unchanged.

In: a directory of files that another module wrote. Out: its manifest, written
last, with a digest of each file; and the content of that manifest, after every
digest was checked. A directory holds exactly the plain files that its manifest
names: no link, no pickle, no other file.

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
from rag_jax.disk import instead_of as instead_of
from rag_jax.disk import is_local as is_local
from rag_jax.disk import temp_path as temp_path
from rag_jax.disk import write_atomically as write_atomically
from rag_jax.json_input import MAX_SETTINGS_BYTES
from rag_jax.json_input import Content
from rag_jax.json_input import parse_settings

MANIFEST = "manifest.json"

_PICKLES = (".pkl", ".pickle")  # loading one runs the code inside it
_READ_BYTES = 1 << 22
DIGEST = "sha256"  # in a manifest or a JSON file: of the rest of it
_FINGERPRINT_CHARS = 32  # 128 bits of the sha256


def start_directory(directory: epath.PathLike) -> epath.Path:
  """Makes `directory`, and removes its manifest until the next is written.

  Otherwise an interrupted build over an older one would be reported as changed
  files, not as an interrupted build.
  """
  directory = epath.Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  if (directory / MANIFEST).exists():
    (directory / MANIFEST).unlink()
    if is_local(directory):
      # After a power cut, new files must not lie under the old manifest.
      disk.sync(directory)
  return directory


def check_no_links(
  directory: epath.PathLike, remedy: str, name: str = ""
) -> None:
  """Raises `ValueError` for a link, pipe, device or pickle at any depth.

  Unfinished files are checked too: who continues to write them would write to
  where a link leads.

  Args:
    directory: local.
    remedy: the end of the message: what to do next.
    name: the one file or folder in it to check; "": all.
  """
  directory = epath.Path(directory)
  try:
    if name and not _is_folder(directory, name, remedy):
      _check_no_pickle(directory, name.removesuffix(disk.TEMP_SUFFIX), remedy)
      return
    for path in sorted((directory / name).iterdir()):
      inside = f"{name}/{path.name}" if name else path.name
      check_no_links(directory, remedy, inside)
  except FileNotFoundError:
    pass  # another process renamed or removed it meanwhile


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

  The files and their names are on the disk before the manifest is. So after a
  power cut there is no manifest, or it is right.

  Args:
    directory: holds the finished files.
    kind: what the directory is, for instance "index".
    format: raise it when the files or `content` change their meaning.
    content: what JSON can hold; `read_manifest` returns it.
    nested: whether to leave out the files of inner directories that have a
      manifest of their own. Who opens such a directory checks them.
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
  manifest = with_digest(
    {"kind": kind, "format": format, "content": content, "files": files}
  )
  write_atomically(directory / MANIFEST, json.dumps(manifest, indent=2) + "\n")


def read_manifest(
  directory: epath.PathLike,
  *,
  kind: str,
  format: int,
  remedy: str,
  nested: bool = False,
  beside: Collection[str] = (),
) -> Content:
  """Returns the content of the manifest, after checking every file it names.

  Args:
    directory: what `write_manifest` was called with.
    kind: the expected kind.
    format: the newest format that the caller can read.
    remedy: the end of each message: what to do next.
    nested: as in `write_manifest`.
    beside: names that the directory may hold too. Who opens them checks them.

  Raises:
    FileNotFoundError: there is no manifest: nothing was built, or the build was
      interrupted.
    ValueError: the manifest was changed, or has another kind or a newer format;
      a file is missing, cut off or changed; or the directory holds a file that
      the manifest does not name, a pickle, a link or a device.
  """
  directory = epath.Path(directory)
  path = directory / MANIFEST
  # A link to nothing is refused as a link, not reported as a missing manifest.
  if not path.exists() and not os.path.islink(path):
    if not directory.exists():
      raise FileNotFoundError(
        f"There is no {MANIFEST}, since there is no directory {directory}."
        f" {instead_of(directory)} {remedy}"
      )
    raise FileNotFoundError(
      f"There is no {MANIFEST} in {directory}: no {kind} was built there, or"
      f" the build was cut off before its end. {remedy}"
    )
  manifest = _parse_manifest(path, remedy)
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
  return Content(manifest["content"], str(path), remedy)


def peek_manifest(directory: epath.PathLike, *, remedy: str) -> dict[str, Any]:
  """Returns kind, format, content and files, without checking the files.

  Args:
    directory: what `write_manifest` was called with.
    remedy: the end of the message: what to do next.

  Raises:
    OSError: the manifest is missing or cannot be read.
    ValueError: it was changed or cut off, or is no plain file.
  """
  return _parse_manifest(epath.Path(directory) / MANIFEST, remedy)


def with_digest(content: Mapping[str, Any]) -> dict[str, Any]:
  """Returns `content` as JSON holds it, with its digest.

  The digest does not depend on white space or the order of the keys.
  """
  # As it will be read: in JSON, keys are strings and tuples are lists.
  plain = json.loads(json.dumps(dict(content)))
  plain.pop(DIGEST, None)
  # The digest is first: without its line the rest is still JSON.
  return {DIGEST: _own_digest(plain), **plain}


def without_digest(
  content: Mapping[str, Any], *, origin: str, remedy: str
) -> dict[str, Any]:
  """Returns what `with_digest` was given, after checking the digest.

  A file without a digest is old, or was edited on purpose: it is accepted with
  a warning.

  Args:
    content: what the file holds.
    origin: the path of the file.
    remedy: the end of the message: what to do next.

  Raises:
    ValueError: the content changed since it was written.
  """
  plain = {name: part for name, part in content.items() if name != DIGEST}
  if DIGEST not in content:
    logging.warning(
      "%s has no digest (%r): it was edited, or written by an older version of"
      " rag_jax. Nobody can tell whether it has changed since then.",
      *(origin, DIGEST),
    )
  elif content[DIGEST] != _own_digest(plain):
    raise ValueError(
      f"{origin} was damaged: what it says changed since it was written, or it"
      f" was edited. Expected the digest {content[DIGEST]!r} of its content."
      f" {remedy}"
    )
  return plain


def read_json(path: epath.PathLike, remedy: str) -> dict[str, Any]:
  """Returns the content of a JSON file that was written `with_digest`.

  Args:
    path: of the file.
    remedy: the end of the message: what to do next.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is no JSON object, was cut off or edited, or is a link.
  """
  content = _parse(path, remedy)
  if not isinstance(content, dict):
    raise ValueError(
      f"{path} holds a {type(content).__name__}; expected an object of named"
      f" results. {remedy}"
    )
  return without_digest(content, origin=str(path), remedy=remedy)


def manifest_digest(directory: epath.PathLike) -> str:
  """Returns the sha256 of the manifest; "" if there is none."""
  path = epath.Path(directory) / MANIFEST
  return _digest(path)[0] if path.exists() else ""


def fingerprint_arrays(arrays: Mapping[str, np.ndarray]) -> str:
  """Returns hex digits that change with any name, dtype, shape or value.

  Args:
    arrays: for instance the parameters of an encoder, by their path; in any
      order.

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

  With `nested`, an inner directory with a manifest is that manifest alone.

  Raises:
    ValueError: there is a link, a pipe, a device or a pickle.
  """
  for path in sorted((directory / prefix).iterdir()):
    name = prefix + path.name
    if disk.is_unfinished(path.name):
      if is_local(directory):
        check_no_links(directory, remedy, name)
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


def _parse(path: epath.PathLike, remedy: str) -> Any:
  """Returns the JSON value of a plain file."""
  data = disk.read_own(path, remedy=remedy)
  try:
    if len(data) > MAX_SETTINGS_BYTES:
      raise ValueError(f"it has {len(data):,} bytes")
    return parse_settings(data)
  except ValueError as error:
    raise ValueError(
      f"{path} is not JSON ({error}); it was cut off or edited. {remedy}"
    ) from error


def _parse_manifest(path: epath.Path, remedy: str) -> dict[str, Any]:
  """Returns the manifest as an object of the four expected parts."""
  manifest = _parse(path, remedy)
  parts = {"kind": str, "format": int, "content": dict, "files": dict}
  others = [*parts, DIGEST]  # a damaged name is another name
  if not isinstance(manifest, dict):
    manifest = {}
  bad = [k for k, t in parts.items() if not isinstance(manifest.get(k), t)]
  if bad:
    raise ValueError(
      f"{path} is no manifest: {', '.join(bad)} missing or of the wrong type;"
      f" expected {', '.join(parts)}. {remedy}"
    )
  # Older manifests have no digest of their own, and exactly these parts.
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
  """Returns the sha256 of JSON without its digest and white space."""
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
  """Raises `ValueError` unless `entry` describes a file that was found."""
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
