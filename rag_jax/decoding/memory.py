"""What a decoder looks at while it writes, for each document.

In: what the generator made of contexts. Out: the same, rearranged for searches
over questions or over single documents.
"""

from collections.abc import Callable
import typing
from typing import Any

import flax.struct
import jax
from jaxtyping import Array, Bool, Float, Int, PyTree


# Unchecked, because JAX makes it of shapes too.
@typing.no_type_check
@flax.struct.dataclass
class Memory:
  """What the decoder looks at: B questions of K documents, or B*K of one."""

  # Of the encoder; or keys and values of the prompts of a decoder alone.
  states: PyTree[Float[Array, "B K ..."]]
  mask: Bool[Array, "B K S"]  # True on real tokens
  tokens: Int[Array, "B K S"]  # what was encoded
  # Keys and values of what all prompts begin with; the rest does not hold it.
  shared: PyTree[Float[Array, "1 ..."]] | None = None

  @property
  def arrays(self) -> tuple:
    """What methods of a generator take as memory, its mask and tokens."""
    return self.states, self.mask, self.tokens

  @property
  def also(self) -> dict:
    """What those of a decoder-only generator take beside them."""
    return {} if self.shared is None else {"shared": self.shared}

  def change(self, change: Callable[[Array], Any]) -> "Memory":
    """Returns the same after a `change` of the axes B and K."""
    states, mask, tokens = jax.tree.map(change, self.arrays)
    return Memory(states, mask, tokens, self.shared)

  def joined(self) -> "Memory":
    """Returns the contexts of each question as one long one."""
    return self.change(lambda x: x.reshape(len(x), 1, -1, *x.shape[3:]))
