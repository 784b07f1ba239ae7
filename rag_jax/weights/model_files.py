"""A trained model as files, which `RagPipeline` and the tools open.

In: parameters. Out: a directory with `params.safetensors` (float32, named by
their path) and a manifest with its digest.
"""

from collections.abc import Mapping
from typing import Any

from etils import epath
import flax.traverse_util
import jax
from jax.experimental import multihost_utils
from jaxtyping import PyTree
import numpy as np
import safetensors
import safetensors.numpy

from rag_jax import artifacts
from rag_jax.json_input import Content

FORMAT = 1  # raise when the files below change meaning

_REMEDY = (
  "Run the training command of this workdir again: it goes on from the last"
  " checkpoint and writes the model at the end."
)
_KIND = "model"
_PARAMS = "params.safetensors"


def save_model(
  path: epath.PathLike, params: PyTree, content: Mapping[str, Any]
) -> None:
  """Writes `params` to directory `path`, its manifest last.

  Args:
    path: of the model.
    params: of any sharding. Every process calls, and the first one writes; it
      may call alone if it holds all of them.
    content: what the manifest says of them; what JSON can hold.
  """
  if not all(
    x.is_fully_addressable
    for x in jax.tree.leaves(params)
    if isinstance(x, jax.Array)
  ):
    params = multihost_utils.process_allgather(params, tiled=True)
  if jax.process_index():
    return
  flat = flax.traverse_util.flatten_dict(params, sep="/")
  # Not ascontiguousarray, which makes a vector of a scalar.
  arrays = {k: np.asarray(v, order="C") for k, v in flat.items()}
  path = artifacts.start_directory(path)
  artifacts.write_atomically(path / _PARAMS, safetensors.numpy.save(arrays))
  artifacts.write_manifest(
    path, kind=_KIND, format=FORMAT, content=dict(content)
  )


def read_content(path: epath.PathLike, remedy: str = _REMEDY) -> Content:
  """Returns the content alone; arguments and errors as in `load_model`."""
  return artifacts.read_manifest(path, kind=_KIND, format=FORMAT, remedy=remedy)


def load_model(
  path: epath.PathLike, remedy: str = _REMEDY
) -> tuple[PyTree, Content]:
  """Returns the parameters and the content that `save_model` wrote.

  Args:
    path: of the model.
    remedy: what to do if it is not whole, for the messages.

  Raises:
    FileNotFoundError: no model was saved there.
    ValueError: a file is missing, cut off or changed.
  """
  content = read_content(path, remedy)
  try:
    arrays = safetensors.numpy.load((epath.Path(path) / _PARAMS).read_bytes())
    params = {k: jax.numpy.asarray(v) for k, v in arrays.items()}
    return flax.traverse_util.unflatten_dict(params, sep="/"), content
  except (
    safetensors.SafetensorError, KeyError, TypeError, ValueError, OSError
  ) as error:  # fmt: skip
    raise ValueError(
      f"{path}/{_PARAMS} cannot be read ({type(error).__name__}: {error})."
      f" Expected arrays by their path. {remedy}"
    ) from error
