"""config.json of generators: what is read, what is refused, what is written."""

import dataclasses
import json

import pytest

from rag_jax.weights.config_values import ConfigValues
from rag_jax.weights.config_values import SpecialIds
from rag_jax.weights.generator_configs import explicit
from rag_jax.weights.generator_configs import generator_config
from rag_jax.weights.generator_configs import generator_type
from rag_jax.weights.generator_configs import read_generator_config
from rag_jax.weights.load import load_generator
from rag_jax.weights.load import load_rag

IDS = SpecialIds(pad=1, bos=0, eos=2)


def variants(checkpoints):
  bart, t5 = checkpoints.bart, checkpoints.t5
  bart = dataclasses.replace(bart, decoder_start_id=2)
  positions = [f"{part}/position_embedding" for part in ("encoder", "decoder")]
  pegasus = {
    "norm": "pre",
    "embedding_norm": False,
    "position_offset": 0,
    "fixed": ("final_logits_bias", *positions),
  }
  gated = {"gated": True, "activation": "gelu_new", "scale_output": False}
  return {
    "bart": ("bart", bart),
    "scaled": ("bart", dataclasses.replace(bart, scale_embedding=True)),
    "untied": ("bart", dataclasses.replace(bart, tied_output=False)),
    "mbart": ("mbart", dataclasses.replace(bart, norm="pre")),
    "pegasus": ("pegasus", dataclasses.replace(bart, **pegasus)),
    "t5": ("t5", t5),
    "t5 v1.1": ("t5", dataclasses.replace(t5, **gated, tied_output=False)),
    "t5 tied": ("t5", dataclasses.replace(t5, **gated)),
    "t5 silu": ("t5", dataclasses.replace(t5, gated=True, activation="silu")),
    "t5 gelu": ("t5", dataclasses.replace(t5, activation="gelu")),
  }


@pytest.mark.parametrize(
  "name",
  [
    "bart", "scaled", "untied", "mbart", "pegasus", "t5", "t5 v1.1", "t5 tied",
    "t5 silu", "t5 gelu",
  ],
)  # fmt: skip
@pytest.mark.parametrize("version", [4, 5])
def test_fields_come_back_in_the_spelling_of_both_versions(
  checkpoints, name, version
):
  model_type, fields = variants(checkpoints)[name]
  if model_type == "t5":
    fields = dataclasses.replace(fields, position_offset=0, norm_eps=1e-6)
  assert generator_type(fields) == model_type
  config = generator_config(fields, model_type, IDS)
  del config["dtype" if version == 4 else "torch_dtype"]
  if version == 4:  # which does not know this one
    config.pop("scale_decoder_outputs", None)
  config = json.loads(json.dumps(config))
  if fields.tied_output:
    head = "absent" if fields.scale_output or model_type != "t5" else "copy"
  else:
    head = "own"
  again = read_generator_config(ConfigValues(config, "c"), head)
  expected = explicit(fields)
  if model_type == "t5":
    expected["max_positions"] = again.max_positions  # T5 has none
  assert explicit(again) == expected


@pytest.mark.parametrize(
  ("base", "changes", "nearest", "problem"),
  [
    ("bart", {"use_bias": False}, "bart", "use_bias=False, expected True"),
    ("bart", {"norm_eps": 1e-6}, "bart", "norm_eps=1e-06, expected 1e-05"),
    ("bart", {"position_offset": 0}, "bart", "position_offset=0, expected 2"),
    ("bart", {"relative_buckets": 32}, "bart", "relative_buckets=32, expect"),
    ("bart", {"head_dim": 3}, "bart", "head_dim=3, expected embed_dim / num_"),
    ("bart", {"logits_bias": False}, "bart", "logits_bias=False, expected Tr"),
    ("t5", {"relative_shared": False}, "t5", "relative_shared=False, expected"),
    ("t5", {"relative_buckets": 0}, "t5", "relative_buckets=0, expected 32"),
    ("t5", {"num_decoder_heads": 4}, "t5", "num_decoder_heads=4, expected nu"),
    ("t5", {"decoder_mlp_dim": 5}, "t5", "decoder_mlp_dim=5, expected mlp_di"),
    ("t5", {"scale_attention": True}, "t5", "scale_attention=True, expected F"),
    ("t5", {"gated": True}, "t5", "activation='gelu' with gated=True, expect"),
  ],
)
def test_fields_that_no_class_has_are_named(
  checkpoints, base, changes, nearest, problem
):
  fields = getattr(checkpoints, base)
  with pytest.raises(
    ValueError, match=rf"No model of .* nearest is {nearest}, but: .*Train a"
  ) as e:
    generator_type(dataclasses.replace(fields, **changes))
  assert problem in str(e.value)


@pytest.mark.parametrize("model_type", ["marian", "led", "mistral", None])
def test_another_architecture_is_refused_and_the_supported_are_named(
  checkpoints, model_type
):
  path = checkpoints.generator(checkpoints.bart)
  checkpoints.edit_json(path, model_type=model_type)
  with pytest.raises(
    ValueError, match=r"which rag_jax does not have\. Supported are, as encode"
  ):
    load_generator(path)


def test_an_encoder_is_no_generator_and_no_rag(checkpoints):
  path = checkpoints.dpr()
  with pytest.raises(
    ValueError, match=r"model_type='dpr'; expected a generator with an enc"
  ):
    load_generator(path)
  with pytest.raises(
    ValueError, match=r"model_type='dpr'; expected retriever and generator tog"
  ):
    load_rag(path)


def test_a_rag_of_parts_that_we_do_not_have_is_refused(checkpoints):
  path = checkpoints.rag()
  config = json.loads((path / "config.json").read_text())
  part = config["question_encoder"] | {"model_type": "bert"}
  checkpoints.edit_json(path, question_encoder=part)
  with pytest.raises(
    ValueError, match=r"model_type='bert'; expected a question_encoder of RAG"
  ):
    load_rag(path)


@pytest.mark.parametrize("value", ["gated-gelu-new", "mlp-relu", "gated-x"])
def test_a_feed_forward_that_t5_does_not_have_is_named(checkpoints, value):
  path = checkpoints.generator(checkpoints.t5)
  checkpoints.edit_json(path, feed_forward_proj=value)
  with pytest.raises(ValueError, match=r"says feed_forward_proj='.*; expected"):
    load_generator(path)


def test_heads_that_do_not_divide_the_width_are_named(checkpoints):
  path = checkpoints.generator(checkpoints.bart)
  checkpoints.edit_json(path, decoder_attention_heads=3)
  with pytest.raises(
    ValueError, match=r"d_model=8, encoder_attention_heads=2, decoder_attenti"
  ):
    load_generator(path)


def test_an_untied_t5_cannot_be_scaled(checkpoints):
  path = checkpoints.generator(checkpoints.t5)

  def edit(tensors):
    tensors["lm_head.weight"] = tensors["shared.weight"] + 1

  checkpoints.edit_tensors(path, edit)
  with pytest.raises(
    ValueError, match=r"scale_decoder_outputs=true, but lm_head\.weight is not"
  ):
    load_generator(path)


def test_generation_settings_come_from_their_file_or_from_the_config(
  checkpoints,
):
  path = checkpoints.generator(
    checkpoints.bart, generation={"num_beams": 4, "length_penalty": 0.6}
  )
  ids = {
    "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
    "decoder_start_token_id": 2,
  }  # fmt: skip
  assert load_generator(path).generation == ids | {
    "num_beams": 4, "length_penalty": 0.6,
  }  # fmt: skip
  # Version 4 kept them in config.json, among much else.
  (path / "generation_config.json").unlink()
  checkpoints.edit_json(
    path, num_beams=2, min_length=None, task="summary", eos_token_id=[2, 3]
  )
  loaded = load_generator(path)
  assert loaded.generation == ids | {"num_beams": 2, "eos_token_id": [2, 3]}
  assert loaded.special_ids == checkpoints.ids


def test_what_a_class_ends_with_by_default_is_a_setting_too(checkpoints):
  """A BartConfig that does not say so ends with token 2 all the same."""
  path = checkpoints.generator(checkpoints.bart)
  (path / "generation_config.json").unlink()
  checkpoints.edit_json(path, forced_eos_token_id=...)
  assert load_generator(path).generation["forced_eos_token_id"] == 2
