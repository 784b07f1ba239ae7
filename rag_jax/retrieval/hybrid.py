"""Hybrid search: by embeddings and by words at once.

In: a dense index and a BM25 index of the same passages. Out: per question the
best passages by both, either by their ranks or by a weighted sum of their
scores. The two weights can be learned.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import numpy as np
import optax

from rag_jax.losses import marginal_sequence_nll
from rag_jax.models.hybrid import HybridWeights
from rag_jax.models.hybrid import hybrid_scores
from rag_jax.retrieval import exact
from rag_jax.retrieval.bm25 import Bm25Index
from rag_jax.retrieval.index_core import Found
from rag_jax.retrieval.index_core import Index
from rag_jax.retrieval.index_core import check_n_docs
from rag_jax.retrieval.index_core import name_rows

_Arrays = jax.Array | np.ndarray
_LOWEST = np.finfo(np.float32).min
_QUESTIONS = 32  # whose passages are read at a time


@dataclasses.dataclass(frozen=True, slots=True)
class Rrf:
  """Reciprocal-rank fusion; see `rrf`."""

  k: int = 60


class Candidates(NamedTuple):
  """The passages that either index found per question, with both scores.

  Rows are padded with id -1 and scores 0, where `mask` is False.
  """

  ids: Int[np.ndarray, "B K"]  # in ascending order
  dense: Float[np.ndarray, "B K"]
  bm25: Float[np.ndarray, "B K"]
  mask: Bool[np.ndarray, "B K"]


def rrf(
  rankings: Sequence[Int[np.ndarray, "B _"]], *, n_docs: int, k: int = 60
) -> Found:
  """Returns the best passages by the sum of 1 / (k + rank) over all rankings.

  Reciprocal-rank fusion (Cormack et al. 2009,
  https://doi.org/10.1145/1571941.1572114), where k is 60 and ranks start at 1.
  A ranking adds nothing to the passages that it lacks. The order of the
  rankings does not change a single bit.

  Args:
    rankings: ids, best first, -1 where nothing was found; of any lengths.
    n_docs: how many passages to return per question (K).
    k: the larger it is, the less the first places count.

  Returns:
    Passage ids [B, K] int32 and sums [B, K] float32, best first; of equal sums
    the smaller id.

  Raises:
    ValueError: there are no rankings, their numbers of questions differ, they
      have fewer than `n_docs` passages for a question, a ranking has a passage
      twice, or `k` is below 0.
  """
  sizes = [len(ranking) for ranking in rankings]
  if len(set(sizes)) != 1:
    raise ValueError(
      f"The rankings are of {sizes} questions; expected one ranking or more, of"
      " the same questions. Search for all questions in each index."
    )
  if k < 0:
    raise ValueError(f"k={k} is below 0. Expected for instance 60; raise k.")
  best = []
  for number in range(sizes[0]):
    terms: dict[int, list[float]] = {}
    for ranking in rankings:
      row = ranking[number].tolist()
      found = [id_ for id_ in row if id_ != -1]
      if len(set(found)) < len(found):
        raise ValueError(
          f"A ranking has a passage twice for question {number}: {row[:20]}."
          " Expected distinct passages. Keep the first place of each."
        )
      for rank, id_ in enumerate(row, 1):
        if id_ != -1:
          terms.setdefault(id_, []).append(1 / (k + rank))
    if not 1 <= n_docs <= len(terms):
      raise ValueError(
        f"n_docs={n_docs} passages were asked for, but the rankings have"
        f" {len(terms)} different ones for question {number}; expected 1 to"
        f" {len(terms)}. Search for more passages in each index, or lower"
        " n_docs."
      )
    # fsum rounds once, so the order of the terms does not matter.
    sums = {id_: math.fsum(parts) for id_, parts in terms.items()}
    order = sorted(sums, key=lambda id_: (-sums[id_], id_))[:n_docs]
    best.append((np.array(order), np.array([sums[id_] for id_ in order])))
  return exact.stack_rows(best, n_docs)


def hybrid_nll(
  weights: HybridWeights,
  dense_scores: Float[_Arrays, "B K"],
  bm25_scores: Float[_Arrays, "B K"],
  log_likelihoods: Float[_Arrays, "B K"],
  mask: Bool[_Arrays, "B K"],
) -> Float[Array, "B"]:
  """Returns -log sum_k p(z_k|x) p(y|x, z_k) in nats: the marginal likelihood.

  Args:
    weights: the weights of the two scores.
    dense_scores: inner products of question and passage.
    bm25_scores: of the same passages.
    log_likelihoods: log p(y|x, z_k), or `label_log_likelihoods`.
    mask: True for real passages.
  """
  scores = hybrid_scores(weights, dense_scores, bm25_scores)
  scores = jnp.where(mask, scores, _LOWEST)
  joint = jnp.where(mask, log_likelihoods, 0.0)[:, :, None]  # one "token"
  ones = jnp.ones((len(scores), 1), bool)
  return marginal_sequence_nll(scores, joint, ones)


def label_log_likelihoods(
  relevant: Bool[np.ndarray, "B K"],
) -> Float[np.ndarray, "B K"]:
  """Returns log p(y|x, z) for `fit_weights`, where y is "it is relevant"."""
  return np.where(relevant, np.float32(0), _LOWEST)


def fit_weights(
  dense_scores: Float[np.ndarray, "_ _"],  # all are [B, K]
  bm25_scores: Float[np.ndarray, "_ _"],
  log_likelihoods: Float[np.ndarray, "_ _"],
  mask: Bool[np.ndarray, "_ _"] | None = None,
  *,
  l2: float = 1e-4,
  num_steps: int = 50,
) -> HybridWeights:
  """Returns the weights with the smallest mean of `hybrid_nll`.

  Minimizes with L-BFGS (optax). Both scores are first divided by their standard
  deviation, because BM25 scores are larger than cosines. With one relevant
  passage per question there is a single minimum. With likelihoods there can be
  several; the result is the one reached from equal weights.

  Args:
    dense_scores: of some passages, for instance `HybridRetriever.candidates`.
    bm25_scores: of the same passages.
    log_likelihoods: log p(y|x, z) in nats, or `label_log_likelihoods`. A
      question whose passages all have the same value, for instance without a
      relevant passage, has no effect.
    mask: True for real passages; None if all are real.
    l2: penalty in nats per squared weight of the divided scores. Without it
      weights would diverge if the best passage of every question is already
      first.
    num_steps: steps of L-BFGS; far fewer suffice.

  Raises:
    ValueError: a score or likelihood of a real passage is not finite, the
      shapes differ, there are no questions, or a question has no passage.
  """
  arrays = dense_scores, bm25_scores, log_likelihoods
  mask = np.ones(np.shape(dense_scores), bool) if mask is None else mask
  _check_fit(arrays, mask)
  dense, bm25, likelihoods = (
    np.where(mask, a, 0).astype(np.float32) for a in arrays
  )
  # Subtracting a constant per question changes no gradient. Without it the
  # lowest float32, of questions without a label, would swamp the mean.
  top = np.max(np.where(mask, likelihoods, _LOWEST), axis=1, keepdims=True)
  with np.errstate(over="ignore"):
    likelihoods = np.where(mask, np.maximum(likelihoods - top, _LOWEST), 0)
  scales = [float(np.std(a[mask])) or 1.0 for a in (dense, bm25)]
  fitted = _fit(
    dense / scales[0], bm25 / scales[1], likelihoods, mask, l2, num_steps
  )
  a, b = (float(w) / s for w, s in zip(fitted, scales, strict=True))
  return HybridWeights(a, b)


def fuse(candidates: Candidates, weights: HybridWeights, n_docs: int) -> Found:
  """Returns the best candidates by the weighted sum of both scores.

  The result is that of `HybridRetriever.search`. Each question needs at least
  `n_docs` candidates.
  """
  ids, dense, bm25, mask = candidates
  a, b = map(float, weights)
  scores = (a * dense.astype(np.float64) + b * bm25).astype(np.float32)
  best = []
  for row in range(len(ids)):
    found, fused = ids[row][mask[row]], scores[row][mask[row]]
    order = np.lexsort((found, -fused))[:n_docs]
    best.append((found[order], fused[order]))
  return exact.stack_rows(best, n_docs)


class HybridRetriever:
  """Searches two indexes of the same passages as one. Row = passage id."""

  def __init__(
    self,
    dense: Index,
    bm25: Bm25Index,
    fusion: HybridWeights | Rrf,
    *,
    depth: int = 100,
  ):
    """Takes both indexes.

    Args:
      dense: searched by embeddings, of any kind.
      bm25: searched by words.
      fusion: how the two results are combined.
      depth: how many passages each index returns per question; more if `search`
        is asked for more.

    Raises:
      ValueError: the indexes have different passages, or `depth` is below 1.
    """
    if (dense.num_passages, dense.passages_fingerprint) != (
      bm25.num_passages,
      bm25.passages_fingerprint,
    ):
      raise ValueError(
        f"The {dense.kind} index has {dense.num_passages} passages with the"
        f" fingerprint {dense.passages_fingerprint!r}, the BM25 index"
        f" {bm25.num_passages} with {bm25.passages_fingerprint!r}; expected the"
        " same passages in both. Build one of them again."
      )
    if depth < 1:
      raise ValueError(
        f"depth={depth} passages from each index; expected at least 1, for"
        " instance 100. Raise depth."
      )
    self.fusion = fusion
    self.depth = depth
    self._dense = dense
    self._bm25 = bm25

  def search(
    self,
    question_embeddings: Float[np.ndarray, "B R"],
    questions: Sequence[str],
    n_docs: int,
  ) -> Found:
    """Finds the best passages by both indexes.

    With `HybridWeights` a passage that only one index found gets its true score
    from the other index as well.

    Args:
      question_embeddings: [B, R].
      questions: the texts of the questions.
      n_docs: how many passages to return per question (K).

    Returns:
      Passage ids [B, K] int32 and fused scores [B, K] float32, best first; of
      equal scores the smaller id. Rows are never short.

    Raises:
      ValueError: there are fewer passages than `n_docs`, there is not one
        embedding per question, or the embeddings do not fit the index.
    """
    if isinstance(self.fusion, Rrf):
      rankings = self._rankings(question_embeddings, questions, n_docs)
      return rrf(rankings, n_docs=n_docs, k=self.fusion.k)
    found = self.candidates(question_embeddings, questions, n_docs)
    return fuse(found, self.fusion, n_docs)

  def candidates(
    self,
    question_embeddings: Float[np.ndarray, "B R"],
    questions: Sequence[str],
    n_docs: int = 1,
  ) -> Candidates:
    """Returns all passages that either index found, with both exact scores.

    There are at least `n_docs` per question. Errors as in `search`.
    """
    rankings = self._rankings(question_embeddings, questions, n_docs)
    unions = [np.union1d(*rows) for rows in zip(*rankings, strict=True)]
    unions = [union[union >= 0] for union in unions]
    width = max(map(len, unions), default=0)
    shape = len(unions), width
    ids = np.full(shape, -1, np.int32)
    dense, bm25 = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    for row, (union, found) in enumerate(
      zip(unions, self._embeddings(unions), strict=True)
    ):
      here = row, slice(len(union))
      ids[here] = union
      dense[here] = exact.inner_products(found, question_embeddings[row])
      bm25[here] = self._bm25.score([questions[row]], union[None])[0]
    return Candidates(ids, dense, bm25, ids >= 0)

  def _embeddings(
    self, unions: Sequence[Int[np.ndarray, "_"]]
  ) -> Iterator[Float[np.ndarray, "_ R"]]:
    """Yields the embeddings of each union.

    Those of several questions are read at once: they may lie on other hosts.
    """
    for start in range(0, len(unions), _QUESTIONS):
      part = unions[start : start + _QUESTIONS]
      rows = self._dense.embeddings[np.concatenate(part)]
      yield from np.split(rows, np.cumsum([len(x) for x in part]))[:-1]

  def _rankings(
    self, question_embeddings: np.ndarray, questions: Sequence[str], n_docs: int
  ) -> tuple[np.ndarray, np.ndarray]:
    """Returns ids by embeddings and by words (-1 if no word is shared)."""
    if len(question_embeddings) != len(questions):
      raise ValueError(
        f"There are {len(question_embeddings)} question embeddings for"
        f" {len(questions)} questions; expected one per question, in the same"
        " order. Embed the same questions."
      )
    num_passages = self._dense.num_passages
    check_n_docs(n_docs, num_passages, "n_docs")
    depth = max(n_docs, min(self.depth, num_passages))
    by_embeddings, _ = self._dense.search(question_embeddings, depth)
    by_words, _ = self._bm25.search(questions, depth)
    return by_embeddings, by_words


@functools.partial(jax.jit, static_argnames="num_steps")
def _fit(
  dense: Float[Array, "B K"],
  bm25: Float[Array, "B K"],
  log_likelihoods: Float[Array, "B K"],
  mask: Bool[Array, "B K"],
  l2: Float[Array, ""] | float,
  num_steps: int,
) -> HybridWeights:
  """Returns the best weights for scores with a standard deviation of 1."""

  def loss(weights: HybridWeights) -> Float[Array, ""]:
    nll = hybrid_nll(weights, dense, bm25, log_likelihoods, mask)
    return jnp.mean(nll) + l2 * optax.tree.norm(weights, squared=True)

  # The zoom line search of optax takes twice as long to compile.
  optimizer = optax.lbfgs(
    linesearch=optax.scale_by_backtracking_linesearch(
      max_backtracking_steps=20, store_grad=True
    )
  )
  value_and_grad = optax.value_and_grad_from_state(loss)

  def step(_: Int[Array, ""], carry: tuple) -> tuple:
    weights, state = carry
    value, grad = value_and_grad(weights, state=state)
    updates, state = optimizer.update(
      grad, state, weights, value=value, grad=grad, value_fn=loss
    )
    return optax.apply_updates(weights, updates), state

  start = HybridWeights(jnp.float32(1), jnp.float32(1))
  carry = start, optimizer.init(start)
  return jax.lax.fori_loop(0, num_steps, step, carry)[0]


def _check_fit(arrays: tuple[np.ndarray, ...], mask: np.ndarray) -> None:
  """Raises `ValueError` as `fit_weights` does."""
  shapes = [np.shape(a) for a in (*arrays, mask)]
  if len(set(shapes)) > 1 or len(shapes[0]) != 2 or 0 in shapes[0]:
    raise ValueError(
      "The scores, the log-likelihoods and the mask have the shapes"
      f" {shapes}; expected all to be (questions, passages), with at least one"
      " of each. Take them from the same passages."
    )
  empty = np.flatnonzero(~mask.any(axis=1))
  bad = np.flatnonzero(
    np.any([~np.isfinite(a) & mask for a in arrays], axis=(0, 2))
  )
  if len(empty) or len(bad):
    raise ValueError(
      f"Weights cannot be fitted: {len(empty)} questions have no passage, and"
      f" {len(bad)} have scores or log-likelihoods that are NaN or infinite:"
      f" rows {name_rows(np.union1d(empty, bad))}. Expected finite numbers; the"
      " logarithm of a likelihood of 0 is the lowest float32. Leave these"
      " questions out."
    )
