"""A manifest notices whatever happens to the files that it names."""

import hashlib
import json
import os
import stat

import numpy as np
import pytest

from rag_jax import artifacts

REMEDY = "Build it again."


@pytest.fixture
def directory(tmp_path):
  path = tmp_path / "built"
  (path / "part").mkdir(parents=True)
  (path / "a.bin").write_bytes(bytes(range(100)))
  (path / "part" / "b.txt").write_text("two\n")
  artifacts.write_manifest(path, kind="thing", format=3, content={"n": 7})
  return path


def read(path, **changes):
  expected = {"kind": "thing", "format": 3, "remedy": REMEDY}
  return artifacts.read_manifest(path, **(expected | changes))


def edit(path, **changes):
  """Writes what somebody who takes the digest off could have written."""
  manifest = json.loads((path / "manifest.json").read_text())
  del manifest["sha256"]
  (path / "manifest.json").write_text(json.dumps(manifest | changes))


def refused(path, match, error=ValueError, **changes):
  with pytest.raises(error, match=match) as info:
    read(path, **changes)
  assert str(info.value).endswith(REMEDY)


def test_content_comes_back_and_every_file_has_its_digest(directory):
  assert read(directory) == {"n": 7}
  files = json.loads((directory / "manifest.json").read_text())["files"]
  assert set(files) == {"a.bin", "part/b.txt"}
  assert files["part/b.txt"] == {
    "sha256": hashlib.sha256(b"two\n").hexdigest(),
    "bytes": 4,
  }


def test_a_directory_can_be_moved(directory, tmp_path):
  assert read(directory.rename(tmp_path / "elsewhere")) == {"n": 7}


def test_an_older_format_is_returned(directory):
  assert read(directory, format=4) == {"n": 7}


def test_a_file_that_was_not_finished_is_no_part_of_the_manifest(directory):
  artifacts.temp_path(directory / "a.bin").write_text("half")
  artifacts.write_manifest(directory, kind="thing", format=3, content={})
  files = json.loads((directory / "manifest.json").read_text())["files"]
  assert set(files) == {"a.bin", "part/b.txt"}


def test_a_directory_without_manifest_was_cut_off(directory):
  artifacts.start_directory(directory)
  refused(
    directory, "no manifest.json.*thing.*cut off", error=FileNotFoundError
  )


def test_a_directory_that_does_not_exist_holds_nothing(tmp_path):
  refused(tmp_path / "no", "no manifest.json", error=FileNotFoundError)


@pytest.mark.parametrize(
  ("expected", "match"),
  [
    ({"kind": "index"}, "kind 'thing', expected 'index'"),
    ({"format": 2}, "format 3;.*reads up to 2.*Upgrade"),
  ],
)
def test_another_kind_and_a_newer_format_are_refused(
  directory, expected, match
):
  refused(directory, match, **expected)


def write(data):
  return lambda file: file.write_bytes(data)


@pytest.mark.parametrize(
  ("damage", "match"),
  [
    (os.remove, "a.bin is missing"),
    (lambda file: file.rename(file.with_suffix(".bak")), "a.bin is missing"),
    (write(bytes(range(99))), "a.bin.*was cut off: it has 99 bytes.*says 100"),
    (write(bytes(101)), "a.bin.*has grown: it has 101 bytes"),
    (write(bytes([1, *range(1, 100)])), r"a.bin.*content changed.*digest"),
  ],
)
def test_a_damaged_file_is_named(directory, damage, match):
  damage(directory / "a.bin")
  refused(directory, match)


def test_every_flipped_bit_of_the_manifest_is_noticed(directory):
  content = {"n": 7, "x": [1.5, "\u00e9"], 3: {"a": True, "b": None}}
  artifacts.write_manifest(directory, kind="thing", format=3, content=content)
  expected = read(directory)
  assert expected == {"n": 7, "x": [1.5, "\u00e9"], "3": content[3]}
  file = directory / "manifest.json"
  whole = file.read_bytes()
  noticed = 0
  for place in range(len(whole)):
    for bit in (1, 4, 32):
      data = bytearray(whole)
      data[place] ^= bit
      file.write_bytes(data)
      try:
        content = read(directory)
      except ValueError:
        noticed += 1
      else:
        assert content == expected, place  # white space, or a digit's case
  assert noticed > len(whole)


def test_an_edited_manifest_is_refused(directory):
  file = directory / "manifest.json"
  file.write_text(file.read_text().replace('"n": 7', '"n": 8'))
  refused(directory, "manifest.json was damaged.*or it was edited")


def test_white_space_and_the_order_of_parts_mean_nothing(directory):
  file = directory / "manifest.json"
  manifest = json.loads(file.read_text())
  file.write_text(json.dumps(dict(reversed(manifest.items()))))
  assert read(directory) == {"n": 7}


def test_a_manifest_of_before_has_no_digest_and_is_read(directory):
  edit(directory)
  assert read(directory) == {"n": 7}
  edit_file = directory / "manifest.json"
  manifest = json.loads(edit_file.read_text())
  edit_file.write_text(json.dumps(manifest | {"sha25": "0"}))
  refused(directory, "was damaged")


@pytest.mark.parametrize(
  ("text", "match"),
  [
    (b'{"kind": "thi', "not JSON"),
    (b"\xff\xfe", "not JSON"),
    (b"[1]", "no manifest: kind, format, content, files"),
    (b'{"kind": "thing", "format": "3", "content": {}}', "format, files"),
  ],
)
def test_a_broken_manifest_is_refused(directory, text, match):
  (directory / "manifest.json").write_bytes(text)
  refused(directory, match)


@pytest.mark.parametrize(
  "name", ["/etc/hostname", "../built/a.bin", "part/../a.bin", "gs://b/c", ""]
)
def test_a_name_that_could_leave_the_directory_is_refused(directory, name):
  edit(directory, files={name: {"sha256": "0", "bytes": 1}})
  refused(directory, "expected a path relative to the directory")


def test_a_file_without_digest_is_refused(directory):
  edit(directory, files={"a.bin": {"bytes": 100}})
  refused(directory, "about a.bin; expected its sha256 and bytes")


@pytest.mark.parametrize(
  "name", ["a.bin", "extra", ".extra.tmp", "part/b.txt", ".half.tmp/deep"]
)
@pytest.mark.parametrize("target", ["../outside", "part/b.txt", "nowhere"])
def test_a_link_is_refused_wherever_it_leads(directory, tmp_path, name, target):
  (tmp_path / "outside").write_bytes(bytes(range(100)))
  link = directory / name
  link.parent.mkdir(exist_ok=True)
  link.unlink(missing_ok=True)
  link.symlink_to(os.path.relpath(directory / target, link.parent))
  refused(directory, f"{name} in .* is a link to .*Expected plain files")
  with pytest.raises(ValueError, match="is a link to"):
    artifacts.write_manifest(directory, kind="thing", format=3, content={})


def test_a_link_out_of_the_directory_is_called_that(directory, tmp_path):
  (directory / "extra").symlink_to(tmp_path)
  refused(directory, "is a link to .*, outside the directory")


@pytest.mark.parametrize("name", ["part", "up"])
def test_a_link_to_a_folder_is_refused(directory, name):
  if name == "part":  # what was there is behind the link, whole
    (directory / "part").rename(directory / ".part.tmp")
    (directory / "part").symlink_to(directory / ".part.tmp")
  else:
    (directory / "up").symlink_to(directory)
  refused(directory, f"{name} in .* is a link to")


@pytest.mark.parametrize("target", ["../elsewhere.json", "nowhere"])
def test_a_manifest_that_is_a_link_is_refused(directory, tmp_path, target):
  (directory / "manifest.json").rename(tmp_path / "elsewhere.json")
  (directory / "manifest.json").symlink_to(target)
  refused(directory, r"manifest.json is a link to|There is no", error=Exception)


def test_a_pipe_or_a_folder_in_the_place_of_a_file_is_refused(directory):
  (directory / "a.bin").unlink()
  os.mkfifo(directory / "a.bin")
  refused(directory, "a.bin in .* is a pipe")
  (directory / "a.bin").unlink()
  (directory / "a.bin").mkdir()
  refused(directory, "a.bin is missing")
  (directory / "manifest.json").unlink()
  os.mkfifo(directory / "manifest.json")
  refused(directory, "manifest.json is no plain file")


@pytest.mark.parametrize("name", ["extra", "part/c.txt", "new/d", ".hidden"])
def test_a_file_that_the_manifest_does_not_name_is_refused(directory, name):
  (directory / name).parent.mkdir(exist_ok=True)
  (directory / name).write_text("x")
  refused(directory, f"does not name: {name}. Expected exactly those")


def test_names_beside_are_left_to_who_opens_them(directory):
  (directory / "updates").mkdir()
  (directory / "updates" / "CURRENT").write_text("x")
  refused(directory, "does not name: updates/CURRENT")
  assert read(directory, beside=["updates"]) == {"n": 7}
  (directory / "updates").rename(directory / "more")
  (directory / "updates").symlink_to("more")
  refused(directory, "updates in .* is a link", beside=["updates"])


def test_a_directory_inside_answers_for_its_own_files(directory):
  inside = directory / "part"
  artifacts.write_manifest(inside, kind="part", format=1, content={})
  outer = {"kind": "thing", "format": 3, "content": {}}
  artifacts.write_manifest(directory, **outer, nested=True)
  assert read(directory, nested=True) == {}
  (inside / "more").write_text("x")
  assert read(directory, nested=True) == {}  # who opens `part` refuses it
  with pytest.raises(ValueError, match="does not name: more"):
    read(inside, kind="part")
  (inside / "manifest.json").unlink()
  refused(directory, "part/manifest.json is missing", nested=True)


def test_a_directory_is_changed_by_nothing_that_is_not_on_the_disk(directory):
  """Every file, and every folder of them, is synced before the manifest."""
  events = []
  with pytest.MonkeyPatch.context() as patch:
    for name in ("fsync", "replace"):
      real = getattr(os, name)

      def watched(first, *rest, real=real, name=name):
        is_file = isinstance(first, int)
        path = os.readlink(f"/proc/self/fd/{first}") if is_file else rest[0]
        events.append((name, os.path.relpath(path, directory)))
        return real(first, *rest)

      patch.setattr(os, name, watched)
    artifacts.write_manifest(directory, kind="thing", format=3, content={})
  renamed = events.index(("replace", "manifest.json"))
  before, after = events[:renamed], events[renamed:]
  for name in ("a.bin", "part/b.txt", "part", ".", ".."):
    assert ("fsync", name) in before
  assert before[-1][1].startswith(".manifest.json.")
  assert ("fsync", ".") in after


def test_content_with_a_digest_comes_back_and_a_change_is_noticed(caplog):
  content = {"n": 7, "x": [1.5, "\u00e9"], "s": {"a": True, "b": None}}
  made = artifacts.with_digest(content)
  asked = {"origin": "f.json", "remedy": REMEDY}
  assert artifacts.without_digest(made, **asked) == content
  assert artifacts.with_digest(made) == made
  assert not caplog.records
  for change in ({"n": 8}, {"m": 1}, {"sha256": None}, {"sha256": "0" * 64}):
    with pytest.raises(ValueError, match=r"f.json was damaged.*Build it"):
      artifacts.without_digest(made | change, **asked)
  assert artifacts.without_digest(content, **asked) == content
  assert "f.json has no digest" in caplog.text


@pytest.mark.parametrize("name", ["scann_docids.pkl", "part/x.PICKLE"])
def test_a_planted_pickle_is_refused(directory, name):
  (directory / name).write_bytes(b"cos\nsystem\n(S'true'\ntR.")
  refused(directory, f"holds {name}, a pickle")
  with pytest.raises(ValueError, match="a pickle"):
    artifacts.write_manifest(directory, kind="thing", format=3, content={})


def test_a_failed_write_leaves_the_old_text_and_nothing_else(tmp_path):
  path = tmp_path / "x.json"
  artifacts.write_atomically(path, "old")
  with pytest.raises(UnicodeEncodeError):
    artifacts.write_atomically(path, "new, then half a pair: \ud800")
  assert path.read_text() == "old"
  assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_a_written_file_can_be_read_by_whom_the_umask_allows(tmp_path):
  (tmp_path / "plain").write_text("")
  artifacts.write_atomically(tmp_path / "x", "text")
  modes = [stat.S_IMODE((tmp_path / n).stat().st_mode) for n in ("plain", "x")]
  assert modes[0] == modes[1]


def test_a_fingerprint_of_arrays_does_not_depend_on_their_order():
  a, b = np.arange(6.0).reshape(2, 3), np.array(1, np.int32)
  one = artifacts.fingerprint_arrays({"a": a, "b": b})
  assert one == artifacts.fingerprint_arrays({"b": b, "a": a})
  assert one == artifacts.fingerprint_arrays(
    {"a": np.asfortranarray(a), "b": b}
  )
  assert 16 <= len(one) <= 64
  assert int(one, 16) >= 0


@pytest.mark.parametrize(
  "other",
  [
    {"b": np.zeros((2, 3), np.float32)},
    {"a": np.zeros((3, 2), np.float32)},
    {"a": np.zeros((2, 3), np.int32)},
    {"a": np.full((2, 3), -0.0, np.float32)},
    {"a": np.zeros((2, 3), np.float32), "c": np.zeros(0, np.float32)},
    {},
  ],
  ids=["name", "shape", "dtype", "value", "one more", "none"],
)
def test_a_fingerprint_of_arrays_changes_with(other):
  one = artifacts.fingerprint_arrays({"a": np.zeros((2, 3), np.float32)})
  assert one != artifacts.fingerprint_arrays(other)


def test_objects_have_no_fingerprint():
  with pytest.raises(ValueError, match="'a' has dtype object"):
    artifacts.fingerprint_arrays({"a": np.array([None])})


def test_a_fingerprint_of_lines_knows_where_each_line_ends():
  lines = [["ab", "c"], ["a", "bc"], ["abc"], ["c", "ab"], ["abc", ""], []]
  lines += [["ab\nc"], ["\ud800"], ["é"]]
  assert len({artifacts.fingerprint_lines(x) for x in lines}) == len(lines)
  assert artifacts.fingerprint_lines(iter(["a"])) == (
    artifacts.fingerprint_lines(["a"])
  )


def test_the_size_of_a_directory_is_that_of_its_finished_files(tmp_path):
  (tmp_path / "folder").mkdir()
  (tmp_path / "folder" / "a").write_bytes(bytes(10))
  (tmp_path / "b").write_bytes(bytes(5))
  (tmp_path / ".b.1234.tmp").write_bytes(bytes(100))
  (tmp_path / artifacts.MANIFEST).write_bytes(bytes(100))
  assert artifacts.directory_bytes(tmp_path) == 15


def test_a_path_that_is_not_there_names_what_is(tmp_path):
  assert artifacts.instead_of(tmp_path / "x") == f"{tmp_path} holds nothing."
  (tmp_path / "runs/documents").mkdir(parents=True)
  (tmp_path / "runs/notes.txt").touch()
  near = f"Did you mean {str(tmp_path / 'runs/documents')!r}?"
  assert artifacts.instead_of(tmp_path / "runs/document") == near
  assert artifacts.instead_of("relative/nowhere")  # of where one is
  far = artifacts.instead_of(tmp_path / "runs/zzz/qqq")
  assert far == f"{tmp_path}/runs holds documents/, notes.txt."
  with pytest.raises(FileNotFoundError, match=r"Did you mean .*documents'"):
    artifacts.read_manifest(
      tmp_path / "runs/documnts", kind="x", format=1, remedy="Build it."
    )
