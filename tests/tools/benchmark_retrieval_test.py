"""tools/benchmark_retrieval.py as a person runs it."""

import numpy as np
from processes import run_tool
import pytest

from rag_jax.benchmarks.report import Benchmark


def benchmark(*arguments):
  """Returns the finished process."""
  return run_tool("benchmark_retrieval.py", *arguments)


@pytest.fixture
def arrays(tmp_path):
  rng = np.random.default_rng(0)
  for name, rows in (("p", 60), ("q", 9)):
    np.save(tmp_path / f"{name}.npy", rng.normal(size=(rows, 4)))
  return (
    f"--embeddings={tmp_path}/p.npy",
    f"--question_embeddings={tmp_path}/q.npy",
  )


def test_it_prints_the_table_and_writes_the_page(tmp_path, arrays):
  done = benchmark(
    *arrays,
    "--systems=exact,bm25",
    "--rounds=1",
    "--speed_secs=0.01",
    f"--output={tmp_path}/out",
  )
  assert done.returncode == 0, done.stderr
  assert "| exact |  | 1.0000 " in done.stdout
  assert "bm25 is left out" in done.stdout
  results = (tmp_path / "out" / "results.json").read_text()
  assert Benchmark.from_json(results).markdown().strip() == done.stdout.strip()
  assert (tmp_path / "out" / "report.html").exists()


def test_half_of_an_input_is_an_error(arrays):
  done = benchmark(arrays[0])
  assert done.returncode != 0
  assert "Give --index and --questions, or" in done.stdout + done.stderr


def test_an_error_is_one_line(tmp_path, arrays):
  done = benchmark(arrays[0], f"--question_embeddings={tmp_path}/no.npy")
  assert done.returncode == 1
  assert "FileNotFoundError: There is no" in done.stderr
  assert "Traceback" not in done.stderr
