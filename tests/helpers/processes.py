"""Programs in processes of their own: tools, tests on several devices."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]
_EIGHT_DEVICES = {
  "JAX_PLATFORMS": "cpu",
  "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
}


def run_tool(tool, *arguments, timeout=500, **settings):
  """Returns the finished process of tools/`tool`, as a person runs it."""
  environment = {
    "PYTHONPATH": str(ROOT),
    "JAX_PLATFORMS": "cpu",
    "HF_HUB_OFFLINE": "1",
  }
  return subprocess.run(
    [sys.executable, ROOT / "tools" / tool, *map(str, arguments)],
    env=os.environ | environment,
    capture_output=True,
    encoding="utf-8",
    timeout=timeout,
    check=False,
    **settings,
  )


def run_on_eight_devices(file):
  """Returns what a test file prints that is run as a program."""
  done = subprocess.run(
    [sys.executable, "-W", "error", file],
    env=os.environ
    | _EIGHT_DEVICES
    | {
      "PYTHONPATH": os.pathsep.join([str(ROOT), os.path.dirname(__file__)]),
      "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # compiles faster
    },
    capture_output=True,
    text=True,
    timeout=900,
  )
  assert done.returncode == 0, done.stderr
  return done.stdout


def pytest_on_eight_devices(file, names):
  """Returns what pytest says of the tests in `file` that have `names`."""
  done = subprocess.run(
    [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k",
     names, file],
    check=False,
    capture_output=True,
    text=True,
    cwd=ROOT,
    env=os.environ
    | _EIGHT_DEVICES
    | {"PYTHONPATH": os.pathsep.join(sys.path)},
  )  # fmt: skip
  assert done.returncode == 0, done.stdout + done.stderr
  return done.stdout
