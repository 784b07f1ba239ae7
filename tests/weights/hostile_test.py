"""Checkpoints that claim what cannot be are refused before memory is taken."""

import json
import os
import struct
import time

import pytest

from rag_jax.config import Config
from rag_jax.config_json import from_json
from rag_jax.config_json import to_json
from rag_jax.config_rules import validate
from rag_jax.weights.directory import open_directory
from rag_jax.weights.load import load_encoder
from rag_jax.weights.load import load_generator
from rag_jax.weights.load import load_rag


@pytest.mark.parametrize(
  ("model", "name"),
  [
    ("bart", "encoder_layers"),
    ("bart", "decoder_layers"),
    ("t5", "num_layers"),
    ("t5", "num_decoder_layers"),
    ("bert", "num_hidden_layers"),
  ],
)
def test_layers_are_compared_with_the_tensors_before_they_are_counted(
  checkpoints, model, name
):
  if model == "bert":
    path, load = checkpoints.bert(), load_encoder
  else:
    path = checkpoints.generator(getattr(checkpoints, model))
    load = load_generator
  for number in (2**31 - 1, 10_000):
    checkpoints.edit_json(path, **{name: number})
    start = time.monotonic()
    with pytest.raises(
      ValueError, match=f"there are {number} layers .* tensors in all. Expected"
    ):
      load(path)
    assert time.monotonic() - start < 10
  for number in (2**31, 10**400, -1, True, 1.5):
    checkpoints.edit_json(path, **{name: number})
    with pytest.raises(ValueError, match=f"says {name}=.*; expected a whole"):
      load(path)


@pytest.mark.parametrize("value", [10**400, float("nan"), float("inf")])
def test_numbers_are_finite(checkpoints, value):
  path = checkpoints.bert()
  checkpoints.edit_json(path, layer_norm_eps=value)
  with pytest.raises(ValueError, match=r"layer_norm_eps=.*a finite number"):
    load_encoder(path)


def test_lengths_that_nobody_has_are_refused(checkpoints):
  path = checkpoints.rag()
  checkpoints.edit_json(path, max_combined_length=2**31 - 1)
  with pytest.raises(ValueError, match="max_combined_length=2147483647"):
    load_rag(path)


def write_header(path, header, holes):
  """Writes a safetensors file of which only the header takes room."""
  text = json.dumps(header).encode()
  with (path / "model.safetensors").open("wb") as file:
    file.write(struct.pack("<Q", len(text)) + text)
    file.truncate(8 + len(text) + holes)
  (path / "manifest.json").unlink(missing_ok=True)


def test_a_header_that_claims_terabytes_is_refused(checkpoints):
  path = checkpoints.bert()
  size = 1 << 42
  tensor = {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}
  write_header(path, {"pooler.dense.weight": tensor}, size)
  with pytest.raises(ValueError, match=r"take 4,398,.* bytes .* the memory of"):
    load_encoder(path)
  write_header(path, {"pooler.dense.weight": tensor}, 0)
  with pytest.raises(ValueError, match="cannot be read"):
    load_encoder(path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_fifo_in_a_checkpoint_is_never_waited_for(checkpoints, name):
  path = checkpoints.bert()
  (path / "manifest.json").unlink()
  (path / name).unlink()
  os.mkfifo(path / name)
  with pytest.raises(ValueError, match=f"{name} in .* is a FIFO"):
    load_encoder(path)


@pytest.mark.parametrize("depth", [101, 5_000, 100_000])
def test_json_that_is_nested_deeply_is_refused(checkpoints, depth):
  path = checkpoints.bert()
  (path / "manifest.json").unlink()
  text = (path / "config.json").read_text()
  deep = '{"x": ' + "[" * depth + "]" * depth + ", " + text.lstrip("{ \n")
  (path / "config.json").write_text(deep)
  with pytest.raises(ValueError, match=r"config\.json is not JSON .*nested"):
    open_directory(path).json("config.json")
  deep = to_json(Config()).replace('"seed": 0', '"seed": ' + "[" * depth, 1)
  with pytest.raises(ValueError, match="is not JSON"):
    from_json(deep)


def test_numbers_of_a_config_have_a_largest_size():
  for digits in (400, 5_000):
    config = Config(seed=10**digits)
    with pytest.raises(ValueError, match=r"seed is a number of \d+ bits"):
      validate(config)
  config = Config(seed=2**63 - 1)
  validate(config)
  config.data.context_length = 2**31
  with pytest.raises(ValueError, match=r"data\.context_length is a number of"):
    validate(config)
  text = to_json(Config()).replace('"seed": 0', '"seed": ' + "7" * 5_000)
  with pytest.raises(ValueError, match="is not JSON"):
    from_json(text)
