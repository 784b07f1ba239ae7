"""When an index is swapped in depends on the step, not on the machine."""

import threading

import numpy as np
import pytest

from rag_jax.retrieval.exact import ExactIndex
from rag_jax.retrieval.index_versions import IndexVersions
from rag_jax.retrieval.retriever import IndexBuilder

REFRESH, SWAP = 6, 3


class Builder(IndexBuilder):
  """Builds an index that tells the step of its parameters, when it may."""

  def __init__(self):
    self.may_build = threading.Event()
    self.may_build.set()
    self.building = threading.Event()

  def build(self, retriever_params, *, directory="", devices=()):
    """Waits until it may."""
    self.building.set()
    assert self.may_build.wait(20)
    step = retriever_params["step"]
    return ExactIndex(
      np.full((3, 2), step, np.float32),
      encoder_fingerprint=f"step {step}",
      passages_fingerprint="3c4d",
    )


@pytest.fixture
def opened():
  """What `make` opens, to close it."""
  opened = []
  yield opened
  for versions in opened:
    versions._builder.may_build.set()
    versions.close()


@pytest.fixture
def make(tmp_path, opened):
  def open_versions(refresh_steps=REFRESH, swap_steps=SWAP):
    versions = IndexVersions(
      Builder(),
      tmp_path / "index",
      refresh_steps=refresh_steps,
      swap_steps=swap_steps,
    )
    opened.append(versions)
    return versions

  return open_versions


def started(make):
  versions = make()
  versions.start({"step": 0})
  return versions


def seen(versions):
  """The step whose parameters embedded what is searched."""
  assert versions.index.encoder_fingerprint == f"step {versions.version}"
  return int(versions.index.embeddings[0][0])


def run(versions, first, last):
  """Trains from step `first` to `last`; returns what each step searched."""
  searched = {}
  for step in range(first, last):
    versions.swap_if_due(step)
    searched[step] = seen(versions)
    if versions.is_due(step + 1):
      versions.refresh(step + 1, {"step": step + 1})
  return searched


def expected_version(step):
  """A version is in use `SWAP` steps after the step that it is named by."""
  return max(step - SWAP, 0) // REFRESH * REFRESH


def test_the_first_version_is_there_before_the_first_step(make):
  versions = make()
  assert versions.index is None
  versions.start({"step": 0})
  assert versions.version == 0
  assert seen(versions) == 0


def test_versions_are_due_every_so_many_steps_but_not_at_the_start(make):
  versions = make()
  due = [step for step in range(20) if versions.is_due(step)]
  assert due == [6, 12, 18]
  assert not any(make(refresh_steps=0).is_due(step) for step in range(20))


def test_a_version_is_used_from_a_fixed_step_on(make):
  versions = started(make)
  searched = run(versions, 0, 40)
  assert searched == {step: expected_version(step) for step in range(40)}
  assert (searched[8], searched[9]) == (0, 6)


def test_an_index_is_never_staler_than_one_refresh_and_one_swap(make):
  versions = started(make)
  staleness = []
  for step in range(60):
    run(versions, step, step + 1)
    staleness.append(step - versions.version)
  assert staleness[:10] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 3]
  assert max(staleness) == REFRESH + SWAP - 1
  assert min(staleness[SWAP:]) == SWAP


def test_an_index_that_is_ready_early_waits_for_its_step(make):
  versions = started(make)
  run(versions, 0, 6)
  versions.save()  # waits until it is built
  for step in (6, 7, 8):
    versions.swap_if_due(step)
    assert seen(versions) == 0
  versions.swap_if_due(9)
  assert seen(versions) == 6


def test_a_slow_build_holds_up_its_step_and_none_before(make):
  versions = started(make)
  builder = versions._builder
  builder.building.clear()
  builder.may_build.clear()
  assert run(versions, 0, 9) == dict.fromkeys(range(9), 0)  # did not wait
  assert builder.building.wait(10)
  swapped = threading.Event()

  def swap():
    versions.swap_if_due(9)
    swapped.set()

  thread = threading.Thread(target=swap)
  thread.start()
  assert not swapped.wait(0.05)
  assert seen(versions) == 0
  builder.may_build.set()
  thread.join(10)
  assert seen(versions) == 6
  assert run(versions, 10, 40) == {
    s: expected_version(s) for s in range(10, 40)
  }


def test_a_build_is_given_the_parameters_of_its_own_step(make):
  versions = started(make)
  versions._builder.may_build.clear()
  versions.refresh(6, {"step": 6})
  versions._builder.may_build.set()
  versions.swap_if_due(9)
  assert (seen(versions), versions.version) == (6, 6)


def test_a_build_that_fails_is_raised_where_it_is_needed(make, monkeypatch):
  versions = started(make)

  def fail(params, **_):
    raise ValueError("the passage encoder diverged")

  monkeypatch.setattr(versions._builder, "build", fail)
  versions.refresh(6, {"step": 6})
  versions.swap_if_due(8)
  with pytest.raises(ValueError, match="the passage encoder diverged"):
    versions.save()
  with pytest.raises(ValueError, match="the passage encoder diverged"):
    versions.swap_if_due(9)


@pytest.mark.parametrize("stop", range(1, 20))
def test_a_resumed_run_searches_what_an_uninterrupted_one_does(make, stop):
  versions = started(make)
  run(versions, 0, stop)
  saved = versions.save()
  resumed = make()
  resumed.restore(saved, "3c4d")
  assert resumed.version == versions.version
  expected = {step: expected_version(step) for step in range(stop, 40)}
  assert run(resumed, stop, 40) == expected
  assert run(versions, stop, 40) == expected


def test_the_version_that_is_being_built_is_saved_as_well(make, tmp_path):
  versions = started(make)
  run(versions, 0, 5)
  assert versions.save() == [0]
  run(versions, 5, 7)
  assert versions.save() == [0, 6]
  run(versions, 7, 10)
  assert versions.save() == [6]
  assert {p.name for p in (tmp_path / "index").iterdir()} == {"0", "6"}


def test_a_version_is_written_once(make, monkeypatch):
  written = []
  save = ExactIndex.save

  def save_and_note(index, path):
    written.append(path.name)
    save(index, path)

  monkeypatch.setattr(ExactIndex, "save", save_and_note)
  versions = started(make)
  run(versions, 0, 7)
  for _ in range(2):
    versions.save()
  resumed = make()
  resumed.restore([0, 6], "3c4d")
  resumed.save()
  assert written == ["0", "6"]


def test_a_version_that_another_run_left_behind_is_not_taken_for_ours(make):
  # That run was cut off after it saved version 6 and before its checkpoint;
  # this one goes on from step 5 with other settings.
  other = started(make)
  other.refresh(6, {"step": 600})
  other.save()
  versions = make()
  versions.restore([0], "3c4d")
  run(versions, 5, 7)
  saved = versions.save()
  resumed = make()
  resumed.restore(saved, "3c4d")
  assert run(resumed, 7, 11) == {7: 0, 8: 0, 9: 6, 10: 6}


def test_versions_of_other_passages_are_refused(make):
  versions = started(make)
  saved = versions.save()
  with pytest.raises(ValueError, match="was built of other passages"):
    make().restore(saved, "other")


def test_a_version_that_is_gone_is_named(make, tmp_path):
  with pytest.raises(FileNotFoundError, match=str(tmp_path / "index" / "6")):
    make().restore([6], "3c4d")


def test_versions_that_no_checkpoint_needs_are_removed(make, tmp_path):
  versions = make()
  versions.remove_except({0})  # there is nothing yet
  versions.start({"step": 0})
  for step in (0, 10, 20):
    run(versions, step, step + 10)
    versions.save()
  folder = tmp_path / "index"
  (folder / "notes").mkdir()
  names = {p.name for p in folder.iterdir()}
  assert names == {"6", "12", "18", "24", "30", "notes"}
  versions.remove_except({12, 24})
  assert {p.name for p in folder.iterdir()} == {"12", "24", "notes"}


def test_a_version_that_was_removed_is_written_again(make):
  versions = started(make)
  run(versions, 0, 7)
  assert versions.save() == [0, 6]
  versions.remove_except({0})
  resumed = make()
  resumed.restore(versions.save(), "3c4d")
  assert run(resumed, 7, 11) == {7: 0, 8: 0, 9: 6, 10: 6}


def test_closing_ends_the_thread(make):
  before = set(threading.enumerate())
  versions = started(make)
  versions.refresh(6, {"step": 6})
  assert set(threading.enumerate()) - before
  versions.close()
  assert set(threading.enumerate()) <= before


def test_an_index_that_finds_too_little_is_not_adopted(make, monkeypatch):
  versions = make()
  index = versions._builder.build({"step": 0})

  def check(index):
    raise ValueError("finds too little")

  monkeypatch.setattr(versions._builder, "check", check)
  with pytest.raises(ValueError, match="finds too little"):
    versions.adopt(index)
  assert versions.index is None
