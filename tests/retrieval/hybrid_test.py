"""Rank fusion against fractions, learned weights against a grid, and both."""

import fractions
import random

from indexes import FINGERPRINTS
from indexes import assert_equal
from indexes import exact
import jax
import numpy as np
import pytest

from rag_jax.corpus.passages import Passage
from rag_jax.models.hybrid import HybridWeights
from rag_jax.models.hybrid import hybrid_scores
from rag_jax.retrieval.bm25 import Bm25Index
from rag_jax.retrieval.hybrid import HybridRetriever
from rag_jax.retrieval.hybrid import Rrf
from rag_jax.retrieval.hybrid import fit_weights
from rag_jax.retrieval.hybrid import hybrid_nll
from rag_jax.retrieval.hybrid import label_log_likelihoods
from rag_jax.retrieval.hybrid import rrf

B, P, R = 12, 40, 6


def random_rankings(seed, num_rankings=3):
  rng = random.Random(seed)
  lengths = [rng.randrange(8, 15) for _ in range(num_rankings)]
  rows = [[rng.sample(range(20), n) for _ in range(9)] for n in lengths]
  for row in (row for ranking in rows for row in ranking):
    row[rng.randrange(8)] = -1  # found nothing at that place
  return [np.array(ranking, np.int32) for ranking in rows]


@pytest.mark.parametrize("k", [60, 0, 1])
def test_rank_fusion_is_that_of_a_loop_over_fractions(k):
  rankings = random_rankings(seed=k)
  ids, scores = rrf(rankings, n_docs=8, k=k)
  assert (ids.dtype, scores.dtype) == (np.int32, np.float32)
  for number in range(9):
    sums = {}
    for id_ in range(20):
      rows = [ranking[number].tolist() for ranking in rankings]
      sums[id_] = sum(
        fractions.Fraction(1, k + 1 + row.index(id_))
        for row in rows
        if id_ in row
      )
    best = sorted(sums, key=lambda id_: (-sums[id_], id_))[:8]
    assert ids[number].tolist() == best
    np.testing.assert_allclose(scores[number], [float(sums[i]) for i in best])


def test_the_order_of_the_rankings_does_not_matter():
  rankings = random_rankings(seed=1, num_rankings=4)
  assert_equal(rrf(rankings, n_docs=10), rrf(rankings[::-1], n_docs=10))


def test_one_ranking_alone_keeps_its_order():
  (ranking,) = random_rankings(seed=2, num_rankings=1)
  ids, _ = rrf([ranking], n_docs=5)
  for row, expected in zip(ids, ranking, strict=True):
    assert row.tolist() == expected[expected >= 0][:5].tolist()


def test_equal_sums_go_to_the_smaller_id():
  rankings = [np.array([[5, 3]]), np.array([[3, 5]])]
  assert rrf(rankings, n_docs=2)[0].tolist() == [[3, 5]]


@pytest.mark.parametrize(
  ("rankings", "n_docs", "k", "message"),
  [
    ([], 1, 60, r"of \[\] questions; expected one ranking or more"),
    ([[[1]], [[1], [2]]], 1, 60, r"of \[1, 2\] questions; expected one"),
    ([[[1, 2, 1]]], 1, 60, r"twice for question 0: \[1, 2, 1\]. Expected"),
    ([[[1, 2]], [[2, -1]]], 3, 60, "n_docs=3 .* 2 different .*expected 1 to"),
    ([[[1, 2]]], 0, 60, "n_docs=0 passages were asked for"),
    ([[[1]]], 1, -1, "k=-1 is below 0. Expected for instance 60"),
  ],
)
def test_rankings_that_cannot_be_fused_are_refused(
  rankings, n_docs, k, message
):
  with pytest.raises(ValueError, match=message):
    rrf([np.array(ranking) for ranking in rankings], n_docs=n_docs, k=k)


def scores_of(seed, num_questions=60, num_passages=7):
  """Returns dense and BM25 scores, of sizes as they have."""
  rng = np.random.default_rng(seed)
  shape = num_questions, num_passages
  dense = rng.normal(0.3, 0.1, size=shape).astype(np.float32)
  return dense, rng.gamma(2.0, 4.0, size=shape).astype(np.float32)


def labels(dense, bm25, weights, seed):
  """Draws one passage of use for each question, by the weights."""
  logits = weights[0] * dense + weights[1] * bm25
  noise = np.random.default_rng(seed).gumbel(size=logits.shape)
  return np.arange(logits.shape[1]) == np.argmax(logits + noise, 1)[:, None]


def naive_mean_nll(a, b, dense, bm25, log_likelihoods, mask):
  """Multiplies probabilities out, one question after another."""
  nlls = []
  for row in range(len(dense)):
    here = mask[row]
    logits = a * dense[row][here].astype(float) + b * bm25[row][here]
    prior = np.exp(logits - logits.max())
    prior /= prior.sum()
    likelihood = np.exp(log_likelihoods[row][here].astype(float))
    nlls.append(-np.log(np.sum(prior * likelihood)))
  return float(np.mean(nlls))


def grid_minimum(dense, bm25, log_likelihoods, mask):
  """Returns the smallest mean, by ever finer grids around the best point."""
  centre, width = np.zeros(2), np.array([60.0, 1.5])
  for _ in range(12):
    steps = np.linspace(-1, 1, 9)
    points = [centre + width * (i, j) for i in steps for j in steps]
    values = [
      naive_mean_nll(*point, dense, bm25, log_likelihoods, mask)
      for point in points
    ]
    centre, width = points[int(np.argmin(values))], width / 2
  return centre, min(values)


@pytest.mark.parametrize("kind", ["labels", "likelihoods", "with a mask"])
def test_fitted_weights_are_the_minimum_of_a_grid(kind):
  dense, bm25 = scores_of(seed=3)
  relevant = labels(dense, bm25, (20.0, 0.3), seed=4)
  mask = np.ones(dense.shape, bool)
  if kind == "likelihoods":
    noise = np.random.default_rng(5).normal(size=dense.shape)
    log_likelihoods = (np.where(relevant, -1.0, -4.0) + noise).astype("f")
  else:
    log_likelihoods = label_log_likelihoods(relevant)
  if kind == "with a mask":
    mask = relevant | (np.random.default_rng(6).random(dense.shape) < 0.7)
  fitted = fit_weights(dense, bm25, log_likelihoods, mask, l2=0.0)
  centre, lowest = grid_minimum(dense, bm25, log_likelihoods, mask)
  reached = naive_mean_nll(*fitted, dense, bm25, log_likelihoods, mask)
  assert reached <= lowest + 1e-5
  np.testing.assert_allclose(fitted, centre, rtol=0.02)
  others = naive_mean_nll(0, 0, dense, bm25, log_likelihoods, mask)
  assert reached < others - 0.05  # and there was something to learn


def test_many_labels_give_the_weights_that_drew_them():
  dense, bm25 = scores_of(seed=7, num_questions=4000)
  relevant = labels(dense, bm25, (20.0, 0.3), seed=8)
  fitted = fit_weights(dense, bm25, label_log_likelihoods(relevant))
  np.testing.assert_allclose(fitted, (20.0, 0.3), rtol=0.06)


def test_a_score_that_misleads_gets_no_weight():
  dense, bm25 = scores_of(seed=9, num_questions=4000)
  relevant = labels(dense, bm25, (20.0, 0.0), seed=10)
  fitted = fit_weights(dense, bm25, label_log_likelihoods(relevant))
  assert abs(fitted.bm25) < 0.02
  np.testing.assert_allclose(fitted.dense, 20.0, rtol=0.06)


def test_questions_without_a_label_change_nothing():
  dense, bm25 = scores_of(seed=3)
  relevant = labels(dense, bm25, (20.0, 0.3), seed=4)
  relevant[40:] = False
  expected = fit_weights(dense, bm25, label_log_likelihoods(relevant), l2=0.0)
  others = scores_of(seed=11)
  dense[40:], bm25[40:] = others[0][40:], others[1][40:]
  fitted = fit_weights(dense, bm25, label_log_likelihoods(relevant), l2=0.0)
  np.testing.assert_allclose(fitted, expected, rtol=2e-3)
  assert abs(fitted.dense) > 1


@pytest.mark.parametrize("seed", range(3))
def test_weights_stay_finite_where_every_label_is_first(seed):
  dense, bm25 = scores_of(seed)
  relevant = dense == dense.max(axis=1, keepdims=True)
  fitted = fit_weights(dense, bm25, label_log_likelihoods(relevant))
  assert np.all(np.isfinite(fitted))
  assert fitted.dense > 50 * abs(fitted.bm25)


def test_equal_scores_have_nothing_to_teach():
  dense, bm25 = np.ones((60, 7), np.float32), np.zeros((60, 7), np.float32)
  relevant = np.arange(7) == np.zeros((60, 1))
  fitted = fit_weights(dense, bm25, label_log_likelihoods(relevant))
  np.testing.assert_allclose(fitted, 0.0, atol=1e-3)


def test_the_gradient_of_a_weight_is_that_of_small_differences():
  dense, bm25 = scores_of(seed=12, num_questions=8)
  likelihoods = np.random.default_rng(0).normal(size=dense.shape).astype("f")
  mask = np.random.default_rng(1).random(dense.shape) < 0.8
  mask[:, 0] = True

  def total(weights):
    return hybrid_nll(weights, dense, bm25, likelihoods, mask).mean()

  at = HybridWeights(5.0, 0.2)
  grad = jax.jit(jax.grad(total))(at)
  for name, step in (("dense", 1e-3), ("bm25", 1e-4)):
    value = getattr(at, name)
    high, low = (
      naive_mean_nll(
        *at._replace(**{name: value + sign * step}),
        dense,
        bm25,
        likelihoods,
        mask,
      )
      for sign in (1, -1)
    )
    expected = (high - low) / (2 * step)
    np.testing.assert_allclose(getattr(grad, name), expected, rtol=1e-3)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda a: a.update(bm25=np.ones((3, 2), "f")), r"\(3, 2\).*expected all"),
    (lambda a: a.update({k: v[:0] for k, v in a.items()}), r"\(0, 4\).*expec"),
    (
      lambda a: a["dense"].fill(np.nan),
      r"0 .*no passage, and 3 .*rows 0, 1, 2",
    ),
    (lambda a: a["like"][1].fill(-np.inf), r"and 1 have .*: rows 1\. Expected"),
    (
      lambda a: a["mask"][2].fill(False),
      r"1 questions have no pass.*rows 2\. ",
    ),
  ],
)
def test_what_no_weights_can_be_fitted_to_is_refused(change, message):
  arrays = {
    name: np.ones((3, 4), "f") for name in ("dense", "bm25", "like")
  } | {"mask": np.ones((3, 4), bool)}
  change(arrays)
  with pytest.raises(ValueError, match=message):
    fit_weights(*arrays.values())


def two_indexes(seed=0):
  """Returns both indexes, and questions for each."""
  rng = np.random.default_rng(seed)
  embeddings = rng.normal(size=(P, R)).astype(np.float32)
  words = [f"w{i}" for i in range(60)]
  texts = [" ".join(rng.choice(words, size=12)) for _ in range(P)]
  bm25 = Bm25Index.build(
    [Passage(str(i), "", text) for i, text in enumerate(texts)],
    passages_fingerprint=FINGERPRINTS["passages_fingerprint"],
  )
  questions = [" ".join(rng.choice(words, size=5)) for _ in range(B - 1)]
  vectors = rng.normal(size=(B, R)).astype(np.float32)
  return exact(embeddings), bm25, vectors, [*questions, "unheard"]


WEIGHTS = HybridWeights(0.7, 1.3)


def all_scores(dense, bm25, vectors, questions):
  """Returns the scores [B, P] of all passages under both."""
  every = np.tile(np.arange(P, dtype=np.int32), (B, 1))
  inner = vectors.astype(np.float64) @ dense.embeddings.T
  return inner.astype(np.float32), bm25.score(questions, every)


@pytest.mark.parametrize("n_docs", [1, 5, P])
def test_at_full_depth_the_best_of_all_passages_are_found(n_docs):
  dense, bm25, vectors, questions = two_indexes()
  a, b = all_scores(dense, bm25, vectors, questions)
  fused = 0.7 * a + 1.3 * b
  retriever = HybridRetriever(dense, bm25, WEIGHTS, depth=10 * P)
  ids, scores = retriever.search(vectors, questions, n_docs)
  assert (ids.dtype, scores.dtype) == (np.int32, np.float32)
  for row in range(B):
    best = sorted(range(P), key=lambda i: (-fused[row, i], i))[:n_docs]
    assert ids[row].tolist() == best
    np.testing.assert_allclose(scores[row], fused[row, best], rtol=1e-5)


def test_what_one_side_finds_has_its_true_score_of_the_other():
  dense, bm25, vectors, questions = two_indexes()
  a, b = all_scores(dense, bm25, vectors, questions)
  depth = 4
  retriever = HybridRetriever(dense, bm25, WEIGHTS, depth=depth)
  found = retriever.candidates(vectors, questions)
  one_sided = 0
  for row in range(B):
    by_meaning = set(np.argsort(-a[row])[:depth].tolist())
    by_words = set(np.argsort(-b[row], kind="stable")[:depth].tolist())
    by_words = {i for i in by_words if b[row, i] > 0}
    ids = found.ids[row][found.mask[row]]
    assert ids.tolist() == sorted(by_meaning | by_words)
    one_sided += len(by_meaning ^ by_words)
    np.testing.assert_array_equal(found.bm25[row][found.mask[row]], b[row, ids])
    np.testing.assert_allclose(
      found.dense[row][found.mask[row]], a[row, ids], rtol=1e-5
    )
  assert one_sided > B
  assert np.all(found.ids[~found.mask] == -1)


def test_the_fused_scores_are_the_doc_scores_that_train():
  dense, bm25, vectors, questions = two_indexes()
  retriever = HybridRetriever(dense, bm25, WEIGHTS, depth=P)
  found = retriever.candidates(vectors, questions)
  ids, scores = retriever.search(vectors, questions, 3)
  trained = np.asarray(hybrid_scores(WEIGHTS, found.dense, found.bm25))
  np.testing.assert_array_equal(found.ids[0], np.arange(P))
  np.testing.assert_allclose(
    np.take_along_axis(trained, ids, axis=1), scores, rtol=1e-5
  )


@pytest.mark.parametrize("fusion", [WEIGHTS, Rrf()])
def test_a_question_without_a_known_word_is_answered_by_meaning(fusion):
  dense, bm25, vectors, questions = two_indexes()
  retriever = HybridRetriever(dense, bm25, fusion, depth=5)
  ids, _ = retriever.search(vectors, questions, 5)
  expected, _ = dense.search(vectors[-1:], 5)
  assert ids[-1].tolist() == expected[0].tolist()


def test_ranks_are_fused_if_asked_for():
  dense, bm25, vectors, questions = two_indexes()
  retriever = HybridRetriever(dense, bm25, Rrf(k=10), depth=6)
  by_words, scores = bm25.search(questions, 6)
  expected = rrf(
    [dense.search(vectors, 6)[0], np.where(scores > 0, by_words, -1)],
    n_docs=5,
    k=10,
  )
  assert_equal(retriever.search(vectors, questions, 5), expected)


@pytest.mark.parametrize("fusion", [WEIGHTS, Rrf()])
def test_more_passages_than_the_depth_can_be_asked_for(fusion):
  dense, bm25, vectors, questions = two_indexes()
  retriever = HybridRetriever(dense, bm25, fusion, depth=1)
  ids, _ = retriever.search(vectors, questions, P)
  assert np.sort(ids, axis=1).tolist() == [list(range(P))] * B


@pytest.mark.parametrize("fusion", [WEIGHTS, Rrf()])
def test_no_questions_find_nothing(fusion):
  dense, bm25, vectors, _ = two_indexes()
  ids, scores = HybridRetriever(dense, bm25, fusion).search(vectors[:0], [], 3)
  assert (ids.shape, scores.shape) == ((0, 3), (0, 3))


def test_indexes_of_other_passages_are_refused():
  dense, _, _, _ = two_indexes()
  other = Bm25Index.build([Passage("0", "", "a")], passages_fingerprint="ff")
  with pytest.raises(
    ValueError, match=r"40 pass.*'3c4d', the BM25.*1 with 'ff'"
  ):
    HybridRetriever(dense, other, WEIGHTS)


def test_a_depth_of_nothing_is_refused():
  dense, bm25, _, _ = two_indexes()
  with pytest.raises(ValueError, match="depth=0 passages from each index; exp"):
    HybridRetriever(dense, bm25, WEIGHTS, depth=0)


def test_each_question_needs_its_embedding():
  dense, bm25, vectors, questions = two_indexes()
  with pytest.raises(ValueError, match="are 12 question embeddings for 11 qu"):
    HybridRetriever(dense, bm25, Rrf()).search(vectors, questions[:-1], 3)


@pytest.mark.parametrize("n_docs", [0, P + 1])
@pytest.mark.parametrize("fusion", [WEIGHTS, Rrf()])
def test_a_number_of_passages_that_is_not_there_is_refused(fusion, n_docs):
  dense, bm25, vectors, questions = two_indexes()
  with pytest.raises(ValueError, match=f"n_docs={n_docs} .*expected 1 to 40"):
    HybridRetriever(dense, bm25, fusion).search(vectors, questions, n_docs)
