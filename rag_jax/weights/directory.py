"""A checkpoint's directory: its files, and that they are its own.

In: a local directory or "hf:ORG/NAME". Out: the paths and JSON of its files,
after checking that no name and no link leads out of it.
"""

import dataclasses
import hashlib
import os
import pathlib
import re
from typing import Any

from rag_jax import artifacts
from rag_jax.json_input import read_settings
from rag_jax.weights.hub import HUB_PREFIX
from rag_jax.weights.hub import download

MANIFEST_KIND = "checkpoint"  # of the directories that export.py writes
MANIFEST_FORMAT = 1

_SHA256 = re.compile(r"[0-9a-f]{64}")  # how the hub's cache names large files


@dataclasses.dataclass(frozen=True, slots=True)
class CheckpointDirectory:
  """Files that were published together."""

  path: pathlib.Path
  origin: str  # as the user named it, for messages
  home: pathlib.Path  # links may lead to what is inside it

  def has(self, name: str) -> bool:
    """Returns whether there is a file or folder `name`."""
    return os.path.exists(self.path / name)

  def folder(self, name: str) -> "CheckpointDirectory":
    """Returns the folder `name`; "" is the directory itself.

    Raises:
      ValueError: the name or a link leads out of the directory.
      FileNotFoundError: there is none.
    """
    if not name:
      return self
    path = self.file(name)
    if not path.is_dir():
      raise FileNotFoundError(
        f"{self.origin}/{name} is a file; expected a folder of the checkpoint."
        " Copy the whole checkpoint again."
      )
    return CheckpointDirectory(path, f"{self.origin}/{name}", self.home)

  def check_name(self, name: str) -> None:
    """Raises `ValueError` if `name` could lead out of the directory."""
    parts = re.split(r"[/\\]", name)
    if {"", ".", ".."} & set(parts) or ":" in name or "\0" in name:
      raise ValueError(
        f"{self.origin} names the file {name!r}; expected a path relative to"
        " the checkpoint, without '..'. Whoever wrote this could read any file"
        " of this machine: take the checkpoint from another source."
      )

  def file(self, name: str) -> pathlib.Path:
    """Returns the path of `name`, which may come from an untrusted file.

    Raises:
      ValueError: the name or a link leads out of the directory.
      FileNotFoundError: there is no such file.
    """
    self.check_name(name)
    path = self.path / name
    if not os.path.exists(path):  # nor can it, if the name is too long
      raise FileNotFoundError(
        f"There is no {name[:200]} in {self.origin}. Expected a whole"
        " checkpoint, as save_pretrained of transformers writes it; copy it"
        " again."
      )
    home, target = os.path.realpath(self.home), os.path.realpath(path)
    if os.path.commonpath([home, target]) != home:
      raise ValueError(
        f"{name} in {self.origin} is a link to {target}, outside the"
        " checkpoint. Expected files of its own. Copy the file to the place of"
        " the link if you trust it."
      )
    if not path.is_file() and not path.is_dir():
      raise ValueError(
        f"{name} in {self.origin} is a FIFO, a socket or a device. Expected a"
        " plain file. Take the checkpoint from another source."
      )
    return path

  def json(self, name: str, default: Any = None) -> Any:
    """Returns the object in the JSON file `name`, or `default` if there is one.

    Raises:
      FileNotFoundError: there is no such file, and no default.
      ValueError: it is not JSON, or another type than `default` (an object).
    """
    if default is not None and not self.has(name):
      return default
    path = self.file(name)
    try:
      content = read_settings(path)
    except ValueError as error:
      raise ValueError(
        f"{self.origin}/{name} is not JSON ({error}): it was cut off or edited."
        " Copy it again from where the checkpoint came from."
      ) from error
    wanted = dict if default is None else type(default)
    if not isinstance(content, wanted):
      raise ValueError(
        f"{self.origin}/{name} holds a {type(content).__name__}, expected"
        f" a {wanted.__name__}. Copy it again from where the checkpoint came"
        " from."
      )
    return content

  def check_digests(self) -> None:
    """Raises `ValueError` if a file changed, as far as there are digests.

    They are in the manifest that we write beside our exports, and in the names
    of the hub's cache. Safetensors has none: without either, a flipped bit goes
    unnoticed unless it makes a weight absurdly large (see tensors.py).
    """
    if self.home != self.path:
      self._check_hub_cache()
    elif self._has_our_manifest():
      artifacts.read_manifest(
        self.path,
        kind=MANIFEST_KIND,
        format=MANIFEST_FORMAT,
        remedy=(
          "Export or copy the checkpoint again; if the change was yours, remove"
          f" {artifacts.MANIFEST}."
        ),
      )

  def _has_our_manifest(self) -> bool:
    try:  # other programs call other things manifest.json
      kind = self.json(artifacts.MANIFEST).get("kind")
    except (OSError, ValueError):
      return False
    return kind == MANIFEST_KIND

  def _check_hub_cache(self) -> None:
    for path in sorted(
      [*self.path.rglob("*.safetensors"), *self.path.rglob("*.bin")]
    ):
      name = os.path.basename(os.path.realpath(path))
      if not _SHA256.fullmatch(name):
        continue
      with path.open("rb") as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest()
      if digest != name:
        raise ValueError(
          f"{path.name} of {self.origin} was damaged: its sha256 is"
          f" {digest[:12]}, the hub's {name[:12]}. Remove"
          f" {os.path.realpath(path)} and download it again."
        )


def open_directory(where: str | os.PathLike[str]) -> CheckpointDirectory:
  """Returns the checkpoint `where`: a local directory or "hf:ORG/NAME".

  Raises:
    FileNotFoundError: it is not there, or the hub cannot be reached.
    ValueError: it is no checkpoint directory, or a file is damaged.
  """
  where = os.fspath(where)
  local = download(where) if where.startswith(HUB_PREFIX) else where
  if not artifacts.is_local(local):
    raise ValueError(
      f"{where} is in a bucket; expected a local directory or"
      f" {HUB_PREFIX}ORG/NAME. Copy it to this machine first."
    )
  path = pathlib.Path(local).expanduser()
  if not path.exists():
    raise FileNotFoundError(
      f"There is no directory {where}. Expected a checkpoint: a directory with"
      f" config.json and model.safetensors, or {HUB_PREFIX}ORG/NAME."
      f" {artifacts.instead_of(path)} Correct the path."
    )
  if not path.is_dir():
    raise ValueError(
      f"{where} is a file; expected the directory of a checkpoint, with"
      " config.json and model.safetensors. Give its directory."
    )
  home = path
  if path.parent.name == "snapshots" and (path.parents[1] / "blobs").is_dir():
    home = path.parents[1]  # of the hub's cache, whose files are links to blobs
  directory = CheckpointDirectory(path, where.rstrip("/") or "/", home)
  directory.check_digests()
  return directory
