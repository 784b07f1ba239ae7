"""An index of which some passages are gone, and to which others were added.

In: an index that was built once, its rows that are gone, embeddings that came.
Out: an `Index` of what is left, numbered from 0 without gaps as
`corpus.updated_passages` numbers the texts.
"""

from typing import Any

from etils import epath
from jaxtyping import Float, Int
import numpy as np

from rag_jax.corpus.updated_passages import Gaps
from rag_jax.retrieval.exact import ExactIndex
from rag_jax.retrieval.live_version import LiveVersion
from rag_jax.retrieval.rows import JoinedRows
from rag_jax.retrieval.rows import SelectedRows


class UpdatedIndex:
  """Searched like the index that it began as, and exactly among what came."""

  def __init__(
    self,
    base: Any,  # Index
    gone: Int[np.ndarray, "G"],
    added: Float[np.ndarray, "D R"],
    *,
    passages_fingerprint: str,
  ):
    """Reads nothing yet of the base's embeddings.

    Args:
      base: what was built once.
      gone: its rows that are not found any more, rising.
      added: embeddings that follow its last row.
      passages_fingerprint: of the passages that are left and those that came.
    """
    end = base.num_passages + len(added)
    self._version = LiveVersion(
      "",
      base,
      delta_ids=np.arange(base.num_passages, end),
      delta=added,
      deleted=gone,
      passages_fingerprint=passages_fingerprint,
    )
    self._gaps = Gaps(gone)
    self.kind = "updated"
    self.base, self.added = base, added
    self.num_passages = self._version.num_live
    self.embedding_dim = base.embedding_dim
    self.encoder_fingerprint = base.encoder_fingerprint
    self.passages_fingerprint = passages_fingerprint
    self.embeddings = SelectedRows(
      JoinedRows([base.embeddings, added]), self.num_passages, self._gaps.rows
    )
    self.settings: dict[str, Any] = {
      "base": base.kind,
      "gone": len(gone),
      "added": len(added),
      **base.settings,
    }
    # A mark for each passage of the base says whether it is gone.
    self.memory_bytes = base.memory_bytes + added.nbytes + base.num_passages
    self.certificate: Any = None  # see certificate.py
    self.build_cost: Any = None

  @property
  def changed_share(self) -> float:
    """Passages that went or came since the base was built, by its passages."""
    return self._version.changed_share

  def search(
    self, question_embeddings: Float[np.ndarray, "B R"], n_docs: int
  ) -> tuple[Int[np.ndarray, "B K"], Float[np.ndarray, "B K"]]:
    """Finds the passages with the largest inner product.

    Arguments and results as in `ExactIndex.search`, errors as in
    `LiveVersion.search`.
    """
    rows, scores = self._version.search(question_embeddings, n_docs)
    return self._gaps.numbers(rows).astype(np.int32), scores

  def save(self, path: epath.PathLike) -> None:
    """Writes it to directory `path`, as an exact index of what is left."""
    exact = ExactIndex(
      np.asarray(self.embeddings),
      encoder_fingerprint=self.encoder_fingerprint,
      passages_fingerprint=self.passages_fingerprint,
    )
    exact.save(path)
