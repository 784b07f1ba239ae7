"""What an index costs as the corpus grows, on files of two sizes."""

import json
import re

import numpy as np
import pytest

from rag_jax.benchmarks.growth import GrowthSettings
from rag_jax.benchmarks.growth import benchmark_growth
from rag_jax.benchmarks.growth_report import growth_table
from rag_jax.benchmarks.growth_report import write_growth

SIZES = (600, 3000)
SETTINGS = GrowthSettings(
  target_recall=0.9, max_questions=60, passages_per_shard=1000, speed_secs=0.01
)


def write_vectors(path, *sizes):
  """Writes vectors about the same 40 topics, as .npy files."""
  rng = np.random.default_rng(0)
  centres = rng.normal(size=(40, 16))
  for size in sizes:
    rows = centres[rng.integers(40, size=size)]
    rows = rows + 0.5 * rng.normal(size=rows.shape)
    np.save(path / f"{size}.npy", rows.astype(np.float32))
  return [path / f"{size}.npy" for size in sizes]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
  path = tmp_path_factory.mktemp("growth")
  *files, questions = write_vectors(path, *SIZES, 120)
  return benchmark_growth(files[::-1], questions, SETTINGS)


def test_every_system_is_measured_at_every_size_smallest_first(measured):
  found = [(row.num_passages, row.system) for row in measured.rows]
  systems = ["exact", "ScaNN", "FAISS IVF-PQ"]
  shards = ["exact", "ScaNN", "ScaNN, shards", "FAISS IVF-PQ"]
  assert found == [(600, s) for s in systems] + [(3000, s) for s in shards]
  for row in measured.rows:
    assert row.embeddings_bytes == 4 * 16 * row.num_passages
    assert row.speeds.keys() == {1, 256}
    assert min(row.speeds.values()) > 0
    assert row.build_secs > 0
    assert row.memory_bytes >= row.embeddings_bytes


def test_exact_search_finds_all_and_the_others_what_was_asked(measured):
  for row in measured.rows:
    least = 1.0 if row.system == "exact" else SETTINGS.target_recall - 0.1
    assert row.recall.mean >= least, row


def test_the_shards_are_named_with_what_each_searches(measured):
  (row,) = [row for row in measured.rows if row.system == "ScaNN, shards"]
  assert row.settings.startswith("3 shards, in each ")
  assert re.search(r"of 31 leaves, reorder \d+, PCA 8$", row.settings)


def test_the_files_hold_what_was_measured(measured, tmp_path):
  write_growth(tmp_path, measured)
  content = json.loads((tmp_path / "growth.json").read_text())
  assert [row["system"] for row in content["rows"]] == [
    row.system for row in measured.rows
  ]
  assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")
  table = (tmp_path / "growth.md").read_text()
  assert table == growth_table(measured)
  lines = [line for line in table.splitlines() if line.startswith("|")]
  assert len(lines) == 2 + len(measured.rows)
  assert lines[2].startswith("| 600 | exact |")
  assert len({line.count("|") for line in lines}) == 1


def test_files_that_do_not_fit_are_refused(tmp_path):
  small, large, questions = write_vectors(tmp_path, 50, 60, 20)
  np.save(tmp_path / "wide.npy", np.ones((70, 17), np.float32))
  with pytest.raises(ValueError, match="expected the same last number"):
    benchmark_growth([small, tmp_path / "wide.npy"], questions, SETTINGS)
  with pytest.raises(ValueError, match="files of different sizes"):
    benchmark_growth([small, small, large], questions, SETTINGS)
  np.save(tmp_path / "few.npy", np.ones((9, 16), np.float32))
  with pytest.raises(ValueError, match="of 10 passages or more"):
    benchmark_growth([small, tmp_path / "few.npy"], questions, SETTINGS)


@pytest.mark.parametrize("name", ["max_questions", "passages_per_shard"])
def test_settings_below_one_are_refused(name, tmp_path):
  small, large, questions = write_vectors(tmp_path, 50, 60, 20)
  with pytest.raises(ValueError, match=f"{name}=0.*Raise them"):
    benchmark_growth([small, large], questions, GrowthSettings(**{name: 0}))
