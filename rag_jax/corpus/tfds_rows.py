"""Rows of TFDS data sets, read without TensorFlow.

In: the name of a data set. Out: its rows, downloaded if they are not there
yet; or an error that says what is missing.
"""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
from typing import Any, cast

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
