"""Several contexts in one row of the generator's encoder: less padding.

Each device puts its contexts into fewer rows of data.context_length tokens, the
longest first, each into the first row with room. A context attends to its own
tokens alone, and its positions begin at 0. The number of rows is fixed before
the program is compiled; `choose_packing` chooses it from the lengths of
contexts of the data, so that nearly every batch fits. A batch that does not is
computed without packing.

In: tokens [N, C], N contexts. Out: the states of the encoder, [N, C, D], 0 past
the end of a context.
"""

from collections.abc import Callable
import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped
import numpy as np

from rag_jax.models.length_groups import by_device
from rag_jax.models.length_groups import context_lengths
from rag_jax.models.length_groups import draw_batches
from rag_jax.models.length_groups import fewest_tokens
from rag_jax.models.partitioning import constrain

# (tokens [M, C], mask [M, C, C], positions [M, C]) -> states [M, C, D]
Encode = Callable[[Array, Array, Array], Float[Array, "M C D"]]


@dataclasses.dataclass(frozen=True)
class Packing:
  """How many rows of a device hold all of its contexts.

  Attributes:
    rows: of each device.
    length: tokens of a row, data.context_length.
  """

  rows: int
  length: int

  @property
  def num_tokens(self) -> int:
    """The tokens that a device computes, with padding."""
    return self.rows * self.length

  def fit(self, mask: Bool[Array, "N C"]) -> Bool[Array, ""]:
    """Returns whether the contexts of every device fit into its rows."""
    _, fits = self._places(mask)
    return jnp.all(fits)

  def encode(
    self,
    encode: Encode,
    tokens: Int[Array, "N C"],
    mask: Bool[Array, "N C"],
  ) -> Float[Array, "N C D"]:
    """Returns the states of contexts that `fit`, from packed rows.

    Args:
      encode: the encoder; its mask is True where attention is allowed.
      tokens: of the contexts.
      mask: True on real tokens.
    """
    starts, _ = self._places(mask)  # S n
    places = jnp.arange(mask.shape[1])
    within = places < by_device(context_lengths(mask))[..., None]
    # Places past the end of a context are not written and not read.
    nowhere = self.num_tokens
    index = jnp.where(within, starts[..., None] + places, nowhere)  # S n C

    def pack(values: Array) -> Shaped[Array, "M C"]:  # of [S, n, C] or [n, 1]
      empty = jnp.zeros(self.num_tokens, values.dtype)
      put = jax.vmap(lambda i, x: empty.at[i].set(x, mode="drop"))
      rows = put(index, jnp.broadcast_to(values, index.shape))
      return _rows(rows.reshape(-1, self.length))

    context = pack(1 + jnp.arange(index.shape[1])[:, None])
    allowed = context[:, :, None] == context[:, None]  # M C C
    allowed &= ((context > 0) & pack(by_device(mask)))[:, None]
    states = encode(pack(by_device(tokens)), allowed, pack(places))
    shape = (len(index), self.num_tokens, states.shape[-1])
    unpack = jax.vmap(lambda x, i: x.at[i].get(mode="fill", fill_value=0))
    found = unpack(states.reshape(shape), index)  # S n C D
    return _rows(found.reshape(*tokens.shape, -1))

  def _places(
    self, mask: Bool[Array, "N C"]
  ) -> tuple[Int[Array, "S n"], Bool[Array, "S"]]:
    """Returns where contexts begin in the rows, and whether all have room."""

    def first_fit(
      lengths: Int[Array, "n"],
    ) -> tuple[Int[Array, "n"], Bool[Array, ""]]:
      order = jnp.argsort(-lengths)

      def put(free: Array, length: Array) -> tuple[Array, tuple[Array, Array]]:
        fits = free >= length
        row = jnp.argmax(fits)
        start = (row + 1) * self.length - free[row]
        return free.at[row].add(-length), (start, jnp.any(fits))

      free = jnp.full(self.rows, self.length)
      _, (starts, fits) = jax.lax.scan(put, free, lengths[order])
      return jnp.zeros_like(starts).at[order].set(starts), jnp.all(fits)

    return jax.vmap(first_fit)(by_device(context_lengths(mask)))


def _rows(x: Array) -> Array:
  return constrain(x, "batch", *[None] * (x.ndim - 1))


def choose_packing(
  lengths: Int[np.ndarray, "samples"], num_rows: int, longest: int
) -> Packing | None:
  """Returns the packing that computes the fewest tokens per batch on average.

  None if no packing computes fewer than contexts in rows of their own.

  Args:
    lengths: of contexts of the data.
    num_rows: n, contexts that a device computes at a time.
    longest: data.context_length.
  """
  needed = np.array([
    _num_rows(batch, longest) for batch in draw_batches(lengths, num_rows)
  ])  # fmt: skip
  choices = [
    (Packing(rows, longest), rows * longest, float(np.mean(needed <= rows)))
    for rows in range(int(needed.min()), num_rows)
  ]
  return fewest_tokens(choices, num_rows * longest)


def _num_rows(lengths: Int[np.ndarray, "n"], longest: int) -> int:
  """Returns how many rows first-fit-decreasing fills."""
  free: list[int] = []
  for length in sorted(lengths.tolist(), reverse=True):
    row = next((i for i, room in enumerate(free) if room >= length), None)
    if row is None:
      free.append(longest - length)
    else:
      free[row] -= length
  return len(free)
