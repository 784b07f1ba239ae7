"""What is no cross-encoder, or a damaged one, is refused with the reason."""

import json
import shutil

import numpy as np
import pytest
from safetensors import numpy as safetensors
from small_cross_encoder import change_tensors
from small_cross_encoder import rewrite
from small_cross_encoder import write_cross_encoder
from small_encoder import write_encoder

from rag_jax.weights.cross_encoder import load_cross_encoder

TEXTS = ["the owls live in the caves", "the bees live in the woods"]


@pytest.fixture(scope="module")
def original(tmp_path_factory):
  return write_cross_encoder(tmp_path_factory.mktemp("cross") / "model", TEXTS)


@pytest.fixture
def model(original, tmp_path):
  return shutil.copytree(original, tmp_path / "model")


def test_the_report_has_no_remark_and_every_tensor(model):
  loaded = load_cross_encoder(model)
  assert (loaded.report.notes, loaded.report.ignored) == ((), ())
  theirs = safetensors.load_file(model / "model.safetensors")
  assert {line.theirs for line in loaded.report.mapped} == set(theirs)
  assert loaded.params["out"]["kernel"].shape == (16, 1)
  assert loaded.activation == "tanh"


def test_a_pooler_that_the_class_does_not_read_is_reported(model):
  pooler = np.ones((16, 16), np.float32)
  change_tensors(model, pooler__dense__weight=pooler)
  assert load_cross_encoder(model).report.ignored == (
    ("pooler.dense.weight", "its head reads the first state"),
  )


@pytest.mark.parametrize("labels", [2, 3])
def test_several_labels_are_refused_with_the_reason(model, labels):
  change_tensors(
    model,
    classifier__out_proj__weight=np.ones((labels, 16), np.float32),
    classifier__out_proj__bias=np.ones(labels, np.float32),
  )
  expected = rf"has {labels} labels \(classifier.out_proj.weight\); expected 1"
  with pytest.raises(ValueError, match=expected):
    load_cross_encoder(model)


def test_labels_that_contradict_the_tensors_are_refused(model):
  rewrite(model, id2label={"0": "no", "1": "yes"})
  with pytest.raises(ValueError, match=r"2 labels \(id2label in config.json\)"):
    load_cross_encoder(model)


def test_an_encoder_of_single_texts_is_refused(tmp_path):
  path = write_encoder(tmp_path / "encoder", TEXTS * 4)
  with pytest.raises(
    ValueError, match=r"no classifier\.weight, the head .* an"
  ):
    load_cross_encoder(path)


@pytest.mark.parametrize("model_type", ["t5", "gpt2", "modernbert", 7, None])
def test_another_family_is_refused_by_name(model, model_type):
  rewrite(model, model_type=model_type)
  with pytest.raises(ValueError, match="model_type"):
    load_cross_encoder(model)


def test_a_tensor_that_is_missing_or_misshapen_is_named(model):
  change_tensors(
    model,
    classifier__dense__bias=np.ones(15, np.float32),
    embeddings__LayerNorm__bias=None,
  )
  with pytest.raises(
    ValueError, match=r"missing: embeddings\.LayerNorm\.bias"
  ) as e:
    load_cross_encoder(model)
  assert "classifier.dense.bias is [15], expected [16]" in str(e.value)


def test_without_a_tokenizer_it_says_so(model):
  for name in ("tokenizer.json", "tokenizer_config.json"):
    (model / name).unlink()
  with pytest.raises(
    FileNotFoundError, match="no tokenizer beside its weights"
  ):
    load_cross_encoder(model)


def test_a_tokenizer_of_another_checkpoint_is_refused(model):
  content = json.loads((model / "tokenizer.json").read_text())
  content["added_tokens"].append(
    content["added_tokens"][0] | {"id": 5000, "content": "<more>"}
  )
  (model / "tokenizer.json").write_text(json.dumps(content))
  with pytest.raises(ValueError, match="ids up to 5000, but the cross-encoder"):
    load_cross_encoder(model)
