"""Turns text into token ids and back.

In: text. Out: token ids, mostly without special tokens, which data/ adds. The
only file that imports transformers, and only for its tokenizers.
"""

from collections.abc import Iterable, Iterator, Sequence
import contextlib
import functools
import logging as python_logging
import os
import pathlib
import re
import tempfile
import typing

from absl import logging
from etils import epath
import tokenizers
from tokenizers import decoders
from tokenizers import models
from tokenizers import normalizers
from tokenizers import pre_tokenizers
from tokenizers import trainers

from rag_jax import artifacts
from rag_jax import disk
from rag_jax.corpus.word_starts import begins_word
from rag_jax.corpus.word_starts import word_starts

if typing.TYPE_CHECKING:
  from transformers import PreTrainedTokenizerFast as Backend

_KIND = "tokenizer"  # in the manifest
_FORMAT = 1  # raise when the files change meaning

# No warning that PyTorch is missing: tokenizers do not need it.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

# The order of BART, so that trained and imported models use the same ids.
_SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")

# Words with the space before them, and single digits, so that tokens seen in
# training can spell every number.
_PIECES = r" ?\p{L}[\p{L}\p{M}]*| ?\p{N}| ?[^\s\p{L}\p{N}]|\s+"

# Older checkpoints such as facebook/rag-token-nq have these files instead of a
# tokenizer.json, and often do not name the class of their tokenizer.
_KINDS = {
  ("vocab.txt",): "BertTokenizer",
  ("vocab.json", "merges.txt"): "BartTokenizer",
}

# Files of T5, Pegasus, mBART and others that only sentencepiece can read.
SENTENCEPIECE = (
  "spiece.model", "sentencepiece.bpe.model", "tokenizer.model",
  "sentencepiece.model",
)  # fmt: skip

TOKENIZER_KINDS = "tokenizer.json, " + ", ".join(
  " with ".join(files)
  for files in (*_KINDS, *((name,) for name in SENTENCEPIECE))
)


class Tokenizer:
  """A `transformers` tokenizer, reduced to what the project uses.

  Attributes:
    vocab_size: number of ids, special tokens included.
    backend: of transformers, with which it shares its state.
    pad_id: the id of padding; the end token if there is none, as in GPT-2,
      Llama and Qwen. Masks say what is padding.
    bos_id: the start token, BERT's [CLS]; None if there is none, as in T5.
    eos_id: ends rows and their parts, BERT's [SEP].
    mask_id: stands for a part that is left out; None if there is neither a mask
      token nor an unknown one.
  """

  def __init__(self, backend: "Backend"):
    self.backend = backend
    self._inner = backend.backend_tokenizer
    # "</s>" in a passage must stay text, or the passage could end early and
    # continue as something else. It is not saved with the tokenizer.
    self._inner.encode_special_tokens = True
    # Many published tokenizers truncate and pad by default.
    self._inner.no_truncation()
    self._inner.no_padding()
    self.vocab_size = len(backend)
    self.bos_id = self._find("bos_token", "cls_token")
    eos_id = self._find("eos_token", "sep_token")
    if eos_id is None:
      raise ValueError(
        "The tokenizer has no eos_token or sep_token; expected one, with which"
        " texts end. Add it to tokenizer_config.json."
      )
    self.eos_id = eos_id
    pad_id = self._find("pad_token")
    self.pad_id = eos_id if pad_id is None else pad_id
    self.mask_id = self._find("mask_token", "unk_token")

  def _find(self, *names: str) -> int | None:
    for name in names:
      token_id = getattr(self.backend, f"{name}_id", None)
      if token_id is not None:
        return int(token_id)
    return None

  def encode(self, texts: Sequence[str]) -> list[list[int]]:
    """Returns the token ids of each text, without special tokens."""
    return [encoding.ids for encoding in _encode(self._inner, texts)]

  def encode_words(
    self, texts: Sequence[str]
  ) -> tuple[list[list[int]], list[list[bool]]]:
    """Returns what `encode` does, and whether each token begins a word."""
    encodings = _encode(self._inner, texts)
    begins = [
      begins_word(text, encoding.offsets, word_starts(text))
      for text, encoding in zip(texts, encodings, strict=True)
    ]
    return [encoding.ids for encoding in encodings], begins

  def encode_joined(
    self, texts: Sequence[Sequence[str]]
  ) -> tuple[list[list[int]], list[list[bool]]]:
    """Returns what `encode_words` does, for parts joined to one string.

    The end token is written after each part: "title</s>text</s>". Special
    tokens in the string are encoded as such, so the parts must not hold any:
    see `holds_special`.
    """
    end = str(self.backend.convert_ids_to_tokens(self.eos_id))
    joined = ["".join(part + end for part in parts) for parts in texts]
    encodings = _encode(self._reading_special, joined)
    begins = []
    for parts, whole, encoding in zip(texts, joined, encodings, strict=True):
      words, start = set[int](), 0
      for part in parts:
        words |= {start + place for place in word_starts(part)}
        start += len(part)
        words.add(start)  # the end token
        start += len(end)
      begins.append(begins_word(whole, encoding.offsets, words))
    return [encoding.ids for encoding in encodings], begins

  def encode_special(self, texts: Sequence[str]) -> list[list[int]]:
    """Returns what `encode` does, but "</s>" in a text is the end token."""
    return [e.ids for e in _encode(self._reading_special, texts)]

  def encode_prompts(
    self, texts: Sequence[str], *, ends: bool
  ) -> list[list[int]]:
    """Returns whole rows with special tokens, as in `transformers`.

    Args:
      texts: of any length; special tokens in them stay text.
      ends: False leaves out the end token if the tokenizer adds one, since the
        answer follows.
    """
    rows = []
    for encoding in _encode(self._inner, texts):
      whole = self._inner.post_process(encoding)
      added = not ends and whole.special_tokens_mask[-1:] == [1]
      cut = added and whole.ids[-1] == self.eos_id
      rows.append(whole.ids[: len(whole.ids) - cut])
    return rows

  def token_ends(self, texts: Sequence[str]) -> list[list[int]]:
    """Returns where the tokens of each text end, as numbers of characters."""
    encodings = _encode(self._inner, texts)
    return [[end for _, end in encoding.offsets] for encoding in encodings]

  def holds_special(self, text: str) -> bool:
    """Returns whether `text` holds the text of a special token."""
    return any(special in text for special in self.special_texts)

  @functools.cached_property
  def special_texts(self) -> list[str]:
    """The texts of all special tokens."""
    added = self._inner.get_added_tokens_decoder()
    return [token.content for token in added.values() if token.special]

  @functools.cached_property
  def _reading_special(self) -> tokenizers.Tokenizer:
    """A copy that encodes "</s>" in a text as the end token."""
    return tokenizers.Tokenizer.from_str(self._inner.to_str())

  @functools.cached_property
  def largest_id(self) -> int:
    """The largest possible id; `vocab_size` - 1 if there are no gaps."""
    return max(self.backend.get_vocab().values())

  def encode_inputs(
    self, texts: Sequence[str], length: int
  ) -> tuple[list[list[int]], int]:
    """Returns whole rows with special tokens, and how many texts were cut.

    The special tokens are where the tokenizer's files put them, as in
    `transformers`. A text is cut on the right; the special tokens remain.

    Args:
      texts: of any length.
      length: the largest number of ids per row, special tokens included.
    """
    room = max(length - self._inner.num_special_tokens_to_add(False), 0)
    encodings = _encode(self._inner, texts)
    num_cut = 0
    for encoding in encodings:
      if len(encoding.ids) > room:
        num_cut += 1
        encoding.truncate(room)
    return [self._inner.post_process(e).ids for e in encodings], num_cut

  def decode(self, ids: Iterable[typing.SupportsInt]) -> str:
    """Returns the text of `ids`, without special tokens and outer spaces."""
    ids = [int(i) for i in ids]
    return self._inner.decode(ids, skip_special_tokens=True).strip()

  def decode_hf(self, ids: Iterable[typing.SupportsInt]) -> str:
    """Returns the text that Hugging Face decodes, without special tokens.

    Outer spaces stay. Spaces before punctuation are removed if the tokenizer's
    files set clean_up_tokenization_spaces.
    """
    ids = [int(i) for i in ids]
    return str(self.backend.decode(ids, skip_special_tokens=True))

  def tokens(self, ids: Iterable[typing.SupportsInt]) -> list[str]:
    """Returns the text of each id by itself, for display."""
    decode = self._inner.decode
    return [decode([int(i)], skip_special_tokens=False) for i in ids]

  @property
  def fingerprint(self) -> str:
    """Hex digits that identify the tokenizer."""
    return artifacts.fingerprint_lines([self._inner.to_str()])

  def save(self, path: epath.PathLike) -> None:
    """Writes `tokenizer.json`, its settings and a manifest to a directory.

    The manifest also names tokenizers in subfolders, which are saved before.

    Raises:
      UnwritableError: the disk is full, or nothing may be written there.
    """
    path = artifacts.start_directory(path)
    with (
      disk.explaining(path, "The tokenizer", "Then start again."),
      # transformers only writes to local folders.
      tempfile.TemporaryDirectory() as made,
    ):
      made = epath.Path(made)
      self._save(made)
      # tokenizer.json last, since it marks the directory as a tokenizer.
      for file in sorted(made.iterdir(), key=lambda f: f.stem == _KIND):
        disk.write_atomically(path / file.name, file.read_bytes())
      artifacts.write_manifest(
        path, kind=_KIND, format=_FORMAT, content={}, nested=True
      )

  def _save(self, path: epath.Path) -> None:
    try:
      self.backend.save_pretrained(os.fspath(path))
    except OSError:
      raise
    except Exception as error:  # the compiled library raises only this type
      if "os error" not in str(error):
        raise
      number = re.search(r"os error (\d+)", str(error))
      raise OSError(int(number[1]) if number else 0, str(error)) from error


def _encode(
  tokenizer: tokenizers.Tokenizer, texts: Sequence[str]
) -> list[tokenizers.Encoding]:
  """Returns the encodings of `texts`, without special tokens.

  Raises:
    ValueError: the tokenizer has no token for a part of a text, or a text
      cannot be written as UTF-8.
  """
  if not texts:
    return []
  try:
    with _panics_are_errors():
      return tokenizer.encode_batch(list(texts), add_special_tokens=False)
  except Exception as error:  # the library raises bare Exception and TypeError
    bad = next((text for text in texts if not _fits(tokenizer, text)), "")
    raise ValueError(
      f"The tokenizer cannot read {bad[:60]!r} ({error}). Expected text in"
      " UTF-8, and a tokenizer that has a token for every character, at least"
      " [UNK]. Correct the text, or copy the tokenizer's files again."
    ) from error


def _fits(tokenizer: tokenizers.Tokenizer, text: str) -> bool:
  try:
    with _panics_are_errors():
      tokenizer.encode(text, add_special_tokens=False)
  except Exception:  # as above
    return False
  return True


@contextlib.contextmanager
def _panics_are_errors() -> Iterator[None]:
  """Raises `ValueError` if the compiled tokenizers library panics.

  A panic raises a `BaseException`, which `except Exception` does not catch.
  """
  try:
    yield
  except BaseException as error:
    if type(error).__name__ != "PanicException":
      raise
    raise ValueError(f"the tokenizers library failed: {error}") from error


def _older_kind(path: epath.Path) -> str:
  """Returns the class of a tokenizer that has no tokenizer.json."""
  for files, kind in _KINDS.items():
    if all((path / file).exists() for file in files):
      for file in files:
        if not (path / file).read_bytes().strip():
          raise ValueError(
            f"{path / file} is empty, so that every text would become unknown"
            " tokens or single characters; expected a tokenizer's file. Copy it"
            " again."
          )
      return kind
  for name in SENTENCEPIECE:
    if (path / name).exists():
      raise FileNotFoundError(
        f"{path} has a {name}, but no tokenizer.json, and only the second can"
        " be read. Where sentencepiece is installed, write it: transformers"
        ".AutoTokenizer.from_pretrained(path).save_pretrained(path)."
      )
  raise FileNotFoundError(
    f"There is no tokenizer in {path}; looked for {TOKENIZER_KINDS}. Expected a"
    " directory that a tokenizer was saved to; copy its files there, or set"
    " tokenizer.path to one that has them."
  )


def check_own_files(path: epath.PathLike) -> None:
  """Raises `ValueError` if a file in `path` is a link to outside of it.

  The files of a tokenizer are copied when it is saved or exported, so a link
  could make any file of this machine part of it. Links to the blobs in the
  cache of the Hugging Face Hub are allowed.
  """
  path = epath.Path(path)
  if not artifacts.is_local(path) or not path.exists():
    return
  home = pathlib.Path(os.path.realpath(path))
  for above in home.parents:
    if above.name == "snapshots" and (above.parent / "blobs").is_dir():
      home = above.parent
  for file in sorted(path.iterdir()):
    target = pathlib.Path(os.path.realpath(file))
    if not file.is_dir() and not target.is_relative_to(home):
      raise ValueError(
        f"{file.name} in {path} is a link to {target}, outside the directory."
        " Expected plain files. Replace the link by a copy of the file if you"
        " trust it."
      )


def _check_manifest(path: epath.Path) -> None:
  """Raises `ValueError` if files that `Tokenizer.save` wrote were changed."""
  manifest = path / artifacts.MANIFEST
  if not manifest.exists() and not os.path.islink(manifest):
    logging.warning(
      "The tokenizer in %s has no %s: an older version wrote it, or it was"
      " removed. It cannot be checked for changes.",
      *(path, artifacts.MANIFEST),
    )
    return
  artifacts.read_manifest(
    path,
    kind=_KIND,
    format=_FORMAT,
    nested=True,
    remedy="Put the old files back, or start in another directory.",
  )


def load_tokenizer(path: epath.PathLike, *, ours: bool = False) -> Tokenizer:
  """Returns the tokenizer saved in directory `path`.

  Args:
    path: the directory.
    ours: whether `Tokenizer.save` wrote it, so that its manifest is checked. A
      missing manifest (an older version wrote it, or a person) is logged.

  Raises:
    FileNotFoundError: there is no tokenizer.
    ValueError: its files cannot be read, are links to other places, or are
      `ours` and were changed.
  """
  if ours:
    check_own_files(path)
    _check_manifest(epath.Path(path))
  try:
    return Tokenizer(open_tokenizer(path))
  except (FileNotFoundError, ValueError):
    raise
  except Exception as error:  # for instance RecursionError
    raise _unreadable(path, error) from error


def open_tokenizer(path: epath.PathLike) -> "Backend":
  """Returns the tokenizer of transformers; errors as in `load_tokenizer`."""
  path = epath.Path(path)
  check_own_files(path)
  kind = "AutoTokenizer"
  if not (path / "tokenizer.json").exists():
    kind = _older_kind(path)
  import transformers  # takes a second, and --help should be fast

  try:
    with _in_folder(path) as folder, _panics_are_errors():
      return getattr(transformers, kind).from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
      )
  except Exception as error:  # transformers raises bare Exception, too
    raise _unreadable(path, error) from error


def _unreadable(path: epath.PathLike, error: Exception) -> ValueError:
  return ValueError(
    f"The tokenizer in {path} cannot be read ({error}). Its files were cut off"
    " or edited, or it needs code of its own, which is never run. Copy the"
    " files again."
  )


@contextlib.contextmanager
def _in_folder(path: epath.Path) -> Iterator[str]:
  """Yields a local folder with the files of `path`: itself, or a copy."""
  if artifacts.is_local(path):
    yield os.fspath(path)
    return
  with tempfile.TemporaryDirectory() as copy:
    for file in path.iterdir():
      if not file.is_dir():
        file.copy(epath.Path(copy) / file.name)
    yield copy


def train_tokenizer(
  texts: Iterable[str], vocab_size: int, *, uncased: bool = False
) -> Tokenizer:
  """Returns a byte-level BPE tokenizer trained on `texts`.

  Byte-level, with GPT-2's alphabet, so that every text is decoded exactly: an
  answer is printed as the passage spells it. https://arxiv.org/abs/1508.07909.

  Args:
    texts: the texts to learn frequent pieces from.
    vocab_size: number of ids: 5 special tokens, 256 bytes, then merges.
    uncased: convert texts to lower case without accents, as BERT's uncased
      tokenizers do; decoded texts then have neither.
  """
  import transformers

  model = tokenizers.Tokenizer(models.BPE())
  steps = [normalizers.Prepend(" ")]  # so the first word is like any other
  if uncased:
    steps += [
      normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()
    ]  # fmt: skip
  model.normalizer = normalizers.Sequence(steps) if uncased else steps[0]
  model.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(tokenizers.Regex(_PIECES), behavior="isolated"),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  model.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=list(_SPECIAL_TOKENS),
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  model.train_from_iterator(texts, trainer)
  python_logging.getLogger("transformers").setLevel(python_logging.ERROR)
  return Tokenizer(
    transformers.PreTrainedTokenizerFast(
      tokenizer_object=model,
      bos_token="<s>",
      pad_token="<pad>",
      eos_token="</s>",
      unk_token="<unk>",
      mask_token="<mask>",
    )
  )
