"""How text is generated: Hugging Face's settings, with its names and meaning.

In: a `generation_config.json`, or keyword arguments. Out: `GenerationSettings`,
which are hashable, so that a search is compiled once for each; and the file
again.
"""

from collections.abc import Iterator, Mapping
import dataclasses
import json
import sys
import typing
from typing import Any

from absl import logging
from etils import epath

from rag_jax.artifacts import write_atomically
from rag_jax.weights.config_fields import GENERATION_REFUSED
from rag_jax.weights.config_fields import GENERATION_WITHOUT_EFFECT

GENERATION_CONFIG = "generation_config.json"

_DEFAULT_NEW_TOKENS = 20  # if no length is given, as in Hugging Face

# BART's older files use this name to say that answers begin with the bos token.
_OLD_BOS = "force_bos_token_to_be_generated"

_SEVERAL = ("eos_token_id", "forced_eos_token_id")  # one id, or a list of them


# Types are unchecked: `validate` has better messages for wrong values of a
# file, and a single id may stand for a list.
@typing.no_type_check
@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationSettings:
  """Generation settings; None means not given.

  Lengths count as in Hugging Face: `max_length` and `min_length` include the
  decoder's start token. `max_new_tokens` and `min_new_tokens` do not, and win
  over the other two. All four include the end token.
  """

  max_length: int | None = None  # if neither maximum is given: 20 new tokens
  max_new_tokens: int | None = None
  min_length: int = 0
  min_new_tokens: int | None = None

  num_beams: int = 1  # W
  num_return_sequences: int = 1
  early_stopping: bool | str = False  # True, False or "never"
  length_penalty: float = 1.0  # scores are divided by length ** this

  do_sample: bool = False
  temperature: float = 1.0
  top_k: int = 50  # used in sampling only; 0 turns it off
  top_p: float = 1.0
  seed: int = 0

  repetition_penalty: float = 1.0
  no_repeat_ngram_size: int = 0
  bad_words_ids: tuple[tuple[int, ...], ...] = ()
  forced_bos_token_id: int | None = None
  forced_eos_token_id: tuple[int, ...] = ()

  decoder_start_token_id: int | None = None
  bos_token_id: int | None = None
  eos_token_id: tuple[int, ...] = ()
  pad_token_id: int | None = None

  n_docs: int | None = None  # documents read; None reads all retrieved ones
  do_deduplication: bool = True  # RAG-Sequence: each candidate counts once

  # Other entries of the file, as JSON, so that they are written again.
  extra: tuple[tuple[str, str], ...] = dataclasses.field(
    default=(), compare=False
  )

  def __post_init__(self):
    """Turns lists into tuples, which can be hashed."""
    for name in _SEVERAL:
      value = getattr(self, name)
      if value is None:
        value = ()
      elif _is_int(value):
        value = (value,)
      object.__setattr__(self, name, tuple(value))
    words = self.bad_words_ids or ()
    object.__setattr__(self, "bad_words_ids", tuple(tuple(w) for w in words))

  @property
  def num_steps(self) -> int:
    """The most tokens that are generated, including the end token."""
    if self.max_new_tokens is not None:
      return self.max_new_tokens
    if self.max_length is not None:
      return self.max_length - 1
    return _DEFAULT_NEW_TOKENS

  @property
  def min_steps(self) -> int:
    """The fewest tokens before the end token."""
    if self.min_new_tokens is not None:
      return self.min_new_tokens
    return max(self.min_length - 1, 0)

  @property
  def start_id(self) -> int:
    """The decoder's start token; the bos token if no other is given."""
    for start in (self.decoder_start_token_id, self.bos_token_id):
      if start is not None:
        return start
    raise ValueError(
      "decoder_start_token_id=None and bos_token_id=None: the decoder has to"
      " read something first. Set decoder_start_token_id (BART: its eos token,"
      " T5: its pad token)."
    )

  @property
  def pad_id(self) -> int:
    """The token that pads a sequence after its end."""
    if self.pad_token_id is not None:
      return self.pad_token_id
    return self.eos_token_id[0] if self.eos_token_id else 0

  def validate(
    self,
    *,
    vocab_size: int = 0,
    max_positions: int = 0,
    num_retrieved: int = 0,
  ) -> "GenerationSettings":
    """Returns self, or raises with every problem in one message.

    Args:
      vocab_size: V of the generator; 0: not known.
      max_positions: the longest target of a decoder with learned positions;
        0: any length.
      num_retrieved: documents retrieved per question; 0: not known.

    Raises:
      ValueError: settings that contradict each other or the model.
    """
    problems = list(self._type_problems())
    if not problems:
      problems = [
        *self._length_problems(max_positions),
        *self._search_problems(),
        *self._id_problems(vocab_size),
        *self._doc_problems(num_retrieved),
      ]
    if problems:
      raise ValueError(
        "These generation settings cannot work:\n"
        + "".join(f"- {problem}\n" for problem in problems)
        + "Change them where they are given, as keyword arguments or in"
        f" {GENERATION_CONFIG}."
      )
    return self

  def _type_problems(self) -> Iterator[str]:
    """Yields what a hand-written file can get wrong."""
    for field in dataclasses.fields(self):
      value, kind = getattr(self, field.name), str(field.type)
      if field.name == "early_stopping":
        if value is not True and value is not False and value != "never":
          yield f"early_stopping={value!r} is not True, False or 'never'."
      elif field.type is bool or field.type == "bool":
        if not isinstance(value, bool):
          yield f"{field.name}={value!r} is not True or False."
      elif field.type is float:
        number = _is_int(value) or isinstance(value, float)
        # Compared, since a whole number may be too large for a float.
        if not number or not abs(value) <= sys.float_info.max:
          yield f"{field.name}={value!r} is not a finite number."
      elif field.type is int or kind == "int | None":
        if not _is_int(value) and (field.type is int or value is not None):
          yield f"{field.name}={value!r} is not a whole number."
      elif field.name in _SEVERAL and not all(map(_is_int, value)):
        yield f"{field.name}={value!r} is not a token id or a list of them."
    words = self.bad_words_ids
    if any(not word or not all(map(_is_int, word)) for word in words):
      yield (
        f"bad_words_ids={words!r} is not a list of lists of token ids, each"
        " with one id at least."
      )

  def _length_problems(self, max_positions: int) -> Iterator[str]:
    if self.max_new_tokens is not None:
      name = f"max_new_tokens={self.max_new_tokens}"
    else:
      name = f"max_length={self.max_length} (which counts the start token)"
    if self.min_new_tokens is not None:
      least = f"min_new_tokens={self.min_new_tokens}"
    else:
      least = f"min_length={self.min_length} (which counts the start token)"
    if self.num_steps < 1:
      yield f"{name} leaves no token to generate. At least one is needed."
    elif self.min_steps > self.num_steps:
      yield f"{name} is below {least}. No sequence can be that long."
    if self.min_length < 0 or (self.min_new_tokens or 0) < 0:
      yield f"{least} must be at least 0."
    if 0 < max_positions < self.num_steps:
      yield (
        f"{name} is above the decoder's {max_positions} learned positions."
        f" It can generate {max_positions} tokens, max_length="
        f"{max_positions + 1}."
      )

  def _search_problems(self) -> Iterator[str]:
    beams, returned = self.num_beams, self.num_return_sequences
    for name, value in (
      ("num_beams", beams),
      ("num_return_sequences", returned),
    ):
      if value < 1:
        yield f"{name}={value} must be at least 1."
    if returned > beams and (beams > 1 or not self.do_sample):
      yield (
        f"num_return_sequences={returned} is above num_beams={beams}. Raise"
        " num_beams, or sample with do_sample=True and num_beams=1."
      )
    for name in ("temperature", "repetition_penalty"):
      if getattr(self, name) <= 0:
        yield f"{name}={getattr(self, name)} must be above 0; 1.0 turns it off."
    for name in ("top_k", "no_repeat_ngram_size"):
      if getattr(self, name) < 0:
        yield f"{name}={getattr(self, name)} must be at least 0, which is off."
    if not 0 <= self.top_p <= 1:
      yield f"top_p={self.top_p} must lie between 0 and 1; 1.0 turns it off."

  def _id_problems(self, vocab_size: int) -> Iterator[str]:
    named = [
      (name, getattr(self, name))
      for name in (
        "forced_bos_token_id",
        "decoder_start_token_id",
        "bos_token_id",
        "pad_token_id",
      )
      if getattr(self, name) is not None
    ]
    named += [(name, i) for name in _SEVERAL for i in getattr(self, name)]
    named += [("bad_words_ids", i) for word in self.bad_words_ids for i in word]
    for name, value in named:
      if value < 0 or (vocab_size and value >= vocab_size):
        last = f"to {vocab_size - 1}, the last of the vocabulary"
        yield (
          f"{name} has the token id {value}, expected one from 0"
          f" {last if vocab_size else 'on'}."
        )
    if vocab_size and self.num_beams > 1:
      # Continuations kept per beam: see search.py.
      kept = max(2, 1 + len(self.eos_token_id))
      if kept > vocab_size:
        yield (
          f"eos_token_id has {len(self.eos_token_id)} ids, but the vocabulary"
          f" has only {vocab_size}. Beam search needs more tokens than ends."
        )

  def _doc_problems(self, num_retrieved: int) -> Iterator[str]:
    if self.n_docs is None:
      return
    if self.n_docs < 1:
      yield f"n_docs={self.n_docs} must be at least 1."
    elif 0 < num_retrieved < self.n_docs:
      yield (
        f"n_docs={self.n_docs} is above the {num_retrieved} documents that were"
        " retrieved for each question. Retrieve more, or lower n_docs."
      )

  @classmethod
  def from_dict(
    cls, values: Mapping[str, Any], origin: str = "the generation settings"
  ) -> "GenerationSettings":
    """Returns the settings named in `values`; null means the default.

    Keys that do not change what is generated are kept in `extra`.

    Raises:
      ValueError: a setting asks for what this search does not do.
    """
    known = {f.name for f in dataclasses.fields(cls)} - {"extra"}
    active = [
      f"{name}={values[name]!r}"
      for name, inactive in GENERATION_REFUSED.items()
      if values.get(name) is not None and values[name] not in inactive
    ]
    if active:
      raise ValueError(
        f"{origin} has settings that rag_jax does not support: "
        + ", ".join(active)
        + ". Supported are greedy search, sampling, beam search and beam"
        " sampling. Remove them, or generate with transformers."
      )
    passed_over = sorted(
      k for k, v in values.items() if v is not None
      and k not in known and k not in GENERATION_REFUSED
      and k not in GENERATION_WITHOUT_EFFECT and k != _OLD_BOS
    )  # fmt: skip
    if passed_over:
      logging.warning(
        "%s has settings that rag_jax does not know and ignores: %s.",
        *(origin, ", ".join(passed_over)),
      )
    given = {k: v for k, v in values.items() if k in known and v is not None}
    if values.get(_OLD_BOS) and "bos_token_id" in given:
      given.setdefault("forced_bos_token_id", given["bos_token_id"])
    try:
      settings = cls(
        **given,
        extra=tuple(
          (k, json.dumps(v)) for k, v in values.items() if k not in known
        ),
      )
    except TypeError as error:  # a number where a list belongs
      raise ValueError(
        f"{origin}: {error}. eos_token_id and forced_eos_token_id are ids or"
        " lists of ids, bad_words_ids is a list of lists. Correct them."
      ) from error
    return settings.validate()

  def to_dict(self) -> dict[str, Any]:
    """Returns what differs from the defaults, and `extra`, for JSON."""
    values: dict[str, Any] = {k: json.loads(v) for k, v in self.extra}
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if field.name == "extra" or value == field.default:
        continue
      if field.name in _SEVERAL and len(value) == 1:
        value = value[0]
      values[field.name] = value
    return values


def read_generation_config(path: epath.PathLike) -> GenerationSettings:
  """Returns the settings in the file `path`, or in that of a directory.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is not a JSON object, or a setting is not supported.
  """
  path = epath.Path(path)
  if path.is_dir():
    path = path / GENERATION_CONFIG
  if not path.exists():
    raise FileNotFoundError(
      f"{path} does not exist, expected Hugging Face's {GENERATION_CONFIG}."
      " Give its directory, or pass the settings themselves."
    )
  try:
    values = json.loads(path.read_text())
  except ValueError as error:  # JSON, or no UTF-8
    raise ValueError(
      f"{path} is not JSON ({error}), expected Hugging Face's"
      f" {GENERATION_CONFIG}; it was cut off or edited. Restore it."
    ) from error
  if not isinstance(values, dict):
    raise ValueError(
      f"{path} holds a {type(values).__name__}, expected an object of settings"
      f" as in Hugging Face's {GENERATION_CONFIG}. Restore it."
    )
  return GenerationSettings.from_dict(values, str(path))


def write_generation_config(
  settings: GenerationSettings, path: epath.PathLike
) -> None:
  """Writes `settings` to `path`, as `transformers` reads them.

  Args:
    settings: are written.
    path: the file, or a directory for a generation_config.json in it.
  """
  path = epath.Path(path)
  if path.is_dir():
    path = path / GENERATION_CONFIG
  text = json.dumps(settings.to_dict(), indent=2, sort_keys=True) + "\n"
  write_atomically(path, text)


def _is_int(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool)
