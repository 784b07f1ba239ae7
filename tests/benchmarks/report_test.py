"""What a benchmark leaves: it can be read back, sent and looked at."""

import base64
import dataclasses
import io
import json
import re

from matplotlib.image import imread
import pytest

from rag_jax.benchmarks import report as benchmark_report
from rag_jax.benchmarks.machine import describe_machine
from rag_jax.benchmarks.measure import Measured
from rag_jax.benchmarks.report import Benchmark
from rag_jax.benchmarks.report import pareto
from rag_jax.benchmarks.report import write_benchmark
from rag_jax.evaluation.judged_questions import Mean
from rag_jax.retrieval.recall import Recall


def row(family, recall, speed, **changes):
  recalls = () if recall is None else tuple(
    Recall(k=k, mean=recall, low=recall - 0.01, high=min(recall + 0.01, 1.0))
    for k in (1, 10, 100)
  )  # fmt: skip
  fields = {
    "family": family,
    "settings": "a <b> | c",
    "index_recalls": recalls,
    "metrics": {"answer_recall@1": Mean(mean=0.5, low=0.4, high=0.6)},
    "speeds": {1: (speed / 8, speed / 4, speed / 2), 256: (speed,)},
    "build_secs": None,
    "memory_bytes": 123_000,
  }
  return Measured(**fields | changes)


@pytest.fixture
def benchmark():
  return Benchmark(
    inputs={"index": "here & there"},
    num_passages=1000,
    embedding_dim=8,
    num_questions=20,
    num_tuning=0,
    rounds=3,
    rows=(
      row("exact", 1.0, 100.0),
      row("ScaNN", 0.9, 1000.0, build_secs=2.5),
      row("ScaNN", 0.99, 500.0),
      row("FAISS IVF", 0.95, 400.0),
      row("BM25", None, 50.0),
    ),
    notes=("x is left out: <why>.",),
    machine=describe_machine(0.5),
  )


def test_json_reads_back_as_it_was(benchmark):
  assert Benchmark.from_json(benchmark.to_json()) == benchmark


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"format": 9}'])
def test_json_that_is_no_benchmark_is_named(text):
  with pytest.raises(ValueError, match=r"r\.json holds no benchmark.*again"):
    Benchmark.from_json(text, "r.json")


def test_json_with_a_row_cut_off_is_refused(benchmark):
  content = json.loads(benchmark.to_json())
  del content["rows"][0]["speeds"]
  with pytest.raises(ValueError, match="holds no benchmark"):
    Benchmark.from_json(json.dumps(content))


def test_the_page_fetches_nothing_and_holds_the_picture(tmp_path, benchmark):
  write_benchmark(tmp_path / "out", benchmark)
  page = (tmp_path / "out" / "report.html").read_text()
  png = (tmp_path / "out" / "recall_speed.png").read_bytes()
  sources = re.findall(
    r"(?:src|href|url|srcset)\s*[=(]\s*[\"']?([^\"')>]+)", page
  )
  assert len(sources) == 1
  assert base64.b64decode(sources[0].split("base64,")[1]) == png
  assert not re.search(r"https?://|<script|<link|@import", page)
  assert imread(io.BytesIO(png)).std() > 0.01
  assert "a &lt;b&gt; | c" in page
  assert "&lt;why&gt;" in page
  assert "<b>" not in page
  read = (tmp_path / "out" / "results.json").read_text()
  assert Benchmark.from_json(read) == benchmark


def test_the_tables_hold_every_system_and_no_broken_cell(benchmark):
  for text, columns in (
    (benchmark.speed_table(), 9),
    (benchmark.question_table(), 3),
  ):
    lines = text.splitlines()
    assert len(lines) == 2 + len(benchmark.rows)
    assert {line.count("|") for line in lines} == {columns + 1}
  speed = benchmark.speed_table().splitlines()[3]
  assert speed == (
    "| ScaNN | a <b> / c | 0.9000 (0.8900 to 0.9100) |"
    " 0.9000 (0.8900 to 0.9100) | 0.9000 (0.8900 to 0.9100) | 250 | 1,000 | 123"
    " | 2.5 |"
  )
  assert "0.500 (0.400 to 0.600)" in benchmark.question_table()
  assert "- x is left out: <why>." in benchmark.markdown()


def test_nothing_on_the_pareto_front_is_beaten_in_both(benchmark):
  front = pareto(benchmark.rows, 10, 256)
  expected = [
    r
    for r in benchmark.rows
    if r.recall(10)
    and not any(
      o.recall(10)
      and o.recall(10).mean >= r.recall(10).mean
      and o.speed(256) > r.speed(256)
      for o in benchmark.rows
    )
  ]
  assert {r.recall(10).mean for r in front} == {0.9, 0.99, 1.0}
  assert sorted(map(id, front)) == sorted(map(id, expected))


def test_words_alone_make_a_picture_and_no_error(benchmark):
  words = dataclasses.replace(benchmark, rows=benchmark.rows[-1:])
  assert imread(io.BytesIO(benchmark_report.picture(words))).std() > 0


def test_the_summary_names_the_machine_and_its_load(benchmark):
  summary = benchmark.summary()
  assert f"{benchmark.machine['num_cpus']} CPUs" in summary
  assert "load of the machine 0.5 to" in summary
  assert "20 questions." in summary
  assert (
    "5 others to tune" in dataclasses.replace(benchmark, num_tuning=5).summary()
  )
