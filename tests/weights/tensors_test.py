"""Tensors come back as they were, and a file that is not whole says so."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from rag_jax.weights import tensors as tensors_lib
from rag_jax.weights.directory import open_directory
from rag_jax.weights.load import load_encoder
from rag_jax.weights.load import load_generator
from rag_jax.weights.tensors import TensorFiles
from rag_jax.weights.tensors import write_tensors

INDEX = "model.safetensors.index.json"


@pytest.fixture
def arrays():
  rng = np.random.default_rng(0)
  arrays = {f"t{i}": rng.normal(size=(4, 5)) for i in range(5)}
  arrays["scalar"] = np.array(2.5)
  arrays["odd"] = np.array([np.finfo(np.float32).tiny, -0.0, 3e14])
  arrays = {k: x.astype(np.float32) for k, x in arrays.items()}
  arrays["transposed"] = arrays["t0"].T
  return arrays


def read(path):
  files = TensorFiles(open_directory(path))
  return {name: files.read(name) for name in files.names}


@pytest.mark.parametrize("max_shard_bytes", [1, 100, 200, 10**9])
def test_tensors_come_back_bit_for_bit(tmp_path, arrays, max_shard_bytes):
  write_tensors(tmp_path, arrays, max_shard_bytes)
  again = read(tmp_path)
  assert sorted(again) == sorted(arrays)
  for name, x in arrays.items():
    assert again[name].shape == x.shape
    assert again[name].tobytes() == x.tobytes()


def test_shards_are_named_and_listed_as_transformers_does(tmp_path, arrays):
  write_tensors(tmp_path, arrays, 200)
  names = sorted(p.name for p in tmp_path.iterdir())
  # Eight tensors of 80 bytes, of which two are smaller: in order of name.
  assert names == [
    "model-00001-of-00003.safetensors",
    "model-00002-of-00003.safetensors",
    "model-00003-of-00003.safetensors",
    INDEX,
  ]
  index = json.loads((tmp_path / INDEX).read_text())
  assert index["metadata"]["total_size"] == sum(
    x.nbytes for x in arrays.values()
  )
  for name, file in index["weight_map"].items():
    with safetensors.safe_open(tmp_path / file, "np") as f:
      assert name in f.keys()  # noqa: SIM118  (it is no dict)
      assert f.metadata() == {"format": "pt"}


def test_an_export_replaces_the_shards_of_the_last(tmp_path, arrays):
  write_tensors(tmp_path, arrays, 200)
  write_tensors(tmp_path, {"other": arrays["t1"]})
  assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
  assert list(read(tmp_path)) == ["other"]


def test_a_write_that_fails_leaves_no_file(tmp_path, arrays, monkeypatch):
  def full_disk(*args, **kwargs):
    raise OSError("No space left on device")

  monkeypatch.setattr(tensors_lib.os, "replace", full_disk)
  with pytest.raises(OSError, match="No space"):
    write_tensors(tmp_path, arrays)
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
  ("dtype", "name"),
  [(ml_dtypes.bfloat16, "BF16"), (np.float16, "F16"), (np.float64, "F64")],
)
def test_other_floats_become_float32_and_the_report_says_so(
  checkpoints, dtype, name
):
  path = checkpoints.dpr()
  exact = load_encoder(path)
  checkpoints.edit_tensors(
    path, lambda t: {k: x.astype(dtype) for k, x in t.items()}
  )
  loaded = load_encoder(path)
  kernel = loaded.params["projection"]["kernel"]
  assert kernel.dtype == np.float32
  expected = exact.params["projection"]["kernel"].astype(dtype)
  np.testing.assert_array_equal(kernel, expected.astype(np.float32))
  assert f"tensors were {name} and are float32 now" in loaded.report.table()


def shard(tmp_path, arrays):
  write_tensors(tmp_path, arrays, 200)
  return json.loads((tmp_path / INDEX).read_text())


@pytest.mark.parametrize(
  "name",
  [
    "../outside.safetensors",
    "/etc/outside.safetensors",
    "sub/../../outside.safetensors",
    "..",
    "..\\outside.safetensors",
    "C:outside.safetensors",
    "",
    "a\0b",
  ],
)
def test_an_index_that_names_a_file_outside_is_refused(tmp_path, arrays, name):
  (tmp_path / "in").mkdir()
  safetensors.numpy.save_file(
    {"t0": arrays["t0"]}, tmp_path / "outside.safetensors"
  )
  index = shard(tmp_path / "in", arrays)
  index["weight_map"]["t0"] = name
  (tmp_path / "in" / INDEX).write_text(json.dumps(index))
  with pytest.raises(
    ValueError, match=r"names the file .*expected a path relative.*take the"
  ):
    read(tmp_path / "in")


@pytest.mark.parametrize("name", ["model.safetensors", "model-1.safetensors"])
def test_a_link_that_leads_outside_is_refused(tmp_path, arrays, name):
  (tmp_path / "in").mkdir()
  outside = tmp_path / "outside.safetensors"
  safetensors.numpy.save_file({"t0": arrays["t0"]}, outside)
  (tmp_path / "in" / name).symlink_to(outside)
  if name != "model.safetensors":
    index = {"weight_map": {"t0": name}}
    (tmp_path / "in" / INDEX).write_text(json.dumps(index))
  with pytest.raises(
    ValueError, match=r"is a link to .*outside\.safetensors, outside the check"
  ):
    read(tmp_path / "in")


def test_a_missing_shard_is_named(tmp_path, arrays):
  shard(tmp_path, arrays)
  (tmp_path / "model-00002-of-00003.safetensors").unlink()
  with pytest.raises(
    FileNotFoundError,
    match=r"lists model-00002-of-00003\.safetensors, which is missing; exp",
  ):
    read(tmp_path)


def test_an_index_that_disagrees_with_its_files_names_the_tensors(
  tmp_path, arrays
):
  index = shard(tmp_path, arrays)
  weight_map = index["weight_map"]
  weight_map["invented"] = weight_map.pop("t3")
  (tmp_path / INDEX).write_text(json.dumps(index))
  with pytest.raises(
    ValueError,
    match=r"disagree\. Missing: invented in model-.*; not listed: t3\. They",
  ):
    read(tmp_path)


@pytest.mark.parametrize("weight_map", [None, [], {"t0": 3}])
def test_an_index_without_names_is_refused(tmp_path, weight_map):
  (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
  with pytest.raises(ValueError, match="has no weight_map of names"):
    read(tmp_path)


@pytest.mark.parametrize("size", [0, 4, 40, -1])
def test_a_file_that_was_cut_off_is_named(tmp_path, arrays, size):
  write_tensors(tmp_path, arrays)
  file = tmp_path / "model.safetensors"
  file.write_bytes(file.read_bytes()[:size])
  with pytest.raises(
    ValueError, match=r"model\.safetensors in .* cannot be read .*: it was cut"
  ):
    read(tmp_path)


def flip(path, name, bit):
  """Flips a bit of the first number of a tensor, and takes the manifest."""
  file = path / "model.safetensors"
  data = bytearray(file.read_bytes())
  header = int.from_bytes(data[:8], "little")
  offset = json.loads(data[8 : 8 + header])[name]["data_offsets"][0]
  data[8 + header + offset + bit // 8] ^= 1 << bit % 8
  file.write_bytes(data)
  return file


NAME = "question_encoder.encode_proj.weight"


@pytest.mark.parametrize("bit", [0, 22, 30])
def test_any_flipped_bit_is_found_by_our_manifest(checkpoints, bit):
  path = checkpoints.dpr()
  flip(path, NAME, bit)
  with pytest.raises(
    ValueError, match=r"model\.safetensors in .*was damaged: .*Export or copy"
  ):
    load_encoder(path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 0.02, 1.5])
def test_without_a_manifest_absurd_values_name_the_tensor(checkpoints, value):
  """A finite weight has the top bit of its exponent flipped."""

  def edit(tensors):
    tensors[NAME][1, 2] = value
    if np.isfinite(value):
      tensors[NAME].view(np.uint32)[1, 2] ^= 1 << 30
    else:
      tensors[NAME][2, 2] = value

  path = checkpoints.dpr()
  checkpoints.edit_tensors(path, edit)
  count = 1 if np.isfinite(value) else 2
  with pytest.raises(
    ValueError,
    match=rf"{NAME} in .* holds .* at \[1, 2\] \({count} of 40 values\)",
  ):
    load_encoder(path)


def test_a_bias_of_the_logits_may_ban_a_token(checkpoints):
  path = checkpoints.generator(checkpoints.bart)

  def edit(tensors):
    tensors["final_logits_bias"][0, 3] = np.finfo(np.float32).min

  checkpoints.edit_tensors(path, edit)
  bias = load_generator(path).params["final_logits_bias"]
  assert bias[3] == np.finfo(np.float32).min


def test_whole_numbers_are_no_weights(checkpoints):
  path = checkpoints.dpr()
  checkpoints.edit_tensors(path, lambda t: t | {NAME: t[NAME].astype(np.int8)})
  with pytest.raises(ValueError, match=f"{NAME} in .* has dtype I8; expected"):
    load_encoder(path)


@pytest.mark.parametrize(
  ("pickle", "state"),
  [
    ("pytorch_model.bin", r"holds weights as a pickle alone \(pytorch_model"),
    ("", "There is no model.safetensors and no model.safetensors.index.json"),
  ],
)
def test_a_pickle_is_not_read_and_the_error_says_how_to_convert_it(
  checkpoints, pickle, state
):
  path = checkpoints.dpr()
  (path / "manifest.json").unlink()
  (path / "model.safetensors").unlink()
  if pickle:
    # Loading it would end the tests.
    (path / pickle).write_bytes(b"cposix\n_exit\n(I1\ntR.")
  remedy = (
    "rag-jax convert-hf --input=.*dpr --output=DIR" if pickle else "Copy the"
  )
  with pytest.raises(
    FileNotFoundError, match=rf"{state}[\s\S]*never read here[\s\S]*{remedy}"
  ):
    load_encoder(path)
