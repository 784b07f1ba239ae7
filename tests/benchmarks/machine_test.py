"""What is said of the machine is what the process has."""

import os
import platform

import numpy as np

from rag_jax.benchmarks.machine import describe_machine


def test_it_names_the_cpus_of_the_process_its_load_and_what_is_installed():
  machine = describe_machine(0.5, ["numpy", "no such package"])
  assert machine["num_cpus"] == len(os.sched_getaffinity(0))
  assert machine["cpu"]
  assert machine["load"][0] == 0.5
  assert machine["versions"] == {
    "python": platform.python_version(),
    "numpy": np.__version__,
  }
