"""Text to token ids and back.

In: text. Out: token ids, mostly without special tokens, which data/ adds where
they belong. The one file that imports transformers, for its tokenizers alone.
"""

from collections.abc import Iterable, Iterator, Sequence, Set
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
import regex
import tokenizers
from tokenizers import decoders
from tokenizers import models
from tokenizers import normalizers
from tokenizers import pre_tokenizers
from tokenizers import trainers

from rag_jax import artifacts
from rag_jax import disk
from rag_jax.artifacts import fingerprint_lines

if typing.TYPE_CHECKING:
  import transformers

_KIND = "tokenizer"  # in the manifest
_FORMAT = 1  # raise when the files change meaning

# That PyTorch is not there is as it should be: only tokenizers are taken.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

# BART's layout, so that ids mean the same in what we train and what we import.
_SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")

# Words with the space before them; digits one by one, so that a number that
# never occurred in training is spelled with tokens that did.
_PIECES = r" ?\p{L}[\p{L}\p{M}]*| ?\p{N}| ?[^\s\p{L}\p{N}]|\s+"

# A word: letters and digits, also around a hyphen, apostrophe, comma or period
# ("1,863", "Guinea-Bissau"), with the marks and joiners that belong to them
# (Hindi, Persian); or one other character.
_LETTERS = r"[\p{L}\p{N}][\p{L}\p{N}\p{M}\p{Default_Ignorable_Code_Point}]*"
_WORD = regex.compile(rf"{_LETTERS}(?:[-'.,]{_LETTERS})*|\S")

# Older checkpoints have the files of their kind of tokenizer instead of a
# tokenizer.json, and often not even a name of it: facebook/rag-token-nq.
_KINDS = {
  ("vocab.txt",): "BertTokenizer",
  ("vocab.json", "merges.txt"): "BartTokenizer",
}

# Those of sentencepiece need its library: T5 and Pegasus, mBART, and others.
SENTENCEPIECE = (
  "spiece.model", "sentencepiece.bpe.model", "tokenizer.model",
  "sentencepiece.model",
)  # fmt: skip

# For messages.
TOKENIZER_KINDS = "tokenizer.json, " + ", ".join(
  " with ".join(files) for files in (*_KINDS, SENTENCEPIECE[:1])
)


class Tokenizer:
  """A `transformers` tokenizer, reduced to what the project uses.

  Attributes:
    vocab_size: number of ids, with the special ones.
    pad_id: fills rows up.
    bos_id: begins rows: BERT's [CLS]. None where there is none, as in T5.
    eos_id: ends rows and their parts: BERT's [SEP].
    mask_id: stands for what is left out.
  """

  def __init__(self, backend: "transformers.PreTrainedTokenizerFast"):
    self._backend = backend
    inner = backend.backend_tokenizer
    # A passage that holds "</s>" is text, or it could end itself and go on as
    # something else. Not saved with the tokenizer, so it is set each time.
    inner.encode_special_tokens = True
    # Many published tokenizers cut and pad on their own.
    inner.no_truncation()
    inner.no_padding()
    self.vocab_size = len(backend)
    self.pad_id = self._special("pad_token")
    self.bos_id = self._find("bos_token", "cls_token")
    self.eos_id = self._special("eos_token", "sep_token")
    self.mask_id = self._special("mask_token", "unk_token")

  def _find(self, *names: str) -> int | None:
    for name in names:
      token_id = getattr(self._backend, f"{name}_id", None)
      if token_id is not None:
        return int(token_id)
    return None

  def _special(self, *names: str) -> int:
    token_id = self._find(*names)
    if token_id is not None:
      return token_id
    raise ValueError(
      f"The tokenizer has no {' or '.join(names)}; batches need one. Add it to"
      " tokenizer_config.json."
    )

  def encode(self, texts: Sequence[str]) -> list[list[int]]:
    """Returns the token ids of each text, without special tokens."""
    if not texts:
      return []
    encodings = _encode(self._backend.backend_tokenizer, texts)
    return [encoding.ids for encoding in encodings]

  def encode_words(
    self, texts: Sequence[str]
  ) -> tuple[list[list[int]], list[list[bool]]]:
    """Returns what `encode` does, and whether each token begins a word."""
    if not texts:
      return [], []
    encodings = _encode(self._backend.backend_tokenizer, texts)
    begins = [
      _begins_word(text, encoding.offsets, _word_starts(text))
      for text, encoding in zip(texts, encodings, strict=True)
    ]
    return [encoding.ids for encoding in encodings], begins

  def encode_joined(
    self, texts: Sequence[Sequence[str]]
  ) -> tuple[list[list[int]], list[list[bool]]]:
    """Returns what `encode_words` does, of texts in one string.

    Each is followed by the end token, as it is written: "title</s>text</s>".
    Special tokens are read as what they are, so nothing that somebody else
    wrote may hold one: see `holds_special`.
    """
    if not texts:
      return [], []
    end = self._end_text
    joined = ["".join(part + end for part in parts) for parts in texts]
    encodings = _encode(self._reading_special, joined)
    begins = []
    for parts, whole, encoding in zip(texts, joined, encodings, strict=True):
      words, start = set[int](), 0
      for part in parts:
        words |= {start + place for place in _word_starts(part)}
        start += len(part)
        words.add(start)  # the end token
        start += len(end)
      begins.append(_begins_word(whole, encoding.offsets, words))
    return [encoding.ids for encoding in encodings], begins

  def holds_special(self, text: str) -> bool:
    """Returns whether a special token is written in `text`."""
    return any(special in text for special in self._special_texts)

  @functools.cached_property
  def _end_text(self) -> str:
    return str(self._backend.convert_ids_to_tokens(self.eos_id))

  @functools.cached_property
  def _special_texts(self) -> list[str]:
    added = self._backend.backend_tokenizer.get_added_tokens_decoder()
    return [token.content for token in added.values() if token.special]

  @functools.cached_property
  def _reading_special(self) -> tokenizers.Tokenizer:
    """A copy for which "</s>" in a string is the end token."""
    return tokenizers.Tokenizer.from_str(
      self._backend.backend_tokenizer.to_str()
    )

  @functools.cached_property
  def largest_id(self) -> int:
    """The largest id that can occur; `vocab_size` - 1, if there are no gaps."""
    return max(self._backend.get_vocab().values())

  def encode_inputs(
    self, texts: Sequence[str], length: int
  ) -> tuple[list[list[int]], int]:
    """Returns whole rows, with special tokens, and how many were cut.

    The special tokens stand where the tokenizer's own files put them, as when
    `transformers` calls it; a text is cut on the right, and they remain.

    Args:
      texts: of any length.
      length: ids a row at most, special tokens included.
    """
    if not texts:
      return [], 0
    inner = self._backend.backend_tokenizer
    room = max(length - inner.num_special_tokens_to_add(False), 0)
    encodings = _encode(inner, texts)
    num_cut = 0
    for encoding in encodings:
      if len(encoding.ids) > room:
        num_cut += 1
        encoding.truncate(room)
    return [inner.post_process(e).ids for e in encodings], num_cut

  def decode(self, ids: Iterable[typing.SupportsInt]) -> str:
    """Returns the text of `ids`, without special tokens and outer spaces."""
    text = self._backend.backend_tokenizer.decode(
      [int(i) for i in ids], skip_special_tokens=True
    )
    return text.strip()

  def decode_hf(self, ids: Iterable[typing.SupportsInt]) -> str:
    """Returns what Hugging Face decodes, without special tokens.

    Outer spaces stay, and spaces before punctuation go if the tokenizer's files
    say clean_up_tokenization_spaces.
    """
    ids = [int(i) for i in ids]
    return str(self._backend.decode(ids, skip_special_tokens=True))

  def tokens(self, ids: Iterable[typing.SupportsInt]) -> list[str]:
    """Returns the text of each id alone, to show it to a person."""
    decode = self._backend.backend_tokenizer.decode
    return [decode([int(i)], skip_special_tokens=False) for i in ids]

  @property
  def fingerprint(self) -> str:
    """Identifies what the ids mean."""
    return fingerprint_lines([self._backend.backend_tokenizer.to_str()])

  def save(self, path: epath.PathLike) -> None:
    """Writes `tokenizer.json`, its settings and a manifest to a directory.

    A tokenizer in a folder inside, saved before, is named in the manifest too.

    Raises:
      UnwritableError: the disk is full, or nothing may be written there.
    """
    path = artifacts.start_directory(path)
    with (
      disk.explaining(path, "The tokenizer", "Then start again."),
      # Made elsewhere: transformers writes to local folders alone.
      tempfile.TemporaryDirectory() as made,
    ):
      made = epath.Path(made)
      self._save(made)
      # Last what says that there is one.
      for file in sorted(made.iterdir(), key=lambda f: f.stem == _KIND):
        disk.write_atomically(path / file.name, file.read_bytes())
      artifacts.write_manifest(
        path, kind=_KIND, format=_FORMAT, content={}, nested=True
      )

  def _save(self, path: epath.Path) -> None:
    try:
      self._backend.save_pretrained(os.fspath(path))
    except OSError:
      raise
    except Exception as error:  # the compiled tokenizers raise nothing else
      if "os error" not in str(error):
        raise
      number = re.search(r"os error (\d+)", str(error))
      raise OSError(int(number[1]) if number else 0, str(error)) from error


def _word_starts(text: str) -> set[int]:
  return {word.start() for word in _WORD.finditer(text)}


def _begins_word(
  text: str, offsets: Sequence[tuple[int, int]], words: Set[int]
) -> list[bool]:
  """Returns whether each token begins one of the words that start there."""
  begins, seen = [], set[int]()
  for start, end in offsets:
    # A token may hold the space before its word; of several tokens of one
    # character, the first begins it.
    piece = text[start:end]
    place = start + len(piece) - len(piece.lstrip())
    begins.append(place in words and place not in seen)
    seen.add(place)
  return begins


def _encode(
  tokenizer: tokenizers.Tokenizer, texts: Sequence[str]
) -> list[tokenizers.Encoding]:
  """Returns the encodings of `texts`, without special tokens.

  Raises:
    ValueError: the tokenizer has no token for a part of one, or a text cannot
      be written as UTF-8.
  """
  try:
    with _panics_are_errors():
      return tokenizer.encode_batch(list(texts), add_special_tokens=False)
  except Exception as error:  # of tokenizers: a bare Exception, a TypeError
    bad = next((text for text in texts if not _fits(tokenizer, text)), "")
    raise ValueError(
      f"The tokenizer cannot read {bad[:60]!r} ({error}). Expected text in"
      " UTF-8, and a tokenizer that has a token, if only [UNK], for every"
      " character. Correct the text, or take the tokenizer's files from where"
      " they came."
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
  """Raises `ValueError` where the compiled tokenizers panic.

  What they raise then is no `Exception`, and passes whoever catches those.
  """
  try:
    yield
  except BaseException as error:
    if type(error).__name__ != "PanicException":
      raise
    raise ValueError(f"the tokenizers library ended in: {error}") from error


def _older_kind(path: epath.Path) -> str:
  """Returns the class of the tokenizer in `path` without a tokenizer.json."""
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
        f"{path} has a {name}, but no tokenizer.json, which is the only one of"
        " the two that is read. Where sentencepiece is installed, write it:"
        " transformers.AutoTokenizer.from_pretrained(path)"
        ".save_pretrained(path)."
      )
  raise FileNotFoundError(
    f"There is no tokenizer in {path}; looked for {TOKENIZER_KINDS}. Expected a"
    " directory that a tokenizer was saved to; copy its files there, or set"
    " tokenizer.path to one that has them."
  )


def check_own_files(path: epath.PathLike) -> None:
  """Raises `ValueError` if a file in `path` is a link that leads elsewhere.

  What a tokenizer was read from is written where it is saved or exported: a
  link could make any file of this machine a part of it. In the hub's cache
  files are links to its blobs.
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
        " Expected files of its own. Copy the file to the place of the link if"
        " you trust it."
      )


def _check_manifest(path: epath.Path) -> None:
  """Raises `ValueError` if what `Tokenizer.save` wrote was changed."""
  manifest = path / artifacts.MANIFEST
  if not manifest.exists() and not os.path.islink(manifest):
    logging.warning(
      "The tokenizer in %s has no %s: an older version wrote it, or it was"
      " removed. Nobody can tell whether it is as it was written.",
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
    path: of the directory.
    ours: whether it has to be what `Tokenizer.save` wrote. If its manifest is
      missing, it is older, or was made by hand: that is warned of.

  Raises:
    FileNotFoundError: there is none.
    ValueError: its files cannot be read, are links that lead elsewhere, or are
      `ours` and were changed.
  """
  path = epath.Path(path)
  check_own_files(path)
  if ours:
    _check_manifest(path)
  kind = "AutoTokenizer"
  if not (path / "tokenizer.json").exists():
    kind = _older_kind(path)
  # Imported here: it takes a second, which asking for --help should not.
  import transformers

  loader = getattr(transformers, kind)
  try:
    with _in_folder(path) as folder, _panics_are_errors():
      backend = loader.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
      )
  except Exception as error:  # transformers raises bare Exception, and others
    raise _unreadable(path, error) from error
  try:
    return Tokenizer(backend)
  except ValueError:
    raise
  except Exception as error:  # of special tokens that lead round in circles
    raise _unreadable(path, error) from error


def _unreadable(path: epath.Path, error: Exception) -> ValueError:
  return ValueError(
    f"The tokenizer in {path} cannot be read ({error}). Its files were cut off"
    " or edited, or it brings code of its own, which is never run; copy them"
    " again."
  )


@contextlib.contextmanager
def _in_folder(path: epath.Path) -> Iterator[str]:
  """Yields a local folder of the files in `path`: itself, or a copy."""
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

  Byte-level: every text can be written and comes back exactly, so an answer is
  printed as the passage spells it. Sennrich et al. 2016,
  https://arxiv.org/abs/1508.07909; the byte alphabet is GPT-2's.

  Args:
    texts: what to learn frequent pieces from.
    vocab_size: ids in all: 5 special tokens, 256 bytes, then merges.
    uncased: reads text in lower case and without accents, as BERT's uncased
      tokenizers do; what it decodes has neither.
  """
  import transformers

  model = tokenizers.Tokenizer(models.BPE())
  steps = [normalizers.Prepend(" ")]  # a first word is like any other
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
