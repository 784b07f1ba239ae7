"""Search by words: BM25, the retriever that needs no training.

In: the titles and texts of passages. Out: per question the passages that share
its rarest words, and a directory of arrays. It runs on the host. This is the
only module that imports `bm25s`, and it does so only when an index needs it:
the import starts the devices of JAX (bm25s 0.3.16), which is too early for
`jax.distributed.initialize`.
"""

from collections.abc import Iterable, Sequence
import contextlib
import dataclasses
import difflib
import json
import tempfile

from etils import epath
from jaxtyping import Float, Int
import numpy as np

from rag_jax import artifacts
from rag_jax import disk
from rag_jax.corpus.passages import Passage
from rag_jax.corpus.text_files import read_texts
from rag_jax.corpus.text_files import shorten
from rag_jax.corpus.words import RULES
from rag_jax.corpus.words import WordTokenizer
from rag_jax.directory_lock import building
from rag_jax.json_input import read_settings
from rag_jax.retrieval import exact
from rag_jax.retrieval.embeddings import save_array
from rag_jax.retrieval.index_core import Found
from rag_jax.retrieval.index_core import check_n_docs
from rag_jax.retrieval.index_core import check_passages
from rag_jax.retrieval.postings import ARRAYS
from rag_jax.retrieval.postings import Postings
from rag_jax.retrieval.postings import open_arrays

ARTIFACT = "bm25"  # the kind in the manifest
# Raise it when the files below change meaning, or when there is a new rule for
# what a word is. Format 1 has no `word_rule`.
FORMAT = 2
REMEDY = "Build the BM25 index again from the passages."

_VOCABULARY = "vocabulary.json"
_MAX_K1 = 1000  # far beyond any use
_CONTENT = {
  "num_passages": int,
  "passages_fingerprint": str,
  "k1": (int, float),
  "b": (int, float),
  "stemmer": str,
  "stop_words": list,
  "word_rule": int,
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Bm25Settings:
  """How words are counted.

  The numbers are those of DPR's BM25, whose passages of 100 words are also this
  project's (Karpukhin et al. 2020, https://arxiv.org/abs/2004.04906).
  """

  k1: float = 0.9  # 0: a word counts once, however often it occurs
  b: float = 0.4  # 0: no penalty for long passages; 1: the full penalty
  stemmer: str = ""  # a language, such as "english"; "" for no stemming
  stop_words: tuple[str, ...] = ()  # ignored, in upper or lower case
  # `WordTokenizer` defines the rules. Not in repr: rule 1 had no name.
  word_rule: int = dataclasses.field(default=RULES[-1], repr=False)

  def word_tokenizer(self) -> WordTokenizer:
    """Returns the tokenizer that splits passages and questions into words.

    Raises:
      ValueError: there is no such stemmer or rule.
    """
    return WordTokenizer(self.stemmer, self.stop_words, self.word_rule)


class Bm25Index:
  """Okapi BM25 as Lucene computes it. Row = passage id.

  The score of passage d for a question is the sum over all words w of the
  question, repeated words included, of

    log(1 + (P - n_w + 0.5) / (n_w + 0.5))
      * f_wd / (f_wd + k1 * (1 - b + b * l_d / mean l))

  f_wd: occurrences of w in d; n_w: the number of passages, of P, that contain
  w; l_d: the number of words in d. This is the variant "Lucene (accurate)" of
  Kamphuis et al. 2020
  (https://cs.uwaterloo.ca/~jimmylin/publications/Kamphuis_etal_ECIR2020_preprint.pdf).
  It is never below 0. The scores of all words are computed when the index is
  built, bit for bit as `bm25s` does (Lu 2024, arXiv:2407.03618), and summed by
  `bm25s` when it is searched.
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
    """Called by `build` and `load`; call one of these instead."""
    import bm25s

    self.num_passages = num_passages
    self.passages_fingerprint = passages_fingerprint
    self.settings = settings
    self._vocabulary = {word: row for row, word in enumerate(vocabulary)}
    self._arrays = arrays
    self._words = settings.word_tokenizer()
    self._scorer = bm25s.BM25(k1=settings.k1, b=settings.b, method="lucene")
    self._scorer.scores = {
      "indptr": arrays["starts"],
      "indices": arrays["passages"],
      "data": arrays["scores"],
      "num_docs": num_passages,
    }
    self._scorer.nonoccurrence_array = None  # only other variants have one

  @classmethod
  def build(
    cls,
    passages: Iterable[Passage],
    *,
    passages_fingerprint: str,
    settings: Bm25Settings | None = None,
  ) -> "Bm25Index":
    """Returns the index of `passages` in memory: 8 bytes per posting.

    A posting is a pair of a passage and one of its distinct words. The build
    needs 20 bytes per posting in the temporary folder of the system.

    Args:
      passages: row = passage id, read once. Title and text count alike.
      passages_fingerprint: identifies the passages.
      settings: None for the defaults of `Bm25Settings`.

    Raises:
      ValueError: there are no passages, or a setting is out of its range.
      OSError: the disk is full.
    """
    settings = check_settings(settings or Bm25Settings())
    with tempfile.TemporaryDirectory() as folder:
      path = epath.Path(folder)
      vocabulary, num_passages = _write_arrays(path, passages, settings)
      arrays = {name: np.load(path / f"{name}.npy") for name in ARRAYS}
    return cls(
      vocabulary,
      arrays,
      num_passages=num_passages,
      passages_fingerprint=passages_fingerprint,
      settings=settings,
    )

  @classmethod
  def write(
    cls,
    path: epath.PathLike,
    passages: Iterable[Passage],
    *,
    passages_fingerprint: str,
    settings: Bm25Settings | None = None,
  ) -> "Bm25Index":
    """Builds the index in directory `path`, and opens it.

    The files are those of `build` and `save`, but the postings are never all
    in memory. It takes the distinct words of the corpus (as a search does), 4
    bytes per passage, and 0.3 GB for any number of passages.

    Args:
      path: a local directory. An older index is replaced; a process that has it
        open can go on reading it.
      passages: as in `build`, like the next two.
      passages_fingerprint: as in `build`.
      settings: as in `build`.

    Raises:
      ValueError: as `build`; or the directory holds other files, another
        process is writing there, or it is in a bucket.
      OSError: the disk is full.
    """
    settings = check_settings(settings or Bm25Settings())
    with building(path, kind="BM25 index", own=_is_own) as directory:
      artifacts.start_directory(directory)
      vocabulary, num_passages = _write_arrays(directory, passages, settings)
      _write_manifest(
        directory, vocabulary, num_passages, passages_fingerprint, settings
      )
    return cls.load(directory)

  def search(self, questions: Sequence[str], n_docs: int) -> Found:
    """Finds the passages with the largest scores.

    Args:
      questions: the texts of the questions.
      n_docs: how many passages to return per question (K).

    Returns:
      Passage ids [B, K] int32 and scores [B, K] float32, best first; of equal
      scores the smaller id. Passages without any word of the question are not
      returned: short rows are padded with id -1 and the lowest float32.

    Raises:
      ValueError: there are fewer passages than `n_docs`.
      TypeError: `questions` is one string.
    """
    _check_questions(questions)
    check_n_docs(n_docs, self.num_passages, "n_docs")
    best = [_best(self._all_scores(text), n_docs) for text in questions]
    return exact.stack_rows(best, n_docs)

  def score(
    self, questions: Sequence[str], ids: Int[np.ndarray, "B K"]
  ) -> Float[np.ndarray, "B K"]:
    """Returns the scores that `search` would give to the passages `ids`.

    Raises:
      ValueError: one of `ids` is no passage, or there is not one row per
        question.
      TypeError: `questions` is one string.
    """
    _check_questions(questions)
    if len(ids) != len(questions):
      raise ValueError(
        f"ids has {len(ids)} rows for {len(questions)} questions; expected one"
        " row of passages per question. Pass the ids of the same questions."
      )
    if ids.size and not 0 <= ids.min() <= ids.max() < self.num_passages:
      raise ValueError(
        f"ids has passages from {ids.min()} to {ids.max()}; expected 0 to"
        f" {self.num_passages - 1}, those of the BM25 index. Remove the ids -1,"
        " where nothing was found."
      )
    scores = [
      self._scores_of(text, row)
      for text, row in zip(questions, ids, strict=True)
    ]
    return np.array(scores, np.float32).reshape(ids.shape)

  def save(self, path: epath.PathLike) -> None:
    """Writes the index to directory `path`, its manifest last."""
    path = artifacts.start_directory(path)
    for name, array in self._arrays.items():
      save_array(path / f"{name}.npy", array)
    _write_manifest(
      path,
      list(self._vocabulary),
      self.num_passages,
      self.passages_fingerprint,
      self.settings,
    )

  @classmethod
  def load(
    cls, path: epath.PathLike, *, passages_fingerprint: str = ""
  ) -> "Bm25Index":
    """Opens what `save` wrote; the arrays stay on the disk until used.

    Args:
      path: the directory, wherever it was moved to.
      passages_fingerprint: of the passages that ids stand for; "" for any.

    Raises:
      FileNotFoundError: nothing was built there, or the build was interrupted.
      ValueError: files are missing, cut off or changed, the index has a newer
        format, or was built of other passages.
    """
    path = epath.Path(path)
    content = artifacts.read_manifest(
      path, kind=ARTIFACT, format=FORMAT, remedy=REMEDY
    )
    content.setdefault("word_rule", 1)  # format 1 has none
    bad = [k for k, t in _CONTENT.items() if not isinstance(content.get(k), t)]
    if "stop_words" not in bad and not all(
      isinstance(word, str) for word in content["stop_words"]
    ):
      bad.append("stop_words")
    if bad:
      raise ValueError(
        f"{path}/{artifacts.MANIFEST} describes no BM25 index:"
        f" {', '.join(bad)} missing or of the wrong type; expected"
        f" {', '.join(_CONTENT)}. {REMEDY}"
      )
    if not 0 <= content["num_passages"] < 1 << 31:  # they are int32
      raise ValueError(
        f"{path}/{artifacts.MANIFEST} says that there are"
        f" {content['num_passages']} passages; expected fewer than {1 << 31}."
        f" It was edited, or written by another program. {REMEDY}"
      )
    check_passages(
      f"The BM25 index at {path}",
      content["passages_fingerprint"],
      passages_fingerprint,
      REMEDY,
    )
    try:
      vocabulary = read_settings(path / _VOCABULARY)
    except ValueError as error:
      raise ValueError(
        f"{path / _VOCABULARY} is no list of words ({error}). {REMEDY}"
      ) from error
    settings = {
      f.name: content[f.name] for f in dataclasses.fields(Bm25Settings)
    }
    settings["stop_words"] = tuple(settings["stop_words"])
    return cls(
      vocabulary,
      open_arrays(path, vocabulary, REMEDY, content["num_passages"]),
      num_passages=content["num_passages"],
      passages_fingerprint=content["passages_fingerprint"],
      settings=check_settings(Bm25Settings(**settings)),
    )

  def _word_ids(self, question: str) -> list[int]:
    """Returns the ids of the words of a question that some passage has."""
    known = self._vocabulary
    return [known[word] for word in self._words(question) if word in known]

  def _all_scores(self, question: str) -> Float[np.ndarray, "P"]:
    word_ids = self._word_ids(question)
    if not word_ids:  # an error in bm25s, if the index has no words
      return np.zeros(self.num_passages, np.float32)
    return self._scorer.get_scores_from_ids(word_ids)

  def _scores_of(
    self, question: str, ids: Int[np.ndarray, "K"]
  ) -> Float[np.ndarray, "K"]:
    """Returns `_all_scores` at `ids`, without computing the other scores."""
    starts, passages = self._arrays["starts"], self._arrays["passages"]
    total = np.zeros(len(ids), np.float32)
    for word in self._word_ids(question):  # summed in the same order
      start, end = starts[word], starts[word + 1]
      holders = passages[start:end]  # in ascending order
      at = np.minimum(np.searchsorted(holders, ids), len(holders) - 1)
      found = self._arrays["scores"][start:end][at]
      total += np.where(holders[at] == ids, found, np.float32(0))
    return total


def _is_own(name: str) -> bool:
  """Returns whether `Bm25Index.write` creates files of this name."""
  arrays = [f"{array}.npy" for array in ARRAYS]
  return disk.is_unfinished(name) or name in (_VOCABULARY, *arrays)


def _write_arrays(
  directory: epath.Path, passages: Iterable[Passage], settings: Bm25Settings
) -> tuple[list[str], int]:
  """Writes the arrays; returns the vocabulary and the number of passages."""
  words = settings.word_tokenizer()
  with contextlib.closing(Postings(directory)) as postings:
    for passage in passages:
      postings.add(words(f"{passage.title}\n{passage.text}"))
    if not len(postings):
      raise ValueError(
        "There are no passages to index by their words; expected at least one."
        " Is data.passages empty?"
      )
    postings.write_arrays(settings.k1, settings.b)
    return list(postings.vocabulary), len(postings)


def _write_manifest(
  path: epath.Path,
  vocabulary: list[str],
  num_passages: int,
  passages_fingerprint: str,
  settings: Bm25Settings,
) -> None:
  """Writes the vocabulary and then the manifest."""
  artifacts.write_atomically(path / _VOCABULARY, json.dumps(vocabulary))
  content = dataclasses.asdict(settings) | {
    "num_passages": num_passages,
    "passages_fingerprint": passages_fingerprint,
    "stop_words": list(settings.stop_words),
  }
  artifacts.write_manifest(path, kind=ARTIFACT, format=FORMAT, content=content)


def check_settings(settings: Bm25Settings) -> Bm25Settings:
  """Returns `settings` if they are valid.

  Raises:
    ValueError: a value is out of range.
    TypeError: `stop_words` is one string.
  """
  settings.word_tokenizer()
  if not 0 <= settings.k1 <= _MAX_K1:
    raise ValueError(
      f"k1={shorten(settings.k1)} is not from 0 to {_MAX_K1:,}. Expected for"
      " instance 0.9 or 1.2; with 0 a word counts once, even if it is repeated."
    )
  if not 0 <= settings.b <= 1:
    raise ValueError(
      f"b={settings.b} is not from 0 to 1. Expected for instance 0.4 or 0.75;"
      " with 0 there is no penalty for long passages."
    )
  return settings


def read_stop_words(source: str) -> tuple[str, ...]:
  """Returns the stop words that the user asked for.

  Args:
    source: a language, such as "english", for its list in `bm25s`; a file with
      one word per line; or words separated by commas. "" for none.

  Raises:
    ValueError: `source` is probably a misspelt language or file.
  """
  import bm25s.stopwords

  lists = {
    name.removeprefix("STOPWORDS_").lower(): words
    for name, words in vars(bm25s.stopwords).items()
    if name.startswith("STOPWORDS_")
  }
  lists["english"] = lists.pop("en")
  del lists["en_plus"]
  if source in lists:
    return tuple(lists[source])
  if source and epath.Path(source).expanduser().is_file():
    return tuple(read_texts(source))
  close = difflib.get_close_matches(source, lists, n=1)
  if close or "/" in source:
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise ValueError(
      f"stop_words={source!r} is no file and no language whose stop words are"
      f" known. Expected one of {sorted(lists)}, a file, or words separated by"
      f" commas.{hint}"
    )
  return tuple(word.strip() for word in source.split(",") if word.strip())


def _check_questions(questions: Sequence[str]) -> None:
  if isinstance(questions, str):
    raise TypeError(
      f"questions={questions!r} is one string; expected a list of them. Pass"
      f" [{questions!r}]."
    )


def _best(
  scores: Float[np.ndarray, "P"], n_docs: int
) -> tuple[Int[np.ndarray, "K"], Float[np.ndarray, "K"]]:
  """Returns the ids of the largest scores, and the scores.

  Of equal scores the smaller id comes first. Scores of 0 are left out: these
  passages have no word of the question.
  """
  last = np.partition(scores, -n_docs)[-n_docs]
  above = np.flatnonzero(scores > last)
  # argpartition would choose arbitrary passages among those with this score.
  equal = np.flatnonzero(scores == last)[: n_docs - len(above)]
  above = above[np.argsort(-scores[above], kind="stable")]
  ids = np.concatenate([above, equal])
  ids = ids[scores[ids] > 0]
  return ids, scores[ids]
