"""Exact search over passage embeddings; the reference for every other index.

In: passage embeddings. Out: per question the passages with the largest inner
product, and a directory that holds the embeddings. It runs on the host, with
numpy, without an accelerator.
"""

from typing import Any

from etils import epath
from jaxtyping import Float, Int
import numpy as np

from rag_jax import artifacts
from rag_jax.retrieval.embeddings import open_embeddings
from rag_jax.retrieval.index_core import REMEDY
from rag_jax.retrieval.index_core import Found
from rag_jax.retrieval.index_core import Index
from rag_jax.retrieval.index_core import IndexInfo
from rag_jax.retrieval.index_core import check_search

_BLOCK_PASSAGES = 65_536  # scored at a time, for _BLOCK_QUESTIONS questions
_BLOCK_QUESTIONS = 64
_SPARE = 256  # most passages that are scored again, besides the n_docs best

_Best = tuple[np.ndarray, np.ndarray]  # ids and scores of one question


class ExactIndex(Index):
  """Maximum-inner-product search by matrix products. Row = passage id.

  A score is the inner product in float64, rounded to float32. It depends
  neither on the batch nor on the machine, so equal passages have equal scores,
  and the smaller id comes first.
  """

  def __init__(
    self,
    embeddings: Float[Any, "P R"],  # float32, an array or `Rows`
    *,
    encoder_fingerprint: str,
    passages_fingerprint: str,
  ):
    num_passages, embedding_dim = embeddings.shape
    info = IndexInfo(
      kind="exact",
      num_passages=num_passages,
      embedding_dim=embedding_dim,
      encoder_fingerprint=encoder_fingerprint,
      passages_fingerprint=passages_fingerprint,
    )
    # A loaded index is memory-mapped: the system keeps as much as it can.
    super().__init__(info, embeddings, embeddings.nbytes)

  def search(
    self, question_embeddings: Float[np.ndarray, "B R"], n_docs: int
  ) -> Found:
    """Returns exactly the passages that `Index.search` describes."""
    questions = check_search(self.info, question_embeddings, n_docs)
    empty = np.zeros(0, np.int32), np.zeros(0, np.float32)
    best = [empty for _ in questions]
    # Passages are the outer loop: they may lie on a disk, and are read once.
    for offset in range(0, self.num_passages, _BLOCK_PASSAGES):
      passages = self.embeddings[offset : offset + _BLOCK_PASSAGES]
      for start in range(0, len(questions), _BLOCK_QUESTIONS):
        rows = slice(start, start + _BLOCK_QUESTIONS)
        best[rows] = _merge_block(
          best[rows], questions[rows], passages, offset, n_docs
        )
    return stack_rows(best, n_docs)

  @classmethod
  def load(cls, path: epath.PathLike, info: IndexInfo) -> "ExactIndex":
    """Opens what `save` wrote; the embeddings stay on the disk until used.

    Args:
      path: the directory.
      info: its manifest, which `index.load_index` has checked.

    Raises:
      ValueError: the embeddings are not those that the manifest describes.
    """
    embeddings = open_embeddings(path)
    expected = (info.num_passages, info.embedding_dim)
    if embeddings.shape != expected:
      raise ValueError(
        f"The embeddings in {path} have shape {embeddings.shape},"
        f" {artifacts.MANIFEST} says {expected}; the directory mixes two"
        f" builds. {REMEDY}"
      )
    return cls(
      embeddings,
      encoder_fingerprint=info.encoder_fingerprint,
      passages_fingerprint=info.passages_fingerprint,
    )


def search_exactly(
  index: Index, questions: Float[np.ndarray, "B R"], n_docs: int
) -> Found:
  """Returns what exact search finds in the embeddings of an index, here."""
  exact = ExactIndex(
    index.embeddings, encoder_fingerprint="", passages_fingerprint=""
  )
  return exact.search(questions, n_docs)


def rank(
  questions: Float[np.ndarray, "B R"],
  embeddings: Float[Any, "P R"],  # as in ExactIndex
  ids: Int[np.ndarray, "B K"],
) -> Found:
  """Returns `ids` sorted by their exact scores, and these scores."""
  scores = [
    inner_products(embeddings[row], question)
    for row, question in zip(ids, questions, strict=True)
  ]
  best = [_sort(*row) for row in zip(ids, scores, strict=True)]
  return stack_rows(best, ids.shape[1])


def stack_rows(best: list[_Best], n_docs: int) -> Found:
  """Returns ids [B, K] int32 and scores [B, K] float32; B may be 0.

  Short rows are filled up with id -1 and the lowest float32.
  """
  lowest = np.finfo(np.float32).min
  ids = np.full((len(best), n_docs), -1, np.int32)
  scores = np.full((len(best), n_docs), lowest, np.float32)
  for row, (found, values) in enumerate(best):
    ids[row, : len(found)], scores[row, : len(found)] = found, values
  return ids, scores


def _merge_block(
  best: list[_Best],
  questions: np.ndarray,
  passages: np.ndarray,
  offset: int,  # id of the first passage of the block
  n_docs: int,
) -> list[_Best]:
  """Returns the best passages among `best` and a block of passages."""
  rough = questions @ passages.T  # b n
  # How the matrix product rounds depends on the batch and the machine. So it
  # only chooses candidates, as many as its error bound requires. The scores
  # that rank them are computed again.
  error = (2 * np.finfo(np.float32).eps * questions.shape[1]) * (
    np.linalg.norm(questions, axis=1) * np.linalg.norm(passages, axis=1).max()
  )
  floor = np.full(len(questions), -np.inf)
  if len(passages) > n_docs:
    floor = np.partition(rough, -n_docs, axis=1)[:, -n_docs] - error
  merged = []
  for row, (ids, scores) in enumerate(best):
    if len(scores) == n_docs:
      floor[row] = max(floor[row], scores[-1] - error[row])
    new = np.flatnonzero(rough[row] >= floor[row])
    if len(new) > n_docs + _SPARE:  # for instance a question of zeros
      order = np.argsort(-rough[row, new], kind="stable")
      new = new[order[: n_docs + _SPARE]]
    ids = np.concatenate([ids, (new + offset).astype(np.int32)])
    scores = np.concatenate(
      [scores, inner_products(passages[new], questions[row])]
    )
    ids, scores = _sort(ids, scores)
    merged.append((ids[:n_docs], scores[:n_docs]))
  return merged


def inner_products(passages: np.ndarray, question: np.ndarray) -> np.ndarray:
  """Returns inner products of [n, R] with [R], rounded once, to float32."""
  exact = np.einsum(
    "NR,R->N", passages.astype(np.float64), question.astype(np.float64)
  )
  return exact.astype(np.float32)


def _sort(ids: np.ndarray, scores: np.ndarray) -> _Best:
  order = np.lexsort((ids, -scores))
  return ids[order], scores[order]
