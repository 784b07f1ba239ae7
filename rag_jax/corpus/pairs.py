"""Two texts as one row of tokens, as a cross-encoder reads them.

In: the tokens of questions and of passages. Out: rows with special tokens where
the tokenizer's files put them: [CLS] question [SEP] passage [SEP], or <s>
question </s></s> passage </s>.
"""

from collections.abc import Sequence
import dataclasses
import itertools

from rag_jax.corpus.tokenizer import Tokenizer

_Parts = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]

_TEXTS = ("a", "0", ".", "an apple")  # one of them has a token


@dataclasses.dataclass(frozen=True, slots=True)
class PairTemplate:
  """The special tokens around two texts, and the types of all tokens.

  Attributes:
    special: the tokens before, between and after the two texts.
    special_types: their types.
    types: of the tokens of the first text, and of the second.
  """

  special: _Parts
  special_types: _Parts
  types: tuple[int, int]

  @classmethod
  def of(cls, tokenizer: Tokenizer) -> "PairTemplate":
    """Returns the template of a tokenizer.

    Raises:
      ValueError: it does not write two texts one after the other.
    """
    backend = tokenizer.backend
    text = next((t for t in _TEXTS if tokenizer.encode([t])[0]), "")
    pair = backend.backend_tokenizer.encode(text, text)
    sides = [side for side, _ in itertools.groupby(pair.sequence_ids)]
    if [side for side in sides if side is not None] != [0, 1]:
      raise ValueError(
        "The tokenizer does not write two texts one after the other (their"
        f" places in a row are {sides}); expected that of a cross-encoder, such"
        " as BERT's [CLS] A [SEP] B [SEP]. Copy the tokenizer's files again"
        " from where the weights came from."
      )
    first, second = (
      [i for i, side in enumerate(pair.sequence_ids) if side == which]
      for which in (0, 1)
    )
    # As in transformers: other models never see the types.
    typed = "token_type_ids" in backend.model_input_names
    types = pair.type_ids if typed else [0] * len(pair.ids)

    def parts(row: Sequence[int]) -> _Parts:
      before, between = row[: first[0]], row[first[-1] + 1 : second[0]]
      return tuple(before), tuple(between), tuple(row[second[-1] + 1 :])

    both = types[first[0]], types[second[0]]
    return cls(parts(pair.ids), parts(types), both)

  @property
  def num_special(self) -> int:
    """How many special tokens a row has."""
    return sum(map(len, self.special))

  @property
  def num_types(self) -> int:
    """How many types of tokens there are, at least."""
    return 1 + max(*self.types, *sum(self.special_types, ()))

  def join(
    self, first: Sequence[int], second: Sequence[int], length: int
  ) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the tokens of a pair of texts, and their types.

    A pair that is too long loses tokens at the end of its longer text, until
    both are equally long, and then of both in turn: `longest_first` of
    transformers, the rule of sentence-transformers' `CrossEncoder`.

    Args:
      first: tokens of the first text, without special tokens.
      second: of the second.
      length: the most tokens of a row; above `num_special`.
    """
    n, m = _kept(len(first), len(second), length - self.num_special)
    before, between, after = self.special
    tokens = (*before, *first[:n], *between, *second[:m], *after)
    before, between, after = self.special_types
    one, other = self.types
    return tokens, (*before, *[one] * n, *between, *[other] * m, *after)


def _kept(first: int, second: int, room: int) -> tuple[int, int]:
  """Returns how many tokens are kept of two texts, together at most `room`."""
  if first + second <= room:
    return first, second
  shorter = min(first, second, room // 2)
  longer = room - shorter  # one more, if both are cut and `room` is odd
  return (shorter, longer) if first <= second else (longer, shorter)
