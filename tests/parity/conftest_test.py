"""What a run says where PyTorch is missing; here it is hidden from a child."""

import os
import pathlib
import subprocess
import sys

FOLDER = pathlib.Path(__file__).parent
# A module that is None in sys.modules is neither found nor imported.
CHILD = """
import sys
sys.modules["torch"] = None
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""


def run_without_torch(require):
  """Returns (exit code, output) of the parity tests in a child process."""
  done = subprocess.run(
    [sys.executable, "-c", CHILD, str(FOLDER), "-p", "no:cacheprovider"],
    cwd=FOLDER.parents[1],
    env=os.environ | {"RAG_JAX_REQUIRE_PARITY": require},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    check=False,
  )
  return done.returncode, done.stdout


def test_without_torch_the_header_says_what_is_left_out_and_how_to_run_it():
  code, output = run_without_torch(require="0")
  assert code == 5, output  # nothing was collected, and nothing failed
  header, _, rest = output.partition("collected 0 items")
  assert (
    "parity: PyTorch is not installed, so tests/parity is left out; to run"
    ' it: pip install -e ".[test,parity]"' in header
  )
  assert "no tests ran" in rest


def test_without_torch_a_run_that_demands_parity_is_a_usage_error():
  code, output = run_without_torch(require="1")
  assert code == 4, output
  assert (
    "RAG_JAX_REQUIRE_PARITY=1 demands the parity tests, but PyTorch is not"
    " installed: expected a package named torch beside transformers. Install"
    ' it with: pip install -e ".[test,parity]"' in output
  )
