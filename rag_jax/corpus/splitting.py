"""Documents to passages: as an encoder reads them, by words, sentences, or not.

In: documents. Out: passages that are parts of their text, white space inside
them unchanged. Of a document one passage is made at a time.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
import dataclasses
import itertools
from typing import Protocol, runtime_checkable

from rag_jax import config_rules
from rag_jax.config import choice
from rag_jax.config import number
from rag_jax.corpus.document import Document
from rag_jax.corpus.encoded_data import data_spans
from rag_jax.corpus.encoded_data import left_over
from rag_jax.corpus.passages import Passage
from rag_jax.corpus.report import CorpusReport
from rag_jax.corpus.sections import Section
from rag_jax.corpus.sections import join_path
from rag_jax.corpus.sections import sections
from rag_jax.corpus.text_spans import Span
from rag_jax.corpus.text_spans import inside_word
from rag_jax.corpus.text_spans import line_spans
from rag_jax.corpus.text_spans import sentence_spans
from rag_jax.corpus.text_spans import word_spans

# That an encoder reads with a passage: a start token, and an end token behind
# the title and behind the text.
_NUM_SPECIAL = 3
_COUNTED_AT_ONCE = 256  # sentences or words that are tokenised together


@runtime_checkable  # the type checks of the tests ask for it
class Encoder(Protocol):
  """What counts tokens: a `Tokenizer`, or anything with its `encode`."""

  def encode(self, texts: Sequence[str]) -> Sequence[Sequence[int]]:
    """Returns the token ids of each text, without special tokens."""
    ...


@dataclasses.dataclass(slots=True, kw_only=True, unsafe_hash=True)
class SplitConfig:
  """How documents become passages."""

  # "fit": of each section under a heading as many whole sentences as fit, else
  # whole lines; the headings above are the title, which counts too. "words":
  # `size` words each, disjoint, as DPR's. "sentences": as many whole sentences
  # as fit. "none": each document is one passage.
  method: str = choice("words", "fit", "sentences", "none")
  # Of a passage, at most. With "fit" in tokens: of all that the encoder reads
  # of it, with the title and special tokens; and 0 means: as the encoder says.
  size: int = number(100, least=1)
  unit: str = choice("words", "tokens")
  # Of the passage before, whole sentences that are repeated; at most, in units.
  overlap: int = 0
  # A longer run without white space counts as several words.
  max_word_chars: int = number(100, least=1)
  # Longer passages lose their end, which is counted; 0: none does.
  max_chars: int = 0
  drop_encoded: bool = False  # leave out base64 and the like; it is counted


def validate(settings: SplitConfig) -> SplitConfig:
  """Returns `settings` if they are possible.

  Raises:
    ValueError: names every violation, with its value and what was expected.
  """
  problems = []
  for name, field, value in config_rules.fields(settings, "split."):
    if field.name == "size" and value == 0 and settings.method == "fit":
      continue
    problem = config_rules.type_problem(name, field, value)
    problems.append(problem or config_rules.range_problem(name, field, value))
  problems = [p for p in problems if p]
  s = settings
  if not problems:
    if s.overlap and s.method not in ("fit", "sentences"):
      problems.append(
        f"split.overlap={s.overlap} is for split.method='sentences' or 'fit',"
        f" not {s.method!r}, whose passages are disjoint. Set it to 0."
      )
    if s.size and s.overlap >= s.size:
      problems.append(
        f"split.overlap={s.overlap} must be below split.size={s.size}, or a"
        " passage would only repeat the one before."
      )
    if s.unit != "words" and s.method == "none":
      problems.append(
        f"split.unit={s.unit!r} is the unit of split.size, which"
        " split.method='none' does not read. Set it to 'words'."
      )
  if problems:
    raise ValueError("The splitting is not valid:\n  " + "\n  ".join(problems))
  return settings


@dataclasses.dataclass(frozen=True, slots=True)
class _Part:
  """A sentence or word, which is divided only if it is too long alone."""

  start: int
  end: int
  size: int  # in units; of tokens an estimate, as neighbours may be merged
  ends: bool  # False inside a sentence or word that was divided


class Splitter:
  """Splits one document after the other."""

  def __init__(
    self,
    settings: SplitConfig,
    *,
    tokenizer: Encoder | None = None,
    report: CorpusReport | None = None,
  ):
    """Checks the settings.

    Args:
      settings: how to split.
      tokenizer: counts tokens, if that is the unit.
      report: where it is counted what was split, broken and cut.

    Raises:
      ValueError: the settings are not possible.
    """
    self._settings = validate(settings)
    self._report = CorpusReport() if report is None else report
    self._tokenizer = tokenizer
    if (settings.unit == "tokens") != (tokenizer is not None):
      given = "none is given" if tokenizer is None else "a tokenizer is given"
      raise ValueError(
        f"split.unit={settings.unit!r}, but {given}. Expected a tokenizer if"
        " the unit is 'tokens', and none if it is 'words'. Set split.unit, or"
        " name a tokenizer."
      )
    if not settings.size:
      raise ValueError(
        "split.size=0 stands for the length that an encoder reads, but there is"
        " no encoder here. Expected a number above 0. Set split.size."
      )

  def split(self, document: Document) -> Iterator[Passage]:
    """Yields the passages of a document.

    A single one has the document's id, of several the first is "id#0". Title
    and metadata are the document's in each.
    """
    if self._settings.drop_encoded:
      document = self._without_data(document)
      if not document.text.strip():
        what = f"{document.where}: it holds encoded data and no text"
        self._report.drop("empty", what)
        return
    pieces = self._pieces(document)
    first = list(itertools.islice(pieces, 2))
    if len(first) > 1:
      self._report.split += 1
      self._report.note("split", document.where)
    for i, (title, text) in enumerate(itertools.chain(first, pieces)):
      name = f"{document.id}#{i}" if len(first) > 1 else document.id
      text = self._cut(text, document.where)
      yield Passage(name, title, text, document.metadata)

  def _without_data(self, document: Document) -> Document:
    """Returns a document without encoded data, which is counted."""
    spans = data_spans(document.text)
    if not spans:
      return document
    for start, end in spans:
      self._report.leave_out(end - start, document.where)

    def place(old: int) -> int:
      return old - sum(min(e, old) - s for s, e in spans if s < old)

    return dataclasses.replace(
      document,
      text="".join(left_over(document.text, spans)),
      headings=tuple(
        dataclasses.replace(h, start=place(h.start), end=place(h.end))
        for h in document.headings
      ),
    )

  def _cut(self, text: str, where: str) -> str:
    """Returns `text` as long as a passage may be, and counts what it lost."""
    limit = self._settings.max_chars
    if not limit or len(text) <= limit:
      return text
    self._report.cut += 1
    self._report.cut_chars += len(text) - limit
    self._report.note("cut", f"{where}: {len(text) - limit} characters")
    return text[:limit]

  def _pieces(self, document: Document) -> Iterator[tuple[str, str]]:
    """Yields title and text of the passages of a document."""
    if self._settings.method == "fit":
      for section in sections(document):
        yield from self._fitted(section, document)
      return
    for start, end in self._spans(document):
      yield document.title, document.text[start:end]

  def _fitted(
    self, section: Section, document: Document
  ) -> Iterator[tuple[str, str]]:
    """Yields title and text of as many passages as a section needs."""
    title, text, room = section.title, section.text, self._settings.size
    if self._tokenizer is not None:
      room -= _NUM_SPECIAL
      title = self._short_title(section, room, document)
      if not title.endswith(section.path[-1] if section.path else ""):
        text = section.with_heading
      if title:
        room -= len(self._tokenizer.encode([title])[0])
      room = max(room, 1)
    for start, end in self._packed(text, room, document):
      while start and text[start - 1] in " \t":
        start -= 1
      if start and text[start - 1] != "\n":  # it was no indentation
        start = end - len(text[start:end].lstrip())
      yield title, text[start:end]

  def _short_title(
    self, section: Section, room: int, document: Document
  ) -> str:
    """Returns a title that leaves most of a passage to the text."""
    assert self._tokenizer is not None
    encode = self._tokenizer.encode

    def fits(title: str, share: int) -> bool:
      return len(title) <= room * self._settings.max_word_chars and (
        len(encode([title])[0]) * share <= room
      )

    if len(section.path) > 1:
      for path in (section.path, (section.path[0], "…", section.path[-1])):
        if fits(title := join_path(path), 4):
          return title
    if fits(title := section.path[-1] if section.path else "", 2):
      return title
    self._report.shortened += 1
    self._report.note("shortened", f"{document.where}: {title[:60]!r}")
    # By halves: a title may be a whole book.
    words = title[: room * self._settings.max_word_chars].split()
    least, most = 0, len(words)
    while least < most:
      middle = (least + most + 1) // 2
      if fits(" ".join(words[:middle]) + " …", 2):
        least = middle
      else:
        most = middle - 1
    return " ".join(words[:least]) + " …" if least else ""

  def _spans(self, document: Document) -> Iterator[Span]:
    """Yields where the passages are in the document's text."""
    text = document.text
    if self._settings.method == "none":
      yield 0, len(text)
    elif self._settings.method == "words" and self._tokenizer is None:
      limit = self._settings.max_word_chars
      words = word_spans(text, max_chars=limit)
      while taken := list(itertools.islice(words, self._settings.size)):
        end = taken[-1][1]
        yield taken[0][0], end
        self._note_broken(inside_word(text, end), document)
    else:
      yield from self._packed(text, self._settings.size, document)

  def _note_broken(self, broken: bool, document: Document) -> None:
    """Counts a passage that ends inside a sentence or word."""
    if broken:
      self._report.broken += 1
      self._report.note("broken", document.where)

  def _packed(self, text: str, size: int, document: Document) -> Iterator[Span]:
    """Yields where passages of as many parts as fit are, in any unit."""
    sources = [self._parts(text)]
    waiting: deque[_Part] = deque()  # come before those of the last source
    repeated: list[_Part] = []  # from the passage before
    while True:
      taken, fresh = repeated, 0
      total, before = sum(part.size for part in taken), -1
      # The sizes of tokenised parts are estimates: as long as the whole proves
      # to be smaller than their sum, more is added.
      while before < fresh and total <= size:
        before = fresh
        while part := waiting.popleft() if waiting else _next(sources):
          if fresh and total + part.size > size:
            waiting.appendleft(part)
            break
          while taken and not fresh and total + part.size > size:
            total -= taken.pop(0).size
          taken.append(part)
          total, fresh = total + part.size, fresh + 1
        if fresh > before:
          total = self._size(text, taken)
      if not fresh:
        return
      while total > size and len(taken) > 1:
        if fresh > 1:
          waiting.appendleft(taken.pop())
          fresh -= 1
        else:
          taken.pop(0)
        total = self._size(text, taken)
      if total > size and taken[0].end - taken[0].start > 1:
        sources.append(self._divided(text, taken[0]))
        sources.insert(-1, iter(waiting))
        waiting, repeated = deque(), []
        continue
      yield taken[0].start, taken[-1].end
      self._note_broken(not taken[-1].ends, document)
      repeated = self._repeated(taken)

  def _repeated(self, taken: Sequence[_Part]) -> list[_Part]:
    """Returns the last parts of a passage that the next one begins with."""
    room, count = self._settings.overlap, 0
    # Never the first: each passage begins behind the start of the one before.
    for part in reversed(taken[1:]):
      room -= part.size
      if room < 0:
        break
      count += 1
    return list(taken[len(taken) - count :])

  def _parts(self, text: str) -> Iterator[_Part]:
    """Yields the words or sentences of a text, with their sizes."""
    if self._settings.method == "words":
      limit = self._settings.max_word_chars
      return self._sized(text, word_spans(text, max_chars=limit), words=1)
    return self._sized(text, sentence_spans(text))

  def _divided(self, text: str, part: _Part) -> Iterator[_Part]:
    """Yields the words of a sentence, or the halves of a word.

    With "fit", the lines of a sentence before its words.
    """
    limit = self._settings.max_word_chars
    if self._settings.method == "fit":
      lines = line_spans(text, part.start, part.end)
      first = next(lines, None)
      if first not in (None, (part.start, part.end)):
        yield from self._sized(text, itertools.chain([first], lines))
        return
    words = word_spans(text, part.start, part.end, max_chars=limit)
    first = next(words)
    if first == (part.start, part.end):
      middle = (part.start + part.end) // 2
      spans = iter([(part.start, middle), (middle, part.end)])
    else:
      spans = itertools.chain([first], words)
    for inner in self._sized(text, spans, words=1):
      last = inner.end == part.end
      yield dataclasses.replace(inner, ends=last and part.ends)

  def _sized(
    self, text: str, spans: Iterator[Span], words: int = 0
  ) -> Iterator[_Part]:
    """Yields the parts at `spans`, each of so many words; 0: to be counted."""
    limit = self._settings.max_word_chars
    if self._tokenizer is None:
      for start, end in spans:
        size = words or sum(
          1 for _ in word_spans(text, start, end, max_chars=limit)
        )
        yield _Part(start, end, size, not inside_word(text, end))
      return
    # What is too long in any case is not tokenised: it may be a whole book
    # without a space.
    longest = self._settings.size * limit
    while batch := list(itertools.islice(spans, _COUNTED_AT_ONCE)):
      texts = [text[a:b] if b - a <= longest else "" for a, b in batch]
      encoded = self._tokenizer.encode(texts)
      for (start, end), piece, ids in zip(batch, texts, encoded, strict=True):
        count = len(ids) if piece else self._settings.size + 1
        yield _Part(start, end, count, not inside_word(text, end))

  def _size(self, text: str, parts: Sequence[_Part]) -> int:
    """Returns the size of a passage of these parts."""
    if self._tokenizer is None or len(parts) == 1:
      return sum(part.size for part in parts)
    start, end = parts[0].start, parts[-1].end
    return len(self._tokenizer.encode([text[start:end]])[0])


def _next(sources: list[Iterator[_Part]]) -> _Part | None:
  """Returns the next part of the last source that has one, or None."""
  while sources:
    part = next(sources[-1], None)
    if part is not None:
      return part
    sources.pop()
  return None


def split(
  documents: Iterable[Document],
  settings: SplitConfig,
  *,
  tokenizer: Encoder | None = None,
  report: CorpusReport | None = None,
) -> Iterator[Passage]:
  """Yields the passages of `documents`, in order; see `Splitter`."""
  splitter = Splitter(settings, tokenizer=tokenizer, report=report)
  for document in documents:
    yield from splitter.split(document)
