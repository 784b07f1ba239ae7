"""The certificate of an index, against loops, and what refuses one."""

import dataclasses

from indexes import FINGERPRINTS
from indexes import content_of
from indexes import edit_manifest
from linen import normal
import numpy as np
import pytest

from rag_jax.config import IndexConfig
from rag_jax.retrieval.certificate import Certificate
from rag_jax.retrieval.certify import certify
from rag_jax.retrieval.certify import check_min_recall
from rag_jax.retrieval.exact import ExactIndex
from rag_jax.retrieval.index import build_index
from rag_jax.retrieval.index import load_index

P, R = 3000, 16


def build(kind="exact", embeddings=None, **config):
  embeddings = normal(P, R) if embeddings is None else embeddings
  config = IndexConfig(kind=kind, **config)
  return build_index(embeddings, config, **FINGERPRINTS)


def bad_index(embeddings=None):
  """Returns a ScaNN index that looks into one leaf of many."""
  return build(
    "scann",
    embeddings,
    scann_tree_passages=1,
    scann_num_leaves=60,
    scann_leaves_to_search=1,
  )


@pytest.fixture(scope="module")
def bad():
  return bad_index()


def loop_recall(index, questions, k, own=None):
  """Returns the share of the exact top k that `index` finds, a row a time."""
  # Searched together: ScaNN 1.4.2 may find another passage for a question that
  # is searched alone.
  rows, _ = index.search(questions, k + (own is not None))
  shares = []
  for row, question in enumerate(questions):
    scores = index.embeddings.astype(np.float64) @ question
    truth = np.argsort(-scores, kind="stable").tolist()
    found = rows[row].tolist()
    if own is not None:
      truth.remove(own[row])
      found = [i for i in found if i != own[row]][:k]
    shares.append(len(set(truth[:k]) & set(found)) / k)
  return shares


def test_recall_is_that_of_a_loop_over_questions(bad):
  questions = normal(70, R, seed=1)
  certificate = certify(bad, questions, speed_secs=0.0)
  assert (certificate.sample, certificate.num_questions) == ("questions", 70)
  assert [r.k for r in certificate.recalls] == [1, 10, 100]
  for recall in certificate.recalls:
    expected = np.mean(loop_recall(bad, questions, recall.k))
    assert recall.mean == pytest.approx(expected)
    assert 0.0 <= recall.low < recall.mean < recall.high < 1.0


def test_passages_in_place_of_questions_are_not_found_by_themselves(bad):
  certificate = certify(bad, ks=(1, 10), max_questions=200, speed_secs=0.0)
  assert (certificate.sample, certificate.num_questions) == ("passages", 200)
  rows = np.random.default_rng(0).choice(P, 200, replace=False)
  rows.sort()
  for recall in certificate.recalls:
    expected = loop_recall(bad, bad.embeddings[rows], recall.k, rows.tolist())
    assert recall.mean == pytest.approx(np.mean(expected))
  assert "200 of its own passages, each searched among" in certificate.table()


def test_an_exact_index_is_measured_to_find_all_and_no_more_is_claimed():
  certificate = certify(build(), normal(40, R, seed=1), speed_secs=0.0)
  assert [r.mean for r in certificate.recalls] == [1.0] * 3
  assert all(0.9 < r.low < 1.0 for r in certificate.recalls)

  class Broken(ExactIndex):
    def search(self, question_embeddings, n_docs):
      ids, scores = super().search(question_embeddings, n_docs)
      return (ids + 1) % self.num_passages, scores

  broken = Broken(normal(P, R), **FINGERPRINTS)
  certificate = certify(broken, normal(40, R, seed=1), speed_secs=0.0)
  assert certificate.recall(1).mean < 1


@pytest.mark.parametrize(
  ("num_passages", "asked", "ks"),
  [(7, True, [1, 7]), (7, False, [1, 6]), (1, True, [1]), (1, False, [1])],
)
def test_a_few_passages_are_measured_as_deep_as_they_are_many(
  num_passages, asked, ks
):
  index = build(embeddings=normal(num_passages, R))
  certificate = certify(
    index, normal(5, R, seed=1) if asked else None, speed_secs=0.001
  )
  assert [(r.k, r.mean) for r in certificate.recalls] == [(k, 1.0) for k in ks]
  assert certificate.speed_k == num_passages


def test_a_large_sample_is_drawn_down_always_to_the_same(bad):
  questions = normal(300, R, seed=1)
  drawn = [
    certify(bad, questions, max_questions=50, speed_secs=0.0) for _ in range(2)
  ]
  assert drawn[0] == drawn[1]
  assert drawn[0].num_questions == 50
  whole = certify(bad, questions, speed_secs=0.0)
  assert drawn[0].recall(10).mean != whole.recall(10).mean


def test_speed_size_and_build_are_measured(bad):
  certificate = certify(bad, normal(20, R, seed=1), speed_secs=0.01)
  assert sorted(certificate.queries_per_second) == [1, 256]
  assert min(certificate.queries_per_second.values()) > 0.0
  assert certificate.build_secs > 0.0
  assert certificate.build_peak_bytes >= 0
  assert certificate.memory_bytes > 2 * bad.embeddings.nbytes
  assert certificate.num_cpus >= 1


@pytest.mark.parametrize("kind", ["exact", "scann"])
def test_a_certificate_stays_with_its_index(kind, tmp_path):
  index = build(kind)
  index.certificate = certify(index, max_questions=20, speed_secs=0.001)
  assert index.certificate.disk_bytes is None
  index.save(tmp_path)
  files = [f for f in tmp_path.rglob("*") if f.is_file()]
  size = sum(f.stat().st_size for f in files if f.name != "manifest.json")
  assert index.certificate.disk_bytes == size
  loaded = load_index(tmp_path)
  assert loaded.certificate == index.certificate
  loaded.save(tmp_path)
  assert load_index(tmp_path).certificate == index.certificate


def test_an_index_without_certificate_has_none_when_it_is_loaded(tmp_path):
  build().save(tmp_path)
  assert "certificate" not in content_of(tmp_path)
  assert load_index(tmp_path).certificate is None


def test_a_certificate_comes_back_from_json(bad):
  certificate = certify(bad, max_questions=20, speed_secs=0.001)
  assert Certificate.from_json(certificate.to_json()) == certificate


@pytest.mark.parametrize(
  ("text", "problem"),
  [
    ('{"kind": ', "x is not JSON .*cut off or edited: certify the index again"),
    ("[1]", "x holds no certificate .*expected kind, .*certify the index"),
    ("{}", "x holds no certificate .*KeyError: 'recalls'"),
  ],
)
def test_json_that_is_no_certificate_is_refused(text, problem):
  with pytest.raises(ValueError, match=problem):
    Certificate.from_json(text, "x")


def test_a_certificate_that_was_loaded_can_be_written_again(tmp_path):
  index = build("scann")
  index.certificate = certify(index, max_questions=20, speed_secs=0.0)
  index.save(tmp_path)
  loaded = load_index(tmp_path).certificate
  assert Certificate.from_content(loaded.to_content()) == loaded


def modes_with(first, weights):
  found = {"first": first, "among_5": 0.5, "mrr": 0.5}
  names = "dense", "bm25", "hybrid"
  return {
    "num_questions": 20,
    "num_passages": 40,
    "metrics": dict.fromkeys(names, found),
    "weights": weights,
  }


@pytest.mark.parametrize(
  "edit",
  [
    {"recalls": []},
    {"recalls": [{"k": 1}]},
    {"colour": "red"},
    {"modes": {}},
    {"modes": modes_with("high", None)},
    {"modes": modes_with(0.5, ["nan", 1])},
    {"modes": modes_with(0.5, [1])},
  ],
)
def test_an_edited_certificate_is_refused_with_its_index(tmp_path, edit):
  index = build()
  index.certificate = certify(index, max_questions=20, speed_secs=0.0)
  index.save(tmp_path)
  certificate = content_of(tmp_path)["certificate"]
  edit_manifest(tmp_path, certificate=certificate | edit)
  with pytest.raises(
    ValueError, match=r"(?s)manifest\.json holds no certificate .*certify"
  ):
    load_index(tmp_path)


def test_the_table_shows_every_number(bad):
  certificate = dataclasses.replace(
    certify(bad, normal(70, R, seed=1), speed_secs=0.001),
    queries_per_second={1: 1234.4, 256: 98765.0},
    num_cpus=2,
    memory_bytes=3 * 2**20,
    disk_bytes=3000 * 100,
    build_secs=12.34,
    build_peak_bytes=2**31,
  )
  lines = certificate.table().splitlines()
  assert lines[:2] == ["| certificate | |", "|---|---|"]
  assert lines[2].startswith("| index | scann, 3,000 passages x 16, num_lea")
  recall = certificate.recalls[1]
  assert lines[4] == (
    f"| index_recall@10 | {recall.mean:.4f} (95% interval {recall.low:.4f} to"
    f" {recall.high:.4f}) |"
  )
  assert lines[6:] == [
    "| measured on | 70 questions |",
    "| questions/s, 1 at a time | 1,234 (10 passages each, 2 CPUs) |",
    "| questions/s, 256 at a time | 98,765 (10 passages each, 2 CPUs) |",
    "| memory | 3.0 MiB, 1,049 bytes per passage |",
    "| disk | 293.0 KiB, 100 bytes per passage |",
    "| build | 12.3 s, without embedding |",
    "| memory of the build | at most 2.0 GiB more than before |",
  ]


def test_an_index_that_finds_too_little_is_refused_by_its_certificate():
  index = bad_index()
  index.certificate = certify(index, normal(50, R, seed=1), speed_secs=0.0)
  recall = index.certificate.recall(10)
  assert recall.mean < 0.6
  with pytest.raises(
    ValueError,
    match=f"kind 'scann' finds too little: its index_recall_at_10 is"
    rf" {recall.mean:.4f} \(95% interval {recall.low:.4f} to {recall.high:.4f},"
    r" on 50 questions\), expected at least index\.min_recall=0\.9\. Raise"
    r" index\.scann_leaves_to_search",
  ):
    check_min_recall(index, 0.9, k=4)  # 4 was not measured, 10 was
  check_min_recall(index, recall.mean, k=4)
  check_min_recall(index, 0.0, k=4)
  assert index.certificate.recall(5000) == index.certificate.recalls[-1]


def test_an_index_without_certificate_is_measured_if_recall_matters():
  index = bad_index()
  check_min_recall(index, 0.0, k=5)
  assert index.certificate is None
  with pytest.raises(
    ValueError, match=r"on 1000 passages\), expected at least"
  ):
    check_min_recall(index, 0.9, k=5)
  assert index.certificate == certify(index, speed_secs=0.0)


def test_no_questions_certify_nothing():
  with pytest.raises(
    ValueError, match=r"shape \(0, 16\): there are none.*None"
  ):
    certify(build(), np.zeros((0, R), np.float32))


@pytest.mark.parametrize("bad_number", [{"ks": (0, 1)}, {"max_questions": 0}])
def test_numbers_below_one_are_refused(bad_number):
  with pytest.raises(ValueError, match="expected numbers of at least 1"):
    certify(build(), **bad_number)


def test_questions_of_another_size_are_refused():
  with pytest.raises(ValueError, match="the index holds 16-dimensional"):
    certify(build(), normal(5, R + 1))
