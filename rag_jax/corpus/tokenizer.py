"""Text to token ids and back.

In: text. Out: token ids, mostly without special tokens, which data/ adds where
they belong. The one file that imports transformers, for its tokenizers alone.
"""

from collections.abc import Iterable, Iterator, Sequence, Set
import contextlib
import functools
import logging
import os
import re
import tempfile
import typing

from etils import epath
import tokenizers
from tokenizers import decoders
from tokenizers import models
from tokenizers import normalizers
from tokenizers import pre_tokenizers
from tokenizers import trainers

from rag_jax import artifacts
from rag_jax.artifacts import fingerprint_lines

if typing.TYPE_CHECKING:
  import transformers

# BART's layout, so that ids mean the same in what we train and what we import.
_SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")

# Words with the space before them; digits one by one, so that a number that
# never occurred in training is spelled with tokens that did.
_PIECES = r" ?\p{L}[\p{L}\p{M}]*| ?\p{N}| ?[^\s\p{L}\p{N}]|\s+"

# A word: letters and digits, also around a hyphen, apostrophe, comma or period
# ("1,863", "Guinea-Bissau"); or one other character.
_WORD = re.compile(r"[^\W_]+(?:[-'.,][^\W_]+)*|[^\s]")

# Older checkpoints have the files of their kind of tokenizer instead of a
# tokenizer.json, and often not even a name of it: facebook/rag-token-nq.
_KINDS = {
  ("vocab.txt",): "BertTokenizer",
  ("vocab.json", "merges.txt"): "BartTokenizer",
}


_FILE = "tokenizer.json"


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
      " tokenizer_config.json, or train one with tokenizer.path=''."
    )

  def encode(self, texts: Sequence[str]) -> list[list[int]]:
    """Returns the token ids of each text, without special tokens."""
    if not texts:
      return []
    encodings = self._backend.backend_tokenizer.encode_batch(
      list(texts), add_special_tokens=False
    )
    return [encoding.ids for encoding in encodings]

  def encode_words(
    self, texts: Sequence[str]
  ) -> tuple[list[list[int]], list[list[bool]]]:
    """Returns what `encode` does, and whether each token begins a word."""
    if not texts:
      return [], []
    encodings = self._backend.backend_tokenizer.encode_batch(
      list(texts), add_special_tokens=False
    )
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
    encodings = self._reading_special.encode_batch(
      joined, add_special_tokens=False
    )
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
    encodings = inner.encode_batch(list(texts), add_special_tokens=False)
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
    """Writes `tokenizer.json` and `tokenizer_config.json` to a directory.

    The first of them last: where it is, the tokenizer is whole.
    """
    path = epath.Path(path)
    path.mkdir(parents=True, exist_ok=True)
    # Made elsewhere: transformers writes to local folders alone.
    with tempfile.TemporaryDirectory() as made:
      self._backend.save_pretrained(made)
      for file in sorted(os.listdir(made), key=lambda n: (n == _FILE, n)):
        text = epath.Path(made, file).read_text(encoding="utf-8")
        artifacts.write_atomically(path / file, text)


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


def _older_kind(path: epath.Path) -> str:
  """Returns the class of the tokenizer in `path` without a tokenizer.json."""
  for files, kind in _KINDS.items():
    if all((path / file).exists() for file in files):
      return kind
  if (path / "spiece.model").exists():
    raise FileNotFoundError(
      f"{path} has a spiece.model, but no tokenizer.json, which is the only one"
      " of the two that is read. Where sentencepiece is installed, write it:"
      " transformers.AutoTokenizer.from_pretrained(path).save_pretrained(path)."
    )
  kinds = ", or ".join(" and ".join(files) for files in _KINDS)
  raise FileNotFoundError(
    f"No tokenizer.json in {path}. Expected a directory that a tokenizer was"
    " saved to; set tokenizer.path to one, or to '' to train a tokenizer. (The"
    f" files of older ones do as well: {kinds}.)"
  )


def load_tokenizer(path: epath.PathLike) -> Tokenizer:
  """Returns the tokenizer saved in directory `path`.

  Raises:
    FileNotFoundError: there is none.
    ValueError: its files cannot be read.
  """
  path = epath.Path(path)
  kind = "AutoTokenizer"
  if not (path / "tokenizer.json").exists():
    kind = _older_kind(path)
  # Imported here: it takes a second, which asking for --help should not.
  import transformers

  loader = getattr(transformers, kind)
  try:
    with _in_folder(path) as folder:
      backend = loader.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
      )
  except Exception as error:  # transformers raises bare Exception, and others
    raise ValueError(
      f"The tokenizer in {path} cannot be read ({error}). Its files were cut"
      " off or edited, or it brings code of its own, which is never run; copy"
      " them again, or train another."
    ) from error
  return Tokenizer(backend)


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


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
  """Returns a byte-level BPE tokenizer trained on `texts`.

  Byte-level: every text can be written and comes back exactly, so an answer is
  printed as the passage spells it. Sennrich et al. 2016,
  https://arxiv.org/abs/1508.07909; the byte alphabet is GPT-2's.

  Args:
    texts: what to learn frequent pieces from.
    vocab_size: ids in all: 5 special tokens, 256 bytes, then merges.
  """
  import transformers

  model = tokenizers.Tokenizer(models.BPE())
  model.normalizer = normalizers.Prepend(" ")  # a first word is like any other
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
  logging.getLogger("transformers").setLevel(logging.ERROR)
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
