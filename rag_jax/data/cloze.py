"""The warm-up's examples: questions made of passages, without labels.

Inverse cloze (Lee et al. 2019, https://arxiv.org/abs/1906.00300, section 5) and
span infilling (Lewis et al. 2019, https://arxiv.org/abs/1910.13461, section 2)
in one: a span of a passage is masked. The window around the mask serves as the
question, the passage as the document, and the span as the answer.

In: passage tokens, a seed and a step. Out: a `RagBatch` with K = 1.
"""

from collections.abc import Sequence

import numpy as np

from rag_jax.config import Config
from rag_jax.corpus.tokenized import TokenizedPassages
from rag_jax.corpus.tokenizer import Tokenizer
from rag_jax.data.context import ContextBuilder
from rag_jax.models.batch import RagBatch


class ClozeBatches:
  """Batches of the warm-up stage; a function of (seed, step) alone."""

  def __init__(
    self,
    tokenizer: Tokenizer,
    passages: TokenizedPassages,
    context: ContextBuilder,
    config: Config,
    *,
    share: Sequence[int] | None = None,  # rows that this process loads
  ):
    if config.warmup.batch_size > len(passages):
      raise ValueError(
        f"warmup.batch_size={config.warmup.batch_size} is more than there are"
        f" passages ({len(passages)}), and the warm-up uses each at most once"
        " per batch. Lower it, or skip the warm-up: warmup.num_steps=0."
      )
    retriever = context.retriever_passages.tokenizer
    self._mask_id = _mask_id(tokenizer, "generator")
    if config.data.n_docs:
      self._question_mask_id = _mask_id(retriever, "retriever")
    self._end = tokenizer.eos_id
    self._passages = passages
    self._context = context
    self._config = config
    everything = range(config.warmup.batch_size)
    self._share = list(everything if share is None else share)

  def _mask_span(
    self, rng: np.random.Generator, row: int
  ) -> tuple[list[int], list[int], list[int]]:
    """Returns the tokens before a span, those after it, and the span."""
    settings = self._config.warmup
    length = int(self._passages.lengths[row])
    ids = self._passages.tokens[row, :length].tolist()
    # Where words begin, and after the last one: the end token.
    begins = np.flatnonzero(self._passages.begins_word[row, :length])
    # A span of words stays in the title or in the text.
    inner = [i for i in range(len(begins) - 1) if ids[begins[i]] != self._end]
    first = int(rng.choice(inner)) if inner else 0
    last = first + int(rng.integers(1, settings.span_max_words + 1))
    start = stop = int(begins[first])
    for begin in begins[first + 1 : last + 1].tolist():
      stop = begin
      if ids[stop] == self._end:
        break
    size = min(max(stop - start, 1), settings.span_max_tokens)
    ids = ids[:-1]  # the end token is not asked for
    before, after = ids[:start], ids[start + size :]
    # Fill the window from both sides, as far as there are tokens.
    width = min(settings.window_tokens, len(before) + len(after))
    fewest = max(width - len(after), 0)
    left = int(rng.integers(fewest, min(width, len(before)) + 1))
    return (
      before[len(before) - left :],
      after[: width - left],
      ids[start : start + size],
    )

  def batch(self, step: int) -> RagBatch:
    """Returns this process's part of the batch of warm-up step `step`."""
    config = self._config
    rng = np.random.default_rng((config.seed, step))
    # Without replacement: a passage twice would be its own negative.
    rows = rng.choice(
      len(self._passages), config.warmup.batch_size, replace=False
    )
    befores, afters, spans = zip(
      *(self._mask_span(rng, int(r)) for r in rows), strict=True
    )
    # Every process draws the whole batch and keeps its own rows.
    rows = rows[self._share]
    befores, afters, spans = (
      [parts[i] for i in self._share] for parts in (befores, afters, spans)
    )
    windows = _masked(befores, self._mask_id, afters)
    target_tokens, target_mask = self._context.targets(spans)
    if not config.data.n_docs:  # closed book: the passage is not shown
      docs = np.zeros((len(rows), 0), np.int64)
      context_tokens, context_mask = self._context.contexts(windows, docs)
      return RagBatch(context_tokens, context_mask, target_tokens, target_mask)
    context_tokens, context_mask = self._context.contexts(
      windows, rows[:, None]
    )
    question_tokens, question_mask = self._context.questions(
      _masked(
        self._context.retriever_ids(befores, begins=True),
        self._question_mask_id,
        self._context.retriever_ids(afters),
      )
    )
    doc_tokens, doc_mask = self._context.passages(rows[:, None])
    return RagBatch(
      context_tokens=context_tokens,
      context_mask=context_mask,
      target_tokens=target_tokens,
      target_mask=target_mask,
      question_tokens=question_tokens,
      question_mask=question_mask,
      doc_tokens=doc_tokens,
      doc_mask=doc_mask,
    )


def _mask_id(tokenizer: Tokenizer, part: str) -> int:
  """Returns the token that stands for a span.

  Raises:
    ValueError: there is none.
  """
  if tokenizer.mask_id is None:
    raise ValueError(
      f"The {part}'s tokenizer has neither mask_token nor unk_token, and the"
      " warm-up masks spans with one of them; expected one in"
      " tokenizer_config.json. Use another tokenizer, or skip the warm-up:"
      " warmup.num_steps=0."
    )
  return tokenizer.mask_id


def _masked(
  befores: Sequence[list[int]], mask_id: int, afters: Sequence[list[int]]
) -> list[list[int]]:
  """Returns windows in which the mask stands for a span."""
  return [
    [*before, mask_id, *after]
    for before, after in zip(befores, afters, strict=True)
  ]
