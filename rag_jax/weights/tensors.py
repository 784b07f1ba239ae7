"""The tensors of a checkpoint, in safetensors alone.

In: a directory with model.safetensors, or with the shards that
model.safetensors.index.json lists. Out: float32 arrays by name; and back.

Nothing is unpickled. The format has no checksum: what directory.py can compare
with no digest is checked here for values that no training gives, not finite or
absurdly large. A flipped bit that leaves a weight within reason, which most
do, cannot be noticed.
"""

from collections.abc import Iterable, Mapping
import json
import math
import os
import pathlib
import re

from jaxtyping import Float
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from rag_jax import artifacts
from rag_jax import disk
from rag_jax.weights.directory import CheckpointDirectory
from rag_jax.weights.hub import HUB_PREFIX

SINGLE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5_000_000_000  # of the files that are written

# What safetensors calls them. Importing ml_dtypes tells NumPy of bfloat16.
_FLOATS = {
  "F32": np.float32,
  "F16": np.float16,
  "BF16": ml_dtypes.bfloat16,
  "F64": np.float64,
}
_LIMIT = 1e15  # the top bits of an exponent, flipped, multiply by 2**64 or more
_MAY_BE_LARGE = re.compile(r".*final_logits_bias")  # bans tokens
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_SHARD = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")


class TensorFiles:
  """The tensors of a checkpoint, read when they are asked for."""

  def __init__(self, directory: CheckpointDirectory):
    self.origin = directory.origin
    self._files: dict[str, safetensors.safe_open] = {}  # by tensor
    if directory.has(SINGLE_FILE):
      file = _open(directory, SINGLE_FILE)
      self._files = dict.fromkeys(file.keys(), file)
    elif directory.has(INDEX):
      self._open_shards(directory)
    else:
      raise FileNotFoundError(_nothing_to_read(directory))
    self._check_size()

  def _check_size(self) -> None:
    """Raises `ValueError` if the tensors cannot fit into memory.

    A file with holes takes no disk, whatever its header claims, and where the
    memory for a tensor is not there, safetensors ends the process.
    """
    num_values = sum(math.prod(self.shape(name)) for name in self._files)
    needed, memory = num_values * 4, _memory_bytes()  # as float32
    if needed > memory:
      raise ValueError(
        f"The tensors of {self.origin} take {needed:,} bytes as float32;"
        f" expected at most {memory:,}, the memory of this machine. Is it the"
        " right checkpoint, and its header undamaged? Take a machine with more"
        " memory, or a smaller model."
      )

  def _open_shards(self, directory: CheckpointDirectory) -> None:
    weight_map = directory.json(INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
      isinstance(shard, str) for shard in weight_map.values()
    ):
      raise ValueError(
        f"{directory.origin}/{INDEX} has no weight_map of names of tensors to"
        " names of files. Copy it again from where the checkpoint came from."
      )
    shards = sorted(set(weight_map.values()))
    for shard in shards:
      directory.check_name(shard)
    absent = [shard for shard in shards if not directory.has(shard)]
    if absent:
      raise FileNotFoundError(
        f"{INDEX} of {directory.origin} lists {', '.join(absent)}, which is"
        f" missing; expected {len(shards)} files. Copy the missing ones, too."
      )
    files = {shard: _open(directory, shard) for shard in shards}
    held = {shard: set(file.keys()) for shard, file in files.items()}
    lacking = [f"{n} in {s}" for n, s in weight_map.items() if n not in held[s]]
    unlisted = set().union(*held.values()) - set(weight_map)
    if lacking or unlisted:
      raise ValueError(
        f"{INDEX} of {directory.origin} and its files disagree. Missing:"
        f" {', '.join(lacking) or 'none'}; not listed:"
        f" {', '.join(sorted(unlisted)) or 'none'}. They are of different"
        " checkpoints; copy all files again."
      )
    self._files = {name: files[shard] for name, shard in weight_map.items()}

  @property
  def names(self) -> list[str]:
    """The name of every tensor."""
    return sorted(self._files)

  def shape(self, name: str) -> tuple[int, ...]:
    """Returns the shape of tensor `name`."""
    return tuple(self._files[name].get_slice(name).get_shape())

  def dtype(self, name: str) -> str:
    """Returns what safetensors calls the dtype of tensor `name`: "F32"."""
    return self._files[name].get_slice(name).get_dtype()

  def raw(self, name: str) -> np.ndarray:
    """Returns tensor `name` as it is stored.

    Raises:
      ValueError: NumPy has no such numbers, or no array of so many dimensions.
    """
    try:
      return self._files[name].get_tensor(name)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
      raise ValueError(
        f"{name} in {self.origin} cannot be read ({error}); expected an array"
        f" of {', '.join(_FLOATS)} or whole numbers. Take another checkpoint."
      ) from error

  def read(self, name: str) -> Float[np.ndarray, "..."]:
    """Returns tensor `name` as float32.

    Raises:
      ValueError: it holds no floating-point numbers, or some that show damage.
    """
    dtype = self.dtype(name)
    if dtype not in _FLOATS:
      raise ValueError(
        f"{name} in {self.origin} has dtype {dtype}; expected one of"
        f" {', '.join(_FLOATS)}. A quantised checkpoint cannot be read; take"
        " the one that it was made from."
      )
    array = self.raw(name)
    if dtype != "F32":
      with np.errstate(over="ignore"):  # what is too large is infinite, below
        array = array.astype(np.float32)
    self._check_values(name, array)
    return array

  def _check_values(self, name: str, array: np.ndarray) -> None:
    largest = float(np.max(np.abs(array), initial=0.0))  # NaN if there is one
    if np.isfinite(largest) and (
      largest < _LIMIT or _MAY_BE_LARGE.fullmatch(name)
    ):
      return
    with np.errstate(invalid="ignore"):
      bad = np.argwhere(~(np.abs(array) < _LIMIT))
    value = array[tuple(bad[0])]
    raise ValueError(
      f"{name} in {self.origin} holds {value} at {bad[0].tolist()}"
      f" ({len(bad)} of {array.size} values); expected finite weights below"
      f" {_LIMIT:g}. The file was damaged, or training diverged: copy it again,"
      " or take an earlier checkpoint."
    )


def _memory_bytes() -> int:
  """Returns how much memory the machine has."""
  return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _open(directory: CheckpointDirectory, name: str) -> safetensors.safe_open:
  path = directory.file(name)
  try:
    return safetensors.safe_open(path, framework="np")
  except (safetensors.SafetensorError, OSError) as error:
    raise ValueError(
      f"{name} in {directory.origin} cannot be read ({error}): it was cut off"
      f" at {path.stat().st_size} bytes, or is no safetensors file. Copy it"
      " again from where the checkpoint came from."
    ) from error


def _nothing_to_read(directory: CheckpointDirectory) -> str:
  pickles = [n for n in (PICKLE, PICKLE_INDEX) if directory.has(n)]
  if pickles:
    state = f"{directory.origin} holds weights as a pickle alone ({pickles[0]})"
  else:
    state = f"There is no {SINGLE_FILE} and no {INDEX} in {directory.origin}"
  remedy = (
    " If they are there as a pickle, convert it where torch is installed:"
    f" rag-jax convert-hf --input={directory.origin} --output=DIR,"
    " and give DIR."
  )
  if not (pickles or directory.origin.startswith(HUB_PREFIX)):
    remedy = " Copy the whole checkpoint again."
  return (
    f"{state}; expected safetensors. A pickle is never read here, because"
    f" loading one can run any code.{remedy}"
  )


def write_tensors(
  path: str | os.PathLike[str],
  tensors: Mapping[str, np.ndarray],
  max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
  """Writes one file, or several above `max_shard_bytes` and their index.

  Each appears complete or not at all, and what an earlier export left is taken
  away. Names and headers are those of transformers.
  """
  path = pathlib.Path(path)
  for old in path.iterdir():
    if _SHARD.fullmatch(old.name) or old.name == INDEX:
      old.unlink()
  shards = _split(tensors, max_shard_bytes)
  if len(shards) == 1:
    _write_file(path / SINGLE_FILE, tensors, shards[0])
    return
  weight_map = {}
  for number, names in enumerate(shards, start=1):
    file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
    _write_file(path / file, tensors, names)
    weight_map |= dict.fromkeys(names, file)
  index = {
    "metadata": {
      "total_parameters": sum(x.size for x in tensors.values()),
      "total_size": sum(x.nbytes for x in tensors.values()),
    },
    "weight_map": dict(sorted(weight_map.items())),
  }
  artifacts.write_atomically(path / INDEX, json.dumps(index, indent=2) + "\n")


def _split(
  tensors: Mapping[str, np.ndarray], max_shard_bytes: int
) -> list[list[str]]:
  """Returns the names in each file; one tensor is never split."""
  shards: list[list[str]] = [[]]
  size = 0
  for name in sorted(tensors):
    if shards[-1] and size + tensors[name].nbytes > max_shard_bytes:
      shards.append([])
      size = 0
    shards[-1].append(name)
    size += tensors[name].nbytes
  return shards


def _write_file(
  path: pathlib.Path, tensors: Mapping[str, np.ndarray], names: Iterable[str]
) -> None:
  # Not ascontiguousarray, which makes a vector of a scalar.
  arrays = {name: np.asarray(tensors[name], order="C") for name in names}
  temp = artifacts.temp_path(path)
  try:
    safetensors.numpy.save_file(arrays, str(temp), {"format": "pt"})
    disk.sync(temp)
    disk.rename(temp, path)
  finally:
    temp.unlink(missing_ok=True)
