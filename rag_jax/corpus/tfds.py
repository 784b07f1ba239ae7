"""Rows and documents of TFDS data sets, read without TensorFlow.

In: a name such as "beir/nfcorpus". Out: the passages of a BEIR data set, the
paragraphs of SQuAD, or the text of any other whose builder needs no
TensorFlow. Rows are downloaded if they are not there yet, and read one by one.
"""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
from typing import Any, cast

from rag_jax.corpus.document import DEFAULT_FIELDS
from rag_jax.corpus.document import Document
from rag_jax.corpus.document import FieldNames
from rag_jax.corpus.document import record_document
from rag_jax.corpus.records import shorten
from rag_jax.corpus.report import BadRecords
from rag_jax.json_input import parse_json

TFDS = "tfds:"  # begins the names of data sets where other sources are possible

_TF_EXTRA = "`pip install 'rag_jax[tf]'`"


def tfds_text(value: str | bytes) -> str:
  """Returns the text of a TFDS feature."""
  # TFDS returns bytes from its files, and str where it makes up examples.
  return value.decode() if isinstance(value, bytes) else str(value)


def open_tfds(
  name: str, split: str | None
) -> Sequence[Any] | Mapping[str, Sequence[Any]]:
  """Returns the rows of a split, or of all splits by their name.

  Call it, and read rows, inside `tfds_errors`.
  """
  # Slow, and of no use to those who bring their own texts.
  import tensorflow_datasets as tfds

  # ArrayRecord: TFDS reads its default format with TensorFlow alone.
  kwargs = {"file_format": "array_record"}
  return cast(Any, tfds.data_source(name, split=split, builder_kwargs=kwargs))


@contextlib.contextmanager
def tfds_errors(name: str) -> Iterator[None]:
  """Says what is wrong when rows cannot be had, and what to do about it.

  Raises:
    FileNotFoundError: the data set is not here and could not be downloaded.
    ImportError: TFDS needs a package that is not installed.
    ValueError: there is no such data set without TensorFlow, or its files are
      damaged or in a format that needs it.
  """
  from tensorflow_datasets.core import constants
  from tensorflow_datasets.core import download
  from tensorflow_datasets.core import registered
  from tensorflow_datasets.core.download import download_manager

  try:
    yield
  except ImportError as error:
    package = error.name or str(error)
    pip = "'rag_jax[tf]'" if package == "tensorflow" else package
    raise ImportError(
      f"{TFDS}{name} cannot be prepared: TFDS needs the Python package"
      f" {package}, which is not installed. Run `pip install {pip}`.",
      name=error.name,
    ) from error
  except registered.DatasetNotFoundError as error:
    raise ValueError(
      f"{TFDS}{name} is not a data set that TFDS finds. Expected the name of"
      " one whose builder needs no TensorFlow, such as beir/nfcorpus: TFDS"
      " hides all others where TensorFlow is not installed. Correct the name,"
      f" or run {_TF_EXTRA}."
    ) from error
  # RuntimeError: of array_record, whose files are damaged.
  except (ValueError, NotImplementedError, RuntimeError) as error:
    raise ValueError(
      f"{TFDS}{name} cannot be read ({error}). Expected complete files in the"
      " ArrayRecord format, the one that is read without TensorFlow, in"
      f" {constants.DATA_DIR}. Delete its folder {name} there, or set the"
      " environment variable TFDS_DATA_DIR to another place, and it is"
      " prepared again."
    ) from error
  except (
    OSError,  # no network is one
    download.DownloadError,
    download_manager.NonMatchingChecksumError,
  ) as error:
    command = (
      'python -c "import tensorflow_datasets as tfds;'
      f" tfds.data_source('{name}')\""
    )
    raise FileNotFoundError(
      f"{TFDS}{name} is not prepared on this machine and could not be"
      f" downloaded ({type(error).__name__}: {error}). Expected it in"
      f" {constants.DATA_DIR}. On a machine with a network run `{command}` and"
      f" copy the folder ~/tensorflow_datasets/{name} that it makes to that"
      " place, or to the one that TFDS_DATA_DIR names."
    ) from error


def _rows(name: str) -> Iterator[tuple[str, int, dict[str, Any]]]:
  """Yields (split, number, row), text as str."""
  with tfds_errors(name):
    # The other splits of BEIR hold the questions, and each passage again for
    # every question that it answers.
    split = "passage" if name.startswith("beir/") else None
    source = open_tfds(name, split)
    splits = source if isinstance(source, Mapping) else {split or "": source}
    for key in sorted(splits):
      rows = cast(Sequence[Any], splits[key])
      for number in range(len(rows)):
        row = {
          k: tfds_text(v) if isinstance(v, str | bytes) else v
          for k, v in rows[number].items()
        }
        yield key, number, row


def _beir_record(row: Mapping[str, Any], where: str) -> dict[str, Any]:
  """Returns a row of beir/* as the line of corpus.jsonl that it was."""
  try:
    metadata = parse_json(row["passage_metadata"] or "{}")
  except ValueError:
    metadata = None
  if not isinstance(metadata, dict):
    raise ValueError(
      f"{where}: passage_metadata is {shorten(row['passage_metadata'])}."
      " Expected a JSON object, as in BEIR's corpus.jsonl. Delete the prepared"
      " data set, and it is prepared again; or have it skipped:"
      " rag-jax build-index --on_bad_record=skip."
    )
  return {
    "_id": row["passage_id"],
    "title": metadata.pop("title", ""),
    "text": row["passage"],
    "metadata": metadata,
  }


def read_tfds_documents(
  name: str, fields: FieldNames, bad_records: BadRecords
) -> Iterator[Document]:
  """Yields the documents of a TFDS data set, in the order of its files.

  Of `beir/*` the passages; of `squad` the paragraphs, each once for every
  question about it. Of others, of all splits, the features that `fields`
  names; without an id the documents are numbered, as in "train/7".

  Args:
    name: without "tfds:".
    fields: names of the features, but for beir/* and squad.
    bad_records: what to do with a row without text, or with other types.

  Raises:
    FileNotFoundError: the data set is not here and could not be downloaded.
    ImportError: TFDS needs a package that is not installed.
    ValueError: there is no such data set without TensorFlow, its files are
      damaged, or it has no feature of the name of the text.
  """
  beir, squad = name.startswith("beir/"), name.split("/")[0] == "squad"
  if squad:
    fields = FieldNames(text="context")
  elif beir:
    fields = DEFAULT_FIELDS
  for split, number, row in _rows(name):
    where = f"{TFDS}{name}:{split}[{number}]"
    if not beir and fields.text not in row:
      # The same in every row: not a bad record but a wrong name.
      raise ValueError(
        f"{TFDS}{name} has no feature {fields.text!r}; it has {sorted(row)}."
        " Expected the name of one that holds text. Set the names of the"
        " fields."
      )
    try:
      if beir:
        record = _beir_record(row, where)
      else:
        record = {fields.id: f"{split}/{number}"} | row
      if squad:
        record["title"] = record["title"].replace("_", " ")
        del record["question"]
      document = record_document(record, fields, where)
    except ValueError as error:
      bad_records.refuse("bad_record", error)
      continue
    yield document
