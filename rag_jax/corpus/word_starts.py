"""Where words begin, in a text and in its tokens.

In: a text, and where each of its tokens lies. Out: the places, and the tokens,
that begin a word.
"""

from collections.abc import Sequence, Set

import regex

# A word: letters and digits, also around a hyphen, apostrophe, comma or period
# ("1,863", "Guinea-Bissau"), with the marks and joiners that belong to them
# (Hindi, Persian); or one other character.
_LETTERS = r"[\p{L}\p{N}][\p{L}\p{N}\p{M}\p{Default_Ignorable_Code_Point}]*"
_WORD = regex.compile(rf"{_LETTERS}(?:[-'.,]{_LETTERS})*|\S")


def word_starts(text: str) -> set[int]:
  """Returns the places in `text` where a word starts."""
  return {word.start() for word in _WORD.finditer(text)}


def begins_word(
  text: str, offsets: Sequence[tuple[int, int]], words: Set[int]
) -> list[bool]:
  """Returns whether each token begins a word.

  Args:
    text: the text that was encoded.
    offsets: (start, end) of each token in it.
    words: where its words start.
  """
  begins, seen = [], set[int]()
  for start, end in offsets:
    # A token may include the space before its word. If several tokens share one
    # character, the first of them begins the word.
    piece = text[start:end]
    place = start + len(piece) - len(piece.lstrip())
    begins.append(place in words and place not in seen)
    seen.add(place)
  return begins
