"""Directories that say whether they are complete and unchanged.

In: a directory of files that another module wrote. Out: its manifest, written
last, with a digest of each file; and the content of that manifest, once every
digest was found to be right. No pickle is accepted beside them.
"""

from collections.abc import Iterable, Iterator, Mapping
import hashlib
import json
import os
import secrets
from typing import Any

from etils import epath
import numpy as np

from rag_jax.json_input import Content
from rag_jax.json_input import read_settings

MANIFEST = "manifest.json"

_TEMP_SUFFIX = ".tmp"  # of files that are not finished; never in a manifest
_PICKLES = (".pkl", ".pickle")  # loading one runs the code inside it
_READ_BYTES = 1 << 22
_DIGEST = "sha256"  # in a manifest: of the rest of it
_FINGERPRINT_CHARS = 32  # 128 bits of the sha256


def is_local(path: epath.PathLike) -> bool:
  """Returns whether `path` is on a file system, not in a bucket (gs://)."""
  return "://" not in os.fspath(path)


def temp_path(path: epath.PathLike) -> epath.Path:
  """Returns a new name beside `path`, for a file that is not finished."""
  path = epath.Path(path)
  return path.parent / f".{path.name}.{secrets.token_hex(4)}{_TEMP_SUFFIX}"


def write_atomically(path: epath.PathLike, text: str) -> None:
  """Writes `text` so that `path` holds the old text or the new, never half."""
  path = epath.Path(path)
  if not is_local(path):  # an object appears in its bucket when it is complete
    path.write_text(text)
    return
  temp = temp_path(path)
  try:
    # Not tempfile: its files can be read by their owner alone.
    with open(temp, "x", encoding="utf-8") as f:
      f.write(text)
      f.flush()
      os.fsync(f.fileno())
    os.replace(temp, path)
  finally:
    temp.unlink(missing_ok=True)


def start_directory(directory: epath.PathLike) -> epath.Path:
  """Makes `directory` and takes its manifest away until the next is written.

  Otherwise a build that is cut off while it writes over an older one would be
  reported as changed files, not as an interrupted build.
  """
  directory = epath.Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  (directory / MANIFEST).unlink(missing_ok=True)
  return directory


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
) -> None:
  """Writes the manifest of all files below `directory`; call it last.

  Args:
    directory: holds the finished files.
    kind: what the directory is, for instance "index".
    format: raise it when the files or `content` change their meaning.
    content: what JSON can hold; `read_manifest` returns it.
    nested: whether a directory inside that has a manifest of its own answers
      for its files: who opens it checks them.

  Raises:
    ValueError: the directory holds a pickle or a link that leaves it.
  """
  directory = epath.Path(directory)
  files = {}
  remedy = "Remove it and save again."
  for name in _files_below(directory, remedy, nested=nested):
    digest, size = _digest(directory / name)
    files[name] = {"sha256": digest, "bytes": size}
  manifest = {
    "kind": kind,
    "format": format,
    "content": dict(content),
    "files": files,
  }
  # As it will be read: JSON makes other keys and tuples of some.
  manifest[_DIGEST] = _own_digest(json.loads(json.dumps(manifest)))
  write_atomically(directory / MANIFEST, json.dumps(manifest, indent=2) + "\n")


def read_manifest(
  directory: epath.PathLike,
  *,
  kind: str,
  format: int,
  remedy: str,
) -> Content:
  """Returns the content of the manifest after checking every file it names.

  Args:
    directory: what `write_manifest` was called with.
    kind: the expected kind.
    format: the newest format that the caller can read.
    remedy: a sentence for the end of each message: what to do next.

  Raises:
    FileNotFoundError: no manifest: nothing was built, or it was cut off.
    ValueError: the manifest was changed, or is of another kind or a newer
      format; or a file is missing, cut off or changed; or the directory holds
      a pickle or a link that leaves it.
  """
  directory = epath.Path(directory)
  path = directory / MANIFEST
  if not path.exists():
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
  for _ in _files_below(directory, remedy):
    pass  # what must not lie there raises
  for name, entry in manifest["files"].items():
    _check_file(directory, name, entry, remedy)
  return Content(manifest["content"], str(path), remedy)


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


def _digest(path: epath.Path) -> tuple[str, int]:
  """Returns the sha256 of a file and its number of bytes."""
  sha, size = hashlib.sha256(), 0
  with path.open("rb") as f:
    while data := f.read(_READ_BYTES):
      sha.update(data)
      size += len(data)
  return sha.hexdigest(), size


def _files_below(
  directory: epath.Path, remedy: str, prefix: str = "", *, nested: bool = False
) -> Iterator[str]:
  """Yields the names of the finished files, relative to `directory`.

  Nested: of a directory inside that has a manifest, that manifest alone.
  """
  for path in sorted((directory / prefix).iterdir()):
    name = prefix + path.name
    unfinished = path.name[0] == "." and path.name.endswith(_TEMP_SUFFIX)
    if unfinished or name == MANIFEST:
      continue
    if is_local(path):
      _check_inside(directory, name, remedy)
      if os.path.islink(path) and path.is_dir():
        continue  # it stays inside, so its files are met without it
    if path.is_dir():
      if nested and (path / MANIFEST).exists():
        yield f"{name}/{MANIFEST}"
      else:
        yield from _files_below(directory, remedy, name + "/", nested=nested)
    elif path.suffix.lower() in _PICKLES:
      raise ValueError(
        f"{directory} holds {name}, a pickle: loading it could run any code."
        f" rag_jax never writes one, so somebody else put it there. {remedy}"
      )
    else:
      yield name


def _check_inside(directory: epath.Path, name: str, remedy: str) -> None:
  """Raises `ValueError` if a link leads from `name` out of `directory`."""
  root = os.path.realpath(directory)
  target = os.path.realpath(os.path.join(root, name))
  if os.path.commonpath([root, target]) != root:
    raise ValueError(
      f"{name} in {directory} is a link to {target}, outside the directory."
      f" Expected files of its own. {remedy}"
    )


def _parse(path: epath.Path, remedy: str) -> dict[str, Any]:
  """Returns the manifest as an object of the four expected parts."""
  try:
    manifest = read_settings(path)
  except ValueError as e:  # of JSON, or of UTF-8
    raise ValueError(f"{path} is not JSON ({e}). {remedy}") from e
  parts = {"kind": str, "format": int, "content": dict, "files": dict}
  others = [*parts, _DIGEST]  # a name that is damaged is another
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
  digest = manifest.get(_DIGEST)
  if unknown or (digest is not None and digest != _own_digest(manifest)):
    raise ValueError(
      f"{path} was damaged: what it says changed since it was written, or it"
      f" was edited. Expected the digest {digest!r} of its content and the"
      f" parts {', '.join(others)}. {remedy}"
    )
  return manifest


def _own_digest(manifest: Mapping[str, Any]) -> str:
  """Returns the sha256 of a manifest, but for its digest and white space."""
  rest = {name: part for name, part in manifest.items() if name != _DIGEST}
  text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
  return hashlib.sha256(text.encode()).hexdigest()


def _check_file(
  directory: epath.Path, name: str, entry: Any, remedy: str
) -> None:
  """Raises `ValueError` unless the file is as the manifest describes it."""
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
  path = directory / name
  if not path.exists() or path.is_dir():
    raise ValueError(
      f"{name} is missing from {directory}, though {MANIFEST} names it."
      f" {remedy}"
    )
  if is_local(path):
    _check_inside(directory, name, remedy)
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
