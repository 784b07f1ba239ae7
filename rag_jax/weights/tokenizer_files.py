"""The tokenizer's files beside a checkpoint: copied along, and made to fit.

In: the directory that holds them. Out: its largest token id, without loading a
tokenizer; and a copy.
"""

import dataclasses
import os
import pathlib
import re
from typing import Any

from etils import epath

from rag_jax import disk
from rag_jax.corpus.tokenizer import SENTENCEPIECE
from rag_jax.corpus.tokenizer import check_own_files
from rag_jax.weights.config_values import SpecialIds
from rag_jax.weights.directory import CheckpointDirectory

# Folders of the two tokenizers of a RAG.
QUESTION_TOKENIZER = "question_encoder_tokenizer"
GENERATOR_TOKENIZER = "generator_tokenizer"

TOKENIZER_FILES = (
  "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
  "added_tokens.json", "vocab.txt", "vocab.json", "merges.txt",
  "chat_template.jinja", *SENTENCEPIECE,
)  # fmt: skip
# One of them makes a tokenizer.
_VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", *SENTENCEPIECE)


@dataclasses.dataclass(frozen=True, slots=True)
class TokenizerFiles:
  """A saved tokenizer, its special ids, and how much is read of a text."""

  path: str = ""  # its directory; "": none is copied
  ids: SpecialIds = dataclasses.field(default_factory=SpecialIds)
  max_tokens: int = 0  # of an input, for sentence-transformers; 0: not said


NO_TOKENIZER = TokenizerFiles()


def find_tokenizer(
  directory: CheckpointDirectory, *folders: str
) -> CheckpointDirectory | None:
  """Returns the first of `folders` that holds a tokenizer; "" is the root.

  Raises:
    ValueError: a file there is a link that leads out of it.
  """
  for folder in folders:
    if folder and not directory.has(folder):
      continue
    found = directory.folder(folder)
    if any(found.has(name) for name in _VOCABULARIES):
      check_own_files(found.path)
      return found
  return None


def check_tokenizer(
  directory: CheckpointDirectory, vocab_size: int, owner: str
) -> str:
  """Checks that every token id has its row of the embedding table.

  More rows than ids are fine: many tables are padded.

  Args:
    directory: of the tokenizer.
    vocab_size: rows of the table.
    owner: whose table it is, for the message.

  Returns:
    A note if its files do not tell the ids, else "".

  Raises:
    ValueError: the tokenizer has ids beyond the table, or cannot be read.
  """
  ids = _largest_ids(directory)
  for file, largest in ids.items():
    if largest >= vocab_size:
      raise ValueError(
        f"The tokenizer in {directory.origin} ({file}) has token ids up to"
        f" {largest}, but the {owner} has embeddings only for ids up"
        f" to {vocab_size - 1}. Expected a tokenizer of this checkpoint:"
        " tokens were added to it, or files of two checkpoints mixed. Copy the"
        " tokenizer that belongs to these weights."
      )
  if not ids:
    return (
      f"the ids of the tokenizer in {directory.origin} were not compared with"
      " the embedding table: it has no tokenizer.json"
    )
  return ""


def _largest_ids(directory: CheckpointDirectory) -> dict[str, int]:
  """Returns the largest id in each file that tells ids."""
  ids: dict[str, list[int]] = {}
  if directory.has("tokenizer.json"):
    content = directory.json("tokenizer.json")
    model = content.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    added = content.get("added_tokens")
    ids["tokenizer.json"] = [
      *_vocab_ids(vocab),
      *(
        token.get("id", 0)
        for token in (added if isinstance(added, list) else [])
        if isinstance(token, dict)
      ),
    ]
  else:
    if directory.has("vocab.txt"):
      text = directory.file("vocab.txt").read_bytes()
      lines = text.rstrip(b"\n").count(b"\n") + 1
      ids["vocab.txt"] = [lines - 1]
    for name in ("vocab.json", "added_tokens.json"):
      ids[name] = _vocab_ids(directory.json(name, default={}))
  config = directory.json("tokenizer_config.json", default={})
  if isinstance(added := config.get("added_tokens_decoder"), dict):
    ids["tokenizer_config.json"] = [
      int(key) for key in added if re.fullmatch("[0-9]{1,18}", key)
    ]
  known = {
    name: [i for i in numbers if isinstance(i, int)]
    for name, numbers in ids.items()
  }
  return {name: max(numbers) for name, numbers in known.items() if numbers}


def _vocab_ids(vocab: Any) -> list[int]:
  """Returns ids of a vocabulary; [] if it is none, which loading it says."""
  if isinstance(vocab, dict):  # token -> id
    return list(vocab.values())
  # [token, score], in order
  return [len(vocab) - 1] if isinstance(vocab, list) and vocab else []


def copy_tokenizer(source: epath.PathLike, target: pathlib.Path) -> list[str]:
  """Copies the files of a tokenizer; returns their names.

  Raises:
    FileNotFoundError: there is no tokenizer.
    ValueError: a file is a link that leads out of `source`.
  """
  check_own_files(source)
  source = epath.Path(source)
  names = [name for name in TOKENIZER_FILES if (source / name).is_file()]
  if not set(names) & set(_VOCABULARIES):
    raise FileNotFoundError(
      f"There is no tokenizer in {source}; expected one of"
      f" {', '.join(_VOCABULARIES)}. Give the directory that the tokenizer was"
      " saved to."
    )
  target.mkdir(parents=True, exist_ok=True)
  for name in names:
    if os.path.realpath(source / name) != os.path.realpath(target / name):
      disk.write_atomically(target / name, (source / name).read_bytes())
  return names
