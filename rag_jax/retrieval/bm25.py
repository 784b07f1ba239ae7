"""Search by words: BM25, the retriever that needs no training.

In: the titles and texts of passages. Out: for each question the passages that
share its rarest words, and a directory of arrays. The host side alone. The one
module that imports `bm25s`, and only when it is used: that import starts JAX's
devices (0.3.16), which is too early for `jax.distributed.initialize`.
"""

from array import array
from collections.abc import Iterable, Iterator, Sequence
import dataclasses
import json
import math
import os
from typing import Any

from etils import epath
from jaxtyping import Float, Int
import numpy as np

from rag_jax import artifacts
from rag_jax.corpus.passages import Passage
from rag_jax.corpus.words import WordTokenizer
from rag_jax.retrieval import exact

ARTIFACT = "bm25"  # the kind in the manifest
FORMAT = 1  # raise when the files below, or what a word is, change meaning
REMEDY = "Build the BM25 index again from the passages."

_VOCABULARY = "vocabulary.json"
# Where the scores of a word start, the passages that hold it, the scores.
_ARRAYS = {"starts": np.int64, "passages": np.int32, "scores": np.float32}
_CONTENT = {
  "num_passages": int,
  "passages_fingerprint": str,
  "k1": (int, float),
  "b": (int, float),
  "stemmer": str,
  "stop_words": list,
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Bm25Settings:
  """How words are counted.

  The numbers are those of DPR's BM25, whose passages of 100 words are also this
  project's (Karpukhin et al. 2020, https://arxiv.org/abs/2004.04906).
  """

  k1: float = 0.9  # 0: a word counts once, however often it occurs
  b: float = 0.4  # 0: long passages are not marked down; 1: in full
  stemmer: str = ""  # a language, such as "english"; "" = words as they are
  stop_words: tuple[str, ...] = ()  # left out, in any case


class Bm25Index:
  """Okapi BM25 as Lucene computes it. Row = passage id.

  The score of passage d for a question is the sum over the question's words w,
  as often as each is there, of

    log(1 + (P - n_w + 0.5) / (n_w + 0.5))
      * f_wd / (f_wd + k1 * (1 - b + b * l_d / mean l))

  f_wd: how often w is in d; n_w: in how many of the P passages it is; l_d: the
  words of d. It is the variant "Lucene (accurate)" of Kamphuis et al. 2020
  (https://cs.uwaterloo.ca/~jimmylin/publications/Kamphuis_etal_ECIR2020_preprint.pdf),
  never below 0. All of a word's scores are computed when the index is built, by
  `bm25s` (Lu 2024, arXiv:2407.03618).
  """

  def __init__(
    self,
    vocabulary: Sequence[str],
    arrays: dict[str, np.ndarray],
    *,
    num_passages: int,
    passages_fingerprint: str,
    settings: Bm25Settings,
  ):
    """Keeps what `build` or `load` made; call one of these instead."""
    self.kind = "bm25"
    self.num_passages = num_passages
    self.passages_fingerprint = passages_fingerprint
    self.settings = settings
    self._vocabulary = {word: row for row, word in enumerate(vocabulary)}
    self._arrays = arrays
    self._words = WordTokenizer(settings.stemmer, settings.stop_words)
    self._scorer = _bm25s(settings)
    self._scorer.scores = {
      "indptr": arrays["starts"],
      "indices": arrays["passages"],
      "data": arrays["scores"],
      "num_docs": num_passages,
    }
    self._scorer.nonoccurrence_array = None  # of other variants

  @classmethod
  def build(
    cls,
    passages: Iterable[Passage],
    *,
    passages_fingerprint: str,
    settings: Bm25Settings | None = None,
  ) -> "Bm25Index":
    """Returns the index of `passages`, which are read once, one by one.

    The texts are not kept. At its peak the build takes about 47 bytes for each
    different word of each passage (measured at 100,000 and 200,000 passages of
    55 different words: 0.25 and 0.5 GB); the index keeps 8 of them.

    Args:
      passages: row = passage id. Title and text are searched alike.
      passages_fingerprint: of the passages.
      settings: those of `Bm25Settings` unless given.

    Raises:
      ValueError: there are no passages, or a setting is out of its range.
    """
    settings = _check(settings or Bm25Settings())
    words = WordTokenizer(settings.stemmer, settings.stop_words)
    vocabulary: dict[str, int] = {}
    rows = _WordRows()
    for passage in passages:
      text = f"{passage.title}\n{passage.text}"
      rows.append(
        vocabulary.setdefault(word, len(vocabulary)) for word in words(text)
      )
    if not len(rows):
      raise ValueError(
        "There are no passages to index by their words; expected at least one."
        " Is data.passages empty?"
      )
    with np.errstate(invalid="ignore"):  # no passage has a word: mean l is 0
      scores = _bm25s(settings).build_index_from_ids(
        range(len(vocabulary)), rows, show_progress=False
      )
    arrays = dict(
      starts=scores["indptr"], passages=scores["indices"], scores=scores["data"]
    )
    return cls(
      list(vocabulary),
      {name: arrays[name].astype(t, copy=False) for name, t in _ARRAYS.items()},
      num_passages=len(rows),
      passages_fingerprint=passages_fingerprint,
      settings=settings,
    )

  def search(
    self, questions: Sequence[str], n_docs: int
  ) -> tuple[Int[np.ndarray, "B K"], Float[np.ndarray, "B K"]]:
    """Finds the passages with the largest scores.

    Args:
      questions: their texts.
      n_docs: how many passages to return for each question (K).

    Returns:
      Passage ids [B, K] int32 and scores [B, K] float32, best first; of equal
      scores the smaller id. Rows are never short: passages without any word of
      the question follow with score 0.

    Raises:
      ValueError: there are fewer passages than `n_docs`.
      TypeError: `questions` is one string.
    """
    _check_questions(questions)
    if not 1 <= n_docs <= self.num_passages:
      raise ValueError(
        f"n_docs={n_docs} passages a question were asked for; expected 1 to"
        f" {self.num_passages}, the passages in the BM25 index. Change n_docs"
        " or index more passages."
      )
    best = [_best(self._all_scores(text), n_docs) for text in questions]
    return exact.stack_rows(best, n_docs)

  def score(
    self, questions: Sequence[str], ids: Int[np.ndarray, "B K"]
  ) -> Float[np.ndarray, "B K"]:
    """Returns the scores of given passages, the same as `search` has.

    Raises:
      ValueError: one of `ids` is no passage, or there is not one row of them
        for each question.
      TypeError: `questions` is one string.
    """
    _check_questions(questions)
    if len(ids) != len(questions):
      raise ValueError(
        f"ids has {len(ids)} rows for {len(questions)} questions; expected one"
        " row of passages a question. Pass those of the same questions."
      )
    if ids.size and not 0 <= ids.min() <= ids.max() < self.num_passages:
      raise ValueError(
        f"ids has passages from {ids.min()} to {ids.max()}; expected 0 to"
        f" {self.num_passages - 1}, those of the BM25 index. Leave out the"
        " places where nothing was found."
      )
    scores = [
      self._scores_of(text, row)
      for text, row in zip(questions, ids, strict=True)
    ]
    return np.array(scores, np.float32).reshape(ids.shape)

  def save(self, path: epath.PathLike) -> None:
    """Writes the index to directory `path`, its manifest last."""
    path = artifacts.start_directory(path)
    for name, array_ in self._arrays.items():
      # An index that was opened from `path` reads the old file: it has to stay
      # whole until the new one is.
      file = path / f"{name}.npy"
      temp = artifacts.temp_path(file) if artifacts.is_local(path) else file
      with temp.open("wb") as f:
        np.save(f, array_, allow_pickle=False)
      if temp != file:
        os.replace(temp, file)
    artifacts.write_atomically(
      path / _VOCABULARY, json.dumps(list(self._vocabulary))
    )
    content = dataclasses.asdict(self.settings) | {
      "num_passages": self.num_passages,
      "passages_fingerprint": self.passages_fingerprint,
      "stop_words": list(self.settings.stop_words),
    }
    artifacts.write_manifest(
      path, kind=ARTIFACT, format=FORMAT, content=content
    )

  @classmethod
  def load(
    cls, path: epath.PathLike, *, passages_fingerprint: str = ""
  ) -> "Bm25Index":
    """Opens what `save` wrote; the arrays stay on the disk until used.

    Args:
      path: the directory, wherever it was moved to.
      passages_fingerprint: of the passages that ids stand for; "" = any.

    Raises:
      FileNotFoundError: nothing was built there, or the build was cut off.
      ValueError: its files are missing, cut off or changed, it is of a newer
        format, or was built of other passages.
    """
    path = epath.Path(path)
    content = artifacts.read_manifest(
      path, kind=ARTIFACT, format=FORMAT, remedy=REMEDY
    )
    bad = [k for k, t in _CONTENT.items() if not isinstance(content.get(k), t)]
    if bad:
      raise ValueError(
        f"{path}/{artifacts.MANIFEST} describes no BM25 index:"
        f" {', '.join(bad)} missing or of the wrong type; expected"
        f" {', '.join(_CONTENT)}. {REMEDY}"
      )
    if passages_fingerprint not in ("", content["passages_fingerprint"]):
      raise ValueError(
        f"The BM25 index at {path} was built of other passages: theirs is the"
        f" fingerprint {content['passages_fingerprint']!r}, data.passages has"
        f" {passages_fingerprint!r}. Set data.passages to those that it was"
        f" built of. {REMEDY}"
      )
    vocabulary = json.loads((path / _VOCABULARY).read_text(encoding="utf-8"))
    arrays = {name: _read_array(path / f"{name}.npy") for name in _ARRAYS}
    _check_arrays(path, vocabulary, arrays)
    return cls(
      vocabulary,
      arrays,
      num_passages=content["num_passages"],
      passages_fingerprint=content["passages_fingerprint"],
      settings=Bm25Settings(
        k1=content["k1"],
        b=content["b"],
        stemmer=content["stemmer"],
        stop_words=tuple(content["stop_words"]),
      ),
    )

  def _word_ids(self, question: str) -> list[int]:
    """Returns the numbers of the words that some passage has."""
    known = self._vocabulary
    return [known[word] for word in self._words(question) if word in known]

  def _all_scores(self, question: str) -> Float[np.ndarray, "P"]:
    word_ids = self._word_ids(question)
    if not word_ids:  # of which bm25s makes an error, if there are no words
      return np.zeros(self.num_passages, np.float32)
    return self._scorer.get_scores_from_ids(word_ids)

  def _scores_of(
    self, question: str, ids: Int[np.ndarray, "K"]
  ) -> Float[np.ndarray, "K"]:
    """Returns what `_all_scores` has at `ids`, without the scores of others."""
    starts, passages = self._arrays["starts"], self._arrays["passages"]
    total = np.zeros(len(ids), np.float32)
    for word in self._word_ids(question):  # added up in the same order
      start, end = starts[word], starts[word + 1]
      holders = passages[start:end]  # in ascending order
      at = np.minimum(np.searchsorted(holders, ids), len(holders) - 1)
      found = self._arrays["scores"][start:end][at]
      total += np.where(holders[at] == ids, found, np.float32(0))
    return total


class _WordRows:
  """The words of each passage as numbers, 4 bytes each; reads like lists."""

  def __init__(self):
    self._words, self._ends = array("i"), array("q")

  def append(self, words: Iterable[int]) -> None:
    self._words.extend(words)
    self._ends.append(len(self._words))

  def __len__(self) -> int:
    return len(self._ends)

  def __iter__(self) -> Iterator[list[int]]:
    start = 0
    for end in self._ends:
      yield self._words[start:end].tolist()
      start = end


def _bm25s(settings: Bm25Settings) -> Any:
  import bm25s

  return bm25s.BM25(k1=settings.k1, b=settings.b, method="lucene")


def _check(settings: Bm25Settings) -> Bm25Settings:
  """Returns `settings` if scores can be computed with them."""
  if not (settings.k1 >= 0 and math.isfinite(settings.k1)):
    raise ValueError(
      f"k1={settings.k1} is no number from 0 on. Expected for instance 0.9 or"
      " 1.2; 0 counts a word once, however often it occurs."
    )
  if not 0 <= settings.b <= 1:
    raise ValueError(
      f"b={settings.b} is not from 0 to 1. Expected for instance 0.4 or 0.75; 0"
      " does not mark long passages down."
    )
  return settings


def _check_questions(questions: Sequence[str]) -> None:
  if isinstance(questions, str):
    raise TypeError(
      f"questions={questions!r} is one string; expected a list of them. Pass"
      f" [{questions!r}]."
    )


def _best(
  scores: Float[np.ndarray, "P"], n_docs: int
) -> tuple[Int[np.ndarray, "K"], Float[np.ndarray, "K"]]:
  """Returns the ids of the largest scores, ties by smaller id, and these."""
  last = np.partition(scores, -n_docs)[-n_docs]
  above = np.flatnonzero(scores > last)
  # argpartition would take any of those with the last score.
  equal = np.flatnonzero(scores == last)[: n_docs - len(above)]
  above = above[np.argsort(-scores[above], kind="stable")]
  ids = np.concatenate([above, equal])
  return ids, scores[ids]


def _read_array(file: epath.Path) -> np.ndarray:
  if artifacts.is_local(file):
    return np.load(file, mmap_mode="r", allow_pickle=False)
  with file.open("rb") as f:
    return np.load(f, allow_pickle=False)


def _check_arrays(
  path: epath.Path, vocabulary: Any, arrays: dict[str, np.ndarray]
) -> None:
  """Raises `ValueError` unless the files are of one build."""
  starts, passages, scores = (arrays[name] for name in _ARRAYS)
  typed = all(
    arrays[name].dtype == dtype and arrays[name].ndim == 1
    for name, dtype in _ARRAYS.items()
  )
  if (
    not typed
    or not isinstance(vocabulary, list)
    or starts.shape != (len(vocabulary) + 1,)
    or len(passages) != starts[-1]
    or len(scores) != starts[-1]
  ):
    shapes = {name: (a.shape, a.dtype.name) for name, a in arrays.items()}
    raise ValueError(
      f"{path} holds arrays {shapes} for {len(vocabulary)} words; expected one"
      " start more than words, and as many passages as scores as the last"
      f" start; the directory mixes two builds. {REMEDY}"
    )
