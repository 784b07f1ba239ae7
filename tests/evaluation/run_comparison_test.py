"""Runs beside one another: rows, names, intervals, what is refused."""

import dataclasses
import json
import shutil

from matplotlib.image import imread
import numpy as np
import pytest
from scipy import stats

from rag_jax.config import Config
from rag_jax.config_json import write_config
from rag_jax.evaluation.judged_answers import JudgedAnswer
from rag_jax.evaluation.judged_answers import line_of
from rag_jax.evaluation.plots import comparison_plot
from rag_jax.evaluation.report import FINGERPRINTS
from rag_jax.evaluation.report import write_results
from rag_jax.evaluation.run_comparison import DEFAULT_METRICS
from rag_jax.evaluation.run_comparison import check_metrics
from rag_jax.evaluation.run_comparison import make_rows
from rag_jax.evaluation.run_comparison import markdown
from rag_jax.evaluation.run_comparison import read_runs
from rag_jax.evaluation.run_comparison import row_differences
from rag_jax.evaluation.run_comparison import summarise_rows

DATA = {"passages": "p" * 64, "questions": "q" * 64}
MATCH = "test/exact_match"


def write_run(path, *, seed=0, match=0.5, lr=1e-3, data=DATA, **results):
  """Writes what is left of a run that has ended."""
  path.mkdir()
  config = Config()
  config.seed = seed
  config.optimizer.peak_lr = lr
  write_config(path / "config.json", config)
  found = {
    "test/exact_match": match, "test/num_questions": 4.0, "num_passages": 9,
    "train/seconds": 1234.0 + seed, "seed": seed,
  }  # fmt: skip
  write_results(path, found | ({FINGERPRINTS: data} if data else {}) | results)
  return path


def write_answers(path, matches, backwards=False):
  lines = [
    JudgedAnswer(
      question=f"q{i}", answers=("a",), relation="", prediction="a",
      log_prob=-1.0, exact_match=float(match), token_f1=float(match),
      num_retrieved=5, answer_rank=i, docs=(),
    )
    for i, match in enumerate(matches)
  ]  # fmt: skip
  if backwards:  # questions are found by their text
    lines.reverse()
  (path / "evaluation").mkdir()
  text = "".join(line_of(line) + "\n" for line in lines)
  (path / "evaluation" / "answers.jsonl").write_text(text)


def test_runs_that_differ_only_in_the_seed_are_a_row(tmp_path):
  paths = [
    write_run(tmp_path / "a", seed=2, match=0.5),
    write_run(tmp_path / "b", seed=0, match=0.9, lr=2e-3),
    write_run(tmp_path / "c", seed=1, match=0.7),
    write_run(tmp_path / "d", seed=5, match=0.6),
  ]
  rows = make_rows(read_runs(paths))
  assert [row.name for row in rows] == [
    "optimizer.peak_lr=0.001", "optimizer.peak_lr=0.002"
  ]  # fmt: skip
  found = summarise_rows(rows, DEFAULT_METRICS)
  assert found[0]["seeds"] == [1, 2, 5]
  match = found[0]["metrics"][MATCH]
  assert match["values"] == [0.7, 0.5, 0.6]
  assert (match["mean"], match["least"], match["most"]) == (
    pytest.approx(0.6), 0.5, 0.7,
  )  # fmt: skip
  # Student's t with 2 degrees of freedom, by its table.
  far = 4.302653 * 0.1 / 3**0.5
  assert [match["low"], match["high"]] == pytest.approx([0.6 - far, 0.6 + far])
  assert "low" not in found[1]["metrics"][MATCH]
  text = markdown(found, DEFAULT_METRICS)
  lines = text.splitlines()
  assert [cell.strip() for cell in lines[0].split("|")[1:-1]] == [
    "runs", "seeds", "test/exact_match", "train/seconds"
  ]  # fmt: skip
  assert "| 0.600 (0.500 to 0.700) | 1,237 (1,235 to 1,239) |" in lines[2]
  assert lines[-1] == "Mean over seeds (least to most)."
  named = make_rows(read_runs(paths), ["slow", "fast | big"])
  assert [row.name for row in named] == ["slow", "fast | big"]
  assert "fast \\| big" in markdown(summarise_rows(named, [MATCH]), [MATCH])


def test_without_answers_the_interval_is_over_seeds(tmp_path):
  ours = [0.5, 0.6, 0.9]
  theirs = [0.4, 0.45, 0.7]
  for seed in range(3):
    write_run(tmp_path / f"a{seed}", seed=seed, match=ours[seed], lr=2e-3)
    write_run(tmp_path / f"b{seed}", seed=seed, match=theirs[seed])
    write_run(tmp_path / f"c{seed}", seed=seed + 1, match=theirs[seed], lr=5e-3)
  paths = [tmp_path / f"{x}{seed}" for x in "abc" for seed in range(3)]
  a, b, c = make_rows(read_runs(paths))
  paired = row_differences(a, b, [MATCH])[MATCH]
  expected = stats.ttest_rel(ours, theirs).confidence_interval()
  assert (paired["over"], paired["number"]) == ("seeds", 3)
  assert [paired["low"], paired["high"]] == pytest.approx([*expected])
  welch = row_differences(a, c, [MATCH])[MATCH]
  expected = stats.ttest_ind(
    ours, theirs, equal_var=False
  ).confidence_interval()
  assert (welch["over"], welch["number"]) == ("runs", 6)
  assert [welch["low"], welch["high"]] == pytest.approx([*expected])
  one = make_rows(read_runs([paths[0], *paths[3:5]]))
  alone = row_differences(*one, [MATCH, "test/answer_recall_at_1"])
  assert alone == {
    MATCH: {"over": "", "difference": pytest.approx(0.5 - 0.425)}
  }
  text = markdown(
    summarise_rows(one, [MATCH]), [MATCH], one[1].name, {one[0].name: alone}
  )
  assert "| +0.075 " in text
  assert "no interval" in text


def test_seeds_that_do_not_differ_give_no_interval(tmp_path):
  for seed in range(3):
    write_run(tmp_path / f"a{seed}", seed=seed, match=0.6, lr=2e-3)
    write_run(tmp_path / f"b{seed}", seed=seed, match=0.3)
    write_run(tmp_path / f"c{seed}", seed=seed + 1, match=0.3, lr=5e-3)
  paths = [tmp_path / f"{x}{seed}" for x in "abc" for seed in range(3)]
  a, b, c = make_rows(read_runs(paths))
  for other in (b, c):
    found = row_differences(a, other, [MATCH])[MATCH]
    assert found == {"over": "", "difference": pytest.approx(0.3)}
  assert "low" not in summarise_rows([a], [MATCH])[0]["metrics"][MATCH]


def test_with_answers_it_is_over_questions(tmp_path):
  for name, lr, matches in (
    ("a", 2e-3, [(1, 1, 0, 1), (1, 0, 0, 1)]),
    ("b", 1e-3, [(0, 1, 0, 1), (0, 0, 0, 0)]),
  ):
    for seed, match in enumerate(matches):
      path = write_run(tmp_path / f"{name}{seed}", seed=seed, lr=lr,
                       match=float(np.mean(match)))  # fmt: skip
      write_answers(path, match, backwards=name == "b")
  paths = [tmp_path / name for name in ("a0", "a1", "b0", "b1")]
  ours, theirs = make_rows(read_runs(paths))
  found = row_differences(ours, theirs, DEFAULT_METRICS)
  match = found[MATCH]
  differences = np.array([1, 0, 0, 0.5])
  assert (match["over"], match["number"]) == ("questions", 4)
  assert match["difference"] == differences.mean()
  rng = np.random.default_rng(7)
  means = rng.choice(differences, size=(20_000, 4)).mean(axis=1)
  np.testing.assert_allclose(
    [match["low"], match["high"]], np.quantile(means, [0.025, 0.975]), atol=0.13
  )
  assert match["p"] == 0.5  # of the 4 signs of two, two are as extreme
  assert found["train/seconds"]["over"] == ""  # all runs took as long
  # Another model's answers are not used.
  (tmp_path / "a1" / "evaluation" / "answers.jsonl").unlink()
  (tmp_path / "a1" / "evaluation").rmdir()
  write_answers(tmp_path / "a1", (0, 0, 0, 0))
  rows = make_rows(read_runs(paths))
  assert row_differences(*rows, [MATCH])[MATCH]["over"] == "seeds"


def test_what_is_no_ended_run_is_refused(tmp_path):
  run = write_run(tmp_path / "a")
  with pytest.raises(
    FileNotFoundError, match="not a run: there is no such fol"
  ):
    read_runs([run, tmp_path / "none"])
  (tmp_path / "empty").mkdir()
  with pytest.raises(
    FileNotFoundError, match=r"there is no config\.json in it"
  ):
    read_runs([tmp_path / "empty"])
  (write_run(tmp_path / "b", seed=1) / "results.json").unlink()
  with pytest.raises(
    FileNotFoundError, match=r"b/results\.json: the run has no"
  ):
    read_runs([run, tmp_path / "b"])
  with pytest.raises(ValueError, match="given twice"):
    read_runs([run, tmp_path / "empty" / ".." / "a"])
  shutil.copytree(run, tmp_path / "copy")
  with pytest.raises(ValueError, match=r"same\s+seed, 0\. Expected another"):
    make_rows(read_runs([run, tmp_path / "copy"]))


def test_runs_on_other_data_are_refused(tmp_path):
  run = write_run(tmp_path / "a")
  for number, what in enumerate(DATA):
    other = write_run(tmp_path / what, seed=1, data=DATA | {what: "other"})
    with pytest.raises(
      ValueError, match=rf"different {what} \({[9, 4][number]}"
    ):
      read_runs([run, other])
  older = write_run(tmp_path / "older", seed=2, data=None)
  assert len(read_runs([run, older])) == 2  # as many of both
  fewer = write_run(tmp_path / "fewer", seed=3, data=None, num_passages=8)
  with pytest.raises(ValueError, match=r"different passages \(9 and 8 of them"):
    read_runs([run, fewer])


def test_names_and_metrics_are_checked(tmp_path):
  rows = make_rows(read_runs([write_run(tmp_path / "a")]))
  assert rows[0].name == str(tmp_path / "a")
  with pytest.raises(
    ValueError, match="expected 1 different ones, of these runs"
  ):
    make_rows(read_runs([tmp_path / "a"]), ["one", "two"])
  with pytest.raises(ValueError, match="Did you mean test/exact_match"):
    check_metrics(rows, ["test/exact_mach"])
  check_metrics(rows, ["seed"])


def test_the_plot_has_a_point_for_each_run(tmp_path):
  runs = [write_run(tmp_path / str(i), seed=i, match=i / 9) for i in range(9)]
  rows = summarise_rows(make_rows(read_runs(runs)), DEFAULT_METRICS)
  rows.append(rows[0] | {"name": "$none_", "metrics": {}})
  comparison_plot(rows, DEFAULT_METRICS, tmp_path / "plot.png")
  image = imread(tmp_path / "plot.png")[..., :3]
  orange = np.abs(image - np.array([0xD5, 0x5E, 0]) / 255).max(axis=-1) < 0.02
  columns = np.flatnonzero(orange.any(axis=0))
  assert 1 + np.sum(np.diff(columns) > 9) == 2  # the means of two metrics


def test_a_real_run_can_be_compared(uninterrupted, tmp_path):
  shutil.copytree(uninterrupted.path, tmp_path / "other")
  changed = dataclasses.replace(uninterrupted.config, seed=9)
  write_config(tmp_path / "other" / "config.json", changed)
  (row,) = make_rows(read_runs([uninterrupted.path, tmp_path / "other"]))
  found = summarise_rows([row], DEFAULT_METRICS)[0]
  assert set(found["metrics"]) == set(DEFAULT_METRICS)
  results = json.loads((uninterrupted.path / "results.json").read_text())
  assert found["metrics"][MATCH]["mean"] == results[MATCH]
  assert set(results[FINGERPRINTS]) == {"passages", "questions"}
