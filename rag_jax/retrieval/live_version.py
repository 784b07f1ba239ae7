"""One version of an index that is updated: what it is, and how it is searched.

In: an index that was built once, and the rows that changed since then. Out: for
each question the best of what is there now. A version never changes, so that
whoever holds one reads one state.
"""

from typing import Any

from jaxtyping import Float, Int
import numpy as np

from rag_jax.retrieval import exact
from rag_jax.retrieval import sharded
from rag_jax.retrieval.rows import PatchedRows

_SPARE = 16  # passages of the base asked for beside those that are needed


class LiveVersion:
  """A base index, rows that replace or follow its own, and tombstones.

  Searched like an `Index`. Passage ids are row numbers and keep their meaning:
  a deleted passage leaves a gap, a new one gets the next number.
  """

  def __init__(
    self,
    name: str,
    base: Any,  # Index
    *,
    delta_ids: Int[np.ndarray, "D"],
    delta: Float[np.ndarray, "D R"],
    deleted: Int[np.ndarray, "T"],
    passages_fingerprint: str,
    base_deleted: int = 0,
  ):
    """Reads nothing yet of the base's embeddings.

    Args:
      name: of the version.
      base: what was built once.
      delta_ids: sorted numbers of the rows that changed; all from the end of
        the base on.
      delta: these rows.
      deleted: sorted numbers of the rows that are gone.
      passages_fingerprint: of the passages as they are now.
      base_deleted: rows that were gone when the base was built.
    """
    self.kind = "live"
    self.name = name
    self.base = base
    self.delta_ids, self.delta, self.deleted = delta_ids, delta, deleted
    self.base_deleted = base_deleted
    self.encoder_fingerprint = base.encoder_fingerprint
    self.passages_fingerprint = passages_fingerprint
    appended = delta_ids >= base.num_passages
    self.num_passages = base.num_passages + int(appended.sum())
    self.num_live = self.num_passages - len(deleted)
    self.embedding_dim = base.embedding_dim
    self.embeddings = PatchedRows(
      [base.embeddings, delta[appended]], delta_ids, delta
    )
    # Of the base, what must not be found any more: it changed, or is deleted.
    self._hidden = np.zeros(base.num_passages, bool)
    for ids in (delta_ids, deleted):
      self._hidden[ids[ids < base.num_passages]] = True
    # Deleted rows of the delta stay in `embeddings`; they are not searched.
    there = ~np.isin(delta_ids, deleted)
    self._live_ids = delta_ids[there].astype(np.int32)
    self._live = self._exact(delta[there])

  @property
  def changed_share(self) -> float:
    """Rows that changed, went or came since the base was built, by its rows.

    At most 1: where more came than were there, nothing is as it was.
    """
    changed = len(np.union1d(self.delta_ids, self.deleted))
    changed = max(changed - self.base_deleted, 0)
    return min(changed / self.base.num_passages, 1.0)

  def search(
    self, question_embeddings: Float[np.ndarray, "B R"], n_docs: int
  ) -> tuple[Int[np.ndarray, "B K"], Float[np.ndarray, "B K"]]:
    """Finds the passages with the largest inner product.

    Args:
      question_embeddings: [B, R].
      n_docs: how many passages to return for each question (K).

    Returns:
      Passage ids [B, K] int32, none of them deleted, and exact scores [B, K]
      float32, best first; of equal scores the smaller id.

    Raises:
      ValueError: fewer passages than `n_docs` are left, or the embeddings have
        another dimension, NaN or infinity.
    """
    if n_docs > self.num_live:
      raise ValueError(
        f"data.n_docs={n_docs} passages a question were asked for; expected at"
        f" most {self.num_live}, those of {self.num_passages} that are not"
        " deleted. Change data.n_docs or add passages."
      )
    questions = exact.check_search(self, question_embeddings, n_docs)
    ids, scores = self._search_base(questions, n_docs)
    own = min(n_docs, len(self._live_ids))
    if own:
      rows, own_scores = self._live.search(questions, own)
      ids = np.concatenate([ids, self._live_ids[rows]], axis=1)
      scores = np.concatenate([scores, own_scores], axis=1)
    return sharded.merge(ids, scores, n_docs)

  def index_recall(
    self, question_embeddings: Float[np.ndarray, "B R"], k: int = 10
  ) -> float:
    """Returns how much of the exact top k is found now, from 0 to 1.

    Hold it against the base's own when it was built: the difference is the
    drift. The exact search reads all embeddings.
    """
    k = min(k, self.num_live)
    exactly = LiveVersion(
      self.name,
      self._exact(self.base.embeddings),
      delta_ids=self.delta_ids,
      delta=self.delta,
      deleted=self.deleted,
      passages_fingerprint=self.passages_fingerprint,
    )
    found, _ = self.search(question_embeddings, k)
    expected, _ = exactly.search(question_embeddings, k)
    overlaps = [
      len(np.intersect1d(*row)) / k for row in zip(found, expected, strict=True)
    ]
    return float(np.mean(overlaps))

  def _search_base(
    self, questions: np.ndarray, n_docs: int
  ) -> tuple[np.ndarray, np.ndarray]:
    """Returns the best n_docs or more of the base; hidden ones score -inf."""
    num_hidden = int(self._hidden.sum())
    ids = np.zeros((len(questions), n_docs), np.int32)
    scores = np.full((len(questions), n_docs), -np.inf, np.float32)
    needed = min(n_docs, self.base.num_passages - num_hidden)
    if not needed:
      return ids, scores
    most = min(n_docs + num_hidden, self.base.num_passages)
    spare, todo = max(n_docs, _SPARE), np.arange(len(questions))
    while len(todo):
      asked = min(n_docs + spare, most)
      found, found_scores = self.base.search(questions[todo], asked)
      found_scores = np.where(self._hidden[found], -np.inf, found_scores)
      found, found_scores = sharded.merge(found, found_scores, n_docs)
      width = found.shape[1]
      ids[todo, :width], scores[todo, :width] = found, found_scores
      # What is hidden may lie together around a question: ask for more.
      short = np.sum(found_scores > -np.inf, axis=1) < needed
      todo, spare = todo[short & (asked < most)], 4 * spare
    return ids, scores

  def _exact(self, embeddings: Any) -> exact.ExactIndex:
    return exact.ExactIndex(
      embeddings,
      encoder_fingerprint=self.encoder_fingerprint,
      passages_fingerprint=self.passages_fingerprint,
    )
