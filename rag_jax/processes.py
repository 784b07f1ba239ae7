"""Collective operations of the processes of one program, on several hosts.

In: what each process has. Out: what all of them have, or an error in all of
them. In a program of one process nothing is waited for.

All processes call every function here, in the same order; otherwise the program
hangs.
"""

from collections.abc import Callable, Sequence
import json
from typing import Any, TypeVar, cast

import jax
from jax.experimental import multihost_utils
from jaxtyping import Int, Num
import numpy as np

_T = TypeVar("_T")


class OtherProcessError(RuntimeError):
  """Another process of the program failed; repeats its message."""


def wait_for_all(what: str) -> None:
  """Returns when every process of the program has called this with `what`."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(what)


def is_first() -> bool:
  """Returns whether this is the process that writes and prints."""
  return jax.process_index() == 0


def from_first(value: int) -> int:
  """Returns the `value` of process 0, of at most 32 bits, in all processes.

  For values read from a shared disk, on which some processes see a change later
  than others.
  """
  if jax.process_count() == 1:
    return value
  return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def sum_counts(counts: dict[str, int]) -> dict[str, int]:
  """Returns the sum over all processes of each count; the names are equal."""
  if jax.process_count() == 1 or not counts:
    return dict(counts)
  # In two halves, since JAX truncates integers to 32 bits.
  local = np.array([divmod(n, 1 << 24) for n in counts.values()], np.int32)
  everywhere = np.asarray(multihost_utils.process_allgather(local), np.int64)
  high, low = everywhere.sum(axis=0).T
  totals = (high << 24) + low
  return dict(zip(counts, totals.tolist(), strict=True))


def from_each(value: Any) -> list[Any]:
  """Returns the `value` of every process, which JSON can hold, in order."""
  if jax.process_count() == 1:
    return [value]
  data = np.frombuffer(json.dumps(value).encode(), np.uint8)
  gather = multihost_utils.process_allgather
  sizes = np.asarray(gather(np.int32(len(data)))).tolist()
  padded = np.zeros(max(sizes), np.uint8)
  padded[: len(data)] = data
  rows = np.asarray(gather(padded))
  return [
    json.loads(row[:size].tobytes())
    for row, size in zip(rows, sizes, strict=True)
  ]


def told_by_first(act: Callable[[], Any]) -> Any:
  """Returns in all processes what `act` returns, which process 0 alone calls.

  For what others may not have, such as standard input. JSON can hold it.
  """
  return from_each(act() if is_first() else None)[0]


def share(
  items: Sequence[_T], act: Callable[[Sequence[_T]], list[Any]]
) -> list[Any]:
  """Returns `act(items)`, in all processes, each of which does a part of it.

  Args:
    items: the same in all processes.
    act: some items -> a result for each, which JSON can hold. It must not
      communicate with other processes.
  """
  count = jax.process_count()
  if count == 1:
    return act(items)
  mine = items[jax.process_index() :: count]
  results = [None] * len(items)
  for process, part in enumerate(from_each(act(mine) if mine else [])):
    results[process::count] = part
  return results


def join_rows(
  local: Num[np.ndarray, "n K"], rows: Int[np.ndarray, "b"], num_rows: int
) -> Num[np.ndarray, "B K"]:
  """Returns an array of which each process has some rows.

  Args:
    local: the rows of this process: int32 from -1, or float32.
    rows: their row numbers in the whole array; processes may share rows.
    num_rows: of the whole array.
  """
  if jax.process_count() == 1:
    return local
  if not local.shape[1]:
    return np.zeros((num_rows, 0), local.dtype)
  is_float = np.issubdtype(local.dtype, np.floating)
  lowest = np.finfo(np.float32).min if is_float else -1
  dtype = np.float32 if is_float else np.int32
  whole = np.full((num_rows, local.shape[1]), lowest, dtype)
  whole[rows] = local
  everywhere = np.asarray(multihost_utils.process_allgather(whole))
  return everywhere.max(axis=0)


def to_host(array: Any) -> np.ndarray:
  """Returns the whole array in every process, whatever its sharding."""
  here = not isinstance(array, jax.Array) or array.is_fully_addressable
  if here or array.is_fully_replicated:
    return np.asarray(array)
  return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def first_alone(what: str, act: Callable[[], _T]) -> _T:
  """Returns what `act` returns; process 0 calls it before the others do.

  For files that are made if they do not exist: process 0 makes them, and the
  others find them.

  Args:
    what: what `act` does, for the message: "open the tokenizer".
    act: called once by each process.

  Raises:
    OtherProcessError: another process failed in `act`.
  """
  if jax.process_count() == 1:
    return act()
  is_first = jax.process_index() == 0
  result = _all_or_none(what, act if is_first else lambda: None)
  others = _all_or_none(what, (lambda: None) if is_first else act)
  return cast(_T, result if is_first else others)


def _all_or_none(what: str, act: Callable[[], Any]) -> Any:
  """Returns what `act` returns, if it fails in no process."""
  result, error = None, None
  try:
    result = act()
  except Exception as e:  # of any type: the others must not hang
    error = e
  why = "" if error is None else f"{type(error).__name__}: {error}"
  failed = {i: text for i, text in enumerate(from_each(why)) if text}
  if error is not None:
    raise error
  for process, text in failed.items():
    raise OtherProcessError(
      f"This process stops because process {process} could not {what}. It says:"
      f" {text}"
    )
  return result
