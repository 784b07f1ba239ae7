"""The tokens of a passage store on the disk, of one tokenizer and length.

In: passages and a tokenizer. Out: a directory of arrays that are mapped into
memory, as `TokenizedPassages`, so that 21 million passages are tokenised once
and take no memory. Whoever was interrupted goes on where that stopped.
"""

from collections.abc import Sequence
import contextlib
import json
from typing import Any

from absl import logging
from etils import epath
import numpy as np

from rag_jax import artifacts
from rag_jax.corpus.array_rows import ArrayRows
from rag_jax.corpus.array_rows import read_array
from rag_jax.corpus.passages import Passage
from rag_jax.corpus.passages import Passages
from rag_jax.corpus.passages import fingerprint_parts
from rag_jax.corpus.tokenized import JoinedBy
from rag_jax.corpus.tokenized import TokenizedPassages
from rag_jax.corpus.tokenized import TokenRows
from rag_jax.corpus.tokenized import find_joining
from rag_jax.corpus.tokenized import tokenize_rows
from rag_jax.corpus.tokenizer import Tokenizer
from rag_jax.directory_lock import building
from rag_jax.disk import UnwritableError
from rag_jax.progress import Progress

KIND = "tokens"
FORMAT = 1  # raise when the files or the manifest change their meaning

_REMEDY = "Copy the directory again, or remove it and call write_tokens again."
_ARRAYS = ("tokens", "begins_word", "lengths")
_COUNTS = ("num_cut", "num_by_ids", "num_tokens", "num_lost")
_PROGRESS = ".progress.json.tmp"  # ends like a file that is not finished
_BLOCK_ROWS = 1024  # passages in memory at once
_PROGRESS_ROWS = 1 << 16  # after so many, work is not lost by an interruption
_JOINED = {
  "ids": "the ids of title and text, each tokenised alone",
  "text": (
    "the ids of title and text tokenised as one string, since on a sample they"
    " were others than those of each alone"
  ),
}


def _is_own(name: str) -> bool:
  """Returns whether a file is one that writing tokens makes."""
  arrays = [f"{array}.npy" for array in _ARRAYS]
  return name in arrays or (name.startswith(".") and name.endswith(".tmp"))


def _identity(
  passages: Sequence[Passage], tokenizer: Tokenizer, length: int
) -> dict[str, Any]:
  """Returns what must be the same for rows to be the same."""
  if isinstance(passages, Passages):
    fingerprint = passages.fingerprint
  else:
    fingerprint = artifacts.fingerprint_lines(
      line for passage in passages for line in fingerprint_parts(passage)
    )
  special = (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id)
  return {
    "passages": fingerprint,
    "num_passages": len(passages),
    "tokenizer": tokenizer.fingerprint,
    "special_ids": list(special),
    "length": length,
  }


# What a part of the identity is called, and how to put it right.
_NAMES = {
  "passages": ("other passages (fingerprint)", "the same passages"),
  "num_passages": ("another number of passages", "the same passages"),
  "tokenizer": ("another tokenizer (fingerprint)", "the same tokenizer"),
  "special_ids": ("other special tokens (ids)", "the same tokenizer"),
  "length": ("another length", "the same passage length"),
}


def open_tokens(
  directory: epath.PathLike,
  passages: Sequence[Passage],
  tokenizer: Tokenizer,
  length: int,
) -> TokenizedPassages:
  """Returns what `write_tokens` wrote, mapped into memory.

  Args:
    directory: where it was written, or moved to.
    passages: whose tokens these are.
    tokenizer: whose ids these are.
    length: of a row, with the start token.

  Raises:
    FileNotFoundError: nothing was written there, or it was interrupted.
    ValueError: a file is missing, cut off or changed; or the tokens are of
      other passages, another tokenizer or another length.
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
  theirs, ours = content.get("made_of"), _identity(passages, tokenizer, length)
  if not isinstance(theirs, dict):
    theirs = {}
  for key, value in ours.items():
    if theirs.get(key) != value:
      name, same = _NAMES[key]
      raise ValueError(
        f"The tokens in {directory} were made of {name}: {theirs.get(key)!r},"
        f" but {value!r} is in use. Expected tokens of what is in use. Use"
        f" {same}, or write tokens to another directory."
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
    num_tokens=content.get("num_tokens"),  # not in those of older versions
    num_lost=content.get("num_lost"),
  )
  return TokenizedPassages.of_rows(passages, tokenizer, rows, joined_by)


class _Files:
  """The arrays, and how far they are written."""

  def __init__(
    self,
    directory: epath.Path,
    identity: dict[str, Any],
    width: int,
    largest_id: int,
  ):
    """Opens the arrays, behind the rows of an interrupted writer."""
    self._directory = directory
    self._identity = identity
    self._progress: dict[str, int] = dict.fromkeys(("num_done", *_COUNTS), 0)
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
      self._progress = done
    except (ValueError, FileNotFoundError) as error:
      logging.warning("What was begun there is begun again: %s", error)
      self._open(0)

  def _read_progress(self) -> dict[str, int]:
    path = self._directory / _PROGRESS
    if not path.exists():
      return self._progress
    saved = json.loads(path.read_text())
    same = saved["made_of"] == self._identity
    # An older version counted less.
    if not same or saved["progress"].keys() != self._progress.keys():
      return self._progress
    return saved["progress"]

  def _open(self, num_done: int) -> None:
    self.close()
    for name, (shape, dtype) in self._shapes.items():
      path = self._directory / f"{name}.npy"
      self._arrays[name] = ArrayRows(path, shape, dtype, num_done=num_done)

  @property
  def progress(self) -> dict[str, int]:
    """How many rows are done, and the counts of `TokenRows`."""
    return dict(self._progress)

  def append(self, rows: TokenRows) -> None:
    """Writes rows; now and then, notes how far everything is."""
    for name, array in self._arrays.items():
      array.append(getattr(rows, name))
    before = self._progress["num_done"]
    self._progress["num_done"] += len(rows.lengths)
    for name in _COUNTS:
      self._progress[name] += getattr(rows, name) or 0
    if before // _PROGRESS_ROWS != self._progress["num_done"] // _PROGRESS_ROWS:
      self._note()

  def _note(self) -> None:
    for array in self._arrays.values():
      array.flush()  # or the note could come to the disk before the rows
    note = {"made_of": self._identity, "progress": self._progress}
    artifacts.write_atomically(self._directory / _PROGRESS, json.dumps(note))

  def finish(self) -> None:
    """Waits until the disk has all rows."""
    for array in self._arrays.values():
      array.flush()
    self.close()
    (self._directory / _PROGRESS).unlink(missing_ok=True)

  def close(self) -> None:
    """Closes the arrays as they are."""
    for array in self._arrays.values():
      with contextlib.suppress(OSError):
        array.close()
    self._arrays.clear()


def write_tokens(
  directory: epath.PathLike,
  passages: Sequence[Passage],
  tokenizer: Tokenizer,
  length: int,
  *,
  wait: bool = False,
) -> TokenizedPassages:
  """Returns the tokens of `passages`, after writing them to a directory.

  Memory does not grow with the passages. Where all of it is there already it is
  opened, and what was interrupted is gone on with; the result is the same.

  Args:
    directory: local; empty, or with what this function left.
    passages: a store, or any other sequence.
    tokenizer: whose ids are wanted.
    length: of a row, with the start token; longer passages are cut.
    wait: for somebody else who writes there, and open what that wrote.

  Raises:
    ValueError: the directory holds something else, or somebody writes there
      and `wait` is False.
    OSError: the disk is full.
  """
  with building(
    directory, kind="token store", own=_is_own, wait=wait
  ) as directory:
    if not (directory / artifacts.MANIFEST).exists():
      _write(directory, passages, tokenizer, length)
  return open_tokens(directory, passages, tokenizer, length)


def keep_tokens(
  folder: epath.PathLike,
  passages: Sequence[Passage],
  tokenizer: Tokenizer,
  length: int,
) -> TokenizedPassages:
  """Returns the tokens of `passages`, which `folder` keeps once they are made.

  Tokens of other passages, tokenizers or lengths may lie there too, each in a
  directory of its own. Of several processes one writes and the others wait; if
  it dies, the next goes on. The folder can be deleted while nobody uses it.

  Args:
    folder: local.
    passages: a store, or any other sequence.
    tokenizer: whose ids are wanted.
    length: as in `write_tokens`.

  Raises:
    ValueError: the folder is in a bucket, or a file there is damaged.
    OSError: nothing can be written there.
  """
  folder = epath.Path(folder)
  if not artifacts.is_local(folder):
    raise ValueError(
      f"The passages' tokens cannot be kept in {folder}, a bucket: they are"
      " mapped into memory. Expected a local folder. Set data.token_cache to"
      " one, for instance beside the passages."
    )
  identity = _identity(passages, tokenizer, length)
  directory = folder / artifacts.fingerprint_lines([json.dumps(identity)])
  if (directory / artifacts.MANIFEST).exists():  # perhaps on a read-only disk
    return open_tokens(directory, passages, tokenizer, length)
  try:
    directory.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UnwritableError(
      f"The passages' tokens cannot be kept in {folder} ({error}). Expected a"
      " folder that can be written to. Set data.token_cache to one, or change"
      " the permissions of this one."
    ) from error
  return write_tokens(directory, passages, tokenizer, length, wait=True)


def _write(
  directory: epath.Path,
  passages: Sequence[Passage],
  tokenizer: Tokenizer,
  length: int,
) -> None:
  identity = _identity(passages, tokenizer, length)
  joined_by = find_joining(passages, tokenizer)
  width = length - (tokenizer.bos_id is not None)
  files = None
  num_done = 0
  try:
    files = _Files(directory, identity, width, tokenizer.largest_id)
    num_done = files.progress["num_done"]
    if num_done:
      logging.info(
        "%d of %d passages were tokenised in %s before; going on.",
        *(num_done, len(passages), directory),
      )
    with Progress("Tokenised", len(passages), "passages", num_done) as progress:
      while num_done < len(passages):
        block = passages[num_done : num_done + _BLOCK_ROWS]
        files.append(tokenize_rows(block, tokenizer, length, joined_by))
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
      f" {5 * width + 4} bytes a passage. What was written stays: free some"
      " space and call write_tokens again, which goes on from there."
    ) from error
  finally:
    if files is not None:
      files.close()
  logging.info(
    "%d passages tokenised in %s; %d were longer than %d tokens and cut; rows"
    " are %s.",
    *(len(passages), directory, counts["num_cut"], length, _JOINED[joined_by]),
  )
