"""Questions and documents to the tokens that retriever and generator read.

In: questions, numbers of passages. Out: padded arrays with masks. A tokenizer
without a start token leaves out the <s> below.

    question  <s> question </s>                     the retriever's tokenizer
    passage   <s> title </s> text </s>              the retriever's
    target    answer </s>                           the generator's
              (after the token that answers are forced to begin with, if there
              is one: BART's <s>)
    context   <s> question </s> title </s> text </s>        the generator's

That is the context of data.context_style="question_first": the question stands
as it was asked, and is never cut to make room for a passage. "rag" is the
format of Hugging Face's `RagRetriever`, for models that were trained on it: one
string with the generator's own special tokens around it,

    prefix title title_sep text doc_sep question

Here the question is decoded from the retriever's tokens (BERT's are lower
case), and is the first to be cut. "prompt" is the text that prompts.py writes,
for language models; one prompt can hold all documents. Cut questions and
contexts are counted.

A question of a dialogue follows its earlier turns: see dialogue.py. These are
the first to be cut.
"""

from collections.abc import Iterator, Sequence
import contextlib
import functools
import threading

from jaxtyping import Bool, Int
import numpy as np

from rag_jax.config import DataConfig
from rag_jax.config import DialogueConfig
from rag_jax.config import PromptConfig
from rag_jax.corpus.tokenized import PLAIN
from rag_jax.corpus.tokenized import TokenizedPassages
from rag_jax.corpus.tokenized import Wording
from rag_jax.corpus.tokenizer import Tokenizer
from rag_jax.data.dialogue import Asked
from rag_jax.data.dialogue import DialogueText
from rag_jax.data.dialogue import TurnIds
from rag_jax.data.dialogue import last
from rag_jax.data.dialogue import own_length
from rag_jax.data.prompts import PromptBuilder
from rag_jax.data.substitution import Change
from rag_jax.data.substitution import substitute

Tokens = np.ndarray  # int32
Mask = np.ndarray  # bool
Ids = list[int]  # of one text, without special tokens

# Histories are those of questions and of contexts.
COUNTS: tuple[str, ...] = (
  "questions_cut", "contexts_cut", "targets_cut", "histories_cut"
)  # fmt: skip


def rag_context(
  title: str, text: str, question: str, config: DataConfig
) -> str:
  """Returns the context of a document and a question as one string.

  As `RagRetriever.postprocess_docs` of transformers 5: one quote is removed
  from either end of the title, and double spaces become single ones in one
  pass, so that three become two.
  """
  title = title.removeprefix('"').removesuffix('"')
  parts = (
    config.context_prefix,
    title,
    config.title_sep,
    text,
    config.doc_sep,
    question,
  )
  return "".join(parts).replace("  ", " ")


class ContextBuilder:
  """Builds padded token arrays of the lengths in the config.

  Attributes:
    tokenizer: the generator's.
    tokenized: the passages, tokenised with it.
    prompts: writes the contexts of the style "prompt"; None in others.
    counts: how many questions, contexts and targets were cut so far, except
      those counted by `counting`.
  """

  def __init__(
    self,
    tokenizer: Tokenizer,
    passages: TokenizedPassages,
    config: DataConfig,
    retriever_passages: TokenizedPassages | None = None,
    target_start: Sequence[int] = (),
    wording: Wording = PLAIN,
    *,
    prompt: PromptConfig | None = None,
    dialogue: DialogueConfig | None = None,
    joined: bool = False,
    ends: bool = False,
  ):
    """Prepares to build arrays.

    Args:
      tokenizer: the generator's.
      passages: tokenised with it. Contexts in the styles "rag" and "prompt"
        use only their strings.
      config: lengths and style.
      retriever_passages: tokenised with the retriever's tokenizer and wording,
        if that gives other ids.
      target_start: tokens that every target begins with, before the answer.
      wording: how the retriever reads questions. The passages have theirs.
      prompt: of the style "prompt"; None is the default.
      dialogue: how earlier turns are read; None is the default.
      joined: all documents are in one prompt.
      ends: prompts end with the end token, since an encoder reads them.

    Raises:
      ValueError: passages of another tokenizer, or a prompt that cannot be.
      FileNotFoundError: there is no file with examples for the prompt.
    """
    self._wording = wording
    self._target_start = target_start
    self.tokenizer = tokenizer
    self.tokenized = passages
    self._config = config
    if retriever_passages is None:
      retriever_passages = passages
    self._retriever_passages = retriever_passages
    self._retriever = self._retriever_passages.tokenizer
    self._as_strings = config.context_style != "question_first"
    if not self._as_strings and passages.tokenizer is not tokenizer:
      raise ValueError(
        "The passages have ids of another tokenizer than the generator's, which"
        " reads them. Expected passages tokenised with the generator's, and the"
        " others as retriever_passages; or set data.context_style='rag'."
      )
    self._dialogue = DialogueText(dialogue, config.context_length)
    self.prompts = None
    if config.context_style == "prompt":
      self.prompts = PromptBuilder(
        tokenizer,
        prompt or PromptConfig(),
        config.context_length,
        joined=joined,
        n_docs=config.n_docs,
        dialogue=self._dialogue,
        ends=ends,
      )
    self.counts = dict.fromkeys(COUNTS, 0)
    self._apart = threading.local()

  @contextlib.contextmanager
  def counting(self) -> Iterator[dict[str, int]]:
    """Yields separate counts of what this thread cuts inside the `with`.

    Then a batch that is made again after a restart can be counted once.
    """
    before = self._count_here()
    self._apart.counts = counts = dict.fromkeys(COUNTS, 0)
    try:
      yield counts
    finally:
      self._apart.counts = before

  def _count_here(self) -> dict[str, int]:
    return getattr(self._apart, "counts", self.counts)

  @property
  def retriever_passages(self) -> TokenizedPassages:
    """The passages, tokenised with the retriever's tokenizer."""
    return self._retriever_passages

  @property
  def one_tokenizer(self) -> bool:
    """Whether retriever and generator have the same tokenizer."""
    return self._retriever is self.tokenizer

  @property
  def reads_history(self) -> bool:
    """Whether a model reads earlier turns of a dialogue."""
    text = self._dialogue
    return bool(text.generator_turns or text.retriever_turns)

  def encode_questions(
    self, questions: Sequence[str | Asked]
  ) -> tuple[list[Ids], list[Ids]]:
    """Returns ids for `questions` and ids for `contexts`; often the same.

    The second are without the retriever's prompt. Both are with earlier turns,
    but those of prompts are the question's alone.
    """
    text, prompt = self._dialogue, self._wording.question_prompt
    most = text.generator_turns
    ids = text.encode(self._retriever, questions, text.retriever_turns, prompt)
    if self.prompts is not None:
      asked = [Asked.of(question) for question in questions]
      alone = self.tokenizer.encode([a.question for a in asked])
      return ids, [
        TurnIds(row, turns=last(a.history, most)) if a.history else row
        for row, a in zip(alone, asked, strict=True)
      ]
    tokenizer = self._retriever if self._as_strings else self.tokenizer
    same = tokenizer is self._retriever and most == text.retriever_turns
    if same and not prompt:
      return ids, ids
    return ids, text.encode(tokenizer, questions, most)

  def words(self, questions: Sequence[str | Asked]) -> list[str]:
    """Returns the texts that a search by words is asked: uncut, no names."""
    asked = [Asked.of(question) for question in questions]
    most = self._dialogue.retriever_turns
    return ["\n".join((*last(a.history, most), a.question)) for a in asked]

  def _fitted(self, ids: Ids, room: int, most: int = 0) -> Ids:
    """Returns ids without earlier turns that do not fit, and counts them."""
    if not isinstance(ids, TurnIds):
      return ids
    fitted = ids.fitted(room, most)
    self._count_here()["histories_cut"] += len(fitted) < len(ids)
    return fitted

  def encode_answers(self, answers: Sequence[str]) -> list[Ids]:
    """Returns ids for `targets`, as an answer follows its context."""
    before = self.prompts.before_answer if self.prompts else ""
    return self.tokenizer.encode([before + answer for answer in answers])

  @property
  def stop_ids(self) -> tuple[int, ...]:
    """The tokens that an answer also ends at; () in other styles."""
    return self.prompts.stop_ids if self.prompts else ()

  def num_docs(self, n_docs: int) -> int:
    """Returns how many of `n_docs` documents a context holds."""
    joined = self.prompts is not None and self.prompts.joined
    return n_docs if joined else min(n_docs, 1)

  def num_shared(self, tokens: Int[np.ndarray, "B K C"]) -> int:
    """Returns how many tokens all these contexts are known to begin with."""
    if self.prompts is None:
      return 0
    # The last ones may be merged with what follows.
    head = self.prompts.head[:-2]
    same = bool(np.all(tokens[..., : len(head)] == head))
    return len(head) if same else 0

  def retriever_ids(
    self, ids: Sequence[Ids], *, begins: bool = False
  ) -> list[Ids]:
    """Returns ids of the generator's tokenizer as ids of the retriever's.

    Two different tokenizers convert through text, which loses special tokens.

    Args:
      ids: of parts of questions.
      begins: whether these parts begin questions, so that a prompt comes first.
    """
    prompted = begins and bool(self._wording.question_prompt)
    if self.one_tokenizer and not prompted:
      return list(ids)
    texts = [self.tokenizer.decode(row) for row in ids]
    return self._retriever.encode(
      self._wording.questions(texts) if prompted else texts
    )

  def is_cut(self, question_ids: Ids, context_ids: Ids) -> bool:
    """Returns whether a question is too long for the retriever or generator.

    In a context of style "rag" a long document can cut it too: see `counts`.
    """
    data = self._config
    room = data.question_length - 1 - (self._retriever.bos_id is not None)
    if own_length(question_ids) > room:
      return True
    if self.prompts is not None:
      question = self.tokenizer.decode(context_ids)
      return self.prompts.cuts_question(question, self.num_docs(data.n_docs))
    if self._as_strings:
      return False
    room = data.context_length - 1 - (self.tokenizer.bos_id is not None)
    return own_length(context_ids) > room

  def _pad(
    self,
    rows: Sequence[Sequence[int]],
    length: int,
    counter: str,
    tokenizer: Tokenizer,
  ) -> tuple[Tokens, Mask]:
    """Returns rows [N, length] and their mask; cut rows keep the end token."""
    tokens = np.full((len(rows), length), tokenizer.pad_id, np.int32)
    mask = np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
      if len(row) > length:
        self._count_here()[counter] += 1
        row = [*row[: length - 1], tokenizer.eos_id]
      tokens[i, : len(row)] = row
      mask[i, : len(row)] = True
    return tokens, mask

  def questions(self, question_ids: Sequence[Ids]) -> tuple[Tokens, Mask]:
    """Returns the question encoder's input, [B, Q], and its mask."""
    start, end = _start(self._retriever), [self._retriever.eos_id]
    length = self._config.question_length
    room = length - len(start) - 1
    rows = [[*start, *self._fitted(ids, room), *end] for ids in question_ids]
    return self._pad(rows, length, "questions_cut", self._retriever)

  def passages(
    self, rows: np.ndarray, changes: Sequence[Change] = ()
  ) -> tuple[Tokens, Mask]:
    """Returns the passage encoder's input, [..., L], for passage numbers.

    Args:
      rows: passage numbers; [B, K] with `changes`.
      changes: of B questions, whose subjects are changed here too.
    """
    body = self._retriever_passages.tokens[rows]
    lengths = self._retriever_passages.lengths[rows]
    for b, change in enumerate(changes):
      if change.subject:
        old, new = self._retriever.encode(change.subject)
        renamed = Change(((old, new),))
        for k, row in enumerate(rows[b].tolist()):
          ids = substitute(self._retriever_passages, row, renamed)
          ids = ids[: body.shape[2]]
          body[b, k] = self._retriever.pad_id
          body[b, k, : len(ids)] = ids
          lengths[b, k] = len(ids)
    first = _start(self._retriever)
    start = np.broadcast_to(
      np.array(first, np.int32), (*body.shape[:-1], len(first))
    )
    tokens = np.concatenate([start, body], axis=-1)
    # With the start token, a row is one longer than its passage.
    lengths = lengths[..., None] + len(first)
    return tokens, np.arange(tokens.shape[-1]) < lengths

  def targets(self, answer_ids: Sequence[Ids]) -> tuple[Tokens, Mask]:
    """Returns the target tokens of answers, [B, T], and their mask."""
    start, end = self._target_start, self.tokenizer.eos_id
    rows = [[*start, *ids, end] for ids in answer_ids]
    return self._pad(
      rows, self._config.target_length, "targets_cut", self.tokenizer
    )

  def contexts(
    self,
    question_ids: Sequence[Ids],
    rows: Int[np.ndarray, "B K"],
    changes: Sequence[Change] | None = None,
  ) -> tuple[Tokens, Mask]:
    """Returns the generator's input, [B, K, C], and its mask.

    If prompts hold all documents, it is [B, 1, C].

    Args:
      question_ids: tokens of B questions, from the generator's tokenizer; in
        the style "rag", from the retriever's. `encode_questions` returns them.
      rows: passage numbers; K = 0 gives one context per question, which holds
        only the question.
      changes: replacements to make in each question's documents.

    Raises:
      ValueError: changes in a style whose documents are strings.
    """
    if self._as_strings:
      if any(change.replacements for change in changes or ()):
        raise ValueError(
          "Names are changed in the documents' tokens, but with"
          f" data.context_style={self._config.context_style!r} the generator"
          " reads them as strings. Set data.substitute_answers=0.0,"
          " data.substitute_subjects=0.0 or"
          " data.context_style='question_first'."
        )
      if self.prompts is not None:
        return self._prompt_contexts(self.prompts, question_ids, rows)
      return self._string_contexts(question_ids, rows)
    length = self._config.context_length
    tokenizer = self.tokenizer
    start = _start(tokenizer)
    longest = length - len(start) - 1
    n_docs = max(rows.shape[1], 1)
    tokens = np.full(
      (len(question_ids), n_docs, length), tokenizer.pad_id, np.int32
    )
    mask = np.zeros(tokens.shape, bool)
    for b, ids in enumerate(question_ids):
      ids = self._fitted(ids, longest, self._dialogue.history_length)
      if len(ids) > longest:
        self._count_here()["contexts_cut"] += 1
      head = [*start, *ids[:longest], tokenizer.eos_id]
      tokens[b, :, : len(head)] = head
      mask[b, :, : len(head)] = True
      room = length - len(head)
      change = changes[b] if changes else Change()
      if not change.replacements:
        self._put(rows[b], tokens[b], mask[b], len(head))
        continue
      for k, row in enumerate(rows[b].tolist()):
        body = substitute(self.tokenized, row, change)
        if len(body) > room:
          self._count_here()["contexts_cut"] += 1
          body = body[:room]
        tokens[b, k, len(head) : len(head) + len(body)] = body
        mask[b, k, len(head) : len(head) + len(body)] = True
    return tokens, mask

  def _put(
    self,
    rows: Int[np.ndarray, "K"],
    tokens: Int[np.ndarray, "_ C"],
    mask: Bool[np.ndarray, "_ C"],
    start: int,
  ) -> None:
    """Writes passages into rows of padding, from column `start` on."""
    room = tokens.shape[1] - start
    body = self.tokenized.tokens[rows, :room]
    lengths = self.tokenized.lengths[rows]
    where = slice(len(rows)), slice(start, start + body.shape[1])
    tokens[where] = body  # padded alike
    mask[where] = np.arange(body.shape[1]) < lengths[:, None]
    self._count_here()["contexts_cut"] += int(np.sum(lengths > room))

  def _string_contexts(
    self, question_ids: Sequence[Ids], rows: Int[np.ndarray, "B K"]
  ) -> tuple[Tokens, Mask]:
    """Returns contexts in the style "rag", [B, K, C]."""
    data, retriever = self._config, self._retriever
    # The question as the question encoder reads it, decoded to text.
    longest = data.question_length - len(_start(retriever)) - 1

    def string(row: int | None, ids: Ids) -> str:
      question = retriever.decode_hf(ids)
      if row is None:
        return (data.context_prefix + question).replace("  ", " ")
      doc = self.tokenized.passages[row]
      return rag_context(doc.title, doc.text, question, data)

    def fits(row: int | None, ids: Ids) -> bool:
      text = string(row, ids)
      return not self.tokenizer.encode_inputs([text], data.context_length)[1]

    strings = []
    for ids, docs in zip(question_ids, rows.tolist(), strict=True):
      for row in docs or [None]:
        shown = ids[:longest]
        if isinstance(ids, TurnIds):
          most = self._dialogue.history_length
          shown = ids.longest(functools.partial(fits, row), most)
          self._count_here()["histories_cut"] += len(shown) < len(ids)
        strings.append(string(row, shown))
    ids, num_cut = self.tokenizer.encode_inputs(strings, data.context_length)
    self._count_here()["contexts_cut"] += num_cut
    return self._padded_contexts(ids, max(rows.shape[1], 1))

  def _prompt_contexts(
    self,
    prompts: PromptBuilder,
    question_ids: Sequence[Ids],
    rows: Int[np.ndarray, "B K"],
  ) -> tuple[Tokens, Mask]:
    """Returns contexts in the style "prompt", [B, K, C] or [B, 1, C]."""
    asked, shown, histories = [], [], []
    for ids, numbers in zip(question_ids, rows.tolist(), strict=True):
      docs = [self.tokenized.passages[row] for row in numbers]
      alone = docs and not prompts.joined
      groups = [[doc] for doc in docs] if alone else [docs]
      asked += [self.tokenizer.decode(ids)] * len(groups)
      shown += groups
      turns = ids.turns if isinstance(ids, TurnIds) else ()
      histories += [turns] * len(groups)
    counts = self._count_here()
    contexts, num_cut = prompts.encode(asked, shown, histories, counts)
    counts["contexts_cut"] += num_cut
    num_rows = 1 if prompts.joined else max(rows.shape[1], 1)
    return self._padded_contexts(contexts, num_rows)

  def _padded_contexts(
    self, contexts: Sequence[Ids], num: int
  ) -> tuple[Tokens, Mask]:
    """Returns contexts, `num` of each question in turn, as [B, num, C]."""
    length = self._config.context_length
    tokens, mask = self._pad(contexts, length, "contexts_cut", self.tokenizer)
    return tokens.reshape(-1, num, length), mask.reshape(-1, num, length)


def _start(tokenizer: Tokenizer) -> Ids:
  """Returns the tokens that rows begin with: the start token, if any."""
  return [] if tokenizer.bos_id is None else [tokenizer.bos_id]
