"""Reranks passages: the second stage of retrieval.

In: questions, and the candidates that a search found for each. Out: the same
candidates, ordered by the logits of a cross-encoder, which reads question and
passage together.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import os
from typing import Any

from absl import logging
import jax
from jaxtyping import Float, Int
import numpy as np

from rag_jax import artifacts
from rag_jax.config import MeshConfig
from rag_jax.config import RerankConfig
from rag_jax.config_rules import fields
from rag_jax.config_rules import range_problem
from rag_jax.config_rules import type_problem
from rag_jax.corpus.pairs import PairTemplate
from rag_jax.corpus.passages import Passage
from rag_jax.corpus.passages import Passages
from rag_jax.corpus.text_files import shorten
from rag_jax.corpus.tokenizer import load_tokenizer
from rag_jax.models.cross_encoder import CrossEncoder
from rag_jax.models.partitioning import batch_sharding
from rag_jax.models.partitioning import make_mesh
from rag_jax.models.partitioning import replicated
from rag_jax.models.rag import build_encoder
from rag_jax.models.rag import compute_dtype
from rag_jax.progress import Progress
from rag_jax.retrieval.exact import stack_rows
from rag_jax.retrieval.retriever import padded_length
from rag_jax.weights.cross_encoder import load_cross_encoder

_BLOCK = 8192  # pairs that are tokenized, and sorted by length, at a time

_Row = tuple[tuple[int, ...], tuple[int, ...]]  # tokens and types of a pair


def rerank_config(
  given: str | os.PathLike[str] | Mapping[str, Any] | None,
  config: RerankConfig,
) -> RerankConfig:
  """Returns a copy of `config` with other settings.

  Args:
    given: a directory or "hf:ORG/NAME" of a cross-encoder, "" for none; or
      settings by name; None: none are changed.
    config: the settings that are not given.

  Raises:
    TypeError: `given` is of another type.
    ValueError: there is no such setting, or a value is not possible.
  """
  if given is None:
    return config
  if isinstance(given, (str, os.PathLike)):
    given = {"init_from": os.fspath(given)}
  if not isinstance(given, Mapping):
    raise TypeError(
      f"rerank={shorten(given)} is of type {type(given).__name__}; expected a"
      " cross-encoder's directory or name, or settings by name, such as"
      " {'init_from': 'hf:cross-encoder/ms-marco-MiniLM-L6-v2'}."
    )
  known = {field.name for field in dataclasses.fields(RerankConfig)}
  if unknown := sorted(set(given) - known):
    raise ValueError(
      f"rerank={dict(given)!r} has {', '.join(map(repr, unknown))}; expected"
      f" some of {', '.join(sorted(known))}. Correct the names."
    )
  changed = dataclasses.replace(config, **given)
  _check_config(changed)
  if set(given) - {"init_from"} and not changed.init_from:
    raise ValueError(
      f"rerank={dict(given)!r} names no cross-encoder, and there was none"
      " before; expected init_from too. Name one, or leave the others out."
    )
  return changed


def open_reranker(config: RerankConfig) -> "Reranker | None":
  """Returns the reranker that the settings name, if any; errors as its own."""
  return Reranker(config) if config.init_from else None


def _check_config(config: RerankConfig) -> None:
  """Raises `ValueError` if a setting is not possible."""
  checked = fields(config, "rerank.")
  problems = [type_problem(*f) or range_problem(*f) for f in checked]
  if any(problems):
    raise ValueError(" ".join(filter(None, problems)))


def pair_text(passage: Passage) -> str:
  """Returns how a cross-encoder reads a passage: title and text."""
  return f"{passage.title} {passage.text}".strip()


class Reranker:
  """Orders passages by how well they answer a question.

  reranker = Reranker.open("hf:cross-encoder/ms-marco-MiniLM-L6-v2")
  hits = directory.search("when does it end?", 5, reranker=reranker)

  Attributes:
    config: its settings.
    identity: changes if weights, tokenizer or settings do.
    length: the most tokens of a pair.
  """

  def __init__(self, config: RerankConfig, devices: Sequence[Any] = ()):
    """Reads the cross-encoder; compiles nothing yet.

    Args:
      config: names it.
      devices: of this process, which share each batch; (): all.

    Raises:
      FileNotFoundError: there is no checkpoint, or no tokenizer in it.
      ValueError: a setting is not possible, or the checkpoint is damaged or no
        cross-encoder with one label.
    """
    _check_config(config)
    if not config.init_from:
      raise ValueError(
        "rerank.init_from='' names no cross-encoder. Give a directory, or a"
        " name such as hf:cross-encoder/ms-marco-MiniLM-L6-v2."
      )
    self.config = config
    loaded = load_cross_encoder(config.init_from)
    report = loaded.report
    logging.info(
      "The reranker %s has %d parameters. %s",
      *(config.init_from, report.num_parameters, "; ".join(report.notes)),
    )
    self._tokenizer = load_tokenizer(loaded.tokenizer)
    self._template = PairTemplate.of(self._tokenizer)
    encoder = loaded.encoder
    self.length = min(config.length, encoder.max_positions)
    self._check(encoder.num_token_types)
    devices = list(devices) or jax.local_devices()
    mesh = make_mesh(MeshConfig(data=len(devices)), devices)
    tower = build_encoder(
      encoder, vocab_size=0, max_positions=0, dtype=compute_dtype("auto")
    )
    model = CrossEncoder(tower, loaded.activation)
    self._params = jax.device_put(loaded.params, replicated(mesh))
    self._num_devices, self._rows = len(devices), batch_sharding(mesh)
    self._score = jax.jit(
      lambda params, *inputs: model.apply({"params": params}, *inputs)
    )
    self.identity = _identity(loaded.params, self._tokenizer.fingerprint, self)

  @property
  def memory_bytes(self) -> int:
    """Of the weights, on each device."""
    return sum(x.nbytes for x in jax.tree.leaves(self._params))

  @classmethod
  def open(cls, where: str | os.PathLike[str], **settings: Any) -> "Reranker":
    """Returns the reranker of a checkpoint.

    Args:
      where: a directory or "hf:ORG/NAME" of a cross-encoder with one label.
      **settings: other fields of `config.RerankConfig`: `candidates`, `length`,
        `batch_size`.

    Raises:
      TypeError: there is no such setting.
      FileNotFoundError: there is no checkpoint, or no tokenizer in it.
      ValueError: a setting is not possible, or the checkpoint is damaged or no
        cross-encoder with one label.
    """
    return cls(RerankConfig(init_from=os.fspath(where), **settings))

  def _check(self, num_token_types: int) -> None:
    """Raises `ValueError` if pairs do not fit the positions, or the types."""
    template, where = self._template, self.config.init_from
    if self.length < template.num_special + 2:
      raise ValueError(
        f"{where} reads {self.length} tokens (its positions, and rerank.length="
        f"{self.config.length}), but {template.num_special} special tokens"
        " leave no room for a question and a passage. Raise rerank.length, or"
        " give another cross-encoder."
      )
    if 0 < num_token_types < template.num_types:
      raise ValueError(
        f"The tokenizer in {where} has {template.num_types} types of tokens,"
        f" the weights have {num_token_types}; expected as many. They are of"
        " different checkpoints: copy both again."
      )

  def candidates_for(self, n_docs: int) -> int:
    """Returns how many passages the first stage has to find.

    Raises:
      ValueError: `n_docs` is below 1, or above that number.
    """
    if not 1 <= n_docs <= self.config.candidates:
      raise ValueError(
        f"n_docs={n_docs} passages are asked for, of rerank.candidates="
        f"{self.config.candidates}; expected at least 1, and at most as many."
        " Raise the number of candidates (--candidates), or change n_docs."
      )
    return self.config.candidates

  def last_lines(self, question: str) -> str:
    """Returns a question without first lines, so that it fits half of a pair.

    Its last line stays, whatever its length.
    """
    room = (self.length - self._template.num_special) // 2
    lines = question.split("\n")
    while lines[1:]:
      (ids,) = self._tokenizer.encode(["\n".join(lines)])
      if len(ids) <= room:
        break
      lines = lines[1:]
    return "\n".join(lines)

  def score(
    self,
    questions: Sequence[str],
    texts: Sequence[Sequence[str]],
    *,
    progress: bool = False,
  ) -> list[Float[np.ndarray, "_"]]:
    """Returns the logits of the texts of each question: higher is better.

    Equal pairs have equal logits, bit for bit. A pair that is longer than
    `length` loses the end of its longer text.

    Args:
      questions: B, any number.
      texts: for each question, any number; they may be empty.
      progress: whether to show it.

    Raises:
      ValueError: the tokenizer cannot read a text, or a logit is not a number.
    """
    total = sum(map(len, texts)) if progress else 0
    scores: list[np.ndarray] = []
    with Progress("Reranked", total, "pairs") as shown:
      for start, end in _blocks([len(some) for some in texts]):
        block = questions[start:end], texts[start:end]
        scores += self._score_block(*block, shown if total else None)
    return scores

  def _score_block(
    self,
    questions: Sequence[str],
    texts: Sequence[Sequence[str]],
    shown: Progress | None,
  ) -> list[Float[np.ndarray, "_"]]:
    distinct = list(dict.fromkeys(text for some in texts for text in some))
    tokens = dict(zip(distinct, self._tokenizer.encode(distinct), strict=True))
    asked = self._tokenizer.encode(questions)
    pairs = [
      [self._template.join(ids, tokens[text], self.length) for text in some]
      for ids, some in zip(asked, texts, strict=True)
    ]
    # Each pair once, so that equal ones are equal in spite of rounding.
    rows = dict.fromkeys(row for some in pairs for row in some)
    logits = self._logits(sorted(rows, key=lambda row: len(row[0])), shown)
    found = []
    for question, some in zip(questions, pairs, strict=True):
      values = np.array([logits[row] for row in some], np.float32)
      wrong = values[~np.isfinite(values)]
      if wrong.size:
        raise ValueError(
          f"The reranker {self.config.init_from} gives {wrong[0]} for the"
          f" question {shorten(question)}; expected a finite number. Its"
          " weights are damaged, or too large for this machine's numbers: copy"
          " them again, or give another reranker."
        )
      found.append(values)
    if shown is not None:
      shown.update(sum(map(len, pairs)) - len(rows))
    return found

  def _logits(
    self, rows: Sequence[_Row], shown: Progress | None
  ) -> dict[_Row, float]:
    """Returns the logit of each pair; the pairs are sorted by length."""
    size = min(self.config.batch_size, 1 << (len(rows) - 1).bit_length())
    size = -(-size // self._num_devices) * self._num_devices
    logits: dict[_Row, float] = {}
    waiting: list[tuple[Sequence[_Row], jax.Array]] = []

    def read() -> None:
      part, values = waiting.pop(0)
      logits.update(zip(part, np.asarray(values).tolist(), strict=False))
      if shown is not None:
        shown.update(len(part))

    for start in range(0, len(rows), size):
      part = rows[start : start + size]
      waiting.append((part, self._batch(part, size)))
      if len(waiting) > 1:  # the next batch is made while one is computed
        read()
    while waiting:
      read()
    return logits

  def _batch(self, rows: Sequence[_Row], size: int) -> Float[jax.Array, "N"]:
    """Returns the logits of up to `size` pairs, the longest last."""
    width = padded_length(len(rows[-1][0]), self.length)
    shape = size, width
    tokens = np.full(shape, self._tokenizer.pad_id, np.int32)
    types, mask = np.zeros(shape, np.int32), np.zeros(shape, bool)
    # The batch is filled up with its last pair.
    for i in range(size):
      ids, kinds = rows[min(i, len(rows) - 1)]
      tokens[i, : len(ids)], types[i, : len(ids)] = ids, kinds
      mask[i, : len(ids)] = True
    inputs = jax.device_put((tokens, mask, types), self._rows)
    return self._score(self._params, *inputs)

  def logits(
    self,
    questions: Sequence[str],
    ids: Int[np.ndarray, "B K"],
    passages: Passages,
  ) -> Float[np.ndarray, "B K"]:
    """Returns the logits of any passages; errors as `score`."""
    found = self.score(questions, _texts(list(ids), passages))
    return np.array(found, np.float32).reshape(ids.shape)

  def rank(
    self,
    questions: Sequence[str],
    ids: Int[np.ndarray, "B n"],
    passages: Passages,
    *,
    progress: bool = False,
  ) -> tuple[Int[np.ndarray, "B n"], Float[np.ndarray, "B n"]]:
    """Returns the candidates of each question and their logits, best first.

    Candidates with equal logits keep their order.

    Args:
      questions: B, any number.
      ids: the candidates, row numbers of `passages`; -1: none.
      passages: that were searched.
      progress: whether to show it.

    Returns:
      The ids, int32, those of -1 last, and their logits, float32; the lowest
      float32 where the id is -1.

    Raises:
      ValueError: as `score`.
    """
    found = [row[row >= 0] for row in ids]
    texts = _texts(found, passages)
    scores = self.score(questions, texts, progress=progress)
    best = []
    for some, values in zip(found, scores, strict=True):
      order = np.argsort(-values, kind="stable")
      best.append((some[order], values[order]))
    return stack_rows(best, ids.shape[1])


def _texts(
  ids: Sequence[Int[np.ndarray, "_"]], passages: Passages
) -> list[list[str]]:
  """Returns the texts of passages, each of which is read once."""
  rows = sorted({row for some in ids for row in some.tolist()})
  texts = dict(zip(rows, map(pair_text, passages.get(rows)), strict=True))
  return [[texts[row] for row in some.tolist()] for some in ids]


def _blocks(sizes: Sequence[int]) -> list[tuple[int, int]]:
  """Returns ranges of questions with about `_BLOCK` pairs each."""
  ranges, start, pairs = [], 0, 0
  for end, size in enumerate(sizes, start=1):
    pairs += size
    if pairs >= _BLOCK or end == len(sizes):
      ranges.append((start, end))
      start, pairs = end, 0
  return ranges


def _identity(params: Any, tokenizer: str, reranker: Reranker) -> str:
  leaves = jax.tree_util.tree_leaves_with_path(params)
  weights = artifacts.fingerprint_arrays(
    {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
  )
  config = dataclasses.replace(reranker.config, init_from="", batch_size=1)
  return artifacts.fingerprint_lines([weights, tokenizer, repr(config)])
