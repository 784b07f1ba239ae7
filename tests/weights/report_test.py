"""The report says what every tensor became, and how many numbers there are."""

import re

import jax

from rag_jax.weights.load import load_encoder
from rag_jax.weights.load import load_generator
from rag_jax.weights.load import load_rag


def num_parameters(params):
  return sum(x.size for x in jax.tree.leaves(params))


def test_layers_that_are_alike_are_one_line(checkpoints):
  loaded = load_encoder(checkpoints.dpr())
  lines = str(loaded.report).splitlines()
  assert re.split(r" {2,}", lines[0]) == [
    "theirs", "ours", "shape", "parameters",
  ]  # fmt: skip
  kernel = [line for line in lines if "query/kernel" in line]
  assert [re.split(r" {2,}", line) for line in kernel] == [[
    "question_encoder.bert_model.encoder.layer.{0..1}.attention.self.query"
    ".weight",
    "layer_{0..1}/self_attention/query/kernel",
    "[8, 2, 4]",
    "128",
  ]]  # fmt: skip
  # 16 tensors a layer, 5 of the embeddings, 2 of the projection.
  assert len(lines) == 1 + 16 + 5 + 2 + 1
  assert num_parameters(loaded.params) == loaded.report.num_parameters
  assert lines[-1] == f"{loaded.report.num_parameters:,} parameters in all"


def test_t5_has_numbers_inside_its_layers_that_stay(checkpoints):
  table = str(load_generator(checkpoints.generator(checkpoints.t5)).report)
  assert "decoder.block.{0..1}.layer.2.DenseReluDense.wi.weight" in table
  # The relative positions stand in the first block alone.
  assert (
    "decoder.block.0.layer.0.SelfAttention.relative_attention_bias" in table
  )


def test_a_rag_is_reported_with_the_names_of_its_parts(checkpoints):
  loaded = load_rag(checkpoints.rag(kind="sequence", tied=True))
  table = str(loaded.report)
  for name in (
    "question_encoder/projection/kernel",
    "passage_encoder/projection/kernel",
    "generator/decoder/layer_0/cross_attention/out/kernel",
    "rag.generator.model.decoder.layers.0.encoder_attn.out_proj.weight",
    "note: a RAG-Sequence checkpoint; the other kind has the same tensors",
  ):
    assert name in table, name
  encoder = num_parameters(loaded.question_encoder.params)
  assert loaded.report.num_parameters == encoder + num_parameters(loaded.params)
