"""Documents that can be searched, from Python.

In: documents and an encoder, or the directory that was built from them. Out:
the passages that answer a question.
"""

from collections.abc import Sequence
import os

from etils import epath

from rag_jax.api.arguments import check_type
from rag_jax.api.arguments import path_of
from rag_jax.api.arguments import texts_of
from rag_jax.evaluation.search_modes import fit_search_modes
from rag_jax.retrieval.certificate import Certificate
from rag_jax.retrieval.certificate import SearchModes
from rag_jax.search.build import BuildConfig
from rag_jax.search.build import build_search_directory
from rag_jax.search.changes import UpdateReport
from rag_jax.search.compact import compact_search_directory
from rag_jax.search.directory import Hit
from rag_jax.search.directory import OpenedDirectory
from rag_jax.search.reranker import Reranker
from rag_jax.search.update import update_search_directory

_PATH = "a directory that SearchDirectory.build wrote, such as 'runs/documents'"
_OUTPUT = "a directory to write, for instance 'runs/documents'"
_CORPUS = "a folder or file of documents, for instance 'documents/'"
_ENCODER = (
  "an encoder: a directory, or a name of the hub such as"
  " 'hf:sentence-transformers/all-MiniLM-L6-v2'"
)


class SearchDirectory(OpenedDirectory):
  """Documents that can be searched: passages, encoder, index and words.

  The attributes are those of `OpenedDirectory`.
  """

  def __init__(self, path: epath.PathLike):
    """Opens what `build` wrote, and its newest update; all digests are checked.

    Raises:
      FileNotFoundError: nothing was built there, or the build was interrupted.
      ValueError: a file is missing, cut off or changed.
      TypeError: `path` is no path.
    """
    super().__init__(path_of("path", path, _PATH))

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

    The same call again continues an interrupted build.

    Args:
      corpus: a folder of text, Markdown or HTML files (with the extra
        `documents` also .pdf, .docx, .rst and .ipynb), a file of records
        (.jsonl, .json, .csv, .tsv), or "tfds:NAME".
      encoder: the checkpoint that embeds the passages: a directory or
        "hf:ORG/NAME" of a DPR, BERT or sentence-transformers model.
      path: the directory to write; local.
      config: how documents are split, embedded and indexed; None: the defaults.
      question_encoder: the checkpoint that embeds the questions, for DPR; "":
        `encoder`.
      questions: the index's recall is measured with them; none: with passages.
      wait: for another process that builds there; False: raise.

    Raises:
      FileNotFoundError: corpus or encoder do not exist.
      ValueError: one of them cannot be used; a setting is not possible; or the
        directory holds other files, was built from other inputs, or is being
        built.
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

  @property
  def certificate(self) -> Certificate | None:
    """What the index was measured to find; `print(certificate.table())`."""
    return self.index.certificate

  def search(
    self,
    questions: str | Sequence[str],
    n_docs: int = 5,
    *,
    mode: str = "dense",
    filters: Sequence[str] = (),
    reranker: Reranker | None = None,
  ) -> list[list[Hit]]:
    """Returns, for each question, the best passages, best first.

    Args:
      questions: one as text, or several.
      n_docs: passages per question. There are fewer if fewer exist, meet the
        filters or, with "bm25", share a word with the question.
      mode: "dense": inner products of embeddings; "bm25": words; "hybrid":
        both, with the weights that `fit_hybrid` found, or else by reciprocal
        ranks; "best": the best mode according to `fit_hybrid`, or else "dense".
      filters: on the metadata of passages: "lang=en", "year>=1999".
      reranker: a `rag_jax.Reranker`, which chooses from its `candidates` that
        the mode finds; the scores are then its logits. None: no second stage.

    Raises:
      ValueError: `n_docs` is below 1 or above the candidates, a question is
        empty, a filter is not understood, or there is no such mode.
      TypeError: an argument is of another type.
    """
    check_type("n_docs", n_docs, int, "a number of passages, such as 5")
    if reranker is not None:
      check_type("reranker", reranker, Reranker, "rag_jax.Reranker.open(...)")
    return super().search(
      texts_of("questions", questions),
      n_docs,
      mode=mode,
      filters=texts_of("filters", filters),
      reranker=reranker,
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
    """Adds, replaces and deletes documents, and searches the new version.

    Only what changed is embedded. Another process that has the directory open
    continues to search what it opened, until it calls `reload`.

    Args:
      upsert: documents, as `corpus` of `build`. A document replaces all
        passages of the document with its id; in a folder, the id is the path in
        the folder. Other documents stay.
      delete: ids of documents, or of single passages.
      encoder: the checkpoint that embedded the passages; for DPR only.
      on_bad_record: "fail" or "skip"; "": as in the build.
      questions: the index's recall is measured with them; none: with passages.
      wait: for another process that writes there; False: raise.

    Raises:
      FileNotFoundError: documents or encoder do not exist.
      ValueError: there is nothing to do; an id does not exist, or is both
        replaced and deleted; no passage would be left; the encoder has other
        weights; a document cannot be read; or another process writes there.
        Nothing was changed.
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

    Nothing is embedded again. Arguments and errors as in `update`.
    """
    asked = texts_of("questions", questions)
    left = compact_search_directory(self.path, questions=asked, wait=wait)
    self.reload()
    return left

  def fit_hybrid(
    self, questions: epath.PathLike, *, wait: bool = False
  ) -> SearchModes:
    """Fits the weights of hybrid search, finds the best mode, and stores both.

    Args:
      questions: a file of 20 questions or more, with the ids of the passages
        that answer them ("gold") or with answers.
      wait: for another process that writes there; False: raise.

    Raises:
      FileNotFoundError: the file does not exist.
      ValueError: words are not indexed; for fewer than 20 questions a relevant
        passage is found; or another process writes there.
      TypeError: `questions` is no path.
    """
    file = path_of("questions", questions, "a file of questions")
    modes = fit_search_modes(self.path, file, wait=wait)
    self.reload()
    return modes
