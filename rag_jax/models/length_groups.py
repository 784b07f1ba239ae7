"""Contexts in groups of about equal lengths, so that less padding is computed.

Each device sorts its own contexts by length. The shortest are padded to a short
length, the longest to data.context_length; how many, and to what, is fixed
before the program is compiled. `choose_groups` chooses it from the lengths of
contexts of the data, so that nearly every batch fits. A batch that does not is
computed as a whole.

In: tokens [N, C], N contexts. Out: what a function of contexts returns, in the
order of the contexts.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int
import numpy as np

from rag_jax.models.partitioning import constrain
from rag_jax.models.partitioning import num_shards

_T = TypeVar("_T")

_MULTIPLE = 8  # of lengths, as the tiles of a TPU
_MAX_UNITS = 32  # boundaries between groups that are tried
_NUM_BATCHES = 500  # that are drawn from the lengths of the data
# Shares of them that each place in the order has to fit, one is chosen.
_FITTING = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.998, 1.0)


@dataclasses.dataclass(frozen=True)
class LengthGroups:
  """How many contexts of a device are padded to which length.

  Attributes:
    rows: contexts of each group, the shortest first.
    lengths: tokens that they are padded to; the last is data.context_length.
  """

  rows: tuple[int, ...]
  lengths: tuple[int, ...]

  def shapes(self, num_shares: int) -> tuple[tuple[int, int], ...]:
    """Returns (contexts, length) of each group, of so many equal shares."""
    pairs = zip(self.rows, self.lengths, strict=True)
    return tuple((num_shares * rows, length) for rows, length in pairs)

  @property
  def num_tokens(self) -> int:
    """The tokens that a device computes, with padding."""
    return int(self.places.sum())

  @property
  def places(self) -> Int[np.ndarray, "n"]:
    """The tokens for each of a device's contexts, in the order of lengths."""
    return np.repeat(self.lengths, self.rows)

  def fit(self, mask: Bool[Array, "N C"]) -> Bool[Array, ""]:
    """Returns whether the contexts of every device fit into the groups."""
    ordered = jnp.sort(by_device(context_lengths(mask)), axis=1)
    return jnp.all(ordered <= self.places)

  def map(
    self,
    fn: Callable[..., Any],
    tokens: Int[Array, "N C"],
    mask: Bool[Array, "N C"],
    *rows: Array,
  ) -> Any:
    """Returns `fn(tokens, mask, *rows)`, computed group by group.

    Args:
      fn: returns arrays [N, ...] whose shapes do not depend on C.
      tokens: that `fit`.
      mask: True on real tokens.
      *rows: more arrays [N, ...], which `fn` takes too.
    """
    order = jnp.argsort(by_device(context_lengths(mask)), axis=1)
    outputs, start = [], 0
    for num, length in zip(self.rows, self.lengths, strict=True):
      chosen = order[:, start : start + num]
      start += num
      part = [_take(x, chosen) for x in (tokens, mask, *rows)]
      made = fn(*(x[:, :length] for x in part[:2]), *part[2:])
      outputs.append(jax.tree.map(by_device, made))
    back = jnp.argsort(order, axis=1)
    return jax.tree.map(
      lambda *x: _take(jnp.concatenate(x, axis=1), back, split=True), *outputs
    )


def by_device(x: Array) -> Array:
  """Returns an array [N, ...] as [devices, N / devices, ...]."""
  x = x.reshape(num_shards(), -1, *x.shape[1:])
  return constrain(x, "batch", *[None] * (x.ndim - 1))


def _take(x: Array, rows: Int[Array, "S n"], *, split: bool = False) -> Array:
  """Returns rows of each device as one array; `split` if `x` is by device."""
  x = jax.vmap(lambda a, i: a[i])(x if split else by_device(x), rows)
  x = x.reshape(-1, *x.shape[2:])
  return constrain(x, "batch", *[None] * (x.ndim - 1))


def context_lengths(mask: Bool[Array, "N C"]) -> Int[Array, "N"]:
  """Returns the number of tokens up to the last real one."""
  places = jnp.arange(1, mask.shape[1] + 1)
  return jnp.max(jnp.where(mask, places, 0), axis=1)


def choose_groups(
  lengths: Int[np.ndarray, "samples"],
  num_rows: int,
  num_groups: int,
  longest: int,
) -> LengthGroups:
  """Returns the groups that compute the fewest tokens per batch on average.

  Shorter groups have less padding, but fewer batches fit.

  Args:
    lengths: of contexts of the data.
    num_rows: n, contexts that a device computes at a time.
    num_groups: at most.
    longest: data.context_length.
  """
  ordered = np.sort(draw_batches(lengths, num_rows), axis=1)
  choices = []
  for share in _FITTING:
    needed = np.quantile(ordered, share, axis=0, method="higher")
    groups = _least_padding(needed.astype(int), num_groups, longest)
    fit = np.mean(np.all(ordered <= groups.places, axis=1))
    choices.append((groups, float(groups.num_tokens), float(fit)))
  found = cheapest(choices, float(num_rows * longest))
  return found or LengthGroups((num_rows,), (longest,))


def draw_batches(
  lengths: Int[np.ndarray, "samples"], num_rows: int
) -> Int[np.ndarray, "batches n"]:
  """Returns the lengths of the contexts in batches, drawn from `lengths`."""
  rng = np.random.default_rng(0)
  return rng.choice(lengths, (_NUM_BATCHES, num_rows))


def cheapest(
  choices: Sequence[tuple[_T, float, float]], whole: float
) -> _T | None:
  """Returns the choice of least cost per batch on average.

  None if none costs less than `whole`.

  Args:
    choices: with the cost of a batch that fits, and the share that fits.
    whole: cost of a batch that does not.
  """
  best, least = None, whole
  for choice, cost, fit in choices:
    mean = fit * cost + (1 - fit) * whole
    if mean < least:
      best, least = choice, mean
  return best


def _least_padding(
  needed: Int[np.ndarray, "n"], num_groups: int, longest: int
) -> LengthGroups:
  """Returns the groups of fewest tokens, with at least `needed` per place."""
  # A place in the order is at least as long as the places before it.
  tokens = np.minimum(-(-needed // _MULTIPLE) * _MULTIPLE, longest)
  tokens[-1] = longest  # the longest context is rarely in a sample
  n = len(tokens)
  unit = next(u for u in range(1, n + 1) if not n % u and n // u <= _MAX_UNITS)
  ends = range(unit, n + 1, unit)

  @functools.cache
  def best(stop: int, groups: int) -> tuple[int, tuple[int, ...]]:
    """Returns the fewest tokens of the first places, and the groups' ends."""
    choices: list[tuple[int, tuple[int, ...]]] = [
      (stop * int(tokens[stop - 1]), (stop,))
    ]
    for end in ends if groups > 1 else ():
      if end < stop:
        before, chosen = best(end, groups - 1)
        more = (stop - end) * int(tokens[stop - 1])
        choices.append((before + more, (*chosen, stop)))
    return min(choices, key=lambda choice: (choice[0], len(choice[1])))

  _, stops = best(n, num_groups)
  return LengthGroups(
    rows=tuple(int(x) for x in np.diff((0, *stops))),
    lengths=tuple(int(tokens[stop - 1]) for stop in stops),
  )
