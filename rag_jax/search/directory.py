"""A corpus that can be searched, in one directory.

In: the directory that build.py made, and update.py may have
updated. Out: the passages that answer a question, by embeddings, by words or by
both.

    passages/       the texts
    twins/          what has other ids, but the title and text of one of these
    encoder/        what embeds questions, with its tokenizer
    index/          what embeddings are searched with, and its certificate
    bm25/           what words are searched with
    updates/        what came and went since; see versions.py
    manifest.json   what it was made of; written last

What was updated and then compacted has all of these but the encoder in a folder
b000001/. Nothing in it names a place outside: it can be moved.
"""

from collections.abc import Callable, Sequence
import dataclasses
import json
import os
import threading

from absl import logging
from etils import epath
from jaxtyping import Float, Int
import numpy as np

from rag_jax import artifacts
from rag_jax import disk
from rag_jax.config_rules import check_choice
from rag_jax.corpus.passages import Passage
from rag_jax.corpus.store import PassageStore
from rag_jax.corpus.text_files import check_text
from rag_jax.json_input import Content
from rag_jax.models.hybrid import HybridWeights
from rag_jax.retrieval.bm25 import Bm25Index
from rag_jax.retrieval.bm25 import Bm25Settings
from rag_jax.retrieval.filters import Conditions
from rag_jax.retrieval.filters import meets
from rag_jax.retrieval.filters import search_filtered
from rag_jax.retrieval.hybrid import HybridRetriever
from rag_jax.retrieval.hybrid import Rrf
from rag_jax.retrieval.index import Index
from rag_jax.retrieval.index import load_index
from rag_jax.retrieval.retriever import Embedder
from rag_jax.search.text_encoder import TextEncoder
from rag_jax.search.text_encoder import load_saved_encoder
from rag_jax.search.updated_passages import UpdatedPassages
from rag_jax.search.versions import BASE
from rag_jax.search.versions import BM25
from rag_jax.search.versions import INDEX
from rag_jax.search.versions import PASSAGES
from rag_jax.search.versions import TWINS
from rag_jax.search.versions import UPDATES
from rag_jax.search.versions import SearchVersion
from rag_jax.search.versions import check_base
from rag_jax.search.versions import current
from rag_jax.search.versions import open_current

KIND = "search directory"  # in its manifest
FORMAT = 2  # raise when the files change meaning; 2: updates/CURRENT is there
ENCODER = "encoder"
MODES = ("dense", "bm25", "hybrid", "best")

REMEDY = "Build it again: python tools/build_index.py --output=DIRECTORY."


@dataclasses.dataclass(frozen=True, slots=True)
class Hit:
  """A passage that was found for a question."""

  passage: Passage
  score: float  # by which hits are ordered; what it means depends on the mode
  also: tuple[str, ...] = ()  # ids of others that have its title and text


def read_content(path: epath.Path) -> Content:
  """Returns what the manifest of a search directory says.

  Raises:
    FileNotFoundError: nothing was built there, or its build was cut off.
    ValueError: a file is missing, cut off or changed, or others lie there.
  """
  base = _base(path)
  content = artifacts.read_manifest(
    path,
    kind=KIND,
    format=FORMAT,
    remedy=REMEDY,
    nested=True,
    beside=beside(path, base),
  )
  if content.get("base", "") != base:
    raise ValueError(
      f"{path}/{artifacts.MANIFEST} names {content['base']!r}; expected a"
      f" folder like b000001, or none. {REMEDY}"
    )
  return content


def root_of(path: epath.Path) -> epath.Path:
  """Returns where passages, index and updates lie: in it, or in a folder.

  That folder is what compacting the directory wrote.
  """
  return path / base if (base := _base(path)) else path


def beside(path: epath.Path, base: str) -> list[str]:
  """Returns what may lie in a search directory, and its manifest does not name.

  Updates, and what compacting it leaves over if it is killed.

  Args:
    path: of the directory.
    base: the folder that is in use; "": it was not compacted.
  """
  parts = (PASSAGES, TWINS, INDEX, BM25, UPDATES) if base else (UPDATES,)
  names = os.listdir(path) if path.exists() else []
  return [n for n in names if n in parts or (BASE.fullmatch(n) and n != base)]


def _base(path: epath.Path) -> str:
  """Returns the folder that a manifest names, before it is checked."""
  try:
    data = disk.read_own(path / artifacts.MANIFEST, remedy=REMEDY)
    base = json.loads(data)["content"]["base"]
  except (OSError, ValueError, KeyError, TypeError, RecursionError):
    return ""  # it was not compacted, or it is told when it is read
  return base if isinstance(base, str) and BASE.fullmatch(base) else ""


def _hit(alike: list[Passage], score: float, conditions: Conditions) -> Hit:
  """Returns the first of passages with one text that meets the conditions."""
  first = next(p for p in alike if meets(p, conditions))
  others = tuple(p.id for p in alike if p is not first)
  return Hit(first, score, others)


class SearchDirectory:
  """What is in the directory, opened.

  Attributes:
    path: of the directory.
    root: where passages, index and updates lie: `path`, or a folder in it.
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
    self._switching = threading.Lock()
    self._open()
    self.encoder: TextEncoder = load_saved_encoder(self.path / ENCODER)
    self._embedder = Embedder(self.encoder.model, 1)

  def _open(self) -> None:
    """Opens what was built, and the version of it that is in use."""
    self.content: Content = read_content(self.path)
    self.content.check(passage_encoder_fingerprint=str)
    base = self.content.get("base", "")
    self.root = self.path / base if base else self.path
    if base:
      check_base(self.root)
    passages = PassageStore(self.root / PASSAGES)
    passages.open_all()  # they may be compacted while they are searched
    index: Index = load_index(
      self.root / INDEX,
      encoder_fingerprint=self.content["passage_encoder_fingerprint"],
      passages_fingerprint=passages.fingerprint,
    )
    self.built = passages, index
    # Of format 2; in older ones nobody can tell.
    self._is_marked: bool = self.content.get("updates") == "marked"
    # Searches read this reference once: replacing it is the whole switch.
    self.version: SearchVersion = self._open_current()

  def _open_current(self) -> SearchVersion:
    return open_current(self.root, *self.built, always=self._is_marked)

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

  def set_words(self, change: Callable[[Bm25Settings], Bm25Settings]) -> None:
    """Searches words by other settings, until another version is opened.

    Args:
      change: the settings that the directory has, or those of a new index if it
        has none, to the ones that are wanted. If they are others, the words of
        all passages are indexed again, in memory.

    Raises:
      ValueError: a setting is out of its range.
    """
    version = self.version
    old = version.bm25.settings if version.bm25 else Bm25Settings()
    wanted = change(old)
    if wanted == old:
      return
    logging.info("Indexing the words of %d passages.", len(version.passages))
    words = Bm25Index.build(
      version.passages,
      passages_fingerprint=version.passages.fingerprint,
      settings=wanted,
    )
    self.version = dataclasses.replace(version, bm25=words)

  def reload(self) -> bool:
    """Switches to the version that is in use now; returns if it is another.

    Raises:
      FileNotFoundError: the version is gone.
      ValueError: its files are missing, cut off or changed. The version that
        was open stays open.
    """
    with self._switching:  # else a slower thread could switch back
      if root_of(self.path) != self.root:  # it was compacted
        self._open()
        return True
      now = current(self.root, always=self._is_marked)
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
      n_docs: passages a question; fewer if fewer are there, meet the
        conditions or, by words, share a word with the question.
      mode: "dense": inner products of embeddings; "bm25": words; "hybrid":
        both, by the weights that were fitted to questions, or else by
        reciprocal ranks; "best": the one of these that the certificate names,
        or else "dense".
      conditions: on the metadata; see `filters.parse_conditions`.

    Raises:
      ValueError: `n_docs` is below 1, a question is empty, or the mode is not
        there.
    """
    version = self.version
    ids, scores = self._search(version, questions, n_docs, mode, conditions)
    found = []
    for row, best in zip(ids, scores, strict=True):
      rows = row[row >= 0]
      passages = version.passages.get(rows)
      found.append(
        [
          _hit([passage, *version.twins_of(int(id_))], float(score), conditions)
          for passage, id_, score in zip(
            passages, rows, best[: len(rows)], strict=True
          )
        ]
      )
    return found

  def search_ids(
    self,
    questions: Sequence[str],
    n_docs: int,
    *,
    mode: str = "dense",
    conditions: Conditions = (),
  ) -> tuple[Int[np.ndarray, "B K"], Float[np.ndarray, "B K"]]:
    """Returns passage numbers and scores; as `search`.

    Short rows are filled up with number -1 and the lowest float32.
    """
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
    modes = version.index.certificate and version.index.certificate.modes
    if mode == "best":
      mode = modes.best if modes else "dense"
    self._check(version, questions, mode)
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
      weights = modes.weights if modes else None
      fusion = HybridWeights(*weights) if weights else Rrf()
      hybrid = HybridRetriever(index, bm25, fusion)
      return hybrid.search(embeddings[rows], some, depth)

    def wanted(row: int) -> bool:
      # A twin may have other metadata.
      alike = (version.passages[row], *version.twins_of(row))
      return any(meets(passage, conditions) for passage in alike)

    return search_filtered(
      search,
      version.passages,
      conditions,
      num_questions=len(questions),
      n_docs=n_docs,
      wanted=wanted if conditions else None,
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
    for number, question in enumerate(questions, start=1):
      if not question.strip():
        raise ValueError(
          f"Question {number} of {len(questions)} is empty; expected some text."
          " Leave it out."
        )
      check_text(question, f"Question {number} of {len(questions)}")
