"""The config of an experiment or a run, from its file."""

import os
import runpy
import traceback
from typing import Any

from etils import epath

from rag_jax.api.arguments import path_of
from rag_jax.config import Config
from rag_jax.config_json import read_config
from rag_jax.config_rules import validate
from rag_jax.disk import instead_of

_FILE = "a Python file with a function get_config, like configs/quickstart.py"
_EXPECTED = f"{_FILE}, or the workdir of a run"


def load_config(path: epath.PathLike) -> Config:
  """Returns the config of an experiment, or of a run that was started.

  Every setting is a field that can be changed: `config.train.num_steps = 200`.

  Args:
    path: a Python file with `get_config()`, which is executed; a workdir; or
      the config.json in one.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it has no `get_config`, settings that are not possible, or a
      digest of other settings.
    TypeError: `path` is no path, or `get_config` returns no `Config`.
  """
  name = path_of("path", path, _EXPECTED)
  file = epath.Path(name).expanduser()
  if (file / "config.json").exists():
    file = file / "config.json"
  if not file.exists() or file.is_dir():
    raise FileNotFoundError(
      f"There is no config {name}. Expected {_EXPECTED}. {instead_of(file)}"
      " Correct the path."
    )
  return (
    validate(run_config(file)) if file.suffix == ".py" else read_config(file)
  )


def run_config(file: epath.PathLike, *arguments: str) -> Any:
  """Executes a Python file, and returns what its get_config returns.

  Args:
    file: of the experiment.
    *arguments: of get_config; on the command line they follow a colon.

  Raises:
    ValueError: the file has no get_config, or one of them raises an exception;
      names the line.
  """
  name = os.fspath(file)
  try:
    get_config = runpy.run_path(name).get("get_config")
    if callable(get_config):
      return get_config(*arguments)
  except Exception as error:
    lines = [
      frame.lineno
      for frame in traceback.extract_tb(error.__traceback__)
      if frame.filename == name
    ]
    line = (
      error.lineno if isinstance(error, SyntaxError) else (lines or [1])[-1]
    )
    raise ValueError(
      f"{name}:{line}: the config cannot be read ({type(error).__name__}:"
      f" {error}). Expected {_FILE}. Correct the file."
    ) from error
  raise ValueError(
    f"{name} has no function get_config. Expected {_FILE}. Add one that"
    " returns a rag_jax.Config."
  )
