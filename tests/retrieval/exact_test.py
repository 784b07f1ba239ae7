"""Exact search against a loop that scores and sorts every passage."""

import math

from indexes import assert_equal
from indexes import exact as make
from linen import normal
import numpy as np
import pytest

from rag_jax.retrieval import exact


def by_hand(embeddings, questions, n_docs):
  """Scores every passage with `math.fsum` and sorts by (-score, id)."""
  all_ids, all_scores = [], []
  for question in questions.tolist():
    scored = []
    for i, passage in enumerate(embeddings.tolist()):
      score = math.fsum(a * b for a, b in zip(question, passage, strict=True))
      scored.append((-np.float32(score), i))
    best = sorted(scored)[:n_docs]
    all_ids.append([i for _, i in best])
    all_scores.append([-s for s, _ in best])
  return np.array(all_ids, np.int32), np.array(all_scores, np.float32)


@pytest.fixture(params=[(65_536, 64), (7, 2), (1, 1)], ids=str)
def blocks(request, monkeypatch):
  """Blocks that hold everything, several passages and questions, or one."""
  monkeypatch.setattr(exact, "_BLOCK_PASSAGES", request.param[0])
  monkeypatch.setattr(exact, "_BLOCK_QUESTIONS", request.param[1])


@pytest.mark.parametrize("n_docs", [1, 5, 40])
@pytest.mark.usefixtures("blocks")
def test_finds_what_scoring_every_passage_finds(n_docs):
  embeddings, questions = normal(40, 6), normal(5, 6, seed=1)
  expected = by_hand(embeddings, questions, n_docs)
  assert_equal(make(embeddings).search(questions, n_docs), expected)


@pytest.mark.parametrize("n_docs", [1, 5, 40])
@pytest.mark.usefixtures("blocks")
def test_of_equal_scores_the_smaller_id_comes_first(n_docs):
  rng = np.random.default_rng(0)
  embeddings = rng.integers(-1, 2, size=(40, 3)).astype(np.float32)
  questions = rng.integers(-1, 2, size=(9, 3)).astype(np.float32)
  questions[0] = 0.0  # every passage scores 0
  expected = by_hand(embeddings, questions, n_docs)
  assert_equal(make(embeddings).search(questions, n_docs), expected)


def test_equal_passages_stay_in_order_where_a_matrix_product_would_round():
  embeddings = normal(1000, 33)
  twins = [3, 200, 511, 998, 999]  # in different places of its kernels
  embeddings[twins] = 5 * embeddings[3]
  ids, scores = make(embeddings).search(embeddings[:4], 5)
  np.testing.assert_array_equal(ids[3], twins)
  assert len(set(scores[3].tolist())) == 1


def test_a_passage_that_rounding_hides_is_found():
  # From left to right float32 makes 0 of the first, which is 1.
  embeddings = np.array([[2**25, 1, -(2**25)], [0, 0.5, 0]], np.float32)
  ids, scores = make(embeddings).search(np.ones((1, 3), np.float32), 1)
  np.testing.assert_array_equal(ids, [[0]])
  np.testing.assert_array_equal(scores, [[1]])


def test_more_equal_passages_than_are_scored_again_stay_in_order(monkeypatch):
  monkeypatch.setattr(exact, "_SPARE", 0)
  embeddings = np.ones((20_000, 4), np.float32)
  embeddings[1::2, 3] += 2**-21  # the next score after 4 in float32
  questions = np.stack([np.zeros(4), np.ones(4)]).astype(np.float32)
  ids, scores = make(embeddings).search(questions, 3)
  np.testing.assert_array_equal(ids, [[0, 1, 2], [1, 3, 5]])
  np.testing.assert_array_equal(scores, [[0] * 3, [4 + 2**-21] * 3])


def test_a_question_is_answered_alike_alone_and_in_any_batch():
  index = make(normal(500, 48))
  questions = normal(70, 48, seed=1)
  ids, scores = index.search(questions, 10)
  for i in (0, 17, 69):
    alone = slice(i, i + 1)
    found = index.search(questions[alone], 10)
    assert_equal(found, (ids[alone], scores[alone]))


def test_passages_in_ascending_order_of_score_are_found_across_blocks(
  monkeypatch,
):
  # Each block is better than all before: nothing may be kept from the first.
  monkeypatch.setattr(exact, "_BLOCK_PASSAGES", 10)
  embeddings = np.arange(100, dtype=np.float32)[:, None]
  questions = np.array([[1], [-1]], np.float32)
  ids, _ = make(embeddings).search(questions, 4)
  np.testing.assert_array_equal(ids, [[99, 98, 97, 96], [0, 1, 2, 3]])


def test_no_questions_have_no_passages():
  ids, scores = make(normal(4, 3)).search(np.zeros((0, 3), np.float32), 2)
  assert ids.shape == scores.shape == (0, 2)


def test_ranking_sorts_given_passages_by_their_scores():
  embeddings = np.array([[1], [3], [2], [3]], np.float32)
  questions = np.array([[1], [-1]], np.float32)
  ids, scores = exact.rank(
    questions, embeddings, np.array([[0, 3, 1], [1, 2, 0]], np.int32)
  )
  np.testing.assert_array_equal(ids, [[1, 3, 0], [0, 2, 1]])
  np.testing.assert_array_equal(scores, [[3, 3, 1], [-1, -2, -3]])
