"""Whatever happens to a search directory, nothing else is served than it held.

The directory is updated, tuned to many kinds of files (ScaNN, words, a version)
and damaged in every way of helpers/damage.py; or the power is cut.
"""

import json
import os
import pathlib
import shutil
import threading

from damage import MARK
from damage import attack
from disks import PowerLoss
from disks import full_disk
from etils import epath
import numpy as np
import pytest
from small_search import build
from small_search import config

from rag_jax import artifacts
from rag_jax.directory_lock import building
from rag_jax.disk import UnwritableError
from rag_jax.retrieval import scann
from rag_jax.search import versions as search_versions
from rag_jax.search.directory import OpenedDirectory
from rag_jax.search.update import update_search_directory

NOT_OURS = (".lock.tmp",)  # of nothing that is served


def update(path, records, **kwargs):
  file = path.parent / "documents.jsonl"
  file.write_text("".join(f"{record}\n" for record in records))
  return update_search_directory(path, upsert=str(file), **kwargs)


def yaks(number):
  return f'{{"id": "yak{number}", "text": "yak {number} lives in the moors"}}'


def served(path):
  """Returns all that decides what a directory answers; nothing is compiled."""
  directory = OpenedDirectory(path)
  tokenizer = directory.encoder.tokenizer
  vectors = np.random.default_rng(0).normal(size=(2, 16)).astype(np.float32)
  everything = len(directory.passages)
  return (
    directory.version.name,
    directory.encoder.fingerprint,
    directory.encoder.fields,
    tokenizer.encode_inputs(["the owls of the caves"], 20),
    [np.array(x).tolist() for x in directory.index.search(vectors, 5)],
    [np.array(x).tolist() for x in directory.bm25.search(["owls caves"], 5)],
    list(directory.passages.get(range(everything))),
  )


@pytest.fixture(scope="module")
def updated(corpus, encoder, tmp_path_factory):
  """A directory of ScaNN's, with words, and two versions."""
  made = config()
  made.index.kind = "scann"
  made.index.scann_tree_passages = 16
  path = tmp_path_factory.mktemp("updated") / "index"
  build(corpus, encoder, path, made)
  for number in (1, 2):
    update(path, [yaks(number)])
  return path


@pytest.fixture
def copy(updated, tmp_path):
  return pathlib.Path(shutil.copytree(updated, tmp_path / "copy"))


def test_nothing_is_served_that_was_not_written(updated, tmp_path):
  refused, whole = attack(updated, tmp_path, served, most=90, skip=NOT_OURS)
  # Of the version before, and of white space, nothing is served.
  assert refused > 3 * whole


def test_every_bit_of_what_says_which_version_is_in_use_matters(copy):
  file = copy / "updates/CURRENT"
  whole = file.read_bytes()
  directory = OpenedDirectory(copy)

  def open_again():
    path = epath.Path(copy)
    now = search_versions.current(path, always=True)
    search_versions.check_current(path / "updates", now)
    return now.name

  assert open_again() == directory.version.name == "v000002"
  for bit in range(8 * len(whole)):
    data = bytearray(whole)
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)
    with pytest.raises((ValueError, FileNotFoundError), match="CURRENT"):
      open_again()
  other = (b"../" + whole, b"b" + whole[1:], b"v1\n")
  for data in (b"", whole[:7], whole[:-1], b"\xff" + whole, whole * 2, *other):
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"names .*; expected a version like"):
      open_again()
  file.write_bytes(whole[:7] + b"\n")  # as an older one would have written it
  with pytest.raises(ValueError, match="is not what was written there"):
    open_again()


def test_a_link_in_the_place_of_what_names_the_version_is_refused(
  copy, tmp_path
):
  (copy / "updates/CURRENT").rename(tmp_path / "CURRENT")
  (copy / "updates/CURRENT").symlink_to(tmp_path / "CURRENT")
  with pytest.raises(ValueError, match="CURRENT is a link"):
    OpenedDirectory(copy)


def test_without_the_file_that_names_a_version_none_is_guessed(copy):
  kept = sorted(os.listdir(copy / "updates"))
  (copy / "updates/CURRENT").unlink()
  with pytest.raises(ValueError, match=r"nobody can tell which version is in"):
    OpenedDirectory(copy)
  with pytest.raises(ValueError, match=r"nobody can tell which version is in"):
    update(copy, [yaks(3)])
  kept.remove("CURRENT")
  assert sorted(os.listdir(copy / "updates")) == kept
  shutil.rmtree(copy / "updates")
  with pytest.raises(ValueError, match=r"There is no updates/CURRENT"):
    OpenedDirectory(copy)


def test_set_back_by_mistake_later_versions_are_named_and_kept(copy, caplog):
  file = copy / "updates/CURRENT"
  now = file.read_text()
  digest = artifacts.manifest_digest(copy / "updates/v000001")
  file.write_text(f"v000001 {digest}\n")
  assert OpenedDirectory(copy).version.name == "v000001"
  assert "holds v000002, later than v000001, which is in use" in caplog.text
  update(copy, [yaks(3)])
  assert OpenedDirectory(copy).version.name == "v000003"
  file.write_text(now)  # what was in use is still there
  assert OpenedDirectory(copy).version.name == "v000002"


def test_directories_of_before_are_opened_with_a_warning(
  corpus, encoder, tmp_path, caplog
):
  path = build(corpus, encoder, tmp_path / "index").path
  content = OpenedDirectory(path).content
  shutil.rmtree(path / "updates")
  del content["updates"]
  artifacts.write_manifest(
    path, kind="search directory", format=1, content=content, nested=True
  )
  assert OpenedDirectory(path).version.name == ""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(search_versions, "MARK", {})
    update(path, [yaks(1)])
  file = path / "updates/CURRENT"
  file.write_text(file.read_text()[:7] + "\n")  # as it was written before
  assert OpenedDirectory(path).version.name == "v000001"
  assert "CURRENT has no digest of v000001" in caplog.text
  file.unlink()
  with pytest.raises(ValueError, match="of what was built, v000001"):
    OpenedDirectory(path)


@pytest.mark.parametrize("name", ["notes.txt", "v000001.bak", ".hidden"])
def test_other_things_among_the_versions_are_refused(copy, name):
  (copy / "updates" / name).write_text("mine")
  with pytest.raises(ValueError, match=rf"holds {name}; expected CURRENT and"):
    OpenedDirectory(copy)


def sign(folder):
  """Writes the manifests anew, as somebody else could: from inside out."""
  for path, kind, nested in (
    (folder / "index", "index", False),
    (folder, "search directory", True),
  ):
    manifest = json.loads((path / "manifest.json").read_text())
    artifacts.write_manifest(
      path,
      kind=kind,
      format=manifest["format"],
      content=manifest["content"],
      nested=nested,
      beside=["updates"] if nested else [],
    )


@pytest.mark.parametrize("hidden", ["../../secret", "{outside}", ".x/a.npy"])
def test_scann_reads_no_file_that_its_directory_does_not_hold(
  corpus, encoder, tmp_path, hidden
):
  made = config()
  made.index.kind = "scann"
  path = pathlib.Path(build(corpus, encoder, tmp_path / "index", made).path)
  listed = path / "index/scann/scann_assets.pbtxt"
  outside = tmp_path / "outside.npy"
  np.save(outside, np.zeros((40, 16), np.float32))
  name = hidden.format(outside=outside)
  listed.write_text(listed.read_text().replace("dataset.npy", name))
  sign(path)
  with pytest.raises(ValueError, match=r"scann_assets.pbtxt is not what ScaNN"):
    OpenedDirectory(path)


def test_scann_never_sees_a_pickle(corpus, encoder, tmp_path):
  """Nor what replaces its folder while it is opened."""
  made = config()
  made.index.kind = "scann"
  path = pathlib.Path(build(corpus, encoder, tmp_path / "index", made).path)
  seen = []
  real = scann._module().load_searcher

  def look(folder, **kwargs):
    seen.extend(os.listdir(folder))
    return real(folder, **kwargs)

  pickle = path / "index/scann/scann_docids.pkl"
  mark = tmp_path / MARK
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(scann._module(), "load_searcher", look)
    show = scann._show_verified

    def plant(source, target):
      pickle.write_text(f"cos\nsystem\n(S'touch {mark}'\ntR.")
      show(source, target)

    patch.setattr(scann, "_show_verified", plant)
    OpenedDirectory(path)
  assert "scann_config.pb" in seen
  assert not [name for name in seen if name.endswith(".pkl")]
  assert not mark.exists()


@pytest.mark.parametrize("names_survive", [True, False])
def test_after_a_power_cut_there_is_the_old_version_or_the_new(
  copy, tmp_path, names_survive
):
  before = served(copy)
  moments, found = [0], []

  def cut(write):
    moments[0] += 1
    if moments[0] % 7 == 0:  # opening takes long
      there = tmp_path / f"cut {moments[0]}"
      write(there)
      found.append(served(there))
      shutil.rmtree(there)

  with PowerLoss(copy, cut, names_survive=names_survive) as power:
    update(copy, [yaks(3)])
    power.write(tmp_path / "end")
  after = served(copy)
  assert after != before
  assert served(tmp_path / "end") == after  # nothing is lost that was reported
  assert len(found) > 3
  assert all(state in (before, after) for state in found)


@pytest.mark.parametrize("names_survive", [True, False])
def test_a_build_whose_power_is_cut_is_unfinished_and_goes_on(
  corpus, encoder, tmp_path, names_survive
):
  root = tmp_path / "disk"
  root.mkdir()
  moments, cuts = [0], []

  def cut(write):
    moments[0] += 1
    if moments[0] % 12 == 0:
      there = tmp_path / f"cut {moments[0]}"
      write(there)
      cuts.append(there / "index")

  with PowerLoss(root, cut, names_survive=names_survive) as power:
    whole = build(corpus, encoder, root / "index")
    power.write(tmp_path / "end")
  expected = served(whole.path)
  assert served(tmp_path / "end" / "index") == expected
  unfinished = [path for path in cuts if not (path / "manifest.json").exists()]
  for path in cuts:
    if path not in unfinished:
      assert served(path) == expected  # the last may come after the manifest
      continue
    with pytest.raises(FileNotFoundError, match="no search directory was buil"):
      OpenedDirectory(path)
  assert len(unfinished) > 3
  build(corpus, encoder, unfinished[-1])
  assert served(unfinished[-1]) == expected


@pytest.mark.parametrize("num_bytes", [100, 3_000, 12_000, 40_000])
def test_a_full_disk_ends_a_build_with_one_sentence_and_it_goes_on(
  corpus, encoder, tmp_path, num_bytes
):
  with (
    full_disk(num_bytes),
    pytest.raises(UnwritableError, match=r"cannot be written to .*index") as e,
  ):
    build(corpus, encoder, tmp_path / "index")
  assert str(e.value).count("Expected") == 1
  assert "room" in str(e.value)
  assert "ree some" in str(e.value)
  with pytest.raises(FileNotFoundError):
    OpenedDirectory(tmp_path / "index")
  build(corpus, encoder, tmp_path / "index")


def test_a_full_disk_during_an_update_leaves_what_was_there(copy):
  before = served(copy)
  with full_disk(3_000), pytest.raises(UnwritableError, match=r"Free some"):
    update(copy, [yaks(3)])
  assert served(copy) == before
  update(copy, [yaks(3)])


@pytest.mark.parametrize("call", ["mkdir", "open"])
def test_a_folder_that_may_not_be_written_to_is_called_that(
  corpus, encoder, tmp_path, monkeypatch, call
):
  real = getattr(os, call)
  path = tmp_path / "index"

  def read_only(name, *args, **kwargs):
    if str(name).startswith(str(path)):
      raise OSError(30, "Read-only file system", str(name))
    return real(name, *args, **kwargs)

  monkeypatch.setattr(os, call, read_only)
  with pytest.raises(
    UnwritableError, match=r"search directory cannot be written to .*Read-only"
  ) as e:
    build(corpus, encoder, path)
  assert "Change its permissions, or choose another" in str(e.value)


def test_a_second_build_waits_when_asked_and_finds_it_complete(
  corpus, encoder, tmp_path, caplog
):
  path = tmp_path / "index"
  build(corpus, encoder, path)
  whole = served(path)
  results = []

  def second():
    results.append(build(corpus, encoder, path, wait=True))

  with caplog.at_level("INFO"):
    with building(path, kind="search directory", own=lambda name: True):
      with pytest.raises(ValueError, match=r"tools do with --wait"):
        build(corpus, encoder, path)
      thread = threading.Thread(target=second)
      thread.start()
      thread.join(0.5)
      assert thread.is_alive()
    thread.join(60)
  assert "Waiting for another process" in caplog.text
  assert served(results[0].path) == whole
