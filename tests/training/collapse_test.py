"""When retrieval counts as collapsed."""

import pytest

from rag_jax.training.collapse import CollapseWarning


def warnings(lines, caplog, **sizes):
  """Returns the warnings about lines of (distinct, entropy, answers)."""
  sizes = {"batch_size": 32, "n_docs": 4, "num_passages": 10_000} | sizes
  detector = CollapseWarning(**sizes)
  names = ("train/distinct_docs", "train/doc_entropy", "train/answer_in_docs")
  for step, line in enumerate(lines, start=1):
    detector.look(10 * step, dict(zip(names, line, strict=True)))
  return [record.getMessage() for record in caplog.records]


HEALTHY = (0.9, 1.0, 0.5)
SHARED = (0.04, 1.0, 0.1)  # 5 of 128 documents


def test_questions_that_share_their_documents_are_reported_once(caplog):
  found = warnings([HEALTHY] * 3 + [SHARED] * 20, caplog)
  assert len(found) == 1
  assert found[0].startswith(
    "Retrieval has collapsed, in the last 5 log lines up to step 80: different"
    " questions get the same documents. Only 4% of the documents that a batch"
    " could have are different (train/distinct_docs); 90% were at best before."
    " Expected other documents for other questions. Go back to a checkpoint"
  )


def test_a_run_that_starts_collapsed_gets_ten_lines(caplog):
  assert warnings([SHARED] * 9, caplog) == []
  assert len(warnings([SHARED] * 10, caplog)) == 1


def test_certainty_of_documents_without_answers_is_reported(caplog):
  certain = (0.9, 0.02, 0.2)
  found = warnings([HEALTHY] * 5 + [certain] * 9, caplog)
  assert len(found) == 1
  assert "up to step 100: p(z|x) is certain of one document" in found[0]
  assert "of 20% of the questions, after 50% before" in found[0]


@pytest.mark.parametrize(
  ("lines", "sizes"),
  [
    ([HEALTHY] * 50, {}),
    # Four lines are not five.
    (([HEALTHY] * 3 + [SHARED] * 4) * 3, {}),
    # As good as 20 passages allow.
    ([(20 / 128, 1.0, 0.5)] * 50, {"num_passages": 20}),
    # A batch of one question always has different documents.
    ([(1.0, 1.0, 0.5)] * 50, {"batch_size": 1}),
    # Certain, and right.
    ([HEALTHY] * 5 + [(0.9, 0.01, 0.9)] * 20, {}),
    # One document: p(z|x) is always 1.
    ([(0.9, 0.0, 0.9)] * 5 + [(0.9, 0.0, 0.1)] * 9, {"n_docs": 1}),
  ],
)
def test_what_is_healthy_is_not_reported(lines, sizes, caplog):
  assert warnings(lines, caplog, **sizes) == []
