"""The summary of answered questions, its table and results.json."""

import dataclasses
import json
import math

import numpy as np
import pytest

from rag_jax.evaluation import report
from rag_jax.evaluation.report import AnswerRecord
from rag_jax.retrieval.certificate import Certificate
from rag_jax.retrieval.recall import Recall


def record(prediction, relation="", *, ids=(1, 2), in_top=True):
  return AnswerRecord(
    question="Which city?",
    answers=("Paris", "City of Light"),
    relation=relation,
    prediction=prediction,
    log_prob=-0.5,
    retrieved_ids=ids,
    answer_in_top=in_top,
    answer_in_first=in_top and prediction != "city",
  )


CERTIFICATE = Certificate(
  kind="scann",
  settings={"num_leaves": 100},
  num_passages=10_000,
  embedding_dim=384,
  sample="questions",
  num_questions=500,
  recalls=(Recall(k=10, mean=0.9931, low=0.9902, high=0.9953),),
  speed_k=10,
  queries_per_second={1: 900.0, 256: 11_234.0},
  num_cpus=2,
  memory_bytes=20_800_000,
)
RECORDS = [
  record("paris", "capital"),
  record("Rome", "capital", in_top=False),
  record("the City of Light", "nickname"),
  record("city", "nickname"),
  record("Paris!", "capital"),
]


def test_a_summary_averages_over_all_and_over_each_relation():
  summary = report.summarise(RECORDS)
  low = summary.pop("test/exact_match_low")
  high = summary.pop("test/exact_match_high")
  assert 0.0 <= low < 0.6 < high <= 1.0
  assert summary == pytest.approx(
    {
      "test/num_questions": 5,
      "test/exact_match": 3 / 5,
      "test/token_f1": (1 + 0 + 1 + 2 / 4 + 1) / 5,
      "test/answer_recall_at_1": 3 / 5,
      "test/answer_recall_at_5": 4 / 5,
      "test/num_questions/capital": 3,
      "test/exact_match/capital": 2 / 3,
      "test/answer_recall_at_5/capital": 2 / 3,
      "test/num_questions/nickname": 2,
      "test/exact_match/nickname": 1 / 2,
      "test/answer_recall_at_5/nickname": 1.0,
    }
  )


def test_order_of_the_records_does_not_matter():
  assert report.summarise(RECORDS[::-1]) == pytest.approx(
    report.summarise(RECORDS)
  )


def test_closed_book_has_no_recall():
  closed = [
    dataclasses.replace(
      r, retrieved_ids=(), answer_in_top=False, answer_in_first=False
    )
    for r in RECORDS
  ]
  assert not [name for name in report.summarise(closed) if "recall" in name]


def test_a_question_without_documents_is_a_miss_where_others_have_some():
  mixed = [record("Paris"), record("Paris", ids=(), in_top=False)]
  assert report.summarise(mixed)["test/answer_recall_at_5"] == 0.5


def test_questions_without_relation_are_in_no_row():
  names = report.summarise([record("Paris"), record("Rome")], "validation")
  assert "validation/exact_match" in names
  assert not [name for name in names if name.count("/") > 1]


def test_the_interval_is_that_of_resampling_the_questions():
  hits = [True] * 70 + [False] * 30
  records = [record("Paris" if hit else "Rome") for hit in hits]
  summary = report.summarise(records)
  rng = np.random.default_rng(1)
  means = rng.choice(hits, size=(20_000, 100)).mean(axis=1)
  expected = np.quantile(means, (0.025, 0.975))
  interval = [summary[f"test/exact_match_{end}"] for end in ("low", "high")]
  np.testing.assert_allclose(interval, expected, atol=0.021)  # 2 questions
  assert report.summarise(records) == summary  # seeded


def test_more_questions_narrow_the_interval():
  def width(num):
    summary = report.summarise([record("Paris"), record("Rome")] * num)
    return summary["test/exact_match_high"] - summary["test/exact_match_low"]

  # Four times the questions, half the width.
  assert width(400) / width(100) == pytest.approx(0.5, rel=0.15)


def test_nothing_to_summarise_is_refused():
  with pytest.raises(ValueError, match="no answers to summarise for 'test'"):
    report.summarise([])


def test_the_table_shows_every_number_in_80_columns():
  results = report.summarise(RECORDS) | {
    "test/index_recall_at_5": 0.9987,
    "index/certificate": CERTIFICATE.to_content(),
    "train/seconds": 83.4,
    "train/questions_per_second": 1412.34,
    "train/peak_memory_bytes": 3 * 2**29,
    "seed": 17,
  }
  text = report.table(results)
  lines = text.splitlines()
  assert all(len(line) <= 80 for line in lines)
  rows = [line.split() for line in lines]
  assert ["test:", "5", "questions"] in rows
  low, high = (results[f"test/exact_match_{end}"] for end in ("low", "high"))
  assert (
    f"exact match       0.600   95% interval {low:.3f} to {high:.3f}" in text
  )
  assert ["token", "F1", "0.700"] in rows
  assert ["answer", "recall@5", "0.800"] in rows
  assert ["capital", "3", "0.667", "0.667"] in rows
  assert ["nickname", "2", "0.500", "1.000"] in rows
  assert ["training", "83", "s,", "without", "compilation"] in rows
  assert ["index", "recall@5", "0.999", "against", "exact", "search"] in rows
  assert ["index", "scann,", "certified", "on", "500", "questions"] in rows
  assert "  recall@10       0.993   95% interval 0.990 to 0.995\n" in text
  assert "  questions/s     11,234, 256 at a time\n" in text
  assert "  memory          2,080 bytes per passage\n" in text
  assert ["questions/s", "1,412"] in rows
  assert ["peak", "memory", "1.50", "GiB"] in rows
  assert ["seed", "17"] in rows


def test_the_table_of_a_closed_book_run_has_a_dash_for_recall():
  closed = [record("Paris", "capital", ids=(), in_top=False)]
  rows = [
    line.split() for line in report.table(report.summarise(closed)).splitlines()
  ]
  assert ["answer", "recall@5", "-"] in rows
  assert ["capital", "1", "1.000", "-"] in rows


def test_a_long_relation_is_cut_to_its_column():
  text = report.table(report.summarise([record("Paris", "very long " * 20)]))
  assert "very long very long very long v...         1" in text
  assert max(map(len, text.splitlines())) <= 80


def test_a_table_without_relations_has_no_heading_for_them():
  text = report.table(report.summarise([record("Paris")]))
  assert "relation" not in text
  assert not text.endswith("\n\n")


def test_results_are_read_as_written(tmp_path):
  results = {
    "z": np.float32(0.5),
    "a": {"x": np.int64(3), "list": (1, None, "text")},
    "array": np.array(2.0),
    "flag": True,
  }
  report.write_results(tmp_path, results)
  expected = {
    "z": 0.5,
    "a": {"x": 3, "list": [1, None, "text"]},
    "array": 2.0,
    "flag": True,
  }
  assert report.read_results(tmp_path / "results.json") == expected
  assert report.read_results(tmp_path) == expected
  assert list(report.read_results(tmp_path)) == ["a", "array", "flag", "z"]


@pytest.mark.parametrize("bad", [math.nan, math.inf, np.float32("nan")])
def test_results_that_json_cannot_hold_are_refused(tmp_path, bad):
  report.write_results(tmp_path, {"test/exact_match": 0.5})
  with pytest.raises(
    ValueError, match=r"result outer\.list\[1\]=(nan|inf) is not finite"
  ):
    report.write_results(tmp_path, {"outer": {"list": [0.0, bad]}})
  # What was there before is still there.
  assert report.read_results(tmp_path) == {"test/exact_match": 0.5}


def test_missing_results_say_that_the_run_has_not_ended(tmp_path):
  with pytest.raises(
    FileNotFoundError, match=r"no .*results\.json: the run has not ended"
  ):
    report.read_results(tmp_path)


def test_results_that_were_cut_off_are_refused(tmp_path):
  path = tmp_path / "results.json"
  report.write_results(tmp_path, {"test/exact_match": 0.5, "seed": 0})
  path.write_text(path.read_text()[:-9])
  with pytest.raises(
    ValueError, match=r"results\.json is not JSON .*Remove it"
  ):
    report.read_results(path)


def test_results_that_are_no_object_are_refused(tmp_path):
  path = tmp_path / "results.json"
  path.write_text(json.dumps([1, 2]))
  with pytest.raises(ValueError, match="holds a list; expected an object"):
    report.read_results(path)
