"""Describes the machine of a benchmark: CPU, package versions, load.

In: the load before the run. Out: plain values for JSON.
"""

from collections.abc import Sequence
import importlib.metadata
import os
import pathlib
import platform
import re
from typing import Any

from rag_jax.retrieval.resources import num_cpus

_PACKAGES = ("numpy", "jax", "scann", "faiss-cpu", "bm25s")


def describe_machine(
  load_before: float, packages: Sequence[str] = _PACKAGES
) -> dict[str, Any]:
  """Returns CPU, number of CPUs of this process, load, versions.

  Args:
    load_before: load average of the minute before the run.
    packages: to report the versions of; those not installed are left out.
  """
  cpu, info = platform.processor(), pathlib.Path("/proc/cpuinfo")
  if info.exists():
    names = re.findall(r"model name\s*: (.*)", info.read_text())
    cpu = names[0] if names else cpu
  versions = {"python": platform.python_version()}
  for name in packages:
    try:
      versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  return {
    "cpu": cpu or platform.machine(),
    "architecture": platform.machine(),
    "num_cpus": num_cpus(),
    "load": [load_before, os.getloadavg()[0]],
    "versions": versions,
  }
