"""A corpus that can be searched, in one directory.

In: the directory that search_build.py made, and search_update.py may have
updated. Out: the passages that answer a question, by embeddings, by words or by
both.

    passages/       the texts
    encoder/        what embeds questions, with its tokenizer
    index/          what embeddings are searched with, and its certificate
    bm25/           what words are searched with
    updates/        what came and went since; see search_versions.py
    manifest.json   what it was made of; written last

Nothing in it names a place outside: it can be moved.
"""

from collections.abc import Sequence
import dataclasses
import threading
from typing import Any

from etils import epath
from jaxtyping import Float, Int
import numpy as np

from rag_jax import artifacts
from rag_jax.config_rules import check_choice
from rag_jax.corpus.passages import Passage
from rag_jax.corpus.store import PassageStore
from rag_jax.corpus.updated_passages import UpdatedPassages
from rag_jax.data.search_versions import INDEX
from rag_jax.data.search_versions import PASSAGES
from rag_jax.data.search_versions import UPDATES
from rag_jax.data.search_versions import SearchVersion
from rag_jax.data.search_versions import current
from rag_jax.data.search_versions import open_current
from rag_jax.data.text_encoder import TextEncoder
from rag_jax.data.text_encoder import load_saved_encoder
from rag_jax.retrieval.bm25 import Bm25Index
from rag_jax.retrieval.filters import Conditions
from rag_jax.retrieval.filters import search_filtered
from rag_jax.retrieval.hybrid import HybridRetriever
from rag_jax.retrieval.hybrid import Rrf
from rag_jax.retrieval.index import Index
from rag_jax.retrieval.index import load_index
from rag_jax.retrieval.retriever import Embedder

KIND = "search directory"  # in its manifest
FORMAT = 2  # raise when the files change meaning; 2: updates/CURRENT is there
ENCODER = "encoder"
MODES = ("dense", "bm25", "hybrid")

REMEDY = "Build it again: python tools/build_index.py --output=DIRECTORY."


@dataclasses.dataclass(frozen=True, slots=True)
class Hit:
  """A passage that was found for a question."""

  passage: Passage
  score: float  # by which hits are ordered; what it means depends on the mode


def read_content(path: epath.Path) -> dict[str, Any]:
  """Returns what the manifest of a search directory says.

  Raises:
    FileNotFoundError: nothing was built there, or its build was cut off.
    ValueError: a file is missing, cut off or changed, or others lie there.
  """
  return artifacts.read_manifest(
    path,
    kind=KIND,
    format=FORMAT,
    remedy=REMEDY,
    nested=True,
    beside=[UPDATES],
  )


class SearchDirectory:
  """What is in the directory, opened.

  Attributes:
    path: of the directory.
    content: of its manifest: what it was made of, and what became of the
      corpus.
    encoder: of the questions.
    built: the passages and the index below all versions.
    version: what is searched; take it once where rows and texts have to be of
      one version.
  """

  def __init__(self, path: epath.PathLike):
    """Opens the directory; every digest in it is checked.

    Raises:
      FileNotFoundError: nothing was built there, or its build was cut off.
      ValueError: a file is missing, cut off or changed, or a part is of another
        build.
    """
    self.path = epath.Path(path).expanduser()
    self.content: dict[str, Any] = read_content(self.path)
    passages = PassageStore(self.path / PASSAGES)
    self.encoder: TextEncoder = load_saved_encoder(self.path / ENCODER)
    index: Index = load_index(
      self.path / INDEX,
      encoder_fingerprint=self.content["passage_encoder_fingerprint"],
      passages_fingerprint=passages.fingerprint,
    )
    self.built = passages, index
    # Of format 2; in older ones nobody can tell.
    self._is_marked: bool = self.content.get("updates") == "marked"
    self._switching = threading.Lock()
    # Searches read this reference once: replacing it is the whole switch.
    self.version: SearchVersion = self._open_current()
    self._embedder = Embedder(self.encoder.model, 1)

  def _open_current(self) -> SearchVersion:
    return open_current(self.path, *self.built, always=self._is_marked)

  @property
  def passages(self) -> PassageStore | UpdatedPassages:
    """Row = passage number of the indexes."""
    return self.version.passages

  @property
  def index(self) -> Index:
    """Over the embeddings."""
    return self.version.index

  @property
  def bm25(self) -> Bm25Index | None:
    """Over the words; None if it was left out."""
    return self.version.bm25

  def reload(self) -> bool:
    """Switches to the version that is in use now; returns if it is another.

    Raises:
      FileNotFoundError: the version is gone.
      ValueError: its files are missing, cut off or changed. The version that
        was open stays open.
    """
    with self._switching:  # else a slower thread could switch back
      now = current(self.path, always=self._is_marked)
      if now.name == self.version.name:
        return False
      self.version = self._open_current()
    return True

  def search(
    self,
    questions: Sequence[str],
    n_docs: int,
    *,
    mode: str = "dense",
    conditions: Conditions = (),
  ) -> list[list[Hit]]:
    """Returns the best passages of each question, best first.

    Args:
      questions: any number.
      n_docs: passages a question.
      mode: "dense": inner products of embeddings; "bm25": words; "hybrid": both
        rankings, fused by reciprocal ranks.
      conditions: on the metadata; see `filters.parse_conditions`.

    Raises:
      ValueError: there are fewer passages, or fewer that meet the conditions,
        than `n_docs`; a question is empty; or the mode is not there.
    """
    version = self.version
    ids, scores = self._search(version, questions, n_docs, mode, conditions)
    return [
      [
        Hit(passage, float(score))
        for passage, score in zip(version.passages.get(row), best, strict=True)
      ]
      for row, best in zip(ids, scores, strict=True)
    ]

  def search_ids(
    self,
    questions: Sequence[str],
    n_docs: int,
    *,
    mode: str = "dense",
    conditions: Conditions = (),
  ) -> tuple[Int[np.ndarray, "B K"], Float[np.ndarray, "B K"]]:
    """Returns passage numbers and scores; as `search`."""
    return self._search(self.version, questions, n_docs, mode, conditions)

  def _search(
    self,
    version: SearchVersion,
    questions: Sequence[str],
    n_docs: int,
    mode: str,
    conditions: Conditions,
  ) -> tuple[np.ndarray, np.ndarray]:
    """Returns passage numbers and scores in one version."""
    self._check(version, questions, n_docs, mode)
    index, bm25 = version.index, version.bm25
    embeddings = np.zeros((len(questions), index.embedding_dim))
    if mode != "bm25":
      embeddings = self.embed_questions(questions)

    def search(rows: np.ndarray, depth: int) -> tuple[np.ndarray, np.ndarray]:
      some = [questions[int(row)] for row in rows]
      if mode == "dense":
        return index.search(embeddings[rows], depth)
      assert bm25 is not None
      if mode == "bm25":
        return bm25.search(some, depth)
      hybrid = HybridRetriever(index, bm25, Rrf())
      return hybrid.search(embeddings[rows], some, depth)

    return search_filtered(
      search,
      version.passages,
      conditions,
      num_questions=len(questions),
      n_docs=n_docs,
    )

  def embed_questions(
    self, questions: Sequence[str]
  ) -> Float[np.ndarray, "B R"]:
    """Returns what the index is searched with."""
    return self.encoder.embed_questions(self._embedder, questions)

  def _check(
    self,
    version: SearchVersion,
    questions: Sequence[str],
    n_docs: int,
    mode: str,
  ) -> None:
    problem = check_choice("mode", mode, MODES)
    if problem:
      raise ValueError(problem)
    if mode != "dense" and version.bm25 is None:
      raise ValueError(
        f"mode={mode!r} searches words, but {self.path} was built without them;"
        " expected mode='dense'. Build it again with --bm25."
      )
    if not 1 <= n_docs <= len(version.passages):
      raise ValueError(
        f"n_docs={n_docs} passages a question were asked for; expected 1 to"
        f" {len(version.passages)}, all that {self.path} holds. Ask for fewer."
      )
    for number, question in enumerate(questions, start=1):
      if not question.strip():
        raise ValueError(
          f"Question {number} of {len(questions)} is empty; expected some text."
          " Leave it out."
        )
