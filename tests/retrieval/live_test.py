"""An index that changes, against a table that is changed in the same way."""

import threading

from absl import logging
import numpy as np
import pytest

from rag_jax.config import IndexConfig
from rag_jax.retrieval.exact import ExactIndex
from rag_jax.retrieval.index import build_index
from rag_jax.retrieval.index import build_index_directory
from rag_jax.retrieval.live import LiveIndex

P, R = 60, 8
PRINTS = {"encoder_fingerprint": "1a2b", "passages_fingerprint": "3c4d"}


def normal(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def base(kind="exact", **settings):
  return build_index(normal(P, R), IndexConfig(kind=kind, **settings), **PRINTS)


@pytest.fixture
def live(tmp_path):
  return LiveIndex.create(tmp_path / "live", base(), rebuild_share=9.0)


def search_table(table, questions, n_docs):
  """Returns what an index of the rows of a dict (id -> row) finds."""
  ids = np.array(sorted(table), np.int32)
  index = ExactIndex(np.stack([table[i] for i in ids]), **PRINTS)
  rows, scores = index.search(questions, n_docs)
  return ids[rows], scores


def assert_holds(index, table, seed=9):
  """Checks every search and every row against the table."""
  questions = np.concatenate([normal(5, R, seed=seed), np.zeros((1, R))])
  questions = questions.astype(np.float32)
  for n_docs in {1, 5, len(table)}:
    found = index.search(questions, n_docs)
    expected = search_table(table, questions, n_docs)
    for ours, theirs in zip(found, expected, strict=True):
      assert ours.dtype == theirs.dtype
      np.testing.assert_array_equal(ours, theirs)
  version = getattr(index, "version", index)
  assert version.num_live == len(table)
  ids = np.array(sorted(table))
  rows = np.stack([table[i] for i in ids])
  np.testing.assert_array_equal(version.embeddings[ids], rows)
  np.testing.assert_array_equal(version.embeddings[:][ids], rows)


def change(index, table, rng):
  """Makes one random update to both."""
  num_passages = index.version.num_passages
  if rng.random() < 0.5:
    gone = rng.choice(num_passages, rng.integers(1, 9), replace=False)
    gone = gone[: max(len(table) - 1, 1)]
    index.delete(gone)
    for i in gone:
      table.pop(int(i), None)
  else:
    number = int(rng.integers(1, 7))
    rows = rng.normal(size=(number, R)).astype(np.float32)
    rows[-1] = 0.0  # ties with the question of zeros, and with other zeros
    if rng.random() < 0.5:
      ids = index.upsert(rows)
      assert list(ids) == list(range(num_passages, num_passages + number))
    else:  # the last one is new
      ids = rng.choice(num_passages + 1, number, replace=False)
      ids = index.upsert(rows, ids)
    table |= dict(zip(map(int, ids), rows, strict=True))


@pytest.mark.parametrize(
  ("kind", "settings"),
  [("exact", {}), ("exact", {"passages_per_shard": 25}), ("scann", {})],
)
def test_any_updates_leave_what_a_new_index_would_find(
  kind, settings, tmp_path
):
  rng = np.random.default_rng(0)
  index = LiveIndex.create(
    tmp_path / "live", base(kind, **settings), rebuild_share=9.0
  )
  table = dict(enumerate(normal(P, R)))
  for step in range(12):
    change(index, table, rng)
    assert_holds(index, table)
    if step == 7:
      config = IndexConfig(kind=kind, **settings)
      index.rebuild(
        lambda rows, path, config=config: build_index_directory(
          path, rows, config, **PRINTS
        )
      )
      assert index.version.base.num_passages == index.version.num_passages
      assert index.version.changed_share == 0.0
      assert_holds(index, table)
  (tmp_path / "live").rename(tmp_path / "moved")
  assert_holds(LiveIndex(tmp_path / "moved"), table)


def test_many_deletions_around_a_question_never_shorten_its_result(live):
  question = normal(1, R, seed=3)
  table = dict(enumerate(normal(P, R)))
  best = search_table(table, question, P)[0][0]
  live.delete(best[:57])  # all but the worst three
  ids, scores = live.search(question, 3)
  np.testing.assert_array_equal(ids[0], best[57:])
  assert np.all(np.isfinite(scores))


def test_a_base_of_which_everything_changed_is_not_found(live):
  live.upsert(np.zeros((1, R), np.float32))
  live.delete(np.arange(P))
  np.testing.assert_array_equal(live.search(normal(2, R), 1)[0], [[P], [P]])


def test_a_deleted_passage_comes_back_by_an_upsert(live):
  table = dict(enumerate(normal(P, R)))
  live.delete(np.array([3, 4]))
  table[3] = normal(R, seed=5)
  live.upsert(table[3][None], np.array([3]))
  del table[4]
  assert_holds(live, table)


def test_a_search_sees_one_version_never_a_mixture(live):
  # In version n every passage is the same row, n: a search that finds two
  # different scores has seen two versions.
  index = LiveIndex(live._path)
  ones = np.ones((P, R), np.float32)
  live.upsert(0 * ones, np.arange(P))
  index.reload()
  seen, problems, done = set(), [], threading.Event()

  def search():
    question = np.ones((2, R), np.float32)
    while not done.is_set():
      version = index.version
      scores = index.search(question, 7)[1]
      rows = version.embeddings[version.search(question, 7)[0]]
      if len(np.unique(scores)) > 1 or len(np.unique(rows)) > 1:
        problems.append(scores)
      seen.add(float(scores[0, 0]))

  def reload():
    while not done.is_set():
      index.reload()

  threads = [threading.Thread(target=search) for _ in range(3)]
  threads.append(threading.Thread(target=reload))
  for thread in threads:
    thread.start()
  for n in range(1, 13):
    live.upsert(n * ones, np.arange(P))
    live.prune(keep=1)
  done.set()
  for thread in threads:
    thread.join()
  assert not problems
  assert len(seen) > 1  # the readers did see versions come


def test_two_writers_take_turns_and_lose_nothing(live):
  rows = {t: normal(10, R, seed=t) for t in range(4)}
  ids = {}

  def write(t):
    own = LiveIndex(live._path, rebuild_share=9.0)
    ids[t] = np.concatenate([own.upsert(row[None]) for row in rows[t]])

  threads = [threading.Thread(target=write, args=(t,)) for t in rows]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert live.reload()
  assert sorted(np.concatenate(list(ids.values()))) == list(range(P, P + 40))
  for t, own in ids.items():
    np.testing.assert_array_equal(live.version.embeddings[own], rows[t])


def test_recall_after_updates_is_measured_against_what_is_there(tmp_path):
  settings = {
    "scann_tree_passages": 20,
    "scann_num_leaves": 20,
    "scann_leaves_to_search": 3,
  }
  config = IndexConfig(kind="scann", **settings)
  index = build_index(normal(500, R), config, **PRINTS)
  live = LiveIndex.create(tmp_path, index)
  questions = normal(60, R, seed=1)
  expected, _ = ExactIndex(normal(500, R), **PRINTS).search(questions, 10)
  found, _ = index.search(questions, 10)
  overlap = [
    len(set(a) & set(b)) / 10 for a, b in zip(found, expected, strict=True)
  ]
  before = live.version.index_recall(questions)
  assert 0.3 < before < 1.0
  assert abs(before - np.mean(overlap)) < 1e-9
  # The delta is searched exactly: what is there now is found more often.
  live.upsert(3 * normal(50, R, seed=2))
  assert live.version.index_recall(questions) > before


def test_an_exact_base_has_full_recall(live):
  live.upsert(normal(3, R, seed=4), np.array([1, P, 7]))
  live.delete(np.array([2]))
  assert live.version.index_recall(normal(9, R, seed=5)) == 1.0


def test_a_rebuild_is_recommended_above_a_share_of_changed_rows(
  tmp_path, monkeypatch
):
  lines = []
  monkeypatch.setattr(
    logging, "warning", lambda text, *args: lines.append(text % args)
  )
  live = LiveIndex.create(tmp_path, base(), rebuild_share=0.1)
  live.delete(np.arange(6))
  live.upsert(normal(2, R), np.array([0, 1]))  # back again: 6 of 60 changed
  assert live.version.changed_share == 0.1
  assert not lines
  live.upsert(normal(1, R))
  (line,) = lines
  assert line.startswith(f"11.7% of the rows of {tmp_path} changed")
  assert "rebuild_share=0.1" in line
  assert line.endswith("Measure index_recall, and call rebuild.")


def test_the_fingerprint_of_the_passages_follows_the_updates(live):
  assert live.version.passages_fingerprint == "3c4d"
  live.upsert(normal(1, R), passages_fingerprint="5e6f")
  live.delete(np.array([1]))
  assert LiveIndex(live._path).version.passages_fingerprint == "5e6f"
  live.delete(np.array([2]), passages_fingerprint="7a8b")
  assert LiveIndex(live._path).version.passages_fingerprint == "7a8b"


@pytest.mark.parametrize(
  ("rows", "ids", "problem"),
  [
    (normal(2, R + 1), None, r"shape \(2, 9\); expected \(2, 8\)"),
    (normal(2, R), np.array([1]), r"shape \(2, 8\); expected \(1, 8\)"),
    (np.full((2, R), np.nan, np.float32), None, "2 of 2 passages hold NaN"),
    (normal(2, R), np.array([4, 4]), "ids 4, 4 to upsert .* not all diff"),
    (normal(2, R), np.array([-1, 4]), "ids -1, 4 to upsert are negative"),
    (normal(2, R), np.array([P, P + 2]), "ids 60, 62; expected .* from 60"),
    (normal(1, R), np.array([2**32]), "ids 4294967296; expected"),
  ],
)
def test_rows_that_cannot_be_upserted_change_nothing(live, rows, ids, problem):
  with pytest.raises(ValueError, match=problem):
    live.upsert(rows, ids)
  assert (live._path / "CURRENT").read_text().startswith("v000001 ")


def test_rows_of_other_weights_are_refused(live):
  with pytest.raises(ValueError, match=r"other weights, .*'ffff'; .*'1a2b'"):
    live.upsert(normal(1, R), encoder_fingerprint="ffff")
  live.upsert(normal(1, R), encoder_fingerprint="1a2b")


def test_only_passages_that_there_are_can_be_deleted(live):
  for ids in ([P], [-1, 3], [2**32]):
    with pytest.raises(ValueError, match=r"are to be deleted; .* 0 to 59\."):
      live.delete(np.array(ids))
  with pytest.raises(ValueError, match=r"All 60 passages would be deleted"):
    live.delete(np.arange(P))
  assert live.version.num_live == P


def test_more_passages_than_are_left_cannot_be_asked_for(live):
  live.delete(np.arange(50))
  with pytest.raises(ValueError, match=r"n_docs=11 .*at most 10, those of 60"):
    live.search(normal(1, R), 11)


def test_a_rebuild_of_other_rows_is_refused_and_changes_nothing(live):
  def build_half(rows, path):
    ExactIndex(rows[:30], **PRINTS).save(path)

  with pytest.raises(ValueError, match=r"holds 30 passages; expected 60"):
    live.rebuild(build_half)
  assert_holds(LiveIndex(live._path), dict(enumerate(normal(P, R))))
