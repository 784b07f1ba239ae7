"""Splits documents into passages.

In: documents. Out: passages, which are parts of their text with white space
unchanged. They are as long as an encoder reads, or so many words or sentences,
or whole documents. The passages of a document are made one at a time.
"""

from collections import deque
from collections.abc import Iterator, Sequence
import dataclasses
import itertools
from typing import Protocol, runtime_checkable

from rag_jax import config_rules
from rag_jax.corpus.document import Document
from rag_jax.corpus.passages import Passage
from rag_jax.corpus.report import CorpusReport
from rag_jax.corpus.text_spans import Span
from rag_jax.corpus.text_spans import data_spans
from rag_jax.corpus.text_spans import inside_word
from rag_jax.corpus.text_spans import line_spans
from rag_jax.corpus.text_spans import sentence_spans
from rag_jax.corpus.text_spans import text_between
from rag_jax.corpus.text_spans import word_spans
from rag_jax.settings import choice
from rag_jax.settings import number

# Special tokens that an encoder adds to a passage: a start token, and an end
# token after the title and after the text.
_NUM_SPECIAL = 3
_COUNTED_AT_ONCE = 256  # sentences or words tokenised together


@runtime_checkable  # for the type checks of the tests
class Encoder(Protocol):
  """Counts tokens: a `Tokenizer`, or anything with its method `encode`."""

  def encode(self, texts: Sequence[str]) -> Sequence[Sequence[int]]:
    """Returns the token ids of each text, without special tokens."""
    ...


@dataclasses.dataclass(slots=True, kw_only=True, unsafe_hash=True)
class SplitConfig:
  """How documents become passages."""

  # "fit": as many whole sentences of one section as fit, else whole lines; the
  # headings above are the title, which counts too. "words": disjoint passages
  # of `size` words, as DPR's. "sentences": as many whole sentences as fit.
  # "none": each document is one passage.
  method: str = choice("words", "fit", "sentences", "none")
  # The largest size of a passage, in units. With "fit" and tokens it includes
  # the title and special tokens, and 0 means the length of the encoder.
  size: int = number(100, least=1)
  unit: str = choice("words", "tokens")
  # A passage repeats whole sentences of the one before: at most so many units.
  overlap: int = 0
  # A longer run without white space counts as several words.
  max_word_chars: int = number(100, least=1)
  # Longer passages are cut, and counted; 0: none is cut.
  max_chars: int = 0
  drop_encoded: bool = False  # leave out base64 and the like, and count it


@dataclasses.dataclass(frozen=True, slots=True)
class _Section:
  """The text under one heading.

  Attributes:
    path: the document's title and the headings above, from the top.
    text: without the heading.
    with_heading: the text with the heading, for a title that is shortened.
  """

  path: tuple[str, ...]
  text: str
  with_heading: str

  @property
  def title(self) -> str:
    """The path as one line."""
    return _join_path(self.path)


def _join_path(path: Sequence[str]) -> str:
  """Returns headings as one line."""
  return " > ".join(path)


def _is_said(heading: str, before: str) -> bool:
  """Returns whether the title above a heading begins with the same words."""
  return before.casefold().startswith(heading.casefold())


def _sections(document: Document) -> Iterator[_Section]:
  """Yields the sections of a document that hold text, in their order.

  A heading without text and without subheadings is a section, too.
  """
  text, headings = document.text, document.headings
  top = [document.title] if document.title else []
  start = text[: headings[0].start] if headings else text
  found = bool(start.strip())
  if found:
    yield _Section(tuple(top), start, start)
  above: list[tuple[int, str]] = []
  for place, heading in enumerate(headings):
    following = headings[place + 1 : place + 2]
    end = following[0].start if following else len(text)
    while above and above[-1][0] >= heading.level:
      above.pop()
    path = list(top)
    for _, title in above:
      if not (path and _is_said(title, path[-1])):
        path.append(title)
    above.append((heading.level, heading.title))
    body, whole = text[heading.end : end], text[heading.start : end]
    said = bool(path) and _is_said(heading.title, path[-1])
    if body.strip():
      found = True
      yield _Section(
        tuple(path if said else [*path, heading.title]), body, whole
      )
    elif not said and (not following or following[0].level <= heading.level):
      found = True
      yield _Section(tuple(path), whole, whole)
  if not found and text.strip():
    yield _Section(tuple(top), text, text)


def validate(settings: SplitConfig) -> SplitConfig:
  """Returns `settings` if they are valid.

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
  """A sentence or word, which is only divided if a passage cannot hold it."""

  start: int
  end: int
  size: int  # in units; an estimate for tokens, as neighbours may merge
  ends: bool  # False inside a sentence or word that was divided


class Splitter:
  """Splits documents, one at a time."""

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
      report: counts what was split, broken and cut.

    Raises:
      ValueError: the settings are not valid.
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
    """Yields the passages of a document, with its metadata.

    A single passage has the document's id; several have the ids "id#0", "id#1"
    and so on. With "fit", the title includes the headings above the passage.
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
      self._report.count("split", document.where)
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
      text="".join(text_between(document.text, spans)),
      headings=tuple(
        dataclasses.replace(h, start=place(h.start), end=place(h.end))
        for h in document.headings
      ),
    )

  def _cut(self, text: str, where: str) -> str:
    """Returns `text` cut to `max_chars`, and counts what was cut off."""
    limit = self._settings.max_chars
    if not limit or len(text) <= limit:
      return text
    self._report.cut_chars += len(text) - limit
    self._report.count("cut", f"{where}: {len(text) - limit} characters")
    return text[:limit]

  def _pieces(self, document: Document) -> Iterator[tuple[str, str]]:
    """Yields title and text of the passages of a document."""
    if self._settings.method == "fit":
      for section in _sections(document):
        yield from self._fitted(section, document)
      return
    for start, end in self._spans(document):
      yield document.title, document.text[start:end]

  def _fitted(
    self, section: _Section, document: Document
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
      if start and text[start - 1] != "\n":  # not the indentation of a line
        start = end - len(text[start:end].lstrip())
      yield title, text[start:end]

  def _short_title(
    self, section: _Section, room: int, document: Document
  ) -> str:
    """Returns a title that leaves most of the passage to the text."""
    assert self._tokenizer is not None
    encode = self._tokenizer.encode

    def fits(title: str, share: int) -> bool:
      return len(title) <= room * self._settings.max_word_chars and (
        len(encode([title])[0]) * share <= room
      )

    if len(section.path) > 1:
      for path in (section.path, (section.path[0], "…", section.path[-1])):
        if fits(title := _join_path(path), 4):
          return title
    if fits(title := section.path[-1] if section.path else "", 2):
      return title
    self._report.count("shortened", f"{document.where}: {title[:60]!r}")
    # Binary search, since a title may be a whole book.
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
    """Counts a passage if it ends inside a sentence or word."""
    if broken:
      self._report.count("broken", document.where)

  def _packed(self, text: str, size: int, document: Document) -> Iterator[Span]:
    """Yields the spans of passages of as many parts as fit into `size`."""
    sources = [self._parts(text)]
    waiting: deque[_Part] = deque()  # parts before those of the last source
    repeated: list[_Part] = []  # parts of the previous passage
    while True:
      taken, fresh = repeated, 0
      total, before = sum(part.size for part in taken), -1
      # The sizes of tokenised parts are estimates: while the passage is smaller
      # than their sum, more parts are added.
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
    """Returns the last parts of a passage, with which the next one begins."""
    room, count = self._settings.overlap, 0
    # Never the first part: each passage begins after the start of the last one.
    for part in reversed(taken[1:]):
      room -= part.size
      if room < 0:
        break
      count += 1
    return list(taken[len(taken) - count :])

  def _parts(self, text: str) -> Iterator[_Part]:
    """Yields the words or sentences of a text."""
    if self._settings.method == "words":
      limit = self._settings.max_word_chars
      return self._sized(text, word_spans(text, max_chars=limit), words=1)
    return self._sized(text, sentence_spans(text))

  def _divided(self, text: str, part: _Part) -> Iterator[_Part]:
    """Yields the words of a sentence, or the halves of a word.

    With "fit", a sentence of several lines is divided into its lines first.
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
    """Yields the parts at `spans`; each has `words` words, 0 if unknown."""
    limit = self._settings.max_word_chars
    if self._tokenizer is None:
      for start, end in spans:
        size = words or sum(
          1 for _ in word_spans(text, start, end, max_chars=limit)
        )
        yield _Part(start, end, size, not inside_word(text, end))
      return
    # A part that is too long in any case is not tokenised, since it may be a
    # whole book without a space.
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
