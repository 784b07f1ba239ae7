"""Where a checkpoint lies, and that its files are its own and unchanged."""

import hashlib
import json

import pytest

from rag_jax import artifacts
from rag_jax.weights.directory import open_directory
from rag_jax.weights.load import load_encoder


def test_what_is_not_there_is_named(tmp_path):
  with pytest.raises(
    FileNotFoundError, match=r"There is no directory .*/nothing\. Expected a"
  ):
    open_directory(tmp_path / "nothing")


def test_a_file_is_no_directory(tmp_path):
  (tmp_path / "model.safetensors").touch()
  with pytest.raises(ValueError, match=r"is a file; expected the directory"):
    open_directory(tmp_path / "model.safetensors")


def test_a_bucket_is_no_directory_of_this_machine():
  with pytest.raises(ValueError, match=r"gs://b/model is in a bucket; expec"):
    open_directory("gs://b/model")


@pytest.mark.parametrize("text", ["{", "", '{"a": 1', "\xff", "[" * 100_000])
def test_a_config_that_is_not_json_is_named(checkpoints, text):
  path = checkpoints.dpr()
  (path / "manifest.json").unlink()
  (path / "config.json").write_bytes(text.encode("latin-1"))
  with pytest.raises(
    ValueError, match=r"dpr/config\.json is not JSON \(.*Copy"
  ):
    load_encoder(path)


def test_a_config_that_is_no_object_is_named(checkpoints):
  path = checkpoints.dpr()
  (path / "manifest.json").unlink()
  (path / "config.json").write_text("[]")
  with pytest.raises(ValueError, match=r"holds a list, expected a dict\. Copy"):
    load_encoder(path)


def test_a_missing_config_is_named(checkpoints):
  path = checkpoints.dpr()
  (path / "manifest.json").unlink()
  (path / "config.json").unlink()
  with pytest.raises(
    FileNotFoundError, match=r"There is no config\.json in .*dpr\. Expected a"
  ):
    load_encoder(path)


def test_a_name_that_is_too_long_is_not_there(checkpoints):
  directory = open_directory(checkpoints.dpr())
  for name in ("a" * 5000, "a/" * 3000 + "a"):
    assert not directory.has(name)
    with pytest.raises(FileNotFoundError, match=r"There is no a") as error:
      directory.file(name)
    assert len(str(error.value)) < 1000


def test_an_export_that_was_cut_off_is_not_loaded(checkpoints, monkeypatch):
  path = checkpoints.dpr()

  def full_disk(path, text):
    raise OSError("No space left on device")

  with monkeypatch.context() as patch:
    patch.setattr(artifacts, "write_atomically", full_disk)
    with pytest.raises(OSError, match="No space"):
      checkpoints.dpr()
  with pytest.raises(FileNotFoundError, match=r"There is no config\.json"):
    load_encoder(path)


@pytest.mark.parametrize(
  ("name", "old", "new"),
  [("config.json", "0.0", "0.5"), ("tokenizer.json", "w7", "x7")],
)
def test_a_file_that_changed_after_the_export_is_named(
  checkpoints, name, old, new
):
  path = checkpoints.dpr()
  text = (path / name).read_text()
  assert old in text
  (path / name).write_text(text.replace(old, new, 1))
  with pytest.raises(
    ValueError, match=rf"{name} in .*was damaged.*yours, remove manifest\.json"
  ):
    load_encoder(path)
  (path / "manifest.json").unlink()
  load_encoder(path)


@pytest.mark.parametrize("text", ["{}", "no json", '{"kind": "web app"}'])
def test_the_manifest_of_another_program_says_nothing(checkpoints, text):
  path = checkpoints.dpr()
  (path / "manifest.json").write_text(text)
  load_encoder(path)


def test_a_link_that_stays_inside_is_followed(checkpoints):
  path = checkpoints.dpr()
  (path / "weights").mkdir()
  (path / "model.safetensors").rename(path / "weights/w.safetensors")
  (path / "model.safetensors").symlink_to("weights/w.safetensors")
  (path / "manifest.json").unlink()
  load_encoder(path)


def hub_cache(checkpoints):
  """Returns a checkpoint as the hub's client keeps it: links to blobs."""
  path = checkpoints.dpr()
  (path / "manifest.json").unlink()
  home = checkpoints.root / "hub/models--org--name"
  snapshot = home / "snapshots/0123456789"
  snapshot.mkdir(parents=True)
  (home / "blobs").mkdir()
  for file in path.iterdir():
    large = file.suffix == ".safetensors"
    kind = hashlib.sha256 if large else hashlib.sha1
    name = kind(file.read_bytes()).hexdigest()
    file.rename(home / "blobs" / name)
    (snapshot / file.name).symlink_to(f"../../blobs/{name}")
  return snapshot


def test_the_links_of_the_hubs_cache_are_followed(checkpoints):
  snapshot = hub_cache(checkpoints)
  loaded = load_encoder(snapshot)
  assert checkpoints.flat(loaded.params) == checkpoints.flat(
    checkpoints.encoder_params()
  )


def test_a_flipped_bit_in_the_hubs_cache_is_found_by_its_name(checkpoints):
  snapshot = hub_cache(checkpoints)
  blob = (snapshot / "model.safetensors").resolve()
  data = bytearray(blob.read_bytes())
  data[-2] ^= 1
  blob.write_bytes(data)
  with pytest.raises(
    ValueError, match=r"model\.safetensors of .* was damaged: its sha256 is"
  ):
    load_encoder(snapshot)


def test_a_link_out_of_the_hubs_cache_is_refused(checkpoints):
  snapshot = hub_cache(checkpoints)
  config = snapshot / "config.json"
  outside = checkpoints.root / "outside.json"
  outside.write_text(config.read_text())
  config.unlink()
  config.symlink_to(outside)
  with pytest.raises(ValueError, match=r"is a link to .*outside\.json"):
    load_encoder(snapshot)


def test_a_module_cannot_lie_outside(checkpoints):
  path = checkpoints.bert(kind="sentence_transformers")
  (path / "manifest.json").unlink()
  modules = json.loads((path / "modules.json").read_text())
  modules[1]["path"] = "../bert/1_Pooling"
  (path / "modules.json").write_text(json.dumps(modules))
  with pytest.raises(ValueError, match=r"names the file '\.\./bert/1_Pooling'"):
    load_encoder(path)


def test_a_file_in_the_place_of_a_folder_is_named(checkpoints):
  path = checkpoints.bert(kind="sentence_transformers")
  checkpoints.edit_json(path)
  modules = json.loads((path / "modules.json").read_text())
  modules[1]["path"] = "config.json"
  (path / "modules.json").write_text(json.dumps(modules))
  with pytest.raises(FileNotFoundError, match=r"config\.json is a file; expe"):
    load_encoder(path)
