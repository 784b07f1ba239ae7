"""What is built is what the config describes."""

import dataclasses

import jax.numpy as jnp
import pytest

from rag_jax.config import Config
from rag_jax.config import EncoderConfig
from rag_jax.config import GeneratorConfig
from rag_jax.models import rag

V = 13


def test_every_setting_of_the_config_arrives_in_the_model():
  config = Config()
  config.data.passage_length = 77
  config.train.compute_dtype = "bfloat16"
  config.encoder = EncoderConfig(
    num_layers=3,
    embed_dim=6,
    num_heads=3,
    mlp_dim=10,
    pooling="mean",
    projection_dim=5,
    normalize=True,
    tied=False,
    score_scale=3.0,
    learn_score_scale=True,
    dropout=0.25,
    attention_dropout=0.375,
    init_from="elsewhere",
    passage_init_from="there",
    vocab_size=21,
    max_positions=80,
    activation="tanh",
    norm_eps=1e-3,
    num_token_types=4,
    pooler=True,
  )
  config.generator = GeneratorConfig(
    num_layers=4,
    embed_dim=12,
    num_heads=6,
    mlp_dim=14,
    activation="relu",
    norm="pre",
    embedding_norm=False,
    scale_embedding=True,
    position_offset=0,
    max_positions=99,
    position_init="sinusoid",
    relative_buckets=16,
    init="copy",
    dropout=0.125,
    attention_dropout=0.25,
    activation_dropout=0.5,
    fixed=("encoder",),
    init_from="elsewhere",
    vocab_size=20,
    num_decoder_layers=5,
    num_decoder_heads=3,
    head_dim=2,
    decoder_mlp_dim=15,
    gated=True,
    norm_kind="rms",
    norm_eps=1e-4,
    use_bias=False,
    positions="none",
    relative_max_distance=64,
    relative_shared=True,
    scale_attention=False,
    tied_output=False,
    scale_output=True,
    logits_bias=False,
    decoder_start_id=7,
  )
  model = rag.build_model(config, vocab_size=V, decoder_start_id=9)
  assert model.generator.copy_init
  assert model.score_scale == 3.0
  assert model.learn_score_scale
  for tower in (model.question_encoder, model.passage_encoder):
    for field in dataclasses.fields(EncoderConfig):
      if hasattr(tower, field.name):
        value = getattr(config.encoder, field.name)
        assert getattr(tower, field.name) == value, field.name
        assert value != field.default, f"{field.name} is not tested"
  for field in dataclasses.fields(GeneratorConfig):
    value = getattr(config.generator, field.name)
    assert value != field.default, f"{field.name} is not tested"
    if field.name not in ("init", "init_from", "fixed"):
      assert getattr(model.generator, field.name) == value, field.name
  config.encoder.vocab_size = config.encoder.max_positions = 0
  config.generator.vocab_size, config.generator.decoder_start_id = 0, -1
  model = rag.build_model(
    config, vocab_size=V, retriever_vocab_size=8, decoder_start_id=9
  )
  assert model.generator.vocab_size == V
  assert model.generator.decoder_start_id == 9
  for tower in (model.question_encoder, model.passage_encoder):
    assert (tower.vocab_size, tower.max_positions) == (8, 77)
  for part in (model.question_encoder, model.generator):
    assert part.dtype == jnp.bfloat16
    assert part.param_dtype == jnp.float32


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
