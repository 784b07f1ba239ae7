"""Reads TFDS data sets without TensorFlow.

In: a name such as "beir/nfcorpus". Out: the passages of a BEIR data set, the
paragraphs of SQuAD, or the texts of any other data set whose builder needs no
TensorFlow. A data set is downloaded if needed, and read row by row.
"""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
from typing import Any, cast

from rag_jax.corpus.document import DEFAULT_FIELDS
from rag_jax.corpus.document import Document
from rag_jax.corpus.document import FieldNames
from rag_jax.corpus.document import record_document
from rag_jax.corpus.report import BadRecords
from rag_jax.corpus.text_files import shorten
from rag_jax.json_input import parse_json

TFDS = "tfds:"  # the prefix that tells TFDS names from paths

_TF_EXTRA = "`pip install 'rag_jax[tf]'`"


def tfds_text(value: str | bytes) -> str:
  """Returns the text of a TFDS feature."""
  # TFDS returns bytes from its files, and str from its mock data.
  return value.decode() if isinstance(value, bytes) else str(value)


def open_tfds(
  name: str, split: str | None
) -> Sequence[Any] | Mapping[str, Sequence[Any]]:
  """Returns the rows of a split, or of all splits by their name.

  Call it, and read rows, inside `tfds_errors`.
  """
  # Imported here: it is slow, and many users never need it.
  import tensorflow_datasets as tfds

  # Only ArrayRecord can be read without TensorFlow.
  kwargs = {"file_format": "array_record"}
  return cast(Any, tfds.data_source(name, split=split, builder_kwargs=kwargs))


@contextlib.contextmanager
def tfds_errors(name: str) -> Iterator[None]:
  """Explains the errors of TFDS, and what to do about them.

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
  # array_record raises RuntimeError for damaged files.
  except (ValueError, NotImplementedError, RuntimeError) as error:
    raise ValueError(
      f"{TFDS}{name} cannot be read ({error}). Expected complete files in the"
      " ArrayRecord format, the one that is read without TensorFlow, in"
      f" {constants.DATA_DIR}. Delete its folder {name} there, or set the"
      " environment variable TFDS_DATA_DIR to another place, and it is"
      " prepared again."
    ) from error
  except (
    OSError,  # for instance without a network
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
    # BEIR's other splits hold the questions, and repeat each passage for every
    # question that it answers.
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
  """Returns a row of beir/* as the record that it was in corpus.jsonl."""
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

  For `beir/*` these are the passages; for `squad` the paragraphs, each repeated
  for every question about it. For any other data set, they are the features
  that `fields` names, of all splits; without an id feature, the id is the split
  and the row, such as "train/7".

  Args:
    name: without "tfds:".
    fields: names of the features; not used for beir/* and squad.
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
      # The name is wrong, not the record: it is missing in every row.
      raise ValueError(
        f"{TFDS}{name} has no feature {fields.text!r}; it has {sorted(row)}."
        " Expected the name of one that holds text. Set the names of the"
        " fields."
      )
    with bad_records.refusing("bad_record"):
      if beir:
        record = _beir_record(row, where)
      else:
        record = {fields.id: f"{split}/{number}"} | row
      if squad:
        record["title"] = record["title"].replace("_", " ")
        del record["question"]
      yield record_document(record, fields, where)
