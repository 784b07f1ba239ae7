"""The learning curves: what is drawn from which metrics."""

import json
import math

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imread
import numpy as np
import pytest

from rag_jax.evaluation.plots import learning_curves

RECORDS = [
  {"step": 10, "stage": "warmup", "time_secs": 1.0, "warmup/loss": 4.0},
  {"step": 20, "stage": "warmup", "time_secs": 2.0, "warmup/loss": 3.0},
  {
    "step": 5,
    "stage": "train",
    "time_secs": 3.0,
    "train/loss": 2.0,
    "train/doc_entropy": 1.2,
    "train/index_staleness_steps": 5.0,
  },
  {
    "step": 5,
    "stage": "train",
    "time_secs": 4.0,
    "validation/exact_match": 0.3,
  },
  {"step": 10, "stage": "train", "time_secs": 5.0, "train/loss": None},
]


def write(tmp_path, records, tail=""):
  path = tmp_path / "metrics.jsonl"
  path.write_text("".join(json.dumps(r) + "\n" for r in records) + tail)
  return path


@pytest.fixture
def panels(monkeypatch):
  """The axes of the figure that is drawn last, by their title."""
  drawn = {}
  subplots = Figure.subplots

  def spy(figure, *args):
    axes = subplots(figure, *args)
    drawn["axes"] = axes.ravel().tolist()
    return axes

  monkeypatch.setattr(Figure, "subplots", spy)
  return lambda: {axes.get_title(loc="left"): axes for axes in drawn["axes"]}


def lines(axes: Axes):
  return {
    line.get_label(): list(map(list, zip(*line.get_xydata(), strict=True)))
    for line in axes.get_lines()
    if not line.get_label().startswith("_")
  }


def test_the_stages_before_the_main_one_follow_each_other(tmp_path, panels):
  records = [
    *RECORDS[:2],
    *(
      {"step": s, "stage": "contrastive", "time_secs": 2.5,
       "contrastive/loss": 1.0}
      for s in (3, 6)
    ),
    *RECORDS[2:],
  ]  # fmt: skip
  path = write(tmp_path, records)
  learning_curves(path, tmp_path / "curves.png", "a run")
  panel = panels()["Loss"]
  drawn = lines(panel)
  assert drawn["contrastive, per question"] == [[-3, 0], [1, 1]]
  assert drawn["warm-up, span infilling"] == [[-16, -6], [4, 3]]
  assert panel.get_xlabel() == "step (warm-up and contrastive before 0)"


def test_each_metric_is_a_line_of_its_panel(tmp_path, panels):
  learning_curves(
    write(tmp_path, RECORDS), tmp_path / "curves.png", "a run", n_docs=4
  )
  drawn = {title: lines(axes) for title, axes in panels().items()}
  loss = drawn["Loss"]
  # The warm-up ends at 0, where training begins.
  assert loss["warm-up, span infilling"] == [[-10, 0], [4.0, 3.0]]
  # A loss that was not finite is a gap.
  np.testing.assert_array_equal(
    loss["training, marginal"], [[5, 10], [2.0, math.nan]]
  )
  assert drawn["Validation"] == {"exact match": [[5], [0.3]]}
  entropy = drawn["Entropy of p(z|x)"]
  assert entropy["H(z|x)"] == [[5], [1.2]]
  assert entropy["log 4: all documents alike"][1] == [math.log(4)] * 2
  staleness = drawn["Staleness of the index"]
  assert staleness == {"since the passages were embedded": [[5], [5.0]]}


def test_the_picture_is_not_blank(tmp_path):
  output = tmp_path / "new" / "curves.png"
  learning_curves(write(tmp_path, RECORDS), output, "a run")
  image = imread(output)  # height, width, channels
  assert image.shape[0] > 600
  assert image.shape[1] > 1000
  for color in ("#0072B2", "#D55E00", "#CC79A7"):  # of loss, both, entropy
    rgb = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    assert np.any(np.all(np.abs(image[..., :3] - rgb) < 0.01, axis=-1)), color
  assert [p.name for p in output.parent.iterdir()] == ["curves.png"]


@pytest.mark.parametrize("records", [[], RECORDS[:1]])
def test_a_panel_without_metrics_says_so(tmp_path, panels, records):
  learning_curves(write(tmp_path, records), tmp_path / "curves.png", "a run")
  texts = {
    title: [text.get_text() for text in axes.texts]
    for title, axes in panels().items()
  }
  assert texts.pop("Loss") == ([] if records else ["not measured"])
  assert set(map(tuple, texts.values())) == {("not measured",)}


def test_a_line_that_a_kill_cut_off_is_left_out(tmp_path, panels):
  path = write(tmp_path, RECORDS[:1], tail='{"step": 20, "stage": "war')
  learning_curves(path, tmp_path / "curves.png", "a run")
  assert lines(panels()["Loss"]) == {"warm-up, span infilling": [[0], [4.0]]}


def test_values_that_are_all_zero_or_missing_are_drawn(tmp_path, panels):
  base = {"stage": "train", "time_secs": 1.0}
  records = [
    base | {"step": s, "train/loss": None, "train/index_staleness_steps": 0}
    for s in (0, 1)
  ]
  learning_curves(write(tmp_path, records), tmp_path / "curves.png", "a run")
  assert panels()["Loss"].get_ylim()[0] == 0.0
  assert panels()["Staleness of the index"].get_ylim()[1] > 0.0


def test_a_title_is_not_read_as_a_formula(tmp_path):
  output = tmp_path / "curves.png"
  learning_curves(write(tmp_path, RECORDS), output, r"runs/$\broken{_$")
  assert output.exists()


def test_a_bad_line_in_the_middle_is_reported(tmp_path):
  path = write(tmp_path, RECORDS[:2], tail="oops\n" + json.dumps(RECORDS[2]))
  with pytest.raises(ValueError, match=r"metrics\.jsonl, line 3: 'oops'"):
    learning_curves(path, tmp_path / "curves.png", "a run")
  assert not (tmp_path / "curves.png").exists()


def test_a_missing_file_is_reported(tmp_path):
  with pytest.raises(FileNotFoundError, match="no metrics were written yet"):
    learning_curves(tmp_path / "metrics.jsonl", tmp_path / "c.png", "a run")
