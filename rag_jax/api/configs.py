"""The config of an experiment or a run, from its file."""

import os
import runpy

from etils import epath

from rag_jax.api.arguments import path_of
from rag_jax.config import Config
from rag_jax.config_json import read_config
from rag_jax.config_rules import validate
from rag_jax.disk import instead_of

_EXPECTED = (
  "a Python file with a function get_config, like configs/quickstart.py, or"
  " the workdir of a run"
)


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
  if file.suffix != ".py":
    return read_config(file)
  get_config = runpy.run_path(os.fspath(file)).get("get_config")
  if not callable(get_config):
    raise ValueError(
      f"{name} has no function get_config. Expected {_EXPECTED}. Add one that"
      " returns a rag_jax.Config."
    )
  return validate(get_config())
