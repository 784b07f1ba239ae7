"""Several contexts in one row of the generator's encoder: less padding.

Each device puts its contexts into fewer, longer rows, the longest context
first, each into the first row with room. A context attends to its own tokens
alone, and its positions begin at 0. The number and length of the rows are fixed
before the program is compiled; `choose_packing` chooses them from the lengths
of contexts of the data, so that nearly every batch fits. A batch that does not
is computed without packing.

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
from rag_jax.models.length_groups import cheapest
from rag_jax.models.length_groups import context_lengths
from rag_jax.models.length_groups import draw_batches
from rag_jax.models.partitioning import constrain

# (tokens [M, S], mask [M, S, S], positions [M, S]) -> states [M, S, D]
Encode = Callable[[Array, Array, Array], Float[Array, "M S D"]]

_LONGEST = 4  # times data.context_length: attention grows with a row's length


@dataclasses.dataclass(frozen=True)
class Packing:
  """How many rows of a device hold all of its contexts.

  Attributes:
    rows: of each device.
    length: S, tokens of a row; no context is longer.
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

    def pack(values: Array) -> Shaped[Array, "M S"]:  # of [S, n, C] or [n, 1]
      empty = jnp.zeros(self.num_tokens, values.dtype)
      put = jax.vmap(lambda i, x: empty.at[i].set(x, mode="drop"))
      rows = put(index, jnp.broadcast_to(values, index.shape))
      return _rows(rows.reshape(-1, self.length))

    context = pack(1 + jnp.arange(index.shape[1])[:, None])
    allowed = context[:, :, None] == context[:, None]  # M S S
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
  lengths: Int[np.ndarray, "samples"], num_rows: int, longest: int, dim: int
) -> Packing | None:
  """Returns the packing of least arithmetic per batch on average.

  None if no packing has less than contexts in rows of their own.

  Args:
    lengths: of contexts of the data.
    num_rows: n, contexts that a device computes at a time.
    longest: data.context_length.
    dim: D, of the encoder. The wider it is, the less its attention counts.
  """
  batches = draw_batches(lengths, num_rows)

  def cost(rows: int, length: int) -> float:
    # A token has 24 D^2 FLOPs in a layer's kernels, and 4 S D in attention.
    return float(rows * length * (6 * dim + length))

  choices = []
  for length in range(longest, (1 + _LONGEST) * longest, longest):
    needed = _num_rows(batches, length)
    choices += [
      (
        Packing(rows, length),
        cost(rows, length),
        float(np.mean(needed <= rows)),
      )
      for rows in range(max(int(needed.min()), 1), num_rows)
    ]
  return cheapest(choices, cost(num_rows, longest))


def _num_rows(
  batches: Int[np.ndarray, "batches n"], length: int
) -> Int[np.ndarray, "batches"]:
  """Returns how many rows first-fit-decreasing fills for each batch."""
  each = np.arange(len(batches))
  free = np.full(batches.shape, length)
  for column in np.sort(batches, axis=1)[:, ::-1].T:
    row = np.argmax(free >= column[:, None], axis=1)
    free[each, row] -= column
  return np.sum(free < length, axis=1)
