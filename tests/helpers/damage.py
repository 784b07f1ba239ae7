"""Damages the files of a directory in all possible ways, one at a time.

Deterministic for a seed: a failure names the seed and the damage to reproduce
it.
"""

from collections.abc import Callable, Iterator
import os
import pathlib
import random
import shutil

# A pickle that leaves a mark where it is loaded.
MARK = "unpickled"
_PICKLE = "cos\nsystem\n(S'touch {}'\ntR."


def damages(
  root: pathlib.Path, rng: random.Random, *, flips: int, skip: tuple[str, ...]
) -> Iterator[tuple[str, Callable[[pathlib.Path], None]]]:
  """Yields what is done, in words, and a function that does it to a copy.

  Args:
    root: the directory, whole.
    rng: chooses places.
    flips: bits of each file; 0: each bit.
    skip: parts of names that are left alone.
  """
  files = [
    f
    for f in sorted(root.rglob("*"))
    if f.is_file() and not any(part in str(f) for part in skip)
  ]
  for file in files:
    name = str(file.relative_to(root))
    size = file.stat().st_size
    bits = range(8 * size) if not flips else rng.sample(
      range(8 * size), min(flips, 8 * size)
    )  # fmt: skip
    for bit in bits:
      yield f"bit {bit} of {name}", _flipped(name, bit)
    for length in {0, rng.randrange(size), size - 1}:
      yield f"{name} cut to {length}", _cut(name, length)
    yield f"{name} longer", _longer(name)
    yield f"{name} removed", lambda copy, name=name: (copy / name).unlink()
    yield f"{name} renamed", _moved(name, name + ".bak")
    yield f"{name} behind a link", _behind_link(name, hidden=False)
    yield f"{name} behind a link to what is hidden", _behind_link(name, True)
    other = rng.choice(files)
    if other.read_bytes() != file.read_bytes():
      yield f"{name} is {other.name}", _replaced(name, other)
  folders = sorted({f.parent.relative_to(root) for f in files})
  for folder in folders:
    for extra in ("more", ".hidden", "scann_docids.pkl", "x.npy"):
      yield f"{extra} in {folder}", _extra(folder / extra)
    if str(folder) != ".":
      name = str(folder)
      yield (
        f"{name}/ removed",
        lambda copy, name=name: shutil.rmtree(copy / name),
      )
      yield f"{name}/ renamed", _moved(name, name + "_")
      yield f"{name}/ behind a link", _behind_link(name, hidden=True)
      yield f"{name}/ empty", _emptied(name)


def _flipped(name: str, bit: int) -> Callable[[pathlib.Path], None]:
  def do(copy: pathlib.Path) -> None:
    data = bytearray((copy / name).read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    (copy / name).write_bytes(data)

  return do


def _cut(name: str, length: int) -> Callable[[pathlib.Path], None]:
  return lambda copy: os.truncate(copy / name, length)


def _longer(name: str) -> Callable[[pathlib.Path], None]:
  def do(copy: pathlib.Path) -> None:
    with (copy / name).open("ab") as f:
      f.write(b"\n{}")

  return do


def _moved(name: str, to: str) -> Callable[[pathlib.Path], None]:
  return lambda copy: os.rename(copy / name, copy / to)


def _behind_link(name: str, hidden: bool) -> Callable[[pathlib.Path], None]:
  """The same content, with a pickle beside it, at the end of a link."""

  def do(copy: pathlib.Path) -> None:
    there = copy / name
    away = there.parent / ".away.tmp" if hidden else copy.parent / "away"
    os.rename(there, away)
    there.symlink_to(away)
    if away.is_dir():
      _plant(away / "scann_docids.pkl")

  return do


def _replaced(name: str, by: pathlib.Path) -> Callable[[pathlib.Path], None]:
  return lambda copy: (copy / name).write_bytes(by.read_bytes())


def _extra(name: pathlib.Path) -> Callable[[pathlib.Path], None]:
  return lambda copy: _plant(copy / name)


def _emptied(name: str) -> Callable[[pathlib.Path], None]:
  def do(copy: pathlib.Path) -> None:
    shutil.rmtree(copy / name)
    (copy / name).mkdir()

  return do


def _plant(file: pathlib.Path) -> None:
  mark = next(p for p in file.parents if (p / "copy").exists()) / MARK
  file.write_text(_PICKLE.format(mark))


def attack(
  root: pathlib.Path,
  workspace: pathlib.Path,
  served: Callable[[pathlib.Path], object],
  *,
  seed: int = 0,
  flips: int = 1,
  most: int = 0,
  skip: tuple[str, ...] = (),
) -> tuple[int, int]:
  """Damages copies of a directory, and returns how many were refused.

  Args:
    root: the directory, whole.
    workspace: empty, for the copies.
    served: returns all that decides an answer, or raises ValueError or OSError
      (FileNotFoundError).
    seed: of places, and of the choice of damages.
    flips: bits of each file; 0: each bit.
    most: damages, drawn from all; 0: all.
    skip: parts of names that are left alone.

  Returns:
    How many were refused and how many were served, with what was served whole.

  Raises:
    AssertionError: something was served that is not what was written, or a
      pickle was loaded.
  """
  rng = random.Random(seed)
  expected = served(root)
  todo = list(damages(root, rng, flips=flips, skip=skip))
  if most and most < len(todo):
    todo = rng.sample(todo, most)
  refused = 0
  for what, do in todo:
    copy = workspace / "copy"
    shutil.copytree(root, copy)
    do(copy)
    try:
      found = served(copy)
    except (ValueError, OSError):
      refused += 1
    else:
      assert found == expected, f"seed {seed}: {what}"
    assert not (workspace / MARK).exists(), f"seed {seed}: {what}: unpickled"
    for left in workspace.iterdir():
      shutil.rmtree(left) if left.is_dir() else left.unlink()
  return refused, len(todo) - refused
