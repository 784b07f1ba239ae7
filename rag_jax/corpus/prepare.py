"""A corpus to passages: read, without duplicates, split, counted.

In: the path or name of a corpus, and how to split it. Out: its passages, one
after the other; memory does not grow with their number.
"""

from collections.abc import Iterator
import contextlib

from etils import epath

from rag_jax.corpus.document import DEFAULT_FIELDS
from rag_jax.corpus.document import Document
from rag_jax.corpus.document import FieldNames
from rag_jax.corpus.documents import read_documents
from rag_jax.corpus.duplicates import Seen
from rag_jax.corpus.passages import Passage
from rag_jax.corpus.passages import own_title
from rag_jax.corpus.report import BadRecords
from rag_jax.corpus.report import raise_empty
from rag_jax.corpus.splitting import Encoder
from rag_jax.corpus.splitting import SplitConfig
from rag_jax.corpus.splitting import Splitter


def read_passages(
  path: epath.PathLike,
  settings: SplitConfig,
  *,
  fields: FieldNames = DEFAULT_FIELDS,
  bad_records: BadRecords,
  tokenizer: Encoder | None = None,
  drop_duplicate_texts: bool = True,
) -> Iterator[Passage]:
  """Yields the passages of a corpus; every id is there once.

  What was read, split, cut and dropped stands in `bad_records.report`, which
  is complete when the last passage was drawn.

  Args:
    path: what `read_documents` reads.
    settings: how documents are split.
    fields: names of the fields of JSON and TFDS records.
    bad_records: what to do with a record that cannot be used, or whose id an
      earlier one has.
    tokenizer: counts tokens, if `settings.unit` is "tokens".
    drop_duplicate_texts: leave passages out whose title and text an earlier
      one has (a title that is but a file's name is none); they are counted,
      and never an error. False keeps them, as is needed where judgements name
      passages by id, as BEIR's.

  Raises:
    FileNotFoundError: there is no such file; names the nearest ones.
    ImportError: TFDS needs a package that is not installed.
    OSError: there is no room for temporary files.
    ValueError: a record cannot be used and `bad_records` says "fail" (names
      the file and line); the settings are not possible; or, at the end, there
      was no passage at all.
  """
  report = bad_records.report
  with contextlib.ExitStack() as stack:
    texts = Seen()
    stack.callback(texts.close)
    found = 0
    for document, passage in read_parts(
      path,
      settings,
      fields=fields,
      bad_records=bad_records,
      tokenizer=tokenizer,
    ):
      if drop_duplicate_texts:
        first = texts.add(document.where, own_title(passage), passage.text)
        if first:
          what = f"passage {passage.id!r} has the text of {first}"
          report.drop("duplicate_text", f"{document.where}: {what}")
          continue
      found += 1
      report.passages += 1
      yield passage
  if not found:
    raise_empty(str(path), report)


def read_parts(
  path: epath.PathLike,
  settings: SplitConfig,
  *,
  fields: FieldNames = DEFAULT_FIELDS,
  bad_records: BadRecords,
  tokenizer: Encoder | None = None,
) -> Iterator[tuple[Document, Passage]]:
  """Yields the passages of a corpus, each with its document.

  Every id is there once, texts as often as the corpus has them. Arguments and
  errors are those of `read_passages`; an empty corpus yields nothing.
  """
  report = bad_records.report
  splitter = Splitter(settings, tokenizer=tokenizer, report=report)
  with contextlib.ExitStack() as stack:
    ids = Seen()
    stack.callback(ids.close)

    def is_new(id: str, where: str) -> bool:
      first = ids.add(where, id)
      if first:
        error = ValueError(
          f"{where}: the id {id!r} is that of {first} too. Expected one"
          " passage an id. Rename or remove one of the two."
        )
        bad_records.refuse("duplicate_id", error)
      return not first

    for document in read_documents(
      path, fields=fields, bad_records=bad_records
    ):
      if not is_new(document.id, document.where):
        continue
      for passage in splitter.split(document):
        # "a#1" may be part of "a", or a document of that name.
        if passage.id == document.id or is_new(passage.id, document.where):
          yield document, passage
