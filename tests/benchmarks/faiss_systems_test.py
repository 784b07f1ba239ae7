"""FAISS beside ours: it searches the same passages, and is tuned alike."""

import numpy as np
import pytest

from rag_jax.benchmarks.faiss_systems import build_faiss
from rag_jax.benchmarks.faiss_systems import faiss_problem
from rag_jax.benchmarks.systems import Sample
from rag_jax.benchmarks.systems import Workload
from rag_jax.benchmarks.systems import build_systems
from rag_jax.retrieval.exact import ExactIndex
from rag_jax.retrieval.recall import index_recall_at_k

pytestmark = [
  pytest.mark.skipif(bool(faiss_problem()), reason=faiss_problem()),
  # Of SWIG, which wraps FAISS.
  pytest.mark.filterwarnings("ignore:builtin type .*:DeprecationWarning"),
]
P, B, R = 600, 30, 16


@pytest.fixture(scope="module")
def data():
  rng = np.random.default_rng(0)
  centres = rng.normal(size=(20, R))
  rows = centres[rng.integers(20, size=P + B)]
  rows += 0.7 * rng.normal(size=rows.shape)
  rows = rows.astype(np.float32)
  return rows[:P], rows[P:]


@pytest.fixture(scope="module")
def built(data):
  return list(build_faiss(data[0]))


@pytest.fixture(scope="module")
def exact(data):
  index = ExactIndex(data[0], encoder_fingerprint="", passages_fingerprint="")
  return index.search(data[1], 10)[0]


def test_every_family_finds_nearly_all_with_the_most_effort(built, data, exact):
  families = [index.family for index in built]
  assert list(dict.fromkeys(families)) == [
    "FAISS flat", "FAISS IVF", "FAISS IVF-PQ", "FAISS HNSW",
  ]  # fmt: skip
  for index in built:
    found = index.search(data[1], 10, index.most, index.depths[-1])
    assert index_recall_at_k(found, exact, 10).mean() > 0.99, index.family
    assert index.memory_bytes >= data[0].nbytes


def test_little_effort_finds_less(built, data, exact):
  ivf = next(index for index in built if index.family == "FAISS IVF")
  found = ivf.search(data[1], 10, 1, 0)
  assert index_recall_at_k(found, exact, 10).mean() < 0.95


def test_the_tuned_effort_is_enough_and_half_of_it_is_not(built, data, exact):
  for index in built:
    if not index.most:
      continue
    depth = index.depths[-1]
    effort = index.tuned_effort(data[1], exact, 0.97, depth)

    def recall(effort, index=index, depth=depth):
      found = index.search(data[1], 10, effort, depth)
      return index_recall_at_k(found, exact, 10).mean()

    assert recall(effort) >= 0.97
    assert effort == 1 or recall(effort // 2) < 0.97


def test_an_effort_that_is_never_enough_is_0(built, data, exact):
  ivf = next(index for index in built if index.family == "FAISS IVF")
  wrong = np.roll(exact, 1, axis=0)
  assert ivf.tuned_effort(data[1], wrong, 0.99, 0) == 0


def test_few_passages_have_the_flat_index_alone(data):
  assert [i.family for i in build_faiss(data[0][:50])] == ["FAISS flat"]


def test_faiss_is_one_of_the_systems_with_tuned_settings_marked(data, exact):
  passages, questions = data
  systems = build_systems(
    ["faiss"],
    Workload(
      embeddings=passages,
      measured=Sample(questions),
      tuning=Sample(questions[:20]),
    ),
    target_recall=0.9,
    tune_secs=0.0,
    k=10,
    notes=[],
  )
  tuned = [s for s in systems if s.settings.endswith("tuned")]
  assert {s.family for s in tuned} == {
    "FAISS IVF", "FAISS IVF-PQ", "FAISS HNSW",
  }  # fmt: skip
  for system in tuned:
    found = system.search(np.arange(20), 10)
    assert index_recall_at_k(found, exact[:20], 10).mean() >= 0.9
  # Each system keeps its own settings.
  assert len({(s.family, s.settings) for s in systems}) == len(systems)
