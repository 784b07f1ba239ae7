"""A whole benchmark: from files to numbers that are known beforehand."""

import json
import types

import numpy as np
import pytest
from small_cross_encoder import write_cross_encoder

from rag_jax.benchmarks import run as benchmark_run
from rag_jax.benchmarks.run import BenchmarkSettings
from rag_jax.benchmarks.run import benchmark_directory
from rag_jax.benchmarks.run import benchmark_embeddings
from rag_jax.config import RerankConfig
from rag_jax.corpus.passages import Passage
from rag_jax.corpus.passages import PassageList
from rag_jax.evaluation.judged_questions import without_own
from rag_jax.retrieval.bm25 import Bm25Index
from rag_jax.retrieval.exact import ExactIndex
from rag_jax.search.reranker import Reranker

P = 12


def settings(*systems, **changes):
  fields = {"systems": systems, "rounds": 1, "speed_secs": 1e-3}
  return BenchmarkSettings(**fields | changes)


@pytest.fixture
def directory(tmp_path, monkeypatch):
  """Passage r is "word r"; embeddings take question r for passage r + 1."""
  passages = [
    Passage(id=f"p{r}", title="", text=f"word{r} is here") for r in range(P)
  ]
  words = Bm25Index.build(passages, passages_fingerprint="f")
  words.save(tmp_path / "index" / "bm25")
  vectors = np.eye(P, dtype=np.float32)
  asked = []

  def embed(texts):
    asked.append(len(texts))
    rows = [int(t.removeprefix("word").removesuffix("?")) for t in texts]
    return np.roll(vectors, -1, axis=0)[rows] + 0.1 * vectors[rows]

  opened = types.SimpleNamespace(
    version=types.SimpleNamespace(
      bm25_path=tmp_path / "index" / "bm25", twins=None
    ),
    passages=PassageList(passages, "there"),
    index=ExactIndex(vectors, encoder_fingerprint="", passages_fingerprint="f"),
    bm25=words,
    embed_questions=embed,
    asked=asked,
  )
  monkeypatch.setattr(benchmark_run, "OpenedDirectory", lambda _: opened)
  return opened


@pytest.fixture
def questions(tmp_path):
  records = [
    {"question": f"word{r}?", "answers": [f"Word{r}"], "gold": [f"p{r}"]}
    for r in range(P)
  ]
  records[0] |= {"answers": [], "gold": ["gone", "p0"]}
  path = tmp_path / "questions.jsonl"
  path.write_text("".join(json.dumps(record) + "\n" for record in records))
  return path


def test_each_system_gets_the_numbers_of_its_planted_rankings(
  directory, questions
):
  names = ("index", "exact", "bm25")
  result = benchmark_directory("there", questions, settings(*names))
  rows = {row.family: row for row in result.rows}
  assert list(rows) == ["index as built", "exact", "BM25"]
  exact, words = rows["exact"].metrics, rows["BM25"].metrics
  # The passage that answers is second, always.
  assert exact["answer_recall@1"].mean == 0
  assert exact["answer_recall@5"].mean == 1
  assert exact["MRR@10"].mean == pytest.approx(0.5)
  assert words["answer_recall@1"].mean == 1
  assert words["MRR@10"].mean == 1
  # One question has two passages of use, and one of these is not there.
  assert words["gold_recall@12"].mean == pytest.approx((P - 0.5) / P)
  assert rows["exact"].metrics == rows["index as built"].metrics
  assert rows["exact"].recall(10).mean == 1
  assert (result.num_passages, result.num_questions) == (P, P)
  assert result.num_tuning == 0
  assert result.inputs["questions"] == str(questions)
  assert any(
    note.startswith("1 passages that are known") for note in result.notes
  )
  assert any(
    note.startswith(f"1 of {P} questions have no known answers")
    for note in result.notes
  )


def test_a_reranker_is_measured_after_exact_and_hybrid_search(
  directory, questions, tmp_path
):
  texts = [p.text for p in directory.passages]
  where = write_cross_encoder(tmp_path / "cross", texts * 9)
  rerank = RerankConfig(init_from=str(where), candidates=3)
  names = ("exact", "hybrid_reranked", "reranked")
  result = benchmark_directory(
    "there", questions, settings(*names, rerank=rerank)
  )
  exact, dense, hybrid = result.rows
  assert dense.settings == "3 candidates of exact search"
  assert hybrid.settings == "3 candidates of hybrid search"
  assert result.inputs["reranker"] == str(where)
  assert dense.index_recalls == ()
  assert dense.memory_bytes > exact.memory_bytes
  assert any(f"there are {P} questions: with 256" in n for n in result.notes)
  assert min(map(min, dense.speeds.values())) > 0
  # The slow way: the three best of exact search, by their logits.
  reranker = Reranker.open(where)
  found = directory.index.search(
    directory.embed_questions([f"word{r}?" for r in range(P)]), P
  )[0]
  ranks = []
  for r, row in enumerate(found.tolist()):
    (logits,) = reranker.score([f"word{r}?"], [[texts[i] for i in row[:3]]])
    order = [row[i] for i in np.argsort(-logits, kind="stable")] + row[3:]
    ranks.append(1 / (1 + order.index(r)))
  assert dense.metrics["MRR@10"].mean == pytest.approx(np.mean(ranks))
  assert dense.metrics["MRR@10"].mean != exact.metrics["MRR@10"].mean
  # What is not among the candidates stays where it was.
  assert dense.metrics[f"gold_recall@{P}"] == exact.metrics[f"gold_recall@{P}"]


def test_a_reranker_that_is_not_there_is_left_out(directory, questions):
  result = benchmark_directory(
    "there", questions, settings("exact", "reranked")
  )
  assert [row.family for row in result.rows] == ["exact"]
  assert any("no cross-encoder" in note for note in result.notes)


def test_the_passage_that_is_the_question_is_left_out_if_asked_for(
  directory, tmp_path
):
  # Question r is passage r + 1 itself, which dense search finds first.
  records = [
    {"id": f"p{(r + 1) % P}", "question": f"word{r}?", "answers": [],
     "gold": [f"p{r}"]}
    for r in range(P)
  ]  # fmt: skip
  records[3]["id"] = "of no passage"
  path = tmp_path / "asked.jsonl"
  path.write_text("".join(json.dumps(record) + "\n" for record in records))
  with_own = benchmark_directory("there", path, settings("exact"))
  assert with_own.rows[0].metrics["MRR@10"].mean == pytest.approx(0.5)
  assert any(
    f"{P - 1} of {P}" in n and "--drop_own" in n for n in with_own.notes
  )
  without = benchmark_directory(
    "there", path, settings("exact", drop_own_id=True)
  )
  metrics = without.rows[0].metrics
  assert metrics["MRR@10"].mean == pytest.approx((P - 0.5) / P)
  # All that are left were found.
  assert metrics[f"gold_recall@{P}"].mean == 1
  assert any(f"results of {P - 1} of {P} questions" in n for n in without.notes)
  assert without.rows[0].index_recalls == with_own.rows[0].index_recalls


def test_only_the_id_itself_is_left_out_and_others_keep_their_order():
  ids = np.array([[4, 7, 2], [7, 4, 2], [4, -1, -1], [1, 2, 3]])
  kept, dropped = without_own(ids, [7, 7, 4, -1], 2)
  np.testing.assert_array_equal(kept, [[4, 2], [4, 2], [-1, -1], [1, 2]])
  assert dropped == 3


def test_questions_that_tune_are_not_measured(directory, questions):
  result = benchmark_directory(
    "there", questions, settings("learned", max_questions=5)
  )
  assert (result.num_questions, result.num_tuning) == (5, 5)
  assert directory.asked == [10]
  # Gold and embeddings stay together when the questions are drawn.
  assert result.rows[0].metrics["answer_recall@5"].mean == 1


def test_embeddings_alone_are_measured_without_questions(tmp_path):
  rng = np.random.default_rng(0)
  np.save(tmp_path / "p.npy", rng.normal(size=(50, 6)).astype(np.float16))
  np.save(tmp_path / "q.npy", rng.normal(size=(9, 6)))
  result = benchmark_embeddings(
    tmp_path / "p.npy", tmp_path / "q.npy", settings("exact", "bm25")
  )
  (row,) = result.rows
  assert row.metrics == {}
  assert row.recall(50).mean == 1
  assert "bm25 is left out" in result.notes[0]
  assert result.question_table() == ""


def test_embeddings_that_cannot_be_used_are_named(tmp_path):
  good = tmp_path / "good.npy"
  np.save(good, np.ones((3, 4), np.float32))
  bad = tmp_path / "bad.npy"
  for array, message in (
    (np.ones((3, 5), np.float32), "4 numbers per passage, .*5 per question"),
    (np.ones(3, np.float32), r"bad\.npy holds float32 of shape \(3,\)"),
    (np.ones((3, 4), np.int64), r"bad\.npy holds int64"),
    (np.ones((0, 4), np.float32), "at least one row"),
    (np.array([{}], object), r"bad\.npy cannot be read"),
  ):
    np.save(bad, array, allow_pickle=True)
    with pytest.raises(ValueError, match=message):
      benchmark_embeddings(good, bad, settings("exact"))
  with pytest.raises(FileNotFoundError, match=r"no\.npy"):
    benchmark_embeddings(tmp_path / "no.npy", good, settings("exact"))


def test_no_questions_to_measure_are_refused(directory, questions):
  with pytest.raises(ValueError, match="max_questions=0; expected at least 1"):
    benchmark_directory("there", questions, settings("exact", max_questions=0))
