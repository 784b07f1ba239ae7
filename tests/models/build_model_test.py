"""What is built is what the config describes."""

import copy
import dataclasses

import jax.numpy as jnp
import pytest

from rag_jax.config import Config
from rag_jax.config_models import EncoderConfig
from rag_jax.config_models import GeneratorConfig
from rag_jax.config_models import TransformerConfig
from rag_jax.models import rag
from rag_jax.models.encoders import layer_config

V = 13


def test_the_model_has_the_config_of_each_part_whole():
  config = Config()
  config.train.compute_dtype = "bfloat16"
  config.encoder = EncoderConfig(
    num_layers=3,
    tied=False,
    score_scale=3.0,
    learn_score_scale=True,
    vocab_size=21,
    max_positions=80,
  )
  config.generator = GeneratorConfig(
    norm="pre", init="copy", vocab_size=20, decoder_start_id=7
  )
  model = rag.build_model(config, vocab_size=V, decoder_start_id=9)
  assert model.score_scale == 3.0
  assert model.learn_score_scale
  for tower in (model.question_encoder, model.passage_encoder):
    assert tower.config == config.encoder
  assert model.generator.config == config.generator
  for part in (model.question_encoder, model.generator):
    assert part.dtype == jnp.bfloat16


def test_sizes_that_the_config_leaves_open_are_filled_in():
  config = Config()
  config.data.passage_length = 77
  config.encoder.tied = False
  model = rag.build_model(
    config, vocab_size=V, retriever_vocab_size=8, decoder_start_id=9
  )
  assert model.generator.config == dataclasses.replace(
    config.generator, vocab_size=V, decoder_start_id=9
  )
  for tower in (model.question_encoder, model.passage_encoder):
    assert tower.config == dataclasses.replace(
      config.encoder, vocab_size=8, max_positions=77
    )


def test_a_model_stays_as_it_is_when_its_config_changes():
  config = Config()
  generator = rag.build_model(
    config, vocab_size=V, decoder_start_id=9
  ).generator
  before = hash(generator)
  config.generator.num_layers = 7
  assert generator.config.num_layers == 2
  for frozen in (generator.config, copy.deepcopy(generator.config)):
    with pytest.raises(
      dataclasses.FrozenInstanceError, match="num_layers is pa"
    ):
      frozen.num_layers = 7
  assert hash(generator) == before


def test_a_layer_of_a_tower_has_its_choices_and_else_those_of_bert():
  choices = {
    "embed_dim": 6,
    "num_heads": 3,
    "mlp_dim": 10,
    "activation": "tanh",
    "norm_eps": 1e-3,
    "dropout": 0.25,
    "attention_dropout": 0.375,
  }
  layer = layer_config(EncoderConfig(**choices))
  assert layer == TransformerConfig(**choices)
  assert (layer.norm, layer.norm_kind, layer.head_size) == ("post", "layer", 2)


@pytest.mark.parametrize(
  ("name", "dtype"),
  [
    ("auto", "float32"),  # the tests run on a CPU
    ("float32", "float32"),
    ("bfloat16", "bfloat16"),
  ],
)
def test_computes_in_the_dtype_that_is_asked_for(name, dtype):
  assert rag.compute_dtype(name) == jnp.dtype(dtype)
