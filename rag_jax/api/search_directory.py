"""Documents that can be searched, from Python.

In: documents and an encoder, or the directory that was built of them. Out: the
passages that answer a question.
"""

from collections.abc import Sequence
import dataclasses
import os
from typing import Any

from etils import epath

from rag_jax.api.arguments import check_type
from rag_jax.api.arguments import path_of
from rag_jax.api.arguments import texts_of
from rag_jax.corpus.store import PassageStore
from rag_jax.evaluation.search_modes import fit_search_modes
from rag_jax.retrieval.bm25 import Bm25Settings
from rag_jax.retrieval.bm25 import check_settings
from rag_jax.retrieval.bm25 import read_stop_words
from rag_jax.retrieval.certificate import Certificate
from rag_jax.retrieval.certificate import SearchModes
from rag_jax.retrieval.filters import parse_conditions
from rag_jax.search import directory
from rag_jax.search.build import BuildConfig
from rag_jax.search.build import build_search_directory
from rag_jax.search.changes import UpdateReport
from rag_jax.search.compact import compact_search_directory
from rag_jax.search.directory import Hit
from rag_jax.search.update import update_search_directory
from rag_jax.search.updated_passages import UpdatedPassages

_PATH = "a directory that SearchDirectory.build wrote, such as 'runs/documents'"
_OUTPUT = "a directory to write, for instance 'runs/documents'"
_CORPUS = "a folder or file of documents, for instance 'documents/'"
_ENCODER = (
  "an encoder: a directory, or a name of the hub such as"
  " 'hf:sentence-transformers/all-MiniLM-L6-v2'"
)


class SearchDirectory:
  """Documents that can be searched: passages, encoder, index and words.

  Attributes:
    path: of the directory.
  """

  def __init__(self, path: epath.PathLike):
    """Opens what `build` wrote, and its newest update; all digests are checked.

    Raises:
      FileNotFoundError: nothing was built there, or its build was cut off.
      ValueError: a file is missing, cut off or changed.
      TypeError: `path` is no path.
    """
    self._opened = directory.SearchDirectory(path_of("path", path, _PATH))
    self.path = self._opened.path

  @classmethod
  def open(cls, path: epath.PathLike) -> "SearchDirectory":
    """Returns the directory at `path`; arguments and errors as `__init__`."""
    return cls(path)

  @classmethod
  def build(
    cls,
    corpus: epath.PathLike,
    encoder: epath.PathLike,
    path: epath.PathLike,
    config: BuildConfig | None = None,
    *,
    question_encoder: epath.PathLike = "",
    questions: Sequence[str] = (),
    wait: bool = False,
  ) -> "SearchDirectory":
    """Makes documents searchable, and returns the directory.

    A build that was interrupted continues when it is called again with the same
    arguments.

    Args:
      corpus: a folder of text, Markdown or HTML files (with the extra
        `documents` also .pdf, .docx, .rst and .ipynb), a file of records
        (.jsonl, .json, .csv, .tsv), or "tfds:NAME".
      encoder: embeds the passages: a directory or "hf:ORG/NAME" of a DPR, BERT
        or sentence-transformers model.
      path: the directory to write; local.
      config: how documents are split, embedded and indexed; None: the defaults.
      question_encoder: embeds the questions, for DPR; "": `encoder`.
      questions: the index's recall is measured with them; none: passages.
      wait: for another process that builds there; False: raise.

    Raises:
      FileNotFoundError: corpus or encoder is not there.
      ValueError: one of them cannot be used, a setting is not possible, or the
        directory holds something else or is being built.
      TypeError: an argument is of another type.
      OSError: the disk is full, or nothing may be written there.
    """
    config = BuildConfig() if config is None else config
    check_type("config", config, BuildConfig, "a rag_jax.BuildConfig, or None")
    check_type(
      "question_encoder", question_encoder, (str, os.PathLike), _ENCODER
    )
    build_search_directory(
      path_of("corpus", corpus, _CORPUS),
      path_of("encoder", encoder, _ENCODER),
      path_of("path", path, _OUTPUT),
      config,
      question_encoder=os.fspath(question_encoder),
      questions=texts_of("questions", questions),
      wait=wait,
    )
    return cls(path)

  def __len__(self) -> int:
    """Returns the number of passages."""
    return len(self.passages)

  @property
  def passages(self) -> PassageStore | UpdatedPassages:
    """The passages: `directory.passages[0].text`."""
    return self._opened.passages

  @property
  def certificate(self) -> Certificate | None:
    """What the index was measured to find; `print(certificate.table())`."""
    return self._opened.index.certificate

  def search(
    self,
    questions: str | Sequence[str],
    n_docs: int = 5,
    *,
    mode: str = "dense",
    filters: Sequence[str] = (),
  ) -> list[list[Hit]]:
    """Returns, for each question, the best passages, best first.

    Args:
      questions: one as text, or several.
      n_docs: passages per question; fewer if fewer are there, meet the filters
        or, by words, share a word with the question.
      mode: "dense": embeddings; "bm25": words; "hybrid": both, by the weights
        that `fit_hybrid` found, or else by reciprocal ranks; "best": the mode
        that `fit_hybrid` found to be the best, or else "dense".
      filters: on the metadata of passages: "lang=en", "year>=1999".

    Raises:
      ValueError: `n_docs` is below 1, a question is empty, a filter is not
        understood, or there is no such mode.
      TypeError: an argument is of another type.
    """
    check_type("n_docs", n_docs, int, "a number of passages, such as 5")
    return self._opened.search(
      texts_of("questions", questions),
      n_docs,
      mode=mode,
      conditions=parse_conditions(texts_of("filters", filters)),
    )

  def update(
    self,
    *,
    upsert: epath.PathLike = "",
    delete: str | Sequence[str] = (),
    encoder: epath.PathLike = "",
    on_bad_record: str = "",
    questions: Sequence[str] = (),
    wait: bool = False,
  ) -> UpdateReport:
    """Puts documents in, takes others out, and searches the result from now on.

    Only what changed is embedded. Another process that has the directory open
    continues to search what it opened, until it calls `reload`.

    Args:
      upsert: documents, as `corpus` of `build`. A document replaces the one of
        its id; in a folder, the id is the path in it. Others stay.
      delete: ids of documents, or of single passages.
      encoder: that embedded the passages, for DPR alone.
      on_bad_record: "fail" or "skip"; "": as it was built.
      questions: the index's recall is measured with them; none: passages.
      wait: for another process that writes there; False: raise.

    Raises:
      FileNotFoundError: the documents or the encoder are not there.
      ValueError: there is nothing to do, no such id, a document cannot be read,
        or another process writes there. Nothing was changed.
      TypeError: an argument is of another type.
      OSError: the disk is full, or nothing may be written there.
    """
    check_type("upsert", upsert, (str, os.PathLike), _CORPUS)
    check_type("encoder", encoder, (str, os.PathLike), _ENCODER)
    report = update_search_directory(
      self.path,
      upsert=os.fspath(upsert),
      delete=texts_of("delete", delete),
      encoder=os.fspath(encoder),
      on_bad_record=on_bad_record,
      questions=texts_of("questions", questions),
      wait=wait,
    )
    self.reload()
    return report

  def compact(
    self, *, questions: Sequence[str] = (), wait: bool = False
  ) -> int:
    """Removes deleted texts from the files; returns how many passages are left.

    Arguments and errors as in `update`.
    """
    asked = texts_of("questions", questions)
    left = compact_search_directory(self.path, questions=asked, wait=wait)
    self.reload()
    return left

  def fit_hybrid(
    self, questions: epath.PathLike, *, wait: bool = False
  ) -> SearchModes:
    """Fits the weights of hybrid search, finds the best mode, and keeps both.

    Args:
      questions: a file of 20 or more, with the ids of the passages that answer
        them ("gold") or with answers.
      wait: for another process that writes there; False: raise.

    Raises:
      FileNotFoundError: the file is not there.
      ValueError: words are not indexed, too few questions have a passage of use
        among those that are found, or another process writes there.
      TypeError: `questions` is no path.
    """
    file = path_of("questions", questions, "a file of questions")
    modes = fit_search_modes(self.path, file, wait=wait)
    self.reload()
    return modes

  def set_words(self, **settings: str | float) -> None:
    """Searches words by other settings, as long as this is open.

    Args:
      **settings: as `word_settings`.

    Raises:
      ValueError: a setting is out of its range.
    """
    self._opened.set_words(lambda old: word_settings(old, **settings))

  def reload(self) -> bool:
    """Switches to the newest update; returns whether there was a newer one.

    Raises:
      ValueError: a file is missing, cut off or changed; what was open stays
        open.
    """
    return self._opened.reload()


def word_settings(
  defaults: Bm25Settings | None = None, **settings: str | float
) -> Bm25Settings:
  """Returns settings of BM25, for `BuildConfig.words`.

  Args:
    defaults: of those that are not given.
    **settings: `k1` (how much a word counts that is there again), `b` (how much
      long passages are marked down, 0 to 1), `stemmer` (the language whose word
      endings are cut off), `stop_words` (a language, a file, or words between
      commas).

  Raises:
    ValueError: a setting is out of its range.
    TypeError: there is no such setting.
  """
  values: dict[str, Any] = dict(settings)
  if "stop_words" in values:
    values["stop_words"] = read_stop_words(values["stop_words"])
  return check_settings(
    dataclasses.replace(defaults or Bm25Settings(), **values)
  )
