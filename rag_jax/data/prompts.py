"""Questions and passages to the prompt that a language model continues.

In: questions, each with its passages. Out: token ids of the whole prompt, as
the tokenizer of transformers encodes it, without an end token.

    plain    (prompt, before_answer, answer, shot_separator) of each example,
             then the prompt of the question
    chat     messages: system, (user: prompt, assistant: answer) of each
             example, earlier turns of the dialogue, user: prompt of the
             question; by the tokenizer's template

Earlier turns are in a plain prompt the start of the question; or a template
with `history` shows them. Where a prompt is too long, the longest texts of its
passages are cut, then their titles, then the earlier turns from their start,
then the question; never the examples or the rest of the template.
"""

import bisect
from collections.abc import Callable, Sequence
import dataclasses

from rag_jax.config import PromptConfig
from rag_jax.config_prompts import compile_template
from rag_jax.config_prompts import history_of
from rag_jax.config_prompts import shows_history
from rag_jax.config_prompts import template_problem
from rag_jax.corpus.chat import Chat
from rag_jax.corpus.passages import Passage
from rag_jax.corpus.text_files import check_fields
from rag_jax.corpus.text_files import find_file
from rag_jax.corpus.text_files import read_records
from rag_jax.corpus.text_files import shorten
from rag_jax.corpus.tokenizer import Tokenizer
from rag_jax.data.dialogue import DialogueText
from rag_jax.data.dialogue import without_start

Ids = list[int]

_SHOTS = (
  'a file of JSON lines such as {"question": "Who?", "answer": "Ada",'
  ' "passages": [{"title": "Ada", "text": "..."}]}'
)
_EMPTY = Passage("", "", "")
# Two questions and passages without a common beginning.
_APART = (("a", Passage("", "b", "c")), ("1", Passage("", "2", "3")))


@dataclasses.dataclass(frozen=True, slots=True)
class Shot:
  """An example in the prompt: a question with its answer."""

  question: str
  answer: str
  passages: tuple[Passage, ...] = ()


def read_shots(path: str) -> tuple[Shot, ...]:
  """Returns the examples in a file of JSON lines, in its order.

  Raises:
    FileNotFoundError: there is no such file; names similar ones.
    ValueError: a line is no example; begins with `path:line`.
  """
  file = find_file(path, f"{_SHOTS}, as prompt.shots")
  shots = []
  required = {"question": str, "answer": str}
  optional = {"passages": list}
  for line, record in read_records(file, required=required, optional=optional):
    passages = []
    for number, fields in enumerate(record.get("passages", [])):
      where = f"{path}:{line}: passages[{number}]"
      if not isinstance(fields, dict):
        raise ValueError(
          f"{where} is {shorten(fields)}. Expected an object with 'title' and"
          " 'text'. Correct it."
        )
      check_fields(fields, where, required={"title": str, "text": str})
      passages.append(Passage("", fields["title"], fields["text"]))
    shots.append(Shot(record["question"], record["answer"], tuple(passages)))
  if not shots:
    raise ValueError(
      f"prompt.shots={path!r} is empty. Expected {_SHOTS}. Add lines, or set"
      " prompt.shots=''."
    )
  return tuple(shots)


class PromptBuilder:
  """Writes prompts and encodes them.

  Attributes:
    joined: whether a prompt holds all passages of its question, or one.
    before_answer: text between the prompt and an answer.
    stop_ids: the tokens whose text contains prompt.stop.
    head: the first tokens of every prompt, as far as they are known before any
      question; the last ones may differ where the tokenizer merges them with
      what follows.
  """

  def __init__(
    self,
    tokenizer: Tokenizer,
    config: PromptConfig,
    length: int,
    *,
    joined: bool,
    n_docs: int,
    dialogue: DialogueText | None = None,
    ends: bool = False,
  ):
    """Reads the examples and checks everything that does not need a question.

    Args:
      tokenizer: the generator's.
      config: what prompts look like.
      length: most tokens of a prompt, data.context_length.
      joined: one prompt holds all passages of a question.
      n_docs: passages of a question; 0 shows none, in examples neither.
      dialogue: how earlier turns are written in a plain prompt.
      ends: whether prompts end with the tokenizer's end token, as an encoder
        reads them.

    Raises:
      FileNotFoundError: there is no file prompt.shots.
      ValueError: a setting of the prompt cannot be used.
    """
    if problem := template_problem(config.template, n_docs):
      raise ValueError(problem)
    self._tokenizer, self._config = tokenizer, config
    self._length, self._ends = length, ends
    self._template = compile_template(config.template)
    self._dialogue = dialogue or DialogueText()
    self._shows_history = shows_history(config.template)
    self._chat = self._open_chat() if config.chat else None
    self.joined = joined
    self.before_answer = "" if config.chat else config.before_answer
    self.stop_ids = self._find_stop()
    most = n_docs if joined else min(n_docs, 1)
    shown = None if joined and n_docs else min(n_docs, 1)  # of an example
    self._shots = [
      (self._render(shot.question, shot.passages[:shown]), shot.answer)
      for shot in (read_shots(config.shots) if config.shots else ())
    ]
    for num in sorted({0, most}):
      self._check_room(num)
    texts = [self.text(question, [doc] * most) for question, doc in _APART]
    self.head = self._encode([_common_start(*texts)], ends=False)[0]

  def _open_chat(self) -> Chat:
    try:
      return Chat(self._tokenizer)
    except ValueError as error:
      raise ValueError(
        f"prompt.chat=True: {error} Or set prompt.chat=False."
      ) from error

  def _find_stop(self) -> tuple[int, ...]:
    """Returns the ids of tokens that hold prompt.stop."""
    stop = self._config.stop
    if not stop:
      return ()
    texts = self._tokenizer.tokens(range(self._tokenizer.largest_id + 1))
    found = tuple(i for i, text in enumerate(texts) if stop in text)
    if not found:
      raise ValueError(
        f"prompt.stop={stop!r} is in no single token of the generator's"
        " tokenizer, so that no answer would end there. Expected a text that"
        " one token holds, such as '\\n'. Shorten it, or set prompt.stop=''."
      )
    return found

  def _check_room(self, num: int) -> None:
    """Raises `ValueError` if `num` passages do not fit, without any text."""
    size = len(self._encode([self.text("", [_EMPTY] * num)])[0])
    if size > self._length:
      raise ValueError(
        f"prompt.template and prompt.shots ({len(self._shots)} examples) take"
        f" {size} tokens for {num} passages, even without question and"
        f" passages, but data.context_length={self._length}. Expected room for"
        " both. Raise data.context_length, or shorten template and examples."
      )

  def _render(
    self,
    question: str,
    passages: Sequence[Passage],
    turns: Sequence[str] = (),
  ) -> str:
    """Returns the template with a question and its passages."""
    docs = [{"title": doc.title, "text": doc.text} for doc in passages]
    try:
      return self._template.render(
        question=question, passages=docs, history=history_of(turns)
      )
    except Exception as error:  # a template can fail in any way
      raise ValueError(
        f"prompt.template fails for the question {question[:60]!r} with"
        f" {len(docs)} passages ({error}). Expected one for any text, also"
        " empty. Correct it."
      ) from error

  def text(
    self,
    question: str,
    passages: Sequence[Passage],
    turns: Sequence[str] = (),
  ) -> str:
    """Returns the whole prompt, with examples and messages."""
    if self._shows_history:
      last, turns = self._render(question, passages, turns), ()
    elif self._chat is None:
      last = self._render(self._dialogue.text(question, turns), passages)
    else:
      last = self._render(question, passages)
    if self._chat is None:
      before, after = self.before_answer, self._config.shot_separator
      shots = (f"{prompt}{before}{x}{after}" for prompt, x in self._shots)
      return "".join([*shots, last])
    # A chat begins with its user, so an answer without its question goes.
    turns = turns[len(turns) % 2 :]
    said = [(turn["speaker"], turn["text"]) for turn in history_of(turns)]
    said.append(("user", last))
    for prompt, answer in reversed(self._shots):
      said = [("user", prompt), ("assistant", answer), *said]
    if self._config.system:
      said = [("system", self._config.system), *said]
    return self._chat.text(
      [
        {"role": role, "content": self._chat.harmless(content)}
        for role, content in said
      ]
    )

  def _encode(self, texts: Sequence[str], *, ends: bool = True) -> list[Ids]:
    """Returns ids of prompts; of a chat, with its special tokens."""
    if self._chat is not None:
      return self._tokenizer.encode_special(texts)
    return self._tokenizer.encode_prompts(texts, ends=self._ends and ends)

  def encode(
    self,
    questions: Sequence[str],
    passages: Sequence[Sequence[Passage]],
    histories: Sequence[Sequence[str]] = (),
    counts: dict[str, int] | None = None,
  ) -> tuple[list[Ids], int]:
    """Returns ids of prompts that fit, and how many of them were cut.

    Args:
      questions: of N prompts.
      passages: of each, best first.
      histories: of each, the earlier turns; (): none has any.
      counts: "histories_cut" in it grows by the cut ones.

    Raises:
      ValueError: there are more passages than fit without any of their text.
    """
    whole = histories or [()] * len(questions)
    limited = list(map(self._limited, whole))
    texts = list(map(self.text, questions, passages, limited))
    rows, num_cut = self._encode(texts), 0
    for i, ids in enumerate(rows):
      if len(ids) > self._length:
        parts = questions[i], passages[i], limited[i]
        rows[i], limited[i] = self._cut(*parts, len(ids))
        num_cut += 1
    if counts is not None:
      changed = (a != b for a, b in zip(whole, limited, strict=True))
      counts["histories_cut"] += sum(changed)
    return rows, num_cut

  def _limited(self, turns: Sequence[str]) -> Sequence[str]:
    """Returns the end of earlier turns that dialogue.history_length leaves."""
    most = self._dialogue.history_length
    if not most or not turns:
      return turns
    ends = self._tokenizer.token_ends(turns)
    return without_start(turns, ends, max(sum(map(len, ends)) - most, 0))

  def cuts_question(self, question: str, num: int) -> bool:
    """Returns whether a question is cut, with `num` passages in a prompt."""
    ids = self._encode([self.text(question, [_EMPTY] * num)])[0]
    return len(ids) > self._length

  def _cut(
    self,
    question: str,
    passages: Sequence[Passage],
    turns: Sequence[str],
    size: int,
  ) -> tuple[Ids, Sequence[str]]:
    """Returns the ids of a prompt that was too long, and its earlier turns.

    Args:
      question: of the prompt.
      passages: as they are.
      turns: that are before the question.
      size: of the whole prompt, in tokens.
    """
    titles = [passage.title for passage in passages]
    texts = [passage.text for passage in passages]

    def encoded() -> Ids:
      docs = [Passage("", *both) for both in zip(titles, texts, strict=True)]
      return self._encode([self.text(cut[0], docs, turns)])[0]

    def fits(number: int) -> bool:
      nonlocal turns
      turns = without_start(whole, ends, number)
      return len(encoded()) <= self._length

    cut = [question]
    whole, ids = turns, []
    ends = self._tokenizer.token_ends(turns)
    numbers = range(sum(map(len, ends)))
    for parts in (texts, titles, None, cut):
      if parts is not None:
        ids = self._shorten(parts, size, encoded)
      elif turns:
        fits(bisect.bisect_left(numbers, True, key=fits))
        ids = encoded()
      size = len(ids)
      if size <= self._length:
        return ids, turns
    self._check_room(len(passages))
    raise ValueError(
      f"prompt.template takes {size} tokens for an empty question, but"
      f" data.context_length={self._length}. Expected fewer than for any other"
      " question. Correct the template, or raise data.context_length."
    )

  def _shorten(
    self, parts: list[str], size: int, encoded: Callable[[], Ids]
  ) -> Ids:
    """Cuts `parts` of a prompt until it fits, or nothing is left of them.

    All parts are limited to the same number of tokens, so that the longest is
    cut first.

    Args:
      parts: are changed.
      size: of the whole prompt, in tokens.
      encoded: returns the whole prompt with the parts as they are.
    """
    whole, ends = list(parts), self._tokenizer.token_ends(parts)
    sizes = list(map(len, ends))
    most, excess, step = max(sizes, default=0) + 1, 0, 1
    ids: Ids = []
    while size > self._length and most:
      # Tokens merge otherwise in a cut text: fewer may go than were cut. Twice
      # as many each time, for templates that do not show all of a text.
      excess += (size - self._length) * step
      step *= 2
      most = min(most - 1, _limit(sizes, excess))
      for i, text in enumerate(whole):
        if not most:
          parts[i] = ""
        elif most < sizes[i]:
          parts[i] = text[: ends[i][most - 1]]
      ids = encoded()
      size = len(ids)
    return ids


def _common_start(a: str, b: str) -> str:
  """Returns the longest text that both begin with."""
  num = next(
    (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y),
    min(len(a), len(b)),
  )
  return a[:num]


def _limit(sizes: Sequence[int], excess: int) -> int:
  """Returns the limit of all sizes that takes `excess` in all from them; or 0.

  The largest one that does.
  """

  def kept(limit: int) -> int:
    return sum(min(size, limit) for size in sizes)

  limits = range(max(sizes, default=0) + 1)
  keep = max(kept(limits[-1]) - excess, 0)
  return bisect.bisect_right(limits, keep, key=kept) - 1
