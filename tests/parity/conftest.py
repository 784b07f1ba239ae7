"""Leaves the parity tests out, and says so, where PyTorch is not installed.

With RAG_JAX_REQUIRE_PARITY=1 (CI) a missing PyTorch is an error instead, so
that the comparison can never be dropped without a word.
"""

from collections.abc import Iterator
import importlib.util
import os

import jax
import pytest

_TORCH = importlib.util.find_spec("torch") is not None
_INSTALL = 'pip install -e ".[test,parity]"'

# Not even imported, because they import torch.
collect_ignore_glob = [] if _TORCH else ["*_test.py"]


def pytest_configure() -> None:
  """Raises UsageError if the comparison is demanded but cannot be made."""
  if not _TORCH and os.environ.get("RAG_JAX_REQUIRE_PARITY") == "1":
    raise pytest.UsageError(
      "RAG_JAX_REQUIRE_PARITY=1 demands the parity tests, but PyTorch is not"
      " installed: expected a package named torch beside transformers. Install"
      f" it with: {_INSTALL}"
    )


def _left_out() -> list[str]:
  if _TORCH:
    return []
  return [
    "parity: PyTorch is not installed, so tests/parity is left out; to run it:"
    f" {_INSTALL}"
  ]


def pytest_report_header() -> list[str]:
  """Returns what is left out, for the header of `pytest tests/parity`."""
  return _left_out()


def pytest_report_collectionfinish() -> list[str]:
  """Returns the same for a run of all tests, whose header comes too early."""
  return _left_out()


@pytest.fixture(autouse=True)
def full_precision() -> Iterator[None]:
  """Multiplies matrices in float32 on accelerators too, as PyTorch does."""
  with jax.default_matmul_precision("highest"):
    yield
