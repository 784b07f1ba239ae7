"""What is built to be measured: each finds what it should, or is left out."""

import dataclasses

import numpy as np
import pytest

from rag_jax.benchmarks import faiss_systems
from rag_jax.benchmarks import systems as benchmark_systems
from rag_jax.benchmarks.systems import Sample
from rag_jax.benchmarks.systems import Workload
from rag_jax.benchmarks.systems import build_systems
from rag_jax.corpus.passages import Passage
from rag_jax.retrieval import scann
from rag_jax.retrieval.bm25 import Bm25Index
from rag_jax.retrieval.exact import ExactIndex

P, B, R = 40, 16, 8
needs_scann = pytest.mark.skipif(
  bool(scann.import_problem()), reason="ScaNN is not installed"
)


@pytest.fixture
def workload():
  rng = np.random.default_rng(0)
  passages = rng.normal(size=(P, R)).astype(np.float32)
  asked = rng.integers(P, size=2 * B)
  questions = passages[asked] + rng.normal(size=(2 * B, R)).astype(np.float32)
  texts = [f"word{number}" for number in asked]
  bm25 = Bm25Index.build(
    [Passage(id=str(r), title="", text=f"word{r} other") for r in range(P)],
    passages_fingerprint="p",
  )
  return Workload(
    embeddings=passages,
    measured=Sample(questions[:B], texts[:B]),
    tuning=Sample(questions[B:], texts[B:]),
    relevant=lambda number, rows: [row == asked[B + number] for row in rows],
    index=ExactIndex(passages, encoder_fingerprint="", passages_fingerprint=""),
    bm25=bm25,
    bm25_bytes=77,
  )


def build(names, workload, notes=None):
  return build_systems(
    names,
    workload,
    target_recall=0.9,
    tune_secs=0.0,
    k=5,
    notes=[] if notes is None else notes,
  )


def truth(workload, k):
  return np.argsort(
    -(workload.measured.embeddings @ workload.embeddings.T), axis=1
  )[:, :k]


def test_searches_of_embeddings_find_what_a_matrix_product_finds(workload):
  names = ["index", "exact", "device"]
  if not scann.import_problem():
    names.append("scann")
  systems = build(names, workload)
  assert len(systems) == len(names)
  rows = np.array([3, 1, 3])  # any questions, in any order
  for system in systems:
    found = system.search(rows, 4)
    np.testing.assert_array_equal(found, truth(workload, 4)[rows])
    assert system.by_embeddings
    assert system.memory_bytes >= workload.embeddings.nbytes


def test_words_find_the_passage_that_has_them_and_hybrids_use_both(workload):
  bm25, hybrid, learned = build(["learned", "bm25", "hybrid"], workload)
  asked = [int(t.removeprefix("word")) for t in workload.measured.texts]
  rows = np.arange(B)
  assert bm25.search(rows, 3)[:, 0].tolist() == asked
  dense = np.mean(truth(workload, 1)[:, 0] == asked)
  # The words are always right here, and the learned weights know that.
  assert np.mean(learned.search(rows, 3)[:, 0] == asked) == 1 > dense
  assert np.mean(hybrid.search(rows, 3)[:, 0] == asked) >= dense
  assert learned.settings.startswith("learned: ")
  assert bm25.memory_bytes == 77
  assert hybrid.memory_bytes == 77 + workload.embeddings.nbytes
  assert not any(s.by_embeddings for s in (bm25, hybrid, learned))


@needs_scann
def test_the_tuned_system_says_what_the_tuner_found(workload):
  notes = []
  (tuned,) = build(["tuned"], workload, notes)
  assert tuned.family == "ScaNN, tuned"
  assert len(notes) == 1
  assert "The tuner tried" in notes[0]
  assert "index_recall@5 of 0.9 is" in notes[0]
  found = tuned.search(np.arange(B), 5)
  assert np.mean(found[:, 0] == truth(workload, 1)[:, 0]) > 0.8


@needs_scann
def test_scann_is_measured_with_several_searches_of_one_build(monkeypatch):
  rng = np.random.default_rng(0)
  passages = rng.normal(size=(400, R)).astype(np.float32)
  config = dataclasses.replace(
    benchmark_systems.IndexConfig(), scann_tree_passages=0
  )
  monkeypatch.setattr(benchmark_systems, "IndexConfig", lambda kind: config)
  sample = Sample(passages[:20])
  work = Workload(
    embeddings=passages, measured=sample, tuning=Sample(passages[:0])
  )
  systems = build(["scann"], work)
  # Of 20 leaves, a sixteenth and a tenth are one leaf or two.
  assert len({system.settings for system in systems}) == len(systems) >= 4
  assert len({system.build_secs for system in systems}) == 1
  exact = build(["exact"], work)[0].search(np.arange(20), 5)
  overlap = [
    np.mean([
      len(set(a) & set(b)) / 5
      for a, b in zip(system.search(np.arange(20), 5), exact, strict=True)
    ])
    for system in systems
  ]  # fmt: skip
  assert overlap[-1] > overlap[0]  # half of the leaves against one


def test_a_missing_faiss_is_left_out_and_said(workload, monkeypatch):
  monkeypatch.setattr(faiss_systems.importlib.util, "find_spec", lambda _: None)
  notes = []
  systems = build(["exact", "faiss"], workload, notes)
  assert [system.family for system in systems] == ["exact"]
  assert len(notes) == 1
  assert notes[0].startswith("faiss is left out: the package faiss is not inst")
  with pytest.raises(ValueError, match=r"None of .*pip install faiss-cpu"):
    build(["faiss"], workload)


def test_a_broken_faiss_is_left_out_and_said(workload, monkeypatch):
  def broken(name):
    raise OSError("libgomp.so is missing")

  monkeypatch.setattr(faiss_systems.importlib.util, "find_spec", lambda _: 1)
  monkeypatch.setattr(faiss_systems.importlib, "import_module", broken)
  notes = []
  build(["exact", "faiss"], workload, notes)
  assert "cannot be imported (libgomp.so is missing)" in notes[0]


def test_what_has_no_input_is_left_out_and_said(workload):
  bare = Workload(
    embeddings=workload.embeddings,
    measured=Sample(workload.measured.embeddings),
    tuning=workload.tuning,
  )
  notes = []
  build(["index", "exact", "bm25", "hybrid", "learned"], bare, notes)
  assert [note.split(" is left out: ")[0] for note in notes] == [
    "index", "bm25", "hybrid", "learned",
  ]  # fmt: skip
  unknown = dataclasses.replace(workload, relevant=None)
  notes.clear()
  build(["bm25", "learned"], unknown, notes)
  assert "neither answers nor passages of use are known" in notes[0]


def test_an_unknown_system_is_refused_and_so_are_none(workload):
  with pytest.raises(
    ValueError, match=r"\['exakt'\] cannot be measured.*exact"
  ):
    build(["exakt", "bm25"], workload)
  with pytest.raises(ValueError, match=r"systems=\[\] cannot be measured"):
    build([], workload)


def test_tuning_without_questions_is_refused(workload):
  none = dataclasses.replace(
    workload, tuning=Sample(workload.tuning.embeddings[:2], ["a", "b"])
  )
  with pytest.raises(
    ValueError, match=r"2 questions are left to tune.*least 3"
  ):
    build(["learned"], none)
