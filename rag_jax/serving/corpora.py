"""Opens the corpus to answer from: a search directory, documents, or passages.

In: the name of a corpus. Out: its passages.
"""

import pathlib

from absl import logging
from etils import epath

from rag_jax import artifacts
from rag_jax.corpus.passages import PassageList
from rag_jax.corpus.passages import Passages
from rag_jax.corpus.reading import is_passages
from rag_jax.corpus.reading import load_passages
from rag_jax.corpus.reading import read_passages
from rag_jax.corpus.report import BadRecords
from rag_jax.corpus.splitting import SplitConfig
from rag_jax.search.directory import ENCODER
from rag_jax.search.directory import SearchDirectory
from rag_jax.search.versions import PASSAGES


def is_search_directory(corpus: epath.PathLike) -> bool:
  """Returns whether `corpus` is what tools/build_index.py wrote."""
  if not str(corpus) or not artifacts.is_local(corpus):
    return False
  path = pathlib.Path(corpus).expanduser()
  parts = (path / PASSAGES, path / ENCODER)
  return (path / artifacts.MANIFEST).exists() and all(p.is_dir() for p in parts)


def open_corpus(corpus: epath.PathLike) -> Passages:
  """Returns the passages of `corpus`.

  Args:
    corpus: passages, named as in the setting data.passages; or a search
      directory, whose newest version is opened; or documents, a folder or file
      that `corpus.documents.read_documents` reads, which are split into
      passages of 100 words.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: a record cannot be used, with its file and line; or there are
      no records.
  """
  if is_search_directory(corpus):
    return SearchDirectory(corpus).passages
  if is_passages(str(corpus)):
    return load_passages(str(corpus))
  bad_records = BadRecords("fail")
  # Equal texts become one passage.
  passages = list(
    read_passages(str(corpus), SplitConfig(), bad_records=bad_records)
  )
  logging.info(
    "%d passages of %s:\n%s", len(passages), corpus, bad_records.report
  )
  return PassageList(passages, origin=str(corpus))
