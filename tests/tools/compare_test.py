"""tools/compare.py as a person runs it."""

import json
import shutil

from processes import run_tool
import pytest

from rag_jax.config_json import read_config
from rag_jax.config_json import write_config


def copy_of(learned, path, **changes):
  """Copies what is compared of a run, with other settings."""
  path.mkdir()
  shutil.copy(learned.workdir / "results.json", path)
  config = read_config(learned.workdir / "config.json")
  for name, value in changes.items():
    setattr(config if name == "seed" else config.data, name, value)
  write_config(path / "config.json", config)
  return str(path)


def test_runs_are_compared_in_a_table_a_plot_and_json(learned, tmp_path):
  other = copy_of(learned, tmp_path / "seed", seed=8)
  third = copy_of(learned, tmp_path / "docs", n_docs=3)
  output = tmp_path / "out"
  done = run_tool(
    "compare.py", str(learned.workdir), other, third, f"--output={output}",
    "--metrics=test/token_f1", "--baseline=data.n_docs=3",
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  table = (output / "comparison.md").read_text()
  assert done.stdout.startswith(table)
  assert "| data.n_docs=2 | 2 " in table
  assert "| test/token_f1 " in table.splitlines()[0]
  assert "Difference to data.n_docs=3, with the 95 % interval:" in table
  found = json.loads((output / "comparison.json").read_text())
  assert found["rows"][0]["runs"] == [str(learned.workdir), other]
  match = found["rows"][0]["metrics"]["test/exact_match"]["mean"]
  assert match == pytest.approx(learned.results["test/exact_match"])
  (differences,) = found["differences"].values()
  assert differences["test/exact_match"]["difference"] == pytest.approx(0)
  assert (output / "comparison.png").read_bytes().startswith(b"\x89PNG")

  wrong = run_tool("compare.py", third, "--baseline=x")
  assert wrong.returncode == 1
  assert "--baseline=x is not the name of a row" in wrong.stderr
  assert "Traceback" not in wrong.stderr
  nothing = run_tool("compare.py")
  assert "There are no runs to compare" in nothing.stderr
