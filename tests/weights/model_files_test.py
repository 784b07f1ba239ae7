"""A model comes back bit for bit, or says which of its files is not whole."""

import jax.numpy as jnp
import numpy as np
import pytest

from rag_jax import artifacts
from rag_jax.weights.model_files import load_model
from rag_jax.weights.model_files import save_model


@pytest.fixture
def params():
  rng = np.random.default_rng(0)
  return {
    "log_score_scale": jnp.float32(2.302585),  # a scalar
    "generator": {
      "kernel": jnp.asarray(rng.normal(size=(3, 4, 2)).astype(np.float32)),
      "odd": jnp.array([np.finfo(np.float32).tiny, -0.0, 3e38], jnp.float32),
    },
    "question_encoder": {"layer_0": {"bias": jnp.zeros((1,))}},
  }


@pytest.fixture
def path(tmp_path, params):
  path = tmp_path / "run" / "model"
  save_model(path, params, {"step": 12, "tokenizer": "1a2b"})
  return path


def assert_bit_equal(one, other):
  assert type(one) is type(other) or not isinstance(one, dict)
  if isinstance(one, dict):
    assert list(sorted(one)) == list(sorted(other))
    for name, x in one.items():
      assert_bit_equal(x, other[name])
  else:
    one, other = np.asarray(one), np.asarray(other)
    assert (one.shape, one.dtype) == (other.shape, other.dtype)
    assert one.tobytes() == other.tobytes()


def test_parameters_and_content_come_back_bit_for_bit(path, params):
  loaded, content = load_model(path)
  assert_bit_equal(loaded, params)
  assert content == {"step": 12, "tokenizer": "1a2b"}


def test_rows_that_do_not_lie_in_order_are_saved_as_they_are(tmp_path):
  matrix = np.arange(6, dtype=np.float32).reshape(2, 3)
  save_model(tmp_path, {"transposed": matrix.T, "every": matrix[:, ::2]}, {})
  loaded, _ = load_model(tmp_path)
  np.testing.assert_array_equal(loaded["transposed"], matrix.T)
  np.testing.assert_array_equal(loaded["every"], matrix[:, ::2])


def test_a_model_is_replaced_by_the_next(path):
  save_model(path, {"other": jnp.ones(2)}, {"step": 13})
  loaded, content = load_model(path)
  assert_bit_equal(loaded, {"other": jnp.ones(2)})
  assert content == {"step": 13}


def test_a_file_that_was_cut_off_is_named(path):
  file = path / "params.safetensors"
  file.write_bytes(file.read_bytes()[:-1])
  with pytest.raises(
    ValueError,
    match=r"params\.safetensors in .*/model was cut off: .*Run the training"
    r" command of this workdir again: it goes on from the last checkpoint",
  ):
    load_model(path)


def test_a_flipped_bit_is_found(path):
  file = path / "params.safetensors"
  content = bytearray(file.read_bytes())
  content[-3] ^= 1
  file.write_bytes(content)
  with pytest.raises(
    ValueError,
    match=r"params\.safetensors in .*/model was damaged: its content changed"
    r".*Run the training command of this workdir again",
  ):
    load_model(path)


def test_a_missing_file_is_named(path):
  (path / "params.safetensors").unlink()
  with pytest.raises(
    ValueError,
    match=r"params\.safetensors is missing from .*/model.*Run the training",
  ):
    load_model(path)


def test_a_save_that_was_cut_off_is_no_model(path, tmp_path):
  (path / "manifest.json").unlink()
  for directory in (path, tmp_path / "nothing"):
    with pytest.raises(
      FileNotFoundError,
      match=r"There is no manifest\.json.*it goes on from the last checkpoint",
    ):
      load_model(directory)


def test_a_save_over_an_older_model_is_never_half_of_each(
  path, params, monkeypatch
):
  def full_disk(*args, **kwargs):
    raise OSError("No space left on device")

  monkeypatch.setattr(artifacts, "write_manifest", full_disk)
  with pytest.raises(OSError, match="No space"):
    save_model(path, params, {"step": 13})
  with pytest.raises(FileNotFoundError, match="the build was cut off"):
    load_model(path)
