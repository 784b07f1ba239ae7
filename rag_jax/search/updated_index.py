"""An index after passages were deleted and others added.

In: an index as it was built, its deleted rows, and the embeddings that were
added. Out: an `Index` of the passages that are left, numbered from 0 without
gaps, as `search.updated_passages` numbers their texts.
"""

import dataclasses
from typing import Any

from etils import epath
from jaxtyping import Float, Int
import numpy as np

from rag_jax.retrieval import sharded
from rag_jax.retrieval.embeddings import JoinedRows
from rag_jax.retrieval.embeddings import SelectedRows
from rag_jax.retrieval.exact import ExactIndex
from rag_jax.retrieval.index_core import Index
from rag_jax.retrieval.index_core import check_search
from rag_jax.search.updated_passages import Gaps

_SPARE = 16  # least number of extra passages that the base is asked for


class UpdatedIndex(Index):
  """Searches the base with its own method, and added passages exactly."""

  def __init__(
    self,
    base: Index,
    gone: Int[np.ndarray, "G"],
    added: Float[np.ndarray, "D R"],
    *,
    passages_fingerprint: str,
  ):
    """Does not read the embeddings of the base yet.

    Args:
      base: the index as it was built.
      gone: its deleted rows, in rising order.
      added: embeddings that follow its last row.
      passages_fingerprint: of the passages that are left, with those added.
    """
    self._gaps = Gaps(gone)
    self._is_gone = np.zeros(base.num_passages, bool)
    self._is_gone[gone] = True
    self.base, self.added = base, added
    num_passages = base.num_passages - len(gone) + len(added)
    info = dataclasses.replace(
      base.info,
      kind="updated",
      num_passages=num_passages,
      passages_fingerprint=passages_fingerprint,
      settings={
        "base": base.kind,
        "gone": len(gone),
        "added": len(added),
        **base.settings,
      },
      certificate=None,
    )
    embeddings = SelectedRows(
      JoinedRows([base.embeddings, added]), num_passages, self._gaps.rows
    )
    # One byte per passage of the base says whether it is deleted.
    size = base.memory_bytes + added.nbytes + base.num_passages
    super().__init__(info, embeddings, size)
    self._exact_added = self._exact(added) if len(added) else None

  @property
  def changed_share(self) -> float:
    """Deleted and added passages, as a share of the passages of the base.

    It is 1 also if more passages were added than the base has.
    """
    changed = len(self._gaps.gone) + len(self.added)
    return min(changed / self.base.num_passages, 1.0)

  def search(
    self, question_embeddings: Float[np.ndarray, "B R"], n_docs: int
  ) -> tuple[Int[np.ndarray, "B K"], Float[np.ndarray, "B K"]]:
    """Finds the passages with the largest inner product.

    Arguments, results and errors as in `ExactIndex.search`.
    """
    questions = check_search(self.info, question_embeddings, n_docs)
    rows, scores = self._search_base(questions, n_docs)
    if self._exact_added is not None:
      new_rows, new_scores = self._exact_added.search(
        questions, min(n_docs, len(self.added))
      )
      new_rows = new_rows + np.int32(self.base.num_passages)
      rows = np.concatenate([rows, new_rows], axis=1)
      scores = np.concatenate([scores, new_scores], axis=1)
    rows, scores = sharded.merge(rows, scores, n_docs)
    return self._gaps.numbers(rows).astype(np.int32), scores

  def _search_base(
    self, questions: np.ndarray, n_docs: int
  ) -> tuple[np.ndarray, np.ndarray]:
    """Returns the best passages of the base; deleted ones score -inf."""
    num_gone = len(self._gaps.gone)
    rows = np.zeros((len(questions), n_docs), np.int32)
    scores = np.full((len(questions), n_docs), -np.inf, np.float32)
    needed = min(n_docs, self.base.num_passages - num_gone)
    if not needed:
      return rows, scores
    most = min(n_docs + num_gone, self.base.num_passages)
    spare, todo = max(n_docs, _SPARE), np.arange(len(questions))
    while len(todo):
      asked = min(n_docs + spare, most)
      found, found_scores = self.base.search(questions[todo], asked)
      found_scores = np.where(self._is_gone[found], -np.inf, found_scores)
      found, found_scores = sharded.merge(found, found_scores, n_docs)
      width = found.shape[1]
      rows[todo, :width], scores[todo, :width] = found, found_scores
      # All passages near a question may be deleted: ask for more.
      short = np.sum(found_scores > -np.inf, axis=1) < needed
      todo, spare = todo[short & (asked < most)], 4 * spare
    return rows, scores

  def _exact(self, embeddings: Any) -> ExactIndex:
    return ExactIndex(
      embeddings,
      encoder_fingerprint=self.encoder_fingerprint,
      passages_fingerprint=self.passages_fingerprint,
    )

  def save(self, path: epath.PathLike) -> None:
    """Writes the passages that are left to `path`, as an exact index."""
    self._exact(np.asarray(self.embeddings)).save(path)
