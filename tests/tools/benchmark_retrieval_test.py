"""tools/benchmark_retrieval.py as a person runs it."""

import json

import numpy as np
from processes import run_tool
from processes import run_tool_on_hosts
import pytest
from small_encoder import write_encoder
import small_search

from rag_jax.benchmarks.report import Benchmark
from rag_jax.benchmarks.run import BenchmarkSettings
from rag_jax.benchmarks.run import benchmark_directory


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


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
  """Flags for a search directory of 40 passages, and questions about each."""
  root = tmp_path_factory.mktemp("searched")
  pairs = [(a, b) for a in small_search.ANIMALS for b in small_search.PLACES]
  texts = [small_search.sentence(*pair) for pair in pairs]
  records = [
    {"id": str(i), "title": "", "text": text} for i, text in enumerate(texts)
  ]
  asked = [
    {"question": f"do the {a} live in the {b}", "answers": [], "gold": [str(i)]}
    for i, (a, b) in enumerate(pairs)
  ]
  for name, lines in (("corpus", records), ("asked", asked)):
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (root / f"{name}.jsonl").write_text(text)
  write_encoder(root / "encoder", texts)
  small_search.build(root / "corpus.jsonl", root / "encoder", root / "index")
  return (
    f"--index={root / 'index'}", f"--questions={root / 'asked.jsonl'}",
    "--systems=index,exact,device,bm25", "--rounds=1", "--speed_secs=0.05",
  )  # fmt: skip


def test_two_hosts_find_what_one_finds_on_chips_of_both(searched, tmp_path):
  files = [flag.partition("=")[2] for flag in searched[:2]]
  systems = ("index", "exact", "device", "bm25")
  settings = BenchmarkSettings(systems=systems, rounds=1, speed_secs=0.01)
  one = benchmark_directory(*files, settings)
  done = run_tool_on_hosts(
    "benchmark_retrieval.py", *searched, f"--output={tmp_path}/out"
  )
  for number, (status, text, _) in enumerate(done):
    assert status == 0, text
    assert ("| BM25 |" in text) == (not number)
  results = (tmp_path / "out" / "results.json").read_text()
  two = Benchmark.from_json(results)
  assert len(one.rows) == len(two.rows) == 4
  for a, b in zip(one.rows, two.rows, strict=True):
    assert (a.family, a.index_recalls) == (b.family, b.index_recalls)
    assert a.metrics == b.metrics
    assert min(map(min, b.speeds.values())) > 0
  (device,) = (row for row in two.rows if row.family == "device")
  assert device.settings.endswith("2 chips of 2 hosts")
  assert device.recall(10).mean == 1
  assert any("measured on the first host alone" in note for note in two.notes)


def test_what_one_host_cannot_write_ends_both_with_the_reason(arrays, tmp_path):
  (tmp_path / "file").write_text("")
  done = run_tool_on_hosts(
    "benchmark_retrieval.py", *arrays, "--systems=exact", "--rounds=1",
    "--speed_secs=0.01", f"--output={tmp_path}/file/in",
  )  # fmt: skip
  for status, text, _ in done:
    assert status == 1
    assert "NotADirectoryError" in text
    assert "Traceback" not in text
  assert "because process 0 could not" in done[1][1]
