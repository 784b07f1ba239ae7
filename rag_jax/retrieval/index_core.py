"""What every kind of index has: what it says of itself, and its directory.

In: passage embeddings. Out: `Index`, which each kind completes by how it
searches them.
"""

import abc
from collections.abc import Collection
import dataclasses
from typing import Any

from etils import epath
from jaxtyping import Float, Int
import numpy as np

from rag_jax import artifacts
from rag_jax.retrieval.certificate import Certificate
from rag_jax.retrieval.embeddings import save_embeddings
from rag_jax.retrieval.resources import BuildCost

ARTIFACT = "index"  # the kind in the manifest, of every kind of index
FORMAT = 1  # raise when the files of any kind change meaning
REMEDY = (
  "Build the index again, or set index.path='' to build it from the passages."
)

_BLOCK_ROWS = 65_536  # checked at a time
_LARGEST = 1e15  # larger numbers could overflow float32 in an inner product
_TYPES = {
  "kind": str,
  "num_passages": int,
  "embedding_dim": int,
  "encoder_fingerprint": str,
  "passages_fingerprint": str,
  "settings": dict,
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class IndexInfo:
  """What an index is.

  Attributes:
    kind: how it searches.
    num_passages: P; their ids are 0 to P - 1.
    embedding_dim: R.
    encoder_fingerprint: of the weights that embedded the passages.
    passages_fingerprint: of the passages.
    settings: of its kind.
    certificate: what `certify` measured; None: nothing was.
  """

  kind: str
  num_passages: int
  embedding_dim: int
  encoder_fingerprint: str
  passages_fingerprint: str
  settings: dict[str, Any] = dataclasses.field(default_factory=dict)
  certificate: Certificate | None = None

  @classmethod
  def from_content(
    cls, content: Any, origin: str, kinds: Collection[str]
  ) -> "IndexInfo":
    """Returns what the manifest of an index says.

    Args:
      content: of the manifest.
      origin: where it was read, for messages.
      kinds: that can be opened.

    Raises:
      ValueError: something is missing or wrong.
    """
    bad = [k for k, t in _TYPES.items() if not isinstance(content.get(k), t)]
    if bad or content["kind"] not in kinds:
      raise ValueError(
        f"{origin} describes no index that this version of rag_jax can read:"
        f" {', '.join(bad) or 'kind'} missing or wrong; expected"
        f" {', '.join(_TYPES)} and a kind of {list(kinds)}. {REMEDY}"
      )
    info = cls(**{name: content[name] for name in _TYPES})
    if "certificate" not in content:  # indexes of before have none
      return info
    certificate = Certificate.from_content(content["certificate"], origin)
    return dataclasses.replace(info, certificate=certificate)

  def write(self, path: epath.Path) -> "IndexInfo":
    """Writes the manifest of a finished index; returns what stands in it.

    The certificate, if there is one, gets the size of the files.
    """
    content = {name: getattr(self, name) for name in _TYPES}
    certificate = self.certificate
    if certificate is not None:
      certificate = dataclasses.replace(
        certificate, disk_bytes=artifacts.directory_bytes(path)
      )
      content["certificate"] = certificate.to_content()
    artifacts.write_manifest(
      path, kind=ARTIFACT, format=FORMAT, content=content
    )
    return dataclasses.replace(self, certificate=certificate)


class Index(abc.ABC):
  """Passage embeddings that are searched.

  The scores order the passages and are then thrown away: the model scores them
  again with gradient.

  Attributes:
    info: what it is.
    embeddings: [P, R] in float32, for scoring again: an array, or `Rows` of
      files. They are kept, not copied.
    memory_bytes: that searching it takes.
    build_cost: what building it took; None once it was loaded.
  """

  def __init__(
    self, info: IndexInfo, embeddings: Float[Any, "P R"], memory_bytes: int
  ):
    self.info, self.embeddings = info, embeddings
    self.memory_bytes = memory_bytes
    self.build_cost: BuildCost | None = None

  @abc.abstractmethod
  def search(
    self, question_embeddings: Float[np.ndarray, "B R"], n_docs: int
  ) -> tuple[Int[np.ndarray, "B K"], Float[np.ndarray, "B K"]]:
    """Returns ids [B, K] int32 and scores, best first, ties by smaller id."""

  @property
  def kind(self) -> str:
    """How it searches."""
    return self.info.kind

  @property
  def num_passages(self) -> int:
    """P."""
    return self.info.num_passages

  @property
  def embedding_dim(self) -> int:
    """R."""
    return self.info.embedding_dim

  @property
  def encoder_fingerprint(self) -> str:
    """Of the weights that embedded the passages."""
    return self.info.encoder_fingerprint

  @property
  def passages_fingerprint(self) -> str:
    """Of the passages."""
    return self.info.passages_fingerprint

  @property
  def settings(self) -> dict[str, Any]:
    """Of its kind."""
    return self.info.settings

  @property
  def certificate(self) -> Certificate | None:
    """What was measured of it; what is assigned, `save` keeps."""
    return self.info.certificate

  @certificate.setter
  def certificate(self, certificate: Certificate | None) -> None:
    self.info = dataclasses.replace(self.info, certificate=certificate)

  def save(self, path: epath.PathLike) -> None:
    """Writes the index to directory `path`, its manifest last."""
    path = artifacts.start_directory(path)
    self._save_files(path)
    self.info = self.info.write(path)

  def _save_files(self, path: epath.Path) -> None:
    """Writes all files but the manifest."""
    save_embeddings(path, self.embeddings)


def check_search(
  info: IndexInfo, questions: np.ndarray, n_docs: int
) -> np.ndarray:
  """Returns `questions` in float32 if an index can be searched for them.

  Raises:
    ValueError: as `ExactIndex.search`.
  """
  if questions.ndim != 2 or questions.shape[1] != info.embedding_dim:
    raise ValueError(
      f"The question embeddings have shape {questions.shape}, but the index"
      f" holds {info.embedding_dim}-dimensional embeddings: expected"
      f" (questions, {info.embedding_dim}). Search with the question encoder"
      " that belongs to the index, or build the index again."
    )
  if not 1 <= n_docs <= info.num_passages:
    raise ValueError(
      f"data.n_docs={n_docs} passages a question were asked for; expected 1 to"
      f" {info.num_passages}, the passages in the index. Change data.n_docs or"
      " index more passages."
    )
  bad = bad_rows(questions)
  if len(bad):
    raise ValueError(
      f"The embeddings of {len(bad)} of {len(questions)} questions hold NaN,"
      f" infinity or numbers above {_LARGEST:g}: rows {name_rows(bad)}."
      " Expected finite numbers. Check the question encoder: its training may"
      " have diverged; go back to an earlier checkpoint."
    )
  return np.ascontiguousarray(questions, np.float32)


def bad_rows(embeddings: Float[Any, "P R"]) -> np.ndarray:
  """Returns the numbers of the rows [P, R] that hold what cannot be scored."""
  bad = [
    # Written so that NaN, which compares as False, is bad as well.
    ~np.all(np.abs(embeddings[i : i + _BLOCK_ROWS]) <= _LARGEST, axis=1)
    for i in range(0, len(embeddings), _BLOCK_ROWS)
  ]
  return np.flatnonzero(np.concatenate(bad)) if bad else np.zeros(0, np.int64)


def name_rows(rows: np.ndarray) -> str:
  """Returns the first few row numbers, for a message."""
  return ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")
