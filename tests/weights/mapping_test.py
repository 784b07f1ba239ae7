"""Rules in both directions, and one error for all that does not fit."""

import re

import numpy as np
import pytest

from rag_jax.weights.encoder_tensors import dpr
from rag_jax.weights.generator_tensors import generator_architecture
from rag_jax.weights.load import load_encoder
from rag_jax.weights.load import load_generator
from rag_jax.weights.load import load_rag
from rag_jax.weights.mapping import Rule
from rag_jax.weights.mapping import put


def test_a_kernel_of_heads_is_torchs_kernel_split():
  """PyTorch: y = x W.T with W [N * H, D]; ours: [D, N, H]."""
  rng = np.random.default_rng(0)
  weight, x = rng.normal(size=(6, 4)), rng.normal(size=4)
  rule = Rule("ours", "theirs", (4, 2, 3), (6, 4), transposed=True)
  kernel = rule.to_ours(weight)
  np.testing.assert_allclose(
    np.einsum("d,dnh->nh", x, kernel).reshape(-1), weight @ x
  )
  np.testing.assert_array_equal(rule.to_theirs(kernel), weight)


def test_an_output_kernel_is_torchs_kernel_split():
  rng = np.random.default_rng(0)
  weight, x = rng.normal(size=(4, 6)), rng.normal(size=(2, 3))
  rule = Rule("ours", "theirs", (2, 3, 4), (4, 6), transposed=True)
  kernel = rule.to_ours(weight)
  np.testing.assert_allclose(
    np.einsum("nh,nhd->d", x, kernel), weight @ x.reshape(-1)
  )
  np.testing.assert_array_equal(rule.to_theirs(kernel), weight)


def test_every_tensor_has_one_place_on_either_side(checkpoints):
  architectures = [dpr(checkpoints.encoder, "question")]
  architectures += [
    generator_architecture(fields, kind)
    for fields, kind in ((checkpoints.bart, "bart"), (checkpoints.t5, "t5"))
  ]
  for architecture in architectures:
    for side in ("ours", "theirs"):
      names = [getattr(rule, side) for rule in architecture.rules]
      assert len(names) == len(set(names)), architecture.name


def test_all_that_is_wrong_stands_in_one_error(checkpoints):
  path = checkpoints.dpr()

  def edit(tensors):
    del tensors["question_encoder.encode_proj.bias"]
    prefix = "question_encoder.bert_model.encoder.layer.1"
    del tensors[f"{prefix}.output.dense.bias"]
    tensors[f"{prefix}.lora.weight"] = np.zeros(3, np.float32)
    tensors["classifier.bias"] = np.zeros(2, np.float32)
    tensors["question_encoder.encode_proj.weight"] = np.zeros(
      (5, 9), np.float32
    )
    embeddings = "question_encoder.bert_model.embeddings"
    tensors[f"{embeddings}.position_ids"] = np.arange(1, 10)[None]

  checkpoints.edit_tensors(path, edit)
  with pytest.raises(ValueError, match=r"are not what its config\.json") as e:
    load_encoder(path)
  message = str(e.value)
  bert = r"question_encoder\.bert_model"
  for pattern in (
    rf"missing: {bert}\.encoder\.layer\.1\.output\.dense\.bias;"
    r" question_encoder\.encode_proj\.bias\n",
    rf"unknown: {bert}\.encoder\.layer\.1\.lora\.weight; classifier\.bias\n",
    r"question_encoder\.encode_proj\.weight is \[5, 9\], expected \[5, 8\] for"
    r" our projection/kernel \[8, 5\]",
    r"position_ids does not count from zero",
    r"Expected those of DPRQuestionEncoder, all and no others",
  ):
    assert re.search(pattern, message), (pattern, message)


def test_the_problems_of_all_parts_of_a_rag_stand_in_one_error(checkpoints):
  path = checkpoints.rag()

  def edit(tensors):
    del tensors["rag.generator.model.shared.weight"]
    encoder = "rag.question_encoder.question_encoder"
    del tensors[f"{encoder}.encode_proj.bias"]
    tensors["retriever.weight"] = np.zeros(2, np.float32)

  checkpoints.edit_tensors(path, edit)
  with pytest.raises(ValueError, match=r"are not what its config\.json") as e:
    load_rag(path)
  for part in (
    "DPRQuestionEncoder: missing:"
    " rag.question_encoder.question_encoder.encode_proj.bias",
    "BartForConditionalGeneration: missing: rag.generator.model.shared.weight",
    "RagModel: unknown: retriever.weight",
  ):
    assert part in str(e.value)
  # One part alone does not look at the others.
  with pytest.raises(
    ValueError, match=r"missing: rag\.generator\.model\.shar"
  ) as e:
    load_generator(path)
  assert "encode_proj" not in str(e.value)


@pytest.mark.parametrize(
  "name", ["lm_head.weight", "model.decoder.embed_tokens.weight"]
)
def test_a_tied_copy_is_ignored_if_it_is_one(checkpoints, name):
  path = checkpoints.generator(checkpoints.bart)
  before = load_generator(path)
  checkpoints.edit_tensors(path, lambda t: t | {name: t["model.shared.weight"]})
  after = load_generator(path)
  assert checkpoints.flat(after.params) == checkpoints.flat(before.params)
  assert after.report.ignored == ((name, "the embedding table again"),)


def test_a_tied_copy_that_differs_is_an_error(checkpoints):
  path = checkpoints.generator(checkpoints.t5)
  name = "encoder.embed_tokens.weight"

  def edit(tensors):
    tensors[name] = tensors["shared.weight"].copy()
    tensors[name][0, 0] = np.nextafter(tensors[name][0, 0], np.float32(9))

  checkpoints.edit_tensors(path, edit)
  with pytest.raises(
    ValueError, match=rf"contradicting: {name} differs from shared\.weight, its"
  ):
    load_generator(path)


def test_two_spellings_of_one_tensor_are_refused(checkpoints):
  path = checkpoints.bert()
  name = "embeddings.LayerNorm"
  checkpoints.edit_tensors(
    path, lambda t: t | {f"{name}.gamma": t[f"{name}.weight"]}
  )
  with pytest.raises(
    ValueError, match=r"LayerNorm\.\w+ and embeddings\.LayerNorm\.\w+, two spe"
  ):
    load_encoder(path)


def test_a_placeholder_of_ours_has_to_be_zero(checkpoints):
  path = checkpoints.bert(num_token_types=0)
  name = "embeddings.token_type_embeddings.weight"

  def edit(tensors):
    tensors[name][0, 3] = 1e-9

  checkpoints.edit_tensors(path, edit)
  with pytest.raises(ValueError, match=f"{name} is not zero, as config.json"):
    load_encoder(path)


def test_parameters_that_do_not_fit_the_fields_are_all_named(checkpoints):
  params = checkpoints.encoder_params()
  del params["layer_1"]["mlp"]["up"]["bias"]
  params["pooling"] = {"kernel": np.zeros((8, 1), np.float32)}
  params["projection"]["kernel"] = np.zeros((8, 4), np.float32)
  with pytest.raises(ValueError, match="The parameters are not those of") as e:
    put(params, dpr(checkpoints.encoder, "passage"))
  for line in (
    "layer_1/mlp/up/bias is missing",
    "pooling/kernel has no place there",
    "projection/kernel is [8, 4], expected [8, 5]",
    "Give the config of the run",
  ):
    assert line in str(e.value)
