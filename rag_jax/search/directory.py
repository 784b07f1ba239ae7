"""A search directory: a corpus that can be searched, opened.

In: the directory that build.py wrote, perhaps updated by update.py. Out: the
passages that answer a question, found by embeddings, by words or by both.

    passages/       the texts
    twins/          passages with the title and text of one in passages/
    encoder/        the question encoder and its tokenizer
    index/          the index over the embeddings, and its certificate
    bm25/           the index over the words
    updates/        one folder per update; see versions.py
    manifest.json   the inputs of the build; written last

A directory that was updated and then compacted has all of these except the
encoder in a folder b000001/. No file names a path outside of the directory, so
it can be moved.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import json
import os
import threading
from typing import Any

from absl import logging
from etils import epath
from jaxtyping import Float
import numpy as np

from rag_jax import artifacts
from rag_jax import disk
from rag_jax.config_rules import check_choice
from rag_jax.corpus.passages import Passage
from rag_jax.corpus.store import PassageStore
from rag_jax.corpus.text_files import check_text
from rag_jax.directory_lock import lock
from rag_jax.json_input import Content
from rag_jax.models.hybrid import HybridWeights
from rag_jax.retrieval.bm25 import Bm25Index
from rag_jax.retrieval.bm25 import Bm25Settings
from rag_jax.retrieval.bm25 import check_settings
from rag_jax.retrieval.bm25 import read_stop_words
from rag_jax.retrieval.filters import meets
from rag_jax.retrieval.filters import parse_conditions
from rag_jax.retrieval.filters import search_filtered
from rag_jax.retrieval.hybrid import HybridRetriever
from rag_jax.retrieval.hybrid import Rrf
from rag_jax.retrieval.index import Index
from rag_jax.retrieval.index import load_index
from rag_jax.retrieval.retriever import Embedder
from rag_jax.search import versions
from rag_jax.search.reranker import Reranker
from rag_jax.search.text_encoder import TextEncoder
from rag_jax.search.text_encoder import load_saved_encoder
from rag_jax.search.updated_passages import UpdatedPassages
from rag_jax.search.versions import SearchVersion

KIND = "search directory"  # in its manifest
_FORMAT = 2  # raise when the files change meaning; 2: updates/CURRENT exists
ENCODER = "encoder"
MODES = ("dense", "bm25", "hybrid", "best")
_REMEDY = "Build it again: rag-jax build-index --output=DIRECTORY."


@dataclasses.dataclass(frozen=True, slots=True)
class Hit:
  """A passage that was found for a question."""

  passage: Passage
  score: float  # orders the hits; its meaning depends on the mode
  also: tuple[str, ...] = ()  # ids of other passages with its title and text


def write_content(
  path: epath.PathLike, content: Mapping[str, Any], base: str = ""
) -> None:
  """Writes the manifest of a search directory; call it last.

  Args:
    path: the directory.
    content: what `read_content` returns.
    base: the folder that compacting wrote; "": it was not compacted.
  """
  path = epath.Path(path)
  artifacts.write_manifest(
    path,
    kind=KIND,
    format=_FORMAT,
    content=content,
    nested=True,
    beside=not_in_manifest(path, base),
  )


def read_content(path: epath.Path) -> Content:
  """Returns the content of the manifest of a search directory.

  Raises:
    FileNotFoundError: nothing was built there, or the build was interrupted.
    ValueError: a file is missing, cut off or changed, or the directory holds
      other files.
  """
  base = _base(path)
  content = artifacts.read_manifest(
    path,
    kind=KIND,
    format=_FORMAT,
    remedy=_REMEDY,
    nested=True,
    beside=not_in_manifest(path, base),
  )
  if content.get("base", "") != base:
    raise ValueError(
      f"{path}/{artifacts.MANIFEST} names {content['base']!r}; expected a"
      f" folder like b000001, or none. {_REMEDY}"
    )
  return content


def not_in_manifest(path: epath.Path, base: str) -> list[str]:
  """Returns the names that a directory may hold and its manifest leaves out.

  These are the updates, and what an interrupted compaction leaves over.
  `base` is the folder in use after compacting, or "".
  """
  unused = (versions.UPDATES,)
  if base:
    unused += (
      versions.PASSAGES, versions.TWINS, versions.INDEX, versions.BM25
    )  # fmt: skip
  return [
    name
    for name in (os.listdir(path) if path.exists() else [])
    if name in unused or (versions.BASE.fullmatch(name) and name != base)
  ]


def _base(path: epath.Path) -> str:
  """Returns the folder that the manifest names, before the manifest is checked.

  "" if the directory was not compacted, or the manifest is damaged, which
  `read_content` reports.
  """
  try:
    data = disk.read_own(path / artifacts.MANIFEST, remedy=_REMEDY)
    base = json.loads(data)["content"]["base"]
  except (OSError, ValueError, KeyError, TypeError, RecursionError):
    return ""
  is_name = isinstance(base, str) and versions.BASE.fullmatch(base)
  return base if is_name else ""


def root_of(path: epath.Path) -> epath.Path:
  """Returns the folder of passages, index and updates: `path`, or its base."""
  return path / _base(path)


def word_settings(
  defaults: Bm25Settings | None = None, **settings: str | float
) -> Bm25Settings:
  """Returns settings of BM25, for `BuildConfig.words`.

  Args:
    defaults: the values of settings that are not given.
    **settings: `k1` (how much repeated words count), `b` (how much long
      passages are marked down, 0 to 1), `stemmer` (the language whose word
      endings are cut off), `stop_words` (a language, a file, or words between
      commas).

  Raises:
    ValueError: a setting is out of its range.
    TypeError: there is no such setting.
  """
  values: dict[str, Any] = dict(settings)
  if "stop_words" in values:
    values["stop_words"] = read_stop_words(values["stop_words"])
  defaults = defaults or Bm25Settings()
  return check_settings(dataclasses.replace(defaults, **values))


class OpenedDirectory:
  """A search directory, opened for searching.

  Attributes:
    path: the directory.
    root: the folder of passages, index and updates: `path`, or a folder in it.
    content: the content of the manifest: the inputs of the build, and counts.
    encoder: embeds the questions.
    built: passages and index as they were built, which all versions share.
    version: what is searched. Read it once where row numbers and texts have to
      be of the same version.
  """

  def __init__(self, path: epath.PathLike):
    """Opens the directory and checks the digest of every file.

    Raises:
      FileNotFoundError: nothing was built there, or the build was interrupted.
      ValueError: a file is missing, cut off or changed, or belongs to another
        build.
    """
    self.path = epath.Path(path).expanduser()
    self._switching = threading.Lock()
    self._open()
    self.encoder: TextEncoder = load_saved_encoder(self.path / ENCODER)
    self._embedder = Embedder(self.encoder.model, 1)

  def _open(self) -> None:
    """Opens what was built, and the version that is in use."""
    self.content: Content = read_content(self.path)
    self.content.check(passage_encoder_fingerprint=str)
    base = self.content.get("base", "")
    self.root = self.path / base
    if base:
      versions.check_base(self.root)
    passages = PassageStore(self.root / versions.PASSAGES)
    # Compacting may remove the files while they are searched.
    passages.open_all()
    index: Index = load_index(
      self.root / versions.INDEX,
      encoder_fingerprint=self.content["passage_encoder_fingerprint"],
      passages_fingerprint=passages.fingerprint,
    )
    self.built = passages, index
    # Directories of format 1 got updates/CURRENT with their first update.
    self._is_marked: bool = self.content.get("updates") == "marked"
    # Searches read this reference once: replacing it is the whole switch.
    self.version: SearchVersion = self._open_current()

  def _open_current(self) -> SearchVersion:
    return versions.open_current(self.root, *self.built, always=self._is_marked)

  def __len__(self) -> int:
    """Returns the number of passages."""
    return len(self.passages)

  @property
  def passages(self) -> PassageStore | UpdatedPassages:
    """The passages: `directory.passages[0].text`."""
    return self.version.passages

  @property
  def index(self) -> Index:
    """The index over the embeddings."""
    return self.version.index

  @property
  def bm25(self) -> Bm25Index | None:
    """The index over the words; None if the build left it out."""
    return self.version.bm25

  def set_words(self, **settings: str | float) -> None:
    """Searches words by other settings, until another version is opened.

    If a setting changes, the words of all passages are indexed again, in
    memory.

    Args:
      **settings: as in `word_settings`.

    Raises:
      ValueError: a setting is out of its range.
      TypeError: there is no such setting.
    """
    version = self.version
    old = version.bm25.settings if version.bm25 else Bm25Settings()
    wanted = word_settings(old, **settings)
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
    """Switches to the newest update; returns whether there was a newer one.

    Raises:
      FileNotFoundError: the version does not exist any more.
      ValueError: a file is missing, cut off or changed. The version that was
        open stays open.
    """
    with self._switching:  # otherwise a slower thread could switch back
      if root_of(self.path) != self.root:  # it was compacted
        self._open()
        return True
      now = versions.current(self.root, always=self._is_marked)
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
    filters: Sequence[str] = (),
    reranker: Reranker | None = None,
  ) -> list[list[Hit]]:
    """Returns the best passages of each question, best first.

    Arguments and errors as in `rag_jax.SearchDirectory.search`.
    """
    version = self.version
    depth = n_docs
    if reranker is not None:
      depth = reranker.candidates_for(n_docs)
    conditions = parse_conditions(filters)

    def same_text(row: int, passage: Passage) -> list[Passage]:
      """Returns a passage and its twins, whose metadata may differ."""
      return [passage, *version.twins_of(row)]

    def wanted(row: int) -> bool:
      alike = same_text(row, version.passages[row])
      return any(meets(passage, conditions) for passage in alike)

    ids, scores = search_filtered(
      self._search_function(version, questions, mode),
      version.passages,
      conditions,
      num_questions=len(questions),
      n_docs=depth,
      wanted=wanted if conditions else None,
    )
    if reranker is not None:
      ids, scores = reranker.rank(
        questions, ids, version.passages, progress=True
      )
      ids, scores = ids[:, :n_docs], scores[:, :n_docs]
    found = []
    for rows, best in zip(ids, scores, strict=True):
      rows = rows[rows >= 0].tolist()
      hits = []
      passages = version.passages.get(rows)
      for row, passage, score in zip(rows, passages, best, strict=False):
        alike = same_text(row, passage)
        first = next(p for p in alike if meets(p, conditions))
        also = tuple(p.id for p in alike if p is not first)
        hits.append(Hit(first, float(score), also))
      found.append(hits)
    return found

  def _search_function(
    self, version: SearchVersion, questions: Sequence[str], mode: str
  ) -> Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]:
    """Returns (numbers of questions, depth) -> passage numbers and scores.

    Raises:
      ValueError: a question is empty, or there is no such mode.
    """
    index, words = version.index, version.bm25
    modes = index.certificate and index.certificate.modes
    if problem := check_choice("mode", mode, MODES):
      raise ValueError(problem)
    if mode == "best":
      mode = modes.best if modes else "dense"
      if not modes:
        logging.log_first_n(
          logging.WARNING,
          "Which mode is best was not measured in %s: searching by embeddings."
          " rag-jax search --fit_hybrid measures it.",
          1,
          self.path,
        )
    for number, question in enumerate(questions, start=1):
      name = f"Question {number} of {len(questions)}"
      if not question.strip():
        raise ValueError(f"{name} is empty; expected some text. Leave it out.")
      check_text(question, name)
    if mode == "dense":
      embeddings = self.embed_questions(questions)
      return lambda rows, depth: index.search(embeddings[rows], depth)
    if words is None:
      raise ValueError(
        f"mode={mode!r} searches words, but {self.path} was built without them;"
        " expected mode='dense'. Build it again with --bm25."
      )

    def texts(rows: np.ndarray) -> list[str]:
      return [questions[int(row)] for row in rows]

    if mode == "bm25":
      return lambda rows, depth: words.search(texts(rows), depth)
    embeddings = self.embed_questions(questions)
    weights = modes.weights if modes else None
    fusion = HybridWeights(*weights) if weights else Rrf()
    hybrid = HybridRetriever(index, words, fusion)
    return lambda rows, n: hybrid.search(embeddings[rows], texts(rows), n)

  def embed_questions(
    self, questions: Sequence[str]
  ) -> Float[np.ndarray, "B R"]:
    """Returns what the index is searched with."""
    return self.encoder.embed_questions(self._embedder, questions)

  def sample(self, questions: Sequence[str]) -> Float[np.ndarray, "B R"] | None:
    """Returns what a certificate is measured with; None: passages."""
    return self.embed_questions(questions) if questions else None

  @property
  def speed_secs(self) -> float:
    """How long each batch size is timed for a certificate."""
    return self.content["plan"].get("speed_secs", 1.0)


@contextlib.contextmanager
def locked(
  path: epath.PathLike, *, again: str, wait: bool
) -> Iterator[OpenedDirectory]:
  """Yields the opened directory, which nobody else writes to meanwhile.

  Old versions, and what an interrupted update left, are removed before and
  after.

  Args:
    path: the directory.
    again: what to do after the disk was full, for instance "update again".
    wait: for another process that writes there; False: raise.

  Raises:
    FileNotFoundError: the directory does not exist.
    ValueError: a file is missing, cut off or changed, or another process writes
      there.
    UnwritableError: the disk is full, or nothing may be written there.
  """
  path = epath.Path(path).expanduser()
  # Before the lock, which would make its file in any directory.
  read_content(path)
  remedy = f"What was there before is still in use: {again}."
  with lock(path, kind=KIND, wait=wait, remedy=remedy):
    versions.remove_unused(root_of(path))
    yield OpenedDirectory(path)
    versions.remove_unused(root_of(path))
