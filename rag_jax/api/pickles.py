"""Converts checkpoints whose only weights are a pickle to safetensors.

In: a checkpoint: a directory or a name of the hub. Out: a checkpoint that
rag_jax reads. Nothing else in the library reads a pickle or imports torch. Here
torch reads it, with weights_only=True, which builds tensors and refuses all
other objects.
"""

import os
import pathlib
import pickle
import shutil
import tempfile
from typing import Any
import zipfile
import zlib

from absl import logging
import ml_dtypes
import numpy as np

from rag_jax import artifacts
from rag_jax.disk import file_states
from rag_jax.weights.convert import import_checkpoint
from rag_jax.weights.directory import CheckpointDirectory
from rag_jax.weights.directory import open_directory
from rag_jax.weights.hub import HUB_PREFIX
from rag_jax.weights.hub import download_pickles
from rag_jax.weights.report import Report
from rag_jax.weights.saved import is_ours
from rag_jax.weights.tensors import INDEX
from rag_jax.weights.tensors import PICKLE
from rag_jax.weights.tensors import PICKLE_INDEX
from rag_jax.weights.tensors import SINGLE_FILE
from rag_jax.weights.tensors import write_tensors

_KEPT = (".json", ".txt", ".model", ".safetensors")  # besides the weights


def _pickled(where: str) -> CheckpointDirectory | None:
  """Returns a checkpoint whose only weights are a pickle, or else None.

  The pickle of a checkpoint on the hub is downloaded.
  """
  if is_ours(where):
    return None
  directory = open_directory(where)
  if _has(directory, SINGLE_FILE, INDEX):
    return None
  if where.startswith(HUB_PREFIX):
    download_pickles(where)
  return directory if _has(directory, PICKLE, PICKLE_INDEX) else None


def _has(directory: CheckpointDirectory, *names: str) -> bool:
  return any(directory.has(name) for name in names)


def import_any(where: str, output: str) -> Report:
  """Writes a checkpoint as a model directory, also if its weights are a pickle.

  Raises:
    FileNotFoundError: there is no checkpoint, or a part of it is missing.
    ImportError: torch is needed and not installed.
    ValueError: it is damaged, has an unsupported architecture, or holds objects
      other than weights.
  """
  directory = _pickled(where)
  if directory is None:
    return import_checkpoint(where, output)
  parent = pathlib.Path(output).expanduser().absolute().parent
  parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(prefix=".converted", dir=parent) as folder:
    _write_safetensors(directory, pathlib.Path(folder))
    return import_checkpoint(folder, output, origin=where)


def converted(where: str, cache: pathlib.Path, *, as_is: bool = False) -> str:
  """Returns `where`, or a copy in `cache` if its only weights are a pickle.

  A checkpoint is converted once, unless one of its files changes.

  Args:
    where: a directory or a name of the hub.
    cache: where copies are kept.
    as_is: True copies the checkpoint with safetensors in place of the pickle,
      as a cross-encoder is read; False makes a model directory of ours.
  """
  directory = _pickled(where)
  if directory is None:
    return where
  name = where.removeprefix(HUB_PREFIX).strip("/").replace("/", "--")
  # The files of the checkpoint by name, size and time of change.
  files = [os.path.realpath(directory.path), *file_states(directory.path)]
  state = artifacts.fingerprint_lines(files)[:16]
  kind = "-as-is" if as_is else ""
  output = cache / f"{name[-60:].strip('.')}-{state}{kind}"
  if not (output if as_is else output / artifacts.MANIFEST).exists():
    logging.warning(
      "The only weights of %s are a pickle: they are converted once, into %s.",
      *(where, output),
    )
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".import", dir=cache) as folder:
      made = pathlib.Path(folder) / "model"
      if as_is:
        made.mkdir()
        _write_safetensors(directory, made)
      else:
        import_any(where, os.fspath(made))
      if not output.exists():  # otherwise another process was faster
        os.replace(made, output)
  return os.fspath(output)


def _write_safetensors(
  directory: CheckpointDirectory, output: pathlib.Path
) -> None:
  """Writes a copy of a checkpoint with safetensors in place of pickles.

  Raises:
    ImportError: torch is not installed.
    ValueError: a pickle is damaged or holds objects other than weights; or a
      link leads out of the checkpoint.
  """
  for path in sorted(directory.path.rglob("*")):
    name = path.relative_to(directory.path).as_posix()
    if path.is_dir() or path.name == PICKLE_INDEX or path.suffix not in _KEPT:
      continue
    (output / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(directory.file(name), output / name)
  folders = {path.parent for path in directory.path.rglob("pytorch_model*")}
  for folder in sorted(folders):
    name = folder.relative_to(directory.path).as_posix()
    part = directory.folder("" if name == "." else name)
    if _has(part, PICKLE, PICKLE_INDEX) and not _has(part, SINGLE_FILE, INDEX):
      (output / name).mkdir(parents=True, exist_ok=True)
      write_tensors(output / name, _read(part))


def _read(directory: CheckpointDirectory) -> dict[str, np.ndarray]:
  """Returns the tensors of pytorch_model.bin, or of its shards."""
  files = [PICKLE]
  if not directory.has(PICKLE):
    index = directory.json(PICKLE_INDEX).get("weight_map")
    if not isinstance(index, dict) or not index:
      raise ValueError(
        f"{directory.origin}/{PICKLE_INDEX} has no weight_map; expected names"
        " of tensors and of files. Copy it again from where it came from."
      )
    files = sorted({str(file) for file in index.values()})
  tensors: dict[str, np.ndarray] = {}
  for file in files:
    origin = f"{directory.origin}/{file}"
    for name, tensor in _load(directory.file(file), origin).items():
      tensors[name] = _array(name, tensor, origin)
  return tensors


def _load(path: pathlib.Path, origin: str) -> dict[str, Any]:
  """Returns the weights that torch reads from a file, and nothing else."""
  try:
    import torch
  except ImportError as error:
    raise ImportError(
      f"{origin} is a pickle, and there are no other weights: reading it takes"
      f" PyTorch ({error}). Install it: pip install 'rag_jax[parity]'; or"
      " convert the checkpoint where it is installed, with"
      " rag-jax convert-hf --input=... --output=DIR, and give that directory."
    ) from error
  _check_archive(path, origin)
  try:
    content = torch.load(
      path,
      map_location="cpu",
      weights_only=True,
      mmap=zipfile.is_zipfile(path),  # before 2020, torch wrote no archives
    )
  # torch raises many types of errors for damaged files and other formats.
  except (
    pickle.UnpicklingError, RuntimeError, ValueError, EOFError, OSError,
    KeyError, IndexError, TypeError, AttributeError, AssertionError,
    UnicodeDecodeError,
  ) as error:  # fmt: skip
    reason = str(error).strip().partition("\n")[0]
    raise ValueError(
      f"{origin} cannot be read as weights ({reason}); expected a dictionary of"
      " tensors, as torch.save(model.state_dict()) writes it. It was cut off,"
      " or holds other objects, which are never loaded because that runs their"
      " code. Copy it again, or take safetensors of the same model."
    ) from error
  if not isinstance(content, dict) or not all(
    isinstance(name, str) and isinstance(value, torch.Tensor)
    for name, value in content.items()
  ):
    raise ValueError(
      f"{origin} holds a {type(content).__name__} that is no dictionary of"
      " tensors by name; expected torch.save(model.state_dict()). Save the"
      " weights alone, in that way."
    )
  return content


def _check_archive(path: pathlib.Path, origin: str) -> None:
  """Raises `ValueError` if a checksum is wrong: torch compares none."""
  if not zipfile.is_zipfile(path):
    return
  try:
    with zipfile.ZipFile(path) as archive:
      wrong = archive.testzip()
  # What zipfile and zlib raise for damaged archives.
  except (zipfile.BadZipFile, zlib.error, OSError, ValueError, EOFError,
          NotImplementedError, RuntimeError):  # fmt: skip
    return  # torch says more about it
  if wrong is not None:
    raise ValueError(
      f"{origin} is damaged: {wrong} in it does not have its checksum. Expected"
      " the file as torch.save wrote it. Copy it again; if it was saved after"
      " torch.serialization.set_crc32_options(False), save it again without."
    )


def _array(name: str, tensor: Any, origin: str) -> np.ndarray:
  """Returns a tensor of torch as NumPy's."""
  import torch

  if tensor.dtype == torch.bfloat16:  # which NumPy does not have
    bits = tensor.detach().contiguous().view(torch.int16).numpy()
    return bits.view(ml_dtypes.bfloat16)
  try:
    return tensor.detach().contiguous().numpy()
  except (RuntimeError, TypeError) as error:  # sparse, quantised, on no device
    raise ValueError(
      f"{name} in {origin} is a tensor that is not dense numbers ({error});"
      " expected float32, float16 or bfloat16. Take the checkpoint that it was"
      " made from."
    ) from error
