"""Checks the flag --config, and the --config.SETTING flags that change it."""

import os
import re

from rag_jax import config_json
from rag_jax.api.configs import run_config
from rag_jax.artifacts import instead_of


def check_config(argv: list[str]) -> None:
  """Raises an exception if the config file or a setting is not one.

  Before absl reads them, whose own exceptions end in a stack trace.

  Args:
    argv: the arguments of the command.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: the file has no config, or a setting does not exist or is not
      possible.
  """
  config_json.check_overrides(argv)
  given = re.findall(r"^--?config(?:=|\n)(.+)$", "\n".join(argv), re.MULTILINE)
  for name in given:
    filename, *argument = name.split(":", 1)
    if not os.path.isfile(filename):
      raise FileNotFoundError(
        f"There is no config file {filename}. Expected a Python file with a"
        " function get_config, like configs/quickstart.py."
        f" {instead_of(filename)} Correct --config."
      )
    run_config(filename, *argument)
