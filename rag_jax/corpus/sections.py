"""The sections of a document: its text between headings.

In: a document. Out: its sections, each with the headings above it, which are
what a reader of a part of the text needs to know of the rest.
"""

from collections.abc import Iterator, Sequence
import dataclasses

from rag_jax.corpus.document import Document

_JOINS = " > "


@dataclasses.dataclass(frozen=True, slots=True)
class Section:
  """What stands under one heading.

  Attributes:
    path: the document's title and the headings above, from the top.
    text: without the heading.
    with_heading: the same with it, for where the title is shortened.
  """

  path: tuple[str, ...]
  text: str
  with_heading: str

  @property
  def title(self) -> str:
    """The path as one line."""
    return join_path(self.path)


def join_path(path: Sequence[str]) -> str:
  """Returns headings as one line."""
  return _JOINS.join(path)


def _is_said(heading: str, before: str) -> bool:
  """Returns whether a title that is above a heading says the same."""
  return before.casefold().startswith(heading.casefold())


def sections(document: Document) -> Iterator[Section]:
  """Yields the sections of a document that hold text, in their order.

  A heading without text is one of its own if nothing stands below it.
  """
  text, headings = document.text, document.headings
  top = [document.title] if document.title else []
  start = text[: headings[0].start] if headings else text
  found = bool(start.strip())
  if found:
    yield Section(tuple(top), start, start)
  above: list[tuple[int, str]] = []
  for number, heading in enumerate(headings):
    following = headings[number + 1 : number + 2]
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
      yield Section(
        tuple(path if said else [*path, heading.title]), body, whole
      )
    elif not said and (not following or following[0].level <= heading.level):
      found = True
      yield Section(tuple(path), whole, whole)
  if not found and text.strip():
    yield Section(tuple(top), text, text)
