"""What all kinds of index share: their description, directory and checks.

In: passage embeddings. Out: `Index`, the base class. A kind of index adds how
it searches, and nothing else.
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

ARTIFACT = "index"  # the kind in the manifest, whatever the kind of index
FORMAT = 1  # raise when the files of any kind change meaning
REMEDY = (
  "Build the index again, or set index.path='' to build it from the passages."
)

# Ids of passages and their scores, as every search returns them.
Found = tuple[Int[np.ndarray, "B K"], Float[np.ndarray, "B K"]]

_BLOCK_ROWS = 65_536  # checked at a time
LARGEST = 1e15  # larger numbers could overflow float32 in an inner product
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
  """The description of an index, as its manifest stores it.

  Attributes:
    kind: how the index searches, for instance "exact".
    num_passages: P; passage ids are 0 to P - 1.
    embedding_dim: R.
    encoder_fingerprint: identifies the weights that embedded the passages.
    passages_fingerprint: identifies the passages.
    settings: the settings of this kind of index.
    certificate: what `certify` measured; None if nothing was measured.
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
    """Returns the description that the manifest of an index contains.

    Args:
      content: the content of the manifest.
      origin: the file that was read, for messages.
      kinds: the kinds that can be opened.

    Raises:
      ValueError: a field is missing or wrong.
    """
    bad = [k for k, t in _TYPES.items() if not isinstance(content.get(k), t)]
    if bad or content["kind"] not in kinds:
      raise ValueError(
        f"{origin} describes no index that this version of rag_jax can read:"
        f" {', '.join(bad) or 'kind'} missing or wrong; expected"
        f" {', '.join(_TYPES)} and a kind of {list(kinds)}. {REMEDY}"
      )
    info = cls(**{name: content[name] for name in _TYPES})
    if "certificate" not in content:  # as in the first indexes
      return info
    certificate = Certificate.from_content(content["certificate"], origin)
    return dataclasses.replace(info, certificate=certificate)

  def write(self, path: epath.Path) -> "IndexInfo":
    """Writes the manifest of a finished index and returns what it contains.

    The certificate, if there is one, is completed with the size of the files.
    """
    certificate = self.certificate
    if certificate is not None:
      certificate = dataclasses.replace(
        certificate, disk_bytes=artifacts.directory_bytes(path)
      )
    info = dataclasses.replace(self, certificate=certificate)
    artifacts.write_manifest(
      path, kind=ARTIFACT, format=FORMAT, content=info.to_content()
    )
    return info

  @property
  def identity(self) -> str:
    """Identifies the weights and the passages."""
    return f"{self.encoder_fingerprint} {self.passages_fingerprint}"

  def to_content(self) -> dict[str, Any]:
    """Returns what `from_content` reads."""
    content = {name: getattr(self, name) for name in _TYPES}
    if self.certificate is not None:
      content["certificate"] = self.certificate.to_content()
    return content


class Index(abc.ABC):
  """Passage embeddings that can be searched.

  The scores order the passages and are then thrown away: the model computes
  them again, with gradient.

  Attributes:
    info: the description of the index.
    embeddings: [P, R] in float32, an array or `Rows`. They are not copied.
    memory_bytes: the memory that searching takes.
    build_cost: what the build took; None for an index that was loaded.
    collective: whether all processes have to make the same calls.
    is_spread: whether the processes hold a part of it each, and all of them
      have to call `save`.
  """

  collective = False
  is_spread = False

  def __init__(
    self, info: IndexInfo, embeddings: Float[Any, "P R"], memory_bytes: int
  ):
    self.info, self.embeddings = info, embeddings
    self.memory_bytes = memory_bytes
    self.build_cost: BuildCost | None = None

  @abc.abstractmethod
  def search(
    self, question_embeddings: Float[np.ndarray, "B R"], n_docs: int
  ) -> Found:
    """Finds the passages with the largest inner product.

    Args:
      question_embeddings: [B, R].
      n_docs: how many passages to return per question (K).

    Returns:
      Passage ids [B, K] int32 and scores [B, K] float32, best first; of equal
      scores the smaller id. The scores are exact.

    Raises:
      ValueError: there are fewer passages than `n_docs`, or the embeddings
        have another dimension, NaN or infinity.
    """

  @property
  def kind(self) -> str:
    """See `IndexInfo`, as for the next five."""
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
    """Identifies the weights that embedded the passages."""
    return self.info.encoder_fingerprint

  @property
  def passages_fingerprint(self) -> str:
    """Identifies the passages."""
    return self.info.passages_fingerprint

  @property
  def settings(self) -> dict[str, Any]:
    """The settings of this kind of index."""
    return self.info.settings

  @property
  def certificate(self) -> Certificate | None:
    """What was measured of the index; `save` stores what is assigned."""
    return self.info.certificate

  @certificate.setter
  def certificate(self, certificate: Certificate | None) -> None:
    self.info = dataclasses.replace(self.info, certificate=certificate)

  def connect(self) -> None:
    """Called by all processes, once, after each has opened a spread index.

    In the same order for all indexes. Returns when all have called it.
    """
    assert not self.is_spread

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
  """Returns `questions` in float32; raises `ValueError` as `Index.search`."""
  check_dim(questions.shape, info.embedding_dim)
  check_n_docs(n_docs, info.num_passages)
  check_finite(questions, "question")
  return np.ascontiguousarray(questions, np.float32)


def check_dim(shape: tuple[int, ...], embedding_dim: int) -> None:
  """Raises `ValueError` unless `shape` is that of question embeddings."""
  if len(shape) != 2 or shape[1] != embedding_dim:
    raise ValueError(
      f"The question embeddings have shape {shape}, but the index holds"
      f" {embedding_dim}-dimensional embeddings: expected (questions,"
      f" {embedding_dim}). Search with the question encoder that belongs to the"
      " index, or build the index again."
    )


def check_n_docs(
  n_docs: int, num_passages: int, name: str = "data.n_docs"
) -> None:
  """Raises `ValueError` unless so many passages can be found per question."""
  if not 1 <= n_docs <= num_passages:
    raise ValueError(
      f"{name}={n_docs} passages per question were asked for; expected 1 to"
      f" {num_passages}, the number of passages in the index. Change {name} or"
      " index more passages."
    )


def check_finite(
  embeddings: Float[Any, "N R"],
  role: str,
  *,
  first_row: int = 0,
  note: str = "",
) -> None:
  """Raises `ValueError` if a row holds NaN, infinity or too large a number.

  The message names the `role` ("question" or "passage") and the rows, counted
  from `first_row`, and ends with `note`.
  """
  bad = bad_rows(embeddings)
  if len(bad):
    raise ValueError(
      f"The embeddings of {len(bad)} of {len(embeddings)} {role}s hold NaN,"
      f" infinity or numbers above {LARGEST:g}: rows"
      f" {name_rows(bad + first_row)}. Expected finite numbers. Check the"
      f" {role} encoder: its training may have diverged; go back to an earlier"
      f" checkpoint.{note}"
    )


def check_passages(
  index: str, built_of: str, passages_fingerprint: str, remedy: str
) -> None:
  """Raises `ValueError` if an index was built of other passages.

  That is, if their fingerprint, `built_of`, differs from that of the passages
  in use, `passages_fingerprint`, which may be "" for any.
  """
  if passages_fingerprint not in ("", built_of):
    raise ValueError(
      f"{index} was built of other passages: their fingerprint is"
      f" {built_of!r}, but that of data.passages is {passages_fingerprint!r}."
      " Set data.passages to those that the index was built of, or rebuild."
      f" {remedy}"
    )


def bad_rows(embeddings: Float[Any, "P R"]) -> np.ndarray:
  """Returns the numbers of the rows [P, R] that cannot be scored."""
  bad = [
    # Written so that NaN, which compares as False, is bad as well.
    ~np.all(np.abs(embeddings[i : i + _BLOCK_ROWS]) <= LARGEST, axis=1)
    for i in range(0, len(embeddings), _BLOCK_ROWS)
  ]
  return np.flatnonzero(np.concatenate(bad)) if bad else np.zeros(0, np.int64)


def name_rows(rows: np.ndarray) -> str:
  """Returns the first few row numbers, for a message."""
  return ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")
