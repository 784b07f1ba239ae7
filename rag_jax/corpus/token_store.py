"""Stores the tokens of passages on the disk, for one tokenizer and length.

In: passages and a tokenizer. Out: a directory of arrays that are mapped into
memory as `TokenizedPassages`, so that 21 million passages are tokenised once
and need no memory. An interrupted call continues where it stopped.
"""

from collections.abc import Sequence
import contextlib
import json
from typing import Any

from absl import logging
from etils import epath
import numpy as np

from rag_jax import artifacts
from rag_jax.corpus.npy_files import ArrayRows
from rag_jax.corpus.npy_files import read_array
from rag_jax.corpus.passages import Passage
from rag_jax.corpus.passages import Passages
from rag_jax.corpus.passages import fingerprint_passages
from rag_jax.corpus.tokenized import PLAIN
from rag_jax.corpus.tokenized import JoinedBy
from rag_jax.corpus.tokenized import TokenizedPassages
from rag_jax.corpus.tokenized import TokenRows
from rag_jax.corpus.tokenized import Wording
from rag_jax.corpus.tokenized import find_joining
from rag_jax.corpus.tokenized import tokenize_rows
from rag_jax.corpus.tokenizer import Tokenizer
from rag_jax.directory_lock import building
from rag_jax.disk import UnwritableError
from rag_jax.disk import is_unfinished
from rag_jax.progress import Progress

KIND = "tokens"
FORMAT = 1  # raise when the files or the manifest change their meaning

_REMEDY = "Copy the directory again, or remove it and call write_tokens again."
_ARRAYS = ("tokens", "begins_word", "lengths")
_COUNTS = ("num_cut", "num_by_ids", "num_tokens", "num_lost")
_PROGRESS = ".progress.json.tmp"  # named like other unfinished files
_BLOCK_ROWS = 1024  # passages in memory at a time
_PROGRESS_ROWS = 1 << 16  # rows between notes of the progress
_JOINED = {
  "ids": "the ids of title and text, each tokenised alone",
  "text": (
    "the ids of title and text tokenised as one string, since on a sample they"
    " were others than those of each alone"
  ),
}


def _is_own(name: str) -> bool:
  """Returns whether a file has a name that this module writes."""
  return name in [f"{array}.npy" for array in _ARRAYS] or is_unfinished(name)


def _identity(
  passages: Sequence[Passage],
  tokenizer: Tokenizer,
  length: int,
  wording: Wording,
) -> dict[str, Any]:
  """Returns everything that the rows depend on."""
  identity = {
    "passages": passages.fingerprint
    if isinstance(passages, Passages)
    else fingerprint_passages(passages),
    "num_passages": len(passages),
    "tokenizer": tokenizer.fingerprint,
    "special_ids": [tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id],
    "length": length,
  }
  if wording.of_passages != PLAIN.of_passages:
    identity["wording"] = list(wording.of_passages)
  return identity


# For messages: what differs, and what to use instead.
_NAMES = {
  "passages": ("other passages (fingerprint)", "the same passages"),
  "num_passages": ("another number of passages", "the same passages"),
  "tokenizer": ("another tokenizer (fingerprint)", "the same tokenizer"),
  "special_ids": ("other special tokens (ids)", "the same tokenizer"),
  "length": ("another length", "the same passage length"),
  "wording": (
    "another prompt or separator of titles",
    "the same encoder.passage_prompt and encoder.title_sep",
  ),
}


def open_tokens(
  directory: epath.PathLike,
  passages: Sequence[Passage],
  tokenizer: Tokenizer,
  length: int,
  wording: Wording = PLAIN,
) -> TokenizedPassages:
  """Opens a directory that `write_tokens` wrote, mapped into memory.

  Arguments are those of `write_tokens`; the directory may have been moved.

  Raises:
    FileNotFoundError: nothing was written there, or it was interrupted.
    ValueError: a file is missing, cut off or changed; or other passages,
      another tokenizer or another length were used.
  """
  directory = epath.Path(directory)
  if not artifacts.is_local(directory):
    raise ValueError(
      f"The tokens in {directory} cannot be mapped into memory from a bucket."
      " Expected a local directory. Copy it to a disk first, for instance with"
      " `gcloud storage cp -r`."
    )
  content = artifacts.read_manifest(
    directory, kind=KIND, format=FORMAT, remedy=_REMEDY
  )
  content.check(num_cut=int, num_by_ids=int)
  if content.get("joined_by") not in _JOINED:
    raise ValueError(
      f"{directory}/{artifacts.MANIFEST} says {content.get('joined_by')!r}"
      " about how title and text are joined; expected one of"
      f" {list(_JOINED)}. {_REMEDY}"
    )
  theirs = content.get("made_of")
  ours = _identity(passages, tokenizer, length, wording)
  if not isinstance(theirs, dict):
    theirs = {}
  for key, (name, same) in _NAMES.items():
    value = ours.get(key)
    if theirs.get(key) != value:
      raise ValueError(
        f"The tokens in {directory} were made with {name}:"
        f" {theirs.get(key)!r}, but {value!r} is in use. Expected them to be"
        f" the same. Use {same}, or write tokens to another directory."
      )
  tokens, begins_word, lengths = (
    read_array(directory / f"{array}.npy", _REMEDY) for array in _ARRAYS
  )
  joined_by: JoinedBy = content["joined_by"]
  rows = TokenRows(
    tokens,
    begins_word,
    lengths,
    content["num_cut"],
    content["num_by_ids"],
    num_tokens=content.get("num_tokens"),  # older versions did not count
    num_lost=content.get("num_lost"),
  )
  return TokenizedPassages.of_rows(passages, tokenizer, rows, joined_by)


class _Files:
  """The arrays that are written, and the progress."""

  def __init__(
    self,
    directory: epath.Path,
    identity: dict[str, Any],
    width: int,
    largest_id: int,
  ):
    """Opens the arrays after the rows that an interrupted writer left."""
    self._directory = directory
    self._identity = identity
    # Rows that are done, and the counts of `TokenRows`.
    self.progress: dict[str, int] = dict.fromkeys(("num_done", *_COUNTS), 0)
    num = identity["num_passages"]
    small = largest_id <= np.iinfo(np.uint16).max
    self._shapes = {
      "tokens": ((num, width), np.uint16 if small else np.int32),
      "begins_word": ((num, width), np.bool_),
      "lengths": ((num,), np.int32),
    }
    self._arrays: dict[str, ArrayRows] = {}
    done = self._read_progress()
    try:
      self._open(done["num_done"])
      self.progress = done
    except (ValueError, FileNotFoundError) as error:
      logging.warning("The interrupted work is started again: %s", error)
      self._open(0)

  def _read_progress(self) -> dict[str, int]:
    """Returns the progress of an interrupted writer of the same rows."""
    path = self._directory / _PROGRESS
    if not path.exists():
      return self.progress
    saved = json.loads(path.read_text())
    same = saved["made_of"] == self._identity
    # Older versions had fewer counts.
    if not same or saved["progress"].keys() != self.progress.keys():
      return self.progress
    return saved["progress"]

  def _open(self, num_done: int) -> None:
    self.close()
    for name, (shape, dtype) in self._shapes.items():
      path = self._directory / f"{name}.npy"
      self._arrays[name] = ArrayRows(path, shape, dtype, num_done=num_done)

  def append(self, rows: TokenRows) -> None:
    """Writes rows; notes the progress every `_PROGRESS_ROWS` rows."""
    for name, array in self._arrays.items():
      array.append(getattr(rows, name))
    before = self.progress["num_done"]
    self.progress["num_done"] += len(rows.lengths)
    for name in _COUNTS:
      self.progress[name] += getattr(rows, name) or 0
    if before // _PROGRESS_ROWS != self.progress["num_done"] // _PROGRESS_ROWS:
      self._flush()  # before the note, which must not be ahead of the rows
      note = {"made_of": self._identity, "progress": self.progress}
      artifacts.write_atomically(self._directory / _PROGRESS, json.dumps(note))

  def _flush(self) -> None:
    for array in self._arrays.values():
      array.flush()

  def finish(self) -> None:
    """Waits until all rows are on the disk."""
    self._flush()
    self.close()
    (self._directory / _PROGRESS).unlink(missing_ok=True)

  def close(self) -> None:
    """Closes the arrays, complete or not."""
    for array in self._arrays.values():
      with contextlib.suppress(OSError):
        array.close()
    self._arrays.clear()


def write_tokens(
  directory: epath.PathLike,
  passages: Sequence[Passage],
  tokenizer: Tokenizer,
  length: int,
  wording: Wording = PLAIN,
  *,
  wait: bool = False,
) -> TokenizedPassages:
  """Writes the tokens of `passages` to a directory and returns them.

  Memory does not grow with the number of passages. A complete directory is only
  opened, and an interrupted one is completed; the result is the same.

  Args:
    directory: a local directory; empty, or written by this function.
    passages: a store, or any other sequence.
    tokenizer: for the ids.
    length: tokens per row, with the start token; longer passages are cut.
    wording: how the passages are read.
    wait: if another process writes there, wait for it and open its result.

  Raises:
    ValueError: the directory holds other files; or another process writes there
      and `wait` is False.
    OSError: the disk is full.
  """
  with building(
    directory, kind="token store", own=_is_own, wait=wait
  ) as directory:
    if not (directory / artifacts.MANIFEST).exists():
      _write(directory, passages, tokenizer, length, wording)
  return open_tokens(directory, passages, tokenizer, length, wording)


def keep_tokens(
  folder: epath.PathLike,
  passages: Sequence[Passage],
  tokenizer: Tokenizer,
  length: int,
  wording: Wording = PLAIN,
) -> TokenizedPassages:
  """Returns the tokens of `passages` from a cache, which is filled if needed.

  For each combination of passages, tokenizer and length the cache has a
  directory. One process writes it while others wait; if it dies, the next one
  continues. The folder can be deleted when nobody uses it.

  Arguments are those of `write_tokens`; `folder` is local.

  Raises:
    ValueError: the folder is in a bucket, or a file there is damaged.
    OSError: the folder cannot be written to.
  """
  folder = epath.Path(folder)
  if not artifacts.is_local(folder):
    raise ValueError(
      f"The passages' tokens cannot be kept in {folder}, a bucket: they are"
      " mapped into memory. Expected a local folder. Set data.token_cache to"
      " one, for instance beside the passages."
    )
  identity = _identity(passages, tokenizer, length, wording)
  directory = folder / artifacts.fingerprint_lines([json.dumps(identity)])
  if (directory / artifacts.MANIFEST).exists():  # the disk may be read-only
    return open_tokens(directory, passages, tokenizer, length, wording)
  try:
    directory.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UnwritableError(
      f"The passages' tokens cannot be kept in {folder} ({error}). Expected a"
      " folder that can be written to. Set data.token_cache to one, or change"
      " the permissions of this one."
    ) from error
  return write_tokens(
    directory, passages, tokenizer, length, wording, wait=True
  )


def _write(
  directory: epath.Path,
  passages: Sequence[Passage],
  tokenizer: Tokenizer,
  length: int,
  wording: Wording = PLAIN,
) -> None:
  """Writes all arrays and the manifest."""
  identity = _identity(passages, tokenizer, length, wording)
  joined_by = find_joining(passages, tokenizer, wording)
  width = length - (tokenizer.bos_id is not None)
  files = None
  num_done = 0
  try:
    files = _Files(directory, identity, width, tokenizer.largest_id)
    num_done = files.progress["num_done"]
    if num_done:
      logging.info(
        "%d of %d passages were tokenised in %s before; continuing there.",
        *(num_done, len(passages), directory),
      )
    with Progress("Tokenised", len(passages), "passages", num_done) as progress:
      while num_done < len(passages):
        block = passages[num_done : num_done + _BLOCK_ROWS]
        files.append(
          tokenize_rows(block, tokenizer, length, joined_by, wording)
        )
        num_done += len(block)
        progress.update(len(block))
    files.finish()
    counts = files.progress
    artifacts.write_manifest(
      directory,
      kind=KIND,
      format=FORMAT,
      content={
        "made_of": identity,
        "joined_by": joined_by,
        "joined_by_means": _JOINED[joined_by],
        **{name: counts[name] for name in _COUNTS},
      },
    )
  except OSError as error:
    raise UnwritableError(
      f"The tokens cannot be written to {directory} ({error}), after {num_done}"
      f" of {len(passages)} passages. Expected room for {3 * width + 4} to"
      f" {5 * width + 4} bytes per passage. What was written stays: free some"
      " space and call write_tokens again, which continues from there."
    ) from error
  finally:
    if files is not None:
      files.close()
  logging.info(
    "%d passages tokenised in %s; %d were longer than %d tokens and cut; rows"
    " are %s.",
    *(len(passages), directory, counts["num_cut"], length, _JOINED[joined_by]),
  )
